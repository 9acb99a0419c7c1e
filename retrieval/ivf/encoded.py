"""Encoded vectors on their way into an index.

Written block by block, so that an interrupted build continues, then regrouped.

Blocks come in the order of products; lists need the order of lists. Both fit on disk, not in
memory: the regrouping reads the codes of as many lists at a time as fit a budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tritower.retrieval.ivf.ivf_pq import EncodedVectors

GROUPING_BYTES = 512 << 20
"""Codes that are regrouped at a time."""


class Entries(NamedTuple):
    """The entries of some lists.

    Attributes:
        lists: (E,) int64 list numbers.
        rows: (E,) int64 rows.
        codes: (E, C) uint8.
    """

    lists: NDArray[np.int64]
    rows: NDArray[np.int64]
    codes: NDArray[np.uint8]


class EncodedSource(Protocol):
    """Encoded vectors with rows 0, 1, ... of their own."""

    @property
    def count(self) -> int:
        """Number of rows."""

    def sizes(self, num_lists: int, kept: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """(L,) entries of each list.

        Only of the rows that are `kept`, (N,) bool, where that is given.
        """

    def entries(self, first: int, end: int) -> Iterator[Entries]:
        """The entries of lists first to end - 1, in parts of any size."""

    def products(self) -> Iterator[pa.Table]:
        """product_id and content row by row, nulls for a deleted row."""

    def refine(self) -> Iterator[NDArray[np.uint8]]:
        """(B, F) refine vectors, row by row."""


def to_table(
    ids: pa.Array, encoded: EncodedVectors, contents: NDArray[np.int64] | None = None
) -> pa.Table:
    """(N,) encoded vectors with ids and content digests, as a table that `Blocks` reads."""
    # One column of lists and one of codes for each list that a vector is in.
    list_columns = {f"list{i}": pa.array(column) for i, column in enumerate(encoded.lists.T)}
    codes = {f"code{i}": _binary(codes) for i, codes in enumerate(encoded.codes)}
    if encoded.refine.shape[1]:
        refine = {"refine": _binary(encoded.refine)}
    else:
        refine = {}
    if contents is None:
        content = pa.nulls(len(ids), pa.int64())
    else:
        content = pa.array(contents, pa.int64())
    return pa.table(
        {"product_id": ids.cast(pa.string()), "content": content, **list_columns, **codes, **refine}
    )


class Blocks:
    """Encoded vectors in Parquet files that `to_table` made, one after another.

    Args:
        files: in the order of rows.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self._counts = [pq.read_metadata(file).num_rows for file in files]
        self._num_lists_per_row = sum(
            name.startswith("list") for name in pq.read_schema(files[0]).names
        )

    @property
    def count(self) -> int:
        """Number of rows."""
        return sum(self._counts)

    def sizes(self, num_lists: int, kept: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """(L,) entries of each list.

        Only of the rows that are `kept`, (N,) bool, where that is given.
        """
        sizes = np.zeros(num_lists, np.int64)
        row = 0
        # A vector counts once for each of its lists; -1 is none.
        for file, count in zip(self.files, self._counts, strict=True):
            for column in pq.read_table(
                file, columns=[f"list{i}" for i in range(self._num_lists_per_row)]
            ).columns:
                lists = column.to_numpy()
                if kept is None:
                    inside = lists >= 0
                else:
                    inside = (lists >= 0) & kept[row : row + count]
                sizes += np.bincount(lists[inside], minlength=num_lists)
            row += count
        return sizes

    def entries(self, first: int, end: int) -> Iterator[Entries]:
        """The entries of lists first to end - 1."""
        row = 0
        for file, count in zip(self.files, self._counts, strict=True):
            for i in range(self._num_lists_per_row):
                table = pq.read_table(file, columns=[f"list{i}", f"code{i}"])
                lists = table.column(0).to_numpy().astype(np.int64)
                inside = np.flatnonzero((lists >= first) & (lists < end))
                yield Entries(lists[inside], row + inside, _bytes(table.column(1))[inside])
            row += count

    def products(self) -> Iterator[pa.Table]:
        """product_id and content row by row."""
        for file in self.files:
            yield pq.read_table(file, columns=["product_id", "content"])

    def refine(self) -> Iterator[NDArray[np.uint8]]:
        """(B, F) refine vectors, row by row."""
        for file in self.files:
            yield _bytes(pq.read_table(file, columns=["refine"]).column(0))


def grouped_lists(
    sources: Sequence[tuple[EncodedSource, NDArray[np.int64] | int]],
    sizes: NDArray[np.int64],
    code_size: int,
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Codes and rows of each list, in ascending order of rows.

    Args:
        sources: each with the new rows of its rows: (N,) int64, -1 for those to leave out, or the
            first new row.
        sizes: (L,) int64, entries of each list, those left out not counted.
        code_size: C, bytes of a code.

    Yields:
        L pairs of (n, C) uint8 codes and (n,) int64 rows.
    """
    # As many lists at a time as fit the budget: read their entries from all sources, sort them by
    # list and row, and yield list after list.
    # As many whole lists at a time as fit the budget, at least one.
    budget = max(1, GROUPING_BYTES // (code_size + 16))
    ends = np.cumsum(sizes)
    first = 0
    while first < len(sizes):
        before = ends[first - 1] if first else 0
        end = max(first + 1, int(np.searchsorted(ends, before + budget, side="right")))
        parts = []
        for source, moved in sources:
            for entries in source.entries(first, end):
                parts.append(_moved(entries, moved))
        lists, rows, codes = (np.concatenate(column) for column in zip(*parts, strict=True))
        # Within a list, rows ascend.
        order = np.lexsort((rows, lists))
        bounds = np.searchsorted(lists[order], np.arange(first, end + 1))
        for start, stop in pairwise(bounds):
            yield codes[order[start:stop]], rows[order[start:stop]]
        first = end


def _moved(entries: Entries, moved: NDArray[np.int64] | int) -> Entries:
    if isinstance(moved, int):
        return entries._replace(rows=entries.rows + moved)
    rows = moved[entries.rows]
    kept = rows >= 0
    return Entries(entries.lists[kept], rows[kept], entries.codes[kept])


def _binary(array: NDArray[np.uint8]) -> pa.Array:
    """(B, C) uint8 as B binaries of C bytes."""
    code_type = pa.binary(array.shape[1])
    return pa.FixedSizeBinaryArray.from_buffers(
        code_type, len(array), [None, pa.py_buffer(np.ascontiguousarray(array))]
    )


def _bytes(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    """Undo `_binary`."""
    array: Any = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray) and array.num_chunks:
        array = array.chunk(0)
    else:
        array = array
    width = array.type.byte_width
    if len(array):
        data = np.frombuffer(array.buffers()[1], np.uint8)
    else:
        data = np.empty(0, np.uint8)
    return data[array.offset * width : (array.offset + len(array)) * width].reshape(-1, width)
