"""Freezing the lower part of a tower."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.tiny_models import write_bert, write_open_clip
from tritower.towers.hugging_face import HuggingFaceText
from tritower.towers.image import ImageTower, PictureOptions, TimmImage
from tritower.towers.open_clip_models import OpenClipImage
from tritower.towers.tower import Tower

VIT = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"depth": 4, "embed_dim": 12, "num_heads": 2},
    "pictures": PictureOptions(image_size=224),
}


def trained(tower: Tower) -> set[str]:
    return {name for name, parameter in tower.named_parameters() if parameter.requires_grad}


class Clip(Tower):
    """Parameters in open_clip's order: its projection comes before what is projected."""

    out_dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.class_embedding, self.proj = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.eye(2))
        self.stem = nn.Linear(2, 2)
        self.blocks = nn.ModuleList([nn.Linear(2, 2) for _ in range(4)])
        self.norm = nn.LayerNorm(2)


def test_half_of_a_vit() -> None:
    names = trained(TimmImage(**VIT, freeze_lower=0.5))
    blocks = {name.split(".")[2] for name in names if name.startswith("model.blocks.")}
    assert blocks == {"2", "3"}
    assert {name for name in names if not name.startswith("model.blocks.")} == {
        "model.norm.weight",
        "model.norm.bias",
    }


def test_all_blocks_of_a_text_encoder(tmp_path: Path) -> None:
    bert = write_bert(tmp_path / "bert")
    assert trained(HuggingFaceText(str(bert), freeze_lower=1.0)) == set()
    half = trained(HuggingFaceText(str(bert), freeze_lower=0.5))
    assert half and all(name.startswith("model.encoder.layer.1.") for name in half)


def test_a_projection_that_was_made_first_is_trained() -> None:
    tower = Clip()
    tower.freeze_lower(0.75)
    assert trained(tower) == {
        "proj",
        "blocks.3.weight",
        "blocks.3.bias",
        "norm.weight",
        "norm.bias",
    }


def test_nothing_is_frozen_by_default_and_gradients_stop_where_it_begins() -> None:
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    whole, half = TimmImage(**VIT), TimmImage(**VIT, freeze_lower=0.5)
    assert len(trained(whole)) == len(list(whole.parameters()))
    half.load_state_dict(whole.state_dict())
    for tower in (whole, half):
        tower.eval()(pixels).pow(3).sum().backward()
    for name, parameter in half.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, dict(whole.named_parameters())[name].grad)
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"freeze_lower={share}"):
        Clip().freeze_lower(share)


def test_a_tower_without_blocks_is_refused() -> None:
    class Plain(Tower):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

    with pytest.raises(ValueError, match="Plain has no stack of blocks"):
        Plain().freeze_lower(0.5)


def tokens_seen(tower: ImageTower, blocks: nn.Module) -> int:
    """Tokens that reach the first block."""
    seen: list[int] = []
    hook = blocks[0].register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].shape[1])
    )
    size = tower.preprocess.size
    tower(torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8))
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_patches_are_dropped_in_training_but_not_at_its_end(tmp_path: Path, library: str) -> None:
    if library == "timm":
        tower: ImageTower = TimmImage(**VIT, patch_dropout=0.5)
        whole, blocks = 197, tower.model.blocks
    else:
        tower = OpenClipImage(f"local-dir:{write_open_clip(tmp_path / 'clip')}", patch_dropout=0.5)
        blocks = tower.model.transformer.resblocks
        whole = tower.model.positional_embedding.shape[0]
    few = 1 + (whole - 1) // 2
    assert tokens_seen(tower.train(), blocks) == few
    assert tokens_seen(tower.eval(), blocks) == whole
    tower.train().at(0.95)
    assert tokens_seen(tower, blocks) == whole
    tower.at(0.5)  # a run that is resumed earlier drops them again
    assert tokens_seen(tower, blocks) == few


def test_patches_are_only_dropped_where_there_are_some() -> None:
    with pytest.raises(ValueError, match="does not cut pictures into patches"):
        TimmImage("tf_efficientnet_lite0", patch_dropout=0.5)
    with pytest.raises(ValueError, match=r"patch_dropout=1\.0 is a share"):
        TimmImage(**VIT, patch_dropout=1.0)
