"""Held-out queries, the products they are searched among, and which of those answer them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset, Sampler

from tritower.datamodules.batch import Item, NumberedItems
from tritower.datamodules.catalogue import Table, product_item, query_item
from tritower.datamodules.examples import ITSELF, MateRelation, Mates, index_in, is_split
from tritower.datamodules.preprocess import ItemPreprocess

logger = logging.getLogger(__name__)

Asked = Literal[
    "judged queries", "products that ask for their mates", "titles that ask for their product"
]
TITLES: Asked = "titles that ask for their product"


@dataclass(frozen=True)
class HeldOut:
    """Q queries over G products.

    Attributes:
        query: (Q,) int64 rows of `queries/`, or `ITSELF`.
        source: (Q,) int64 rows of `products/` that are asked as queries, or `ITSELF`.
        gallery: (G,) int64 rows of `products/`, ascending.
        judged: (Q, J) int64 positions in the gallery, -1 padded.
        grade: (Q, J) float32, 0 to 1, of the judged products; 1 is the catalogue's highest.
        own: (Q,) int64 position of the asked product in the gallery, which is no hit; -1 where
            there is none.
        threshold: the lowest grade that is relevant; every query has a product of it.
        asked: what the queries are. Titles alone are the known-item test of a catalogue without
            queries or mates.
    """

    query: np.ndarray
    source: np.ndarray
    gallery: np.ndarray
    judged: np.ndarray
    grade: np.ndarray
    own: np.ndarray
    threshold: float
    asked: Asked

    @property
    def relevant(self) -> np.ndarray:
        """(Q, J) int64: the judged products that are relevant, -1 for the others."""
        return np.where(self.grade >= self.threshold, self.judged, -1)

    def __len__(self) -> int:
        return len(self.query)

    def select(self, subset: np.ndarray) -> HeldOut:
        """The queries of a (Q,) bool mask, over the same products."""
        return replace(
            self,
            query=self.query[subset],
            source=self.source[subset],
            judged=self.judged[subset],
            grade=self.grade[subset],
            own=self.own[subset],
        )


def held_out(
    products: Table,
    queries: Table | None,
    qrels: pa.Table | None,
    *,
    split: str,
    mates: MateRelation,
    max_queries: int,
    max_products: int,
    seed: int = 0,
    threshold: float | None = None,
) -> HeldOut:
    """The held-out queries of a split.

    Judged ones where there are any, else its products' mates, else their titles.

    The gallery is the catalogue; one of more than `max_products` is sampled uniformly, judged and
    asked products always among it. Judged queries without a product of relevance `threshold` (null:
    the highest there is) are not asked; how many those are is logged.

    Raises:
        ValueError: the split has no products to ask for, or none of its judged queries has a
            relevant product.
    """
    rng = np.random.default_rng((seed, 1))
    query, source, judged_rows, grades, lowest = _judged(products, queries, qrels, split, threshold)
    asked: Asked = "judged queries"
    if not len(query):
        asked = "products that ask for their mates"
        source, judged_rows = _mates(products, mates, split)
        if not len(source):
            asked = TITLES
            source = np.flatnonzero(is_split(products, split))
            judged_rows = [np.array([row]) for row in source]
        query = np.full(len(source), ITSELF, np.int64)
        grades = [np.ones(len(rows), np.float32) for rows in judged_rows]
    if not len(query):
        raise ValueError(
            f"The {split} split has no products and no queries. Prepare the catalogue with a {split} split."
        )
    if len(query) > max_queries:
        keep = np.sort(rng.choice(len(query), max_queries, replace=False))
        query, source = query[keep], source[keep]
        judged_rows, grades = [judged_rows[i] for i in keep], [grades[i] for i in keep]

    needed = np.unique(np.concatenate([*judged_rows, source[source >= 0]]))
    others = np.setdiff1d(np.arange(len(products)), needed)
    room = max(0, max_products - len(needed))
    gallery = np.sort(np.concatenate([needed, rng.permutation(others)[:room]])).astype(np.int64)
    width = max(len(rows) for rows in judged_rows)
    judged = np.full((len(query), width), -1, np.int64)
    grade = np.zeros((len(query), width), np.float32)
    for i, rows in enumerate(judged_rows):
        judged[i, : len(rows)] = np.searchsorted(gallery, rows)
        grade[i, : len(rows)] = grades[i]
    asks = (source >= 0) & (asked != TITLES)
    own = np.where(asks, np.searchsorted(gallery, np.maximum(source, 0)), -1)
    return HeldOut(query, source, gallery, judged, grade, own, lowest, asked)


def _judged(
    products: Table,
    queries: Table | None,
    qrels: pa.Table | None,
    split: str,
    threshold: float | None,
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], list[np.ndarray], float]:
    """Rows of the split's queries, their sources, what is judged for each, its grades, and the lowest relevant one."""
    if queries is None or qrels is None or not len(qrels):
        return np.empty(0, np.int64), np.empty(0, np.int64), [], [], 1.0
    product_ids = products.column("product_id")
    query, product = (
        index_in(qrels["query_id"], queries.column("query_id")),
        index_in(qrels["product_id"], product_ids),
    )
    source = index_in(queries.column("source_product_id"), product_ids)
    relevance = qrels["relevance"].to_numpy().astype(np.float32)
    keep = (relevance > 0) & is_split(queries, split)[query] & (product >= 0) & (query >= 0)
    keep &= source[query] != product
    highest = max(float(relevance.max()), 1e-9)
    lowest = float(np.float32(highest if threshold is None else threshold) / np.float32(highest))
    query, product, grade = query[keep], product[keep], relevance[keep] / np.float32(highest)
    order = np.lexsort((-grade, product, query))
    pairs, first = np.unique(
        np.stack([query[order], product[order]], 1), axis=0, return_index=True
    )  # judged twice
    best = grade[order][first]
    keep = np.isin(pairs[:, 0], pairs[best >= lowest, 0])
    if not keep.all():
        _tell_dropped(split, pairs[:, 0], keep, lowest * highest, float(best.max()) * highest)
    pairs, best = pairs[keep], best[keep]
    rows, starts = np.unique(pairs[:, 0], return_index=True)
    judged, grades = (
        np.split(values, starts[1:]) if len(rows) else [] for values in (pairs[:, 1], best)
    )
    return (
        np.where(source[rows] >= 0, ITSELF, rows),
        source[rows],
        judged,
        grades,
        lowest if len(rows) else 1.0,
    )


