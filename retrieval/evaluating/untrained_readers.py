"""Read the inputs of untrained search from a catalogue and from features of towers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tritower.retrieval.evaluating.evaluation_queries import EvaluationQueries
from tritower.retrieval.evaluating.judgements import rows_of
from tritower.retrieval.evaluating.untrained_inputs import (
    NUMBERS,
    UntrainedInputs,
    number_features,
    query_number_features,
)
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.lexical.records import Record, typed_record, visible_record
from tritower.retrieval.products.catalogue import PreparedCatalogue
from tritower.retrieval.vectors.embeddings import EmbeddingReader

TowerReaders = tuple[EmbeddingReader, EmbeddingReader]
"""Features of an untrained tower: of products, and of queries."""


def open_tower_features(folder: Path, required: bool = False) -> dict[str, TowerReaders]:
    """The features of towers before training, as `index.py embed` writes them.

    Args:
        folder: has a folder for each tower, with products/ and queries/ in it.
        required: whether the folder must exist.

    Returns:
        Tower -> its features; empty if there is no folder.

    Raises:
        FileNotFoundError: the folder is required and missing.
    """
    if not folder.is_dir():
        if required:
            raise FileNotFoundError(
                f"{folder}: no such folder. `index.py embed` writes EMBEDDINGS/untrained."
            )
        return {}
    readers = {}
    for tower in sorted(folder.iterdir()):
        if (tower / "products").is_dir():
            products = EmbeddingReader(tower / "products")
            readers[tower.name] = (products, EmbeddingReader(tower / "queries"))
    return readers


def read_product_inputs(
    index: ProductIndex, catalogue: PreparedCatalogue, towers: Mapping[str, TowerReaders]
) -> UntrainedInputs:
    """What untrained search reads of the products of an index, by row."""
    count = index.engine.count
    records: list[Record] = [{} for _ in range(count)]
    numbers = np.full((count, len(catalogue.number_attributes)), np.nan)
    # The catalogue may be in another order than the index, and hold other products.
    for ids, batch_records, batch_numbers in catalogue.records():
        rows = rows_of(ids, index)
        in_index = rows >= 0
        numbers[rows[in_index]] = batch_numbers[in_index]
        for row, record in zip(rows.tolist(), batch_records, strict=True):
            if row >= 0:
                records[row] = record

    # Features of numbers, and of each tower before training.
    features: dict[str, NDArray[np.floating[Any]]] = {}
    if numbers.size:
        features[NUMBERS] = number_features(numbers)
    for name, (products, _) in towers.items():
        features[name] = np.zeros((count, products.dim), np.float16)
        for batch in products.batches():
            rows = index.rows_of(batch.ids)
            in_index = rows >= 0
            features[name][rows[in_index]] = batch.vectors[in_index]
    return UntrainedInputs(records, features)


def read_query_inputs(
    queries: EvaluationQueries,
    table: pa.Table,
    products: UntrainedInputs,
    towers: Mapping[str, TowerReaders],
) -> UntrainedInputs:
    """What untrained search reads of queries.

    Args:
        queries: Q queries.
        table: columns query_id and text, for typed queries.
        products: the searched products; some of them are the queries.
        towers: name -> features before training.
    """
    # A product shows the part of its record that its query type contains, a typed query its text.
    query_ids = table.column("query_id").to_pylist()
    texts = dict(zip(query_ids, table.column("text").to_pylist(), strict=True))
    records: list[Record] = []
    for query_id, query_type, source in zip(
        queries.ids, queries.query_types, queries.source.tolist(), strict=True
    ):
        if source >= 0:
            records.append(visible_record(products.records[source], query_type))
        else:
            records.append(typed_record(texts.get(query_id)))

    # Features of a query are found by its id and type.
    features: dict[str, NDArray[np.floating[Any]]] = {}
    keys = zip(queries.ids, queries.query_types, strict=True)
    position = {key: number for number, key in enumerate(keys)}
    for name, (_, reader) in towers.items():
        features[name] = np.zeros((len(records), reader.dim), np.float16)
        for batch in reader.batches():
            keys = zip(batch.ids.to_pylist(), batch.type_names(), strict=True)
            for key, vector in zip(keys, batch.vectors, strict=True):
                if key in position:
                    features[name][position[key]] = vector
    if NUMBERS in products.features:
        features[NUMBERS] = query_number_features(
            products.features[NUMBERS], queries.source, queries.query_types
        )
    return UntrainedInputs(records, features)
