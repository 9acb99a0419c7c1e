"""Judgements of products for queries: pairs, or a file of judgements beside a file of queries."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tritower.datamodules.bad_value import BadValue, excerpt
from tritower.datamodules.batch import Item
from tritower.datamodules.prepare.queries import Part, PartCells, QuerySet
from tritower.datamodules.prepare.rows import Row, RowBuilder
from tritower.datamodules.prepare.tables import Table
from tritower.datamodules.prepare.values import Cell

_WEIGHT = re.compile(r"\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


class Judgements:
    """The relevance of products to queries, as columns of numbers.

    Attributes:
        query: positions in a `QuerySet`.
        product: numbers of products.
        weight: graded relevance; 0 means judged irrelevant.
        irrelevant: judgements of weight 0.
        repeated: judgements that were there already; the highest weight counts.
    """

    def __init__(self) -> None:
        self.query = array("q")
        self.product = array("q")
        self.weight = array("f")
        self.irrelevant = 0
        self.repeated = 0

    def __len__(self) -> int:
        return len(self.query)

    def read(
        self,
        table: Table,
        parts: Mapping[Part, str],
        queries: QuerySet,
        products: Mapping[str, int],
        pairs: bool,
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
            cells = PartCells(parts, record)
            builder = RowBuilder(table.path.name, record, "" if record.fault else cells.id())
            # Faulty rows are counted once: pairs were noted when their queries were read.
            if record.fault is not None or (pairs and not builder.id):
                if record.fault is not None and not pairs:
                    builder.note("", record.fault)
                yield builder.row(None)
                continue
            row_and_digest = (record.row, cells.content_digest()) if pairs else None
            query = builder.read(
                parts.get("query_id", ""), self._query, builder.id, queries, row_and_digest
            )
            product = builder.read(parts["product"], self._product, cells["product"], products)
            if "weight" in parts:
                weight = builder.read(parts["weight"], parse_weight, cells["weight"])
            else:
                weight = 1.0
            # Both ends must exist, and a product is not judged for itself.
            if query is None or product is None or weight is None:
                yield builder.row(None)
                continue
            if queries.sources[query] == cells["product"]:
                builder.note(
                    "", BadValue("SELF_JUDGEMENT", "a product cannot be judged for itself")
                )
                yield builder.row(None)
                continue
            yield builder.row(Item())
            self.irrelevant += weight == 0
            self.query.append(query)
            self.product.append(product)
            self.weight.append(weight)

    @staticmethod
    def _query(id: str, queries: QuerySet, row_and_digest: tuple[int, str] | None) -> int | None:
        """The position of a query; `row_and_digest` is row number and digest of a pair."""
        first = queries.first.get(id, row_and_digest)
        if row_and_digest is not None and first is not None and first[1] != row_and_digest[1]:
            raise BadValue(
                "QUERY_CONFLICT", f"row {first[0]} has other content under the id {excerpt(id)}"
            )
        if id not in queries.numbers:
            if first == row_and_digest and row_and_digest is not None:
                # The first row of a rejected query: the reason is recorded already.
                return None
            raise BadValue("UNKNOWN_QUERY", f"no query was accepted with the id {excerpt(id)}")
        return queries.numbers[id]

    @staticmethod
    def _product(cell: Cell, products: Mapping[str, int]) -> int:
        if not isinstance(cell, str) or cell not in products:
            raise BadValue(
                "UNKNOWN_PRODUCT", f"no product was accepted with the id {excerpt(cell)}"
            )
        return products[cell]

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Query, product and weight of every different judgement.

        (J,) int64, int64, float32, ordered by query.
        """
        query = np.array(self.query, np.int64)
        product = np.array(self.product, np.int64)
        weight = np.array(self.weight, np.float32)
        # Of equal pairs, the highest weight comes first.
        order = np.lexsort((-weight, product, query))
        # Keep one judgement of each pair, then order them by query and weight.
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
    queries: QuerySet,
    products: Mapping[str, int],
    splits: Sequence[str],
    judged: Sequence[np.ndarray],
) -> list[str]:
    """The split of every query.

    That of its own row; else that of its own product; else that of one of its most relevant
    products: the one whose hash with the query is smallest, so a query with relevant products in
    every split goes to each as often as these do. Without any it goes to train, where it has no
    effect.

    Args:
        queries: all queries.
        products: id -> number, in the order of the numbers.
        splits: of every product.
        judged: query, product and weight of every judgement, (J,) each.
    """
    ids = list(products)
    best: dict[int, tuple[float, str, int]] = {}
    # A query without a split follows its best judged product; equal weights are settled by a hash.
    for query, product, weight in zip(*(column.tolist() for column in judged), strict=True):
        if queries.splits[query] is None and queries.sources[query] is None:
            key = hashlib.blake2b(
                json.dumps([queries.ids[query], ids[product]]).encode("ascii")
            ).hexdigest()
            best[query] = min(best.get(query, (0.0, "", 0)), (-weight, key, product))
    result = []
    for number, (own, source) in enumerate(zip(queries.splits, queries.sources, strict=True)):
        if own is None and source is not None:
            own = splits[products[source]]
        elif own is None:
            own = splits[best[number][2]] if number in best else "train"
        result.append(own)
    return result