def _tell_dropped(
    split: str, query: np.ndarray, kept: np.ndarray, threshold: float, best: float
) -> None:
    """Say how many judged queries have nothing relevant, or refuse where that is all of them."""
    count, dropped = len(np.unique(query)), len(np.unique(query[~kept]))
    if dropped == count:
        raise ValueError(
            f"None of the {count} judged {split} queries has a product of relevance {threshold:g} or more, which is "
            f"what counts as relevant; the best there has {best:g}. Choose a lower data.threshold. (Weights that are "
            "counts, as of clicks, are better prepared as a few grades.)"
        )
    logger.warning(
        "%d of %d judged %s queries have no product of relevance %g or more and are not asked; data.threshold says "
        "what is relevant.",
        dropped,
        count,
        split,
        threshold,
    )


def _mates(
    products: Table, relation: MateRelation, split: str
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The products of the split that have mates there, and the mates."""
    rows = np.flatnonzero(is_split(products, split))
    mates = Mates(products, relation, rows)
    found = [(row, mates.of(int(row))) for row in rows]
    return np.array([row for row, m in found if len(m)], np.int64), [m for _, m in found if len(m)]


class ProductRows(Dataset[NumberedItems]):
    """Products by their positions in the gallery."""

    def __init__(self, products: Table, gallery: np.ndarray, preprocess: ItemPreprocess) -> None:
        self.products, self.gallery, self.preprocess = products, gallery, preprocess

    def __getitem__(self, positions: np.ndarray) -> NumberedItems:
        items = [
            product_item(self.products.row(int(self.gallery[position]))) for position in positions
        ]
        return NumberedItems(self.preprocess(items), torch.from_numpy(positions))


class QueryRows(Dataset[NumberedItems]):
    """Held-out queries by their number."""

    def __init__(
        self, products: Table, queries: Table | None, held_out: HeldOut, preprocess: ItemPreprocess
    ) -> None:
        self.products, self.queries, self.held_out, self.preprocess = (
            products,
            queries,
            held_out,
            preprocess,
        )

    def __getitem__(self, positions: np.ndarray) -> NumberedItems:
        return NumberedItems(
            self.preprocess([self.item(int(p)) for p in positions]), torch.from_numpy(positions)
        )

    def item(self, position: int) -> Item:
        """Query `position` as it is asked."""
        number = int(self.held_out.query[position])
        if number != ITSELF:
            assert self.queries is not None
            return query_item(self.queries.row(number))
        item = product_item(self.products.row(int(self.held_out.source[position])))
        return (
            Item(text=dict(list(item.text.items())[:1])) if self.held_out.asked == TITLES else item
        )


class RowBatches(Sampler[np.ndarray]):
    """0..num_rows in order, in batches; rank r of R takes batches r, r + R, ...

    and every row comes exactly once.

    Batches are smaller where there are few rows, so that every rank has one: a rank without any
      would not come to the
    end of the epoch, where the others wait for it.
    """

    def __init__(self, num_rows: int, batch_size: int, rank: int = 0, num_ranks: int = 1) -> None:
        batch_size = max(1, min(batch_size, num_rows // num_ranks))
        self.starts = range(rank * batch_size, num_rows, num_ranks * batch_size)
        self.num_rows, self.batch_size = num_rows, batch_size

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in self.starts:
            yield np.arange(start, min(start + self.batch_size, self.num_rows))
