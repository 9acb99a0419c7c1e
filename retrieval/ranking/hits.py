"""What searches find: rows with their scores, best first."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Hits(NamedTuple):
    """What Q searches found, best first.

    Attributes:
        scores: (Q, K) float32, descending; -inf where fewer than K were found.
        rows: (Q, K) int64 row numbers, -1 where fewer than K were found.
    """

    scores: NDArray[np.float32]
    rows: NDArray[np.int64]

    @classmethod
    def none(cls, num_queries: int, k: int) -> Hits:
        """(Q, k) nothing found yet."""
        return cls(
            np.full((num_queries, k), -np.inf, np.float32), np.full((num_queries, k), -1, np.int64)
        )

    @classmethod
    def in_order(cls, rows: NDArray[np.int64]) -> Hits:
        """(Q, K) rows of which nothing but the order is known: no two score alike."""
        return cls(np.where(rows < 0, -np.inf, -np.arange(rows.shape[1])).astype(np.float32), rows)

    def of(self, queries: NDArray[np.int64]) -> Hits:
        """Those of some queries."""
        return Hits(self.scores[queries], self.rows[queries])

    def first(self, kept: NDArray[np.bool_], k: int) -> Hits:
        """(Q, k) the first of those that are kept, moved up.

        Args:
            kept: (Q, K).
            k: may be more than there are.
        """
        order = np.argsort(~kept, axis=1, kind="stable")[:, :k]
        hits, kept = Hits.none(len(kept), k), np.take_along_axis(kept, order, axis=1)
        filled = slice(order.shape[1])
        hits.scores[:, filled] = np.where(
            kept, np.take_along_axis(self.scores, order, axis=1), -np.inf
        )
        hits.rows[:, filled] = np.where(kept, np.take_along_axis(self.rows, order, axis=1), -1)
        return hits

    def ranks(self) -> NDArray[np.float64]:
        """(Q, K) from 1; equal scores share the mean of their ranks: 1, 2.5, 2.5, 4."""
        first = np.ones(self.rows.shape, bool)
        first[:, 1:] = self.scores[:, 1:] != self.scores[:, :-1]
        group = (
            first.cumsum().reshape(first.shape) - 1
        )  # of equal scores, counted through all queries
        place = np.broadcast_to(np.arange(1.0, first.shape[1] + 1), first.shape)
        return (np.bincount(group.ravel(), place.ravel()) / np.bincount(group.ravel()))[group]
