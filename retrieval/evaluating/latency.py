"""Latency of one query at a time, and queries per second of all threads."""

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
    """Latency of single queries on one thread, and throughput of a batch on all.

    Args:
        index: what is searched, with the page cache warm.
        queries: (Q, D) queries; repeated where fewer than `repeats`.
        k: results per query.
        repeats: timed searches, after a tenth as many to warm up.
        settings: how to search; None for the index's own.

    Returns:
        p50_ms, p99_ms, qps, k, queries, threads, and load: the machine's load average, since others
          slow it down.
    """
    rows = np.resize(np.arange(len(queries)), repeats)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        for row in rows[: repeats // 10]:
            index.search(queries[row : row + 1], k, settings=settings)
        seconds = np.array([_timed(index, queries[row : row + 1], k, settings) for row in rows])
    finally:
        faiss.omp_set_num_threads(threads)
    batch_seconds = _timed(index, queries[rows], k, settings)
    p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1000
    return {
        "p50_ms": round(float(p50), 4),
        "p99_ms": round(float(p99), 4),
        "qps": round(repeats / batch_seconds, 1),
        "k": k,
        "queries": repeats,
        "threads": threads,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _timed(
    index: ProductIndex, queries: NDArray[np.float32], k: int, settings: Settings | None
) -> float:
    start = time.perf_counter()
    index.search(queries, k, settings=settings)
    return time.perf_counter() - start
