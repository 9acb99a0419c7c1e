"""The questions of an evaluation.

Queries as embedded, with the products that answer them as rows of the index.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tritower.retrieval.evaluating.evaluation_queries import Questions
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.ranking.metrics import NONE
from tritower.retrieval.vectors.embeddings import EmbeddingReader


def make_questions(
    reader: EmbeddingReader,
    qrels: pa.Table,
    index: ProductIndex,
    *,
    queries: pa.Table | None = None,
    split: str | None = None,
    threshold: float | None = None,
) -> Questions:
    """Join embedded queries with judgements and products, by id.

    A query never counts its own source product, not even its grade. Queries without relevant
    products are dropped and counted.

    Args:
        reader: embedded queries; without kinds they are all of kind "query".
        qrels: columns query_id, product_id, relevance.
        index: whose row numbers are used.
        queries: columns query_id, split, source_product_id; None where nothing is known of them.
        split: the queries to ask; None for all.
        threshold: the lowest relevant grade; None for the highest grade in `qrels`.

    Raises:
        ValueError: a query appears twice in one kind, or none is left.
    """
    ids, kinds, vectors = _read(reader)
    if queries is not None:
        qrels = _of_others(qrels, queries)
    facts = _facts(queries, split)
    chosen = np.array([queries is None or query_id in facts for query_id in ids], bool)
    if threshold is None:
        threshold = pc.max(qrels.column("relevance")).as_py() or 1.0
    answers, unknown = _answers(qrels, index, set(ids[chosen]))
    source_rows = rows_of([facts.get(query_id) or "" for query_id in ids], index)
    keep = []
    judged = []
    grades = []
    dropped = dict.fromkeys(dict.fromkeys(kinds.tolist()), 0)
    for i in np.flatnonzero(chosen):
        rows, values = answers.get(ids[i], _NO_ANSWERS)
        if (values >= threshold).any():
            keep.append(i)
            judged.append(rows)
            grades.append(values)
        else:
            dropped[kinds[i]] += 1
    if not keep:
        raise ValueError(
            f"{reader.source}: none of {len(ids):,} queries is left: {int(chosen.sum()):,} are of "
            f"split {split!r}, "
            f"{sum(dropped.values()):,} of them have no product with a grade of {threshold:g} or "
            "more: "
            "choose another split or a lower threshold"
        )
    relevant = [rows[values >= threshold] for rows, values in zip(judged, grades, strict=True)]
    return Questions(
        ids[keep],
        kinds[keep],
        vectors[keep],
        source_rows[keep],
        _padded(relevant, NONE),
        _padded(judged, NONE),
        _padded(grades, 0.0),
        threshold,
        dropped,
        len(set(ids[chosen]) - set(ids[keep])),
        unknown,
    )


_NO_ANSWERS = (np.zeros(0, np.int64), np.zeros(0))


def _read(
    reader: EmbeddingReader,
) -> tuple[NDArray[np.object_], NDArray[np.object_], NDArray[np.float32]]:
    batches = list(reader.batches())
    ids = np.array([i for batch in batches for i in batch.ids.to_pylist()], dtype=object)
    kinds = []
    for b in batches:
        for k in ["query"] * len(b.ids) if b.kinds is None else b.kinds.to_pylist():
            kinds.append(k)
    if len(set(zip(ids, kinds, strict=True))) < len(ids):
        seen: set[tuple[str, str]] = set()
        twice = next(
            pair for pair in zip(ids, kinds, strict=True) if pair in seen or seen.add(pair)
        )  # type: ignore[func-returns-value]
        raise ValueError(f"{reader.source}: query {twice[0]!r} appears twice in kind {twice[1]!r}")
    return ids, np.array(kinds, dtype=object), np.concatenate([batch.vectors for batch in batches])


def _facts(queries: pa.Table | None, split: str | None) -> dict[str, str | None]:
    """Query id -> its source product, for the queries of a split."""
    if queries is None:
        return {}
    if split is not None:
        queries = queries.filter(pc.equal(queries.column("split"), split))
    names = queries.column("query_id").to_pylist()
    return dict(zip(names, queries.column("source_product_id").to_pylist(), strict=True))


def _of_others(qrels: pa.Table, queries: pa.Table) -> pa.Table:
    """The judgements but those of a product for itself.

    By id, since an index need not hold the product that asks.
    """
    asked = pc.index_in(
        qrels.column("query_id"), value_set=queries.column("query_id").combine_chunks()
    )
    source = queries.column("source_product_id").cast(pa.string()).take(asked)
    return qrels.filter(pc.fill_null(pc.not_equal(source, qrels.column("product_id")), True))


def _answers(
    qrels: pa.Table, index: ProductIndex, asked: set[str]
) -> tuple[dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]], int]:
    """Query id -> rows and grades of its judged products.

    And how many products the index does not hold.
    """
    qrels = qrels.filter(
        pc.and_(
            pc.greater(qrels.column("relevance"), 0),
            pc.is_in(qrels.column("query_id"), value_set=pa.array(sorted(asked), pa.string())),
        )
    )
    products = pc.unique(qrels.column("product_id"))
    rows = rows_of(products.to_pylist(), index)
    unknown = rows < 0
    rows[unknown] = index.engine.count + np.arange(
        unknown.sum()
    )  # relevant all the same, and never found
    row = rows[pc.index_in(qrels.column("product_id"), value_set=products).to_numpy()]
    grade = qrels.column("relevance").to_numpy()
    grouped: dict[str, dict[int, float]] = {}
    for query_id, r, g in zip(
        qrels.column("query_id").to_pylist(), row.tolist(), grade.tolist(), strict=True
    ):
        grades = grouped.setdefault(query_id, {})
        grades[r] = max(g, grades.get(r, 0.0))
    answers = {
        query_id: (
            np.fromiter(grades, np.int64, len(grades)),
            np.fromiter(grades.values(), np.float64, len(grades)),
        )
        for query_id, grades in grouped.items()
    }
    return answers, int(unknown.sum())


def rows_of(product_ids: list[str], index: ProductIndex) -> NDArray[np.int64]:
    """(N,) rows of products, -1 for those that the index does not hold."""
    return index.rows_of(pa.array(product_ids, pa.large_string()))


def _padded(rows: list[NDArray], fill: float) -> NDArray:
    width = max(map(len, rows))
    padded = np.full((len(rows), width), fill, dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded
