"""Search with nothing trained.

Blocks, their weights, and the pretrained towers that a model began with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.catalogues import SCHEMA, write_catalogue
from tests.support.tiny_models import write_bert
from tests.support.training import TEXT_ONLY, fit
from tritower.datamodules.batch import Item
from tritower.datamodules.catalogue import Table, product_item
from tritower.retrieval.evaluating.evaluation_queries import EvaluationQueries
from tritower.retrieval.evaluating.untrained_inputs import UntrainedInputs, number_features
from tritower.retrieval.evaluating.untrained_search import (
    UntrainedSearch,
    UntrainedSettings,
    choose_weights,
    top_hits,
    weighted_sum,
)
from tritower.retrieval.lexical.records import typed_record
from tritower.retrieval.lexical.tokenizer import tokenize
from tritower.retrieval.vectors.embeddings import EmbeddingReader
from tritower.towers.embed import embed
from tritower.towers.embedding_shards import EmbedOptions
from tritower.towers.encoder import Encoder
from tritower.towers.hugging_face import HuggingFaceText
from tritower.towers.model_folder import load_model, load_untrained, save_model
from tritower.towers.text import BiLSTM
from tritower.towers.two_tower import TwoTower
from tritower.towers.untrained import untrained_features, untrained_towers

NONE_ASKED = np.full(1, -1)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


# ---------------------------------------------------------------- blocks


def test_close_numbers_have_close_features_and_missing_ones_have_none() -> None:
    values = np.array(
        [[10.0, np.nan], [10.3, np.nan], [20.0, np.nan], [np.nan, np.nan], [0.0, 5.0]]
    )
    features = number_features(values)
    scores = features @ features.T
    ratio = np.log(10.3 / 10.0)
    by_hand = np.mean([np.cos(2.0**octave * ratio) for octave in range(7)])
    assert scores[0, 0] == pytest.approx(1, abs=1e-6)
    assert scores[0, 1] == pytest.approx(by_hand, abs=1e-5)
    assert scores[0, 1] > scores[0, 2] > -1
    assert not features[3].any() and scores[0, 4] == 0  # of another attribute


def test_the_best_products_are_those_of_a_full_sort() -> None:
    generator = np.random.default_rng(0)
    scores = np.round(generator.standard_normal((30, 50)), 1).astype(np.float32)  # many ties
    source = generator.integers(-1, 50, 30)
    found = top_hits(scores, source, 7)
    for query in range(30):
        order = [row for row in np.lexsort((np.arange(50), -scores[query])) if row != source[query]]
        wanted = [row for row in order if scores[query, row] > 0][:7]
        assert found.rows[query].tolist() == wanted + [-1] * (7 - len(wanted))
    assert top_hits(scores[:1], NONE_ASKED, 80).rows.shape == (1, 80)


def test_a_sum_weighs_its_blocks_and_ignores_those_without_a_weight() -> None:
    blocks = {"a": np.array([[1.0, 0.0]], np.float32), "b": np.array([[0.0, 1.0]], np.float32)}
    assert weighted_sum(blocks, {"a": 2.0, "b": 0.5, "c": 9.0}).tolist() == [[2.0, 0.5]]
    assert weighted_sum(blocks, {}).tolist() == [[0.0, 0.0]]


def test_weights_are_those_of_the_highest_figure() -> None:
    def figure(weights: Mapping[str, float]) -> float:
        return -((weights["a"] - 2.0) ** 2) - (weights["b"] - 0.25) ** 2

    weights, best = choose_weights(["a", "b"], figure)
    assert weights == {"a": 2.0, "b": 0.25} and best == 0
    alone, _ = choose_weights(["a", "b"], lambda weights: float(weights["b"] == 0))
    assert alone["b"] == 0 and alone["a"] > 0


def shop(count: int = 60) -> tuple[UntrainedInputs, UntrainedInputs, EvaluationQueries]:
    """Products of which one half is told apart by words alone, the other by a tower alone.

    Each is asked for once.
    """
    generator = np.random.default_rng(0)
    by_words = np.arange(count) % 2 == 0
    features = unit(generator.standard_normal((count, 16)))
    records = [
        {"title": tokenize(f"thing word{row}" if by_words[row] else "thing")}
        for row in range(count)
    ]
    asked = [typed_record(f"thing word{row}" if by_words[row] else "thing") for row in range(count)]
    shown = np.where(by_words[:, None], 0, features)
    rows = np.arange(count)[:, None]
    questions = EvaluationQueries(
        ids=np.arange(count).astype(object),
        query_types=np.full(count, "text", object),
        vectors=features,
        source=np.full(count, -1),
        relevant=rows,
        judged=rows,
        grades=np.ones((count, 1)),
        threshold=1.0,
    )
    return (
        UntrainedInputs(records, {"text": features}),
        UntrainedInputs(asked, {"text": shown}),
        questions,
    )


def test_the_chosen_sum_finds_what_words_and_towers_find() -> None:
    products, queries, questions = shop()
    search = UntrainedSearch(products, None)
    choice = search.choose(queries, questions)
    assert choice.num_queries == 60 and choice.weights["text"] > 0
    found = search.search(queries, questions.source, choice, 10)
    first = {name: (hits.rows[:, 0] == np.arange(60)) for name, hits in found.items()}
    assert set(first) == {"bm25", "tfidf", "text", "sum", "floor"}
    assert first["floor"].all()
    assert first["bm25"][::2].all() and first["bm25"][1::2].mean() < 0.1
    assert first["text"][1::2].all() and not first["text"][::2].any()


def test_blocks_of_queries_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    products, queries, questions = shop()
    search = UntrainedSearch(products, None)
    whole = search.search(queries, questions.source, search.default_settings(queries), 10)
    monkeypatch.setattr(
        "tritower.retrieval.evaluating.untrained_search.MAX_CELLS", 200
    )  # three queries at a time
    parts = search.search(queries, questions.source, search.default_settings(queries), 10)
    assert {name: hits.rows.tolist() for name, hits in whole.items()} == {
        name: hits.rows.tolist() for name, hits in parts.items()
    }


def test_few_queries_choose_nothing_and_nothing_at_all_is_searched_without_words() -> None:
    products, queries, questions = shop()
    search = UntrainedSearch(products, None)
    few = np.arange(19)
    choice = search.choose(queries.select(few), questions.select(few))
    assert choice.num_queries == 0 and choice.weights == {"bm25": 1.0, "text": 1.0}
    silent = UntrainedInputs([{}] * 60)
    assert search.choose(silent, questions) == UntrainedSettings({}, {})
    assert search.search(silent, questions.source, UntrainedSettings({}, {}), 10) == {}


# ---------------------------------------------------------------- towers before training


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return write_bert(tmp_path / "bert")


def two_tower(bert: Path, freeze: bool) -> TwoTower:
    text = HuggingFaceText(str(bert), template="{title}", max_length=24, freeze=freeze)
    model = TwoTower(Encoder(8, text))
    model.set_schema(SCHEMA)
    return model.eval()


ITEMS = [
    Item(text={"title": "red shoe"}),
    Item(text={"title": "blue mug"}),
    Item(attributes={"brand": "Acme"}),
]


def features_before(model: TwoTower, towers: dict) -> np.ndarray:
    with torch.inference_mode():
        _, found = untrained_features(
            model.product, towers, model.product.preprocess("product")(ITEMS)
        )
    return found["text"].numpy()


def test_a_frozen_tower_runs_once_and_its_features_are_its_own(bert: Path) -> None:
    model = two_tower(bert, freeze=True)
    towers = untrained_towers(model.product)
    assert towers["text"] is model.product.towers["text"]
    items = model.product.preprocess("product")(ITEMS)
    with torch.inference_mode():
        replaced, found = untrained_features(model.product, towers, items)
        features = model.product.towers["text"](items.text)
        assert torch.equal(model.product(replaced).embedding, model.product(items).embedding)
    expected = torch.nn.functional.normalize(features[:2], dim=-1)
    assert torch.allclose(found["text"][:2], expected, atol=1e-6)
    assert not found["text"][2].any()  # an item without text


@pytest.mark.parametrize("freeze", [True, False])
def test_a_model_folder_keeps_the_towers_that_training_began_with(
    bert: Path, tmp_path: Path, freeze: bool
) -> None:
    model = two_tower(bert, freeze)
    towers = untrained_towers(model.product)
    before = features_before(model, towers)
    if not freeze:
        with torch.no_grad():
            for parameter in model.product.towers["text"].parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_model(model, tmp_path / "model", untrained={"product": towers, "query": towers})
    assert (tmp_path / "model" / "untrained.safetensors").is_file() is not freeze
    loaded = load_model(tmp_path / "model")
    kept = load_untrained(tmp_path / "model", loaded)
    assert set(kept["query"]) == set(kept["product"]) == {"text"}
    assert np.allclose(features_before(loaded, kept["product"]), before, atol=1e-6)
    assert (kept["product"]["text"] is loaded.product.towers["text"]) is freeze
    if not freeze:
        assert not np.allclose(
            features_before(loaded, {"text": loaded.product.towers["text"]}), before, atol=1e-2
        )


def test_towers_trained_from_scratch_are_no_floor(tmp_path: Path) -> None:
    model = TwoTower(Encoder(8, BiLSTM(num_buckets=64, word_dim=8, hidden_dim=8)))
    model.set_schema(SCHEMA)
    assert untrained_towers(model.product) == {}
    save_model(model, tmp_path / "model")
    assert load_untrained(tmp_path / "model", load_model(tmp_path / "model")) == {
        "product": {},
        "query": {},
    }


def test_embedding_writes_the_features_beside_the_embeddings(bert: Path, tmp_path: Path) -> None:
    catalogue = write_catalogue(tmp_path / "catalogue", num_groups=10)
    model = two_tower(bert, freeze=True)
    save_model(model, tmp_path / "model")
    embed(
        tmp_path / "model",
        catalogue,
        tmp_path / "plain",
        options=EmbedOptions(accelerator="cpu"),
        untrained=False,
    )
    assert not (tmp_path / "plain" / "untrained").exists()
    embed(
        tmp_path / "model", catalogue, tmp_path / "plain", options=EmbedOptions(accelerator="cpu")
    )  # what is missing is added
    embed(tmp_path / "model", catalogue, tmp_path / "E", options=EmbedOptions(accelerator="cpu"))
    table = Table(catalogue / "products")
    items = [product_item(table.row(row)) for row in range(len(table))]
    with torch.inference_mode():
        tensors = model.product.preprocess("product")(items)
        _, expected = untrained_features(model.product, untrained_towers(model.product), tensors)
    for output in ("plain", "E"):
        reader = EmbeddingReader(tmp_path / output / "untrained" / "text" / "products")
        batches = list(reader.batches())
        assert [i for batch in batches for i in batch.ids.to_pylist()] == table.column(
            "product_id"
        ).to_pylist()
        assert np.allclose(
            np.concatenate([batch.vectors for batch in batches]), expected["text"], atol=2e-3
        )
        queries = EmbeddingReader(tmp_path / output / "untrained" / "text" / "queries")
        query_types = {
            query_type
            for batch in queries.batches()
            for query_type in batch.query_types.to_pylist()
        }
        assert query_types == {
            "text",
            "fused",
            "product:text",
        }  # photos and attributes have no text


# ---------------------------------------------------------------- the table of a run


def test_a_run_shows_its_best_model_beside_search_without_training(
    tiny_catalogue: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tower = [
        "--model.product.text=HuggingFaceText",
        f"--model.product.text.init_args.pretrained={bert}",
        "--model.product.text.init_args.max_length=16",
    ]
    assert fit(tiny_catalogue, tmp_path / "run", *TEXT_ONLY, *tower, "--trainer.max_epochs=1") == 0
    report = json.loads((tmp_path / "run" / "floor.json").read_text(encoding="utf-8"))
    assert report["split"] == "val" and report["origin"] == "judged queries"
    assert set(report["queries"]) == {
        "text",
        "fused",
        "product:text",
    }  # the model reads neither pictures nor attributes
    assert {"bm25", "tfidf", "text", "sum", "floor", "hybrid"} <= set(report["baselines"])
    assert set(report["baselines"]["text"]) == {"text", "fused", "product:text"}
    gain = report["differences"]["text"]["exact"]["ndcg@10"]
    assert gain["low"] <= gain["value"] <= gain["high"]
    output = capsys.readouterr()
    assert "text, untrained" in output.out and "floor" in output.out
    assert (tmp_path / "run" / "model" / "untrained.safetensors").is_file()  # the tower was tuned


def test_a_run_without_the_table(tiny_catalogue: Path, tmp_path: Path) -> None:
    assert (
        fit(tiny_catalogue, tmp_path / "run", *TEXT_ONLY, "--trainer.max_epochs=1", "--floor=false")
        == 0
    )
    assert not (tmp_path / "run" / "floor.json").exists()
