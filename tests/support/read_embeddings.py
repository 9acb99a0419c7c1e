"""Embeddings folders as dictionaries."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tritower.retrieval.vectors.embeddings import EmbeddingReader

Vectors = dict[tuple[str, str | None], np.ndarray]


def read(folder: Path) -> Vectors:
    """(id, kind) -> vector."""
    result: Vectors = {}
    for batch in EmbeddingReader(folder).batches():
        kinds = [None] * len(batch.ids) if batch.kinds is None else batch.kinds.to_pylist()
        result |= dict(
            zip(zip(batch.ids.to_pylist(), kinds, strict=True), batch.vectors, strict=True)
        )
    return result
