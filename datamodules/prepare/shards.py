"""Rows to Parquet shards, in an order known only after the last row, in bounded memory."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tritower.datamodules.batch import Item
from tritower.datamodules.schema import Attribute

ROWS_PER_SHARD = 4096
"""Embedding is resumed shard by shard, so a shard is what a killed run loses at most."""

ROWS_PER_GROUP = 256
BYTES_PER_GROUP = 32 * 2**20

_ARROW_TYPES = {
    "number": pa.float64(),
    "category": pa.string(),
    "path": pa.list_(pa.string()),
    "set": pa.list_(pa.string()),
}


def product_columns(text: Sequence[str], attributes: Sequence[Attribute]) -> pa.Schema:
    """The columns of `products/`.

    Parquet has no empty structs, so without fields there is no such column.
    """
    fields = [
        ("product_id", pa.string()),
        ("group", pa.string()),
        ("family", pa.string()),
        ("split", pa.string()),
    ]
    # Arrow has no struct without fields: leave it out.
    if text:
        fields.append(("text", pa.struct([(name, pa.string()) for name in text])))
    fields.append(("images", pa.list_(pa.binary())))
    if attributes:
        fields.append(
            (
                "attributes",
                pa.struct([(a.name, _ARROW_TYPES[a.attribute_type]) for a in attributes]),
            )
        )
    return pa.schema(fields)


def query_columns() -> pa.Schema:
    """The columns of `queries/`."""
    names = ("query_id", "split", "text", "source_product_id")
    return pa.schema([(name, pa.string()) for name in names]).insert(
        3, pa.field("images", pa.list_(pa.binary()))
    )


class Spool:
    """Items on disk in the order in which they arrive, read back in any order.

    Only offsets are in memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("w+b")
        self.offsets = array("Q", [0])

    def append(self, item: Item) -> None:
        """Write one more item."""
        facts = [item.text, item.attributes, [len(image) for image in item.images]]
        head = json.dumps(facts, ensure_ascii=False).encode("utf-8")
        data = b"".join([len(head).to_bytes(8, "little"), head, *item.images])
        self.file.write(data)
        self.offsets.append(self.offsets[-1] + len(data))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> Item:
        self.file.seek(self.offsets[number])
        data = self.file.read(self.offsets[number + 1] - self.offsets[number])
        position = 8 + int.from_bytes(data[:8], "little")
        text, attributes, lengths = json.loads(data[8:position])
        images = []
        for length in lengths:
            images.append(data[position : position + length])
            position += length
        return Item(text, images, attributes)

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()
        self.path.unlink()


class ShardWriter:
    """Writes `shard-00000.parquet`, `shard-00001.parquet`, ....

    A shard and a row group hold rows of one split.

    Args:
        folder: made when the first row comes.
        columns: of every shard.
    """

    def __init__(self, folder: Path, columns: pa.Schema) -> None:
        self.folder = folder
        self.columns = columns
        self.shards = 0
        self.rows: list[Mapping[str, Any]] = []
        self.bytes = 0
        self.in_shard = 0
        self.split = ""
        self.file: pq.ParquetWriter | None = None

    def write(self, row: Mapping[str, Any]) -> None:
        """Add one row."""
        if row["split"] != self.split:
            self._finish_shard()
            self.split = row["split"]
        self.rows.append(row)
        self.bytes += sum(map(len, row["images"])) + sum(
            len(text or "") for text in row.get("text") or ()
        )
        if len(self.rows) == ROWS_PER_GROUP or self.bytes > BYTES_PER_GROUP:
            self._finish_group()
        if self.in_shard >= ROWS_PER_SHARD:
            self._finish_shard()

    def _finish_group(self) -> None:
        if not self.rows:
            return
        # A shard's file is opened with its first row group.
        if self.file is None:
            self.folder.mkdir(exist_ok=True)
            path = self.folder / f"shard-{self.shards:05d}.parquet"
            self.file = pq.ParquetWriter(
                path,
                self.columns,
                compression="zstd",
                use_dictionary=["split"],
                write_statistics=["split"],
            )
        self.file.write_table(pa.Table.from_pylist(self.rows, schema=self.columns))
        self.in_shard += len(self.rows)
        self.rows = []
        self.bytes = 0

    def _finish_shard(self) -> None:
        self._finish_group()
        if self.file is not None:
            self.file.close()
            self.file = None
            self.in_shard = 0
            self.shards += 1

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._finish_shard()
        elif self.file is not None:
            self.file.close()
