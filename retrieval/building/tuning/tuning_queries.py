"""Tuning queries: what an index is chosen and tuned by, with their true nearest rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import faiss
import numpy as np
from numpy.typing import NDArray

from tritower.retrieval.ranking.hits import Hits
from tritower.retrieval.vectors.checks import Metric, as_queries
from tritower.retrieval.vectors.embeddings import EmbeddingReader

PER_TYPE = 2000
"""Queries of each type; half choose settings, half check them. More would not change the choice."""

PER_TYPE_BY_DEFAULT = 500
"""The same for a build without a target.

Exact search for them is most of what measuring costs.
"""

PRODUCTS = "product"
"""Query type of products that are used as queries; a product is not its own neighbor."""

Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class TuningQueries:
    """Q queries of one type.

    Attributes:
        query_type: "text", "image", ...
        vectors: (Q, D) float32.
        own: (Q,) int64 row of the product that the query is, which is no result; -1 for none.
        truth: (Q, k) int64 nearest rows by exact search, best first, -1 padded.
    """

    query_type: str
    vectors: Vectors
    own: Rows
    truth: Rows

    def first(self, count: int) -> TuningQueries:
        """The first `count` queries."""
        return self._part(slice(count))

    def half(self, held_out: bool) -> TuningQueries:
        """Every other query: those that choose settings, or those that check them."""
        return self._part(slice(int(held_out), None, 2))

    def _part(self, part: slice) -> TuningQueries:
        return TuningQueries(self.query_type, self.vectors[part], self.own[part], self.truth[part])

    def search(self, search: Callable[[Vectors, int], Hits], k: int) -> Rows:
        """(Q, k) rows that a search finds, without the query's own row.

        Args:
            search: (vectors, k) -> hits.
            k: results per query.
        """
        if (self.own < 0).all():
            return search(self.vectors, k).rows
        return without_own(search(self.vectors, k + 1).rows, self.own)


def without_own(rows: Rows, own: Rows) -> Rows:
    """(Q, K) rows to (Q, K - 1): without each query's own row, or else without the last one."""
    order = np.argsort(rows == own[:, None], axis=1, kind="stable")[:, : rows.shape[1] - 1]
    return np.take_along_axis(rows, order, axis=1)


def draw_queries(queries: EmbeddingReader, seed: int, limit: int = PER_TYPE) -> list[TuningQueries]:
    """Up to `limit` queries of each type, drawn at random, without neighbors yet."""
    # Collect the vectors of each query type over all shards.
    parts: dict[str, list[Vectors]] = {}
    for batch in queries.batches():
        types = np.array(batch.type_names(), object)
        for query_type in dict.fromkeys(types):
            parts.setdefault(query_type, []).append(batch.vectors[types == query_type])
    # Draw the same number of each type.
    drawn = []
    for query_type, own_parts in parts.items():
        vectors = np.concatenate(own_parts)
        chosen = np.random.default_rng(seed).permutation(len(vectors))[:limit]
        no_rows = np.full(len(chosen), -1)
        drawn.append(TuningQueries(query_type, vectors[chosen], no_rows, _no_truth(len(chosen))))
    return drawn


def product_queries(vectors: Vectors, rows: Rows, metric: Metric) -> TuningQueries:
    """Products as queries: their (Q, D) vectors and (Q,) rows, without neighbors yet."""
    return TuningQueries(PRODUCTS, as_queries(vectors, metric), rows, _no_truth(len(rows)))


def _no_truth(count: int) -> Rows:
    return np.empty((count, 0), np.int64)


def find_neighbors(
    tuning_queries: Iterable[TuningQueries], blocks: Iterator[Vectors], k: int
) -> list[TuningQueries]:
    """Tuning queries with their k nearest rows, found by comparing with every vector.

    Args:
        tuning_queries: of all query types.
        blocks: (B, D) float32 vectors in the order of rows.
        k: neighbors to find.
    """
    tuning_queries = list(tuning_queries)
    vectors = np.concatenate([queries.vectors for queries in tuning_queries])
    own = np.concatenate([queries.own for queries in tuning_queries])
    # Compare all queries with one block of vectors after another; the heap keeps the best rows. One
    # more is kept, as a product finds itself first.
    best = faiss.ResultHeap(len(vectors), k + 1, keep_max=True)
    first = 0
    for block in blocks:
        wanted = min(k + 1, len(block))
        scores, rows = faiss.knn(vectors, block, wanted, metric=faiss.METRIC_INNER_PRODUCT)
        best.add_result(scores, rows + first)
        first += len(block)
    best.finalize()
    truth = without_own(best.I, own)

    # Hand the rows back to the queries of each type.
    ends = np.cumsum([len(queries.vectors) for queries in tuning_queries])
    result = []
    for queries, part in zip(tuning_queries, np.split(truth, ends[:-1]), strict=True):
        result.append(replace(queries, truth=part))
    return result


def counts(tuning_queries: Iterable[TuningQueries]) -> Mapping[str, int]:
    """Query type -> number of queries."""
    return {queries.query_type: len(queries.vectors) for queries in tuning_queries}
