"""Inputs of untrained search: records of words, features of pretrained towers, and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritower.retrieval.lexical.records import Record

NUMBERS = "numbers"
"""Name of the features of numbers, beside those of the towers."""

OCTAVES = 7
"""Frequencies of the features of a number."""


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
