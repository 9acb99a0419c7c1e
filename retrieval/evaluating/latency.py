"""Latency of single queries, and throughput of a batch."""

from __future__ import annotations

import os
import time
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from tritower.retrieval.index import ProductIndex
from tritower.retrieval.ivf.engine import Settings


def measure_latency(
    index: ProductIndex,
    queries: NDArray[np.float32],
    *,
    k: int = 10,
    repeats: int = 1000,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Latency of single queries on one thread, and throughput of a batch on all threads.

    Args:
        index: the searched index; its files should be in the page cache.
        queries: (Q, D) float32; repeated if there are fewer than `repeats`.
        k: results per query.
        repeats: timed searches, after a tenth as many to warm up.
        settings: search settings; None for the index's own.

    Returns:
        p50_ms, p99_ms, qps, k, queries, threads, and load: the load average of the machine, since
        other processes slow searches down.
    """
    rows = np.resize(np.arange(len(queries)), repeats)  # (repeats,)
    # Single queries on one thread, after some to warm up.
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        for row in rows[: repeats // 10]:
            index.search(queries[row : row + 1], k, settings=settings)
        seconds = np.empty(repeats)
        for number, row in enumerate(rows):
            seconds[number] = _search_seconds(index, queries[row : row + 1], k, settings)
    finally:
        faiss.omp_set_num_threads(threads)
    # The throughput is that of one batch on all threads.
    batch_seconds = _search_seconds(index, queries[rows], k, settings)
    p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1000
    return {
        "p50_ms": round(float(p50), 4),
        "p99_ms": round(float(p99), 4),
        "qps": round(repeats / batch_seconds, 1),
        "k": k,
        "queries": repeats,
        "threads": threads,
        "load": _load_average(),
    }


def _search_seconds(
    index: ProductIndex, queries: NDArray[np.float32], k: int, settings: Settings | None
) -> float:
    start = time.perf_counter()
    index.search(queries, k, settings=settings)
    return time.perf_counter() - start


def _load_average() -> float | None:
    """The load of the last minute; None where the system does not have it."""
    if not hasattr(os, "getloadavg"):
        return None
    return round(os.getloadavg()[0], 2)
