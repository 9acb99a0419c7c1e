"""Embed the products of a catalogue that are new to an index or have changed since, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from datamodules.batch import Item
from datamodules.parquet import Table, item_digest, product_item
from retrieval import files, storage
from retrieval.embeddings import EmbeddingWriter
from retrieval.index import ProductIndex
from retrieval.progress import counted
from towers.model_folder import load_model
from towers.two_tower import TwoTower, to_device


class Changed(NamedTuple):
    """Embeddings of what has changed.

    Attributes:
        folder: their embeddings folder, to be removed when they are in the index; None where nothing has changed.
        unchanged: number of products that the index holds as they are.
    """

    folder: Path | None
    unchanged: int


class Rows(NamedTuple):
    """Some rows of a shard: B ids, B items and B digests."""

    ids: list[str]
    items: list[Item]
    digests: list[int]


def embed_changes(model: Path, catalogue: Path, index: ProductIndex, batch_size: int = 256) -> Changed:
    """Embed the products whose digest is not the one that the index remembers.

    Shard after shard is written beside the index; the same call goes on after a kill.

    Args:
        model: model folder; its fingerprint was compared with the index's.
        catalogue: prepared catalogue.
        index: what is to be updated.
        batch_size: products at a time.

    Raises:
        ArtefactError: no finished catalogue or model folder.
    """
    fingerprint = storage.verify(catalogue, "catalogue").fingerprint
    table = Table(catalogue / "products")
    two_tower = load_model(model)
    folder = _place(index)
    writer = EmbeddingWriter(
        folder, dim=two_tower.embed_dim, model=storage.fingerprint(model), catalogue=fingerprint, metric=index.metric
    )
    known = index.all_ids().combine_chunks()
    digests = index.contents()
    written, unchanged = [], 0
    batches = counted(table.shards, len(table), lambda shard: pq.read_metadata(shard).num_rows, "compare", "products")
    for shard in batches:
        changed, same = _changed(shard, known, digests)
        unchanged += same
        if changed.ids:
            written.append(shard.stem)
            if not writer.done(shard.stem):
                writer.write(
                    shard.stem, changed.ids, _encode(two_tower, changed.items, batch_size), None, changed.digests
                )
    if not written:
        files.remove(folder)
        return Changed(None, unchanged)
    writer.finish(written, {"model": str(model.resolve()), "catalogue": str(catalogue.resolve())})
    return Changed(folder, unchanged)


def _changed(shard: Path, known: pa.Array, digests: np.ndarray) -> tuple[Rows, int]:
    """The rows of a shard that the index does not hold as they are, and the number of those it does."""
    ids: list[str] = []
    items: list[Item] = []
    found: list[int] = []
    same = 0
    for batch in pq.ParquetFile(shard).iter_batches(256):
        rows = pc.fill_null(pc.index_in(batch.column("product_id"), value_set=known), -1).to_pylist()
        for record, row in zip(batch.to_pylist(), rows, strict=True):
            item = product_item(record)
            digest = item_digest(item)
            if row >= 0 and digests[row] == digest:
                same += 1
                continue
            ids.append(record["product_id"])
            items.append(item)
            found.append(digest)
    return Rows(ids, items, found), same


@torch.inference_mode()
def _encode(two_tower: TwoTower, items: list[Item], batch_size: int) -> np.ndarray:
    """(B, D) float32 embeddings of products."""
    two_tower.eval()
    preprocess = two_tower.product.preprocess("product")
    return np.concatenate(
        [
            two_tower.product(to_device(preprocess(part), two_tower.device)).embedding.float().cpu().numpy()
            for part in _parts(items, batch_size)
        ]
    )


def _parts(items: list[Item], size: int) -> Iterator[list[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _place(index: ProductIndex) -> Path:
    """Where the embeddings of what has changed since a version go; those since other versions are removed."""
    root = index.path.absolute()
    place = root.with_name(f"{root.name}.updating-{index.version.name}")
    for other in root.parent.glob(f"{root.name}.updating-*"):
        if other != place:
            files.remove(other)
    return place
