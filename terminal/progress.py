"""A progress bar with the rate on a terminal, and one line in the log at the end."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)


@contextmanager
def progress_bar(task: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that reports finished rows.

    Args:
        task: name of the work, "add to the index"; also the beginning of the log line.
        total: number of rows; None if unknown.
        unit: what a row is, plural.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    started = time.perf_counter()
    done = 0
    with Progress(
        *columns, console=console, transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        row = bar.add_task(task, total=total, rate="")

        # The rate is the mean since the start, which is steadier than that of the last seconds.
        def advance(count: int) -> None:
            nonlocal done
            done += count
            rate = done / max(time.perf_counter() - started, 1e-9)
            bar.update(row, completed=done, rate=f"{rate:,.0f} {unit}/s")

        yield advance
    seconds = time.perf_counter() - started
    logger.info(
        "%s: %s %s in %.1f s (%.0f/s)", task, f"{done:,}", unit, seconds, done / max(seconds, 1e-9)
    )


def show_progress(
    batches: Iterable[T], total: int | None, size: Callable[[T], int], task: str, unit: str
) -> Iterator[T]:
    """Yield batches under a progress bar.

    Args:
        batches: iterated over.
        total: number of rows in all batches; None if unknown.
        size: number of rows of one batch.
        task: see `progress_bar`.
        unit: see `progress_bar`.
    """
    with progress_bar(task, total, unit) as advance:
        for batch in batches:
            yield batch
            advance(size(batch))
