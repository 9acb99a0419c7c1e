"""The version of an index that follows another one.

Its lists are copied without what is deleted and with what is new.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tritower.artefacts import storage, versions
from tritower.artefacts.shards import ShardFolder
from tritower.artefacts.work_folder import WorkFolder
from tritower.retrieval.building import resources
from tritower.retrieval.building.assemble import (
    PlacedVectors,
    attach_attributes,
    write_ivf_pq,
    write_products,
)
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.index_files import ARTEFACT_TYPE, FORMAT, SETTINGS_FILE
from tritower.retrieval.ivf.encoded import GROUPING_BYTES, Blocks, to_table
from tritower.retrieval.ivf.engine import Engine
from tritower.retrieval.ivf.ivf_pq import TrainedQuantizers
from tritower.retrieval.ivf.layout import IDS_FILE, INDEX_FILE
from tritower.retrieval.ivf.spec import parse_ivf_pq
from tritower.retrieval.products.attribute_providers import (
    AttributeProvider,
    catalogue_provider,
    open_provider,
)
from tritower.retrieval.products.attribute_table import (
    ATTRIBUTES_FILE,
    AttributeTable,
    TableProvider,
)
from tritower.retrieval.updating.drift import SAMPLE, Drift, measure_drift, recommendation
from tritower.retrieval.updating.plan import BLOCK, Plan
from tritower.retrieval.updating.previous import VersionVectors, product_tables, trained_quantizers
from tritower.retrieval.vectors.embeddings import EmbeddingBatch, EmbeddingReader
from tritower.terminal.progress import show_progress

COMPACT_ABOVE = 0.2
"""Share of empty rows above which an update closes them up."""


class NextVersion:
    """The version that follows an opened index, from a plan.

    Args:
        index: the old version.
        reader: embeddings of products that are new, changed, or as they were; None for none.
        meta: where all products given are from.
        plan: what to do.
        work: for what is unfinished.

    Attributes:
        count: products.
        rows: rows, empty ones included.
        compacted: whether empty rows are closed up.
        needed: whether it would be another one than the old version.
    """

    def __init__(
        self,
        index: ProductIndex,
        reader: EmbeddingReader | None,
        meta: Mapping[str, Any],
        plan: Plan,
        work: WorkFolder,
    ) -> None:
        self.index = index
        self.reader = reader
        self.meta = meta
        self.plan = plan
        self.work = work
        # A product replaced by the update leaves its old row empty, as a deleted one does.
        self.alive = index.id_table.alive()
        self.deleted_rows = plan.deleted_rows | ~self.alive
        self.count = int((~self.deleted_rows).sum()) + plan.num_new_rows
        self.whole = plan.num_new_rows + plan.unchanged == self.count
        """Whether all products of the new version were given.

        Whatever they are from describes all of them.
        """
        self.compacted = False
        self.rows = len(self.deleted_rows) + plan.num_new_rows
        self.attributes: list[AttributeProvider] = []
        self.needed = plan.changes
        self._sample: list[NDArray[np.float32]] = []
        if self.count == 0:
            raise ValueError(
                f"{index.path}: no product would be left; remove the index itself if that is meant"
            )

    def choose(self, compact: bool, attributes: Path | None) -> None:
        """Decide whether rows are closed up and where attributes come from."""
        meta = self.index.manifest.meta
        table = self.index.version / ATTRIBUTES_FILE
        if attributes is None:
            new = catalogue_provider(self.meta)
        else:
            new = open_provider(attributes)
        another = (
            self.whole and new is not None and self.meta.get("catalogue") != meta.get("catalogue")
        )
        # A new version is needed for other products, another catalogue, other attributes, or to
        # close up empty rows.
        self.needed |= (
            attributes is not None
            or (compact and not self.alive.all())
            or (another and table.exists())
        )
        if self.needed:
            flat = isinstance(self.index.engine.index, faiss.IndexFlat)
            self.compacted = flat or compact or self.count < (1 - COMPACT_ABOVE) * self.rows
            self.rows = self.count if self.compacted else self.rows
        # Attributes: those of all products replace the old ones, those of some products are put on
        # top.
        replaced = attributes is None and self.whole and new is not None
        if table.exists() and not replaced:
            name = f"{self.index.path} ({self.index.version.name})"
            self.attributes.append(
                TableProvider(AttributeTable(table), self.index.id_table.column, name)
            )
        if new is not None and (self.attributes or replaced or attributes is not None):
            # A few products must not get attributes where all others have none.
            self.attributes.append(new)

    def publish(self, measure: bool) -> dict[str, Any]:
        """Write it; returns the entries for its manifest.

        With `measure`, they hold the drift where lists are mapped.
        """
        index = self.index
        meta = {
            **index.manifest.meta,
            "format": FORMAT,
            "count": self.count,
            "rows": self.rows,
            **about_update(self),
        }
        with versions.publish(
            index.path, artefact_type=ARTEFACT_TYPE, meta=meta, base=index.version.name
        ) as folder:
            if isinstance(index.engine.index, faiss.IndexFlat):
                write_flat(folder, index, self.deleted_rows, self._new())
            else:
                check_resources(index, self.rows, self.plan.num_new_rows)
                self._write_mapped(folder)
            if self.attributes:
                meta["attributes"] = attach_attributes(folder, self.attributes)
            storage.write_bytes(
                folder / SETTINGS_FILE, (index.version / SETTINGS_FILE).read_bytes()
            )
            # Read back: whatever is lost on the way to a disk, no index is published that does not
            # open.
            engine = Engine.open(folder, meta)
            if measure and engine.ivf is not None:
                meta["drift"] = self._measure_points(engine)
        return meta

    def _measure_points(self, engine: Engine) -> dict[str, Any]:
        """The drift before and after, and the recommendation, for the manifest."""
        index = self.index
        known = index.manifest.meta.get("drift")
        if known:
            built = Drift.from_json(known["built"])
            before = Drift.from_json(known["after"])
        else:
            built = before = measure_drift(index.engine, index.settings, self.alive, index.metric)
        # Compacting closes the empty rows, so all remaining rows hold products.
        if self.compacted:
            kept = np.ones(self.rows - self.plan.num_new_rows, bool)
        else:
            kept = ~self.deleted_rows
        alive = np.concatenate([kept, np.ones(self.plan.num_new_rows, bool)])
        new = np.concatenate(self._sample) if self._sample else None
        after = measure_drift(engine, index.settings, alive, index.metric, new)
        states = {"built": built, "before": before, "after": after}
        return {
            **{name: state.to_json() for name, state in states.items()},
            "recommendation": recommendation(built, after),
        }

    def _write_mapped(self, folder: Path) -> None:
        trained = trained_quantizers(self.index)
        kept = ~self.deleted_rows
        if self.compacted:
            moved = np.where(kept, np.cumsum(kept) - 1, -1)
        else:
            moved = np.arange(len(kept))
        sources: list[PlacedVectors] = [(VersionVectors(self.index, self.deleted_rows), moved)]
        if self.plan.num_new_rows:
            sources.append((self._encoded(trained), self.rows - self.plan.num_new_rows))
        write_ivf_pq(folder, trained, sources)

    def _encoded(self, trained: TrainedQuantizers) -> Blocks:
        """What is new, encoded; earlier runs may have done a part."""
        folder = ShardFolder(
            self.work.path / "encoded", artefact_type="encoded", identity=self.work.identity
        )
        files = []
        # Blocks that an earlier run has encoded are kept.
        for name, batch, kept in self._new():
            if not folder.done(name):
                encoded = trained.encode(np.ascontiguousarray(batch.vectors[kept]))
                folder.write(
                    name, to_table(batch.ids.filter(pa.array(kept)), encoded, batch.digests()[kept])
                )
            files.append(folder.path / f"{name}.parquet")
        return Blocks(files)

    def _new(self) -> Iterable[tuple[str, EmbeddingBatch, NDArray[np.bool_]]]:
        """Name, embeddings and (B,) bool mask of what is new of them, block by block.

        The same in every run.
        """
        if self.reader is None:
            return
        batches = show_progress(
            self.reader.batches(BLOCK),
            self.reader.count,
            lambda batch: len(batch.ids),
            "add",
            "vectors",
        )
        self._sample = []
        # A sample of the new vectors measures the drift.
        chosen = np.random.default_rng(0).permutation(np.flatnonzero(self.plan.keep))[:SAMPLE]
        sampled = np.isin(np.arange(len(self.plan.keep)), chosen)
        first = 0
        for number, batch in enumerate(batches):
            of = slice(first, first + len(batch.ids))
            kept = self.plan.keep[of]
            first = of.stop
            if kept.any():
                self._sample.append(batch.vectors[sampled[of]])
                yield f"{number:06d}", batch, kept


def about_update(version: NextVersion) -> dict[str, Any]:
    """What the manifest keeps of an update, and of the catalogue that all products are from."""
    plan = version.plan
    meta = version.index.manifest.meta
    update = {
        "generation": meta.get("update", {}).get("generation", 0) + 1,
        "base": version.index.version.name,
        "added": plan.added,
        "replaced": plan.replaced,
        "unchanged": plan.unchanged,
        "deleted": plan.deleted,
        "compacted": version.compacted,
    }
    if not version.whole or version.meta.get("catalogue") is None:
        return {"update": update}
    hints = {**meta.get("hints", {}), **version.meta.get("hints", {})}
    return {"update": update, "catalogue": version.meta["catalogue"], "hints": hints}


def write_flat(
    folder: Path,
    index: ProductIndex,
    deleted: NDArray[np.bool_],
    added: Iterable[tuple[str, EmbeddingBatch, NDArray[np.bool_]]],
) -> None:
    """Write an exact index anew: it has no rows to spare.

    Args:
        folder: of the version.
        index: the old version.
        deleted: (N,) bool, rows of it that are left out.
        added: name, embeddings and (B,) bool mask of the products to add, block by block.
    """
    old = index.engine.index
    new = faiss.IndexFlatIP(index.dim)

    def products() -> Iterable[pa.Table]:
        row = 0
        # Copy the rows that stay, then add the new ones, and write their ids on the way.
        for part in product_tables(index, deleted):
            kept = ~deleted[row : row + len(part)]
            new.add(old.reconstruct_n(row, len(part))[kept])
            yield part.filter(pa.array(kept))
            row += len(part)
        for _, batch, kept in added:
            new.add(batch.vectors[kept])
            ids = batch.ids.filter(pa.array(kept))
            yield pa.table({"product_id": ids, "content": batch.digests()[kept]})

    write_products(folder / IDS_FILE, products())
    with storage.create(folder / INDEX_FILE) as file:
        faiss.write_index(new, faiss.PyCallbackIOWriter(file.write))


def check_resources(index: ProductIndex, rows: int, added: int) -> None:
    """Refuse an update that would not fit into memory or on the disk.

    Args:
        index: the old version.
        rows: rows of the new version.
        added: rows that are added.
    """
    spec = parse_ivf_pq(index.manifest.meta["factory"])
    assert spec is not None
    need = resources.predict(
        rows,
        index.dim,
        spec,
        sample=1,
        spill=index.engine.spill,
        block=BLOCK,
        grouping=GROUPING_BYTES,
    )
    # The new version takes the space of the old one, in proportion to its rows.
    size = sum(entry.bytes for entry in index.manifest.files.values())
    bytes_per_row = size / len(index.id_table)
    resources.check(replace(need, disk=int(bytes_per_row * (rows + added))), index.path)
