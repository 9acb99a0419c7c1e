"""The model: encoding in chunks, optimizer, schedule, exact search, what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.catalogues import SCHEMA
from tests.support.data_modules import data_module
from tests.support.encoders import ITEMS
from tests.support.tiny_models import TIMM, TIMM_ARGS, write_bert
from tritower.artefacts.storage import read_manifest
from tritower.datamodules.batch import NO_KEY, RELATIONS, Batch, Item
from tritower.datamodules.catalogue import product_item
from tritower.datamodules.collate import collate
from tritower.datamodules.held_out_rows import QueryRows
from tritower.datamodules.preprocess import ItemPreprocess
from tritower.towers.attribute import AttributeTower
from tritower.towers.embedded import Embedded
from tritower.towers.encoder import Encoder
from tritower.towers.encoding import EncodingOptions
from tritower.towers.hugging_face import HuggingFaceText
from tritower.towers.image import PictureOptions, TimmImage
from tritower.towers.lexical import HashedNgrams
from tritower.towers.losses.info_nce import InfoNCE
from tritower.towers.losses.sigmoid import SigmoidLoss
from tritower.towers.model_folder import load_model
from tritower.towers.optimizer import OptimizerOptions, parameter_groups
from tritower.towers.text import BiLSTM
from tritower.towers.two_tower import TwoTower
from tritower.towers.validation import exact_search


def make_encoder(
    dropout: float = 0.0, embed_dim: int = 16, fusion: str = "gated", text: Any = None
) -> Encoder:
    return Encoder(
        embed_dim,
        text or BiLSTM(num_buckets=256, word_dim=8, hidden_dim=6, dropout=dropout),
        TimmImage(TIMM, model_args=TIMM_ARGS, pictures=PictureOptions(image_size=32)),
        AttributeTower(12, value_dim=4, num_buckets=256, dropout=dropout),
        HashedNgrams("{description}", 32),
        fusion,
    )


def make_model(encoder: Encoder | None = None, **settings: Any) -> TwoTower:
    """A model that knows its schema, with weights away from where training starts."""
    model = TwoTower(encoder or make_encoder(), **settings)
    model.set_schema(SCHEMA)
    for parameter in model.product.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


class FakeTrainer:
    """What the model asks of its trainer outside of a run."""

    estimated_stepping_batches = 20
    precision_plugin = SimpleNamespace(scaler=None)
    global_step = 3

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


# ---------------------------------------------------------------- chunks


def gradients(model: TwoTower, items: list[Item]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The embeddings of queries and products, and the gradients of their loss."""
    model.train().zero_grad()
    preprocess = model.preprocess
    keys = torch.full((len(items), len(RELATIONS)), NO_KEY)
    keys[:, 0] = torch.arange(len(items))
    query, product = preprocess.query(items), preprocess.product(items[::-1])
    torch.manual_seed(5)
    embeddings = [
        model.encode_batch(model.query, query).embedding,
        model.encode_batch(model.product, product).embedding,
    ]
    batch = Batch(query, product, keys, keys, torch.ones(len(items)))
    model.loss(*embeddings, batch).backward()
    found = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return torch.cat(embeddings).detach(), found


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 10])
def test_chunked_encoding_has_the_gradients_of_the_whole_batch(chunk_size: int) -> None:
    model = make_model()
    whole, expected = gradients(model, ITEMS * 2)
    model.encoding = EncodingOptions(chunk_size)
    chunked, found = gradients(model, ITEMS * 2)
    torch.testing.assert_close(chunked, whole, atol=1e-6, rtol=0)
    assert_close(found, expected)


def test_dropout_of_a_chunk_is_the_same_when_it_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(make_encoder(dropout=0.5), encoding=EncodingOptions(3))
    chunked, found = gradients(model, ITEMS * 2)
    monkeypatch.setattr(
        "tritower.towers.encoding.checkpoint", lambda encoder, chunk, use_reentrant: encoder(chunk)
    )
    plain, expected = gradients(model, ITEMS * 2)
    assert torch.equal(chunked, plain)
    assert_close(found, expected)
    model.eval()
    with torch.no_grad():
        assert not torch.allclose(
            model.encode_batch(model.query, model.preprocess.query(ITEMS)).embedding, plain[:5]
        )


