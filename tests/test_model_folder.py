"""The exported model: all that is needed to encode, no code, and nothing that was changed since."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.catalogues import SCHEMA
from tests.support.encoders import ITEMS
from tests.support.tiny_models import TIMM, TIMM_ARGS, write_bert, write_open_clip, write_timm
from tests.support.training import fit
from tritower.artefacts import storage
from tritower.artefacts.storage import ArtefactError
from tritower.datamodules.batch import MODALITIES, Item
from tritower.datamodules.catalogue import Table, product_item
from tritower.retrieval.vectors.embeddings import EmbeddingReader
from tritower.towers.attribute import AttributeTower
from tritower.towers.embed import embed
from tritower.towers.embedding_shards import EmbedOptions
from tritower.towers.encoder import Encoder
from tritower.towers.hugging_face import HuggingFaceText
from tritower.towers.image import ImageTower, PictureOptions, TimmImage
from tritower.towers.lexical import HashedNgrams
from tritower.towers.model_folder import TOWERS, load_model, save_model
from tritower.towers.open_clip_models import OpenClipImage, OpenClipText
from tritower.towers.text import BiLSTM, TextTower
from tritower.towers.tower import Tower
from tritower.towers.two_tower import TwoTower


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was tried"))


def hugging_face(weights: Path) -> Tower:
    return HuggingFaceText(
        str(write_bert(weights / "bert")), template="{title}", query_prefix="q: ", freeze=True
    )


def open_clip_text(weights: Path) -> Tower:
    return OpenClipText(f"local-dir:{write_open_clip(weights / 'clip')}")


def open_clip_text_with_tokenizer(weights: Path) -> Tower:
    tokenizer = write_bert(weights / "tokenizer")
    return OpenClipText(
        f"local-dir:{write_open_clip(weights / 'clip', tokenizer=tokenizer)}", product_prefix="p: "
    )


def open_clip_image(weights: Path) -> Tower:
    return OpenClipImage(f"local-dir:{write_open_clip(weights / 'clip')}", freeze=True)


def timm_image(weights: Path) -> Tower:
    write_timm(weights / "timm.pth")
    return TimmImage(
        TIMM,
        weights / "timm.pth",
        TIMM_ARGS,
        PictureOptions(48, resize="crop", interpolation="bilinear", mean=[0.1, 0.2, 0.3]),
    )


def bilstm(weights: Path) -> Tower:
    return BiLSTM(
        num_buckets=128, word_dim=8, hidden_dim=5, max_length=3, template="{description} {title}"
    )


def attributes(weights: Path) -> Tower:
    return AttributeTower(
        10, value_dim=4, num_buckets=128, num_hashes=3, num_frequencies=5, frequency_scale=0.7
    )


def ngrams(weights: Path) -> Tower:
    return HashedNgrams("{description}", 24, max_ngram=3, max_length=5, typed=True)


MAKERS = {
    make.__name__: make
    for make in (
        hugging_face,
        open_clip_text,
        open_clip_text_with_tokenizer,
        open_clip_image,
        timm_image,
        bilstm,
        attributes,
        ngrams,
    )
}


def modality(tower: Tower) -> str:
    kinds = {
        AttributeTower: "attribute",
        HashedNgrams: "lexical",
        TextTower: "text",
        ImageTower: "image",
    }
    return next(kind for base, kind in kinds.items() if isinstance(tower, base))


def test_every_tower_is_tried() -> None:
    texts, pictures = {"BiLSTM", "HuggingFaceText", "OpenClipText"}, {"TimmImage", "OpenClipImage"}
    of_blocks = {"NumberWaves", "SparseTerms"}  # tests/test_block_encoder.py
    assert set(TOWERS) == {*texts, *pictures, *of_blocks, "AttributeTower", "HashedNgrams"}


@pytest.mark.parametrize("name", list(MAKERS))
def test_a_loaded_model_needs_no_weights_and_no_network(
    tmp_path: Path, name: str, no_network: None
) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    tower = MAKERS[name](weights)
    kind = modality(tower)
    model = TwoTower(Encoder(8, **{kind: tower}, fusion="transformer"))
    model.set_schema(SCHEMA)
    column = MODALITIES.index(kind)
    items = [item for item in ITEMS if model.preprocess.product([item]).present[0, column]]
    assert items
    expected = {side: model.encode(items, side) for side in ("query", "product")}
    save_model(model, tmp_path / "model")
    weights.rename(tmp_path / "gone")
    (tmp_path / "model").rename(tmp_path / "moved")
    loaded = load_model(tmp_path / "moved")
    for side, embedding in expected.items():
        np.testing.assert_allclose(loaded.encode(items, side), embedding, atol=1e-6)
    assert loaded.product.towers[kind].frozen == tower.frozen
    assert loaded.schema == SCHEMA and not loaded.training


def test_separate_encoders_are_both_kept(tmp_path: Path) -> None:
    model = TwoTower(
        Encoder(8, text=bilstm(tmp_path)), Encoder(8, text=bilstm(tmp_path), fusion="mean")
    )
    model.set_schema(SCHEMA)
    items = [Item({"title": "red mug", "description": "new"})]
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.own_query is not None and loaded.query.fusion_name == "mean"
    for side in ("query", "product"):
        np.testing.assert_allclose(loaded.encode(items, side), model.encode(items, side), atol=1e-6)


def test_fit_then_move_everything_away_then_embed(
    tmp_path: Path, tiny_catalogue: Path, no_network: None
) -> None:
    weights, catalogue = tmp_path / "weights", tmp_path / "catalogue"
    weights.mkdir()
    write_bert(weights / "bert")
    write_timm(weights / "timm.safetensors")
    shutil.copytree(tiny_catalogue, catalogue)
    run = tmp_path / "run"
    arguments = [
        "--model.product.text=HuggingFaceText",
        f"--model.product.text.pretrained={weights / 'bert'}",
        f"--model.product.image.init_args.pretrained={weights / 'timm.safetensors'}",
        "--trainer.max_epochs=1",
    ]
    assert fit(catalogue, run, *arguments) == 0
    table = Table(catalogue / "products")
    items = [product_item(table.row(row)) for row in range(len(table))]
    ids = table.column("product_id").to_pylist()
    expected = load_model(run / "model").encode(items, "product")
    weights.rename(tmp_path / "no weights")
    catalogue.rename(tmp_path / "elsewhere")
    (run / "model").rename(tmp_path / "model")
    shutil.rmtree(run)
    embed(
        tmp_path / "model",
        tmp_path / "elsewhere",
        tmp_path / "embeddings",
        options=EmbedOptions(accelerator="cpu"),
    )
    np.testing.assert_allclose(
        load_model(tmp_path / "model").encode(items, "product"), expected, atol=1e-6
    )
    batches = list(EmbeddingReader(tmp_path / "embeddings" / "products").batches())
    assert [i for batch in batches for i in batch.ids.to_pylist()] == ids
    stored = np.concatenate([batch.vectors for batch in batches])
    np.testing.assert_allclose(stored, expected, atol=1e-3)  # stored as float16


def test_the_folder_holds_the_best_weights(tiny_run: Path) -> None:
    exported = load_file(tiny_run / "model" / "model.safetensors")
    best = torch.load(tiny_run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert exported and all(torch.equal(tensor, best[name]) for name, tensor in exported.items())
    assert "val/ndcg@10" in storage.read_manifest(tiny_run / "model").meta


def test_the_folder_holds_no_code_and_no_pickle(tiny_run: Path, tmp_path: Path) -> None:
    model = TwoTower(
        Encoder(8, open_clip_text_with_tokenizer(tmp_path), open_clip_image(tmp_path / "image"))
    )
    model.set_schema(SCHEMA)
    save_model(model, tmp_path / "model")
    for folder in (tiny_run / "model", tmp_path / "model"):
        paths = [path for path in folder.rglob("*") if path.is_file()]
        assert {"model.safetensors", "config.json"} <= {path.name for path in paths}
        for path in paths:
            assert path.suffix in (".json", ".safetensors", ".txt"), path
            assert not path.read_bytes().startswith((b"\x80", b"PK")), path


def test_a_fingerprint_tells_weights_apart(tmp_path: Path) -> None:
    prints = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = TwoTower(Encoder(8, text=bilstm(tmp_path)))
        model.set_schema(SCHEMA)
        save_model(model, tmp_path / f"model{len(prints)}")
        prints.append(storage.fingerprint(tmp_path / f"model{len(prints)}"))
    assert prints[0] == prints[1] != prints[2]


# ---------------------------------------------------------------- what is refused


@pytest.fixture
def folder(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run / "model", tmp_path / "model"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "schema.json"])
def test_a_damaged_file_is_named(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ArtefactError, match=rf"{name} is damaged: expected sha256 \w+, found"):
        load_model(folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "schema.json").unlink()
    with pytest.raises(ArtefactError, match=r"schema\.json is missing"):
        load_model(folder)


def test_a_folder_that_is_no_model_is_refused(tiny_catalogue: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="of type 'catalogue'; expected 'model'"):
        load_model(tiny_catalogue)
    with pytest.raises(ArtefactError, match="no such folder"):
        load_model(tmp_path / "none")


def resealed(folder: Path, change: Callable[[dict], None]) -> Path:
    """As somebody would change a configuration on purpose: with a manifest that fits."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(config)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "manifest.json").unlink()
    storage.seal(folder, artefact_type="model")
    return folder


