"""Embedded queries with relevance judgements, given as row numbers of the searched products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

QUERY_TYPES = ("text", "image", "fused", "product:text", "product:image", "product:attribute")
"""Types of query that `embed` writes.

    text                 a typed query
    image                a photo
    fused                several modalities, or a whole product
    product:MODALITY     one modality of a product
"""


@dataclass(frozen=True)
class EvaluationQueries:
    """Q embedded queries, each with at least one relevant product.

    One query may occur several times, once for each of its query types.

    Attributes:
        ids: (Q,) query ids.
        query_types: (Q,) "text", "image", "fused", "product:text", ...
        vectors: (Q, D) float32.
        source: (Q,) row of the product that is used as the query, -1 for other queries.
        relevant: (Q, R) rows of products whose grade is at least `threshold`, -1 padded.
        judged: (Q, J) rows of all products with a grade above 0, -1 padded.
        grades: (Q, J) float64, aligned with `judged`.
        threshold: lowest grade that counts as relevant.
        dropped: query type -> number of queries left out because they have no relevant product.
        dropped_queries: number of distinct queries left out for that reason.
        unknown: number of judged products that the index does not hold. They count as relevant and
            are never found.
    """

    ids: NDArray[np.object_]
    query_types: NDArray[np.object_]
    vectors: NDArray[np.float32]
    source: NDArray[np.int64]
    relevant: NDArray[np.int64]
    judged: NDArray[np.int64]
    grades: NDArray[np.float64]
    threshold: float
    dropped: Mapping[str, int] = field(default_factory=dict)
    dropped_queries: int = 0
    unknown: int = 0

    def select(self, positions: NDArray[np.int64]) -> EvaluationQueries:
        """The queries at (P,) positions, without the counts of dropped queries."""
        return EvaluationQueries(
            self.ids[positions],
            self.query_types[positions],
            self.vectors[positions],
            self.source[positions],
            self.relevant[positions],
            self.judged[positions],
            self.grades[positions],
            self.threshold,
        )

    def restricted_to(self, rows: NDArray[np.int64]) -> EvaluationQueries:
        """The same queries over a subset of the products, renumbered by position in `rows`.

        Args:
            rows: (S,) ascending rows, which contain every judged and every source product. Judged
                products that no index holds stay judged and are never found.
        """

        def renumber(old: NDArray[np.int64]) -> NDArray[np.int64]:
            position = np.searchsorted(rows, old)
            nearest = rows[position.clip(max=len(rows) - 1)]
            in_subset = (old >= 0) & (position < len(rows)) & (nearest == old)
            # Padding stays -1. Products outside the subset get numbers past its end.
            outside = np.where(old < 0, old, len(rows) + old)
            return np.where(in_subset, position, outside)

        return replace(
            self,
            source=renumber(self.source),
            relevant=renumber(self.relevant),
            judged=renumber(self.judged),
        )

    def positions_of_type(self, query_type: str) -> NDArray[np.int64]:
        """(P,) positions of the queries of one type."""
        return np.flatnonzero(self.query_types == query_type)

    @property
    def distinct_types(self) -> list[str]:
        """The query types that occur: those of `QUERY_TYPES` in order, then others by name."""
        present = set(self.query_types.tolist())
        standard = [query_type for query_type in QUERY_TYPES if query_type in present]
        return standard + sorted(present.difference(QUERY_TYPES))
