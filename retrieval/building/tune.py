"""Choose an index by what it should reach: candidates are measured on a part of the vectors, the winner on all.

A candidate is a number of lists, a size of codes, and whether vectors stand in a second list. Each is built over the
same part (50,000 vectors at most) with its lists in proportion, and searched at many settings by real queries. The
cheapest one that reaches the recall asked for, within the memory asked for, is then built over all vectors and measured
again, kind of query by kind of query: half of the queries choose the settings, the other half checks them.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.filesize import decimal

from retrieval import metrics
from retrieval.building import resources
from retrieval.building.assemble import write_mapped
from retrieval.building.encoded import GROUPING_BYTES, Blocks, to_table
from retrieval.building.factory import CODEBOOK, MIN_POINTS_PER_LIST, Mapped, num_lists
from retrieval.building.mapped import train
from retrieval.building.points import Point, Tuning, pareto
from retrieval.building.probes import Probe, counts, with_truth
from retrieval.engine import Engine, Settings

logger = logging.getLogger(__name__)

PART = 50_000
"""Vectors that candidates are compared on."""

PROBED = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
K_FACTORS = (2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0)
ENOUGH = 0.002
"""More candidates to re-rank that bring less recall than this are not tried, nor more lists."""

CEILING = 0.995
"""Where re-ranking by 8-bit vectors could not reach this recall, 16-bit ones are stored: they cost only disk."""

TIMED = 100
"""Searches whose latency is taken."""

COMPARING = 500
"""Queries of a kind that compare candidates: differences that matter are larger than their error."""

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Target:
    """What an index should reach.

    Attributes:
        recall: recall@k against exact search, for every kind of query.
        k: results of a search.
        memory: bytes that searches may touch again and again (codes, rows, centres); None for any.
        latency_ms: median of one query on one thread; None for any.
    """

    recall: float = 0.95
    k: int = 10
    memory: int | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no index can be.

        Raises:
            ValueError: a recall outside (0, 1], or a memory or latency that is not above 0.
        """
        if not 0 < self.recall <= 1:
            raise ValueError(f"recall={self.recall}; expected a number above 0, at most 1")
        for name in ("memory", "latency_ms"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name}={value}; expected a number above 0")


@dataclass(frozen=True)
class Candidate:
    """An index that was, or could be, measured.

    Attributes:
        design: for all vectors.
        spill: vectors stand in two lists.
        hot_bytes: predicted for all vectors.
        disk_bytes: predicted size of the finished version.
        seconds: to train and fill it with the part.
        point: the cheapest point on the part that reaches the recall, of the most demanding kind; None where none does.
        best: the highest recall on the part, of its most demanding kind.
        why_not: why it was not measured; empty where it was.
    """

    design: Mapped
    spill: bool
    hot_bytes: int
    disk_bytes: int
    seconds: float | None = None
    point: Point | None = None
    best: float | None = None
    why_not: str = ""

    @property
    def factory(self) -> str:
        """As a factory string."""
        return str(self.design)


@dataclass(frozen=True)
class Chosen:
    """The winner, all candidates in the order of their cost, and why it won."""

    winner: Candidate
    candidates: Sequence[Candidate]
    reason: str

    def to_json(self) -> list[dict[str, Any]]:
        """The candidates as plain JSON, in the order of their cost."""
        return [
            {
                "factory": c.factory,
                "spill": c.spill,
                "hot_bytes": c.hot_bytes,
                "disk_bytes": c.disk_bytes,
                "seconds": c.seconds,
                "best_recall": c.best,
                "point": None if c.point is None else asdict(c.point),
                "why_not": c.why_not,
            }
            for c in self.candidates
        ]


