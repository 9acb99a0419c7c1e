"""Queries: a file of them, or the query half of pairs. Pairs of equal content are one query."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tritower.datamodules.bad_value import BadValue, excerpt
from tritower.datamodules.batch import Item
from tritower.datamodules.prepare.catalogue import FieldReader, read_split
from tritower.datamodules.prepare.guess import plain_name
from tritower.datamodules.prepare.records import Record
from tritower.datamodules.prepare.rows import Row, RowBuilder
from tritower.datamodules.prepare.tables import CatalogueError, Table
from tritower.datamodules.prepare.values import Cell

Part = Literal["query_id", "type", "text", "image", "source", "split", "product", "weight"]

NAMES: dict[Part, tuple[str, ...]] = {  # best first
    "query_id": ("query_id", "qid"),
    "type": ("type", "query_type"),
    "text": ("query", "query_text", "text", "search_term", "search_query", "keywords"),
    "image": ("query_image", "image", "photo", "picture"),
    "source": ("source_product_id", "query_product_id", "source_id"),
    "split": ("split", "query_split"),
    "product": ("product_id", "item_id", "sku", "asin"),
    "weight": ("weight", "relevance", "grade", "score", "gain"),
}
ASKED: tuple[Part, ...] = ("text", "image", "source")


def find_parts(table: Table, *needed: Sequence[Part]) -> dict[Part, str]:
    """Which column of a table is what.

    Args:
        table: pairs, queries or judgements.
        needed: groups of parts; one of each group must be there.

    Raises:
        CatalogueError: COLUMN_MISSING.
    """
    plain = {plain_name(name): name for name in reversed(table.columns)}
    parts: dict[Part, str] = {}
    # The first known name of each part.
    for part, names in NAMES.items():
        found = [plain[name] for name in names if name in plain]
        if found:
            parts[part] = found[0]
    for group in needed:
        if not any(part in parts for part in group):
            wanted = ", ".join(name for part in group for name in NAMES[part])
            raise CatalogueError(
                f"COLUMN_MISSING: {table} has none of {wanted}; its columns are {table.columns}"
            )
    return parts


class PartCells:
    """The cells of a record by what they are."""

    def __init__(self, parts: Mapping[Part, str], record: Record) -> None:
        self.parts = parts
        self.cells = record.cells

    def __getitem__(self, part: Part) -> Cell:
        if part in self.parts:
            return self.cells.get(self.parts[part])
        return None

    def content_digest(self) -> str:
        """A digest of what is asked: equal for equal text, picture and product."""
        cells = [self[part] or None for part in ("type", *ASKED)]
        return hashlib.blake2b(
            json.dumps(cells, default=bytes.hex).encode("ascii"), digest_size=12
        ).hexdigest()

    def id(self) -> str:
        """The query's own id, verbatim; without such a column one made from what is asked.

        Empty for none.
        """
        if "query_id" in self.parts:
            id = self["query_id"]
            if isinstance(id, str):
                return id
            return ""
        if any(self[part] for part in ASKED):
            return f"q-{self.content_digest()}"
        return ""


@dataclass(frozen=True)
class QueryParser:
    """Reads the queries of a file; picklable.

    Args:
        file: name of the file, for problems.
        parts: which column is what.
        reader: how cells are read.
    """

    file: str
    parts: Mapping[Part, str]
    reader: FieldReader

    def __call__(self, record: Record) -> Row:
        """One query; its own product, if any, is the row's `source`."""
        cells = PartCells(self.parts, record)
        builder = RowBuilder(self.file, record, "" if record.fault else cells.id())
        if record.fault is not None:
            builder.note("", record.fault)
            return builder.row(None)
        if not builder.id:
            if "query_id" in self.parts:
                missing = "a query needs an id"
            else:
                missing = "it has no content"
            builder.note(self.parts.get("query_id", ""), BadValue("ID_MISSING", missing))
            return builder.row(None)
        # A query is a text, pictures, or a product.
        source = builder.read(self.parts.get("source", ""), _one_id, cells["source"])
        # The cells of a product query are copies of the product's.
        item = Item() if cells["type"] == "product" else self._item(cells, builder)
        if cells["split"]:
            split = read_split(builder, self.parts["split"], cells["split"])
        else:
            split = None
        if not (item.text or item.images or source):
            builder.note("", BadValue("NOTHING_USABLE", "no text, no picture and no product"))
            return builder.row(None)
        if builder.fails(self.reader.strict):
            return builder.row(None)
        return builder.row(item, source=source, split=split)

    def _item(self, cells: PartCells, builder: RowBuilder) -> Item:
        text = builder.read(self.parts.get("text", ""), self.reader.text, cells["text"])
        pictures, problems = self.reader.pictures.read(cells["image"])
        for problem in problems:
            builder.note(self.parts["image"], problem)
        return Item({"query": text} if text else {}, pictures)


def _one_id(cell: Cell) -> str | None:
    """An id, verbatim; None where the cell is empty."""
    if cell is None or cell == "":
        return None
    if not isinstance(cell, str):
        raise BadValue("NOT_A_VALUE", f"{excerpt(cell)} is not one id")
    return cell


@dataclass
class QuerySet:
    """The accepted queries without their texts and pictures, in the order in which they came.

    Attributes:
        ids: of the queries, verbatim.
        splits: that their rows name.
        sources: the products that are queries.
        contents: digests of text, pictures and product.
        numbers: id -> position in these lists.
        first: of pairs, id -> row and content digest of the first row with this id.
    """

    ids: list[str] = field(default_factory=list)
    splits: list[str | None] = field(default_factory=list)
    sources: list[str | None] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)
    first: dict[str, tuple[int, str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def new_queries(self, records: Iterable[Record], parts: Mapping[Part, str]) -> Iterator[Record]:
        """The records of a pairs file whose query was not there before."""
        for record in records:
            cells = PartCells(parts, record)
            id = "" if record.fault else cells.id()
            if not id:
                yield record
            elif id not in self.first:
                self.first[id] = (record.row, cells.content_digest())
                yield record

    def add(self, row: Row, products: Mapping[str, int]) -> Row:
        """Take a query in, or reject it.

        Args:
            row: as parsed.
            products: id -> number of every accepted product.
        """
        if row.item is None:
            return row
        if row.id in self.numbers:
            return row.rejected("ID_DUPLICATE", f"an earlier query has the id {excerpt(row.id)}")
        # A query by an unknown product loses that source, and is rejected if nothing else is left.
        source = row.source
        if source is not None and source not in products:
            unknown = row.rejected(
                "UNKNOWN_PRODUCT", f"no product was accepted with the id {excerpt(source)}"
            )
            if not (row.item.text or row.item.images):
                return unknown
            row = unknown._replace(item=row.item)
            source = None
        item = row.item
        assert item is not None
        # Equal contents in two splits are leaks: keep a digest.
        content = hashlib.blake2b(
            json.dumps([item.text.get("query"), source]).encode("ascii"), digest_size=16
        )
        for image in item.images:
            content.update(hashlib.blake2b(image).digest())
        self.numbers[row.id] = len(self)
        self.ids.append(row.id)
        self.splits.append(row.split)
        self.sources.append(source)
        self.contents.append(content.digest())
        return row._replace(source=source)
