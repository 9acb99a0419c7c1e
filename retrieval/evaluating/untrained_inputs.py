"""Inputs of untrained search: records of words, features of pretrained towers, and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tritower.retrieval.evaluating.evaluation_queries import EvaluationQueries
from tritower.retrieval.evaluating.judgements import rows_of
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.lexical.records import Record, typed_record, visible_record
from tritower.retrieval.products.catalogue import PreparedCatalogue
from tritower.retrieval.vectors.embeddings import EmbeddingReader

NUMBERS = "numbers"
"""Name of the features of numbers, beside those of the towers."""

OCTAVES = 7
"""Frequencies of the features of a number."""

TowerReaders = tuple[EmbeddingReader, EmbeddingReader]
"""Features of an untrained tower: of products, and of queries."""


@dataclass(frozen=True)
class UntrainedInputs:
    """What untrained search reads of N products or Q queries.

    Attributes:
        records: N records for lexical search, empty where an item has no words.
        features: tower -> (N, F) unit vectors, zeros where an item lacks the modality. `NUMBERS`
            are those of `number_features`.
    """

    records: Sequence[Record]
    features: Mapping[str, NDArray[np.floating[Any]]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def select(self, rows: NDArray[np.int64]) -> UntrainedInputs:
        """The items at (R,) rows."""
        records = [self.records[row] for row in rows.tolist()]
        features = {name: values[rows] for name, values in self.features.items()}
        return UntrainedInputs(records, features)


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
    for ids, batch_records, batch_numbers in catalogue.records():
        rows = rows_of(ids, index)
        in_index = rows >= 0
        numbers[rows[in_index]] = batch_numbers[in_index]
        for row, record in zip(rows.tolist(), batch_records, strict=True):
            if row >= 0:
                records[row] = record

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


def query_number_features(
    products: NDArray[np.floating[Any]],
    source: NDArray[np.int64],
    query_types: NDArray[np.object_],
) -> NDArray[np.floating[Any]]:
    """Number features of queries: those of the source product where the query type shows numbers.

    Args:
        products: (N, F) features of the products.
        source: (Q,) row of the product that is the query, -1 for other queries.
        query_types: (Q,) query types.

    Returns:
        (Q, F); zeros for queries without numbers.
    """
    shows_numbers = np.isin(query_types.astype(str), ("fused", "product:attribute"))
    has_numbers = (source >= 0) & shows_numbers
    return np.where(has_numbers[:, None], products[source], 0)


def number_features(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Sines and cosines of the logarithms of numbers, so that close numbers have close features.

    Args:
        values: (N, A); NaN, zero and negative numbers count as missing.

    Returns:
        (N, 2 * OCTAVES * A) float32 rows of unit length; all zeros if every number is missing. The
        inner product of two rows is the mean over their numbers of the mean over frequencies 2^0 to
        2^6 of cos(2^i * log ratio).
    """
    is_present = values > 0  # (N, A); False for NaN
    logs = np.log(np.where(is_present, values, 1.0))
    phases = logs[:, :, None] * 2.0 ** np.arange(OCTAVES)  # (N, A, OCTAVES)
    waves = np.concatenate([np.sin(phases), np.cos(phases)], axis=2)  # (N, A, 2 * OCTAVES)
    waves = waves * is_present[:, :, None]
    flat = waves.reshape(len(values), -1)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return (flat / length.clip(1e-9)).astype(np.float32)
