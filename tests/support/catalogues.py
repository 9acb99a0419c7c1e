"""A small prepared catalogue, written directly: tests of the model need no preparing."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tritower.artefacts.storage import new_folder
from tritower.datamodules.schema import Attribute, Schema

COLOURS = {
    "red": (200, 30, 30),
    "green": (30, 160, 40),
    "blue": (30, 40, 200),
    "yellow": (230, 210, 40),
}
PRODUCT_TYPES = ("mug", "lamp", "chair", "bag", "shirt")
BRANDS = ("Acme", "Zed", "Nord", "Lumen", "Kito", "Orla")

SCHEMA = Schema(
    text=("title", "description"),
    images=True,
    attributes=(
        Attribute(
            "price", "number", log=True, mean=3.0, std=0.7, minimum=5.0, maximum=99.0, present=0.9
        ),
        Attribute("brand", "category", present=0.9),
        Attribute("category", "path", present=1.0),
        Attribute("tags", "set", present=0.5),
    ),
)


def picture(color: tuple[int, int, int], rng: np.random.Generator, size: int = 32) -> bytes:
    """A JPEG with a square of one color somewhere on light gray."""
    pixels = np.full((size, size, 3), 235, np.uint8)
    left, top = rng.integers(0, size // 2, 2)
    pixels[top : top + size // 2, left : left + size // 2] = color
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_catalogue(
    folder: Path, num_groups: int = 60, seed: int = 0, shards: int = 2, queries: bool = True
) -> Path:
    """Two offers of each thing; text, picture and attributes each tell something of it."""
    rng = np.random.default_rng(seed)
    rows = []
    for group in range(num_groups):
        color, product_type = list(COLOURS)[rng.integers(4)], PRODUCT_TYPES[rng.integers(5)]
        brand, price = BRANDS[rng.integers(6)], float(rng.uniform(5, 99))
        split = (
            "train" if group < num_groups * 0.6 else "val" if group < num_groups * 0.8 else "test"
        )
        for offer in range(2):
            rows.append(
                {
                    "product_id": f"{group:03d}-{offer}",
                    "group": f"g{group}",
                    "family": f"f{group // 2}",
                    "split": split,
                    "text": {
                        "title": f"{product_type} {'by' if offer else 'from'} {brand} no {group}",
                        "description": f"A fine {product_type}." if offer else None,
                    },
                    "images": [picture(COLOURS[color], rng) for _ in range(1 + offer)]
                    if group % 7
                    else [],
                    "attributes": {
                        "price": price + offer if group % 5 else None,
                        "brand": brand if offer or group % 3 else None,
                        "category": ["home", product_type],
                        "tags": [color, product_type] if offer else [],
                    },
                }
            )
    schema = pa.schema(
        [
            ("product_id", pa.string()),
            ("group", pa.string()),
            ("family", pa.string()),
            ("split", pa.string()),
            ("text", pa.struct([("title", pa.string()), ("description", pa.string())])),
            ("images", pa.list_(pa.binary())),
            (
                "attributes",
                pa.struct(
                    [
                        ("price", pa.float64()),
                        ("brand", pa.string()),
                        ("category", pa.list_(pa.string())),
                        ("tags", pa.list_(pa.string())),
                    ]
                ),
            ),
        ]
    )
    with new_folder(folder, artefact_type="catalogue") as new:
        (new / "products").mkdir()
        bounds = np.linspace(0, len(rows), shards + 1).astype(int)
        for shard in range(shards):
            table = pa.Table.from_pylist(rows[bounds[shard] : bounds[shard + 1]], schema)
            pq.write_table(
                table, new / "products" / f"shard-{shard:05d}.parquet", row_group_size=16
            )
        SCHEMA.save(new / "schema.json")
        if queries:
            write_queries(new, rows, rng)
    return folder


def write_queries(folder: Path, rows: list[dict], rng: np.random.Generator) -> None:
    """A typed text for every third thing, a photo for others, and every first offer as a query."""
    queries, qrels = [], []
    for row in rows:
        group, offer = int(row["group"][1:]), int(row["product_id"][-1])
        if offer:
            continue
        query_type = (
            "product"
            if group % 3 == 0
            else "text"
            if group % 3 == 1 or not row["images"]
            else "image"
        )
        query_id = f"{query_type}-{group}"
        queries.append(
            {
                "query_id": query_id,
                "split": row["split"],
                "text": row["text"]["title"] if query_type == "text" else None,
                "images": [row["images"][0]] if query_type == "image" else [],
                "source_product_id": row["product_id"] if query_type == "product" else None,
            }
        )
        qrels.append({"query_id": query_id, "product_id": f"{group:03d}-1", "relevance": 3.0})
        if query_type != "product":
            qrels.append({"query_id": query_id, "product_id": f"{group:03d}-0", "relevance": 3.0})
        other = rows[int(rng.integers(len(rows)))]["product_id"]
        if not other.startswith(f"{group:03d}"):
            qrels.append({"query_id": query_id, "product_id": other, "relevance": 1.0})
    (folder / "queries").mkdir()
    schema = pa.schema(
        [
            ("query_id", pa.string()),
            ("split", pa.string()),
            ("text", pa.string()),
            ("images", pa.list_(pa.binary())),
            ("source_product_id", pa.string()),
        ]
    )
    pq.write_table(
        pa.Table.from_pylist(queries, schema), folder / "queries" / "shard-00000.parquet"
    )
    judged = pa.schema(
        [("query_id", pa.string()), ("product_id", pa.string()), ("relevance", pa.float32())]
    )
    pq.write_table(pa.Table.from_pylist(qrels, judged), folder / "qrels.parquet")
