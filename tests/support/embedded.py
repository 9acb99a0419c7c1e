"""Embeddings of the small catalogue without a model: products of one group stand close together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tritower.artefacts import storage
from tritower.retrieval.products.catalogue import PreparedCatalogue
from tritower.retrieval.vectors.embeddings import EmbeddingWriter

DIM = 16
PRODUCT_QUERY_TYPES = ("fused", "product:text", "product:image", "product:attribute")


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def vector_of(group: int, name: str, noise: float) -> np.ndarray:
    center = np.random.default_rng(group).standard_normal(DIM)
    wobble = np.random.default_rng(list(name.encode())).standard_normal(DIM)
    return unit(center + noise * wobble)


def write_embeddings(
    catalogue: Path, folder: Path, noise: float = 0.5, model: str = "model-a"
) -> Path:
    """Write folder/products and folder/queries as `embed` does, one shard per shard of the
    catalogue.
    """
    fingerprint = storage.fingerprint(catalogue)
    hints = {"model": "nowhere", "catalogue": str(catalogue)}
    products = EmbeddingWriter(folder / "products", dim=DIM, model=model, catalogue=fingerprint)
    shards = sorted((catalogue / "products").glob("*.parquet"))
    for shard in shards:
        ids = pq.read_table(shard, columns=["product_id"]).column(0).to_pylist()
        products.write(shard.stem, ids, np.stack([vector_of(int(i[:3]), i, noise) for i in ids]))
    products.finish([shard.stem for shard in shards], hints)
    queries = EmbeddingWriter(
        folder / "queries", dim=DIM, model=model, catalogue=fingerprint, id_column="query_id"
    )
    asked = [
        (query_id, query_type)
        for query_id in PreparedCatalogue(catalogue).queries().column("query_id").to_pylist()
        for query_type in (
            PRODUCT_QUERY_TYPES if query_id.startswith("product") else (query_id.split("-")[0],)
        )
    ]
    vectors = np.stack(
        [vector_of(int(i.split("-")[1]), f"{i}{query_type}", noise) for i, query_type in asked]
    )
    queries.write(
        "shard-00000", [i for i, _ in asked], vectors, [query_type for _, query_type in asked]
    )
    queries.finish(["shard-00000"], hints)
    return folder
