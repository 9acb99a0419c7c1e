"""Both sides of open_clip's models, each usable alone: a text tower and an image tower."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from torch import Tensor, nn

from tritower.towers.hugging_face import HuggingFaceTokenizer
from tritower.towers.image import ImageTower, PicturePreprocess, Resize
from tritower.towers.text import Template, TextPreprocess, TextTower
from tritower.towers.tower import loads_weights, without_weights


@dataclass(frozen=True)
class OpenClipTokenizer:
    """A tokenizer of the open_clip library.

    Its fixed length is trimmed where the model allows it.
    """

    tokenizer: Any

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, L) int64 token ids; the end token stays where a text is cut."""
        return self.tokenizer(list(texts))

    def lengths_and_fallbacks(self, text: str) -> tuple[int, int, int]:
        """Unknown are the unknown token and single bytes of a character."""
        inner = getattr(self.tokenizer, "tokenizer", None)
        length = self.tokenizer.context_length
        if inner is not None:
            return HuggingFaceTokenizer(inner, length).lengths_and_fallbacks(text)
        ids = self.tokenizer.encode(text)
        # ids below 512 are the 256 bytes, alone and at the end of a word; ASCII letters are words
        # of their own
        unknown = sum(
            i < 512 and not self.tokenizer.decoder[i].removesuffix("</w>").isascii() for i in ids
        )
        return len(ids) + 2, min(len(ids) + 2, length), unknown


def open_clip_config(model: str) -> dict[str, Any]:
    """`open_clip_config.json` of a model of open_clip: `model_cfg` and `preprocess_cfg`.

    Args:
        model: a built-in name, `hf-hub:org/repo`, or `local-dir:/path`.

    Raises:
        ValueError: no such built-in model.
    """
    # A local folder, a model of the hub, or a built-in name.
    # A local folder, a repository of Hugging Face, or a name of open_clip.
    if model.startswith("local-dir:"):
        path = Path(model.removeprefix("local-dir:")) / "open_clip_config.json"
        return dict(json.loads(path.read_text(encoding="utf-8")))
    if model.startswith("hf-hub:"):
        from open_clip.factory import (
            _get_hf_config,  # open_clip offers no public way to the raw configuration
        )

        return dict(_get_hf_config(model.removeprefix("hf-hub:")))
    config = open_clip.get_model_config(model)
    if config is None:
        raise ValueError(
            f"open_clip has no model {model!r}. Its names: "
            f"{', '.join(open_clip.list_models()[:8])}, ..."
        )
    return {"model_cfg": config, "preprocess_cfg": {}}


def create_open_clip(model: str, pretrained: str | None) -> nn.Module:
    """A model of open_clip whose text side is a module of its own (`.text` beside `.visual`)."""
    return open_clip.create_model(
        model,
        pretrained=pretrained if loads_weights() else None,
        load_weights=loads_weights(),
        pretrained_text=False,
        force_custom_text=True,
    )


def is_pretrained(model: str, pretrained: str | None) -> bool:
    """Whether open_clip loads weights for this name."""
    has_weights = pretrained is not None or model.startswith(("hf-hub:", "local-dir:"))
    return has_weights and loads_weights()


