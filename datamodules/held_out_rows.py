"""Held-out queries and their candidates as batches of items."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from tritower.datamodules.batch import Item, NumberedItems
from tritower.datamodules.catalogue import Table, product_item, query_item
from tritower.datamodules.example_rows import NO_ROW
from tritower.datamodules.held_out import TITLES, HeldOut
from tritower.datamodules.preprocess import ItemPreprocess


class CandidateRows(Dataset[NumberedItems]):
    """Products by their positions among the candidates."""

    def __init__(self, products: Table, candidates: np.ndarray, preprocess: ItemPreprocess) -> None:
        self.products = products
        self.candidates = candidates
        self.preprocess = preprocess

    def __getitem__(self, positions: np.ndarray) -> NumberedItems:
        items = []
        for row in self.candidates[positions].tolist():
            items.append(product_item(self.products.row(row)))
        return NumberedItems(self.preprocess(items), torch.from_numpy(positions))


class QueryRows(Dataset[NumberedItems]):
    """Held-out queries by their number."""

    def __init__(
        self, products: Table, queries: Table | None, held_out: HeldOut, preprocess: ItemPreprocess
    ) -> None:
        self.products = products
        self.queries = queries
        self.held_out = held_out
        self.preprocess = preprocess

    def __getitem__(self, positions: np.ndarray) -> NumberedItems:
        items = [self.item(position) for position in positions.tolist()]
        return NumberedItems(self.preprocess(items), torch.from_numpy(positions))

    def item(self, position: int) -> Item:
        """Query `position` as it is searched."""
        number = int(self.held_out.query[position])
        if number != NO_ROW:
            assert self.queries is not None
            return query_item(self.queries.row(number))
        item = product_item(self.products.row(int(self.held_out.query_product[position])))
        if self.held_out.origin == TITLES:
            return Item(text=dict(list(item.text.items())[:1]))
        return item


class RowBatches(Sampler[np.ndarray]):
    """0..num_rows in order, in batches; rank r of R takes batches r, r + R, ...

    Every row comes exactly once. Batches are smaller where there are few rows, so that every rank
    has one: a rank without any would not reach the end of the epoch, where the others wait for it.
    """

    def __init__(self, num_rows: int, batch_size: int, rank: int = 0, num_ranks: int = 1) -> None:
        batch_size = max(1, min(batch_size, num_rows // num_ranks))
        self.starts = range(rank * batch_size, num_rows, num_ranks * batch_size)
        self.num_rows = num_rows
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in self.starts:
            yield np.arange(start, min(start + self.batch_size, self.num_rows))
