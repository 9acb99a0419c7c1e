"""The model folder: what everything but training reads.

Weights, architecture, tokenizers and schema; no code.

model.safetensors   all weights
untrained.safetensors   weights that pretrained towers had before they were tuned; only where some
were config.json         class names and plain constructor arguments of towers; looked up among our
own, never imported schema.json         of the catalogue it was trained on product/text/ ...   files
that a tower needs beside its weights, e.g. of its tokenizer manifest.json       size and digest of
every file, and the fingerprint that an index stores
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tritower.artefacts.storage import ArtefactError, new_folder, verify
from tritower.datamodules.batch import Side
from tritower.datamodules.schema import Schema
from tritower.towers.attribute import AttributeTower
from tritower.towers.block_encoder import BlockEncoder
from tritower.towers.encoder import Encoder
from tritower.towers.hugging_face import HuggingFaceText
from tritower.towers.image import TimmImage
from tritower.towers.lexical import HashedNgrams
from tritower.towers.number_waves import NumberWaves
from tritower.towers.open_clip_models import OpenClipImage, OpenClipText
from tritower.towers.sparse_terms import SparseTerms
from tritower.towers.text import BiLSTM
from tritower.towers.tower import Tower
from tritower.towers.two_tower import TwoTower
from tritower.towers.untrained import UntrainedTowers, copied

FORMAT = 2
"""2: of a metric that is not cosine.

Models of cosine are written as 1, which older releases read.
"""
BLOCKS = "blocks"
"""In place of a fusion: the model's encoders are of blocks (`BlockEncoder`)."""

TOWERS: dict[str, type[Tower]] = {
    tower.__name__: tower
    for tower in (
        BiLSTM,
        HuggingFaceText,
        OpenClipText,
        TimmImage,
        OpenClipImage,
        AttributeTower,
        HashedNgrams,
        NumberWaves,
        SparseTerms,
    )
}


