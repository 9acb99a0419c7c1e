"""Join embedded queries with relevance judgements (qrels) and with the rows of an index."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tritower.retrieval.evaluating.evaluation_queries import EvaluationQueries
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.ranking.metrics import NO_ROW
from tritower.retrieval.vectors.embeddings import EmbeddingReader

_NO_JUDGEMENTS = (np.zeros(0, np.int64), np.zeros(0))


def make_evaluation_queries(
    reader: EmbeddingReader,
    qrels: pa.Table,
    index: ProductIndex,
    *,
    queries: pa.Table | None = None,
    split: str | None = None,
    threshold: float | None = None,
) -> EvaluationQueries:
    """Join embedded queries with judgements and products by id.

    A product that is used as a query is never judged for itself. Queries without a relevant product
    are dropped and counted.

    Args:
        reader: embedded queries; without query types they are all of type "query".
        qrels: columns query_id, product_id, relevance.
        index: defines the row numbers.
        queries: columns query_id, split, source_product_id; None if there is no such table.
        split: use only the queries of this split; None for all.
        threshold: lowest relevant grade; None for the highest grade in `qrels`.

    Raises:
        ValueError: a query occurs twice in one type, or no query is left.
    """
    ids, query_types, vectors = _read_queries(reader)
    if queries is not None:
        qrels = _without_own_source(qrels, queries)
    source_products = _source_products(queries, split)
    in_split = np.array([queries is None or query_id in source_products for query_id in ids], bool)
    if threshold is None:
        threshold = pc.max(qrels.column("relevance")).as_py() or 1.0
    judgements, unknown = _rows_and_grades(qrels, index, set(ids[in_split]))

    # Keep the queries that have a relevant product, and count the others by type.
    kept = []
    judged = []
    grades = []
    relevant = []
    dropped = dict.fromkeys(query_types.tolist(), 0)
    for position in np.flatnonzero(in_split):
        rows, values = judgements.get(ids[position], _NO_JUDGEMENTS)
        is_relevant = values >= threshold
        if not is_relevant.any():
            dropped[query_types[position]] += 1
            continue
        kept.append(position)
        judged.append(rows)
        grades.append(values)
        relevant.append(rows[is_relevant])
    if not kept:
        raise ValueError(
            f"{reader.source}: none of {len(ids):,} queries is left: {int(in_split.sum()):,} are "
            f"of split {split!r}, {sum(dropped.values()):,} of them have no product with a grade "
            f"of {threshold:g} or more: choose another split or a lower threshold"
        )

    source_rows = rows_of([source_products.get(query_id) or "" for query_id in ids], index)
    return EvaluationQueries(
        ids=ids[kept],
        query_types=query_types[kept],
        vectors=vectors[kept],
        source=source_rows[kept],
        relevant=_padded(relevant, NO_ROW),
        judged=_padded(judged, NO_ROW),
        grades=_padded(grades, 0.0),
        threshold=threshold,
        dropped=dropped,
        dropped_queries=len(set(ids[in_split]) - set(ids[kept])),
        unknown=unknown,
    )


def rows_of(product_ids: list[str], index: ProductIndex) -> NDArray[np.int64]:
    """(N,) rows of products, -1 for those that the index does not hold."""
    return index.rows_of(pa.array(product_ids, pa.large_string()))


def _read_queries(
    reader: EmbeddingReader,
) -> tuple[NDArray[np.object_], NDArray[np.object_], NDArray[np.float32]]:
    """(Q,) ids, (Q,) query types and (Q, D) vectors of all queries."""
    ids: list[str] = []
    query_types: list[str] = []
    vectors = []
    for batch in reader.batches():
        ids += batch.ids.to_pylist()
        query_types += batch.type_names()
        vectors.append(batch.vectors)

    # A query may occur once in each type.
    seen: set[tuple[str, str]] = set()
    for key in zip(ids, query_types, strict=True):
        if key in seen:
            raise ValueError(f"{reader.source}: query {key[0]!r} appears twice in type {key[1]!r}")
        seen.add(key)
    return np.array(ids, object), np.array(query_types, object), np.concatenate(vectors)


def _source_products(queries: pa.Table | None, split: str | None) -> dict[str, str | None]:
    """Query id -> its source product, for the queries of a split."""
    if queries is None:
        return {}
    if split is not None:
        queries = queries.filter(pc.equal(queries.column("split"), split))
    query_ids = queries.column("query_id").to_pylist()
    return dict(zip(query_ids, queries.column("source_product_id").to_pylist(), strict=True))


def _without_own_source(qrels: pa.Table, queries: pa.Table) -> pa.Table:
    """The judgements, except those of a product for itself.

    Compared by id, since an index need not hold the source product.
    """
    query_ids = queries.column("query_id").combine_chunks()
    position = pc.index_in(qrels.column("query_id"), value_set=query_ids)
    source = queries.column("source_product_id").cast(pa.string()).take(position)
    is_other = pc.not_equal(source, qrels.column("product_id"))
    return qrels.filter(pc.fill_null(is_other, True))


def _rows_and_grades(
    qrels: pa.Table, index: ProductIndex, query_ids: set[str]
) -> tuple[dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]], int]:
    """Rows and grades of judged products, by query.

    Returns:
        Query id -> (J,) rows and (J,) grades; and the number of products that the index does not
        hold.
    """
    is_positive = pc.greater(qrels.column("relevance"), 0)
    wanted = pa.array(sorted(query_ids), pa.string())
    qrels = qrels.filter(pc.and_(is_positive, pc.is_in(qrels.column("query_id"), value_set=wanted)))

    # Products that the index does not hold get rows past its end: they are relevant and never
    # found.
    products = pc.unique(qrels.column("product_id"))
    product_rows = rows_of(products.to_pylist(), index)
    unknown = product_rows < 0
    product_rows[unknown] = index.engine.count + np.arange(unknown.sum())
    position = pc.index_in(qrels.column("product_id"), value_set=products).to_numpy()

    # A product that is judged twice for a query takes the higher grade.
    grade_of: dict[str, dict[int, float]] = {}
    for query_id, row, grade in zip(
        qrels.column("query_id").to_pylist(),
        product_rows[position].tolist(),
        qrels.column("relevance").to_pylist(),
        strict=True,
    ):
        grades = grade_of.setdefault(query_id, {})
        grades[row] = max(grade, grades.get(row, 0.0))

    arrays = {}
    for query_id, grades in grade_of.items():
        rows = np.fromiter(grades, np.int64, len(grades))
        arrays[query_id] = rows, np.fromiter(grades.values(), np.float64, len(grades))
    return arrays, int(unknown.sum())


def _padded(arrays: list[NDArray[Any]], fill: float) -> NDArray[Any]:
    """(N, W) from N arrays of at most W values each."""
    width = max(map(len, arrays))
    padded = np.full((len(arrays), width), fill, dtype=arrays[0].dtype)
    for padded_row, array in zip(padded, arrays, strict=True):
        padded_row[: len(array)] = array
    return padded
