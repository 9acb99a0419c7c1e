"""Training examples: which query goes with which product, and the batch they make."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset

from tritower.datamodules.batch import NO_KEY, Batch, Example, Item
from tritower.datamodules.catalogue import Table, product_item, product_keys, query_item
from tritower.datamodules.preprocess import Preprocess, stable_hash
from tritower.datamodules.stream import Draw
from tritower.datamodules.views import Views

MateRelation = Literal["none", "group", "family"]

ITSELF = -1
"""In `ExampleRows.query` and `.source`:

the query is a view of the product itself, or of one of its mates.
"""


@dataclass(frozen=True)
class ExampleRows:
    """E examples as row numbers, ordered by product, so that neighbours are read together.

    Attributes:
        product: (E,) int64 rows of `products/`.
        query: (E,) int64 rows of `queries/`, or `ITSELF`.
        source: (E,) int64 rows of `products/` that are asked as queries, or `ITSELF`.
        weight: (E,) float32, 0 to 1.
        label: (E,) float32, 0 to 1 how similar a labelled pair is; NaN for all others.
    """

    product: np.ndarray
    query: np.ndarray
    source: np.ndarray
    weight: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.product)

    @classmethod
    def join(cls, parts: Sequence[ExampleRows]) -> ExampleRows:
        """All examples of all parts, ordered by product."""
        columns = [
            np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)
        ]
        order = np.argsort(columns[0], kind="stable")
        return cls(*(column[order] for column in columns))


def catalogue_examples(rows: np.ndarray) -> ExampleRows:
    """One example for each of these rows of `products/`: two views of it, or of it and a mate."""
    itself = np.full(len(rows), ITSELF, np.int64)
    ones = np.ones(len(rows), np.float32)
    return ExampleRows(rows.astype(np.int64), itself, itself, ones, ones * np.nan)


def pair_examples(
    qrels: pa.Table,
    products: Table,
    queries: Table,
    split: str,
    max_per_query: int | None = None,
    seed: int = 0,
    *,
    power: float = 1.0,
    labelled: bool = False,
    equals: bool = False,
) -> ExampleRows:
    """The judgements whose both ends are of this split; weights are (relevance / highest relevance) to a power.

    Args:
        qrels: query_id, product_id, relevance.
        products: the catalogue.
        queries: its queries.
        split: of both ends.
        max_per_query: only the most relevant products of a query, equals drawn at random; None
            takes all.
        seed: of the draw.
        power: 1 weighs by relevance, 0 takes all judgements alike, 2 sets the best ones apart.
        labelled: the examples have labels, which are their weights, and those of relevance 0 are
            among them.
        equals: keep all products that are as relevant as the last one of `max_per_query`: they
            answer no less.
    """
    product_ids, query_ids = products.column("product_id"), queries.column("query_id")
    product = index_in(qrels["product_id"], product_ids)
    query = index_in(qrels["query_id"], query_ids)
    source = index_in(queries.column("source_product_id"), product_ids)[query]
    relevance = qrels["relevance"].to_numpy().astype(np.float32)
    of_split = is_split(products, split)
    keep = (product >= 0) & (query >= 0)  # first: -1 would look up the last row
    keep &= (relevance > 0) | labelled
    keep &= of_split[product] & is_split(queries, split)[query]
    keep &= np.where(source >= 0, of_split[source], True) & (source != product)
    if max_per_query is not None:
        rank = rank_in_query(query, np.where(keep, relevance, -1), seed)
        if equals:
            _, alike = np.unique(np.stack([query, relevance], 1), axis=0, return_inverse=True)
            best = np.full(len(rank), len(rank))
            np.minimum.at(best, alike[keep], rank[keep])
            rank = best[alike]
        keep &= rank < max_per_query
    weight = np.where(
        relevance > 0, (relevance / max(float(relevance.max(initial=0.0)), 1e-9)) ** power, 0.0
    )
    weight = weight.astype(np.float32)
    return ExampleRows(
        product[keep],
        np.where(source >= 0, ITSELF, query)[keep],
        np.where(source >= 0, source, ITSELF)[keep],
        weight[keep],
        weight[keep] if labelled else np.full(int(keep.sum()), np.nan, np.float32),
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
    found = pc.index_in(values, value_set=among.combine_chunks(), skip_nulls=True)
    return found.fill_null(-1).to_numpy().astype(np.int64)


def is_split(table: Table, split: str) -> np.ndarray:
    """(n,) bool: the rows of this split."""
    return pc.equal(table.column("split"), split).to_numpy()


class Mates:
    """The other products of one group or family.

    Args:
        products: the catalogue.
        relation: `group` (the same thing), `family` (variants of one style, or the same thing), or
            `none`.
        rows: int64 rows that may be mates, e.g. those of the train split.
    """

    def __init__(self, products: Table, relation: MateRelation, rows: np.ndarray) -> None:
        if relation == "none":
            keys = pa.nulls(len(products), pa.string())
        else:
            keys = products.column("group").combine_chunks()
            if relation == "family":  # a family may have the name of another product's group
                groups = pc.binary_join_element_wise(keys, "group", "\0")
                keys = pc.coalesce(products.column("family").combine_chunks(), groups)
        codes = (
            keys.take(pa.array(rows))
            .dictionary_encode()
            .indices.fill_null(-1)
            .to_numpy()
            .astype(np.int64)
        )
        order = np.argsort(codes, kind="stable")
        self.members = rows[order]
        self.first = np.full(len(products), 0, np.int64)
        self.last = np.full(len(products), 0, np.int64)
        self.first[rows] = np.searchsorted(codes[order], codes, "left")
        self.last[rows] = np.searchsorted(codes[order], codes, "right")
        self.last[rows[codes < 0]] = self.first[rows[codes < 0]]

    def first_of_each(self, rows: np.ndarray) -> np.ndarray:
        """Those of the rows that have no mates among all, or come before all of them."""
        alone = self.first[rows] == self.last[rows]
        first = self.members[np.minimum(self.first[rows], max(len(self.members) - 1, 0))]
        return rows[alone | (first == rows)]

    def of(self, row: int) -> np.ndarray:
        """(m,) int64 rows of the mates of a product, itself not among them."""
        members = self.members[self.first[row] : self.last[row]]
        return members[members != row]


class JudgedAnswers:
    """What is known to answer each query, and each product that asks.

    The judgements among the examples.

    Args:
        products: the catalogue.
        rows: examples; those of weight 0 are no answers.
        others: what is no example and answers all the same.
        max_per_query: so many with the largest weights are kept, of equals those of `rows`: a batch
            stays small.
    """

    def __init__(
        self,
        products: Table,
        rows: ExampleRows,
        others: Sequence[ExampleRows] = (),
        max_per_query: int = 64,
    ) -> None:
        self.num_products = len(products)
        parts = (rows, *others)
        product, query, source, weight = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("product", "query", "source", "weight")
        )
        is_other = np.repeat([False, *[True] * len(others)], [len(part) for part in parts])
        judged = (weight > 0) & ((query != ITSELF) | (source != ITSELF))
        asker = np.where(query != ITSELF, self.num_products + query, source)
        asker, product, weight, is_other = (
            values[judged] for values in (asker, product, weight, is_other)
        )
        order = np.lexsort(
            (is_other, -weight, product, asker)
        )  # one judgement may be shown several times
        first = np.ones(len(order), bool)
        first[1:] = (np.diff(asker[order]) != 0) | (np.diff(product[order]) != 0)
        asker, product, weight, is_other = (
            values[order][first] for values in (asker, product, weight, is_other)
        )
        order = np.lexsort((is_other, -weight, asker))
        order = order[
            np.arange(len(order)) - np.searchsorted(asker[order], asker[order]) < max_per_query
        ]
        self.asker, product, self.weight = asker[order], product[order], weight[order]
        rows_, number = np.unique(product, return_inverse=True)
        ids = products.column("product_id").take(pa.array(rows_)).to_pylist()
        self.key = np.array([stable_hash(product_id) for product_id in ids], np.int64)[number]
        self.width = int(np.unique(self.asker, return_counts=True)[1].max(initial=0))

    def of(self, query: int, source: int) -> tuple[list[int], list[float]]:
        """(J,) `product` keys and (J,) weights of what answers a row of `queries/`, or a row of `products/` that asks.

        J is the same for all; `NO_KEY` and 0 where one has fewer answers.
        """
        asker = source if query == ITSELF else self.num_products + query
        own = slice(*np.searchsorted(self.asker, (asker, asker + 1)))
        missing = self.width - (own.stop - own.start)
        return [*self.key[own].tolist(), *[NO_KEY] * missing], [
            *self.weight[own].tolist(),
            *[0.0] * missing,
        ]


class Numbered(Protocol):
    """Rows of `queries/` by number."""

    def row(self, number: int) -> Mapping[str, Any]:
        """Row `number` as plain data."""


class TrainingBatches(Dataset[Batch]):
    """The batch of a draw. Everything random about an example follows from (seed, epoch, example number).

    Args:
        products: the catalogue.
        queries: its queries, of which `row` gives one by its number; None where no example has one.
        rows: which examples there are.
        mates: of each product.
        mate_share: chance, 0 to 1, that a product's query is a view of a mate and not of itself.
        views: what is left out of queries and products.
        preprocess: of the model.
        seed: of all views.
        others: what answers queries beside the examples.
        first_facets: queries from this number on name facets: they ask for what is judged, and not
            for its family.
    """

    def __init__(
        self,
        products: Table,
        queries: Numbered | None,
        rows: ExampleRows,
        mates: Mates,
        mate_share: float,
        views: Views,
        preprocess: Preprocess,
        seed: int,
        others: Sequence[ExampleRows] = (),
        first_facets: float = math.inf,
    ) -> None:
        self.products, self.queries, self.rows, self.mates = products, queries, rows, mates
        self.first_facets = first_facets
        self.mate_share, self.views, self.preprocess, self.seed = (
            mate_share,
            views,
            preprocess,
            seed,
        )
        self.answers = JudgedAnswers(products, rows, others)
        times = np.bincount(rows.product, minlength=len(products))
        self.frequency = (times / max(times.sum() / max(np.count_nonzero(times), 1), 1)).astype(
            np.float32
        )

    def __getitem__(self, draw: Draw) -> Batch:
        if not isinstance(draw, Draw):
            raise TypeError(
                f"Batches are drawn by tritower.datamodules.stream.BatchStream, not by {draw!r}: "
                "run with trainer.use_distributed_sampler=false."
            )
        examples = [self.example(draw.epoch, int(number)) for number in draw.examples]
        rngs = [
            np.random.default_rng((self.seed, draw.epoch, int(number), 1))
            for number in draw.examples
        ]
        return collate(examples, self.preprocess, rngs, self.negatives(draw))

    def negatives(self, draw: Draw) -> list[Answer]:
        """The extra products of a batch."""
        if draw.negatives is None:
            return []
        found: list[Answer] = []
        for number in draw.examples:
            rng = np.random.default_rng((self.seed, draw.epoch, int(number), 2))
            rows = draw.negatives.of(int(self.rows.product[number]), rng, self.rows.product)
            found += [self.answer(int(row), rng) for row in rows]
        return found

    def answer(self, row: int, rng: np.random.Generator) -> Answer:
        """A product as it stands among the answers of a batch.

        A view, or one could tell by its completeness.
        """
        product = self.products.row(row)
        item = self.preprocess.product.readable(product_item(product))
        return Answer(self.views(item, rng), product_keys(product), float(self.frequency[row]))

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
            query, ask = query_item(row), stable_hash(row["query_id"])
            answered = self.rows.weight[number] > 0
            shared = answered and query_number < self.first_facets
            query_keys = [*(keys[:-1] if shared else [NO_KEY] * len(keys[:-1])), ask]
            if (
                answered
            ):  # else the product is no answer to the query elsewhere in the batch, either
                keys = [*keys[:-1], ask]
        else:
            judged = source != ITSELF
            source = source if judged else self.pick(product_row, rng)
            asked = self.products.row(source)
            query, query_keys = product_item(asked), product_keys(asked)
            if (
                judged and self.rows.weight[number] > 0
            ):  # so all answers to one product are answers, as those to a text
                ask = stable_hash(f"like\0{asked['product_id']}")
                query_keys, keys = [*query_keys[:-1], ask], [*keys[:-1], ask]
        answers, grades = self.answers.of(query_number, source)
        sides = self.preprocess  # a view of what a model cannot read would teach it nothing
        return Example(
            query=self.views(sides.query.readable(query), rng),
            product=self.views(sides.product.readable(product_item(product)), rng),
            query_keys=query_keys,
            product_keys=keys,
            weight=float(self.rows.weight[number]),
            label=None if math.isnan(label := float(self.rows.label[number])) else label,
            frequency=float(self.frequency[product_row]),
            judged=answers,
            grades=grades,
        )

    def pick(self, row: int, rng: np.random.Generator) -> int:
        """The product whose view asks for this one: itself or a mate."""
        mates = self.mates.of(row)
        if len(mates) and rng.random() < self.mate_share:
            return int(mates[rng.integers(len(mates))])
        return row


class Answer(NamedTuple):
    """A product among those that a batch's queries are compared with.

    Its view, R keys, and its frequency.
    """

    item: Item
    keys: Sequence[int]
    frequency: float


def collate(
    examples: Sequence[Example],
    preprocess: Preprocess,
    rngs: Sequence[np.random.Generator] | None = None,
    negatives: Sequence[Answer] = (),
) -> Batch:
    """B examples as tensors; with B `rngs` their pictures are varied.

    `negatives` are further products.

    Labels that are missing are NaN; without any, the batch has none.
    """
    labels = [torch.nan if example.label is None else example.label for example in examples]
    query = preprocess.query([example.query for example in examples], rngs)
    answers = [
        Answer(example.product, example.product_keys, example.frequency) for example in examples
    ]
    answers += negatives
    if rngs is not None:  # a negative is varied with the example that it stands for
        rngs = [
            *rngs,
            *(rngs[number * len(examples) // len(negatives)] for number in range(len(negatives))),
        ]
    product = preprocess.product([answer.item for answer in answers], rngs)
    asks, found = query.present.any(1), product.present.any(1)
    known = asks & found[: len(examples)]  # a pair of nothing teaches nothing
    return Batch(
        query=query,
        product=product,
        query_keys=torch.tensor([example.query_keys for example in examples]),
        product_keys=torch.tensor([answer.keys for answer in answers]),
        weight=torch.tensor([example.weight for example in examples]) * known,
        label=None
        if all(map(math.isnan, labels))
        else torch.tensor(labels).masked_fill(~known, torch.nan),
        frequency=torch.tensor([answer.frequency for answer in answers]),
        judged=torch.tensor([example.judged for example in examples])
        if examples[0].judged
        else None,
        grades=torch.tensor([example.grades for example in examples])
        if examples[0].judged
        else None,
        query_present=asks,
        product_present=found,
    )
