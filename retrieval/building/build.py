"""Build an index folder from embeddings.

Uniform training sample, block after block, published only when complete.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tritower.artefacts import storage, versions
from tritower.artefacts.storage import ArtefactError, Manifest
from tritower.retrieval.building import resources
from tritower.retrieval.building.assemble import attach_attributes, write_mapped, write_products
from tritower.retrieval.building.choose import COMPARING, choose
from tritower.retrieval.building.tuning.measure import measure, reached
from tritower.retrieval.building.tuning.predict import Predictor, precision_for
from tritower.retrieval.building.tuning.tuning_queries import (
    PER_KIND,
    PER_KIND_BY_DEFAULT,
    of_products,
    of_queries,
    with_truth,
)
from tritower.retrieval.building.workspace import BLOCK_ROWS, Workspace
from tritower.retrieval.index import FORMAT, KIND, SETTINGS_FILE
from tritower.retrieval.ivf import gpu
from tritower.retrieval.ivf.clustering import find_centroids
from tritower.retrieval.ivf.encoded import GROUPING_BYTES, Blocks
from tritower.retrieval.ivf.engine import Engine, Settings, lists_of
from tritower.retrieval.ivf.ivf_pq import Trained, train
from tritower.retrieval.ivf.layout import IDS_FILE, INDEX_FILE
from tritower.retrieval.ivf.operating_points import Target, Tuning
from tritower.retrieval.ivf.spec import (
    CODEBOOK,
    MIN_POINTS_PER_LIST,
    Choice,
    Mapped,
    choose_factory,
    choose_lists,
    default_nprobe,
    parse_mapped,
    train_size,
)
from tritower.retrieval.products.attribute_providers import known_source, open_source
from tritower.retrieval.vectors.embeddings import EmbeddingBatch, EmbeddingReader
from tritower.terminal.progress import counted

logger = logging.getLogger(__name__)

DEFAULT_RECALL = 0.98
"""Recall@10 against exact search that the default index is tuned to, for each kind of query."""


@dataclass(frozen=True)
class Recipe:
    """How to build an index.

    Attributes:
        factory: a FAISS factory string, or "auto" to choose by the number of vectors.
        seed: of the training sample and of k-means.
        train_sample: number of training vectors; None chooses by the number of lists.
        strict: refuse an under-trained index instead of warning.
        nprobe: lists a search visits unless told otherwise; None measures the default index, and
            chooses by the number of lists for a factory that is named.
        k_factor: a search re-ranks k_factor x k candidates where the index keeps finer vectors;
            None measures the default index, and takes 8 for a factory that is named.
        spill: give every vector a second list: more recall from fewer lists, for twice the bytes of
            codes.
        memory: bytes the build may take; None for 80 % of what is free.
    """

    factory: str = "auto"
    seed: int = 0
    train_sample: int | None = None
    strict: bool = False
    nprobe: int | None = None
    k_factor: float | None = None
    spill: bool = False
    memory: int | None = None

    @property
    def is_default(self) -> bool:
        """Whether neither the index nor how it is searched is named: both are chosen."""
        return self.factory == "auto" and self.nprobe is None and self.k_factor is None


def build_index(
    reader: EmbeddingReader,
    output: Path | str,
    recipe: Recipe | None = None,
    *,
    target: Target | None = None,
    queries: EmbeddingReader | None = None,
    attributes: Path | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Build an index and publish it as the version in use.

    Memory: the training sample, then blocks of vectors, then the codes of some lists; never all
        vectors. The same call
    goes on after a kill, where the index is one whose lists are mapped (`parse_mapped`).

    Args:
        reader: the products' embeddings.
        output: the place of the index and its versions.
        recipe: how; the default suits any size.
        target: what the index should reach: the factory (where it is "auto") and how to search are
            chosen for it, and nothing is published that does not reach it. None: the default index
            is exact while that is quick, and otherwise searched so that each kind of query reaches
            `DEFAULT_RECALL`, or comes as near to it as it can.
        queries: what to choose and measure by, of every kind that will be asked; None: the products
            themselves.
        attributes: what filters ask for: a prepared catalogue, or a Parquet or CSV file with a
            column of ids; None for the catalogue that was embedded, where it is there and still the
            same.
        overwrite: publish a new version of an index that is there; the old one is kept.

    Raises:
        ValueError: ids that are missing or repeated, faulty vectors, a factory string that does not
            fit them, more memory or disk needed than there is, or a target that is not reached.
        ArtefactError: `output` holds an index or something else, or it could not be written
            completely.
    """
    recipe = recipe or Recipe()
    output = Path(output)
    choice = _choose(reader, recipe, target)
    design = parse_mapped(choice.factory)
    if design is None and (recipe.spill or (target is not None and choice.factory != "Flat")):
        raise ValueError(
            f"factory {choice.factory!r} has no mapped lists, which "
            f"{'spill' if recipe.spill else 'a target'} is for: "
            "factories such as IVF1024,PQ64x4fsr,Refine(SQ8) have"
        )
    if queries is not None:
        if target is None and not recipe.is_default:
            raise ValueError(
                f"queries choose how to reach a target, and factory={recipe.factory!r} with "
                f"nprobe={recipe.nprobe} and "
                f"k_factor={recipe.k_factor} has none: name one (recall), or none of these three"
            )
        _check_queries(reader, queries)
    if target is None and recipe.is_default and choice.factory != "Flat":
        target = Target(DEFAULT_RECALL, strict=False)
    if versions.occupied(output) and not overwrite:
        raise ArtefactError(
            f"{output} already exists and holds an index: choose another place, or publish a new "
            "version (overwrite)"
        )
    source = known_source(reader.meta) if attributes is None else open_source(attributes)
    meta: dict[str, Any] = {"format": FORMAT}
    with (
        _leaving_nothing(output),
        versions.publish(output, kind=KIND, meta=meta) as folder,
    ):
        if design is None:
            built = _whole(reader, folder, choice, recipe, target, queries)
        else:
            built = _mapped(reader, folder, output, choice, recipe, target, queries)
        if source is not None:
            meta["attributes"] = attach_attributes(folder, [source])
        storage.write_json(folder / SETTINGS_FILE, built.settings)
        meta.update(
            model=reader.meta.get("model"),
            catalogue=reader.meta.get("catalogue"),
            embeddings=reader.fingerprint,
            metric=reader.metric,
            dim=reader.dim,
            count=reader.count,
            faiss=faiss.__version__,
            hints=reader.meta.get("hints", {}),
            target=None if target is None else asdict(target),
            **built.about,
        )
    Workspace.remove(output)
    return storage.read_manifest(versions.current(output), KIND)


