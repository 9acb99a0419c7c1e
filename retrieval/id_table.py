"""Row numbers and product ids, as a memory-mapped Arrow file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


class IdTable:
    """The product id and the content digest of each row.

    Attributes:
        column: (N,) ids, null for a deleted row.
        contents: (N,) int64 digests of the embedded content, null where unknown.
    """

    def __init__(self, file: Path) -> None:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        self.column: pa.ChunkedArray = table.column("product_id")
        if "content" in table.column_names:
            self.contents: pa.ChunkedArray = table.column("content")
        else:
            self.contents = pa.chunked_array([pa.nulls(len(table), pa.int64())])
        lengths = [len(chunk) for chunk in self.column.chunks]
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.column)

    def ids_of(self, rows: NDArray[np.int64]) -> NDArray[np.object_]:
        """Ids of (...) rows, as (...); None for -1, which in Python would be the last row."""
        flat = np.asarray(rows).ravel()
        if flat.size and (flat.max() >= len(self) or flat.min() < -1):
            raise ValueError(
                f"rows from {flat.min()} to {flat.max()}; expected -1 to {len(self) - 1}"
            )
        ids = np.full(flat.shape, None, dtype=object)
        # Arrow takes from one chunk at a time.
        chunk_of = np.searchsorted(self._starts, flat, side="right") - 1
        chunk_of = np.where(flat < 0, -1, chunk_of)
        for number in np.unique(chunk_of[chunk_of >= 0]):
            inside = chunk_of == number
            positions = pa.array(flat[inside] - self._starts[number])
            ids[inside] = self.column.chunk(int(number)).take(positions).to_pylist()
        return ids.reshape(np.shape(rows))

    def row_of(self, product_id: str) -> int:
        """The row of an id, -1 where there is none."""
        return int(pc.index(self.column, pa.scalar(product_id, pa.string())).as_py())

    def rows_of(self, product_ids: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
        """(B,) rows of ids, -1 where there is none; reads all ids."""
        all_ids = self.column.cast(pa.large_string()).combine_chunks()
        wanted = product_ids.cast(pa.large_string())
        rows = pc.index_in(wanted, value_set=all_ids, skip_nulls=True)
        return np.asarray(pc.fill_null(rows, -1).to_numpy(), np.int64)

    def alive(self) -> NDArray[np.bool_]:
        """(N,) bool: rows that hold a product."""
        alive: NDArray[np.bool_] = pc.is_valid(self.column).to_numpy()
        return alive
