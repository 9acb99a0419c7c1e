"""After training: compare the model with untrained search on held-out queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tritower.datamodules.batch import Item, Side
from tritower.datamodules.catalogue import product_item
from tritower.datamodules.held_out import HeldOut
from tritower.datamodules.held_out_rows import QueryRows
from tritower.datamodules.preprocess import ItemPreprocess
from tritower.datamodules.products import ProductDataModule
from tritower.retrieval.evaluating.evaluation_queries import EvaluationQueries
from tritower.retrieval.evaluating.metric_report import DEPTH, ranking_metrics
from tritower.retrieval.evaluating.untrained_comparison import (
    ComparedQueries,
    search_untrained,
    untrained_report,
)
from tritower.retrieval.evaluating.untrained_inputs import (
    NUMBERS,
    UntrainedInputs,
    number_features,
    query_number_features,
)
from tritower.retrieval.lexical.records import Record, record_of, typed_record, visible_record
from tritower.towers.encoding import to_device
from tritower.towers.metric import to_score_space
from tritower.towers.two_tower import TwoTower
from tritower.towers.untrained import UntrainedTowers, untrained_features
from tritower.towers.validation import exact_search

ENCODED_AT_ONCE = 256
"""Items per forward pass."""


class TypedQuery(NamedTuple):
    """A held-out query as one of its query types.

    Attributes:
        number: of the held-out query.
        query_type: one of `tritower.retrieval.evaluating.evaluation_queries.QUERY_TYPES`.
        item: the modalities that this query type contains.
    """

    number: int
    query_type: str
    item: Item


def floor_report(
    model: TwoTower, data: ProductDataModule, split: str, towers: Mapping[Side, UntrainedTowers]
) -> dict[str, Any]:
    """Metrics of a model and of untrained search, by exact search on a split.

    Queries of which the model encodes nothing are left out.

    Args:
        model: the trained model.
        data: its held-out queries of the split are set up.
        split: "val" or "test".
        towers: the pretrained towers of each side before training.

    Returns:
        A report as `tritower.retrieval.evaluating.evaluate` makes it: queries, tasks (exact only),
        baselines, differences, chosen.
    """
    held_out = data.held_out[split]
    assert data.preprocess is not None
    model.eval()

    # Products: embeddings of the model, and what untrained search reads of them.
    items = [product_item(data.products.row(row)) for row in held_out.candidates.tolist()]
    products = _encode(model, "product", data.preprocess.product, items, towers["product"])
    records, numbers = _records(items, data)
    features = dict(products.features)
    if numbers.size:
        features[NUMBERS] = number_features(numbers)
    product_inputs = UntrainedInputs(records, features)

    # Queries: each one in every query type that it can have.
    rows = QueryRows(data.products, data.queries, held_out, data.preprocess.query)
    queries = list(_typed_queries(rows))
    query_items = [query.item for query in queries]
    encoded = _encode(model, "query", data.preprocess.query, query_items, towers["query"])
    is_encoded = np.asarray(encoded.embedding.any(axis=1), bool)
    queries = [queries[position] for position in np.flatnonzero(is_encoded)]
    query_features = {name: values[is_encoded] for name, values in encoded.features.items()}
    embedding = encoded.embedding[is_encoded]

    evaluation_queries = _evaluation_queries(queries, embedding, held_out)
    trained = exact_search(embedding, products.embedding, evaluation_queries.source, k=DEPTH)
    query_inputs = _query_inputs(queries, evaluation_queries, product_inputs, query_features)
    compared = ComparedQueries(evaluation_queries, query_inputs, trained)
    untrained = search_untrained(product_inputs, compared, None)
    counts = {}
    exact = {}
    for query_type in evaluation_queries.distinct_types:
        positions = evaluation_queries.positions_of_type(query_type)
        of_type = evaluation_queries.select(positions)
        counts[query_type] = {"count": len(positions)}
        exact[query_type] = ranking_metrics(trained[positions], of_type)
    return {
        "queries": counts,
        "origin": held_out.origin,
        "split": split,
        "tasks": {"exact": exact},
        **untrained_report(evaluation_queries, untrained, {"exact": trained}),
    }


class _EncodedItems(NamedTuple):
    embedding: NDArray[np.float32]  # (n, D), zeros where the model encodes nothing of an item
    features: dict[str, NDArray[Any]]  # name of a tower -> (n, F)


@torch.inference_mode()
def _encode(
    model: TwoTower,
    side: Side,
    preprocess: ItemPreprocess,
    items: Sequence[Item],
    towers: UntrainedTowers,
) -> _EncodedItems:
    """Embeddings of items, and features of pretrained towers before training."""
    encoder = model.query if side == "query" else model.product
    for tower in towers.values():
        tower.to(model.device).eval()
    embeddings = [np.zeros((0, model.embed_dim), np.float32)]
    features: dict[str, list[NDArray[Any]]] = {name: [] for name in towers}
    stream = iter(items)
    # The features of a tower that was not trained are those of the encoder's own forward pass.
    while batch := list(islice(stream, ENCODED_AT_ONCE)):
        tensors = to_device(preprocess(batch), model.device)
        tensors, untrained = untrained_features(encoder, towers, tensors)
        encoded = encoder(tensors)
        vectors = to_score_space(encoded.embedding.float(), side, model.metric)
        has_any = encoded.present.any(1, keepdim=True)
        embeddings.append((vectors * has_any).cpu().numpy())
        for name, values in untrained.items():
            features[name].append(values.cpu().numpy())
    joined = {name: np.concatenate(parts) for name, parts in features.items() if parts}
    return _EncodedItems(np.concatenate(embeddings), joined)


def _records(
    items: Sequence[Item], data: ProductDataModule
) -> tuple[list[Record], NDArray[np.float64]]:
    """Records for lexical search, and (n, A) numbers, NaN where missing."""
    title = data.schema.text[0] if data.schema.text else ""
    names = [attribute.name for attribute in data.schema.numbers]
    records = [record_of(item.text, item.attributes, title) for item in items]
    numbers = [[item.attributes.get(name, np.nan) for name in names] for item in items]
    return records, np.array(numbers, np.float64).reshape(len(items), len(names))


def _typed_queries(rows: QueryRows) -> Iterator[TypedQuery]:
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
            yield TypedQuery(number, query_type, item)
            continue
        yield TypedQuery(number, "fused", item)
        parts = {
            "product:text": Item(text=item.text),
            "product:image": Item(images=item.images),
            "product:attribute": Item(attributes=item.attributes),
        }
        for query_type, part in parts.items():
            if any(part):
                yield TypedQuery(number, query_type, part)


def _evaluation_queries(
    queries: Sequence[TypedQuery], embedding: NDArray[np.float32], held_out: HeldOut
) -> EvaluationQueries:
    """The queries with their embeddings and judgements."""
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


def _query_inputs(
    queries: Sequence[TypedQuery],
    evaluation_queries: EvaluationQueries,
    products: UntrainedInputs,
    features: Mapping[str, NDArray[Any]],
) -> UntrainedInputs:
    """What untrained search reads of the queries."""
    records: list[Record] = []
    # A product shows a part of its record, a typed query its text.
    for query, source in zip(queries, evaluation_queries.source.tolist(), strict=True):
        if source >= 0:
            records.append(visible_record(products.records[source], query.query_type))
        else:
            records.append(typed_record(next(iter(query.item.text.values()), "")))
    own_features = dict(features)
    if NUMBERS in products.features:
        own_features[NUMBERS] = query_number_features(
            products.features[NUMBERS], evaluation_queries.source, evaluation_queries.query_types
        )
    return UntrainedInputs(records, own_features)
