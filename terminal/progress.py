"""A progress bar with rates on a terminal, and one line in the log at the end."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)


def show_progress(
    batches: Iterable[T], total: int, size: Callable[[T], int], what: str, unit: str
) -> Iterator[T]:
    """Pass batches on while showing how far they are.

    Args:
        batches: what is iterated.
        total: number of rows in all batches.
        size: number of rows of one batch.
        what: "add to the index"; also the beginning of the log line.
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

    started = time.perf_counter()
    done = 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    console = Console(stderr=True)
    bar = Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task(what, total=total, rate="")
        for batch in batches:
            yield batch
            done += size(batch)
            rate = done / max(time.perf_counter() - started, 1e-9)
            bar.update(task, completed=done, rate=f"{rate:,.0f} {unit}/s")
    seconds = time.perf_counter() - started
    logger.info(
        "%s: %s %s in %.1f s (%.0f/s)", what, f"{done:,}", unit, seconds, done / max(seconds, 1e-9)
    )
