"""Make tests/artefacts: an embeddings folder, two indexes of it, queries and their hits.

    python -m tests.support.make_artefacts FOLDER

What is in tests/artefacts was made by version 0.2.0, and opens for ever. Run this for a new format
alone, into a folder of its own.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np

from tritower.retrieval.building.build import build_index
from tritower.retrieval.building.options import BuildOptions
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.vectors.embeddings import EmbeddingReader, EmbeddingWriter

FACTORIES = {"flat": "Flat", "ivf": "IVF8,PQ8x4fsr,Refine(SQ8)"}
COUNT = 600
DIM = 16


def unit_vectors(count: int, seed: int) -> np.ndarray:
    """(count, DIM) float32 of length 1."""
    vectors = np.random.default_rng(seed).standard_normal((count, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def main(folder: Path) -> None:
    """Write everything into a new folder."""
    writer = EmbeddingWriter(folder / "embeddings", dim=DIM, model="0123456789abcdef")
    vectors = unit_vectors(COUNT, seed=0)
    shards = ["shard-00000", "shard-00001"]
    for number, shard in enumerate(shards):
        rows = slice(number * COUNT // 2, (number + 1) * COUNT // 2)
        ids = [f"p{row}" for row in range(rows.start, rows.stop)]
        writer.write(shard, ids, vectors[rows])
    writer.finish(shards)

    queries = unit_vectors(20, seed=1)
    np.save(folder / "queries.npy", queries)
    hits = {}
    for name, factory in FACTORIES.items():
        place = folder / f"built_{name}"
        options = BuildOptions(factory, nprobe=None if name == "flat" else 4)
        build_index(EmbeddingReader(folder / "embeddings"), place, options)
        shutil.copytree(ProductIndex.open(place).version, folder / name)
        shutil.rmtree(place)
        index = ProductIndex.open(folder / name)
        found = index.search(queries, 10)
        hits[name] = {"ids": index.ids(found.rows).tolist(), "scores": found.scores.tolist()}
    text = json.dumps(hits, indent=1)
    (folder / "hits.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