def candidates(count: int, dim: int, target: Target, finer: str = "SQ8") -> list[Candidate]:
    """Designs worth measuring for so many vectors; those over the memory asked for say so.

    Args:
        count: number of vectors.
        dim: D.
        target: what is asked for.
        finer: precision of the vectors for re-ranking.
    """
    lists = num_lists(count)
    sizes = [size for size in (2, 4, 8) if dim % size == 0] or [size for size in range(2, 17) if dim % size == 0][:1]
    if not sizes:
        raise ValueError(
            f"{dim} dimensions cannot be cut into equal pieces of 2 to 16: name a factory, for example IVF{lists},SQ8"
        )
    shapes = [(lists, size, spill) for size in sizes for spill in (False, True) if not (spill and size < 4)]
    found = []
    for nlist, size, spill in [*shapes, (max(1, lists // 2), sizes[min(1, len(sizes) - 1)], False)]:
        design = Mapped(nlist, dim // size, True, finer)
        need = resources.predict(count, dim, design, spill=spill, block=1, grouping=GROUPING_BYTES)
        over = target.memory is not None and need.hot > target.memory
        why = f"needs {decimal(need.hot)} of memory" if over else ""
        found.append(Candidate(design, spill, need.hot, need.disk, why_not=why))
    if all(candidate.why_not for candidate in found):
        least = min(candidate.hot_bytes for candidate in found)
        raise ValueError(
            f"{count:,} vectors of {dim} dimensions need at least {decimal(least)} of memory to search, "
            f"{decimal(target.memory or 0)} was asked for: allow more memory, or use embeddings of fewer dimensions"
        )
    fine_enough = [c for c in found if c.design.pieces > dim // 8]
    # Codes of 8 dimensions find little: only where memory allows no better ones.
    return fine_enough if any(not c.why_not for c in fine_enough) else found


def choose(part: Vectors, probes: Sequence[Probe], target: Target, count: int, seed: int) -> Chosen:
    """Measure the candidates on a part of the vectors.

    Args:
        part: (P, D) float32, drawn uniformly.
        probes: queries; those that are products have their row in `part` as `own`.
        target: what is asked for.
        count: number of all vectors.
        seed: of k-means.

    Raises:
        ValueError: no candidate fits the memory, or none reaches the recall within the latency.
    """
    probes = with_truth([probe.first(COMPARING) for probe in probes], iter([part]), target.k)
    shared: dict[int, Any] = {}
    finer = "SQ8" if ceiling_of_8_bits(part, probes, target.k) >= CEILING else "SQfp16"
    measured = [
        candidate if candidate.why_not else _measure(candidate, part, probes, target, count, seed, shared)
        for candidate in candidates(count, part.shape[1], target, finer)
    ]
    measured.sort(key=lambda c: -_qps(c.point))
    winner = measured[0]
    if winner.point is None:
        best = max((c.best for c in measured if c.best is not None), default=0.0)
        latency = "" if target.latency_ms is None else f" within {target.latency_ms:g} ms"
        raise ValueError(
            f"no index reaches recall@{target.k} of {target.recall:g}{latency}; the best one has {best:.3f} on "
            f"{len(part):,} vectors: ask for less recall, or allow more latency or memory"
        )
    others = f" of {sum(c.point is not None for c in measured)} that reach it" if len(measured) > 1 else ""
    reason = (
        f"the fastest{others}: recall@{target.k} {winner.point.recall:.3f} at {_qps(winner.point):,.0f} queries a "
        f"second on {len(part):,} vectors; no learned rotation: re-ranking makes its gain vanish"
    )
    return Chosen(winner, measured, reason)


def ceiling_of_8_bits(part: Vectors, probes: Sequence[Probe], k: int) -> float:
    """The recall@k of exact search by 8-bit vectors, of the most demanding kind: no re-ranking by them is better."""
    eight = faiss.IndexScalarQuantizer(part.shape[1], faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    eight.train(part)
    eight.add(part)
    engine = Engine(eight, len(part))
    return min(float(recalls_of(engine, probe, k, Settings(None, 1.0)).mean()) for probe in probes)


def _measure(
    candidate: Candidate,
    part: Vectors,
    probes: Sequence[Probe],
    target: Target,
    count: int,
    seed: int,
    shared: dict[int, Any],
) -> Candidate:
    """A candidate built over the part, its lists in proportion, and searched."""
    lists = max(1, min(candidate.design.lists, round(candidate.design.lists * len(part) / count)))
    lists = min(lists, max(1, len(part) // MIN_POINTS_PER_LIST))
    started = time.perf_counter()
    trained = train(part, replace(candidate.design, lists=lists), seed, candidate.spill, centroids=shared.get(lists))
    shared[lists] = trained.centroids
    with tempfile.TemporaryDirectory(prefix="tritower-tune-") as folder:
        pq.write_table(
            to_table(pa.array(np.arange(len(part)).astype(str)), trained.encode(part)),
            Path(folder) / "part.parquet",
            compression="none",
        )
        write_mapped(Path(folder), trained, [(Blocks([Path(folder) / "part.parquet"]), 0)], quiet=True)
        seconds = time.perf_counter() - started
        engine = Engine.open(Path(folder), {"count": len(part), "dim": part.shape[1], "spill": candidate.spill})
        points = [_demanded(sweep(engine, probe, target.k, target.recall), target) for probe in probes]
    reached = [point for point, _ in points if point is not None]
    best = min(best for _, best in points)
    slowest = min(reached, key=_qps) if len(reached) == len(points) else None
    return replace(candidate, seconds=round(seconds, 1), point=slowest, best=round(best, 4))


def _demanded(points: Sequence[Point], target: Target) -> tuple[Point | None, float]:
    """The cheapest point that is asked for, and the best recall of all."""
    fits = [p for p in points if p.recall >= target.recall and (p.p50_ms or 0.0) <= (target.latency_ms or np.inf)]
    return max(fits, key=_qps, default=None), max(p.recall for p in points)


def _qps(point: Point | None) -> float:
    """Queries a second, which candidates are compared by: on a part, the latency of one query is mostly overhead."""
    return 0.0 if point is None or point.qps is None else point.qps


def sweep(engine: Engine, probe: Probe, k: int, enough: float) -> list[Point]:
    """Points from few lists to as many as bring more than `enough` recall, none beaten in both recall and latency."""
    points: list[Point] = []
    best, first = -1.0, 0
    factors = K_FACTORS if engine.fine is not None else K_FACTORS[:1]
    for nprobe in [p for p in PROBED if p < engine.lists] + [engine.lists]:  # type: ignore[operator]
        before = 0.0
        for number in range(first, len(factors)):
            started = time.perf_counter()
            recall = float(recalls_of(engine, probe, k, Settings(nprobe, factors[number])).mean())
            if recall < before + ENOUGH and before:
                break
            qps = round(len(probe.vectors) / (time.perf_counter() - started))
            points.append(Point(nprobe, factors[number], round(recall, 5), qps=qps))
            before, enough_factor = recall, number
        first = max(first, enough_factor - 2)  # with more lists, fewer candidates than these are never the best choice
        if before >= min(1.0, enough + ENOUGH) or before < best + ENOUGH:
            break
        best = max(best, before)
    # Lists and candidates stand in for time until few points are left: fewer of both is never slower.
    rough = {point: point.nprobe * (1 + 0.02 * point.k_factor) for point in points}
    timed = [time_point(engine, probe, k, point) for point in pareto(points, rough)]
    return pareto(timed, {point: point.p50_ms or 0.0 for point in timed})


def recalls_of(engine: Engine, probe: Probe, k: int, settings: Settings) -> NDArray[np.float64]:
    """(Q,) recall@k against the truth of the probe."""
    found = probe.found(lambda vectors, n: engine.search(vectors, min(n, engine.count), settings), k)
    return metrics.recall_at_k_per_query(found, probe.truth[:, :k], min(k, found.shape[1]))


def time_point(engine: Engine, probe: Probe, k: int, point: Point) -> Point:
    """A point with its latency on one thread."""
    k = min(k, engine.count)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        singles = [probe.vectors[row : row + 1] for row in np.resize(np.arange(len(probe.vectors)), TIMED)]
        seconds = [_timed(partial(engine.search, query, k, point.settings)) for query in singles]
    finally:
        faiss.omp_set_num_threads(threads)
    p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1000
    return replace(point, p50_ms=round(float(p50), 4), p99_ms=round(float(p99), 4))


def measure(engine: Engine, probes: Sequence[Probe], target: Target) -> Tuning:
    """All points of a finished index, per kind of query, each checked by queries that had no part in choosing it."""
    points = {}
    for probe in probes:
        chosen = sweep(engine, probe.half(held_out=False), target.k, max(target.recall, 0.99))
        checked = []
        for point in chosen:
            values = recalls_of(engine, probe.half(held_out=True), target.k, point.settings)
            error = 1.96 * float(values.std()) / max(1, len(values)) ** 0.5
            checked.append(replace(point, held_out=round(float(values.mean()), 5), interval=round(error, 5)))
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


def _timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def enough_for_codes(count: int) -> bool:
    """Whether there are vectors enough to train codes; with fewer, exact search is the answer to any target."""
    return count >= CODEBOOK * MIN_POINTS_PER_LIST