def _choose(reader: EmbeddingReader, recipe: Recipe, target: Target | None) -> Choice:
    """The factory that is named, else the default one; what asks for lists gets them."""
    if recipe.factory != "auto":
        return Choice(recipe.factory, "asked for")
    lists_wanted = target is not None or recipe.nprobe is not None or recipe.spill
    return (choose_lists if lists_wanted else choose_factory)(reader.count, reader.dim)


@contextmanager
def _leaving_nothing(output: Path) -> Iterator[None]:
    """Remove the folders again that were made for an index that does not come to be."""
    missing = [
        folder
        for folder in (output / versions.VERSIONS, output, *output.parents)
        if not folder.exists()
    ]
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()  # fails where something is in it
        raise


class Built(NamedTuple):
    """What was written to the folder of a version.

    Attributes:
        settings: how to search it, for its settings.json.
        about: factory, reason, spill and training, for its manifest.
    """

    settings: dict[str, Any]
    about: dict[str, Any]


def _check_queries(reader: EmbeddingReader, queries: EmbeddingReader) -> None:
    """Refuse queries of other vectors than the products'."""
    for name, mine, theirs in (
        ("dimension", reader.dim, queries.dim),
        ("model", reader.meta.get("model"), queries.meta.get("model")),
    ):
        if mine != theirs and None not in (mine, theirs):
            raise ValueError(
                f"{queries.source} has {name} {theirs}, the products {mine}: embed both with one "
                "model"
            )


