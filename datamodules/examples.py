"""Training examples: the views of a query and of its product, with their keys."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset

from tritower.datamodules.batch import NO_KEY, Batch, Example, Item
from tritower.datamodules.catalogue import Table, product_item, product_keys, query_item
from tritower.datamodules.collate import BatchProduct, collate
from tritower.datamodules.example_rows import NO_ROW, ExampleRows
from tritower.datamodules.positives import Judgements, SameGroup
from tritower.datamodules.preprocess import Preprocess, stable_hash
from tritower.datamodules.stream import Draw
from tritower.datamodules.views import Views


class QueryTable(Protocol):
    """Rows of `queries/` by number."""

    def row(self, number: int) -> Mapping[str, Any]:
        """Row `number` as plain data."""


@dataclass(frozen=True)
class ExampleData:
    """What examples are made from.

    Attributes:
        products: the catalogue.
        queries: its queries; None where no example has one.
        rows: the examples.
        same_group: the other products of each product's group.
        group_share: chance, 0 to 1, that a product's query is a view of another product of its
            group and not of itself.
        others: relevant pairs that are no examples.
        first_generated: queries from this number on are generated from attributes: their positives
            are the judged products, and not their families.
    """

    products: Table
    queries: QueryTable | None
    rows: ExampleRows
    same_group: SameGroup
    group_share: float
    others: Sequence[ExampleRows] = ()
    first_generated: float = math.inf


class TrainingBatches(Dataset[Batch]):
    """The batch of a draw.

    Everything random about an example follows from (seed, epoch, example number).

    Args:
        data: what examples are made from.
        views: what is left out of queries and products.
        preprocess: of the model.
        seed: of all views.
    """

    def __init__(self, data: ExampleData, views: Views, preprocess: Preprocess, seed: int) -> None:
        self.data = data
        self.views = views
        self.preprocess = preprocess
        self.seed = seed
        self.judgements = Judgements(data.products, data.rows, data.others)
        # How often each product is drawn, 1 on average over the products that are drawn at all.
        times = np.bincount(data.rows.product, minlength=len(data.products))
        mean = times.sum() / max(np.count_nonzero(times), 1)
        self.frequency = (times / max(mean, 1)).astype(np.float32)

    def __getitem__(self, draw: Draw) -> Batch:
        if not isinstance(draw, Draw):
            raise TypeError(
                f"Batches are drawn by tritower.datamodules.stream.BatchStream, not by {draw!r}: "
                "run with trainer.use_distributed_sampler=false."
            )
        examples = []
        rngs = []
        for number in draw.examples.tolist():
            examples.append(self.example(draw.epoch, number))
            rngs.append(np.random.default_rng((self.seed, draw.epoch, number, 1)))
        return collate(examples, self.preprocess, rngs, self.negatives(draw))

    def negatives(self, draw: Draw) -> list[BatchProduct]:
        """The extra products of a batch."""
        if draw.negatives is None:
            return []
        drawn = self.data.rows.product
        products: list[BatchProduct] = []
        for number in draw.examples.tolist():
            rng = np.random.default_rng((self.seed, draw.epoch, number, 2))
            rows = draw.negatives.draw(int(drawn[number]), rng, drawn)
            products += [self.negative(int(row), rng) for row in rows]
        return products

    def negative(self, row: int, rng: np.random.Generator) -> BatchProduct:
        """An extra product as a view; a whole one could be recognized by its completeness."""
        product = self.data.products.row(row)
        item = self.preprocess.product.readable(product_item(product))
        return BatchProduct(
            self.views(item, rng), product_keys(product), float(self.frequency[row])
        )

    def example(self, epoch: int, number: int) -> Example:
        """Example `number` as it is in this epoch."""
        rng = np.random.default_rng((self.seed, epoch, number))
        rows = self.data.rows
        product_row = int(rows.product[number])
        product = self.data.products.row(product_row)
        keys = product_keys(product)
        query_row = int(rows.query[number])
        query_product = int(rows.query_product[number])
        is_relevant = bool(rows.weight[number] > 0)
        if query_row != NO_ROW:
            query, query_keys, keys = self._typed_query(query_row, keys, is_relevant)
        else:
            is_judged = query_product != NO_ROW
            if not is_judged:
                query_product = self.draw_query_product(product_row, rng)
            query, query_keys, keys = self._product_query(
                query_product, keys, is_relevant and is_judged
            )
        judged_products, judgement_weights = self.judgements.of_query(query_row, query_product)
        label = float(rows.label[number])

        # A view of modalities that the model cannot read would teach it nothing.
        readable_query = self.preprocess.query.readable(query)
        readable_product = self.preprocess.product.readable(product_item(product))
        return Example(
            query=self.views(readable_query, rng),
            product=self.views(readable_product, rng),
            query_keys=query_keys,
            product_keys=keys,
            weight=float(rows.weight[number]),
            label=None if math.isnan(label) else label,
            frequency=float(self.frequency[product_row]),
            judged_products=judged_products,
            judgement_weights=judgement_weights,
        )

    def _typed_query(
        self, number: int, keys: list[int], is_relevant: bool
    ) -> tuple[Item, list[int], list[int]]:
        """A row of `queries/`: its item, its keys, and the product's keys."""
        assert self.data.queries is not None
        row = self.data.queries.row(number)
        query_key = stable_hash(row["query_id"])
        # A query shares the keys of its product, unless it was generated from attributes.
        shares_keys = is_relevant and number < self.data.first_generated
        shared = keys[:-1] if shares_keys else [NO_KEY] * len(keys[:-1])
        if is_relevant:
            # Elsewhere in the batch the product is relevant to this query, too.
            keys = [*keys[:-1], query_key]
        return query_item(row), [*shared, query_key], keys

    def _product_query(
        self, query_product: int, keys: list[int], is_judged: bool
    ) -> tuple[Item, list[int], list[int]]:
        """A row of `products/` as the query: its item, its keys, and the product's keys."""
        row = self.data.products.row(query_product)
        query_keys = product_keys(row)
        if is_judged:
            # All judged products of one product are positives of it, as those of a text are.
            query_key = stable_hash(f"like\0{row['product_id']}")
            query_keys = [*query_keys[:-1], query_key]
            keys = [*keys[:-1], query_key]
        return product_item(row), query_keys, keys

    def draw_query_product(self, row: int, rng: np.random.Generator) -> int:
        """The product whose view is the query: this one, or another one of its group."""
        others = self.data.same_group.others(row)
        if len(others) and rng.random() < self.data.group_share:
            return int(others[rng.integers(len(others))])
        return row
