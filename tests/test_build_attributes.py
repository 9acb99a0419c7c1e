"""The attributes an index is built with: whose they are, row by row."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.embedded import write_embeddings
from tritower.artefacts.storage import ArtefactError
from tritower.retrieval.building.build import build_index
from tritower.retrieval.building.options import BuildOptions
from tritower.retrieval.filtering.filters import parse
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.products.attribute_table import ATTRIBUTES_FILE, AttributeTable, Numbers
from tritower.retrieval.vectors.embeddings import EmbeddingReader


@pytest.fixture(scope="module")
def products(tiny_catalogue, tmp_path_factory):
    return (
        write_embeddings(tiny_catalogue, tmp_path_factory.mktemp("embeddings") / "of-tiny")
        / "products"
    )


def build(products, folder, **options):
    """The opened index with its table of attributes, None where it has none."""
    build_index(EmbeddingReader(products), folder, **options)
    index = ProductIndex.open(folder)
    file = index.version / ATTRIBUTES_FILE
    return index, AttributeTable(file) if file.exists() else None


def catalogue_rows(catalogue):
    tables = [pq.read_table(file) for file in sorted((catalogue / "products").glob("*.parquet"))]
    return {row["product_id"]: row for row in pa.concat_tables(tables).to_pylist()}


@pytest.mark.parametrize(
    "options", [None, BuildOptions(factory="IVF4,PQ4x4fsr,Refine(SQ8)", nprobe=4)]
)
def test_the_catalogue_that_was_embedded_gives_the_attributes(
    products, tiny_catalogue, tmp_path, options
):
    index, table = build(products, tmp_path / "index", options=options)
    known = catalogue_rows(tiny_catalogue)
    ids = index.id_table.column.to_pylist()
    assert table.attribute_types == {
        "group": "category",
        "family": "category",
        "price": "number",
        "brand": "category",
        "category": "path",
        "tags": "set",
    }
    assert index.manifest.meta["attributes"] == {
        "attribute_types": table.attribute_types,
        "rows_without": 0,
    }
    cheap = [(known[i]["attributes"]["price"] or np.inf) < 50 for i in ids]
    assert parse("price < 50").mask(table).tolist() == cheap
    assert table.decoded("group", np.arange(len(ids))).to_pylist() == [
        known[i]["group"] for i in ids
    ]


def test_a_file_gives_the_attributes_by_id_in_whatever_order(products, tmp_path, caplog):
    ids = [f"{group:03d}-{offer}" for group in range(60) for offer in range(2)]
    order = np.random.default_rng(0).permutation(100)
    file = tmp_path / "stock.csv"
    file.write_text("id,stock\n" + "".join(f"{ids[i]},{i}\n" for i in order))
    with caplog.at_level(logging.WARNING, "tritower"):
        index, table = build(products, tmp_path / "index", attributes=file)
    assert "20 of 120 products are not in" in caplog.text
    column = table.column("stock")
    assert isinstance(column, Numbers)
    expected = {product_id: float(i) for i, product_id in enumerate(ids[:100])}
    found = dict(zip(index.id_table.column.to_pylist(), column.values.tolist(), strict=True))
    assert {i: value for i, value in found.items() if not np.isnan(value)} == expected
    assert index.manifest.meta["attributes"] == {
        "attribute_types": {"stock": "number"},
        "rows_without": 20,
    }


def test_a_catalogue_that_is_gone_or_another_gives_none(tiny_catalogue, tmp_path):
    copy = tmp_path / "catalogue"
    shutil.copytree(tiny_catalogue, copy)
    products = write_embeddings(copy, tmp_path / "embeddings") / "products"
    manifest = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(manifest.replace('"catalogue"', '"index"', 1))
    index, table = build(products, tmp_path / "another")
    assert table is None and "attributes" not in index.manifest.meta
    shutil.rmtree(copy)
    assert build(products, tmp_path / "gone")[1] is None


def test_a_named_catalogue_is_taken_wherever_it_lies(products, tiny_catalogue, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(tiny_catalogue, moved)
    table = build(products, tmp_path / "index", attributes=moved)[1]
    assert table.count == 120 and (table.group_codes() >= 0).all()


def test_attributes_that_cannot_be_read_are_refused_before_anything_is_built(products, tmp_path):
    with pytest.raises(
        ValueError, match=r"nowhere\.csv: expected a \.parquet, \.csv or \.tsv file"
    ):
        build(products, tmp_path / "index", attributes=tmp_path / "nowhere.csv")
    with pytest.raises(ArtefactError):
        build(products, tmp_path / "index", attributes=products)
    assert not (tmp_path / "index").exists()


def test_an_id_that_a_file_has_twice_leaves_no_index(products, tmp_path):
    file = tmp_path / "twice.csv"
    file.write_text("id,stock\n000-0,1\n000-0,2\n")
    with pytest.raises(ValueError, match="'000-0' is there more than once"):
        build(products, tmp_path / "index", attributes=file)
    assert not (tmp_path / "index").exists()