class OpenClipText(TextTower):
    """The text transformer of an open_clip model, with its projection.

    Args:
        model: a built-in name (`ViT-B-16`), `hf-hub:org/repo`, or `local-dir:/path`.
        pretrained: tag of open_clip's weights (`laion2b_s34b_b88k`) or a weights file; null trains
            from scratch.
        template: how text fields are joined, e.g. `"{title}. {description}"`; fields that a product
            lacks are left out. Null joins all fields of the catalogue.
        query_prefix: put in front of queries.
        product_prefix: put in front of products.
        freeze: keep the weights as they are; their features can then be cached.
        freeze_lower: share of the blocks, from the input on, whose weights are kept; 0.5 takes
            about half of the time.
    """

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        template: str | None = None,
        query_prefix: str = "",
        product_prefix: str = "",
        freeze: bool = False,
        freeze_lower: float = 0.0,
    ) -> None:
        self.config = open_clip_config(model)
        tokenizer = OpenClipTokenizer(open_clip.get_tokenizer(model))
        super().__init__(
            TextPreprocess(tokenizer, Template(template), query_prefix, product_prefix)
        )
        # The text side alone; the visual side is dropped.
        text: Any = create_open_clip(model, pretrained).text
        self.model = text
        self.pretrained = is_pretrained(model, pretrained)
        self.out_dim = self.config["model_cfg"]["embed_dim"]
        self.freeze_lower(freeze_lower)
        if freeze:
            self.freeze()

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 -> (B, F)."""
        return self.model(tokens)

    def architecture(self) -> dict[str, Any]:
        """See `Tower.architecture`."""
        return dict(self.wording())

    def save_assets(self, folder: Path) -> None:
        """The model's configuration and the tokenizer's files."""
        (folder / "open_clip_config.json").write_text(json.dumps(self.config), encoding="utf-8")
        if hasattr(self.preprocess.tokenizer.tokenizer, "save_pretrained"):
            self.preprocess.tokenizer.tokenizer.save_pretrained(folder)

    @classmethod
    def rebuild(cls, architecture: dict[str, Any], assets: Path) -> OpenClipText:
        """See `Tower.rebuild`."""
        with without_weights():
            return cls(model=f"local-dir:{assets}", **architecture)


RESIZE: dict[str, Resize] = {"shortest": "crop", "longest": "pad", "squash": "squash"}
"""open_clip's names of the ways to make a picture square, and ours."""


class OpenClipImage(ImageTower):
    """The visual tower of an open_clip model, with its projection.

    Args:
        model: a built-in name (`ViT-B-16`), `hf-hub:org/repo`, or `local-dir:/path`.
        pretrained: tag of open_clip's weights (`laion2b_s34b_b88k`) or a weights file; null trains
            from scratch.
        augment: vary the pictures in training (crops of 70 to 100 %, mirrored at random).
        freeze: keep the weights as they are; their features can then be cached.
        freeze_lower: share of the blocks, from the input on, whose weights are kept; 0.5 takes
            about half of the time.
        patch_dropout: share of a ViT's patches that training leaves out, in all but its last tenth.
    """

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        augment: bool = False,
        freeze: bool = False,
        freeze_lower: float = 0.0,
        patch_dropout: float = 0.0,
    ) -> None:
        self_config = open_clip_config(model)
        visual: Any = create_open_clip(model, pretrained).visual
        cfg = {**self_config.get("preprocess_cfg", {}), **visual.preprocess_cfg}
        if isinstance(cfg["size"], int):
            # Pictures are square: the first of (height, width) is the size.
            size = cfg["size"]
        else:
            size = cfg["size"][0]
        resize = RESIZE[cfg.get("resize_mode", "shortest")]
        preprocess = PicturePreprocess(size, resize, cfg.get("interpolation", "bicubic"), augment)
        super().__init__(preprocess, mean=cfg["mean"], std=cfg["std"])
        self.config = {**self_config, "preprocess_cfg": cfg}
        self.model = visual
        self.pretrained = is_pretrained(model, pretrained)
        self.out_dim = self_config["model_cfg"]["embed_dim"]
        self.drop_patches(patch_dropout)
        self.freeze_lower(freeze_lower)
        if freeze:
            self.freeze()

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> (N, F)."""
        return self.model(self.normalize(pixels))

    def architecture(self) -> dict[str, Any]:
        """See `Tower.architecture`."""
        return {"augment": self.preprocess.augment}

    def save_assets(self, folder: Path) -> None:
        """The model's configuration."""
        (folder / "open_clip_config.json").write_text(json.dumps(self.config), encoding="utf-8")

    @classmethod
    def rebuild(cls, architecture: dict[str, Any], assets: Path) -> OpenClipImage:
        """See `Tower.rebuild`."""
        with without_weights():
            return cls(model=f"local-dir:{assets}", **architecture)
