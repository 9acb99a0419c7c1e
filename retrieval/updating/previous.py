"""A published version as a source of encoded vectors for the next one.

Read list by list, never as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tritower.retrieval.filtering.selection import refine_codes
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.ivf.encoded import Entries
from tritower.retrieval.ivf.inverted_lists import read_lists, read_rows
from tritower.retrieval.ivf.ivf_pq import TrainedQuantizers, centroids_of
from tritower.retrieval.ivf.layout import INDEX_FILE, LISTS_FILE, SIZES_FILE

BLOCK = 65_536
"""Rows read at a time."""


class VersionVectors:
    """The encoded vectors of an opened index with mapped lists, as a source for the next one.

    Args:
        index: the version.
        deleted: (N,) bool, rows that are empty from now on: they leave the lists, and their ids are
            null.
    """

    def __init__(self, index: ProductIndex, deleted: NDArray[np.bool_]) -> None:
        self._index = index
        self._is_deleted = deleted
        self._file = index.version / LISTS_FILE
        self._sizes: NDArray[np.int64] = np.load(index.version / SIZES_FILE, allow_pickle=False)

    @property
    def count(self) -> int:
        """Number of rows, empty ones included."""
        return len(self._is_deleted)

    def sizes(self, num_lists: int, kept: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """(L,) int64 sizes of the lists; see `EncodedSource`."""
        is_present = ~self._is_deleted if kept is None else kept & ~self._is_deleted
        lists = read_rows(self._file, self._sizes, self._index.engine.ivf.code_size)
        return np.fromiter(
            (np.count_nonzero(is_present[rows]) for rows in lists), np.int64, num_lists
        )

    def entries(self, first: int, end: int) -> Iterator[Entries]:
        """See `EncodedSource`."""
        ivf = self._index.engine.ivf
        for number, (codes, rows) in enumerate(
            read_lists(self._file, ivf, self._sizes, first, end), first
        ):
            is_present = ~self._is_deleted[rows]
            yield Entries(
                np.full(np.count_nonzero(is_present), number), rows[is_present], codes[is_present]
            )

    def products(self) -> Iterator[pa.Table]:
        """See `EncodedSource`."""
        return product_tables(self._index, self._is_deleted)

    def refine(self) -> Iterator[NDArray[np.uint8]]:
        """(n, B) uint8 refine codes, block by block; see `EncodedSource`."""
        return refine_code_blocks(self._index.engine.refine)


def product_tables(index: ProductIndex, deleted: NDArray[np.bool_]) -> Iterator[pa.Table]:
    """Tables of product_id and content row by row, with nulls for deleted rows, (N,) bool."""
    row = 0
    table = pa.table({"product_id": index.id_table.column, "content": index.id_table.contents})
    for batch in table.to_batches(BLOCK):
        is_present = pa.array(~deleted[row : row + len(batch)])
        columns = []
        for column in batch.columns:
            columns.append(pc.if_else(is_present, column, pa.scalar(None, column.type)))
        yield pa.table(columns, names=batch.schema.names)
        row += len(batch)


def refine_code_blocks(refine: Any) -> Iterator[NDArray[np.uint8]]:
    """(B, F) codes of all refine vectors, row by row."""
    codes = refine_codes(refine)
    for start in range(0, len(codes), BLOCK):
        yield codes[start : start + BLOCK]


def trained_quantizers(index: ProductIndex) -> TrainedQuantizers:
    """What encoded the vectors of an opened index whose lists are mapped."""
    engine = index.engine
    empty = faiss.read_index(str(index.version / INDEX_FILE))  # as it is stored: without lists
    return TrainedQuantizers(
        empty, engine.refine and _without_vectors(engine.refine), centroids_of(empty), engine.spill
    )


def _without_vectors(refine: Any) -> Any:
    """An empty index with the ranges of refine vectors."""
    empty = faiss.IndexScalarQuantizer(refine.d, refine.sq.qtype, refine.metric_type)
    faiss.copy_array_to_vector(faiss.vector_to_array(refine.sq.trained), empty.sq.trained)
    empty.is_trained = True
    return empty
