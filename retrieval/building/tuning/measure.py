"""Measure operating points of an index: recall against exact search, latency and throughput."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from tritower.retrieval.building.tuning.tuning_queries import TuningQueries, counts
from tritower.retrieval.ivf.engine import Engine, Settings
from tritower.retrieval.ivf.operating_points import OperatingPoint, Target, Tuning, pareto
from tritower.retrieval.ranking import metrics

NPROBES = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
K_FACTORS = (2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0)
MIN_RECALL_GAIN = 0.002
"""Where more candidates, or more lists, gain less recall than this, no more are tried."""

MAX_RECALL_LOSS = 0.03
"""Numbers of candidates that lose more recall than this are not tried with more lists."""

TIMED_SEARCHES = 100
"""Searches whose latency is measured."""


def measure(engine: Engine, tuning_queries: Sequence[TuningQueries], target: Target) -> Tuning:
    """Operating points of a finished index for each query type, checked on held-out queries."""
    points = {}
    for queries in tuning_queries:
        # Half of the queries choose operating points; their recall is then measured on the other
        # half, with a 95 % interval.
        choosing = queries.half(held_out=False)
        checking = queries.half(held_out=True)
        checked = []
        for point in sweep(engine, choosing, target.k, max(target.recall, 0.99)):
            recalls = measure_recall(engine, checking, target.k, point.settings)
            error = 1.96 * float(recalls.std()) / max(1, len(recalls)) ** 0.5
            mean = round(float(recalls.mean()), 5)
            checked.append(replace(point, held_out=mean, interval=round(error, 5)))
        points[queries.query_type] = checked
    return Tuning(target.k, points, counts(tuning_queries))


def missed_targets(tuning: Tuning, target: Target) -> list[str]:
    """One line for each query type that misses the target; empty if all reach it."""
    problems = []
    for query_type, points in tuning.points.items():
        reaching = [point for point in points if point.reaches(target.recall)]
        if not reaching:
            best = max(points, key=lambda point: point.proven_recall)
            problems.append(f"{query_type}: recall@{target.k} {best.proven_recall:.4f} at best")
        elif target.latency_ms is not None and (reaching[0].p50_ms or 0.0) > target.latency_ms:
            problems.append(f"{query_type}: {reaching[0].p50_ms:.3f} ms for that recall")
    return problems


def sweep(engine: Engine, queries: TuningQueries, k: int, enough: float) -> list[OperatingPoint]:
    """Operating points that no other beats in both recall and latency, up to a recall.

    Args:
        engine: the index.
        queries: the queries to measure on.
        k: results of a search.
        enough: recall at which the sweep ends.
    """
    assert engine.lists is not None
    points: list[OperatingPoint] = []
    best = -1.0
    first_factor = 0
    factors = K_FACTORS if engine.refine is not None else K_FACTORS[:1]
    nprobes = [nprobe for nprobe in NPROBES if nprobe < engine.lists]
    for nprobe in [*nprobes, engine.lists]:
        # More candidates for re-ranking, until they gain nothing.
        previous = 0.0
        recall_of_factor = {}
        for number in range(first_factor, len(factors)):
            settings = Settings(nprobe, factors[number])
            started = time.perf_counter()
            recall = float(measure_recall(engine, queries, k, settings).mean())
            if recall < previous + MIN_RECALL_GAIN and previous:
                break
            qps = round(len(queries.vectors) / (time.perf_counter() - started))
            points.append(OperatingPoint(nprobe, factors[number], round(recall, 5), qps=qps))
            recall_of_factor[number] = recall
            previous = recall

        # With more lists, start from the fewest candidates that lose little.
        keeping = [n for n, r in recall_of_factor.items() if r >= previous - MAX_RECALL_LOSS]
        first_factor = min(keeping)
        if previous >= min(1.0, enough + MIN_RECALL_GAIN) or previous < best + MIN_RECALL_GAIN:
            break
        best = max(best, previous)
    fastest = pareto(points, {point: 1 / (point.qps or 1) for point in points})
    with_latency = [time_point(engine, queries, k, point) for point in fastest]
    return pareto(with_latency, {point: point.p50_ms or 0.0 for point in with_latency})


def measure_recall(
    engine: Engine, queries: TuningQueries, k: int, settings: Settings
) -> NDArray[np.float64]:
    """(Q,) recall@k against the true neighbors of the queries."""

    def search(vectors: NDArray[np.float32], wanted: int) -> Any:
        return engine.search(vectors, min(wanted, engine.count), settings)

    rows = queries.search(search, k)
    return metrics.recall_at_k_per_query(rows, queries.truth[:, :k], min(k, rows.shape[1]))


def time_point(
    engine: Engine, queries: TuningQueries, k: int, point: OperatingPoint
) -> OperatingPoint:
    """The point with its latency on one thread."""
    k = min(k, engine.count)
    # Latency is that of a single query on a single thread.
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        seconds = []
        for row in np.resize(np.arange(len(queries.vectors)), TIMED_SEARCHES):
            query = queries.vectors[row : row + 1]
            seconds.append(call_seconds(partial(engine.search, query, k, point.settings)))
    finally:
        faiss.omp_set_num_threads(threads)
    p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1000
    return replace(point, p50_ms=round(float(p50), 4), p99_ms=round(float(p99), 4))


def timed(
    engine: Engine, queries: TuningQueries, k: int, points: Sequence[OperatingPoint]
) -> list[OperatingPoint]:
    """The points with throughput on all threads and latency on one, in warm memory."""
    with_qps = []
    for point in points:
        batch = partial(engine.search, queries.vectors, min(k, engine.count), point.settings)
        seconds = min(call_seconds(batch) for _ in range(3))
        with_qps.append(replace(point, qps=round(len(queries.vectors) / seconds)))
    return [time_point(engine, queries, k, point) for point in with_qps]


def call_seconds(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
