"""Attributes from Python rows, for tests of tables and filters."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from tritower.artefacts import storage
from tritower.retrieval.products.attribute_cells import TEXT, cells
from tritower.retrieval.products.attribute_table import AttributeTable
from tritower.retrieval.products.attribute_writer import write_attributes

TYPES = {
    "number": pa.float64(),
    "category": pa.string(),
    "path": pa.list_(pa.string()),
    "set": pa.list_(pa.string()),
}


class RowProvider:
    """An `AttributeProvider` of dicts with an "id" each, read in small batches."""

    def __init__(self, rows, attribute_types, name="rows", batch=3):
        self.rows, self.attribute_types, self.name, self.ignored, self._batch = (
            rows,
            attribute_types,
            name,
            {},
            batch,
        )

    def ids(self):
        for part in self._parts():
            yield pa.array([row["id"] for row in part], TEXT)

    def column(self, attribute):
        attribute_type = self.attribute_types[attribute]
        for part in self._parts():
            yield cells(
                pa.array([row.get(attribute) for row in part], TYPES[attribute_type]),
                attribute_type,
            )

    def _parts(self):
        return [
            self.rows[start : start + self._batch]
            for start in range(0, len(self.rows), self._batch)
        ]


def write_table(file: Path, ids, *sources) -> tuple[AttributeTable, dict]:
    """The table of these ids, and what its writing reported."""
    with storage.create(file) as stream:
        report = write_attributes(stream, [pa.array(ids, pa.string())], sources)
    return AttributeTable(file), report


def table_of(file: Path, rows, attribute_types) -> AttributeTable:
    """A table with the rows in their order."""
    return write_table(file, [row["id"] for row in rows], RowProvider(rows, attribute_types))[0]
