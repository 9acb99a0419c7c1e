"""Embedding a catalogue with a model folder: every row once, every query type, resumable."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.support.catalogues import SCHEMA, write_catalogue
from tests.support.read_embeddings import read
from tritower.artefacts import storage
from tritower.artefacts.storage import ArtefactError
from tritower.datamodules.batch import Item
from tritower.datamodules.catalogue import Table, product_item
from tritower.datamodules.tuning_queries import TuningQueries
from tritower.towers.embed import embed
from tritower.towers.embedding_shards import EmbedOptions
from tritower.towers.embedding_tables import ProductTable, TuningTable, whole_item
from tritower.towers.encoder import Encoder
from tritower.towers.model_folder import load_model, save_model
from tritower.towers.text import BiLSTM
from tritower.towers.two_tower import TwoTower


@pytest.fixture(scope="module")
def embedded(
    tiny_run: Path, tiny_catalogue: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("embeddings") / "E"
    embed(
        tiny_run / "model",
        tiny_catalogue,
        output,
        options=EmbedOptions(batch_size=50, accelerator="cpu"),
    )
    return output


def test_every_product_is_there_once_as_the_model_encodes_it(
    embedded: Path, tiny_run: Path, tiny_catalogue: Path
) -> None:
    table = Table(tiny_catalogue / "products")
    found = read(embedded / "products")
    assert [product_id for product_id, _ in found] == table.column("product_id").to_pylist()
    items = [product_item(table.row(row)) for row in range(len(table))]
    expected = load_model(tiny_run / "model").encode(items, "product")
    np.testing.assert_allclose(np.stack(list(found.values())), expected, atol=1e-3)


def test_every_kind_of_query_shows_what_it_says(
    embedded: Path, tiny_run: Path, tiny_catalogue: Path
) -> None:
    model = load_model(tiny_run / "model")
    products = Table(tiny_catalogue / "products")
    by_id = {i: row for row, i in enumerate(products.column("product_id").to_pylist())}
    expected: dict[tuple[str, str], Item] = {}
    queries = Table(tiny_catalogue / "queries")
    for query in (queries.row(row) for row in range(len(queries))):
        name = query["query_id"]
        if query["source_product_id"] is None:
            query_type = "image" if query["images"] else "text"
            expected[name, query_type] = Item(
                {"query": query["text"]} if query["text"] else {}, query["images"]
            )
            continue
        item = product_item(products.row(by_id[query["source_product_id"]]))
        views = {
            "fused": item,
            "product:text": Item(text=item.text),
            "product:image": Item(images=item.images),
            "product:attribute": Item(attributes=item.attributes),
        }
        expected |= {
            (name, query_type): view for query_type, view in views.items() if any(map(bool, view))
        }
    found = read(embedded / "queries")
    assert set(found) == set(expected)
    assert {query_type for _, query_type in found} == {
        "text",
        "image",
        "fused",
        "product:text",
        "product:image",
        "product:attribute",
    }
    vectors = model.encode(list(expected.values()), "query")
    for key, vector in zip(expected, vectors, strict=True):
        np.testing.assert_allclose(found[key], vector, atol=1e-3)


def test_some_products_ask_in_every_kind_to_tune_by(
    embedded: Path, tiny_run: Path, tiny_catalogue: Path
) -> None:
    products = Table(tiny_catalogue / "products")
    by_id = {i: row for row, i in enumerate(products.column("product_id").to_pylist())}
    tuning = TuningQueries(products, Table(tiny_catalogue / "queries"))
    found = read(embedded / "tuning")
    assert {by_id[product_id] for product_id, _ in found} == set(tuning.rows.tolist())
    assert {query_type for _, query_type in found} == {
        "text",
        "fused",
        "product:text",
        "product:image",
        "product:attribute",
    }
    expected: dict[tuple[str, str | None], Item] = {}
    for row in tuning.rows.tolist():
        item, name = product_item(products.row(row)), products.row(row)["product_id"]
        views = {
            "fused": item,
            "product:text": Item(text=item.text),
            "product:image": Item(images=item.images),
            "product:attribute": Item(attributes=item.attributes),
            "text": tuning.typed(row, item) or Item(),
        }
        expected |= {
            (name, query_type): view for query_type, view in views.items() if any(map(bool, view))
        }
    assert set(found) == set(expected)
    vectors = load_model(tiny_run / "model").encode(list(expected.values()), "query")
    for key, vector in zip(expected, vectors, strict=True):
        np.testing.assert_allclose(found[key], vector, atol=1e-3)


def test_no_judged_query_is_there_to_tune_by(embedded: Path, tiny_catalogue: Path) -> None:
    queries = Table(tiny_catalogue / "queries")
    sources = set(queries.column("source_product_id").to_pylist())
    assert not {product_id for product_id, _ in read(embedded / "tuning")} & sources
    judged = {" ".join(text.lower().split()) for text in queries.column("text").to_pylist() if text}
    products = Table(tiny_catalogue / "products")
    tuning = TuningQueries(products, queries)
    typed = [tuning.typed(row, product_item(products.row(row))) for row in range(len(products))]
    assert judged and not judged & {item.text["query"] for item in typed if item is not None}


def test_queries_to_tune_by_are_resumed_as_all_others(
    embedded: Path,
    tiny_run: Path,
    tiny_catalogue: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(embedded, tmp_path / "E")
    tuning = tmp_path / "E" / "tuning"
    (tuning / "manifest.json").unlink()
    (tuning / "shard-00001.parquet").unlink()
    kept = (tuning / "shard-00000.parquet").stat().st_mtime_ns
    rows: list[int] = []
    original = TuningTable.__getitem__
    monkeypatch.setattr(
        TuningTable, "__getitem__", lambda self, some: rows.extend(some) or original(self, some)
    )
    embed(
        tiny_run / "model",
        tiny_catalogue,
        tmp_path / "E",
        options=EmbedOptions(batch_size=7, accelerator="cpu"),
    )
    assert rows and min(rows) >= 60  # of the second shard
    assert (tuning / "shard-00000.parquet").stat().st_mtime_ns == kept
    whole, resumed = read(embedded / "tuning"), read(tuning)
    assert whole.keys() == resumed.keys()
    for key in whole:
        np.testing.assert_allclose(resumed[key], whole[key], atol=1e-3)


def test_features_of_what_is_typed_to_tune_by_are_cached(
    tiny_catalogue: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    text = BiLSTM(num_buckets=64, word_dim=4, hidden_dim=4)
    text.freeze()
    model = TwoTower(Encoder(32, text=text))
    model.set_schema(SCHEMA)
    save_model(model, tmp_path / "model")
    embed(
        tmp_path / "model",
        tiny_catalogue,
        tmp_path / "plain",
        options=EmbedOptions(accelerator="cpu"),
    )
    embed(
        tmp_path / "model",
        tiny_catalogue,
        tmp_path / "cached",
        options=EmbedOptions(accelerator="cpu", feature_cache=tmp_path / "F"),
    )
    plain, cached = (read(tmp_path / name / "tuning") for name in ("plain", "cached"))
    assert {query_type for _, query_type in plain} == {"text", "fused", "product:text"}
    assert plain.keys() == cached.keys()
    np.testing.assert_allclose(
        np.stack(list(plain.values())), np.stack(list(cached.values())), atol=1e-3
    )


def test_the_folders_know_their_model_and_catalogue(
    embedded: Path, tiny_run: Path, tiny_catalogue: Path
) -> None:
    for side in ("products", "queries", "tuning"):
        meta = storage.verify(embedded / side, artefact_type="embeddings").meta
        assert meta["model"] == storage.fingerprint(tiny_run / "model")
        assert meta["catalogue"] == storage.fingerprint(tiny_catalogue)
        assert (meta["dim"], meta["metric"]) == (32, "cosine")


def begin_again(embedded: Path, output: Path, without: str) -> None:
    """A job as it was before it finished one shard of the products."""
    shutil.copytree(embedded, output)
    (output / "products" / "manifest.json").unlink()
    (output / "products" / without).unlink()


def test_an_interrupted_job_makes_what_is_missing(
    embedded: Path,
    tiny_run: Path,
    tiny_catalogue: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin_again(embedded, tmp_path / "E", "shard-00001.parquet")
    untouched = tmp_path / "E" / "products" / "shard-00000.parquet"
    before = untouched.stat().st_mtime_ns
    rows = []
    original = ProductTable.__getitem__
    monkeypatch.setattr(
        ProductTable, "__getitem__", lambda self, some: rows.extend(some) or original(self, some)
    )
    embed(
        tiny_run / "model",
        tiny_catalogue,
        tmp_path / "E",
        options=EmbedOptions(batch_size=7, accelerator="cpu"),
    )
    assert rows == list(range(60, 120))
    assert untouched.stat().st_mtime_ns == before
    whole, resumed = read(embedded / "products"), read(tmp_path / "E" / "products")
    assert whole.keys() == resumed.keys()
    for key in whole:
        np.testing.assert_allclose(resumed[key], whole[key], atol=1e-3)


def test_a_finished_job_does_nothing(embedded: Path, tiny_run: Path, tiny_catalogue: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in embedded.rglob("*")}
    embed(tiny_run / "model", tiny_catalogue, embedded, options=EmbedOptions(accelerator="cpu"))
    assert {path: path.stat().st_mtime_ns for path in embedded.rglob("*")} == before


def text_model(folder: Path, seed: int = 1) -> Path:
    """A model that reads titles alone."""
    torch.manual_seed(seed)
    model = TwoTower(Encoder(32, text=BiLSTM(num_buckets=64, word_dim=4, hidden_dim=4)))
    model.set_schema(SCHEMA)
    save_model(model, folder)
    return folder


def test_shards_of_another_model_are_not_mixed_in(
    embedded: Path, tiny_catalogue: Path, tmp_path: Path
) -> None:
    begin_again(embedded, tmp_path / "E", "shard-00001.parquet")
    with pytest.raises(ArtefactError, match="model"):
        embed(
            text_model(tmp_path / "other"),
            tiny_catalogue,
            tmp_path / "E",
            options=EmbedOptions(accelerator="cpu"),
        )
    assert not (tmp_path / "E" / "products" / "shard-00001.parquet").exists()


def test_the_size_of_batches_does_not_matter(tiny_catalogue: Path, tmp_path: Path) -> None:
    model = text_model(tmp_path / "model")
    for batch_size in (1, 256):
        embed(
            model,
            tiny_catalogue,
            tmp_path / f"E{batch_size}",
            options=EmbedOptions(batch_size=batch_size, accelerator="cpu"),
        )
    for side in ("products", "queries", "tuning"):
        one, many = (read(tmp_path / f"E{size}" / side) for size in (1, 256))
        assert one.keys() == many.keys()
        np.testing.assert_allclose(
            np.stack(list(one.values())), np.stack(list(many.values())), atol=1e-3
        )


def test_what_the_model_cannot_read_is_reported(
    tiny_catalogue: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Photo queries mean nothing to a model of titles; a product without title keeps its row."""
    catalogue = tmp_path / "C"
    shutil.copytree(tiny_catalogue, catalogue)
    shard = catalogue / "products" / "shard-00000.parquet"
    table = pq.read_table(shard)
    text = pa.array([None, *table["text"].to_pylist()[1:]], table.schema.field("text").type)
    column = table.schema.get_field_index("text")
    pq.write_table(table.set_column(column, table.schema.field("text"), text), shard)
    (catalogue / "manifest.json").unlink()
    storage.seal(catalogue, artefact_type="catalogue")
    with caplog.at_level(logging.INFO, logger="tritower.towers.embedding_shards"):
        embed(
            text_model(tmp_path / "model"),
            catalogue,
            tmp_path / "E",
            options=EmbedOptions(accelerator="cpu"),
        )
    assert "1 products have nothing that this model reads" in caplog.text
    query_types = {query_type for _, query_type in read(tmp_path / "E" / "queries")}
    assert query_types == {"text", "fused", "product:text"}
    queries = Table(catalogue / "queries")
    photos = sum(bool(queries.row(row)["images"]) for row in range(len(queries)))
    unread = int(caplog.text.split(" queries show nothing")[0].split()[-1])
    assert unread >= photos
    assert len(read(tmp_path / "E" / "products")) == 120


