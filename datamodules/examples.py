"""Training examples: which query goes with which product, and the batch they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset

from datamodules.batch import Batch, Example
from datamodules.parquet import Table, product_item, product_keys, query_item
from datamodules.preprocess import Preprocess, stable_hash
from datamodules.stream import Draw
from datamodules.views import Views

MateRelation = Literal["none", "group", "family"]

ITSELF = -1
"""In `ExampleRows.query` and `.source`: the query is a view of the product itself, or of one of its mates."""


@dataclass(frozen=True)
class ExampleRows:
    """E examples as row numbers, ordered by product, so that neighbours are read together.

    Attributes:
        product: (E,) int64 rows of `products/`.
        query: (E,) int64 rows of `queries/`, or `ITSELF`.
        source: (E,) int64 rows of `products/` that are asked as queries, or `ITSELF`.
        weight: (E,) float32, 0 to 1.
    """

    product: np.ndarray
    query: np.ndarray
    source: np.ndarray
    weight: np.ndarray

    def __len__(self) -> int:
        return len(self.product)

    @classmethod
    def join(cls, parts: Sequence[ExampleRows]) -> ExampleRows:
        """All examples of all parts, ordered by product."""
        columns = [
            np.concatenate([getattr(p, name) for p in parts]) for name in ("product", "query", "source", "weight")
        ]
        order = np.argsort(columns[0], kind="stable")
        return cls(*(column[order] for column in columns))


def catalogue_examples(rows: np.ndarray) -> ExampleRows:
    """One example for each of these rows of `products/`: two views of it, or of it and a mate."""
    itself = np.full(len(rows), ITSELF, np.int64)
    return ExampleRows(rows.astype(np.int64), itself, itself, np.ones(len(rows), np.float32))


def pair_examples(
    qrels: pa.Table, products: Table, queries: Table, split: str, max_per_query: int | None = None, seed: int = 0
) -> ExampleRows:
    """The judgements whose both ends are of this split; weights are relevance / highest relevance.

    Args:
        qrels: query_id, product_id, relevance.
        products: the catalogue.
        queries: its queries.
        split: of both ends.
        max_per_query: only the most relevant products of a query, equals drawn at random; None takes all.
        seed: of the draw.
    """
    product_ids, query_ids = products.column("product_id"), queries.column("query_id")
    product = index_in(qrels["product_id"], product_ids)
    query = index_in(qrels["query_id"], query_ids)
    source = index_in(queries.column("source_product_id"), product_ids)[query]
    relevance = qrels["relevance"].to_numpy().astype(np.float32)
    of_split = is_split(products, split)
    keep = (product >= 0) & (query >= 0) & (relevance > 0)  # first: -1 would look up the last row
    keep &= of_split[product] & is_split(queries, split)[query]
    keep &= np.where(source >= 0, of_split[source], True) & (source != product)
    if max_per_query is not None:
        keep &= rank_in_query(query, np.where(keep, relevance, -1), seed) < max_per_query
    weight = relevance / max(float(relevance.max(initial=0.0)), 1e-9)
    return ExampleRows(
        product[keep],
        np.where(source >= 0, ITSELF, query)[keep],
        np.where(source >= 0, source, ITSELF)[keep],
        weight[keep],
    )


def rank_in_query(query: np.ndarray, relevance: np.ndarray, seed: int) -> np.ndarray:
    """(n,) int64: 0 for the most relevant judgement of each query, 1 for the next; equals in random order."""
    order = np.lexsort((np.random.default_rng((seed, 2)).random(len(query)), -relevance, query))
    ordered = query[order]
    rank = np.empty(len(query), np.int64)
    rank[order] = np.arange(len(query)) - np.searchsorted(ordered, ordered)
    return rank


def index_in(values: pa.ChunkedArray, among: pa.ChunkedArray) -> np.ndarray:
    """(n,) int64 position of each value, -1 where it is null or not there."""
    found = pa.compute.index_in(values, value_set=among.combine_chunks(), skip_nulls=True)
    return found.fill_null(-1).to_numpy().astype(np.int64)


def is_split(table: Table, split: str) -> np.ndarray:
    """(n,) bool: the rows of this split."""
    return pa.compute.equal(table.column("split"), split).to_numpy()


class Mates:
    """The other products of one group or family.

    Args:
        products: the catalogue.
        relation: `group` (the same thing), `family` (variants of one style, or the same thing), or `none`.
        rows: int64 rows that may be mates, e.g. those of the train split.
    """

    def __init__(self, products: Table, relation: MateRelation, rows: np.ndarray) -> None:
        if relation == "none":
            keys = pa.nulls(len(products), pa.string())
        else:
            keys = products.column("group").combine_chunks()
            if relation == "family":  # a family may have the name of another product's group
                groups = pa.compute.binary_join_element_wise(keys, "group", "\0")
                keys = pa.compute.coalesce(products.column("family").combine_chunks(), groups)
        codes = keys.take(pa.array(rows)).dictionary_encode().indices.fill_null(-1).to_numpy().astype(np.int64)
        order = np.argsort(codes, kind="stable")
        self.members = rows[order]
        self.first = np.full(len(products), 0, np.int64)
        self.last = np.full(len(products), 0, np.int64)
        self.first[rows] = np.searchsorted(codes[order], codes, "left")
        self.last[rows] = np.searchsorted(codes[order], codes, "right")
        self.last[rows[codes < 0]] = self.first[rows[codes < 0]]

    def of(self, row: int) -> np.ndarray:
        """(m,) int64 rows of the mates of a product, itself not among them."""
        members = self.members[self.first[row] : self.last[row]]
        return members[members != row]


class TrainingBatches(Dataset[Batch]):
    """The batch of a draw. Everything random about an example follows from (seed, epoch, example number).

    Args:
        products: the catalogue.
        queries: its queries, or None.
        rows: which examples there are.
        mates: of each product.
        mate_share: chance, 0 to 1, that a product's query is a view of a mate and not of itself.
        views: what is left out of queries and products.
        preprocess: of the model.
        seed: of all views.
    """

    def __init__(
        self,
        products: Table,
        queries: Table | None,
        rows: ExampleRows,
        mates: Mates,
        mate_share: float,
        views: Views,
        preprocess: Preprocess,
        seed: int,
    ) -> None:
        self.products, self.queries, self.rows, self.mates = products, queries, rows, mates
        self.mate_share, self.views, self.preprocess, self.seed = mate_share, views, preprocess, seed

    def __getitem__(self, draw: Draw) -> Batch:
        if not isinstance(draw, Draw):
            raise TypeError(
                f"Batches are drawn by datamodules.stream.BatchStream, not by {draw!r}: "
                "run with trainer.use_distributed_sampler=false."
            )
        examples = [self.example(draw.epoch, int(number)) for number in draw.examples]
        rngs = [np.random.default_rng((self.seed, draw.epoch, int(number), 1)) for number in draw.examples]
        return collate(examples, self.preprocess, rngs)

    def example(self, epoch: int, number: int) -> Example:
        """Example `number` as it looks in this epoch."""
        rng = np.random.default_rng((self.seed, epoch, number))
        product_row = int(self.rows.product[number])
        product = self.products.row(product_row)
        keys = product_keys(product)
        query_number, source = int(self.rows.query[number]), int(self.rows.source[number])
        if query_number != ITSELF:
            assert self.queries is not None
            row = self.queries.row(query_number)
            query, query_keys = query_item(row), [*keys[:-1], stable_hash(row["query_id"])]
            keys = query_keys
        else:
            if source == ITSELF:
                source = self.pick(product_row, rng)
            asked = self.products.row(source)
            query, query_keys = product_item(asked), product_keys(asked)
        sides = self.preprocess  # a view of what a model cannot read would teach it nothing
        return Example(
            query=self.views(sides.query.readable(query), rng),
            product=self.views(sides.product.readable(product_item(product)), rng),
            query_keys=query_keys,
            product_keys=keys,
            weight=float(self.rows.weight[number]),
        )

    def pick(self, row: int, rng: np.random.Generator) -> int:
        """The product whose view asks for this one: itself or a mate."""
        mates = self.mates.of(row)
        if len(mates) and rng.random() < self.mate_share:
            return int(mates[rng.integers(len(mates))])
        return row


def collate(
    examples: Sequence[Example], preprocess: Preprocess, rngs: Sequence[np.random.Generator] | None = None
) -> Batch:
    """B examples as tensors; with B `rngs` their pictures are varied.

    Raises:
        ValueError: some examples have a label and others have none.
    """
    labels = [example.label for example in examples]
    if any(label is None for label in labels) and any(label is not None for label in labels):
        raise ValueError(
            f"{sum(label is None for label in labels)} of {len(labels)} examples of a batch have no label."
        )
    query = preprocess.query([example.query for example in examples], rngs)
    product = preprocess.product([example.product for example in examples], rngs)
    known = query.present.any(1) & product.present.any(1)  # a pair of which the model sees nothing teaches nothing
    return Batch(
        query=query,
        product=product,
        query_keys=torch.tensor([example.query_keys for example in examples]),
        product_keys=torch.tensor([example.product_keys for example in examples]),
        weight=torch.tensor([example.weight for example in examples]) * known,
        label=None if labels[0] is None else torch.tensor(labels),
    )
