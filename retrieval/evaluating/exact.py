"""Exact search over shards of embeddings.

The truth that an approximate index is measured against.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tritower.artefacts.storage import ArtefactError
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.ranking.hits import Hits
from tritower.retrieval.vectors.checks import content_of
from tritower.retrieval.vectors.embeddings import EmbeddingBatch, EmbeddingReader
from tritower.terminal.progress import counted


class Exact(NamedTuple):
    """What an exact search saw.

    Attributes:
        hits: (Q, K) as of `ProductIndex.search`, in the row numbers of the index.
        content: (N,) int64 by row number: products with equal vectors have equal values.
    """

    hits: Hits
    content: NDArray[np.int64]


def exact_search(
    products: EmbeddingReader,
    index: ProductIndex,
    queries: NDArray[np.float32],
    k: int,
    block: int = 16_384,
) -> Exact:
    """The k nearest products by brute force, in memory bounded by a block of vectors.

    Args:
        products: all embeddings of the index's products.
        index: whose row numbers are used.
        queries: (Q, D) float32, checked.
        k: results per query.
        block: vectors at a time.

    Raises:
        ArtefactError: the index and the embeddings hold different products.
    """
    k = min(k, products.count)
    best = faiss.ResultHeap(len(queries), k, keep_max=True)
    content = np.empty(products.count, np.int64)
    ids: list[pa.Array] = []
    first = 0
    for batch in _shown(products, block):
        scores, rows = faiss.knn(
            queries, batch.vectors, min(k, len(batch.ids)), metric=faiss.METRIC_INNER_PRODUCT
        )
        best.add_result(scores, rows + first)
        content[first : first + len(batch.ids)] = content_of(batch.vectors)
        ids.append(batch.ids)
        first += len(batch.ids)
    best.finalize()
    row_of = _index_rows(pa.chunked_array(ids), index)
    by_row = np.zeros(index.engine.count, np.int64)  # empty rows are never found
    by_row[row_of] = content
    return Exact(Hits(best.D, row_of[best.I]), by_row)


def _index_rows(ids: pa.ChunkedArray, index: ProductIndex) -> NDArray[np.int64]:
    """(N,) row numbers in the index of products in the reader's order.

    Joined by id, not by order.
    """
    rows = index.rows_of(ids)
    if (missing := int((rows < 0).sum())) or len(ids) != len(index):
        raise ArtefactError(
            f"{index.path} holds {len(index):,} products, the embeddings {len(ids):,}, of which "
            f"{missing:,} are not in "
            "the index: build the index from these embeddings, or update it with them"
        )
    return rows


def _shown(products: EmbeddingReader, block: int) -> Iterator[EmbeddingBatch]:
    return counted(
        products.batches(block),
        products.count,
        lambda batch: len(batch.ids),
        "exact search",
        "vectors",
    )
