"""Embeddings folders as dictionaries."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tritower.retrieval.vectors.embeddings import EmbeddingReader

Vectors = dict[tuple[str, str | None], np.ndarray]


def read(folder: Path) -> Vectors:
    """(id, query type) -> vector."""
    result: Vectors = {}
    for batch in EmbeddingReader(folder).batches():
        query_types = (
            [None] * len(batch.ids) if batch.query_types is None else batch.query_types.to_pylist()
        )
        result |= dict(
            zip(zip(batch.ids.to_pylist(), query_types, strict=True), batch.vectors, strict=True)
        )
    return result
