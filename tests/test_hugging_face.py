"""Text encoders of the transformers library as towers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.tiny_models import write_bert
from tritower.datamodules.batch import Item
from tritower.towers.encoder import Encoder
from tritower.towers.hugging_face import HuggingFaceText
from tritower.towers.two_tower import TwoTower

TEXTS = ["red shoe", "a blue coffee mug by acme, no 7", "lamp"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("models") / "bert")


def states_of(bert: Path, text: str) -> torch.Tensor:
    """(L, F) of one text without padding, by the library itself."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    with torch.inference_mode():
        return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_features_are_those_of_the_library(bert: Path, pooling: str) -> None:
    tower = HuggingFaceText(str(bert), pooling=pooling).eval()
    with torch.inference_mode():
        features = tower(tower.preprocess(TEXTS))
    states = [states_of(bert, text) for text in TEXTS]
    expected = torch.stack([s[0] if pooling == "cls" else s.mean(0) for s in states])
    assert features.shape == (3, tower.out_dim) == (3, 16)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    assert tower.pretrained


def test_prefixes_tell_queries_from_products(bert: Path) -> None:
    tower = HuggingFaceText(str(bert), query_prefix="query: ", product_prefix="passage: ")
    item = Item(text={"title": "red shoe"})
    tokenizer = tower.preprocess.tokenizer.tokenizer
    for side, prefix in (("query", "query: "), ("product", "passage: ")):
        tokens = tower.preprocess([tower.preprocess.render(item, side)])
        assert tokens.tolist() == [tokenizer(f"{prefix}red shoe")["input_ids"]]


def test_a_text_without_tokens_is_finite(bert: Path) -> None:
    tower = HuggingFaceText(str(bert)).eval()
    padding = torch.full((2, 5), tower.pad_id)
    assert tower(padding).isfinite().all()
    assert tower(tower.preprocess(["", " "])).isfinite().all()


def test_every_weight_has_a_gradient(bert: Path) -> None:
    """Distributed training waits for the gradient of each."""
    tower = HuggingFaceText(str(bert))
    tower(tower.preprocess(TEXTS)).square().sum().backward()
    assert [name for name, parameter in tower.named_parameters() if parameter.grad is None] == []


def test_frozen_weights_are_kept_and_dropout_is_off(bert: Path) -> None:
    tower = HuggingFaceText(str(bert), freeze=True)
    tower.train()
    tokens = tower.preprocess(TEXTS)
    assert torch.equal(tower(tokens), tower(tokens))
    assert not any(parameter.requires_grad for parameter in tower.parameters())


def test_a_rebuilt_tower_needs_its_own_files_alone(bert: Path, tmp_path: Path) -> None:
    tower = HuggingFaceText(
        str(bert), pooling="cls", query_prefix="query: ", max_length=9, template="{title}"
    ).eval()
    tower.save_assets(tmp_path)
    again = HuggingFaceText.rebuild(tower.architecture(), tmp_path).eval()
    assert not again.pretrained
    again.load_state_dict(tower.state_dict())
    assert again.architecture() == tower.architecture()
    torch.testing.assert_close(again(again.preprocess(TEXTS)), tower(tower.preprocess(TEXTS)))
    assert not list(tmp_path.glob("*.bin")) + list(tmp_path.glob("*.safetensors"))


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        HuggingFaceText(str(tmp_path / "nowhere"))


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"tritower\[hf\]"):
        HuggingFaceText("anything")


# ---------------------------------------------------------------- real weights


def cosines(tower: HuggingFaceText, query: str, *products: str) -> np.ndarray:
    """Of a query with products, by an untrained encoder around the tower."""
    model = TwoTower(Encoder(tower.out_dim, text=tower))
    queries = model.encode([Item(text={"query": query})], "query")
    return (
        model.encode([Item(text={"title": text}) for text in products], "product") @ queries.T
    ).flatten()


def test_minilm_knows_what_is_alike(weights_dir: Path) -> None:
    tower = HuggingFaceText(str(weights_dir / "all-minilm-l6-v2"))
    near, far = cosines(tower, "red shoe", "crimson sneaker", "coffee mug")
    assert near > far + 0.2


def test_multilingual_e5_knows_it_in_chinese(weights_dir: Path) -> None:
    tower = HuggingFaceText(
        str(weights_dir / "multilingual-e5-small"),
        query_prefix="query: ",
        product_prefix="passage: ",
    )
    near, chinese, far = cosines(tower, "red shoe", "crimson sneaker", "红色运动鞋", "咖啡杯")
    assert min(near, chinese) > far + 0.02
    assert tower.preprocess.check(["红色运动鞋", "不锈钢保温杯"])["fallback"] == 0
