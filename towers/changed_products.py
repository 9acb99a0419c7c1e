"""Embed the products of a catalogue that are new to an index or have changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tritower.artefacts import storage
from tritower.datamodules.catalogue import Table, product_digests
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.updating.plan import known_digests
from tritower.retrieval.updating.update import Embedded
from tritower.retrieval.vectors.embeddings import EmbeddingReader, EmbeddingWriter
from tritower.terminal.progress import show_progress
from tritower.towers.embedding_shards import EmbedOptions, embed_rows, rows_by_shard
from tritower.towers.embedding_tables import ProductTable, whole_item
from tritower.towers.model_folder import load_model


class ChangedProducts:
    """The changed products of a prepared catalogue, embedded for an update.

    Args:
        model: model folder.
        catalogue: prepared catalogue.
        options: how to embed; one device, since only one process at a time updates an index.

    Raises:
        ArtefactError: no finished catalogue or model folder, or a damaged one.
    """

    def __init__(self, model: Path, catalogue: Path, options: EmbedOptions | None = None) -> None:
        self._model = model
        self._catalogue = catalogue
        self._options = options or EmbedOptions(devices=1)
        self.meta: Mapping[str, Any] = {
            "model": storage.read_manifest(model, "model").fingerprint,
            "catalogue": storage.verify(catalogue, "catalogue").fingerprint,
            "hints": {"model": str(model.resolve()), "catalogue": str(catalogue.resolve())},
        }

    def embed(self, index: ProductIndex, folder: Path) -> Embedded:
        """See `Catalogue`."""
        table = Table(self._catalogue / "products")
        ids = table.column("product_id").cast(pa.large_string())
        # Compare digests of the content: only products that differ are embedded.
        changed = _changed(table, *known_digests(index, index.rows_of(ids)))
        unchanged = ids.filter(pa.array(~changed))
        if not changed.any():
            return Embedded(None, unchanged)
        two_tower = load_model(self._model)
        made_by = {name: self.meta[name] for name in ("model", "catalogue")}
        writer = EmbeddingWriter(folder, dim=two_tower.embed_dim, metric=index.metric, **made_by)
        rows = rows_by_shard(table, np.flatnonzero(changed))
        data = ProductTable(table, two_tower.preprocess.product, whole_item)
        embed_rows(data, two_tower, table, rows, writer, self.meta["hints"], self._options)
        return Embedded(EmbeddingReader(folder), unchanged)


def _changed(table: Table, digests: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(N,) bool: products whose content is not the one with the digest that is known of them."""
    shards = show_progress(
        table.shards,
        len(table),
        lambda shard: pq.read_metadata(shard).num_rows,
        "compare",
        "products",
    )
    return ~known | (digests != np.concatenate([product_digests(shard) for shard in shards]))
