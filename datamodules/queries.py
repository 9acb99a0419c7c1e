"""Queries and their judged answers: a file of queries with a file of judgements, or pairs that are both at once.

Pairs that ask the same (text, picture, product) are one query.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from datamodules.batch import Item
from datamodules.catalogue import Notebook, Reading, Row, parse_split
from datamodules.guess import plain_name
from datamodules.records import Record
from datamodules.tables import CatalogueError, Table
from datamodules.values import BadValue, Cell, excerpt

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
_WEIGHT = re.compile(r"\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


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
    for part, names in NAMES.items():
        found = [plain[name] for name in names if name in plain]
        if found:
            parts[part] = found[0]
    for group in needed:
        if not any(part in parts for part in group):
            wanted = ", ".join(name for part in group for name in NAMES[part])
            raise CatalogueError(f"COLUMN_MISSING: {table} has none of {wanted}; its columns are {table.columns}")
    return parts


class _Parts:
    """The cells of a record by what they are."""

    def __init__(self, parts: Mapping[Part, str], record: Record) -> None:
        self.parts = parts
        self.cells = record.cells

    def __getitem__(self, part: Part) -> Cell:
        return self.cells.get(self.parts[part]) if part in self.parts else None

    def asked(self) -> str:
        """A digest of what is asked: equal for equal text, picture and product."""
        cells = [self[part] or None for part in ("type", *ASKED)]
        return hashlib.blake2b(json.dumps(cells, default=bytes.hex).encode("ascii"), digest_size=12).hexdigest()

    def id(self) -> str:
        """The query's own id, verbatim; without such a column one made from what is asked; empty for none."""
        if "query_id" in self.parts:
            id = self["query_id"]
            return id if isinstance(id, str) else ""
        return f"q-{self.asked()}" if any(self[part] for part in ASKED) else ""


@dataclass(frozen=True)
class QueryParser:
    """Reads the queries of a file; picklable.

    Args:
        file: name of the file, for problems.
        parts: which column is what.
        reading: how cells are read.
    """

    file: str
    parts: Mapping[Part, str]
    reading: Reading

    def __call__(self, record: Record) -> Row:
        """One query; the product that it asks with, if any, is the row's `source`."""
        cells = _Parts(self.parts, record)
        notebook = Notebook(self.file, record, "" if record.fault else cells.id())
        if record.fault is not None:
            notebook.note("", record.fault)
            return notebook.row(None)
        if not notebook.id:
            missing = "a query needs an id" if "query_id" in self.parts else "nothing is asked"
            notebook.note(self.parts.get("query_id", ""), BadValue("ID_MISSING", missing))
            return notebook.row(None)
        source = notebook.read(self.parts.get("source", ""), _one_id, cells["source"])
        item = Item() if cells["type"] == "product" else self._item(cells, notebook)  # there, the rest are copies
        split = notebook.read(self.parts["split"], parse_split, cells["split"]) if cells["split"] else None
        if not (item.text or item.images or source):
            notebook.note("", BadValue("NOTHING_USABLE", "no text, no picture and no product to ask with"))
            return notebook.row(None)
        if notebook.fails(self.reading.strict):
            return notebook.row(None)
        return notebook.row(item, source=source, split=split)

    def _item(self, cells: _Parts, notebook: Notebook) -> Item:
        text = notebook.read(self.parts.get("text", ""), self.reading.text, cells["text"])
        pictures, problems = self.reading.pictures.read(cells["image"])
        for problem in problems:
            notebook.note(self.parts["image"], problem)
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
        sources: the products that they ask with.
        contents: digests of text, pictures and product.
        numbers: id -> position in these lists.
        first: of pairs, id -> row and digest of what is asked of the first row with this id.
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
            cells = _Parts(parts, record)
            id = "" if record.fault else cells.id()
            if not id:
                yield record
            elif id not in self.first:
                self.first[id] = (record.row, cells.asked())
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
        source = row.source
        if source is not None and source not in products:
            unknown = row.rejected("UNKNOWN_PRODUCT", f"no product was accepted with the id {excerpt(source)}")
            if not (row.item.text or row.item.images):
                return unknown
            row, source = unknown._replace(item=row.item), None
        item = row.item
        assert item is not None
        content = hashlib.blake2b(json.dumps([item.text.get("query"), source]).encode("ascii"), digest_size=16)
        for image in item.images:
            content.update(hashlib.blake2b(image).digest())
        self.numbers[row.id] = len(self)
        self.ids.append(row.id)
        self.splits.append(row.split)
        self.sources.append(source)
        self.contents.append(content.digest())
        return row._replace(source=source)


