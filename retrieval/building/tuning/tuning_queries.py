"""The queries an index is tuned by, per kind, with their true nearest rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from tritower.retrieval.vectors.checks import Metric, as_queries
from tritower.retrieval.vectors.embeddings import EmbeddingReader

PER_KIND = 2000
"""Queries of a kind that are asked: half choose, half check; more would not change the choice."""

PER_KIND_BY_DEFAULT = 500
"""The same of a build that is asked for no recall:

exact search for them is most of what measuring costs.
"""

PRODUCTS = "product"
"""The kind of queries that are products themselves, which do not count as their own neighbours."""

Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Probe:
    """Q queries of one kind.

    Attributes:
        kind: "text", "image", ...
        vectors: (Q, D) float32.
        own: (Q,) int64, the row that each query is itself, -1 for none; that row is no result.
        truth: (Q, k) int64, the nearest rows by exact search, best first, -1 padded.
    """

    kind: str
    vectors: Vectors
    own: Rows
    truth: Rows

    def first(self, count: int) -> Probe:
        """The first `count` queries."""
        return Probe(self.kind, self.vectors[:count], self.own[:count], self.truth[:count])

    def half(self, held_out: bool) -> Probe:
        """Every other query: those that choose, or those that check the choice."""
        part = slice(int(held_out), None, 2)
        return Probe(self.kind, self.vectors[part], self.own[part], self.truth[part])

    def found(self, search: Any, k: int) -> Rows:
        """(Q, k) rows that a search finds, the query's own row left out.

        Args:
            search: (vectors, k) -> (scores, rows).
            k: results per query.
        """
        if (self.own < 0).all():
            rows: Rows = search(self.vectors, k)[1]
            return rows
        return without_own(search(self.vectors, k + 1)[1], self.own)


def without_own(rows: Rows, own: Rows) -> Rows:
    """(Q, K) rows to (Q, K - 1): each query's own row, or else the last one, left out."""
    order = np.argsort(rows == own[:, None], axis=1, kind="stable")[:, : rows.shape[1] - 1]
    return np.take_along_axis(rows, order, axis=1)


def of_queries(queries: EmbeddingReader, seed: int, limit: int = PER_KIND) -> list[Probe]:
    """Up to `limit` queries of each kind, drawn at random; their truth is still empty."""
    kinds: dict[str, list[Vectors]] = {}
    for batch in queries.batches():
        names = np.array(
            ["query"] * len(batch.ids) if batch.kinds is None else batch.kinds.to_pylist(), object
        )
        for kind in dict.fromkeys(names):
            kinds.setdefault(kind, []).append(batch.vectors[names == kind])
    probes = []
    for kind, parts in kinds.items():
        vectors = np.concatenate(parts)
        chosen = np.random.default_rng(seed).permutation(len(vectors))[:limit]
        probes.append(
            Probe(
                kind,
                vectors[chosen],
                np.full(len(chosen), -1),
                np.empty((len(chosen), 0), np.int64),
            )
        )
    return probes


def of_products(vectors: Vectors, rows: Rows, metric: Metric) -> Probe:
    """Products as queries: their (Q, D) vectors and (Q,) rows; their truth is still empty."""
    return Probe(PRODUCTS, as_queries(vectors, metric), rows, np.empty((len(rows), 0), np.int64))


def with_truth(probes: Iterable[Probe], blocks: Iterator[Vectors], k: int) -> list[Probe]:
    """Probes with their k nearest rows, found by comparing with every vector.

    Args:
        probes: of all kinds.
        blocks: (B, D) float32 vectors in the order of rows.
        k: neighbours to find.
    """
    probes = list(probes)
    queries = np.concatenate([probe.vectors for probe in probes])
    own = np.concatenate([probe.own for probe in probes])
    best = faiss.ResultHeap(len(queries), k + 1, keep_max=True)
    first = 0
    for block in blocks:
        scores, rows = faiss.knn(
            queries, block, min(k + 1, len(block)), metric=faiss.METRIC_INNER_PRODUCT
        )
        best.add_result(scores, rows + first)
        first += len(block)
    best.finalize()
    truth = without_own(best.I, own)
    ends = np.cumsum([len(probe.vectors) for probe in probes])
    return [
        replace(probe, truth=part)
        for probe, part in zip(probes, np.split(truth, ends[:-1]), strict=True)
    ]


def counts(probes: Iterable[Probe]) -> Mapping[str, int]:
    """Kind -> number of queries."""
    return {probe.kind: len(probe.vectors) for probe in probes}
