"""New splits of a catalogue: families stay together, and nothing typed is trained on."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.command import Folders
from benchmarks.ledger import Ledger
from benchmarks.splits import NewSplits
from tritower.datamodules.catalogue import Table

catalogues = importlib.import_module("benchmarks.catalogues")

FAMILIES, MATES, TYPED = 40, 3, 60


def write(file: Path, rows: list[dict[str, str]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of catalogues with one in it, all of whose rows say that they are of train."""
    folder = tmp_path_factory.mktemp("data") / "shop"
    (folder / "images").mkdir(parents=True)
    ids = [f"p{family}-{mate}" for family in range(FAMILIES) for mate in range(MATES)]
    for number, product in enumerate(ids):
        picture = Image.new("RGB", (16, 16), (number, 255 - number, 7))
        picture.save(folder / "images" / f"{product}.png")
    write(
        folder / "products.csv",
        [
            {
                "id": product,
                "title": f"mug no {product}",
                "image": f"images/{product}.png",
                "family_id": product.split("-")[0],
                "split": "train",
            }
            for product in ids
        ],
    )
    same = {"text": "", "split": "train"}
    asked = [
        *({"query_id": f"same-{i}", "source_product_id": i, **same} for i in ids),
        *(
            {
                "query_id": f"typed-{n}",
                "text": f"mugs {n}",
                "source_product_id": "",
                "split": "train",
            }
            for n in range(TYPED)
        ),
    ]
    write(folder / "queries.csv", asked)
    write(
        folder / "qrels.csv",
        [
            {"query_id": row["query_id"], "product_id": ids[n % len(ids)], "relevance": "1"}
            for n, row in enumerate(asked)
        ],
    )
    return folder.parent


def prepared(raw: Path, work: Path, salt: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split of each product and of each query."""
    results = catalogues.Results(work / "figures.json", Ledger(work / "reads.json"))
    splits = NewSplits(salt, val_share=0.2, test_share=0.3)
    catalogue = catalogues.Catalogue("shop", seeds=1, splits=splits)
    folders = Folders(raw, work, work / "figures.json", work)
    options = catalogues.BenchOptions(quick=True)
    bench = catalogues.Bench(catalogue, folders, "val", results, options)
    bench.prepare()
    assert bench.prepared == work / "catalogues" / f"shop-{salt}"
    tables = (Table(bench.prepared / side) for side in ("products", "queries"))
    products, queries = ([table.row(number) for number in range(len(table))] for table in tables)
    return (
        {row["product_id"]: row["split"] for row in products},
        {row["query_id"]: row["split"] for row in queries},
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def first(raw: Path, work: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return prepared(raw, work, salt=1)


def test_families_are_of_one_split_and_all_splits_have_some(
    first: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    products, _ = first
    for family in range(FAMILIES):
        assert len({products[f"p{family}-{mate}"] for mate in range(MATES)}) == 1
    assert set(products.values()) == {"train", "val", "test"}
    trained = list(products.values()).count("train") / len(products)
    assert trained == pytest.approx(0.5, abs=0.2)


def test_typed_queries_are_of_val_or_test_and_mostly_of_test(
    first: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    typed = [split for query, split in first[1].items() if query.startswith("typed")]
    assert set(typed) == {"val", "test"}
    assert typed.count("test") == pytest.approx(0.7 * TYPED, abs=0.15 * TYPED)


def test_products_that_ask_follow_their_product(
    first: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    products, queries = first
    assert all(queries[f"same-{product}"] == split for product, split in products.items())


def test_another_salt_gives_another_division_beside_the_first(
    raw: Path, work: Path, first: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    before = (raw / "shop" / "products.csv").read_bytes()
    products, queries = prepared(raw, work, salt=2)
    assert products.keys() == first[0].keys() and products != first[0]
    typed = [query for query in queries if query.startswith("typed")]
    assert any(queries[query] != first[1][query] for query in typed)
    assert (raw / "shop" / "products.csv").read_bytes() == before
    assert (work / "catalogues" / "shop-1").is_dir()