class Judgements:
    """Which product answers which query how well, as columns of numbers.

    Attributes:
        query: positions in a `QuerySet`.
        product: numbers of products.
        weight: graded relevance, above 0.
        irrelevant: judgements of weight 0; they are not stored, since what is not judged counts as not relevant.
        repeated: judgements that were there already; the highest weight counts.
    """

    def __init__(self) -> None:
        self.query, self.product, self.weight = array("q"), array("q"), array("f")
        self.irrelevant = 0
        self.repeated = 0

    def __len__(self) -> int:
        return len(self.query)

    def read(
        self, table: Table, parts: Mapping[Part, str], queries: QuerySet, products: Mapping[str, int], pairs: bool
    ) -> Iterator[Row]:
        """Take in all judgements of a file; gives every row, with an item where it was accepted.

        Args:
            table: pairs or judgements.
            parts: which column is what.
            queries: all queries.
            products: id -> number of every accepted product.
            pairs: problems of the query itself are recorded already.
        """
        for record in table.records():
            cells = _Parts(parts, record)
            notebook = Notebook(table.path.name, record, "" if record.fault else cells.id())
            if record.fault is not None or (pairs and not notebook.id):
                if record.fault is not None and not pairs:
                    notebook.note("", record.fault)
                yield notebook.row(None)
                continue
            asked = (record.row, cells.asked()) if pairs else None
            query = notebook.read(parts.get("query_id", ""), self._query, notebook.id, queries, asked)
            product = notebook.read(parts["product"], self._product, cells["product"], products)
            weight = notebook.read(parts["weight"], parse_weight, cells["weight"]) if "weight" in parts else 1.0
            if query is None or product is None or weight is None:
                yield notebook.row(None)
                continue
            if queries.sources[query] == cells["product"]:
                notebook.note("", BadValue("SELF_JUDGEMENT", "a product is no answer to itself"))
                yield notebook.row(None)
                continue
            yield notebook.row(Item())
            if weight == 0:
                self.irrelevant += 1
                continue
            self.query.append(query)
            self.product.append(product)
            self.weight.append(weight)

    @staticmethod
    def _query(id: str, queries: QuerySet, asked: tuple[int, str] | None) -> int | None:
        """The position of a query; `asked` is row number and digest of a pair."""
        first = queries.first.get(id, asked)
        if asked is not None and first is not None and first[1] != asked[1]:
            raise BadValue("QUERY_CONFLICT", f"row {first[0]} asks something else under the id {excerpt(id)}")
        if id not in queries.numbers:
            if first == asked and asked is not None:
                return None  # the first row of its query: why it was rejected is recorded already
            raise BadValue("UNKNOWN_QUERY", f"no query was accepted with the id {excerpt(id)}")
        return queries.numbers[id]

    @staticmethod
    def _product(cell: Cell, products: Mapping[str, int]) -> int:
        if not isinstance(cell, str) or cell not in products:
            raise BadValue("UNKNOWN_PRODUCT", f"no product was accepted with the id {excerpt(cell)}")
        return products[cell]

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Query, product and weight of every different judgement: (J,) int64, int64, float32, ordered by query."""
        query = np.array(self.query, np.int64)
        product = np.array(self.product, np.int64)
        weight = np.array(self.weight, np.float32)
        order = np.lexsort((-weight, product, query))  # of equal pairs, the highest weight comes first
        new = np.ones(len(order), bool)
        new[1:] = (np.diff(query[order]) != 0) | (np.diff(product[order]) != 0)
        self.repeated = int(len(order) - new.sum())
        keep = order[new]
        keep = keep[np.lexsort((product[keep], -weight[keep], query[keep]))]
        return query[keep], product[keep], weight[keep]


def parse_weight(cell: Cell) -> float:
    """A graded weight: 0 or more.

    Raises:
        BadValue: WEIGHT_INVALID.
    """
    text = cell.strip() if isinstance(cell, str) else ""
    if not _WEIGHT.fullmatch(text) or not text.isascii() or float(text) > 1e9:
        raise BadValue("WEIGHT_INVALID", f"{excerpt(cell)} is not a number from 0 to 1e9")
    return float(text)


def query_splits(
    queries: QuerySet, products: Mapping[str, int], splits: Sequence[str], judged: Sequence[np.ndarray]
) -> list[str]:
    """The split of every query.

    That of its own row; else that of the product that it asks with; else that of one of its most relevant products:
    the one whose hash with the query is smallest, so that a query with answers in every split goes to each as often as
    its answers do. Without answers it goes to train, where it does nothing.

    Args:
        queries: all queries.
        products: id -> number, in the order of the numbers.
        splits: of every product.
        judged: query, product and weight of every judgement.
    """
    ids = list(products)
    best: dict[int, tuple[float, str, int]] = {}
    for query, product, weight in zip(*(column.tolist() for column in judged), strict=True):
        if queries.splits[query] is None and queries.sources[query] is None:
            key = hashlib.blake2b(json.dumps([queries.ids[query], ids[product]]).encode("ascii")).hexdigest()
            best[query] = min(best.get(query, (0.0, "", 0)), (-weight, key, product))
    result = []
    for number, (own, source) in enumerate(zip(queries.splits, queries.sources, strict=True)):
        if own is None and source is not None:
            own = splits[products[source]]
        elif own is None:
            own = splits[best[number][2]] if number in best else "train"
        result.append(own)
    return result
