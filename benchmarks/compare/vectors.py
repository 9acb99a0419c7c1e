"""The vectors that all arms share: one float32 file, queries, exact neighbors, written once.

FOLDER/
    vectors.npy     (N, D) float32, unit length
    queries.npy     (Q, D) float32, what is measured with
    exact.npy       (Q, 100) int64, their true neighbors by inner product, best first
    embeddings/     the same vectors as `index.py embed` writes them (float16), for our own arms
    tuning/         other queries, which indexes are chosen by; never measured with
    data.json       how they were made; written last

Everything is made block after block, so that memory does not grow with N.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from tritower.artefacts import storage
from tritower.retrieval.vectors.embeddings import EmbeddingReader, EmbeddingWriter
from tritower.terminal.progress import show_progress

DIM = 256
LATENT = 10
QUERIES = 4000
"""Half of them are measured with, half are for tuning."""

SEED = 1234
DEPTH = 100
BLOCK = 100_000
DATA_FILE = "data.json"

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class VectorSource:
    """Where vectors come from.

    Attributes:
        n: number of vectors.
        real: an embeddings folder, or one with products/ and queries/ in it; None for FAISS's
            synthetic vectors.
        noise: length of what is added to the copies of real vectors, relative to theirs.
        queries: number of queries, measured with and tuned by together.
        dim: of synthetic vectors.
        seed: of everything random.
    """

    n: int
    real: Path | None = None
    noise: float = 0.3
    queries: int = QUERIES
    dim: int = DIM
    seed: int = SEED

    def describe(self) -> dict[str, Any]:
        """As plain JSON."""
        about = asdict(self)
        if self.real is None:
            return about | {"real": None, "noise": None}
        return about | {"real": str(self.real.resolve()), "dim": None}

    def folder(self, work: Path) -> Path:
        """Its place in a work folder."""
        digest = hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[
            :8
        ]
        return work / f"{'synthetic' if self.real is None else self.real.name}-{self.n}-{digest}"


def prepare(source: VectorSource, folder: Path) -> dict[str, Any]:
    """Write what is missing; returns what data.json says."""
    if not (folder / DATA_FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        if source.real is None:
            blocks, queries, tuning = synthetic(source)
        else:
            blocks, queries, tuning = jittered(source)
        exact, digest = _write(source, folder, blocks, queries)
        np.save(folder / "queries.npy", queries)
        np.save(folder / "exact.npy", exact)
        _write_embeddings(folder / "tuning", iter([tuning]), len(tuning), "query_id", "q")
        about = source.describe() | {
            "dim": queries.shape[1],
            "measured": len(queries),
            "tuned_by": len(tuning),
        }
        storage.write_json(folder / DATA_FILE, about | {"digest": digest})
    data: dict[str, Any] = json.loads((folder / DATA_FILE).read_text(encoding="utf-8"))
    return data


def synthetic(source: VectorSource) -> tuple[Iterator[Vectors], Vectors, Vectors]:
    """Blocks of vectors and queries of `faiss.contrib.datasets.SyntheticDataset`, of unit length.

    The dataset draws the latent vectors of all rows before the map that stretches them. So the
    random numbers are run through once for the map, and once more for the rows: the same vectors,
    with one block in memory.
    """
    total = source.n + source.queries
    sizes = [min(BLOCK, total - start) for start in range(0, total, BLOCK)]
    random = np.random.RandomState(source.seed)
    for size in sizes:
        random.normal(size=(size, LATENT))
    mixing = random.rand(LATENT, source.dim)
    stretch = random.rand(source.dim) * 4 + 0.1

    def rows() -> Iterator[Vectors]:
        again = np.random.RandomState(source.seed)
        for size in sizes:
            yield unit(np.sin(again.normal(size=(size, LATENT)) @ mixing * stretch))

    queries = np.concatenate(list(_between(rows(), source.n, total)))
    half = source.queries // 2
    return _between(rows(), 0, source.n), queries[:half], queries[half:]


def _between(blocks: Iterator[Vectors], first: int, last: int) -> Iterator[Vectors]:
    """Rows `first` to `last` of consecutive blocks."""
    start = 0
    for block in blocks:
        if start >= last:
            return
        part = block[max(0, first - start) : last - start]
        start += len(block)
        if len(part):
            yield part


def jittered(source: VectorSource) -> tuple[Iterator[Vectors], Vectors, Vectors]:
    """Blocks of real vectors, each of them as it is and then copies with noise.

    Queries and tuning queries.

    Queries are those of the folder; without any, copies with noise of products drawn at random.
    """
    assert source.real is not None
    if (source.real / "products").is_dir():
        products = source.real / "products"
    else:
        products = source.real
    base = _read(products)
    base = base[np.random.default_rng(source.seed).permutation(len(base))]
    if (source.real / "queries").is_dir():
        query_vectors = _read(source.real / "queries")
        query_vectors = query_vectors[
            np.random.default_rng(source.seed).permutation(len(query_vectors))[: source.queries]
        ]
    else:
        random = np.random.default_rng([source.seed, source.n])
        query_vectors = _with_noise(
            base[random.integers(0, len(base), source.queries)], source.noise, random
        )

    def blocks() -> Iterator[Vectors]:
        for start in range(0, source.n, BLOCK):
            rows = np.arange(start, min(source.n, start + BLOCK))
            block = base[rows % len(base)]
            copies = rows >= len(base)
            random = np.random.default_rng([source.seed, start])
            block[copies] = _with_noise(block[copies], source.noise, random)
            yield block

    return (
        blocks(),
        np.ascontiguousarray(query_vectors[0::2]),
        np.ascontiguousarray(query_vectors[1::2]),
    )


def _read(folder: Path) -> Vectors:
    return np.concatenate([batch.vectors for batch in EmbeddingReader(folder).batches()])


def _with_noise(vectors: Vectors, noise: float, random: np.random.Generator) -> Vectors:
    added = random.standard_normal(vectors.shape, np.float32)
    if len(vectors):
        return unit(vectors + noise * unit(added))
    return vectors


def unit(vectors: NDArray[Any]) -> Vectors:
    """(B, D) vectors brought to length 1, as float32."""
    scaled: Vectors = np.ascontiguousarray(vectors, np.float32)
    faiss.normalize_L2(scaled)
    return scaled


def _write(
    source: VectorSource, folder: Path, blocks: Iterator[Vectors], queries: Vectors
) -> tuple[NDArray[np.int64], str]:
    """Write vectors.npy and embeddings/.

    Returns the true neighbors of the queries and a digest of the vectors.
    """
    depth = min(DEPTH, source.n)
    best = faiss.ResultHeap(len(queries), depth, keep_max=True)
    digest = hashlib.sha256(queries.tobytes())
    shape = (source.n, queries.shape[1])
    file = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, shape)

    def written() -> Iterator[Vectors]:
        first = 0
        for block in show_progress(
            blocks, source.n, len, "vectors and their exact neighbors", "vectors"
        ):
            file[first : first + len(block)] = block
            digest.update(block.tobytes())
            scores, rows = faiss.knn(
                queries, block, min(depth, len(block)), metric=faiss.METRIC_INNER_PRODUCT
            )
            best.add_result(scores, rows + first)
            first += len(block)
            yield block

    _write_embeddings(folder / "embeddings", written(), source.n, "product_id", "p")
    file.flush()
    best.finalize()
    return best.I, digest.hexdigest()


def _write_embeddings(
    folder: Path, blocks: Iterator[Vectors], count: int, column: str, letter: str
) -> None:
    """Write vectors as an embeddings folder.

    Where it is complete, the blocks are only read past.
    """
    shards = [f"shard-{number:05d}" for number in range(-(-count // BLOCK))]
    writer: EmbeddingWriter | None = None
    first = 0
    complete = (folder / storage.MANIFEST).exists()
    for shard, block in zip(shards, blocks, strict=True):
        if writer is None and not complete:
            writer = EmbeddingWriter(folder, dim=block.shape[1], id_column=column)
        if writer is not None and not writer.done(shard):
            writer.write(
                shard, [f"{letter}{row}" for row in range(first, first + len(block))], block
            )
        first += len(block)
    if writer is not None:
        writer.finish(shards)
