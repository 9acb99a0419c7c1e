"""Exact and approximate search for evaluation queries, as users are served."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tritower.retrieval.evaluating.evaluation_queries import EvaluationQueries
from tritower.retrieval.evaluating.exact import exact_search
from tritower.retrieval.evaluating.metric_report import DEPTH
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.ivf.engine import Settings
from tritower.retrieval.ranking.hits import Hits
from tritower.retrieval.ranking.metrics import NO_ROW
from tritower.retrieval.vectors.embeddings import EmbeddingReader

PAGE_SIZE = 10
"""Results of a search as users make it."""


@dataclass(frozen=True)
class EvaluationOptions:
    """Which queries are measured, and how they are searched.

    Attributes:
        split: queries of this split, "train", "val" or "test"; None for all.
        threshold: lowest relevant grade; None for the highest grade that occurs.
        recall: recall that searches aim at, if the index was tuned; None for the one it was built
            for.
        nprobe: lists scanned; None for what the query type needs.
        exclude_identical: also leave out products whose vector equals that of the source product.
        untrained: measure untrained search, if there is a catalogue.
        latency_queries: timed searches; 0 for none.
    """

    split: str | None = "test"
    threshold: float | None = None
    recall: float | None = None
    nprobe: int | None = None
    exclude_identical: bool = False
    untrained: bool = True
    latency_queries: int = 1000


class TaskRows(NamedTuple):
    """What two searches found for Q queries.

    Attributes:
        exact: (Q, DEPTH) rows found by exact search, -1 padded.
        ann: (Q, DEPTH) rows found through the index, -1 padded.
        num_with_duplicates: queries that found another product with the vector of their source
            product.
    """

    exact: NDArray[np.int64]
    ann: NDArray[np.int64]
    num_with_duplicates: int


def search_tasks(
    index: ProductIndex,
    products: EmbeddingReader,
    queries: EvaluationQueries,
    options: EvaluationOptions,
) -> TaskRows:
    """Exact and approximate search: (Q, K) rows each, without a query's own source product."""
    # One more result than needed, in place of the source product. Where duplicates of it are left
    # out, too, search deeper until enough others remain.
    # Excluded duplicates make room for more hits: search deeper until enough remain.
    extra = 1
    while True:
        exact = exact_search(products, index, queries.vectors, DEPTH + extra)
        duplicates = are_duplicates(queries.source, exact.hits.rows, exact.content)
        most = int(duplicates.sum(axis=1).max(initial=0))
        if not options.exclude_identical or extra > most or extra >= len(index):
            break
        extra *= 4
    ann = search_as_served(index, queries, extra, options)

    # The query's own product, and duplicates where requested, are dropped from both rankings.
    kept_rows: list[NDArray[np.int64]] = []
    for rows in (exact.hits.rows, ann):
        kept = (rows != queries.source[:, None]) & (rows >= 0)
        if options.exclude_identical:
            kept &= ~are_duplicates(queries.source, rows, exact.content)
        kept_rows.append(Hits.from_order(rows).keep_first(kept, DEPTH).rows)
    return TaskRows(kept_rows[0], kept_rows[1], int(duplicates.any(axis=1).sum()))


def search_as_served(
    index: ProductIndex, queries: EvaluationQueries, extra: int, options: EvaluationOptions
) -> NDArray[np.int64]:
    """(Q, DEPTH + extra) rows: a search for 10, followed by what a deeper search adds.

    A deeper search re-ranks more candidates, so its first 10 are better than those that users see.
    For a query that is a product, `extra` more are searched for, as its source is left out later.
    """
    depth = min(DEPTH + extra, len(index))
    rows = np.full((len(queries.vectors), depth), NO_ROW)
    is_product = queries.source >= 0
    for query_type in queries.distinct_types:
        settings = settings_for(index, options, query_type)
        of_type = queries.positions_of_type(query_type)
        for positions, own in (
            (of_type[~is_product[of_type]], 0),
            (of_type[is_product[of_type]], extra),
        ):
            if not len(positions):
                continue
            vectors = queries.vectors[positions]
            first = index.search(vectors, PAGE_SIZE + own, settings=settings).rows
            deep = index.search(vectors, DEPTH + extra, settings=settings).rows
            # Append the deep results that the first page lacks; padding moves to the end.
            is_repeated = (deep[:, :, None] == first[:, None, :]).any(axis=2)
            both = np.concatenate([first, np.where(is_repeated, NO_ROW, deep)], axis=1)
            order = np.argsort(both == NO_ROW, axis=1, kind="stable")[:, :depth]
            rows[positions] = np.take_along_axis(both, order, axis=1)
    return rows


def are_duplicates(
    source: NDArray[np.int64], rows: NDArray[np.int64], content: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """(Q, K): whether a hit is another product with the same vector as the source product."""
    has_same_vector: NDArray[np.bool_] = content[rows] == content[source][:, None]
    is_other = (rows != source[:, None]) & (rows >= 0)
    return has_same_vector & is_other & (source[:, None] >= 0)


def settings_for(index: ProductIndex, options: EvaluationOptions, query_type: str) -> Settings:
    """Search settings for queries of a type."""
    return index.resolve(options.nprobe, recall=options.recall, query_type=query_type)
