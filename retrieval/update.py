"""Keep an index true to a catalogue that lives: products come, change and go, and nothing else is encoded again.

An update writes a new version. The quantizers of the old one stay; its lists are copied without what is gone and with
what is new. A product that is gone leaves its row empty, and one that has changed gets a new row at the end, so that no
other row moves. When too many rows are empty they are closed up (compaction).

    rows before    a  b  c  d        delete b, change c, add e
    rows after     a  -  -  d  c' e
    compacted      a  d  c' e
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from retrieval import storage, versions
from retrieval.assemble import FINE_FILE, IDS_FILE, INDEX_FILE, LISTS_FILE, SIZES_FILE, write_mapped, write_products
from retrieval.drift import Drift, gauge, verdict
from retrieval.embeddings import EmbeddingReader
from retrieval.encoded import Blocks, Entries, to_table
from retrieval.engine import Engine
from retrieval.index import FORMAT, KIND, SETTINGS_FILE, ProductIndex
from retrieval.lists import read_lists, read_rows
from retrieval.mapped import Trained, centroids_of
from retrieval.progress import counted
from retrieval.storage import ArtefactError

logger = logging.getLogger(__name__)

COMPACT_ABOVE = 0.2
"""Share of empty rows above which an update closes them up."""

BLOCK = 65_536


@dataclass(frozen=True)
class UpdateReport:
    """What an update did.

    Attributes:
        version: the version that is in use now; None where there was nothing to do.
        added: products that were not there.
        replaced: products whose content has changed.
        unchanged: products given that are there as they are.
        deleted: products taken out.
        unknown: ids to delete that were not there.
        count: products now.
        rows: rows now, empty ones included.
        compacted: whether empty rows were closed up.
        before: the gauge of the old version.
        after: that of the new one.
        verdict: whether to build anew, and why.
    """

    version: str | None
    added: int
    replaced: int
    unchanged: int
    deleted: int
    unknown: Sequence[str]
    count: int
    rows: int
    compacted: bool
    before: Drift | None
    after: Drift | None
    verdict: str


@dataclass(frozen=True)
class Changes:
    """What is to be done to an index.

    Attributes:
        gone: (N,) bool, rows that become empty.
        keep: rows of the new embeddings to add, as a bool mask per batch of the reader.
    """

    gone: NDArray[np.bool_]
    keep: Sequence[NDArray[np.bool_]]
    added: int
    replaced: int
    unchanged: int
    deleted: int
    unknown: Sequence[str]


def update_index(
    root: Path | str,
    *,
    upsert: EmbeddingReader | None = None,
    delete: Sequence[str] = (),
    compact: bool = False,
    strict: bool = False,
    unchanged: int = 0,
    measure: bool = True,
) -> UpdateReport:
    """Publish a new version of an index with products added, changed and taken out.

    Args:
        root: the place of the index.
        upsert: embeddings of products that are new or may have changed.
        delete: ids of products to take out.
        compact: close up empty rows even where they are few.
        strict: refuse ids to delete that are not there.
        unchanged: products that were compared before and are there as they are: counted in the report.
        measure: gauge the drift before and after.

    Raises:
        ValueError: an id twice, or both to change and to delete; embeddings of another dimension or metric; with
            `strict` an unknown id; or no product would be left.
        ArtefactError: no index, one that cannot be updated, embeddings of another model, or another run was quicker.
    """
    root = Path(root)
    index = ProductIndex.open(root, fall_back=False)
    if index.version == root:
        raise ArtefactError(f"{root} is one version or an index of the first release: build it anew to update it")
    flat = isinstance(index.engine.index, faiss.IndexFlat)
    if not flat and not (index.version / LISTS_FILE).exists():
        raise ArtefactError(
            f"{root} is {index.manifest.meta['factory']}, which cannot be updated: build it anew, with a factory such "
            "as IVF1024,PQ64x4fsr,Refine(SQ8) if it is to be updated often"
        )
    _check_same(index, upsert)
    changes = plan(index, upsert, delete, strict)
    changes = replace(changes, unchanged=changes.unchanged + unchanged)
    dead = _dead(index)
    if not (changes.added or changes.replaced or changes.deleted) and not (compact and dead.any()):
        return _report(index, changes, None, False, None, None, "nothing to do")
    gone = dead | changes.gone
    count = int((~gone).sum()) + changes.added + changes.replaced
    if count == 0:
        raise ValueError(f"{root}: no product would be left; remove the index itself if that is meant")
    rows = len(gone) + changes.added + changes.replaced
    compacted = flat or compact or 1 - count / rows > COMPACT_ABOVE
    meta: dict[str, Any] = dict(index.manifest.meta) | {"format": FORMAT, "count": count}
    with versions.publish(root, kind=KIND, meta=meta, base=index.version.name) as folder:
        if flat:
            _write_flat(folder, index, gone, upsert, changes)
        else:
            _write_mapped(folder, index, gone, upsert, changes, compacted)
        shutil.copyfile(index.version / SETTINGS_FILE, folder / SETTINGS_FILE)
        meta["rows"] = count if compacted else rows
        meta["updates"] = int(index.manifest.meta.get("updates", 0)) + 1
        if upsert is not None and upsert.meta.get("catalogue") is not None:
            meta["catalogue"] = upsert.meta["catalogue"]
            meta["hints"] = {**meta.get("hints", {}), **upsert.meta.get("hints", {})}
        before = after = None
        why = "not measured"
        if measure and not flat:
            after_engine = Engine.open(folder, meta)
            alive = _alive(folder)
            fresh = np.arange(len(alive)) >= len(alive) - (changes.added + changes.replaced)
            before = gauge(index.engine, index.settings, ~dead, np.zeros(len(dead), bool), _sizes(index.version))
            after = gauge(after_engine, index.settings, alive, fresh, _sizes(folder))
            built = Drift(**meta["built"]) if "built" in meta else before
            why = verdict(built, after, count, meta.get("built_count", index.manifest.meta["count"]))
            meta.update(built=asdict(built), built_count=meta.get("built_count", index.manifest.meta["count"]))
            meta["drift"] = {"before": asdict(before), "after": asdict(after), "verdict": why}
    published = ProductIndex.open(root, fall_back=False)
    return _report(published, changes, published.version.name, compacted, before, after, why)


def plan(index: ProductIndex, upsert: EmbeddingReader | None, delete: Sequence[str], strict: bool) -> Changes:
    """What there is to do, before anything is written.

    Raises:
        ValueError: see `update_index`.
    """
    ids, contents = index.all_ids(), index.contents()
    known = pa.array(delete, pa.string())
    if len(pc.unique(known)) != len(known):
        twice = pc.value_counts(known).to_pylist()
        raise ValueError(f"ids to delete: {next(one['values'] for one in twice if one['counts'] > 1)!r} appears twice")
    rows = _rows_of(ids, known)
    unknown = known.filter(pa.array(rows < 0)).to_pylist()
    if strict and unknown:
        raise ValueError(f"{len(unknown)} ids to delete are not in {index.path} (strict): {', '.join(unknown[:5])}")
    gone = np.zeros(len(ids), bool)
    gone[rows[rows >= 0]] = True
    deleted = int(gone.sum())
    keep, added, replaced, unchanged = [], 0, 0, 0
    if upsert is not None:
        upsert.check_unique()
        for batch in upsert.batches(BLOCK):
            given = batch.ids.cast(pa.string())
            if both := given.filter(pc.is_in(given, value_set=known)).to_pylist():
                raise ValueError(f"{both[0]!r} is both to change and to delete; {len(both)} ids are like this")
            rows = _rows_of(ids, given)
            there = rows >= 0
            same = there.copy()
            same[there] = contents[rows[there]] == batch.digests()[there]
            gone[rows[there & ~same]] = True
            keep.append(~same)
            added += int((~there).sum())
            replaced += int((there & ~same).sum())
            unchanged += int(same.sum())
    return Changes(gone, keep, added, replaced, unchanged, deleted, unknown)


class Version:
    """The encoded vectors of a published version, as a source for the next one.

    Args:
        index: an opened index whose lists are mapped.
        gone: (N,) bool, rows that are empty from now on.
    """

    def __init__(self, index: ProductIndex, gone: NDArray[np.bool_]) -> None:
        self.index, self.gone = index, gone
        self._file, self._sizes = index.version / LISTS_FILE, _sizes(index.version)

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self.gone)

    def sizes(self, num_lists: int) -> NDArray[np.int64]:
        """(L,) entries of each list, without empty rows."""
        lists = read_rows(self._file, self._sizes, self.index.engine.ivf.code_size)
        return np.fromiter((int((~self.gone[rows]).sum()) for rows in lists), np.int64, num_lists)

    def entries(self, first: int, end: int) -> Iterator[Entries]:
        """What stands in lists first to end - 1, without empty rows."""
        ivf = self.index.engine.ivf
        lists, all_rows, all_codes = [], [], []
        for number, (codes, rows) in enumerate(read_lists(self._file, ivf, self._sizes, first, end), first):
            kept = ~self.gone[rows]
            lists.append(np.full(int(kept.sum()), number))
            all_rows.append(rows[kept])
            all_codes.append(codes[kept])
        yield Entries(np.concatenate(lists), np.concatenate(all_rows), np.concatenate(all_codes))

    def products(self) -> Iterator[pa.Table]:
        """product_id and content row by row, nulls for an empty row."""
        row = 0
        table = pa.table({"product_id": self.index.all_ids(), "content": pa.array(self.index.contents())})
        for batch in table.to_batches(BLOCK):
            there = pa.array(~self.gone[row : row + len(batch)])
            columns = [pc.if_else(there, column, pa.scalar(None, column.type)) for column in batch.columns]
            yield pa.table(columns, names=batch.schema.names)
            row += len(batch)

    def fine(self) -> Iterator[NDArray[np.uint8]]:
        """(B, F) finer vectors, row by row."""
        width = self.index.engine.fine.sa_code_size()
        file = self.index.version / FINE_FILE
        data = np.memmap(file, np.uint8, "r", offset=file.stat().st_size - self.count * width).reshape(-1, width)
        for start in range(0, self.count, BLOCK):
            yield data[start : start + BLOCK]


def _write_mapped(
    folder: Path,
    index: ProductIndex,
    gone: NDArray[np.bool_],
    upsert: EmbeddingReader | None,
    changes: Changes,
    compacted: bool,
) -> None:
    engine = index.engine
    trained = Trained(_empty(index), engine.fine and _empty_fine(engine.fine), centroids_of(engine.ivf), engine.spill)
    moved = np.where(gone, -1, np.cumsum(~gone) - 1) if compacted else np.arange(len(gone))
    first_new = int((moved >= 0).sum())
    with tempfile.TemporaryDirectory(prefix=f".{index.path.name}.update-", dir=index.path.absolute().parent) as work:
        files = list(_encode_new(Path(work), trained, upsert, changes))
        sources: list[Any] = [(Version(index, gone), moved)]
        if files:
            sources.append((Blocks(files), first_new))
        write_mapped(folder, trained, sources)


def _encode_new(work: Path, trained: Trained, upsert: EmbeddingReader | None, changes: Changes) -> Iterator[Path]:
    if upsert is None or not changes.added + changes.replaced:
        return
    batches = counted(upsert.batches(BLOCK), upsert.count, lambda batch: len(batch.ids), "encode", "vectors")
    for number, (batch, keep) in enumerate(zip(batches, changes.keep, strict=True)):
        if keep.any():
            file = work / f"{number:06d}.parquet"
            encoded = trained.encode(np.ascontiguousarray(batch.vectors[keep]))
            pq.write_table(to_table(batch.ids.filter(pa.array(keep)), encoded, batch.digests()[keep]), file)
            yield file


def _write_flat(
    folder: Path,
    index: ProductIndex,
    gone: NDArray[np.bool_],
    upsert: EmbeddingReader | None,
    changes: Changes,
) -> None:
    """An exact index has no rows to spare: it is written anew."""
    old = index.engine.index
    new = faiss.IndexFlatIP(index.dim)
    new.add(old.reconstruct_n(0, old.ntotal)[~gone])
    parts = [part.filter(pa.array(~gone[start : start + len(part)])) for start, part in _numbered(index)]
    for batch, keep in zip(upsert.batches(BLOCK) if upsert else (), changes.keep, strict=True):
        new.add(np.ascontiguousarray(batch.vectors[keep]))
        kept = batch.ids.filter(pa.array(keep))
        parts.append(pa.table({"product_id": kept.cast(pa.string()), "content": batch.digests()[keep]}))
    write_products(folder / IDS_FILE, parts)
    with storage.create(folder / INDEX_FILE) as file:
        faiss.write_index(new, faiss.PyCallbackIOWriter(file.write))


def _numbered(index: ProductIndex) -> Iterator[tuple[int, pa.Table]]:
    table = pa.table({"product_id": index.all_ids(), "content": pa.array(index.contents())})
    for start in range(0, len(table), BLOCK):
        yield start, table.slice(start, BLOCK)


def _check_same(index: ProductIndex, upsert: EmbeddingReader | None) -> None:
    if upsert is None:
        return
    index.check_model(upsert.meta.get("model"), str(upsert.source))
    for name, mine, theirs in (("dimension", index.dim, upsert.dim), ("metric", index.metric, upsert.metric)):
        if mine != theirs:
            raise ValueError(f"{upsert.source} has {name} {theirs}, {index.path} has {mine}")


def _rows_of(ids: pa.ChunkedArray, wanted: pa.Array) -> NDArray[np.int64]:
    """(B,) rows of ids, -1 where there are none."""
    found = pc.index_in(wanted, value_set=ids.combine_chunks())
    return np.asarray(pc.fill_null(found, -1).to_numpy(zero_copy_only=False), np.int64)


def _dead(index: ProductIndex) -> NDArray[np.bool_]:
    """(N,) bool, rows that are empty already."""
    return np.asarray(pc.is_null(index.all_ids()).to_numpy(), bool)


def _alive(folder: Path) -> NDArray[np.bool_]:
    with pa.memory_map(str(folder / IDS_FILE)) as file:
        ids = pa.ipc.open_file(file).read_all().column("product_id")
        return np.asarray(pc.is_valid(ids).to_numpy(), bool)


def _sizes(folder: Path) -> NDArray[np.int64]:
    sizes: NDArray[np.int64] = np.load(folder / SIZES_FILE, allow_pickle=False)
    return sizes


def _empty(index: ProductIndex) -> Any:
    """The trained index as it is stored: without lists."""
    return faiss.read_index(str(index.version / INDEX_FILE))


def _empty_fine(fine: Any) -> Any:
    """An empty index with the ranges of finer vectors."""
    empty = faiss.IndexScalarQuantizer(fine.d, fine.sq.qtype, fine.metric_type)
    faiss.copy_array_to_vector(faiss.vector_to_array(fine.sq.trained), empty.sq.trained)
    empty.is_trained = True
    return empty


def _report(
    index: ProductIndex,
    changes: Changes,
    version: str | None,
    compacted: bool,
    before: Drift | None,
    after: Drift | None,
    why: str,
) -> UpdateReport:
    return UpdateReport(
        version=version,
        added=changes.added,
        replaced=changes.replaced,
        unchanged=changes.unchanged,
        deleted=changes.deleted,
        unknown=changes.unknown,
        count=len(index),
        rows=len(index.all_ids()),
        compacted=compacted,
        before=before,
        after=after,
        verdict=why,
    )


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


def to_json(report: UpdateReport) -> str:
    """The report as JSON."""
    return json.dumps(asdict(report), indent=1, ensure_ascii=False)
