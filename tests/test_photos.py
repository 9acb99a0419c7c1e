"""The benchmark of shop photos.

Which products are new to a model, and what a classifier's figures are made of.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tritower.datamodules.catalogue import Table
from tritower.datamodules.prepare.command import JudgedFiles, prepare
from tritower.retrieval.vectors.embeddings import EmbeddingWriter
from tritower.towers.validation import HeldOutEmbeddings

photos = importlib.import_module("benchmarks.photos")


def write(file: Path, *rows: dict[str, str]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_new_products_and_their_photos_are_of_no_training(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    (raw / "images").mkdir(parents=True)
    ids = [f"p{number}" for number in range(photos.NEW + 3)]
    asked = [(f"{split}-{i}", i, split) for i in ids for split in ("train", "val", "test")]
    write(raw / "products.csv", *({"id": i, "title": i, "split": "train"} for i in ids))
    write(
        raw / "queries.csv", *({"query_id": q, "text": q, "split": split} for q, _, split in asked)
    )
    write(
        raw / "photos.csv",
        *({"photo_id": q, "product_id": i, "split": split} for q, i, split in asked),
    )
    write(
        raw / "qrels.csv",
        *({"query_id": q, "product_id": i, "relevance": "3"} for q, i, _ in asked),
    )
    new = photos.without_new(raw, tmp_path / "new")
    assert new == sorted(ids, key=lambda i: hashlib.sha256(i.encode()).hexdigest())[: photos.NEW]
    kept = [i for i in ids if i not in new]
    tables = {name: tmp_path / "new" / f"{name}.csv" for name in ("products", "queries", "qrels")}
    prepare(
        tables["products"],
        tmp_path / "catalogue",
        JudgedFiles(queries=tables["queries"], qrels=tables["qrels"]),
    )
    products, queries = (Table(tmp_path / "catalogue" / side) for side in ("products", "queries"))
    trained, trained_photos = (
        {row[column] for row in map(table.row, range(len(table))) if row["split"] == "train"}
        for table, column in ((products, "product_id"), (queries, "query_id"))
    )
    assert (trained, trained_photos) == (set(kept), {f"train-{i}" for i in kept})
    assert (len(products), len(queries)) == (len(ids), len(asked))
    assert tables["qrels"].read_bytes() == (raw / "qrels.csv").read_bytes()


def test_ranks_count_the_products_that_are_nearer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def embed(model: Path, catalogue: Path, folder: Path) -> None:
        for side, column, vectors in (
            ("products", "product_id", {"a": [1, 0], "b": [0, 1], "c": [0.8, 0.6]}),
            ("queries", "query_id", {"1": [1, 0], "2": [0, 1], "3": [0.8, 0.6], "4": [1, 0]}),
        ):
            writer = EmbeddingWriter(
                folder / side, dim=2, model="m", catalogue="c", id_column=column
            )
            writer.write("shard-00000", list(vectors), np.array(list(vectors.values()), np.float32))
            writer.finish(["shard-00000"])

    monkeypatch.setattr(photos, "embed", embed)
    asked = [("1", "b", "val"), ("2", "b", "val"), ("3", "a", "val"), ("4", "a", "test")]
    write(
        tmp_path / "photos.csv",
        *({"photo_id": q, "product_id": p, "split": s} for q, p, s in asked),
    )
    bench = SimpleNamespace(prepared=tmp_path, raw=tmp_path, split="val")
    found = photos.ranks(tmp_path / "model", bench, tmp_path / "embeddings")
    assert found == {"b": [2, 0], "a": [1]}
    assert [photos.hit(found.values(), k) for k in (1, 2, 3)] == [0.3333, 0.6667, 1.0]


def test_a_classifiers_embeddings_are_logits_and_classes() -> None:
    """So their products are the logits of each query, in the order of the catalogue."""
    model = photos.Classifier.__new__(photos.Classifier)
    nn.Module.__init__(model)
    model.class_of = {10: 0, 11: 1, 12: 2}
    logits = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]])
    model.logits = lambda items: logits
    model.held_out = HeldOutEmbeddings()
    for loader, rows in enumerate((torch.tensor([0, 1]), torch.tensor([2, 0, 1]))):
        model.validation_step(SimpleNamespace(items=None, row=rows), 0, loader)
    _, queries = model.held_out.gather(0)
    order, classes = model.held_out.gather(1)
    assert model.embed_dim == 3 and order.tolist() == [0, 1, 2]
    torch.testing.assert_close(torch.from_numpy(queries.scores(classes)), logits)