def test_chunks_without_gradient_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(encoding=EncodingOptions(2)).eval()
    monkeypatch.setattr(
        "tritower.towers.encoding.checkpoint", lambda *_, **__: pytest.fail("nothing to run again")
    )
    items = model.preprocess.product(ITEMS)
    with torch.no_grad():
        chunked, whole = model.encode_batch(model.product, items), model.product(items)
    for one, other in zip(chunked, whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


# ---------------------------------------------------------------- optimizer


def test_matrices_decay_and_norms_biases_and_the_temperature_do_not() -> None:
    model = make_model(optimizer=OptimizerOptions(weight_decay=0.1), loss=SigmoidLoss())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {
        names[id(p)]: group["weight_decay"]
        for group in parameter_groups(model, model.encoders, model.optimizer_options)
        for p in group["params"]
    }
    assert set(decayed) == set(names.values())
    free = {name for name, decay in decayed.items() if decay == 0}
    assert {
        "loss_terms.losses.0.logit_scale",
        "loss_terms.losses.0.bias",
        "product.towers.attribute.number_bias",
    } <= free
    shapes = {name: parameter.ndim for name, parameter in model.named_parameters()}
    assert all(name.endswith("bias") or shapes[name] <= 1 for name in free)
    assert (
        decayed["product.projections.text.weight"]
        == decayed["product.towers.text.words.weight"]
        == 0.1
    )
    norms = [
        module_name
        for module_name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
    ]
    assert norms
    for module_name in norms:
        assert {f"{module_name}.weight", f"{module_name}.bias"} <= free


def test_pretrained_towers_have_their_own_learning_rate(tmp_path: Path) -> None:
    text = HuggingFaceText(str(write_bert(tmp_path / "bert")))
    model = make_model(make_encoder(text=text), optimizer=OptimizerOptions(1e-2, 1e-5))
    rates = {
        id(p): group["lr"]
        for group in parameter_groups(model, model.encoders, model.optimizer_options)
        for p in group["params"]
    }
    assert set(rates.values()) == {1e-5, 1e-2}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == (1e-5 if ".towers.text." in name else 1e-2), name


def test_frozen_towers_are_not_trained() -> None:
    encoder = make_encoder()
    encoder.towers["image"].freeze()
    model = make_model(encoder)
    trained = {
        id(p)
        for group in parameter_groups(model, model.encoders, model.optimizer_options)
        for p in group["params"]
    }
    assert trained == {
        id(p) for name, p in model.named_parameters() if ".towers.image." not in name
    }


def test_the_learning_rate_rises_then_falls_as_a_cosine() -> None:
    model = make_model(optimizer=OptimizerOptions(2.0, warmup=0.2))
    trainer = FakeTrainer()
    model.trainer = trainer
    configured = model.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    assert configured["lr_scheduler"]["interval"] == "step"
    rates = []
    for _ in range(21):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[4:] == pytest.approx([1 + math.cos(math.pi * step / 16) for step in range(17)])
    assert rates[20] == pytest.approx(0, abs=1e-12)


def test_a_step_along_infinite_gradients_is_refused_unless_a_scaler_skips_it() -> None:
    model = make_model()
    model.trainer = trainer = FakeTrainer(lightning_module=model)
    parameter = next(model.parameters())
    parameter.grad = torch.full_like(parameter, math.inf)
    with pytest.raises(
        FloatingPointError, match=r"norm of the gradient is inf at step 3 \(temperature 0\.07"
    ):
        model.on_before_optimizer_step(None)
    trainer.precision_plugin = SimpleNamespace(scaler=object())
    model.on_before_optimizer_step(None)


# ---------------------------------------------------------------- two sides


def test_weights_are_shared_unless_there_is_a_query_encoder() -> None:
    shared, separate = make_model(), make_model(query=make_encoder())
    assert shared.query is shared.product
    assert np.allclose(shared.encode(ITEMS, "query"), shared.encode(ITEMS, "product"), atol=1e-6)
    assert not np.allclose(
        separate.encode(ITEMS, "query"), separate.encode(ITEMS, "product"), atol=1e-2
    )
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    assert count(separate) - 1 == 2 * (count(shared) - 1)


def test_sides_of_different_sizes_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"embed_dim=8 differs from the product encoder's embed_dim=16"
    ):
        TwoTower(make_encoder(), make_encoder(embed_dim=8))


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        (OptimizerOptions, {"warmup": 1.0}, r"warmup=1\.0"),
        (EncodingOptions, {"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_impossible_settings_are_refused(
    options: type, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        options(**settings)


# ---------------------------------------------------------------- encode


def test_encoded_items_are_unit_rows_in_any_batch() -> None:
    model = make_model().train()
    together = model.encode(ITEMS, "product")
    assert together.shape == (5, 16) and together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    alone = np.concatenate([model.encode([item], "product") for item in ITEMS])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_an_item_of_which_the_model_reads_nothing_is_refused() -> None:
    model = TwoTower(Encoder(8, text=BiLSTM(num_buckets=64, word_dim=4, hidden_dim=4)))
    with pytest.raises(
        ValueError,
        match=r"Item 1 of 2 has nothing that this model reads \(text\): text \[\], 1 pict",
    ):
        model.encode([Item({"query": "mug"}), Item(images=[b"..."], attributes={"brand": "x"})])


def test_no_items_are_no_rows() -> None:
    assert make_model().encode([]).shape == (0, 16)


# ---------------------------------------------------------------- catalogue


def test_another_catalogue_than_the_models_is_refused() -> None:
    model = make_model()
    other = SimpleNamespace(catalogue="C2", schema=replace(SCHEMA, text=("name",)))
    model.trainer = trainer = FakeTrainer(datamodule=other)
    with pytest.raises(ValueError, match="made for another catalogue than C2"):
        model.setup("fit")
    with pytest.raises(ValueError, match="another catalogue"):
        model.on_load_checkpoint({"schema": other.schema.to_dict()})
    assert trainer.datamodule is other


def test_the_temperature_is_within_its_bound_right_after_loading() -> None:
    model = make_model()
    state = {**model.state_dict(), "loss_terms.losses.0.logit_scale": torch.tensor(math.log(1000))}
    model.load_state_dict(state)
    assert model.loss.scale.item() <= 100 * (1 + 1e-5)


def test_the_temperature_is_brought_back_before_each_step() -> None:
    model = make_model()
    loops = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=0))
    model.trainer = trainer = FakeTrainer(global_rank=0, fit_loop=loops)
    model.loss.logit_scale.data.fill_(math.log(1000))
    model.on_train_batch_start(None, 0)
    assert model.loss.logit_scale.item() < math.log(100) < math.log(1000)
    assert trainer.global_rank == 0