def _mapped(
    reader: EmbeddingReader,
    folder: Path,
    output: Path,
    choice: Choice,
    recipe: Recipe,
    target: Target | None,
    queries: EmbeddingReader | None,
) -> Built:
    """Make an index whose lists are mapped."""
    default = parse_mapped(choice.factory)
    assert default is not None
    make_index(choice.factory, reader.dim)  # refuses what does not fit the dimension
    size = _sample_size(reader, default.lists, recipe)
    _check_enough(choice.factory, default, size, recipe.strict)
    compares = _compares(recipe, target)
    _check_resources(reader, default, recipe.spill, recipe, output, samples=1 + compares)
    if target is not None:
        settings: dict[str, Any] = {}
    else:
        settings = _settings(recipe, default.lists)._asdict()
    request = choice.factory
    if target is not None:
        by = None if queries is None else queries.fingerprint or queries.stamp()
        request = f"{recipe.factory} for {target} by {by}"
    with Workspace(output, reader, request, recipe.seed, size, recipe.spill) as work:
        reader.check_unique()
        trained, about = work.trained(
            lambda: _learn(reader, output, choice, recipe, target, queries, size)
        )
        blocks = work.encode(reader, trained)
        write_mapped(folder, trained, [(Blocks(blocks), 0)])
        # Read back: whatever is lost on the way to a disk, no index is published that does not
        # open.
        engine = Engine.open(
            folder, {"count": reader.count, "dim": reader.dim, "spill": trained.spill}
        )
        if target is not None:
            settings = _measured_settings(reader, engine, target, queries, recipe.seed, size)
    return Built(settings, {**about, "spill": trained.spill})


def _learn(
    reader: EmbeddingReader,
    output: Path,
    choice: Choice,
    recipe: Recipe,
    target: Target | None,
    queries: EmbeddingReader | None,
    size: int,
) -> tuple[Trained, dict[str, Any]]:
    """Choose the index where a target says so, and train it.

    With what the manifest says of both.
    """
    design = parse_mapped(choice.factory)
    table = None
    assert design is not None
    compares = _compares(recipe, target)
    rows = sample_rows(reader.count, size, recipe.seed)
    if compares and 2 * size <= reader.count:
        both = sample_rows(reader.count, 2 * size, recipe.seed)
        first = sample_rows(2 * size, size, recipe.seed)
        rows = np.concatenate([both[first], np.delete(both, first)])
    drawn = take(reader, rows)
    sample, unseen = (
        drawn[:size],
        drawn[-size:],
    )  # where vectors are few, k-means has seen all of them
    own = np.random.default_rng(recipe.seed).permutation(size)[:PER_KIND]
    started = time.perf_counter()
    centroids = find_centroids(sample, design.lists, recipe.seed)
    asked = [] if queries is None else of_queries(queries, recipe.seed)
    if not compares:
        if recipe.factory == "auto":
            asking = of_products(sample[own], own, reader.metric)
            compared = [probe.first(COMPARING) for probe in (asking, *asked)]
            design = replace(
                design, finer=precision_for(sample, compared, Target().k, reader.count)
            )
            choice = Choice(
                str(design), f"{choice.reason}, {design.finer_size(reader.dim)} bytes to re-rank"
            )
        trained = train(sample, design, recipe.seed, recipe.spill, centroids)
    else:
        assert target is not None
        asking = of_products(unseen[own], own, reader.metric)
        compared = [probe.first(COMPARING) for probe in (asking, *asked)]
        known = {design.lists: centroids}
        chosen = choose(
            Predictor(sample, unseen, compared, target, reader.count, recipe.seed, known)
        )
        choice = Choice(chosen.winner.factory, chosen.reason)
        trained = chosen.trained
        table = chosen.to_json()
        design = chosen.winner.design
    # Codes or vectors may take more than by default.
    _check_resources(reader, design, trained.spill, recipe, output, samples=1 + compares)
    seconds = round(time.perf_counter() - started, 1)
    logger.info(
        "trained %s lists on %s vectors in %.1f s", f"{design.lists:,}", f"{size:,}", seconds
    )
    training = {
        "seed": recipe.seed,
        "vectors": size,
        "per_list": round(size / design.lists, 2),
        "device": "gpu" if gpu.in_use() else "cpu",
        "seconds": seconds,
    }
    about = {"factory": choice.factory, "reason": choice.reason, "training": training}
    return trained, about | ({} if table is None else {"candidates": table})


