"""Held-out queries in each of their types: whole, and by each modality alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tritower.datamodules.batch import Item
from tritower.datamodules.held_out import HeldOut
from tritower.datamodules.held_out_rows import QueryRows
from tritower.retrieval.evaluating.evaluation_queries import EvaluationQueries


class QueryOfType(NamedTuple):
    """A held-out query as one of its query types.

    Attributes:
        number: of the held-out query.
        query_type: one of `tritower.retrieval.evaluating.evaluation_queries.QUERY_TYPES`.
        item: the modalities that this query type contains.
    """

    number: int
    query_type: str
    item: Item


def queries_by_type(rows: QueryRows) -> Iterator[QueryOfType]:
    """Every held-out query in each of its query types; types without content are left out."""
    for number in range(len(rows.held_out)):
        item = rows.item(number)
        # A query of its own, or a product in all the ways that it can be a query.
        if rows.held_out.own[number] < 0:
            if item.text and item.images:
                query_type = "fused"
            elif item.images:
                query_type = "image"
            else:
                query_type = "text"
            yield QueryOfType(number, query_type, item)
            continue
        yield QueryOfType(number, "fused", item)
        parts = {
            "product:text": Item(text=item.text),
            "product:image": Item(images=item.images),
            "product:attribute": Item(attributes=item.attributes),
        }
        for query_type, part in parts.items():
            if any(part):
                yield QueryOfType(number, query_type, part)


def evaluation_queries_of(
    queries: Sequence[QueryOfType], embedding: NDArray[np.float32], held_out: HeldOut
) -> EvaluationQueries:
    """The Q queries with their (Q, D) embeddings and their judgements."""
    number = np.array([query.number for query in queries])
    judged = held_out.judged[number]
    grades = np.where(judged >= 0, held_out.grade[number], 0.0)
    return EvaluationQueries(
        ids=np.array([str(query.number) for query in queries], object),
        query_types=np.array([query.query_type for query in queries], object),
        vectors=embedding,
        source=held_out.own[number],
        relevant=held_out.relevant[number],
        judged=judged,
        grades=grades.astype(np.float64),
        threshold=held_out.threshold,
    )
