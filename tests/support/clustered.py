"""Vectors in clusters, and folders of their embeddings."""

from __future__ import annotations

import numpy as np

from tritower.retrieval.vectors.embeddings import EmbeddingReader, EmbeddingWriter

DIM = 32


def unit(array):
    return (array / np.linalg.norm(array, axis=1, keepdims=True)).astype(np.float32)


def clustered(count, seed=0, noise=0.6):
    generator = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((60, DIM))
    return unit(
        centers[generator.integers(0, 60, count)] + noise * generator.standard_normal((count, DIM))
    )


def embed(folder, rows, query_types=None, model="model-a"):
    column = "product_id" if query_types is None else "query_id"
    writer = EmbeddingWriter(folder, dim=DIM, model=model, id_column=column)
    writer.write("s", [f"p{i}" for i in range(len(rows))], rows, query_types)
    writer.finish(["s"])
    return EmbeddingReader(folder)