def test_a_view_limits_what_is_shown(
    embedded: Path, tiny_run: Path, tiny_catalogue: Path, tmp_path: Path
) -> None:
    embed(
        tiny_run / "model",
        tiny_catalogue,
        tmp_path / "E",
        options=EmbedOptions(accelerator="cpu"),
        product_view=lambda item: item._replace(images=()),
        query_view=whole_item,
    )
    table = Table(tiny_catalogue / "products")
    with_picture = [row for row in range(120) if table.row(row)["images"]]
    whole, blind = (
        np.stack(list(read(folder / "products").values())) for folder in (embedded, tmp_path / "E")
    )
    difference = np.abs(whole - blind).max(1)
    assert difference[with_picture].min() > 1e-2
    assert np.delete(difference, with_picture).max() < 1e-3


def test_shards_without_rows_are_skipped(tmp_path: Path) -> None:
    catalogue = write_catalogue(tmp_path / "C", num_groups=10, queries=False)
    table = pq.read_table(catalogue / "products" / "shard-00000.parquet")
    pq.write_table(table.slice(0, 0), catalogue / "products" / "shard-00002.parquet")
    (catalogue / "manifest.json").unlink()
    storage.seal(catalogue, artefact_type="catalogue")
    embed(
        text_model(tmp_path / "model"),
        catalogue,
        tmp_path / "E",
        options=EmbedOptions(accelerator="cpu"),
    )
    assert len(read(tmp_path / "E" / "products")) == 20
    assert not (tmp_path / "E" / "queries").exists()
    assert {query_type for _, query_type in read(tmp_path / "E" / "tuning")} == {
        "text",
        "fused",
        "product:text",
    }


def test_a_folder_that_is_no_catalogue_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="of type 'model'; expected 'catalogue'"):
        embed(
            tiny_run / "model",
            tiny_run / "model",
            tmp_path / "E",
            options=EmbedOptions(accelerator="cpu"),
        )
