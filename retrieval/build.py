"""Build an index folder from embeddings: uniform training sample, block after block, published only when complete."""

from __future__ import annotations

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

from retrieval import resources, storage, versions
from retrieval.assemble import IDS_FILE, INDEX_FILE, write_ids, write_mapped
from retrieval.embeddings import EmbeddingBatch, EmbeddingReader
from retrieval.encoded import GROUPING_BYTES, Blocks
from retrieval.engine import Settings, lists_of
from retrieval.factory import (
    CODEBOOK,
    MIN_POINTS_PER_LIST,
    Choice,
    Mapped,
    choose_factory,
    default_nprobe,
    parse_mapped,
    train_size,
)
from retrieval.index import FORMAT, KIND, SETTINGS_FILE
from retrieval.mapped import Trained, train
from retrieval.progress import counted
from retrieval.storage import ArtefactError, Manifest
from retrieval.workspace import BLOCK_ROWS, Workspace

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
        spill: give every vector a second list: more recall from fewer lists, for twice the bytes of codes.
        memory: bytes the build may take; None for 80 % of what is free.
    """

    factory: str = "auto"
    seed: int = 0
    train_sample: int | None = None
    strict: bool = False
    nprobe: int | None = None
    k_factor: float = 8.0
    spill: bool = False
    memory: int | None = None


def build_index(
    reader: EmbeddingReader, output: Path | str, recipe: Recipe | None = None, *, overwrite: bool = False
) -> Manifest:
    """Build an index and publish it as the version in use.

    Memory: the training sample, then blocks of vectors, then the codes of some lists; never all vectors. The same call
    goes on after a kill, where the index is one whose lists are mapped (`parse_mapped`).

    Args:
        reader: the products' embeddings.
        output: the place of the index and its versions.
        recipe: how; the default suits any size.
        overwrite: publish a new version of an index that is there; the old one is kept.

    Raises:
        ValueError: ids that are missing or repeated, faulty vectors, a factory string that does not fit them, or more
            memory or disk needed than there is.
        ArtefactError: `output` holds an index or something else, or it could not be written completely.
    """
    recipe, output = recipe or Recipe(), Path(output)
    choice = (
        choose_factory(reader.count, reader.dim) if recipe.factory == "auto" else Choice(recipe.factory, "asked for")
    )
    design = parse_mapped(choice.factory)
    if recipe.spill and design is None:
        raise ValueError(
            f"factory {choice.factory!r} has no mapped lists for a second list (spill): try IVF..,PQ..x4fsr"
        )
    if versions.occupied(output) and not overwrite:
        raise ArtefactError(
            f"{output} already holds an index: choose another place, or publish a new version (overwrite)"
        )
    meta: dict[str, Any] = {"format": FORMAT}
    with versions.publish(output, kind=KIND, meta=meta, upgrade=overwrite) as folder:
        reader.check_unique()
        make = _whole if design is None else _mapped
        nlist, training = make(reader, folder, output, choice.factory, recipe)
        nprobe = default_nprobe(nlist) if nlist and recipe.nprobe is None else recipe.nprobe
        storage.write_json(folder / SETTINGS_FILE, Settings(nprobe, recipe.k_factor).checked(nlist)._asdict())
        meta.update(
            model=reader.meta.get("model"),
            catalogue=reader.meta.get("catalogue"),
            embeddings=reader.fingerprint,
            metric=reader.metric,
            dim=reader.dim,
            count=reader.count,
            factory=choice.factory,
            reason=choice.reason,
            spill=recipe.spill,
            training=training,
            faiss=faiss.__version__,
            hints=reader.meta.get("hints", {}),
        )
    Workspace.remove(output)
    return storage.read_manifest(versions.current(output), KIND)


def _mapped(
    reader: EmbeddingReader, folder: Path, output: Path, factory: str, recipe: Recipe
) -> tuple[int, dict[str, Any]]:
    """Make an index whose lists are mapped; returns the number of lists and what the manifest says of training."""
    design = parse_mapped(factory)
    assert design is not None
    make_index(factory, reader.dim)  # refuses what does not fit the dimension
    need = resources.predict(
        reader.count,
        reader.dim,
        design,
        sample=recipe.train_sample,
        spill=recipe.spill,
        block=BLOCK_ROWS,
        grouping=GROUPING_BYTES,
    )
    resources.check(need, output, recipe.memory)
    size = _sample_size(reader, design.lists, recipe)
    _check_enough(factory, design, size, recipe.strict)
    with Workspace(output, reader, factory, recipe.seed, size, recipe.spill) as work:
        trained, training = work.trained(lambda: _train_mapped(reader, design, size, recipe))
        blocks = work.encode(reader, trained)
        write_mapped(folder, trained, [(Blocks(blocks), 0)])
    return design.lists, training


def _train_mapped(reader: EmbeddingReader, design: Mapped, size: int, recipe: Recipe) -> tuple[Trained, dict[str, Any]]:
    sample = uniform_sample(reader, size, recipe.seed)
    started = time.perf_counter()
    trained = train(sample, design, recipe.seed, recipe.spill)
    seconds = round(time.perf_counter() - started, 1)
    logger.info("trained %s lists on %s vectors in %.1f s", f"{design.lists:,}", f"{size:,}", seconds)
    return trained, {
        "seed": recipe.seed,
        "vectors": size,
        "per_list": round(size / design.lists, 2),
        "device": "gpu" if faiss.get_num_gpus() else "cpu",
        "seconds": seconds,
    }


def _whole(
    reader: EmbeddingReader, folder: Path, output: Path, factory: str, recipe: Recipe
) -> tuple[int | None, dict[str, Any]]:
    """Make an index of any other factory string in memory; returns its number of lists, and of training."""
    index = make_index(factory, reader.dim)
    training = _train(index, reader, recipe, factory)
    write_ids(folder / IDS_FILE, _adding(index, reader))
    if index.ntotal != reader.count:
        raise ArtefactError(f"the index holds {index.ntotal} vectors, {reader.source} has {reader.count}")
    _write(index, folder / INDEX_FILE)
    lists = lists_of(index)
    return (int(lists.nlist) if lists else None), training


def _adding(index: Any, reader: EmbeddingReader) -> Iterator[pa.Array]:
    """Add all vectors in the order of the shards, and pass their ids on: row numbers are FAISS's own ids."""
    for batch in _shown(reader, "add to the index"):
        index.add(batch.vectors)
        yield batch.ids


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
    size = _sample_size(reader, lists.nlist if lists else 0, recipe)
    report: dict[str, Any] = {"seed": recipe.seed, "vectors": 0 if index.is_trained else size}
    if lists:
        report["per_list"] = round(size / lists.nlist, 2)
    if index.is_trained:
        return report
    _check_enough(factory, lists, size, recipe.strict)
    sample = uniform_sample(reader, size, recipe.seed)
    started = time.perf_counter()
    report["device"] = _fit(index, sample, recipe.seed)
    report["seconds"] = round(time.perf_counter() - started, 1)
    logger.info("trained %s on %s vectors in %.1f s", factory, f"{size:,}", report["seconds"])
    return report


