"""Items to embed by row number: products, queries, and tuning queries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from tritower.datamodules.batch import Item, NumberedItems
from tritower.datamodules.catalogue import Table, product_item, query_item
from tritower.datamodules.example_rows import index_in
from tritower.datamodules.preprocess import ItemPreprocess
from tritower.datamodules.tuning_queries import TuningQueries
from tritower.retrieval.evaluating.evaluation_queries import QUERY_TYPES

ItemView = Callable[[Item], Item]
"""The part of an item that is embedded."""

Rows = NDArray[np.int64]


def whole_item(item: Item) -> Item:
    """All of an item."""
    return item


def all_items(tables: dict[str, Table], tuning: TuningQueries) -> Iterator[Item]:
    """Every product, query and typed tuning query of a catalogue."""
    for side, read in (("products", product_item), ("queries", query_item)):
        table = tables.get(side)
        if table is not None:
            for row in range(len(table)):
                yield read(table.row(row))
    for row in tuning.rows.tolist():
        typed = tuning.typed(row, product_item(tables["products"].row(row)))
        if typed is not None:
            yield typed


def product_query_items(item: Item) -> Iterator[tuple[str, Item]]:
    """The query types of a product that is used as a query, each with the part that it contains."""
    yield "fused", item
    yield "product:text", Item(text=item.text)
    yield "product:image", Item(images=item.images)
    yield "product:attribute", Item(attributes=item.attributes)


class ProductTable(Dataset[NumberedItems]):
    """Products by row number."""

    def __init__(self, products: Table, preprocess: ItemPreprocess, view: ItemView) -> None:
        self.products = products
        self.preprocess = preprocess
        self.view = view

    def __getitem__(self, rows: Rows) -> NumberedItems:
        items = [self.view(product_item(self.products.row(int(row)))) for row in rows]
        return NumberedItems(self.preprocess(items), torch.from_numpy(rows))


class QueryTable(Dataset[NumberedItems]):
    """Queries by row number, once for each query type; see `numbered_by_query_type`."""

    def __init__(
        self, queries: Table, products: Table, preprocess: ItemPreprocess, view: ItemView
    ) -> None:
        self.queries = queries
        self.products = products
        self.preprocess = preprocess
        self.view = view
        self.source = index_in(queries.column("source_product_id"), products.column("product_id"))

    def __getitem__(self, rows: Rows) -> NumberedItems:
        return numbered_by_query_type(rows, self.query_items, self.preprocess, self.view)

    def query_items(self, row: int) -> Iterator[tuple[str, Item]]:
        """The query types of a query, each with the part that it contains."""
        source = int(self.source[row])
        if source >= 0:
            yield from product_query_items(product_item(self.products.row(source)))
            return
        item = query_item(self.queries.row(row))
        if item.text and item.images:
            yield "fused", item
        elif item.images:
            yield "image", item
        else:
            yield "text", item


class TuningTable(Dataset[NumberedItems]):
    """Tuning queries by the row number of their product, numbered as those of `QueryTable`."""

    def __init__(
        self, tuning: TuningQueries, products: Table, preprocess: ItemPreprocess, view: ItemView
    ) -> None:
        self.tuning = tuning
        self.products = products
        self.preprocess = preprocess
        self.view = view

    def __getitem__(self, rows: Rows) -> NumberedItems:
        return numbered_by_query_type(rows, self.query_items, self.preprocess, self.view)

    def query_items(self, row: int) -> Iterator[tuple[str, Item]]:
        """The query types of a product, each with the part that it contains, and a typed text."""
        item = product_item(self.products.row(row))
        yield from product_query_items(item)
        typed = self.tuning.typed(row, item)
        if typed is not None:
            yield "text", typed


def numbered_by_query_type(
    rows: Rows,
    query_items: Callable[[int], Iterable[tuple[str, Item]]],
    preprocess: ItemPreprocess,
    view: ItemView,
) -> NumberedItems:
    """(N,) rows, each once per query type, numbered `query_number(row, query_type)`."""
    numbers = []
    items = []
    for row in rows.tolist():
        for query_type, item in query_items(row):
            numbers.append(query_number(row, query_type))
            items.append(view(item))
    return NumberedItems(preprocess(items), torch.tensor(numbers, dtype=torch.int64))


def query_number(row: int, query_type: str) -> int:
    """One number for a row and a query type."""
    return row * len(QUERY_TYPES) + QUERY_TYPES.index(query_type)


def rows_and_types(numbers: Rows) -> tuple[Rows, list[str]]:
    """Undo `query_number` for (B,) numbers."""
    rows, types = np.divmod(numbers, len(QUERY_TYPES))
    return rows, [QUERY_TYPES[number] for number in types.tolist()]
