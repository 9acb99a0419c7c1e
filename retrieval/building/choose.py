"""Choose an index by what it should reach.

What candidates would find and cost is predicted, the winner is measured.

A candidate is a number of lists, a size of codes, and whether vectors stand in a second list. The
cheapest one that is predicted to reach the recall asked for, within the memory asked for, for every
kind of query, is then built over all vectors and measured: half of the queries choose the settings,
the other half checks them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from rich.filesize import decimal

from tritower.retrieval.building import resources
from tritower.retrieval.building.tuning.predict import Prediction, Predictor
from tritower.retrieval.ivf.encoded import GROUPING_BYTES
from tritower.retrieval.ivf.ivf_pq import Trained
from tritower.retrieval.ivf.operating_points import Point, Target
from tritower.retrieval.ivf.spec import CODEBOOK, MIN_POINTS_PER_LIST, Mapped, num_lists

COMPARING = 300
"""Queries of a kind that compare candidates:

differences that matter are larger than their error.
"""


@dataclass(frozen=True)
class Candidate:
    """An index that could be built.

    Attributes:
        design: for all vectors.
        spill: vectors stand in two lists.
        hot_bytes: predicted for all vectors.
        disk_bytes: predicted size of the finished version.
        seconds: predicted for encoding all vectors.
        point: the cheapest way to the recall, predicted, of the most demanding kind; None where
            there is none.
        best: the highest recall, predicted, of its most demanding kind.
        why_not: why nothing was predicted; empty where it was.
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
    """The winner, what was trained for it, all candidates by cost, and why it won."""

    winner: Candidate
    trained: Trained
    candidates: Sequence[Candidate]
    reason: str

    def to_json(self) -> list[dict[str, Any]]:
        """The candidates as plain JSON, in the order of their cost."""
        result = []
        for c in self.candidates:
            result.append(
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
            )
        return result


def candidates(count: int, dim: int, target: Target, finer: str = "SQ8") -> list[Candidate]:
    """Designs worth comparing for so many vectors; those over the memory asked for say so.

    Args:
        count: number of vectors.
        dim: D.
        target: what is asked for.
        finer: precision of the vectors for re-ranking.
    """
    lists = num_lists(count)
    sizes = [size for size in (2, 4, 8) if dim % size == 0] or [
        size for size in range(2, 17) if dim % size == 0
    ][:1]
    if not sizes:
        raise ValueError(
            f"{dim} dimensions cannot be cut into equal pieces of 2 to 16: name a factory, for "
            f"example IVF{lists},SQ8"
        )
    shapes = [
        (lists, size, spill)
        for size in sizes
        for spill in (False, True)
        if not (spill and size < 4)
    ]
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
            f"{count:,} vectors of {dim} dimensions need at least {decimal(least)} of memory to "
            "search, "
            f"{decimal(target.memory or 0)} was asked for: allow more memory, or use embeddings of "
            "fewer dimensions"
        )
    fine_enough = [c for c in found if c.design.pieces > dim // 8]
    # Codes of 8 dimensions find little: only where memory allows no better ones.
    if any(not c.why_not for c in fine_enough):
        return fine_enough
    return found


def choose(predictor: Predictor) -> Chosen:
    """Choose among candidates by what is predicted of them.

    Raises:
        ValueError: no candidate fits the memory, or none reaches the recall within the latency.
    """
    target = predictor.target
    winner = None
    learned = None
    predicted = []
    for candidate in candidates(predictor.count, predictor.dim, target, predictor.finer):
        if not candidate.why_not:
            prediction = predictor.predict(candidate.design, candidate.spill)
            candidate = _with(candidate, prediction, target)
            if winner is None or _qps(candidate.point) > _qps(winner.point):
                winner = candidate
                learned = prediction.trained
        predicted.append(candidate)
    predicted.sort(key=lambda c: -_qps(c.point))
    if winner is None or winner.point is None or learned is None:
        best = max((c.best for c in predicted if c.best is not None), default=0.0)
        latency = "" if target.latency_ms is None else f" within {target.latency_ms:g} ms"
        raise ValueError(
            f"no index reaches recall@{target.k} of {target.recall:g}{latency}; the best one would "
            f"have {best:.3f}: "
            "ask for less recall, or allow more latency or memory"
        )
    if len(predicted) > 1:
        others = f" of {sum(c.point is not None for c in predicted)} that reach it"
    else:
        others = ""
    reason = (
        f"the fastest{others}: {_qps(winner.point):,.0f} queries a second predicted at "
        f"recall@{target.k} "
        f"{winner.point.recall:.3f}; no learned rotation: re-ranking makes its gain vanish"
    )
    return Chosen(winner, learned, predicted, reason)


def _with(candidate: Candidate, prediction: Prediction, target: Target) -> Candidate:
    """A candidate with what is predicted of it for its most demanding kind of query."""
    cheapest = [_cheapest(points, target) for points in prediction.points.values()]
    fits = [point for point in cheapest if point is not None]
    slowest = min(fits, key=_qps) if len(fits) == len(cheapest) else None
    best = round(min(prediction.best.values()), 4)
    return replace(candidate, seconds=round(prediction.seconds, 1), point=slowest, best=best)


def _cheapest(points: Sequence[Point], target: Target) -> Point | None:
    fits = [point for point in points if (point.p50_ms or 0.0) <= (target.latency_ms or np.inf)]
    return max(fits, key=_qps, default=None)


def _qps(point: Point | None) -> float:
    """Queries a second, which candidates are compared by."""
    if point is None or point.qps is None:
        return 0.0
    return point.qps


def enough_for_codes(count: int) -> bool:
    """Whether there are vectors enough to train codes.

    With fewer, exact search is the answer to any target.
    """
    return count >= CODEBOOK * MIN_POINTS_PER_LIST