def _compares(recipe: Recipe, target: Target | None) -> bool:
    """Whether the index is chosen among candidates; the default one is not.

    It is only searched as is needed.
    """
    return recipe.factory == "auto" and target is not None and target.strict


def _measured_settings(
    reader: EmbeddingReader,
    engine: Engine,
    target: Target,
    queries: EmbeddingReader | None,
    seed: int,
    size: int,
) -> dict[str, Any]:
    """How to search a finished index, with its operating points, for its settings.json.

    Raises:
        ValueError: it does not reach the target, and the target is strict.
    """
    tuning = _measure(reader, engine, target, queries, seed, size)
    problems = reached(tuning, target)
    if problems and target.strict:
        raise ValueError(
            f"the index does not reach recall@{target.k} of {target.recall:g} "
            f"({'; '.join(problems)}) and is not "
            "published: ask for less, or allow more memory or latency"
        )
    for problem in problems:
        logger.warning(
            "the default index does not reach recall@%d of %g for queries of kind %s: they are "
            "searched with its best "
            "settings. Build with --factory Flat for exact search, or --recall %g for finer codes",
            target.k,
            target.recall,
            problem,
            target.recall,
        )
    return {**tuning.nearest_settings(target.recall)._asdict(), "tuning": tuning.to_json()}


def _measure(
    reader: EmbeddingReader,
    engine: Engine,
    target: Target,
    queries: EmbeddingReader | None,
    seed: int,
    size: int,
) -> Tuning:
    """Measure the finished index with all vectors as the truth."""
    per_kind = PER_KIND if target.strict else PER_KIND_BY_DEFAULT
    rows = sample_rows(reader.count, size, seed)
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:per_kind])
    asking = of_products(take(reader, rows), rows, reader.metric)
    probes = [asking, *([] if queries is None else of_queries(queries, seed, per_kind))]
    blocks = (batch.vectors for batch in _shown(reader, "exact search to measure by"))
    return measure(engine, with_truth(probes, blocks, target.k), target)


def _settings(recipe: Recipe, lists: int | None) -> Settings:
    """How an index of so many lists is searched where that is not measured."""
    nprobe = default_nprobe(lists) if lists and recipe.nprobe is None else recipe.nprobe
    k_factor = Settings().k_factor if recipe.k_factor is None else recipe.k_factor
    return Settings(nprobe, k_factor).checked(lists)


def _check_resources(
    reader: EmbeddingReader, design: Mapped, spill: bool, recipe: Recipe, output: Path, samples: int
) -> None:
    """Refuse what would not fit; `samples` of the training's size are held at a time."""
    sample = samples * (recipe.train_sample or train_size(reader.count, design.lists))
    need = resources.predict(
        reader.count,
        reader.dim,
        design,
        sample=sample,
        spill=spill,
        block=BLOCK_ROWS,
        grouping=GROUPING_BYTES,
    )
    resources.check(need, output, recipe.memory)


def _whole(
    reader: EmbeddingReader,
    folder: Path,
    choice: Choice,
    recipe: Recipe,
    target: Target | None,
    queries: EmbeddingReader | None,
) -> Built:
    """Make an index of any other factory string, in memory."""
    index = make_index(choice.factory, reader.dim)
    lists = lists_of(index)
    settings = _settings(recipe, lists.nlist if lists else None)._asdict()
    if not index.is_trained:
        size = _sample_size(reader, lists.nlist if lists else 0, recipe)
        _check_enough(choice.factory, lists, size, recipe.strict)
    reader.check_unique()
    training = _train(index, reader, recipe, choice.factory)
    write_products(folder / IDS_FILE, _adding(index, reader))
    if index.ntotal != reader.count:
        raise ArtefactError(
            f"the index holds {index.ntotal} vectors, {reader.source} has {reader.count}"
        )
    _write(index, folder / INDEX_FILE)
    if target is not None and lists:
        engine = Engine.open(folder, {"count": reader.count, "dim": reader.dim})
        size = _sample_size(reader, lists.nlist, recipe)
        settings = _measured_settings(reader, engine, target, queries, recipe.seed, size)
    about = {
        "factory": choice.factory,
        "reason": choice.reason,
        "spill": False,
        "training": training,
    }
    return Built(settings, about)


