"""Small embeddings and indexes that the tests of reliability break, and how much of them:

`FULL` or a selection.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tritower.artefacts import storage, versions
from tritower.artefacts.storage import ArtefactError
from tritower.retrieval.building.build import build_index
from tritower.retrieval.building.options import BuildOptions
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.vectors.embeddings import EmbeddingReader, EmbeddingWriter

ROOT = Path(__file__).parents[2]
FULL = os.environ.get("TRITOWER_RELIABILITY") == "full"
DIM = 16
FACTORY = "IVF8,PQ4x4fsr,Refine(SQ8)"


def unit_vectors(count: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def embed(
    folder: Path, count: int, shards: int = 1, seed: int = 0, ids: Sequence[str] | None = None
) -> Path:
    """Embeddings of random vectors; the first id is of row 0, whatever the number of shards."""
    vectors, ids = unit_vectors(count, seed), ids or [f"product {row:05d}" for row in range(count)]
    writer = EmbeddingWriter(folder, dim=DIM)
    names = [f"shard-{number:05d}" for number in range(shards)]
    for name, rows in zip(names, np.array_split(np.arange(count), shards), strict=True):
        writer.write(name, ids[rows[0] : rows[-1] + 1], vectors[rows])
    writer.finish(names)
    return folder


def describe(embeddings: Path) -> Path:
    """A file beside embeddings with attributes of their products."""
    file = embeddings.with_name(f"{embeddings.name}.attributes.parquet")
    ids = [
        product_id
        for batch in EmbeddingReader(embeddings).ids()
        for product_id in batch.to_pylist()
    ]
    brands, prices = (("Acme", "商品", None)[row % 3] for row in range(len(ids))), range(len(ids))
    pq.write_table(
        pa.table({"product_id": ids, "brand": list(brands), "price": list(prices)}), file
    )
    return file


def build(
    embeddings: Path,
    root: Path,
    factory: str = FACTORY,
    seed: int = 0,
    attributes: Path | None = None,
) -> Path:
    """Build, or publish a new version."""
    options = BuildOptions(factory, seed=seed)
    build_index(EmbeddingReader(embeddings), root, options, attributes=attributes, overwrite=True)
    return root


def digests(folder: Path) -> dict[str, str]:
    """File -> sha256 of one version, after comparing each with what is on disk."""
    return {name: entry.sha256 for name, entry in storage.verify(folder, "index").files.items()}


def served(root: Path) -> dict[str, str] | None:
    """The digests of the version in use, None where there is none or it is damaged."""
    try:
        return digests(versions.current(root))
    except ArtefactError:
        return None


def answers(root: Path, queries: int = 50, **options: bool) -> tuple[list, list]:
    """Ids and scores that an index answers with."""
    index = ProductIndex.open(root, **options)
    hits = index.search(unit_vectors(queries, seed=99), 10)
    return index.ids(hits.rows).tolist(), hits.scores.tolist()


def leftovers(root: Path) -> list[str]:
    """Temporary names, and work that is unfinished, in and beside an index."""
    inside = [
        path
        for path in root.parent.rglob("*")
        if path.name.startswith(".") and path.name.endswith(".tmp")
    ]
    beside = [path for path in root.parent.glob("*.building")]
    return [str(path) for path in inside + beside]


def some(steps: Sequence[int], wanted: int) -> Sequence[int]:
    """All steps where the whole tier runs, else so many of them, spread evenly."""
    return (
        steps
        if FULL
        else [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, wanted).astype(int))]
    )