def _sample_size(reader: EmbeddingReader, lists: int, recipe: Recipe) -> int:
    size = train_size(reader.count, lists) if recipe.train_sample is None else recipe.train_sample
    if size < 1:
        raise ValueError(f"train_sample={size}; expected at least 1")
    return min(size, reader.count)


def _check_enough(factory: str, lists: Any, size: int, strict: bool) -> None:
    """Refuse too few training vectors, and warn of few."""
    nlist, codes = (lists.lists, None) if isinstance(lists, Mapped) else (getattr(lists, "nlist", 0), lists)
    centroids, bits = (CODEBOOK, 4) if isinstance(lists, Mapped) else (0, 0)
    pieces = lists.pieces if isinstance(lists, Mapped) else 0
    if (quantizer := getattr(codes, "pq", None)) is not None:
        centroids, bits, pieces = quantizer.ksub, quantizer.nbits, quantizer.M
    if nlist > size:
        raise ValueError(
            f"factory {factory!r} needs at least {nlist} training vectors and has {size}: at most IVF{size}, "
            f"well trained IVF{max(size // MIN_POINTS_PER_LIST, 1)}; or Flat"
        )
    if centroids > size:
        raise ValueError(
            f"factory {factory!r} needs at least {centroids} training vectors for its {bits}-bit codes and has "
            f"{size}: at most {int(np.log2(size))} bits (PQ{pieces}x{int(np.log2(size))}), or Flat"
        )
    if nlist and size < MIN_POINTS_PER_LIST * nlist:
        message = (
            f"{factory} is under-trained: {size:,} training vectors for {nlist:,} lists, "
            f"{size / nlist:.1f} each; {MIN_POINTS_PER_LIST} are wanted"
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


def _write(index: Any, file: Path) -> None:
    """Write and read back: on a full disk faiss may lose the end of a file without a word."""
    with storage.create(file) as stream:
        faiss.write_index(index, faiss.PyCallbackIOWriter(stream.write))
    copy = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
    if (copy.ntotal, copy.d) != (index.ntotal, index.d):
        raise ArtefactError(f"{file.name} was read back with {copy.ntotal} vectors; {index.ntotal} were written")


def _shown(reader: EmbeddingReader, what: str) -> Iterator[EmbeddingBatch]:
    return counted(reader.batches(), reader.count, lambda batch: len(batch.ids), what, "vectors")


def _faiss_message(error: RuntimeError) -> str:
    """The sentence of a FAISS error, without the C++ function and file."""
    return re.sub(r"^Error in .*? at \S+: (Error: )?", "", str(error).replace("\n", " "))
