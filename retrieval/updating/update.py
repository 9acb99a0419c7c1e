"""Keep an index true to a catalogue that lives.

Products come, change and go, and nothing else is encoded again.

An update writes a new version. The quantizers of the old one stay; its lists are copied without
what is deleted and with what is new. A deleted product leaves its row empty, and one that has
changed gets a new row at the end, so that no other row moves. When too many rows are empty they are
closed up (compaction).

    rows before    a  b  c  d        delete b, change c, add e
    rows after     a  -  -  d  c' e
    compacted      a  d  c' e

What is unfinished lies beside the index until the new version is published:

    index.updating/
      embedded/     embeddings of products that have changed, shard by shard
      encoded/      what is new, block by block, as the index keeps it
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import faiss
import pyarrow as pa

from tritower.artefacts import versions
from tritower.artefacts.storage import ArtefactError
from tritower.artefacts.work_folder import WorkFolder, remove_work
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.ivf.layout import LISTS_FILE
from tritower.retrieval.updating.drift import Drift
from tritower.retrieval.updating.next_version import NextVersion
from tritower.retrieval.updating.plan import Plan, make_plan
from tritower.retrieval.vectors.embeddings import EmbeddingReader


class Embedded(NamedTuple):
    """Embeddings of those products of a catalogue that an index does not hold as they are.

    Attributes:
        reader: their embeddings; None where there are none.
        unchanged: the ids of all others.
    """

    reader: EmbeddingReader | None
    unchanged: pa.ChunkedArray


class Catalogue(Protocol):
    """Products without embeddings."""

    @property
    def meta(self) -> Mapping[str, Any]:
        """The metadata of its embeddings.

        `model` and `catalogue`, the fingerprints of both, and `hints`, where they lie.
        """

    def embed(self, index: ProductIndex, folder: Path) -> Embedded:
        """Embed what is new or has changed, and nothing else.

        Args:
            index: what is to be updated.
            folder: for the embeddings; the same call continues with finished shards.
        """


@dataclass(frozen=True)
class UpdateReport:
    """What an update did. Products given = added + replaced + unchanged: a faulty one refuses all.

    Attributes:
        version: the version that was published; None where there was nothing to do.
        given: products given to add or change.
        added: those that were not there.
        replaced: those whose content has changed.
        unchanged: those that are there as they are.
        deleted: products taken out.
        unknown: ids to take out that were not there.
        count: products now.
        rows: rows now, empty ones included.
        compacted: whether empty rows were closed up.
        before: the drift before; None where it was not measured, as the next two.
        after: the drift now.
        recommendation: whether to build anew, and why.
    """

    version: str | None
    given: int
    added: int
    replaced: int
    unchanged: int
    deleted: int
    unknown: Sequence[str]
    count: int
    rows: int
    compacted: bool
    before: Drift | None = None
    after: Drift | None = None
    recommendation: str | None = None

    def to_json(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)


def update_index(
    root: Path | str,
    *,
    upsert: EmbeddingReader | Catalogue | None = None,
    delete: Sequence[str] = (),
    attributes: Path | None = None,
    compact: bool = False,
    strict: bool = False,
    measure: bool = True,
) -> UpdateReport:
    """Publish a new version of an index with products added, changed and taken out.

    A killed update leaves the old version in use; the same call continues where it stopped.

    Args:
        root: the place of the index.
        upsert: products that are new or may have changed: their embeddings, or a catalogue of which
            those are embedded that the index does not hold as they are.
        delete: ids of products to take out.
        attributes: for filters, of some products or of all: a prepared catalogue, or a
            Parquet or CSV file with a column of ids; None for the catalogue that the products are
            from, where it is there and still the same. Products that it does not know keep what
            they have.
        compact: close up empty rows even where they are few.
        strict: refuse ids to take out that are not there.
        measure: drift the drift before and after, where lists are mapped.

    Raises:
        ValueError: an id twice, or both given and to be taken out; embeddings of another dimension
            or metric; with `strict` an unknown id; no product would be left; or not enough memory
            or disk.
        ArtefactError: no index, one that cannot be updated, embeddings of another model, or another
            run was quicker.
    """
    root = Path(root)
    index = ProductIndex.open(root, fall_back=False)
    _check_updatable(index)
    # One update at a time; a killed one continues from this folder.
    with WorkFolder(root, "update", _identity(index, upsert), "embedded|encoded") as work:
        embedded = _embedded(index, upsert, work)
        plan = make_plan(
            index, embedded.reader, delete, unchanged=embedded.unchanged, strict=strict
        )
        next_version = NextVersion(
            index, embedded.reader, {} if upsert is None else upsert.meta, plan, work
        )
        next_version.choose(compact, attributes)
        # Nothing to do publishes nothing.
        if next_version.needed:
            meta = next_version.publish(measure)
            report = _report(plan, next_version, versions.current(root).name, meta.get("drift"))
        else:
            # A run that was killed after publishing may have left old versions.
            versions.collect(root)
            report = _report(plan, next_version)
    remove_work(root, "update")
    return report


def read_ids_to_delete(file: Path) -> list[str]:
    """Ids from a .txt file, one per line, verbatim; empty lines are left out.

    Raises:
        ValueError: not text in UTF-8.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}") from None
    return [line.removesuffix("\r") for line in lines if line.removesuffix("\r")]