def test_all_subsets_of_modalities_find_each_other_in_one_space() -> None:
    model = make_model(make_encoder(fusion="transformer"))
    full = ITEMS[0]
    subsets = [Item(full.text), Item(images=full.images), Item(attributes=full.attributes), full]
    assert np.isfinite(model.encode(subsets) @ model.encode([full], "product").T).all()


# ---------------------------------------------------------------- exact search and validation


@pytest.mark.parametrize("block", [1, 3, 1024])
def test_exact_search_equals_sorting_all_and_never_finds_the_asked_product(block: int) -> None:
    rng = np.random.default_rng(0)
    query, product = (
        rng.normal(size=(7, 5)).astype(np.float32),
        rng.normal(size=(20, 5)).astype(np.float32),
    )
    own = np.array([-1, 3, 0, -1, 19, 3, -1])
    found = exact_search(Embedded(query), Embedded(product), own, k=6, block=block)
    for i in range(7):
        order = [row for row in np.argsort(-(product @ query[i])) if row != own[i]]
        assert found[i].tolist() == order[:6]


def test_a_small_gallery_is_padded() -> None:
    product = np.eye(3, dtype=np.float32)
    products = Embedded(product)
    query = Embedded(product[:1])
    assert exact_search(query, products, np.array([1]), k=5).tolist() == [[0, 2, -1, -1, -1]]


def test_zero_vectors_are_no_products() -> None:
    product = np.array([[1, 0], [0, 0], [-1, 0]], np.float32)
    products = Embedded(product)
    query = Embedded(product[:1])
    assert exact_search(query, products, np.array([-1]), k=3).tolist() == [[0, 2, -1]]


def test_the_best_score_is_that_of_the_exported_model(tiny_run: Path, tiny_catalogue: Path) -> None:
    model = load_model(tiny_run / "model")
    data = data_module(tiny_catalogue, batch_size=32, positives="group")
    asked = data.held_out["val"]
    queries = QueryRows(data.products, data.queries, asked, ItemPreprocess("query"))
    query = model.encode([queries.item(i) for i in range(len(asked))], "query")
    product = model.encode(
        [product_item(data.products.row(int(row))) for row in asked.candidates], "product"
    )
    gain = 0.0
    for i, (row, grade) in enumerate(zip(asked.judged, asked.grade, strict=True)):
        order = [p for p in np.argsort(-(product @ query[i]), kind="stable") if p != asked.own[i]][
            :10
        ]
        of = dict(zip(row.tolist(), grade.tolist(), strict=True))
        best = sorted(of.values(), reverse=True)[:10]
        discount = 1 / np.log2(np.arange(2, 12))
        gain += discount @ [of.get(p, 0.0) for p in order] / (discount[: len(best)] @ best)
    assert read_manifest(tiny_run / "model").meta["val/ndcg@10"] == pytest.approx(gain / len(asked))


def test_training_takes_a_pair_of_nothing(tiny_catalogue: Path) -> None:
    """A photo query and a text-only model: the row weighs nothing, and the loss is finite."""
    model = TwoTower(
        Encoder(8, text=BiLSTM(num_buckets=64, word_dim=4, hidden_dim=4)), loss=InfoNCE()
    )
    data = data_module(tiny_catalogue)
    examples = [replace_query(data, n) for n in range(4)]
    batch = collate(examples, model.preprocess)
    assert batch.weight.tolist() == [0.0, 1.0, 1.0, 1.0]
    loss = model.loss(
        model.query(batch.query).embedding, model.product(batch.product).embedding, batch
    )
    loss.backward()
    assert loss.isfinite()


def replace_query(data: Any, number: int) -> Any:
    batches = data.train_dataloader().dataset
    example = batches.example(0, number)
    example = example._replace(product=Item({"title": f"mug {number}"}), weight=1.0)
    return example._replace(
        query=Item(images=(b"photo",)) if number == 0 else Item({"query": "mug"})
    )
