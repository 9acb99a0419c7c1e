"""Read a prepared catalogue: any row by its number, in bounded memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cachetools import LRUCache

from tritower.datamodules.batch import NO_KEY, Item
from tritower.datamodules.preprocess import stable_hash


class Table:
    """The rows of a folder of Parquet shards by row number: 0 is the first row of the first shard.

    Row groups that were read stay in memory until `cached_groups` others were; readers that walk
    the rows in windows (see `tritower.datamodules.stream`) read each group once. Picklable: files
    are opened where they are used.

    Args:
        folder: of `shard-*.parquet` files, in the order of their names.
        cached_groups: how many row groups stay in memory.

    Raises:
        FileNotFoundError: no shards.
    """

    def __init__(self, folder: Path, cached_groups: int = 64) -> None:
        self.shards = sorted(folder.glob("shard-*.parquet"))
        if not self.shards:
            raise FileNotFoundError(
                f"No shard-*.parquet in {folder}. Make it with: python -m datamodules.prepare"
            )
        self.cached_groups = cached_groups
        sizes = []
        self.groups = []
        self.shard_starts = [0]
        # Row numbers run through all row groups of all shards.
        for number, shard in enumerate(self.shards):
            metadata = pq.read_metadata(shard)
            self.groups += [(number, group) for group in range(metadata.num_row_groups)]
            sizes += [
                metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)
            ]
            self.shard_starts.append(self.shard_starts[-1] + metadata.num_rows)
        self.group_starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._cache: LRUCache[int, list[dict[str, Any]]] = LRUCache(cached_groups)

    def __len__(self) -> int:
        return int(self.group_starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": LRUCache(self.cached_groups)}

    def row(self, number: int) -> dict[str, Any]:
        """Row `number` as plain data."""
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of a table of {len(self)} rows")
        group = int(np.searchsorted(self.group_starts, number, side="right")) - 1
        return self._group(group)[number - int(self.group_starts[group])]

    @property
    def names(self) -> list[str]:
        """Of all columns."""
        return list(pq.read_schema(self.shards[0]).names)

    def column(self, name: str) -> pa.ChunkedArray:
        """A whole column; for ids, splits and keys, not for texts and pictures."""
        return pa.chunked_array(
            [chunk for s in self.shards for chunk in pq.read_table(s, columns=[name])[name].chunks]
        )

    def _group(self, group: int) -> list[dict[str, Any]]:
        if group not in self._cache:
            shard, number = self.groups[group]
            with pq.ParquetFile(self.shards[shard]) as file:
                self._cache[group] = file.read_row_group(number).to_pylist()
        return self._cache[group]


def product_item(row: Mapping[str, Any]) -> Item:
    """A row of `products/` as an item: what is null or empty is left out."""
    attributes = row.get("attributes") or {}
    return Item(
        text={field: text for field, text in (row.get("text") or {}).items() if text},
        images=tuple(row.get("images") or ()),
        attributes={
            name: value for name, value in attributes.items() if value not in (None, "", [])
        },
    )


def item_digest(item: Item) -> int:
    """A signed 64-bit digest of all that a model may see of an item.

    Another one where anything has changed.
    """
    facts = {}
    for name, value in item.attributes.items():
        facts[name] = list(value) if isinstance(value, tuple) else value
    data = json.dumps(
        [dict(item.text), facts], sort_keys=True, ensure_ascii=False, default=list
    ).encode()
    digest = hashlib.blake2b(data, digest_size=8)
    for image in item.images:
        digest.update(len(image).to_bytes(8, "little"))
        digest.update(image)
    return int.from_bytes(digest.digest(), "little", signed=True)


def product_digests(shard: Path) -> np.ndarray:
    """(B,) int64 `item_digest` of the products in a shard, read a few at a time."""
    with pq.ParquetFile(shard) as file:
        batches = (batch.to_pylist() for batch in file.iter_batches(256))
        return np.fromiter(
            (item_digest(product_item(row)) for rows in batches for row in rows), np.int64
        )


def query_item(row: Mapping[str, Any]) -> Item:
    """A row of `queries/` as an item; a product query has no content of its own."""
    return Item(
        text={"query": row["text"]} if row["text"] else {}, images=tuple(row["images"] or ())
    )


def product_keys(row: Mapping[str, Any]) -> list[int]:
    """The keys of a row of `products/`, one for each of `RELATIONS`.

    No query finds it by itself.
    """
    text = row.get("text") or {}
    images = row.get("images")
    title = next(iter(text.values()), None)
    # In the order of `RELATIONS`.
    return [
        stable_hash(row["product_id"]),
        *(
            stable_hash(row[relation]) if row[relation] else NO_KEY
            for relation in ("group", "family")
        ),
        stable_hash(" ".join(title.lower().split())) if title else NO_KEY,
        stable_hash(images[0]) if images else NO_KEY,
        *attribute_keys(row.get("attributes") or {}),
        NO_KEY,
    ]


MODEL = ("model", "model_number", "mpn", "part_number", "style_number")
"""Attributes that, with the brand, name a thing."""


def attribute_keys(attributes: Mapping[str, Any]) -> list[int]:
    """The keys `model`, `category` and `branch` of a product's attributes."""
    brand = attributes.get("brand")
    path = attributes.get("category")
    model = next((attributes[name] for name in MODEL if attributes.get(name)), None)
    if isinstance(path, str) and path:
        levels = [path]
    else:
        levels = list(path or ())
    # Brand and model number, category, and the category above it.
    return [
        stable_hash(f"{brand}\0{model}".lower()) if brand and model else NO_KEY,
        stable_hash("\0".join(levels)) if levels else NO_KEY,
        stable_hash("\0".join(levels[:-1])) if levels[1:] else NO_KEY,
    ]
