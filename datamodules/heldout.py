"""Held-out queries, the products they are searched among, and which of those answer them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset, Sampler

from datamodules.batch import Item, NumberedItems
from datamodules.examples import ITSELF, MateRelation, Mates, index_in, is_split
from datamodules.parquet import Table, product_item, query_item
from datamodules.preprocess import ItemPreprocess


@dataclass(frozen=True)
class HeldOut:
    """Q queries over G products.

    Attributes:
        query: (Q,) int64 rows of `queries/`, or `ITSELF`.
        source: (Q,) int64 rows of `products/` that are asked as queries, or `ITSELF`.
        gallery: (G,) int64 rows of `products/`, ascending.
        judged: (Q, J) int64 positions in the gallery, -1 padded.
        grade: (Q, J) float32, 0 to 1, of the judged products; 1 is the catalogue's highest, and every query has one.
        own: (Q,) int64 position of the asked product in the gallery, which is no hit; -1 where there is none.
        title_only: queries show their title alone: the known-item test of a catalogue without queries or mates.
    """

    query: np.ndarray
    source: np.ndarray
    gallery: np.ndarray
    judged: np.ndarray
    grade: np.ndarray
    own: np.ndarray
    title_only: bool = False

    @property
    def relevant(self) -> np.ndarray:
        """(Q, J) int64: the judged products of the highest grade, -1 for the others."""
        return np.where(self.grade == 1, self.judged, -1)

    def __len__(self) -> int:
        return len(self.query)


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
) -> HeldOut:
    """The held-out queries of a split: judged ones where there are any, else its products' mates, else their titles.

    The gallery is the catalogue; one of more than `max_products` is sampled uniformly, judged and asked products always
    among it.

    Raises:
        ValueError: the split has no products to ask for.
    """
    rng = np.random.default_rng((seed, 1))
    query, source, judged_rows, grades = _judged(products, queries, qrels, split)
    title_only = False
    if not len(query):
        source, judged_rows = _mates(products, mates, split)
        title_only = not len(source)
        if title_only:
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
    asked = (source >= 0) & (not title_only)
    own = np.where(asked, np.searchsorted(gallery, np.maximum(source, 0)), -1)
    return HeldOut(query, source, gallery, judged, grade, own, title_only)


def _judged(
    products: Table, queries: Table | None, qrels: pa.Table | None, split: str
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Rows of queries and sources of the split, and the products judged for each with their grades, one the highest."""
    if queries is None or qrels is None or not len(qrels):
        return np.empty(0, np.int64), np.empty(0, np.int64), [], []
    product_ids = products.column("product_id")
    query, product = index_in(qrels["query_id"], queries.column("query_id")), index_in(qrels["product_id"], product_ids)
    source = index_in(queries.column("source_product_id"), product_ids)
    relevance = qrels["relevance"].to_numpy().astype(np.float32)
    keep = (relevance > 0) & is_split(queries, split)[query] & (product >= 0) & (query >= 0)
    keep &= source[query] != product
    query, product, grade = query[keep], product[keep], relevance[keep] / max(float(relevance.max()), 1e-9)
    order = np.lexsort((-grade, product, query))
    pairs, first = np.unique(np.stack([query[order], product[order]], 1), axis=0, return_index=True)  # judged twice
    best = grade[order][first]
    keep = np.isin(pairs[:, 0], pairs[best == 1, 0])
    pairs, best = pairs[keep], best[keep]
    rows, starts = np.unique(pairs[:, 0], return_index=True)
    judged, grades = (np.split(values, starts[1:]) if len(rows) else [] for values in (pairs[:, 1], best))
    return np.where(source[rows] >= 0, ITSELF, rows), source[rows], judged, grades


def _mates(products: Table, relation: MateRelation, split: str) -> tuple[np.ndarray, list[np.ndarray]]:
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
        items = [product_item(self.products.row(int(self.gallery[position]))) for position in positions]
        return NumberedItems(self.preprocess(items), torch.from_numpy(positions))


class QueryRows(Dataset[NumberedItems]):
    """Held-out queries by their number."""

    def __init__(self, products: Table, queries: Table | None, held_out: HeldOut, preprocess: ItemPreprocess) -> None:
        self.products, self.queries, self.held_out, self.preprocess = products, queries, held_out, preprocess

    def __getitem__(self, positions: np.ndarray) -> NumberedItems:
        return NumberedItems(self.preprocess([self.item(int(p)) for p in positions]), torch.from_numpy(positions))

    def item(self, position: int) -> Item:
        """Query `position` as it is asked."""
        number = int(self.held_out.query[position])
        if number != ITSELF:
            assert self.queries is not None
            return query_item(self.queries.row(number))
        item = product_item(self.products.row(int(self.held_out.source[position])))
        return Item(text=dict(list(item.text.items())[:1])) if self.held_out.title_only else item


class RowBatches(Sampler[np.ndarray]):
    """0..num_rows in order, in batches; rank r of R takes batches r, r + R, ... and every row comes exactly once.

    Batches are smaller where there are few rows, so that every rank has one: a rank without any would not come to the
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