def test_a_foreign_class_is_refused_by_name_and_never_imported(folder: Path) -> None:
    resealed(
        folder,
        lambda c: c["encoders"]["product"]["towers"]["text"].update({"class": "subprocess.Popen"}),
    )
    with pytest.raises(
        ArtefactError, match=r"names the tower 'subprocess\.Popen'. Known towers: BiLSTM, "
    ):
        load_model(folder)


def test_a_newer_format_asks_for_an_upgrade(folder: Path) -> None:
    resealed(folder, lambda c: c.update(format=99))
    with pytest.raises(ArtefactError, match="model format 99; this release reads up to 2: upgrade"):
        load_model(folder)


def test_a_tower_that_could_not_be_rebuilt_is_refused(tmp_path: Path) -> None:
    class MyText(BiLSTM):
        pass

    model = TwoTower(Encoder(8, text=MyText()))
    model.set_schema(SCHEMA)
    with pytest.raises(ValueError, match=r"cannot hold a MyText tower. It can hold: BiLSTM"):
        save_model(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_model_without_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no schema: train it first"):
        save_model(TwoTower(Encoder(8, text=BiLSTM())), tmp_path / "model")


def test_a_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    model = TwoTower(Encoder(8, text=bilstm(tmp_path)))
    model.set_schema(SCHEMA)
    save_model(model, tmp_path / "model")
    with pytest.raises(ArtefactError, match="already exists"):
        save_model(model, tmp_path / "model")
    save_model(model, tmp_path / "model", meta={"note": "second"}, overwrite=True)
    assert storage.read_manifest(tmp_path / "model").meta["note"] == "second"
