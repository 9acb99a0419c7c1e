"""Operating points of an index.

Recall and cost of settings per query type, and the settings that a request selects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tritower.retrieval.ivf.engine import Settings

MARGIN = 0.005
"""The recall of the queries that check may stay this far below what was asked for."""


@dataclass(frozen=True)
class Target:
    """What an index should reach.

    Attributes:
        recall: recall@k against exact search, for every query type.
        k: results of a search.
        memory: bytes that searches may touch again and again (codes, rows, centers); None for any.
        latency_ms: median of one query on one thread; None for any.
        strict: choose among candidates, and publish nothing that does not reach it; False: measure
            the default index, and take the best settings there are for a query type that does not
            reach it.
    """

    recall: float = 0.95
    k: int = 10
    memory: int | None = None
    latency_ms: float | None = None
    strict: bool = True

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
class OperatingPoint:
    """One way to search, measured against exact search.

    Attributes:
        nprobe: lists visited.
        k_factor: candidates re-ranked per result.
        recall: recall@k on the queries that chose the point.
        held_out: recall@k on queries that had no part in the choice; None before it is measured.
        interval: half of the 95 % interval of `held_out`.
        p50_ms: median latency of one query on one thread.
        p99_ms: its 99th percentile.
        qps: queries a second, a batch on all threads.
    """

    nprobe: int
    k_factor: float
    recall: float
    held_out: float | None = None
    interval: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    qps: float | None = None

    @property
    def settings(self) -> Settings:
        """What a search is given."""
        return Settings(self.nprobe, self.k_factor)

    @property
    def proven_recall(self) -> float:
        """The lower of both recalls."""
        if self.held_out is None:
            return self.recall
        return min(self.recall, self.held_out)

    def reaches(self, recall: float) -> bool:
        """Whether the choosing queries reach this recall, and the others nearly (`MARGIN`)."""
        return self.recall >= recall and (self.held_out is None or self.held_out >= recall - MARGIN)


@dataclass(frozen=True)
class Tuning:
    """What was measured of an index.

    Attributes:
        k: of recall@k.
        points: query type -> points, cheapest first, each with more recall than those before.
        queries: query type -> how many were measured.
    """

    k: int
    points: Mapping[str, Sequence[OperatingPoint]]
    queries: Mapping[str, int]

    def settings_for(self, recall: float, query_type: str | None = None) -> Settings:
        """The cheapest settings that reach a recall.

        Args:
            recall: recall@k against exact search, above 0, at most 1.
            query_type: of the queries; None or one that was not measured: enough for every query
                type that was.

        Raises:
            ValueError: no point of the query type reaches it; the message names the best one.
        """
        if not 0 < recall <= 1:
            raise ValueError(f"recall={recall}; expected a number above 0, at most 1")
        # Every type must reach the recall, or its best point is named.
        for name in self._query_types(query_type):
            best = self.nearest(recall, name)
            if not best.reaches(recall):
                raise ValueError(
                    f"recall@{self.k} of {recall:g} is not reached for queries of type {name!r}: "
                    "the best measured "
                    f"point has {best.proven_recall:.4f} (nprobe {best.nprobe}, k_factor "
                    f"{best.k_factor:g}): name nprobe and "
                    "k_factor yourself, or build with a higher recall"
                )
        return self.nearest_settings(recall, query_type)

    def nearest_settings(self, recall: float, query_type: str | None = None) -> Settings:
        """As `settings_for`; the best point's settings where no point reaches the recall."""
        chosen = [self.nearest(recall, name) for name in self._query_types(query_type)]
        return Settings(max(p.nprobe for p in chosen), max(p.k_factor for p in chosen))

    def nearest(self, recall: float, query_type: str) -> OperatingPoint:
        """The cheapest point of a query type that reaches a recall, else the one with most."""
        for point in self.points[query_type]:
            if point.reaches(recall):
                return point
        return max(self.points[query_type], key=lambda point: point.proven_recall)

    def _query_types(self, query_type: str | None) -> list[str]:
        """The query type, where it was measured, else all that were."""
        if query_type is not None and query_type in self.points:
            return [query_type]
        return list(self.points)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        points = {}
        for query_type, front in self.points.items():
            points[query_type] = [asdict(point) for point in front]
        return {"k": self.k, "queries": dict(self.queries), "points": points}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Tuning:
        """Undo `to_json`.

        Raises:
            KeyError, TypeError: it is not that.
        """
        points = {}
        for query_type, front in data["points"].items():
            points[query_type] = tuple(OperatingPoint(**point) for point in front)
        return cls(int(data["k"]), points, dict(data["queries"]))


def pareto(
    points: Sequence[OperatingPoint], cost: Mapping[OperatingPoint, float]
) -> list[OperatingPoint]:
    """The points that no other one beats in both recall and cost, cheapest first."""
    front: list[OperatingPoint] = []
    for point in sorted(points, key=lambda p: (cost[p], -p.recall)):
        if not front or point.recall > front[-1].recall:
            front.append(point)
    return front
