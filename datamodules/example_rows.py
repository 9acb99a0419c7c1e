"""Training examples as row numbers: which query goes with which product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tritower.datamodules.catalogue import Table

NO_ROW = -1
"""In `ExampleRows.query` and `.query_product`: the query is a view of the product itself, or of
another product of its group.
"""


@dataclass(frozen=True)
class ExampleRows:
    """E examples, ordered by product, so that neighbors are read together.

    Attributes:
        product: (E,) int64 rows of `products/`.
        query: (E,) int64 rows of `queries/`, or `NO_ROW`.
        query_product: (E,) int64 rows of `products/` that are the query, or `NO_ROW`.
        weight: (E,) float32, 0 to 1.
        label: (E,) float32, 0 to 1, similarity of a labeled pair; NaN for all others.
    """

    product: np.ndarray
    query: np.ndarray
    query_product: np.ndarray
    weight: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.product)

    @classmethod
    def join(cls, parts: Sequence[ExampleRows]) -> ExampleRows:
        """All examples of all parts, ordered by product: (E,) rows of the sum of their lengths."""
        columns = []
        for field in fields(cls):
            columns.append(np.concatenate([getattr(part, field.name) for part in parts]))
        order = np.argsort(columns[0], kind="stable")
        return cls(*(column[order] for column in columns))


@dataclass(frozen=True)
class JudgementOptions:
    """Which judgements become examples, and their weights.

    Attributes:
        max_per_query: only the most relevant products of a query, ties drawn at random; None takes
            all.
        seed: of the draw.
        power: the weight is (relevance / highest relevance) to this power: 1 weighs by relevance,
            0 weighs all judgements alike, 2 sets the best ones apart.
        labeled: the examples have labels, which are their weights, and judgements of relevance 0
            are among them.
        keep_ties: keep all products that are as relevant as the last one of `max_per_query`.
    """

    max_per_query: int | None = None
    seed: int = 0
    power: float = 1.0
    labeled: bool = False
    keep_ties: bool = False


def catalogue_examples(rows: np.ndarray) -> ExampleRows:
    """One example for each of (N,) int64 rows of `products/`: two views of it, or of its group."""
    no_row = np.full(len(rows), NO_ROW, np.int64)
    weight = np.ones(len(rows), np.float32)
    return ExampleRows(rows.astype(np.int64), no_row, no_row, weight, weight * np.nan)


def judgement_examples(
    qrels: pa.Table,
    products: Table,
    queries: Table,
    split: str,
    options: JudgementOptions = JudgementOptions(),
) -> ExampleRows:
    """The judgements whose query and product are both of this split, as (E,) examples.

    Args:
        qrels: query_id, product_id, relevance.
        products: the catalogue.
        queries: its queries.
        split: of both.
        options: which judgements, and their weights.
    """
    # Ids to rows.
    product_ids = products.column("product_id")
    product = index_in(qrels["product_id"], product_ids)
    query = index_in(qrels["query_id"], queries.column("query_id"))
    query_product = index_in(queries.column("source_product_id"), product_ids)[query]
    relevance = qrels["relevance"].to_numpy().astype(np.float32)

    # Both ends are known, of the split, and not the same product. Unknown ones are left out first:
    # -1 would look up the last row.
    of_split = is_split(products, split)
    keep = (product >= 0) & (query >= 0)
    keep &= (relevance > 0) | options.labeled
    keep &= of_split[product] & is_split(queries, split)[query]
    keep &= np.where(query_product >= 0, of_split[query_product], True)
    keep &= query_product != product
    if options.max_per_query is not None:
        keep &= _is_most_relevant(query, relevance, keep, options)

    top_positions = max(float(relevance.max(initial=0.0)), 1e-9)
    weight = np.where(relevance > 0, (relevance / top_positions) ** options.power, 0.0)
    weight = weight.astype(np.float32)
    if options.labeled:
        label = weight
    else:
        label = np.full(len(weight), np.nan, np.float32)
    is_product_query = query_product >= 0
    return ExampleRows(
        product[keep],
        np.where(is_product_query, NO_ROW, query)[keep],
        np.where(is_product_query, query_product, NO_ROW)[keep],
        weight[keep],
        label[keep],
    )


def _is_most_relevant(
    query: np.ndarray, relevance: np.ndarray, keep: np.ndarray, options: JudgementOptions
) -> np.ndarray:
    """(n,) bool: judgements among the `max_per_query` most relevant of their query."""
    rank = rank_in_query(query, np.where(keep, relevance, -1), options.seed)
    if options.keep_ties:
        # Ties have the rank of the best of them.
        pairs = np.stack([query, relevance], 1)
        _, tie = np.unique(pairs, axis=0, return_inverse=True)
        best = np.full(len(rank), len(rank))
        np.minimum.at(best, tie[keep], rank[keep])
        rank = best[tie]
    is_most_relevant: np.ndarray = rank < options.max_per_query
    return is_most_relevant


def rank_in_query(query: np.ndarray, relevance: np.ndarray, seed: int) -> np.ndarray:
    """(n,) int64: 0 for the most relevant judgement of each query; ties in random order."""
    tie_breaker = np.random.default_rng((seed, 2)).random(len(query))
    order = np.lexsort((tie_breaker, -relevance, query))
    ordered = query[order]
    rank = np.empty(len(query), np.int64)
    rank[order] = np.arange(len(query)) - np.searchsorted(ordered, ordered)
    return rank


def index_in(values: pa.ChunkedArray, among: pa.ChunkedArray) -> np.ndarray:
    """(n,) int64 position of each value, -1 where it is null or not there."""
    position = pc.index_in(values, value_set=among.combine_chunks(), skip_nulls=True)
    positions: np.ndarray = position.fill_null(-1).to_numpy().astype(np.int64)
    return positions


def is_split(table: Table, split: str) -> np.ndarray:
    """(n,) bool: the rows of this split."""
    mask: np.ndarray = pc.equal(table.column("split"), split).to_numpy()
    return mask
