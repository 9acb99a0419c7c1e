"""Exact search over shards of embeddings, which an approximate index is measured against."""

from __future__ import annotations

from typing import NamedTuple

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tritower.artefacts.storage import ArtefactError
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.ranking.hits import Hits
from tritower.retrieval.vectors.checks import vector_hashes
from tritower.retrieval.vectors.embeddings import EmbeddingReader
from tritower.terminal.progress import show_progress


class ExactResult(NamedTuple):
    """The result of an exact search.

    Attributes:
        hits: Hits of Q queries, in the row numbers of the index.
        content: (N,) int64 by row: products with equal vectors have equal values.
    """

    hits: Hits
    content: NDArray[np.int64]


def exact_search(
    products: EmbeddingReader,
    index: ProductIndex,
    queries: NDArray[np.float32],
    k: int,
    block: int = 16_384,
) -> ExactResult:
    """The k nearest products by brute force, in memory bounded by a block of vectors.

    Args:
        products: embeddings of all products of the index.
        index: defines the row numbers.
        queries: (Q, D) float32, checked.
        k: results per query.
        block: vectors compared at a time.

    Raises:
        ArtefactError: the index and the embeddings hold different products.
    """
    k = min(k, products.count)
    best = faiss.ResultHeap(len(queries), k, keep_max=True)
    content = np.empty(products.count, np.int64)
    ids: list[pa.Array] = []
    first = 0
    batches = show_progress(
        products.batches(block),
        products.count,
        lambda batch: len(batch.ids),
        "exact search",
        "vectors",
    )
    for batch in batches:
        size = len(batch.ids)
        scores, positions = faiss.knn(
            queries, batch.vectors, min(k, size), metric=faiss.METRIC_INNER_PRODUCT
        )
        best.add_result(scores, positions + first)
        content[first : first + size] = vector_hashes(batch.vectors)
        ids.append(batch.ids)
        first += size
    best.finalize()

    # From positions in the embeddings to rows of the index, which may be in another order.
    row_of = _index_rows(pa.chunked_array(ids), index)  # (N,)
    content_by_row = np.zeros(index.engine.count, np.int64)  # rows without a product are not found
    content_by_row[row_of] = content
    return ExactResult(Hits(best.D, row_of[best.I]), content_by_row)


def _index_rows(ids: pa.ChunkedArray, index: ProductIndex) -> NDArray[np.int64]:
    """(N,) rows in the index of products in the order of the embeddings, joined by id."""
    rows = index.rows_of(ids)
    missing = int((rows < 0).sum())
    if missing or len(ids) != len(index):
        raise ArtefactError(
            f"{index.path} holds {len(index):,} products, the embeddings {len(ids):,}, of which "
            f"{missing:,} are not in the index: build the index from these embeddings, or update "
            "it with them"
        )
    return rows
