"""Build an index folder from embeddings; it is published only when it is complete."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import faiss

from tritower.artefacts import storage, versions
from tritower.artefacts.storage import ArtefactError, Manifest
from tritower.retrieval.building.assemble import attach_attributes
from tritower.retrieval.building.choose_spec import IndexSpec, choose_factory, choose_lists
from tritower.retrieval.building.faiss_index import build_faiss_index
from tritower.retrieval.building.ivf_pq_index import IvfPqBuild
from tritower.retrieval.building.options import BuildOptions, BuildResult
from tritower.retrieval.building.workspace import Workspace
from tritower.retrieval.index_files import ARTEFACT_TYPE, FORMAT, SETTINGS_FILE
from tritower.retrieval.ivf.operating_points import Target
from tritower.retrieval.ivf.spec import parse_ivf_pq
from tritower.retrieval.products.attribute_providers import catalogue_provider, open_provider
from tritower.retrieval.vectors.embeddings import EmbeddingReader

DEFAULT_RECALL = 0.98
"""Recall@10 against exact search that the default index is tuned to, for each query type."""


def build_index(
    reader: EmbeddingReader,
    output: Path | str,
    options: BuildOptions | None = None,
    *,
    target: Target | None = None,
    queries: EmbeddingReader | None = None,
    attributes: Path | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Build an index and publish it as the version in use.

    Memory holds the training sample, then blocks of vectors, then the codes of some lists; never
    all vectors. If the index is an IVF-PQ with 4-bit codes (`parse_ivf_pq`), the same call
    continues a killed build.

    Args:
        reader: embeddings of the products.
        output: the place of the index and its versions.
        options: how to build it; the defaults suit any size.
        target: what the index should reach. The factory (if it is "auto") and the search settings
            are chosen for it, and an index that misses it is not published. None: the default index
            is exact while that is quick, and otherwise searched so that each query type reaches
            `DEFAULT_RECALL`, or comes as near to it as it can.
        queries: queries of every type that users make, to choose and measure by; None: the
            products themselves.
        attributes: attributes for filters: a prepared catalogue, or a Parquet or CSV file with a
            column of ids; None for the catalogue that was embedded, if it is unchanged.
        overwrite: publish a new version of an existing index; the old one is kept.

    Raises:
        ValueError: ids that are missing or repeated, faulty vectors, a factory string that does not
            fit them, more memory or disk needed than there is, or a target that is missed.
        ArtefactError: `output` holds an index or something else, or it could not be written
            completely.
    """
    options = options or BuildOptions()
    output = Path(output)
    # Choose the index, and refuse options that do not go together before anything is written.
    spec = _choose_spec(reader, options, target)
    _check_options(reader, spec, options, target, queries)
    if target is None and options.is_default and spec.factory != "Flat":
        target = Target(DEFAULT_RECALL, strict=False)
    # An index that exists is replaced on request only.
    if versions.occupied(output) and not overwrite:
        raise ArtefactError(
            f"{output} already exists and holds an index: choose another place, or publish a new "
            "version (overwrite)"
        )
    if attributes is None:
        provider = catalogue_provider(reader.meta)
    else:
        provider = open_provider(attributes)
    meta: dict[str, Any] = {"format": FORMAT}
    # Build into a new version. It becomes the one in use when the block ends without an error.
    with (
        _removing_new_folders(output),
        versions.publish(output, artefact_type=ARTEFACT_TYPE, meta=meta) as folder,
    ):
        result: BuildResult
        if parse_ivf_pq(spec.factory) is None:
            result = build_faiss_index(reader, folder, spec, options, target, queries)
        else:
            result = IvfPqBuild(reader, output, spec, options, target, queries).write(folder)
        if provider is not None:
            meta["attributes"] = attach_attributes(folder, [provider])
        storage.write_json(folder / SETTINGS_FILE, result.settings)
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
            **result.manifest,
        )
    Workspace.remove(output)
    return storage.read_manifest(versions.current(output), ARTEFACT_TYPE)


def _choose_spec(
    reader: EmbeddingReader, options: BuildOptions, target: Target | None
) -> IndexSpec:
    """The named factory, else the default one; options about lists get an index with lists."""
    if options.factory != "auto":
        return IndexSpec(options.factory, "requested")
    needs_lists = target is not None or options.nprobe is not None or options.spill
    if needs_lists:
        return choose_lists(reader.count, reader.dim)
    return choose_factory(reader.count, reader.dim)


def _check_options(
    reader: EmbeddingReader,
    spec: IndexSpec,
    options: BuildOptions,
    target: Target | None,
    queries: EmbeddingReader | None,
) -> None:
    """Refuse options that do not go together, and queries that do not suit the products."""
    needs_lists = options.spill or (target is not None and spec.factory != "Flat")
    if needs_lists and parse_ivf_pq(spec.factory) is None:
        purpose = "spill" if options.spill else "a target"
        raise ValueError(
            f"factory {spec.factory!r} has no mapped lists, which {purpose} is for: factories such "
            "as IVF1024,PQ64x4fsr,Refine(SQ8) have"
        )
    # Queries need a target to tune for, and must come from the model of the products.
    if queries is None:
        return
    if target is None and not options.is_default:
        raise ValueError(
            f"queries choose how to reach a target, and factory={options.factory!r} with "
            f"nprobe={options.nprobe} and k_factor={options.k_factor} has none: name one (recall), "
            "or none of these three"
        )
    for name, own, theirs in (
        ("dimension", reader.dim, queries.dim),
        ("model", reader.meta.get("model"), queries.meta.get("model")),
    ):
        if own != theirs and None not in (own, theirs):
            raise ValueError(
                f"{queries.source} has {name} {theirs}, the products {own}: embed both with one "
                "model"
            )


@contextmanager
def _removing_new_folders(output: Path) -> Iterator[None]:
    """After a failure, remove the folders that were made for the index."""
    missing = []
    for folder in (output / versions.VERSIONS, output, *output.parents):
        if not folder.exists():
            missing.append(folder)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()  # fails if something is in it
        raise
