"""Read records in worker processes.

Results come in the order of the records, however many workers there are.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice

from tritower.datamodules.prepare.records import Record
from tritower.datamodules.prepare.rows import Row
from tritower.datamodules.prepare.tables import CatalogueError

CHUNK = 32
"""Records that a worker takes at once.

Enough to pay for the way there and back, few enough to bound memory.
"""

FEW = 512
"""Records that are read before workers are worth their start."""

Parse = Callable[[Record], Row]

_parse: Parse | None = None


def parse_records(
    parse: Parse, records: Iterable[Record], num_workers: int | None
) -> Iterator[Row]:
    """`parse` of every record, in order; at most a few chunks per worker are in memory.

    Args:
        parse: picklable.
        records: what to read.
        num_workers: processes; 0 works in this one; None starts one per core where there are many
            records.

    Raises:
        CatalogueError: a worker died.
    """
    rest = iter(records)
    # A few records are not worth the start of processes.
    if num_workers is None:
        yield from map(parse, islice(rest, FEW))
        more = list(islice(rest, 1))
        rest = chain(more, rest)
        num_workers = _cores() if more else 0
    if num_workers == 0:
        yield from map(parse, rest)
        return
    # A forked child inherits locks of threads that it has not.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, spawn, initializer=_start, initargs=(parse,))
    waiting: deque[tuple[Sequence[Record], Future[list[Row]]]] = deque()
    # Chunks are handed out ahead of time, a few for each process, and come back in order.
    try:
        while chunk := list(islice(rest, CHUNK)):
            waiting.append((chunk, pool.submit(_parse_chunk, chunk)))
            if len(waiting) > 4 * num_workers:
                yield from _result(*waiting.popleft())
        while waiting:
            yield from _result(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _result(chunk: Sequence[Record], future: Future[list[Row]]) -> list[Row]:
    try:
        return future.result()
    except BrokenProcessPool:
        raise CatalogueError(
            f"a worker process died while reading rows {chunk[0].row} to {chunk[-1].row} or a "
            "little later: killed for "
            "memory (use a smaller --num-workers or --max-pixels), or by a picture that crashes "
            "the decoder"
        ) from None


def _start(parse: Parse) -> None:
    global _parse
    _parse = parse


def _parse_chunk(chunk: Sequence[Record]) -> list[Row]:
    assert _parse is not None
    return [_parse(record) for record in chunk]
