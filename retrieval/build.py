"""Build an index folder from embeddings: uniform training sample, shard after shard, published only when complete."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from retrieval import storage
from retrieval.embeddings import EmbeddingBatch, EmbeddingReader
from retrieval.factory import MIN_POINTS_PER_LIST, choose_factory, default_nprobe, train_size
from retrieval.index import FORMAT, IDS_FILE, INDEX_FILE, KIND, SETTINGS_FILE, Settings, lists_of
from retrieval.progress import counted
from retrieval.storage import ArtefactError, Manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How to build an index.

    Attributes:
        factory: a FAISS factory string, or "auto" to choose by the number of vectors.
        seed: of the training sample and of k-means.
        train_sample: number of training vectors; None chooses by the number of lists.
        strict: refuse an under-trained index instead of warning.
        nprobe: lists a search visits unless told otherwise; None chooses by their number.
        k_factor: a search re-ranks k_factor x k candidates where the index keeps finer vectors.
    """

    factory: str = "auto"
    seed: int = 0
    train_sample: int | None = None
    strict: bool = False
    nprobe: int | None = None
    k_factor: float = 8.0


def build_index(
    reader: EmbeddingReader, output: Path | str, recipe: Recipe | None = None, *, overwrite: bool = False
) -> Manifest:
    """Build an index folder.

    Memory: the training sample, the index itself and one batch; never all vectors.

    Args:
        reader: the products' embeddings.
        output: the folder to make.
        recipe: how; the default suits any size.
        overwrite: replace an index folder that is there.

    Raises:
        ValueError: ids that are missing or repeated, faulty vectors, or a factory string that does not fit them.
        ArtefactError: `output` exists, or it could not be written completely.
    """
    recipe = recipe or Recipe()
    choice = choose_factory(reader.count, reader.dim)
    factory = choice.factory if recipe.factory == "auto" else recipe.factory
    reason = choice.reason if recipe.factory == "auto" else "asked for"
    meta: dict[str, Any] = {"format": FORMAT}
    with storage.new_folder(output, kind=KIND, meta=meta, overwrite=overwrite) as folder:
        reader.check_unique()
        index = make_index(factory, reader.dim)
        training = _train(index, reader, recipe, factory)
        _add(index, reader, folder / IDS_FILE)
        _write(index, folder / INDEX_FILE)
        settings = _settings(index, recipe)
        storage.write_text(folder / SETTINGS_FILE, json.dumps(settings._asdict(), indent=1) + "\n")
        meta.update(
            model=reader.meta.get("model"),
            catalogue=reader.meta.get("catalogue"),
            embeddings=reader.fingerprint,
            metric=reader.metric,
            dim=reader.dim,
            count=reader.count,
            factory=factory,
            reason=reason,
            training=training,
            faiss=faiss.__version__,
            hints=reader.meta.get("hints", {}),
        )
    return storage.read_manifest(output, KIND)


def make_index(factory: str, dim: int) -> Any:
    """An empty FAISS index by inner product.

    Raises:
        ValueError: not a factory string, or one that does not fit the dimension.
    """
    if re.search(r"\bIDMap", factory):
        raise ValueError(f"factory {factory!r}: leave IDMap out, product ids have their own table")
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        pieces = [m for m in range(1, dim + 1) if dim % m == 0]
        raise ValueError(
            f"factory {factory!r} does not fit {dim} dimensions: {_faiss_message(error)}. PQ sizes that fit without a "
            f"reduction: {', '.join(map(str, pieces))}; examples: Flat, IVF256,PQ{dim}x4fsr,Refine(SQ8)"
        ) from None
    return index


def _train(index: Any, reader: EmbeddingReader, recipe: Recipe, factory: str) -> dict[str, Any]:
    """Train on a uniform sample of all shards; returns what the manifest says about it."""
    lists = lists_of(index)
    size = train_size(reader.count, lists.nlist if lists else 0) if recipe.train_sample is None else recipe.train_sample
    if size < 1:
        raise ValueError(f"train_sample={size}; expected at least 1")
    size = min(size, reader.count)
    report: dict[str, Any] = {"seed": recipe.seed, "vectors": 0 if index.is_trained else size}
    if lists:
        report["per_list"] = round(size / lists.nlist, 2)
    if index.is_trained:
        return report
    _check_enough(index, size, factory, recipe.strict)
    sample = uniform_sample(reader, size, recipe.seed)
    started = time.perf_counter()
    report["device"] = _fit(index, sample, recipe.seed)
    report["seconds"] = round(time.perf_counter() - started, 1)
    logger.info("trained %s on %s vectors in %.1f s", factory, f"{size:,}", report["seconds"])
    return report


