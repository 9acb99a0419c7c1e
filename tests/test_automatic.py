"""`fit` without a configuration: what is chosen, what is written, and that nothing falls below."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from tests.support.catalogues import write_catalogue
from tritower.datamodules.batch import Item
from tritower.datamodules.catalogue import Table, product_item
from tritower.retrieval.building.build import build_index
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.vectors.embeddings import EmbeddingReader
from tritower.towers import cli as train
from tritower.towers.automatic import choose_recipe, seconds_of, with_recipe
from tritower.towers.block_weights import TOLERANCE
from tritower.towers.embed import embed
from tritower.towers.model_folder import load_model

QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory) -> Path:
    return write_catalogue(tmp_path_factory.mktemp("automatic") / "catalogue", 200, queries=False)


@pytest.fixture(scope="module")
def run(catalogue: Path, tmp_path_factory) -> Path:
    """A run without any pretrained weights."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITOWER_WEIGHTS", raising=False)
        patch.chdir(folder)
        arguments = ["fit", f"--data.catalogue={catalogue}", f"--run={folder / 'run'}", *QUIET]
        assert train.main([*arguments, "--trainer.max_epochs=3", "--budget=10m"]) == 0
    return folder / "run"


def test_a_recipe_is_written_with_its_reasons_and_runs(run: Path) -> None:
    text = (run / "recipe.yaml").read_text(encoding="utf-8")
    assert "# learned from: catalogue (240 train products have relatives" in text
    recipe = yaml.safe_load(text)
    assert recipe["trainer"]["max_time"] == "00:00:10:00"
    assert set(recipe["model"]["product"]["init_args"]) == {"block_dim", "numbers", "terms"}
    assert "# text tower: none (there is no folder of weights" in text
    encoder = load_model(run / "model").product
    assert list(encoder.towers) == ["attribute", "lexical"]


def test_no_kind_of_query_falls_below_the_start_on_val(run: Path) -> None:
    blocks = json.loads((run / "blocks.json").read_text(encoding="utf-8"))
    start, chosen = blocks["figures"]["0.0"], blocks["figures"][str(blocks["share"])]
    assert set(start) == set(chosen) == {"lexical", "attribute + lexical"}
    for kind, before in start.items():
        assert chosen[kind]["ndcg"] >= before["ndcg"] - TOLERANCE
    assert blocks["ndcg"] >= blocks["start"]


def test_the_start_travels_with_the_checkpoints(run: Path) -> None:
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    start = checkpoint["start_state"]
    assert start["product.towers.lexical.log_weight"].abs().max() == 0
    assert checkpoint["state_dict"]["product.towers.lexical.log_weight"].abs().max() > 0
    assert set(start) < set(checkpoint["state_dict"])


def test_its_model_is_embedded_indexed_and_searched(
    run: Path, catalogue: Path, tmp_path: Path
) -> None:
    embed(run / "model", catalogue, tmp_path / "embeddings")
    products = EmbeddingReader(tmp_path / "embeddings" / "products")
    assert products.metric == "inner_product"
    build_index(products, tmp_path / "index")
    index = ProductIndex.open(tmp_path / "index")
    model = load_model(run / "model")
    typed = index.search(model.encode([Item({"query": "no 17"})]), 2)
    assert sorted(index.ids(typed.rows)[0].tolist()) == ["017-0", "017-1"]
    row = Table(catalogue / "products").row(16)
    whole = index.search(model.encode([product_item(row)]), 1)
    assert index.ids(whole.rows).item() == "008-0"


def test_without_relatives_and_judgements_only_weights_are_chosen(tmp_path: Path) -> None:
    catalogue = write_catalogue(tmp_path / "catalogue", 60, queries=False)
    recipe = choose_recipe(without_groups(catalogue), None, None)
    assert recipe.trainer["max_epochs"] == 0
    assert ("learned from", "nothing") in [reason[:2] for reason in recipe.reasons]


def without_groups(catalogue: Path) -> Path:
    for shard in (catalogue / "products").glob("*.parquet"):
        table = pq.read_table(shard)
        for name in ("group", "family"):
            column = table.schema.get_field_index(name)
            table = table.set_column(column, name, pa.nulls(len(table), pa.string()))
        pq.write_table(table, shard, row_group_size=16)
    return catalogue


def test_weights_are_found_by_what_they_are(catalogue: Path, tmp_path: Path) -> None:
    for name in ("all-minilm-l6-v2", "multilingual-e5-small"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "notes.safetensors").write_bytes(b"")  # no model of timm has this name
    (tmp_path / "resnet18.safetensors").write_bytes(b"")
    blocks = choose_recipe(catalogue, tmp_path, None).model["product"]["init_args"]
    # The titles of this catalogue have English stop words.
    assert blocks["text"]["init_args"]["pretrained"].endswith("all-minilm-l6-v2")
    assert blocks["text"]["init_args"]["template"] == "{title}"
    assert blocks["image"]["init_args"]["model"] == "resnet18"
    assert blocks["image"]["init_args"]["freeze"] is True


def test_a_configuration_is_left_alone(catalogue: Path) -> None:
    own = ["fit", "--config=configs/tiny.yaml", f"--data.catalogue={catalogue}"]
    assert with_recipe(own) == own
    assert with_recipe(["fit", "--help"]) == ["fit", "--help"]
    assert with_recipe(["test", "--run=x"]) == ["test", "--run=x"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit"], "name a prepared catalogue"),
        (["fit", "--config=a.yaml", "--budget=20m"], "belong to a fit without --config"),
        (["fit", "--data.catalogue=nowhere", "--weights=nowhere"], "there is no such folder"),
        (["fit", "--data.catalogue=nowhere"], "nowhere is not a prepared catalogue"),
    ],
)
def test_what_cannot_be_chosen_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_budgets_are_times() -> None:
    assert [seconds_of(budget) for budget in ("90s", "20m", "2h", "45")] == [90, 1200, 7200, 45]
    with pytest.raises(ValueError, match=r"name a time such as 90s, 20m or 2h"):
        seconds_of("soon")
