"""Held-out queries, the products they are searched among, and which of those are relevant."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from tritower.datamodules.catalogue import Table
from tritower.datamodules.example_rows import NO_ROW, index_in, is_split
from tritower.datamodules.positives import GroupRelation, SameGroup

logger = logging.getLogger(__name__)

QueryOrigin = Literal["judged queries", "products with a group", "titles of products"]
TITLES: QueryOrigin = "titles of products"


@dataclass(frozen=True)
class HeldOut:
    """Q queries over G candidates.

    Attributes:
        query: (Q,) int64 rows of `queries/`, or `NO_ROW`.
        query_product: (Q,) int64 rows of `products/` that are the query, or `NO_ROW`.
        candidates: (G,) int64 rows of `products/`, ascending.
        judged: (Q, J) int64 positions among the candidates, -1 padded.
        grade: (Q, J) float32, 0 to 1, of the judged products; 1 is the catalogue's highest.
        own: (Q,) int64 position of the query's own product among the candidates, which is no hit;
            -1 where there is none.
        threshold: the lowest grade that is relevant; every query has a product of it.
        origin: of the queries. Titles alone are the known-item test of a catalogue without queries
            and groups.
    """

    query: np.ndarray
    query_product: np.ndarray
    candidates: np.ndarray
    judged: np.ndarray
    grade: np.ndarray
    own: np.ndarray
    threshold: float
    origin: QueryOrigin

    @property
    def relevant(self) -> np.ndarray:
        """(Q, J) int64: the judged products that are relevant, -1 for the others."""
        return np.where(self.grade >= self.threshold, self.judged, -1)

    def __len__(self) -> int:
        return len(self.query)

    def select(self, subset: np.ndarray) -> HeldOut:
        """The queries of a (Q,) bool mask, over the same candidates."""
        return replace(
            self,
            query=self.query[subset],
            query_product=self.query_product[subset],
            judged=self.judged[subset],
            grade=self.grade[subset],
            own=self.own[subset],
        )


@dataclass(frozen=True)
class HeldOutOptions:
    """The held-out queries that models are chosen by and tested on.

    Attributes:
        max_queries: held-out queries of each validation.
        max_products: products they are searched among.
        val_split: split that the best model is chosen by.
        test_split: split of `train.py test`.
        threshold: relevance from which products of held-out queries are relevant; null takes the
            highest of all judgements. Queries without such a product are left out.
    """

    max_queries: int = 2000
    max_products: int = 20_000
    val_split: str = "val"
    test_split: str = "test"
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None and not self.threshold > 0:
            raise ValueError(
                f"threshold={self.threshold}: products of relevance 0 are not relevant; choose "
                "above 0."
            )


class JudgedQueries(NamedTuple):
    """Q queries with their judged products.

    Attributes:
        query: (Q,) int64 rows of `queries/`, or `NO_ROW`.
        query_product: (Q,) int64 rows of `products/`, or `NO_ROW`.
        judged: Q arrays of rows of `products/`.
        grades: Q arrays of float32 grades.
        threshold: the lowest grade that is relevant.
    """

    query: np.ndarray
    query_product: np.ndarray
    judged: list[np.ndarray]
    grades: list[np.ndarray]
    threshold: float

    def select(self, kept: np.ndarray) -> JudgedQueries:
        """Some of the queries: (n,) positions or a (Q,) bool mask."""
        return JudgedQueries(
            self.query[kept],
            self.query_product[kept],
            [self.judged[i] for i in kept],
            [self.grades[i] for i in kept],
            self.threshold,
        )


def held_out_queries(
    products: Table,
    queries: Table | None,
    qrels: pa.Table | None,
    relation: GroupRelation,
    split: str,
    options: HeldOutOptions,
    seed: int = 0,
) -> HeldOut:
    """The held-out queries of a split.

    Judged queries where there are any, else products with a group, else titles.

    Candidates are the catalogue; a larger one than `max_products` is sampled uniformly, with all
    judged products and query products. Judged queries without a product of relevance `threshold`
    are left out; their number is logged.

    Args:
        products: the catalogue.
        queries: its queries, or None.
        qrels: query_id, product_id, relevance, or None.
        relation: whose other products are relevant where nothing is judged.
        split: of the queries.
        options: how many, and what is relevant.
        seed: of the samples.

    Raises:
        ValueError: the split has no queries and no products, or none of its judged queries has a
            relevant product.
    """
    rng = np.random.default_rng((seed, 1))
    origin: QueryOrigin = "judged queries"
    chosen = _judged_queries(products, queries, qrels, split, options.threshold)
    if not len(chosen.query):
        origin = "products with a group"
        chosen = _grouped_products(products, relation, split)
    if not len(chosen.query):
        origin = TITLES
        chosen = _titles(products, split)
    if not len(chosen.query):
        raise ValueError(
            f"The {split} split has no products and no queries. Prepare the catalogue with a "
            f"{split} split."
        )
    if len(chosen.query) > options.max_queries:
        kept = rng.choice(len(chosen.query), options.max_queries, replace=False)
        chosen = chosen.select(np.sort(kept))

    # Candidates: what is judged or is a query, and a sample of the others.
    is_query = chosen.query_product >= 0
    needed = np.unique(np.concatenate([*chosen.judged, chosen.query_product[is_query]]))
    others = np.setdiff1d(np.arange(len(products)), needed)
    room = max(0, options.max_products - len(needed))
    sample = rng.permutation(others)[:room]
    candidates = np.sort(np.concatenate([needed, sample])).astype(np.int64)

    # Rows of the catalogue become positions among the candidates.
    width = max(len(rows) for rows in chosen.judged)
    judged = np.full((len(chosen.query), width), -1, np.int64)
    grade = np.zeros((len(chosen.query), width), np.float32)
    for i, rows in enumerate(chosen.judged):
        judged[i, : len(rows)] = np.searchsorted(candidates, rows)
        grade[i, : len(rows)] = chosen.grades[i]
    own = np.searchsorted(candidates, np.maximum(chosen.query_product, 0))
    own = np.where(is_query & (origin != TITLES), own, -1)
    return HeldOut(
        chosen.query,
        chosen.query_product,
        candidates,
        judged,
        grade,
        own,
        chosen.threshold,
        origin,
    )


def _judged_queries(
    products: Table,
    queries: Table | None,
    qrels: pa.Table | None,
    split: str,
    threshold: float | None,
) -> JudgedQueries:
    """The judged queries of the split."""
    nothing = np.empty(0, np.int64)
    if queries is None or qrels is None or not len(qrels):
        return JudgedQueries(nothing, nothing, [], [], 1.0)

    # Ids to rows; only relevant judgements of known queries and products of the split.
    product_ids = products.column("product_id")
    query = index_in(qrels["query_id"], queries.column("query_id"))
    product = index_in(qrels["product_id"], product_ids)
    query_product = index_in(queries.column("source_product_id"), product_ids)
    relevance = qrels["relevance"].to_numpy().astype(np.float32)
    keep = (relevance > 0) & is_split(queries, split)[query] & (product >= 0) & (query >= 0)
    keep &= query_product[query] != product
    top_positions = max(float(relevance.max()), 1e-9)
    if threshold is None:
        threshold = top_positions
    lowest = float(np.float32(threshold) / np.float32(top_positions))
    query = query[keep]
    product = product[keep]
    grade = relevance[keep] / np.float32(top_positions)

    # Of several judgements of one pair the highest counts.
    order = np.lexsort((-grade, product, query))
    pairs, first = np.unique(np.stack([query[order], product[order]], 1), axis=0, return_index=True)
    best = grade[order][first]

    # Queries without a relevant product are left out.
    keep = np.isin(pairs[:, 0], pairs[best >= lowest, 0])
    if not keep.all():
        _report_dropped(
            split, pairs[:, 0], keep, lowest * top_positions, float(best.max()) * top_positions
        )
    pairs = pairs[keep]
    best = best[keep]
    rows, starts = np.unique(pairs[:, 0], return_index=True)
    if not len(rows):
        return JudgedQueries(nothing, nothing, [], [], 1.0)
    own_product = query_product[rows]
    return JudgedQueries(
        np.where(own_product >= 0, NO_ROW, rows),
        own_product,
        np.split(pairs[:, 1], starts[1:]),
        np.split(best, starts[1:]),
        lowest,
    )


def _report_dropped(
    split: str, query: np.ndarray, kept: np.ndarray, threshold: float, best: float
) -> None:
    """Warn of judged queries without a relevant product, or refuse where that is all of them."""
    count = len(np.unique(query))
    dropped = len(np.unique(query[~kept]))
    # Nothing left to measure is an error.
    if dropped == count:
        raise ValueError(
            f"None of the {count} judged {split} queries has a product of relevance {threshold:g} "
            f"or more, which counts as relevant; the best there has {best:g}. Choose a lower "
            "data.validation.threshold. (Weights that are counts, as of clicks, are better "
            "prepared as a few grades.)"
        )
    logger.warning(
        "%d of %d judged %s queries have no product of relevance %g or more and are left out; "
        "data.validation.threshold sets what is relevant.",
        dropped,
        count,
        split,
        threshold,
    )


def _grouped_products(products: Table, relation: GroupRelation, split: str) -> JudgedQueries:
    """The products of the split with others of their group there, which are relevant."""
    rows = np.flatnonzero(is_split(products, split))
    same_group = SameGroup(products, relation, rows)
    with_others = []
    others_of = []
    for row in rows.tolist():
        others = same_group.others(row)
        if len(others):
            with_others.append(row)
            others_of.append(others)
    return _products_as_queries(np.array(with_others, np.int64), others_of)


def _titles(products: Table, split: str) -> JudgedQueries:
    """All products of the split: each title should find its product."""
    rows = np.flatnonzero(is_split(products, split))
    return _products_as_queries(rows, [np.array([row]) for row in rows])


def _products_as_queries(rows: np.ndarray, judged: list[np.ndarray]) -> JudgedQueries:
    grades = [np.ones(len(products), np.float32) for products in judged]
    return JudgedQueries(np.full(len(rows), NO_ROW, np.int64), rows, judged, grades, 1.0)
