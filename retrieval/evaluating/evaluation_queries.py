"""Evaluation queries with their judged products, as rows of what is searched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

KINDS = ("text", "image", "fused", "product:text", "product:image", "product:attribute")
"""Kinds of query as `embed` writes them:

typed text, photo, several modalities or a whole product, one of its parts.
"""


@dataclass(frozen=True)
class Questions:
    """Q embedded queries that have relevant products; one query may be asked in several kinds.

    Attributes:
        ids: (Q,) query ids.
        kinds: (Q,) "text", "image", "fused", "product:text", ...
        vectors: (Q, D) float32.
        source: (Q,) row of the product that is asked as a query, -1 for others.
        relevant: (Q, R) rows of products that are relevant: grade >= threshold.
        judged: (Q, J) rows of all products with a grade above 0.
        grades: (Q, J) float64, aligned with `judged`.
        threshold: the lowest grade that counts as relevant.
        dropped: kind -> number of queries left out because no product is relevant for them.
        dropped_queries: the same over all kinds, each query counted once.
        unknown: judged products that the index does not hold; they count as relevant and are never
            found.
    """

    ids: NDArray[np.object_]
    kinds: NDArray[np.object_]
    vectors: NDArray[np.float32]
    source: NDArray[np.int64]
    relevant: NDArray[np.int64]
    judged: NDArray[np.int64]
    grades: NDArray[np.float64]
    threshold: float
    dropped: Mapping[str, int] = field(default_factory=dict)
    dropped_queries: int = 0
    unknown: int = 0

    def take(self, positions: NDArray[np.int64]) -> Questions:
        """The questions at these positions."""
        return Questions(
            self.ids[positions],
            self.kinds[positions],
            self.vectors[positions],
            self.source[positions],
            self.relevant[positions],
            self.judged[positions],
            self.grades[positions],
            self.threshold,
        )

    def among(self, rows: NDArray[np.int64]) -> Questions:
        """The questions with positions among some ascending rows in place of rows.

        All judged and asked products must be among them; products that no index holds stay judged
        and are never found.
        """

        def positions(own: NDArray[np.int64]) -> NDArray[np.int64]:
            found = np.searchsorted(rows, own)
            held = (own >= 0) & (found < len(rows)) & (rows[found.clip(max=len(rows) - 1)] == own)
            return np.where(held, found, np.where(own < 0, own, len(rows) + own))

        return replace(
            self,
            source=positions(self.source),
            relevant=positions(self.relevant),
            judged=positions(self.judged),
        )

    def of_kind(self, kind: str) -> NDArray[np.int64]:
        """Positions of the questions of one kind."""
        return np.flatnonzero(self.kinds == kind)

    @property
    def all_kinds(self) -> list[str]:
        """The kinds there are: those of ours in a fixed order, then others by name."""
        return sorted(
            set(self.kinds.tolist()),
            key=lambda kind: (KINDS.index(kind) if kind in KINDS else 99, kind),
        )
