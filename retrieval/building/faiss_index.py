"""Build an index of any other factory string with FAISS, in memory."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tritower.artefacts import storage
from tritower.artefacts.storage import ArtefactError
from tritower.retrieval.building.assemble import write_products
from tritower.retrieval.building.choose_spec import IndexSpec
from tritower.retrieval.building.options import BuildOptions, BuildResult
from tritower.retrieval.building.training_sample import (
    batches_with_progress,
    check_enough_for_codes,
    check_enough_for_lists,
    sample_size,
    uniform_sample,
)
from tritower.retrieval.building.tuned_settings import tuned_settings
from tritower.retrieval.ivf.engine import Engine, lists_of
from tritower.retrieval.ivf.layout import IDS_FILE, INDEX_FILE
from tritower.retrieval.ivf.operating_points import Target
from tritower.retrieval.vectors.embeddings import EmbeddingReader

logger = logging.getLogger(__name__)


def build_faiss_index(
    reader: EmbeddingReader,
    folder: Path,
    spec: IndexSpec,
    options: BuildOptions,
    target: Target | None,
    queries: EmbeddingReader | None,
) -> BuildResult:
    """Build an index into the folder of a version.

    Args:
        reader: embeddings of the products.
        folder: of the version.
        spec: the factory string.
        options: how to build it.
        target: what to reach, for an index with lists.
        queries: real queries to measure by.
    """
    index = make_index(spec.factory, reader.dim)
    lists = lists_of(index)
    num_lists = lists.nlist if lists else 0
    size = sample_size(reader, num_lists, options)
    settings = options.settings(num_lists or None)._asdict()
    if not index.is_trained:
        _check_enough(spec.factory, lists, size, options.strict)
    # Train, then add all vectors in one pass that also writes their ids.
    reader.check_unique()
    training = _train(index, reader, size, options.seed, spec.factory)
    write_products(folder / IDS_FILE, _add_all(index, reader))
    if index.ntotal != reader.count:
        raise ArtefactError(
            f"the index holds {index.ntotal} vectors, {reader.source} has {reader.count}"
        )
    _write(index, folder / INDEX_FILE)
    # Tune how the finished index is searched.
    if target is not None and lists:
        engine = Engine.open(folder, {"count": reader.count, "dim": reader.dim})
        settings = tuned_settings(reader, engine, target, queries, options.seed, size)
    manifest = {
        "factory": spec.factory,
        "reason": spec.reason,
        "spill": False,
        "training": training,
    }
    return BuildResult(settings, manifest)


def make_index(factory: str, dim: int) -> Any:
    """An empty FAISS index by inner product.

    Raises:
        ValueError: not a factory string, or one that does not fit the dimension.
    """
    if re.search(r"\bIDMap", factory):
        raise ValueError(f"factory {factory!r}: leave IDMap out, product ids have their own table")
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        sizes = [str(m) for m in range(1, dim + 1) if dim % m == 0]
        raise ValueError(
            f"factory {factory!r} does not fit {dim} dimensions: {_faiss_message(error)}. PQ sizes "
            f"that fit without a reduction: {', '.join(sizes)}; examples: Flat, "
            f"IVF256,PQ{dim}x4fsr,Refine(SQ8)"
        ) from None


def _check_enough(factory: str, lists: Any, size: int, strict: bool) -> None:
    """Refuse too few training vectors for the lists or the code books."""
    if not lists:
        return
    check_enough_for_lists(factory, lists.nlist, size, strict)
    quantizer = getattr(lists, "pq", None)
    if quantizer is not None:
        check_enough_for_codes(factory, quantizer.ksub, quantizer.nbits, quantizer.M, size)


def _train(
    index: Any, reader: EmbeddingReader, size: int, seed: int, factory: str
) -> dict[str, Any]:
    """Train on a uniform sample of all shards; returns the manifest's entry about it."""
    report: dict[str, Any] = {"seed": seed, "vectors": 0 if index.is_trained else size}
    lists = lists_of(index)
    if lists:
        report["per_list"] = round(size / lists.nlist, 2)
    if index.is_trained:
        return report
    # Flat needs no training; everything else trains on a uniform sample of all shards.
    sample = uniform_sample(reader, size, seed)
    started = time.perf_counter()
    report["device"] = _train_faiss(index, sample, seed)
    report["seconds"] = round(time.perf_counter() - started, 1)
    logger.info("trained %s on %s vectors in %.1f s", factory, f"{size:,}", report["seconds"])
    return report


def _train_faiss(index: Any, sample: NDArray[np.float32], seed: int) -> str:
    """Train, with k-means on the GPUs that FAISS sees; returns "gpu" or "cpu"."""
    lists = lists_of(index)
    assigner = None
    if lists:
        lists.cp.seed = seed % 2**31
        assigner = _gpu_assigner(lists.d)
        lists.clustering_index = assigner
    # FAISS hands the assignment of k-means to the given index, which may live on GPUs.
    try:
        index.train(sample)
    except RuntimeError as error:
        raise ValueError(
            f"training on {len(sample)} vectors failed: {_faiss_message(error)}"
        ) from None
    finally:
        if lists:
            lists.clustering_index = None  # a stored index must not refer to a GPU
    if assigner is None:
        return "cpu"
    return "gpu"


def _gpu_assigner(dim: int) -> Any:
    """A flat index on all GPUs that k-means assigns vectors with; None without a GPU."""
    if faiss.get_num_gpus() == 0:
        return None
    try:
        return faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(dim))
    except RuntimeError as error:
        logger.warning("faiss cannot use its GPU (%s); training on the CPU", _faiss_message(error))
        return None


def _add_all(index: Any, reader: EmbeddingReader) -> Iterator[pa.Table]:
    """Add all vectors in the order of the shards, and yield the rows of their id table.

    FAISS numbers vectors in the order in which they are added, which are the row numbers.
    """
    for batch in batches_with_progress(reader, "add to the index"):
        index.add(batch.vectors)
        yield pa.table({"product_id": batch.ids, "content": batch.digests()})


def _write(index: Any, file: Path) -> None:
    """Write and read back: on a full disk FAISS may lose the end of a file without an error."""
    with storage.create(file) as stream:
        faiss.write_index(index, faiss.PyCallbackIOWriter(stream.write))
    try:
        copy = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise ArtefactError(f"{file.name} could not be written: {_faiss_message(error)}") from None
    if (copy.ntotal, copy.d) != (index.ntotal, index.d):
        raise ArtefactError(
            f"{file.name} was read back with {copy.ntotal} vectors; {index.ntotal} were written"
        )


def _faiss_message(error: RuntimeError) -> str:
    """The sentence of a FAISS error, without the C++ function and file."""
    return re.sub(r"^Error in .*? at \S+: (Error: )?", "", str(error).replace("\n", " "))
