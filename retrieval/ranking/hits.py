"""The result of searches: rows with their scores, best first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Hits(NamedTuple):
    """The hits of Q searches, best first.

    Attributes:
        scores: (Q, K) float32, descending; -inf where there are fewer than K hits.
        rows: (Q, K) int64 row numbers, -1 where there are fewer than K hits.
    """

    scores: NDArray[np.float32]
    rows: NDArray[np.int64]

    @classmethod
    def empty(cls, num_queries: int, k: int) -> Hits:
        """(Q, k) without a hit."""
        scores = np.full((num_queries, k), -np.inf, np.float32)
        rows = np.full((num_queries, k), -1, np.int64)
        return cls(scores, rows)

    @classmethod
    def concatenate(cls, parts: Sequence[Hits]) -> Hits:
        """The hits of several batches of queries, one after another."""
        scores = np.concatenate([part.scores for part in parts])
        rows = np.concatenate([part.rows for part in parts])
        return cls(scores, rows)

    @classmethod
    def from_order(cls, rows: NDArray[np.int64]) -> Hits:
        """(Q, K) rows whose order is known and not their scores: no two scores are equal."""
        descending = -np.arange(rows.shape[1])
        scores = np.where(rows < 0, -np.inf, descending).astype(np.float32)
        return cls(scores, rows)

    def select_queries(self, queries: NDArray[np.int64]) -> Hits:
        """The (n, K) hits of some queries: (n,) positions, or a (Q,) bool mask."""
        return Hits(self.scores[queries], self.rows[queries])

    def keep_first(self, kept: NDArray[np.bool_], k: int) -> Hits:
        """(Q, k), the first of the kept hits, moved up.

        Args:
            kept: (Q, K) bool.
            k: number of hits; may be more than K.
        """
        # A stable sort moves the kept ones to the front, in their order.
        order = np.argsort(~kept, axis=1, kind="stable")[:, :k]
        kept = np.take_along_axis(kept, order, axis=1)
        scores = np.take_along_axis(self.scores, order, axis=1)
        rows = np.take_along_axis(self.rows, order, axis=1)
        hits = Hits.empty(len(kept), k)
        filled = slice(order.shape[1])
        hits.scores[:, filled] = np.where(kept, scores, -np.inf)
        hits.rows[:, filled] = np.where(kept, rows, -1)
        return hits

    def mean_ranks(self) -> NDArray[np.float64]:
        """(Q, K) ranks from 1; equal scores share the mean of their ranks: 1, 2.5, 2.5, 4."""
        starts: NDArray[np.bool_] = np.ones(self.rows.shape, bool)
        starts[:, 1:] = self.scores[:, 1:] != self.scores[:, :-1]
        # Groups of equal scores, numbered through all queries.
        group = starts.cumsum().reshape(starts.shape) - 1
        rank = np.broadcast_to(np.arange(1.0, self.rows.shape[1] + 1), starts.shape)
        mean = np.bincount(group.ravel(), rank.ravel()) / np.bincount(group.ravel())
        return mean[group]
