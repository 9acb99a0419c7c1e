"""After training: compare the model with untrained search on held-out queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from tritower.towers.embedded import Embedded
from tritower.towers.encoding import to_device
from tritower.towers.queries_by_type import QueryOfType, evaluation_queries_of, queries_by_type
from tritower.towers.two_tower import TwoTower
from tritower.towers.untrained import UntrainedTowers, untrained_features
from tritower.towers.validation import exact_search

ENCODED_AT_ONCE = 256
"""Items per forward pass."""


class CompareOptions(NamedTuple):
    """On what a model is compared with untrained search.

    Attributes:
        split: the queries that are measured, "val" or "test".
        choosing: the queries that untrained search is tuned on; None for each half of the measured
            ones, tuned on the other half.
    """

    split: str
    choosing: str | None = None


def floor_report(
    model: TwoTower,
    data: ProductDataModule,
    options: CompareOptions,
    towers: Mapping[Side, UntrainedTowers],
) -> dict[str, Any]:
    """Metrics of a model and of untrained search, by exact search on a split.

    Queries of which the model encodes nothing are left out.

    Args:
        model: the trained model.
        data: its held-out queries of the splits are set up.
        options: which splits.
        towers: the pretrained towers of each side before training.

    Returns:
        A report as `tritower.retrieval.evaluating.evaluate` makes it: queries, tasks (exact only),
        baselines, differences, chosen.
    """
    model.eval()
    products = _encode_products(model, data, data.held_out[options.split], towers["product"])
    measured = _compared(model, data, options.split, products, towers["query"])
    choosing = None
    if options.choosing is not None:
        other = data.held_out[options.choosing]
        if not np.array_equal(other.candidates, data.held_out[options.split].candidates):
            raise ValueError("both splits must be searched among the same products")
        choosing = _compared(model, data, options.choosing, products, towers["query"])
    untrained = search_untrained(products.inputs, measured, choosing)
    queries = measured.queries
    counts = {}
    exact = {}
    for query_type in queries.distinct_types:
        positions = queries.positions_of_type(query_type)
        of_type = queries.select(positions)
        counts[query_type] = {"count": len(positions)}
        exact[query_type] = ranking_metrics(measured.trained[positions], of_type)
    return {
        "queries": counts,
        "origin": data.held_out[options.split].origin,
        "split": options.split,
        "tasks": {"exact": exact},
        **untrained_report(queries, untrained, {"exact": measured.trained}),
    }


class _EncodedProducts(NamedTuple):
    embedding: Embedded
    inputs: UntrainedInputs


def _encode_products(
    model: TwoTower, data: ProductDataModule, held_out: HeldOut, towers: UntrainedTowers
) -> _EncodedProducts:
    """Embeddings of the candidates, and what untrained search reads of them."""
    items = [product_item(data.products.row(row)) for row in held_out.candidates.tolist()]
    encoded = _encode(model, "product", data.model_preprocess.product, items, towers)
    records, numbers = _records(items, data)
    features = dict(encoded.features)
    if numbers.size:
        features[NUMBERS] = number_features(numbers)
    return _EncodedProducts(encoded.embedding, UntrainedInputs(records, features))


def _compared(
    model: TwoTower,
    data: ProductDataModule,
    split: str,
    products: _EncodedProducts,
    towers: UntrainedTowers,
) -> ComparedQueries:
    """The queries of a split in every type, and what the model finds for them."""
    held_out = data.held_out[split]
    preprocess = data.model_preprocess.query
    queries = list(queries_by_type(QueryRows(data.products, data.queries, held_out, preprocess)))
    items = [query.item for query in queries]
    encoded = _encode(model, "query", preprocess, items, towers)
    is_encoded = ~encoded.embedding.is_empty
    queries = [queries[position] for position in np.flatnonzero(is_encoded)]
    features = {name: values[is_encoded] for name, values in encoded.features.items()}
    embedding = encoded.embedding.select(is_encoded)
    evaluation_queries = evaluation_queries_of(queries, embedding.dense, held_out)
    trained = exact_search(embedding, products.embedding, evaluation_queries.source, k=DEPTH)
    inputs = _query_inputs(queries, evaluation_queries, products.inputs, features)
    return ComparedQueries(evaluation_queries, inputs, trained)


class _EncodedItems(NamedTuple):
    embedding: Embedded  # zeros where the model encodes nothing of an item
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
    embeddings: list[Embedded] = []
    features: dict[str, list[NDArray[Any]]] = {name: [] for name in towers}
    stream = iter(items)
    # The features of a tower that was not trained are those of the encoder's own forward pass.
    while batch := list(islice(stream, ENCODED_AT_ONCE)):
        tensors = to_device(preprocess(batch), model.device)
        tensors, untrained = untrained_features(encoder, towers, tensors)
        embeddings.append(model.embed_batch(tensors, side))
        for name, values in untrained.items():
            features[name].append(values.cpu().numpy())
    joined = {name: np.concatenate(parts) for name, parts in features.items() if parts}
    return _EncodedItems(Embedded.concatenate(embeddings), joined)


def _records(
    items: Sequence[Item], data: ProductDataModule
) -> tuple[list[Record], NDArray[np.float64]]:
    """Records for lexical search, and (n, A) numbers, NaN where missing."""
    title = data.schema.text[0] if data.schema.text else ""
    names = [attribute.name for attribute in data.schema.numbers]
    records = [record_of(item.text, item.attributes, title) for item in items]
    numbers = [[item.attributes.get(name, np.nan) for name in names] for item in items]
    return records, np.array(numbers, np.float64).reshape(len(items), len(names))


def _query_inputs(
    queries: Sequence[QueryOfType],
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