def _check_updatable(index: ProductIndex) -> None:
    """Refuse what FAISS cannot take products out of without losing rows."""
    if index.version == index.path:
        raise ArtefactError(
            f"{index.path} is one version, which never changes: name {index.path.parent.parent}"
        )
    if (
        not isinstance(index.engine.index, faiss.IndexFlat)
        and not (index.version / LISTS_FILE).exists()
    ):
        raise ArtefactError(
            f"{index.path} is {index.manifest.meta['factory']}, which cannot be updated: build it "
            "anew, with a factory "
            "such as IVF1024,PQ64x4fsr,Refine(SQ8) if it is to be updated often"
        )


def _identity(index: ProductIndex, upsert: EmbeddingReader | Catalogue | None) -> dict[str, Any]:
    """What decides the result; refuses products that do not suit the index."""
    base = {"base": index.manifest.fingerprint}
    if upsert is None:
        return base
    if not isinstance(upsert, EmbeddingReader):
        index.check_model(upsert.meta["model"], "the catalogue's model")
        return {**base, "catalogue": upsert.meta["catalogue"], "model": upsert.meta["model"]}
    # Vectors of another model or metric would be found at random.
    model = upsert.meta.get("model")
    if model is None and index.model is not None:
        raise ArtefactError(
            f"{upsert.source} does not say which model made it, and {index.path} is of model "
            f"{index.model}: give the "
            "embeddings folder that `embed` made, or the catalogue; or build an index from "
            "embeddings like these"
        )
    index.check_model(model, str(upsert.source))
    metric = upsert.meta.get("metric", upsert.metric)
    for name, own, given in (
        ("dimension", index.dim, upsert.dim),
        ("metric", index.metric, metric),
    ):
        if own != given:
            raise ValueError(f"{upsert.source} has {name} {given}, {index.path} has {own}")
    return {
        **base,
        "embeddings": upsert.fingerprint or upsert.stamp(),
        "normalize": upsert.normalize,
    }


def _embedded(
    index: ProductIndex, upsert: EmbeddingReader | Catalogue | None, work: WorkFolder
) -> Embedded:
    if upsert is None or isinstance(upsert, EmbeddingReader):
        return Embedded(upsert, pa.chunked_array([], pa.large_string()))
    return upsert.embed(index, work.path / "embedded")


def _report(
    plan: Plan,
    next_version: NextVersion,
    version: str | None = None,
    drift: Mapping[str, Any] | None = None,
) -> UpdateReport:
    states: dict[str, Any] = {}
    if drift is not None:
        states = {name: Drift.from_json(drift[name]) for name in ("before", "after")} | {
            "recommendation": drift["recommendation"]
        }
    return UpdateReport(
        version=version,
        given=plan.num_new_rows + plan.unchanged,
        added=plan.added,
        replaced=plan.replaced,
        unchanged=plan.unchanged,
        deleted=plan.deleted,
        unknown=plan.unknown,
        count=next_version.count,
        rows=next_version.rows,
        compacted=next_version.compacted,
        **states,
    )