def save_model(
    model: TwoTower,
    folder: Path,
    *,
    untrained: Mapping[Side, UntrainedTowers] | None = None,
    meta: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Export a trained model.

    Args:
        model: with a schema.
        folder: to be made.
        untrained: the pretrained towers of each side before training (`tritower.towers.untrained`).
        meta: more plain data for the manifest, e.g. where the model comes from.
        overwrite: replace a model folder that is there.

    Raises:
        ValueError: a tower that `load_model` could not rebuild.
        ArtefactError: the folder exists.
    """
    if model.schema is None:
        raise ValueError("The model has no schema: train it first, or call set_schema.")
    about = {"metric": model.metric, "embed_dim": model.embed_dim, **(meta or {})}
    with new_folder(folder, artefact_type="model", meta=about, overwrite=overwrite) as new:
        # Both sides, unless they share their weights.
        encoders = {"product": model.product} | (
            {} if model.own_query is None else {"query": model.own_query}
        )
        config = {
            "format": 1 if model.metric == "cosine" else FORMAT,
            "metric": model.metric,
            "encoders": {
                side: _describe(encoder, new / side) for side, encoder in encoders.items()
            },
        }
        (new / "config.json").write_text(
            json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8"
        )
        model.schema.save(new / "schema.json")
        # All weights in one file, named SIDE.PARAMETER.
        weights = {}
        for s, e in encoders.items():
            for k, v in e.state_dict().items():
                weights[f"{s}.{k}"] = v.cpu().contiguous()
        save_file(weights, new / "model.safetensors")
        if before := _tuned_weights(model, untrained or {}):
            save_file(before, new / "untrained.safetensors")


def load_model(folder: Path | str) -> TwoTower:
    """A model from its folder, ready to encode.

    Needs neither the catalogue nor pretrained weights nor a network.

    Raises:
        ArtefactError: no model folder, a damaged one, or one of a newer release.
    """
    folder = Path(folder)
    verify(folder, artefact_type="model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["format"] > FORMAT:
        raise ArtefactError(
            f"{folder} has model format {config['format']}; this release reads up to {FORMAT}: "
            "upgrade."
        )
    schema = Schema.load(folder / "schema.json")
    # Rebuild the architecture from the folder alone, then load the weights.
    encoders = {
        side: _rebuild(parts, folder / side, folder) for side, parts in config["encoders"].items()
    }
    model = TwoTower(
        encoders["product"], encoders.get("query"), metric=config.get("metric", "cosine")
    )
    model.set_schema(schema)
    weights = load_file(folder / "model.safetensors")
    for side, encoder in encoders.items():
        own = {}
        for k, v in weights.items():
            if k.startswith(f"{side}."):
                own[k.removeprefix(f"{side}.")] = v
        encoder.load_state_dict(own)
    return model.eval()


def load_untrained(folder: Path | str, model: TwoTower) -> dict[Side, dict[str, Tower]]:
    """The pretrained towers of a model folder as they were before training, for each side.

    Args:
        folder: the model folder.
        model: as loaded from it; its frozen towers are taken as they are.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (folder / "untrained.safetensors").is_file():
        tuned = load_file(folder / "untrained.safetensors")
    else:
        tuned = {}
    encoders: dict[Side, Encoder] = {"product": model.product, "query": model.query}
    result: dict[Side, dict[str, Tower]] = {}
    for side, encoder in encoders.items():
        stored = side if side in config["encoders"] else "product"  # sides that share their weights
        result[side] = {}
        # A tuned tower gets its weights from before training; a frozen one is as it was.
        for name, tower in encoder.named_towers.items():
            prefix = f"{stored}.{name}."
            weights = {}
            for key, value in tuned.items():
                if key.startswith(prefix):
                    weights[key.removeprefix(prefix)] = value
            if weights:
                result[side][name] = copied(tower)
                result[side][name].load_state_dict(weights)
            elif tower.pretrained and tower.frozen:
                result[side][name] = tower
    return result


def _tuned_weights(model: TwoTower, untrained: Mapping[Side, UntrainedTowers]) -> dict[str, Tensor]:
    """Weights before training of the towers that were tuned.

    Those that are not the model's own any more.
    """
    own = set(model.modules())
    return {
        f"{side}.{name}.{key}": value.cpu().contiguous().clone()
        for side, towers in untrained.items()
        if side == "product" or model.own_query is not None
        for name, tower in towers.items()
        if tower not in own
        for key, value in tower.state_dict().items()
    }


def _describe(encoder: Encoder, folder: Path) -> dict[str, Any]:
    towers = {}
    for name, tower in encoder.named_towers.items():
        # Only classes that can be rebuilt from plain arguments are allowed.
        class_name = type(tower).__name__
        if TOWERS.get(class_name) is not type(tower):
            raise ValueError(
                f"A model folder cannot hold a {class_name} tower. It can hold: "
                f"{', '.join(TOWERS)}."
            )
        (folder / name).mkdir(parents=True)
        tower.save_assets(folder / name)
        arguments = tower.architecture()
        towers[name] = {
            "class": class_name,
            "arguments": arguments,
            "frozen": tower.frozen,
            "pretrained": tower.pretrained,
        }
    if isinstance(encoder, BlockEncoder):
        return {
            "block_dim": encoder.block_dim,
            "words_dim": encoder.words_dim,
            "fusion": BLOCKS,
            "towers": towers,
        }
    return {"embed_dim": encoder.embed_dim, "fusion": encoder.fusion_name, "towers": towers}


def _rebuild(parts: dict[str, Any], assets: Path, folder: Path) -> Encoder:
    towers: dict[str, Any] = {}
    for name, tower in parts["towers"].items():
        if tower["class"] not in TOWERS:
            raise ArtefactError(
                f"{folder / 'config.json'} names the tower {tower['class']!r}. Known towers: "
                f"{', '.join(TOWERS)}."
            )
        towers[name] = TOWERS[tower["class"]].rebuild(tower["arguments"], assets / name)
        towers[name].frozen = tower["frozen"]
        towers[name].pretrained = tower.get("pretrained", False)
    if parts["fusion"] == BLOCKS:
        return BlockEncoder(
            parts["block_dim"],
            text=towers.get("text"),
            image=towers.get("image"),
            numbers=towers.get("attribute"),
            terms=towers.get("lexical"),
            words_dim=parts["words_dim"],
        )
    return Encoder(parts["embed_dim"], **towers, fusion=parts["fusion"])