def _check_enough(index: Any, size: int, factory: str, strict: bool) -> None:
    lists = lists_of(index)
    if lists and lists.nlist > size:
        raise ValueError(
            f"factory {factory!r} needs at least {lists.nlist} training vectors and has {size}: at most IVF{size}, "
            f"well trained IVF{max(size // MIN_POINTS_PER_LIST, 1)}; or Flat"
        )
    codes = getattr(lists, "pq", None)
    if codes is not None and codes.ksub > size:
        bits = int(np.log2(size))
        raise ValueError(
            f"factory {factory!r} needs at least {codes.ksub} training vectors for its {codes.nbits}-bit codes and has "
            f"{size}: at most {bits} bits (PQ{codes.M}x{bits}), or Flat"
        )
    if lists and size < MIN_POINTS_PER_LIST * lists.nlist:
        message = (
            f"{factory} is under-trained: {size:,} training vectors for {lists.nlist:,} lists, "
            f"{size / lists.nlist:.1f} each; {MIN_POINTS_PER_LIST} are wanted"
        )
        if strict:
            raise ValueError(f"{message} (strict)")
        logger.warning("%s", message)


def uniform_sample(reader: EmbeddingReader, size: int, seed: int) -> NDArray[np.float32]:
    """(size, D) vectors drawn from all shards without replacement; every vector has the same chance."""
    rows = np.sort(np.random.default_rng(seed).choice(reader.count, size, replace=False, shuffle=False))
    sample = np.empty((size, reader.dim), np.float32)
    first = filled = 0
    for batch in _shown(reader, "sample for training"):
        last = first + len(batch.ids)
        inside = rows[filled : np.searchsorted(rows, last)] - first
        sample[filled : filled + len(inside)] = batch.vectors[inside]
        first, filled = last, filled + len(inside)
    return sample


def _fit(index: Any, sample: NDArray[np.float32], seed: int) -> str:
    """Train, with k-means on the GPUs where faiss sees any; returns where."""
    lists = lists_of(index)
    gpu = None
    if lists:
        lists.cp.seed = seed % 2**31
        gpu = _gpu_assigner(lists.d)
        lists.clustering_index = gpu
    try:
        index.train(sample)
    except RuntimeError as error:
        raise ValueError(f"training on {len(sample)} vectors failed: {_faiss_message(error)}") from None
    finally:
        if lists:
            lists.clustering_index = None  # the stored index knows nothing of GPUs
    return "cpu" if gpu is None else "gpu"


def _gpu_assigner(dim: int) -> Any:
    """A flat index on all GPUs that k-means assigns with, or None where there is none."""
    if faiss.get_num_gpus() == 0:
        return None
    try:
        return faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(dim))
    except RuntimeError as error:
        logger.warning("faiss cannot use its GPU (%s); training on the CPU", _faiss_message(error))
        return None


def _add(index: Any, reader: EmbeddingReader, ids_file: Path) -> None:
    """Add all vectors in the order of the shards; row numbers are FAISS's own ids, product ids go to their table."""
    schema = pa.schema([("product_id", pa.string())])
    with pa.OSFile(str(ids_file), "wb") as sink, pa.ipc.new_file(sink, schema) as table:
        for batch in _shown(reader, "add to the index"):
            index.add(batch.vectors)
            table.write_batch(pa.record_batch([batch.ids.cast(pa.string())], schema=schema))
    if index.ntotal != reader.count:
        raise ArtefactError(f"the index holds {index.ntotal} vectors, {reader.source} has {reader.count}")


def _write(index: Any, file: Path) -> None:
    """Write and read back: on a full disk faiss may lose the end of a file without a word."""
    try:
        faiss.write_index(index, str(file))
        copy = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise ArtefactError(f"{file.name} could not be written (disk full?): {_faiss_message(error)}") from None
    if (copy.ntotal, copy.d) != (index.ntotal, index.d):
        raise ArtefactError(f"{file.name} was read back with {copy.ntotal} vectors; {index.ntotal} were written")


def _settings(index: Any, recipe: Recipe) -> Settings:
    lists = lists_of(index)
    nprobe = recipe.nprobe
    if lists and nprobe is None:
        nprobe = default_nprobe(lists.nlist)
    return Settings(nprobe=nprobe, k_factor=recipe.k_factor).checked(index)


def _shown(reader: EmbeddingReader, what: str) -> Iterator[EmbeddingBatch]:
    return counted(reader.batches(), reader.count, lambda batch: len(batch.ids), what, "vectors")


def _faiss_message(error: RuntimeError) -> str:
    """The sentence of a FAISS error, without the C++ function and file."""
    return re.sub(r"^Error in .*? at \S+: (Error: )?", "", str(error).replace("\n", " "))
