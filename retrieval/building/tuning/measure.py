"""Measure an index: what each way of searching it finds of the exact answer, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from tritower.retrieval.building.tuning.tuning_queries import Probe, counts
from tritower.retrieval.ivf.engine import Engine, Settings
from tritower.retrieval.ivf.operating_points import Point, Target, Tuning, pareto
from tritower.retrieval.ranking import metrics

PROBED = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
K_FACTORS = (2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0)
ENOUGH = 0.002
"""More candidates to re-rank that bring less recall than this are not tried, nor more lists."""

LOSS = 0.03
"""More lists are not tried with so few candidates that they lose more recall than this."""

TIMED = 100
"""Searches whose latency is taken."""


def measure(engine: Engine, probes: Sequence[Probe], target: Target) -> Tuning:
    """Operating points of a finished index, per query type, each checked on other queries."""
    points = {}
    for probe in probes:
        chosen = sweep(engine, probe.half(held_out=False), target.k, max(target.recall, 0.99))
        checked = []
        for point in chosen:
            values = recalls_of(engine, probe.half(held_out=True), target.k, point.settings)
            error = 1.96 * float(values.std()) / max(1, len(values)) ** 0.5
            checked.append(
                replace(point, held_out=round(float(values.mean()), 5), interval=round(error, 5))
            )
        points[probe.kind] = checked
    return Tuning(target.k, points, counts(probes))


def reached(tuning: Tuning, target: Target) -> list[str]:
    """What stays below what was asked for; nothing where all kinds reach it."""
    problems = []
    for kind, front in tuning.points.items():
        fits = [point for point in front if point.reaches(target.recall)]
        if not fits:
            best = max(front, key=lambda p: p.proven)
            problems.append(f"{kind}: recall@{target.k} {best.proven:.4f} at best")
        elif target.latency_ms is not None and (fits[0].p50_ms or 0.0) > target.latency_ms:
            problems.append(f"{kind}: {fits[0].p50_ms:.3f} ms for that recall")
    return problems


def sweep(engine: Engine, probe: Probe, k: int, enough: float) -> list[Point]:
    """The points that no other beats in both recall and latency, up to `enough` recall."""
    points: list[Point] = []
    best = -1.0
    first = 0
    factors = K_FACTORS if engine.fine is not None else K_FACTORS[:1]
    for nprobe in [p for p in PROBED if p < engine.lists] + [engine.lists]:  # type: ignore[operator]
        before = 0.0
        reached = {}
        for number in range(first, len(factors)):
            started = time.perf_counter()
            recall = float(recalls_of(engine, probe, k, Settings(nprobe, factors[number])).mean())
            if recall < before + ENOUGH and before:
                break
            qps = round(len(probe.vectors) / (time.perf_counter() - started))
            points.append(Point(nprobe, factors[number], round(recall, 5), qps=qps))
            before = reached[number] = recall
        first = min(number for number, recall in reached.items() if recall >= before - LOSS)
        if before >= min(1.0, enough + ENOUGH) or before < best + ENOUGH:
            break
        best = max(best, before)
    fastest = pareto(points, {point: 1 / (point.qps or 1) for point in points})
    timed = [time_point(engine, probe, k, point) for point in fastest]
    return pareto(timed, {point: point.p50_ms or 0.0 for point in timed})


def recalls_of(engine: Engine, probe: Probe, k: int, settings: Settings) -> NDArray[np.float64]:
    """(Q,) recall@k against the truth of the probe."""
    found = probe.found(
        lambda vectors, n: engine.search(vectors, min(n, engine.count), settings), k
    )
    return metrics.recall_at_k_per_query(found, probe.truth[:, :k], min(k, found.shape[1]))


def time_point(engine: Engine, probe: Probe, k: int, point: Point) -> Point:
    """A point with its latency on one thread."""
    k = min(k, engine.count)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        singles = [
            probe.vectors[row : row + 1] for row in np.resize(np.arange(len(probe.vectors)), TIMED)
        ]
        seconds = [_timed(partial(engine.search, query, k, point.settings)) for query in singles]
    finally:
        faiss.omp_set_num_threads(threads)
    p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1000
    return replace(point, p50_ms=round(float(p50), 4), p99_ms=round(float(p99), 4))


def timed(engine: Engine, probe: Probe, k: int, points: Sequence[Point]) -> list[Point]:
    """Points with their queries per second on all threads and their latency on one, warm."""
    found = []
    for point in points:
        call = partial(engine.search, probe.vectors, min(k, engine.count), point.settings)
        found.append(
            replace(point, qps=round(len(probe.vectors) / min(_timed(call) for _ in range(3))))
        )
    return [time_point(engine, probe, k, point) for point in found]


def _timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
