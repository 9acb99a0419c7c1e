"""Choose among candidate indexes by what they are predicted to find and cost.

A candidate is a number of lists, a size of codes, and whether vectors are in two lists. The
cheapest one that is predicted to reach the requested recall within the requested memory for every
query type, is then built over all vectors and measured: half of the tuning queries choose the
search settings, the other half checks them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from rich.filesize import decimal

from tritower.retrieval.building import resources
from tritower.retrieval.building.choose_spec import num_lists
from tritower.retrieval.building.tuning.predict import Prediction, Predictor
from tritower.retrieval.ivf.encoded import GROUPING_BYTES
from tritower.retrieval.ivf.ivf_pq import TrainedQuantizers
from tritower.retrieval.ivf.operating_points import OperatingPoint, Target
from tritower.retrieval.ivf.spec import IvfPqSpec

COMPARED_QUERIES = 300
"""Queries of each type that candidates are compared on.

Differences that matter are larger than their error.
"""


@dataclass(frozen=True)
class Candidate:
    """An index that could be built.

    Attributes:
        spec: for all vectors.
        spill: whether vectors are in two lists.
        resident_bytes: memory that searches touch, predicted for all vectors.
        disk_bytes: size of the finished version, predicted.
        seconds: time to encode all vectors, predicted.
        point: the cheapest operating point that reaches the recall, predicted for the most
            demanding query type; None if there is none.
        best: the highest recall, predicted for the most demanding query type.
        rejected_because: why nothing was predicted; empty if it was.
    """

    spec: IvfPqSpec
    spill: bool
    resident_bytes: int
    disk_bytes: int
    seconds: float | None = None
    point: OperatingPoint | None = None
    best: float | None = None
    rejected_because: str = ""

    @property
    def queries_per_second(self) -> float:
        """Throughput at its operating point; 0 without one."""
        if self.point is None or self.point.qps is None:
            return 0.0
        return self.point.qps

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "factory": str(self.spec),
            "spill": self.spill,
            "resident_bytes": self.resident_bytes,
            "disk_bytes": self.disk_bytes,
            "seconds": self.seconds,
            "best_recall": self.best,
            "point": None if self.point is None else asdict(self.point),
            "rejected_because": self.rejected_because,
        }


@dataclass(frozen=True)
class ChosenIndex:
    """The chosen candidate.

    Attributes:
        winner: the candidate.
        trained: its trained quantizers.
        candidates: all candidates, the fastest first.
        reason: why it won.
    """

    winner: Candidate
    trained: TrainedQuantizers
    candidates: Sequence[Candidate]
    reason: str

    def to_json(self) -> list[dict[str, Any]]:
        """The candidates as plain JSON."""
        return [candidate.to_json() for candidate in self.candidates]


def candidates(count: int, dim: int, target: Target, refine: str = "SQ8") -> list[Candidate]:
    """The candidates for this many vectors; those that need too much memory are rejected.

    Args:
        count: number of vectors.
        dim: D.
        target: what to reach.
        refine: how refine vectors are stored.

    Raises:
        ValueError: every candidate needs more memory than the target allows, or D has no divisor
            from 2 to 16.
    """
    result = []
    for lists, size, spill in _shapes(count, dim):
        spec = IvfPqSpec(lists, dim // size, True, refine)
        need = resources.predict(count, dim, spec, spill=spill, block=1, grouping=GROUPING_BYTES)
        reason = ""
        if target.memory is not None and need.resident > target.memory:
            reason = f"needs {decimal(need.resident)} of memory"
        result.append(Candidate(spec, spill, need.resident, need.disk, rejected_because=reason))
    if all(candidate.rejected_because for candidate in result):
        least = min(candidate.resident_bytes for candidate in result)
        raise ValueError(
            f"{count:,} vectors of {dim} dimensions need at least {decimal(least)} of memory to "
            f"search, {decimal(target.memory or 0)} was requested: allow more memory, or use "
            "embeddings of fewer dimensions"
        )

    # Codes of 8 dimensions find little: they compete only if memory allows no better ones.
    fine_codes = [candidate for candidate in result if candidate.spec.sub_quantizers > dim // 8]
    if all(candidate.rejected_because for candidate in fine_codes):
        return result
    return fine_codes


def _shapes(count: int, dim: int) -> list[tuple[int, int, bool]]:
    """Number of lists, dimensions of a sub-quantizer, and spill of each candidate."""
    lists = num_lists(count)
    # Sub-quantizers of 2, 4 and 8 dimensions; another size only if none of these divides D.
    sizes = [size for size in (2, 4, 8) if dim % size == 0]
    if not sizes:
        sizes = [size for size in range(2, 17) if dim % size == 0][:1]
    if not sizes:
        raise ValueError(
            f"{dim} dimensions cannot be cut into equal pieces of 2 to 16: name a factory, for "
            f"example IVF{lists},SQ8"
        )
    # A second list pays off with short codes only. One candidate has half as many lists.
    shapes = []
    for size in sizes:
        shapes.append((lists, size, False))
        if size >= 4:
            shapes.append((lists, size, True))
    middle_size = sizes[min(1, len(sizes) - 1)]
    shapes.append((max(1, lists // 2), middle_size, False))
    return shapes


def choose(predictor: Predictor) -> ChosenIndex:
    """Choose the candidate with the highest predicted throughput.

    Raises:
        ValueError: no candidate fits the memory, or none reaches the recall within the latency.
    """
    target = predictor.target
    winner = None
    trained = None
    compared = []
    # Predict every candidate that fits into memory, and keep the fastest.
    for candidate in candidates(predictor.count, predictor.dim, target, predictor.refine):
        if not candidate.rejected_because:
            prediction = predictor.predict(candidate.spec, candidate.spill)
            candidate = _with_prediction(candidate, prediction, target)
            if winner is None or candidate.queries_per_second > winner.queries_per_second:
                winner = candidate
                trained = prediction.trained
        compared.append(candidate)
    compared.sort(key=lambda candidate: -candidate.queries_per_second)
    if winner is None or winner.point is None or trained is None:
        # Nothing reaches the target: report how near the best candidate comes.
        known = [candidate.best for candidate in compared if candidate.best is not None]
        if target.latency_ms is None:
            latency = ""
        else:
            latency = f" within {target.latency_ms:g} ms"
        raise ValueError(
            f"no index reaches recall@{target.k} of {target.recall:g}{latency}; the best one would "
            f"have {max(known, default=0.0):.3f}: ask for less recall, or allow more latency or "
            "memory"
        )
    # Say why the winner was chosen; the manifest keeps it.
    others = ""
    if len(compared) > 1:
        reaching = sum(candidate.point is not None for candidate in compared)
        others = f" of {reaching} that reach it"
    reason = (
        f"the fastest{others}: {winner.queries_per_second:,.0f} queries a second predicted at "
        f"recall@{target.k} {winner.point.recall:.3f}; no learned rotation: re-ranking makes its "
        "gain vanish"
    )
    return ChosenIndex(winner, trained, compared, reason)


def _with_prediction(candidate: Candidate, prediction: Prediction, target: Target) -> Candidate:
    """A candidate with the prediction for its most demanding query type."""
    cheapest = [_cheapest(points, target) for points in prediction.points.values()]
    reaching = [point for point in cheapest if point is not None]
    slowest = None
    if len(reaching) == len(cheapest):
        slowest = min(reaching, key=lambda point: point.qps or 0.0)
    best = round(min(prediction.best.values()), 4)
    return replace(candidate, seconds=round(prediction.seconds, 1), point=slowest, best=best)


def _cheapest(points: Sequence[OperatingPoint], target: Target) -> OperatingPoint | None:
    """The fastest operating point within the latency asked for."""
    limit = target.latency_ms or np.inf
    within = [point for point in points if (point.p50_ms or 0.0) <= limit]
    return max(within, key=lambda point: point.qps or 0.0, default=None)
