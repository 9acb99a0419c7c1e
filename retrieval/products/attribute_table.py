"""The attributes of an index's products, row by row, as one Arrow file that is mapped and not read.

    attributes.arrow   one record batch of N rows
      price      float64, NaN where unknown
      brand      int32 code -> text, -1 where unknown
      category   the same; a path is the text "Shoes > Boots"
      tags       the same; a set is its values joined by U+001F

Any Arrow reader shows it as a table: codes are a dictionary column, unknown values are null. What
is special is that every column lies there in one piece, with NaN and -1 under its nulls. A filter
therefore looks at each distinct text once, and at rows only as numbers: a million rows take about a
millisecond.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from cachetools import LRUCache
from numpy.typing import NDArray

from tritower.artefacts.storage import ArtefactError
from tritower.retrieval.products.attribute_cells import (
    FAMILY,
    GROUP,
    TEXT,
    AttributeType,
    checked_attribute_type,
)
from tritower.retrieval.products.attribute_providers import Batches

ATTRIBUTES_FILE = "attributes.arrow"
"""Where an index keeps it."""

TYPE_KEY = b"type"
ROWS_KEY = b"rows"
"""Of the metadata of a column, and of the file."""

CACHED_MASKS = 16
"""Masks that a table remembers, one bit a row each."""

Codes = NDArray[np.int32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Numbers:
    """A column of numbers.

    Attributes:
        values: (N,) float64, NaN where unknown.
    """

    values: NDArray[np.float64]


@dataclass(frozen=True)
class Texts:
    """A column of texts that repeat.

    Attributes:
        codes: (N,) int32, places in the vocabulary; -1 where unknown.
        vocabulary: V distinct texts (large_string); some may have no rows.
    """

    codes: Codes
    vocabulary: pa.Array


class AttributeTable:
    """Attributes by row. Opening it reads nothing but the names of its columns.

    Several threads may use it at once.

    Args:
        file: as `tritower.retrieval.products.attribute_writer` wrote it.

    Attributes:
        attribute_types: attribute -> type.
        count: N.

    Raises:
        ArtefactError: not such a file.
    """

    def __init__(self, file: Path | str) -> None:
        self.file = Path(file)
        self._lock = threading.Lock()
        self._columns: dict[str, Numbers | Texts] = {}
        self._masks: LRUCache[str, NDArray[np.uint8]] = LRUCache(CACHED_MASKS)
        self._batch: pa.RecordBatch | None = None
        try:
            # The schema's metadata holds the types; columns are opened when a filter needs them.
            self._reader = pa.ipc.open_file(pa.memory_map(str(self.file)))
            metadata = self._reader.schema.metadata or {}
            self.count = int(metadata[ROWS_KEY])
            self.attribute_types: dict[str, AttributeType] = {
                field.name: checked_attribute_type(
                    (field.metadata or {})[TYPE_KEY].decode(), field.name
                )
                for field in self._reader.schema
            }
            if self._reader.num_record_batches != 1:
                raise ValueError(f"{self._reader.num_record_batches} record batches; expected 1")
        except (pa.ArrowInvalid, OSError, KeyError, ValueError) as error:
            raise ArtefactError(f"{self.file} is not a table of attributes: {error}") from None

    def __len__(self) -> int:
        """N."""
        return self.count

    def column(self, name: str) -> Numbers | Texts:
        """A column by its name, mapped.

        Raises:
            KeyError: no such attribute.
            ArtefactError: the file is damaged.
        """
        with self._lock:
            if name not in self._columns:
                self._columns[name] = self._open(name)
            return self._columns[name]

    def group_codes(self) -> Codes | None:
        """(N,) int32, equal for products of one group, -1 for those of none.

        None where there are no groups.
        """
        return self._codes(GROUP)

    def family_codes(self) -> Codes | None:
        """(N,) int32, equal for products of one family, -1 for those of none.

        None where there are no families.
        """
        return self._codes(FAMILY)

    def rows_of_group(self, code: int) -> NDArray[np.int64]:
        """The (n,) rows of a group, ascending; none for -1."""
        codes = self.group_codes()
        if codes is not None and code >= 0:
            return np.flatnonzero(codes == code)
        return np.empty(0, np.int64)

    def decoded(self, name: str, rows: NDArray[np.int64]) -> pa.Array:
        """The values of (n,) rows, as they are stored: numbers, or texts; null where unknown."""
        column = self.column(name)
        if isinstance(column, Numbers):
            values = column.values[rows]
            return pa.array(values, mask=np.isnan(values))
        codes = column.codes[rows]
        return column.vocabulary.take(pa.array(codes, mask=codes < 0))

    def remembered(self, key: str, make: Callable[[], Mask]) -> Mask:
        """The mask that `make` gave for this key, made anew if that was long ago.

        Args:
            key: what the mask is of.
            make: gives a (N,) mask.
        """
        with self._lock:
            bits = self._masks.get(key)
        if bits is not None:
            return np.unpackbits(bits, count=self.count, bitorder="little").view(np.bool_)
        mask = make()
        with self._lock:
            self._masks[key] = np.packbits(mask, bitorder="little")
        return mask

    def _codes(self, name: str) -> Codes | None:
        if name in self.attribute_types:
            return cast(Texts, self.column(name)).codes
        return None

    def _open(self, name: str) -> Numbers | Texts:
        attribute_type = self.attribute_types[name]
        try:
            if self._batch is None:
                self._batch = self._reader.get_batch(0)
            # Views of the mapped memory: nothing is copied.
            array = self._batch.column(name)
            if len(array) != self.count or array.offset:
                raise ValueError(f"{len(array)} rows; expected {self.count}")
            if attribute_type == "number":
                return Numbers(_view(array, np.float64, self.count))
            return Texts(_view(array.indices, np.int32, self.count), array.dictionary)
        except (pa.ArrowInvalid, OSError, ValueError, AttributeError) as error:
            raise ArtefactError(f"{self.file}: column {name!r} cannot be read: {error}") from None


class TableProvider:
    """The attributes of an earlier index: what its new version keeps.

    Args:
        table: its attributes.
        ids: its ids in the order of its rows; null for rows that are deleted.
        name: what it is, for messages.
    """

    ignored: dict[str, str] = {}  # noqa: RUF012
    block = 1 << 18

    def __init__(self, table: AttributeTable, ids: pa.ChunkedArray, name: str) -> None:
        if len(ids) != table.count:
            raise ArtefactError(f"{name}: {len(ids)} ids for {table.count} rows of attributes")
        self.name = name
        self._table = table
        self._ids = ids
        self.attribute_types = dict(table.attribute_types)

    def ids(self) -> Batches:
        """See `AttributeProvider`."""
        return (chunk.cast(TEXT) for chunk in self._ids.chunks)

    def column(self, attribute: str) -> Batches:
        """See `AttributeProvider`."""
        for start in range(0, self._table.count, self.block):
            yield self._table.decoded(
                attribute, np.arange(start, min(start + self.block, self._table.count))
            )


def _view(array: pa.Array, dtype: type, count: int) -> NDArray[Any]:
    """The values of an Arrow array without a copy, those under nulls included."""
    if not count:
        return np.empty(0, dtype)
    return np.frombuffer(array.buffers()[1], dtype, count)