def _adding(index: Any, reader: EmbeddingReader) -> Iterator[pa.Table]:
    """Add all vectors in the order of the shards, and pass their products on.

    Row numbers are FAISS's own ids.
    """
    for batch in _shown(reader, "add to the index"):
        index.add(batch.vectors)
        yield pa.table({"product_id": batch.ids, "content": batch.digests()})


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
            f"factory {factory!r} does not fit {dim} dimensions: {_faiss_message(error)}. PQ sizes "
            "that fit without a "
            f"reduction: {', '.join(map(str, pieces))}; examples: Flat, "
            f"IVF256,PQ{dim}x4fsr,Refine(SQ8)"
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
    if isinstance(lists, Mapped):
        nlist = lists.lists
        codes = None
    else:
        nlist = getattr(lists, "nlist", 0)
        codes = lists
    centroids, bits = (CODEBOOK, 4) if isinstance(lists, Mapped) else (0, 0)
    pieces = lists.pieces if isinstance(lists, Mapped) else 0
    if (quantizer := getattr(codes, "pq", None)) is not None:
        centroids = quantizer.ksub
        bits = quantizer.nbits
        pieces = quantizer.M
    if nlist > size:
        raise ValueError(
            f"factory {factory!r} needs at least {nlist} training vectors and has {size}: at most "
            f"IVF{size}, "
            f"well trained IVF{max(size // MIN_POINTS_PER_LIST, 1)}; or Flat"
        )
    if centroids > size:
        raise ValueError(
            f"factory {factory!r} needs at least {centroids} training vectors for its {bits}-bit "
            "codes and has "
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


def sample_rows(count: int, size: int, seed: int) -> NDArray[np.int64]:
    """(size,) ascending rows, drawn without replacement; every row has the same chance."""
    return np.sort(np.random.default_rng(seed).choice(count, size, replace=False, shuffle=False))


def uniform_sample(reader: EmbeddingReader, size: int, seed: int) -> NDArray[np.float32]:
    """(size, D) vectors drawn from all shards, in the order of their rows (`sample_rows`)."""
    return take(reader, sample_rows(reader.count, size, seed))


def take(reader: EmbeddingReader, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """(S, D) vectors of distinct rows, in one pass over all shards."""
    vectors = np.empty((len(rows), reader.dim), np.float32)
    places = np.argsort(rows, kind="stable")
    ascending = rows[places]
    first = filled = 0
    for batch in _shown(reader, "sample"):
        last = first + len(batch.ids)
        end = np.searchsorted(ascending, last)
        vectors[places[filled:end]] = batch.vectors[ascending[filled:end] - first]
        first = last
        filled = end
    return vectors


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
        raise ValueError(
            f"training on {len(sample)} vectors failed: {_faiss_message(error)}"
        ) from None
    finally:
        if lists:
            lists.clustering_index = None  # the stored index knows nothing of GPUs
    if gpu is None:
        return "cpu"
    return "gpu"


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
    try:
        copy = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise ArtefactError(f"{file.name} could not be written: {_faiss_message(error)}") from None
    if (copy.ntotal, copy.d) != (index.ntotal, index.d):
        raise ArtefactError(
            f"{file.name} was read back with {copy.ntotal} vectors; {index.ntotal} were written"
        )


def _shown(reader: EmbeddingReader, what: str) -> Iterator[EmbeddingBatch]:
    return counted(reader.batches(), reader.count, lambda batch: len(batch.ids), what, "vectors")


def _faiss_message(error: RuntimeError) -> str:
    """The sentence of a FAISS error, without the C++ function and file."""
    return re.sub(r"^Error in .*? at \S+: (Error: )?", "", str(error).replace("\n", " "))
