"""Image towers: pictures as features. Several pictures of one product are pooled by the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from PIL import Image
from timm.layers import PatchDropout
from torch import Tensor, nn
from torch.nn import functional as F

from tritower.datamodules.images import decode
from tritower.towers.tower import Tower

WHOLE_PICTURES = 0.9
"""From this share of the training on, patches are no longer dropped.

So a model is used to whole pictures.
"""

Resize = Literal["pad", "crop", "squash"]
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class PicturePreprocess:
    """Encoded pictures to square pixels.

    Attributes:
        size: S, pixels of a side.
        resize: `pad` keeps the whole picture on white, `crop` takes the middle, `squash` changes
            the aspect ratio.
        interpolation: `nearest`, `bilinear`, `bicubic` or `lanczos`.
        augment: in training, take a random part of 70 to 100 % of the area, mirrored half of the
            time. Color stays: it is a fact about the product.
    """

    size: int
    resize: Resize = "pad"
    interpolation: str = "bicubic"
    augment: bool = False

    def __call__(
        self, images: Sequence[bytes], rngs: Sequence[np.random.Generator] | None = None
    ) -> Tensor:
        """(N, 3, S, S) uint8; varied where `rngs` are given."""
        squares = []
        for position, data in enumerate(images):
            rng = None
            if rngs is not None and self.augment:
                rng = rngs[position]
            # A draft decodes a JPEG at a fraction of its size, still above 2 S.
            picture = decode(data, draft=2 * self.size)
            squares.append(self.square(picture, rng))
        return torch.stack(squares)

    def square(self, picture: Image.Image, rng: np.random.Generator | None) -> Tensor:
        """An RGB picture as (3, S, S) uint8."""
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        mirror = False
        # In training: a random part, half of the time mirrored.
        if rng is not None:
            pixels = part_of(pixels, float(rng.uniform(0.7, 1.0)), rng)
            mirror = bool(rng.random() < 0.5)
        height, width = pixels.shape[1:]
        # Three ways to make the picture square.
        if self.resize == "crop":
            side = min(width, height)
            top = (height - side) // 2
            left = (width - side) // 2
            pixels = pixels[:, top : top + side, left : left + side]
        if self.resize == "pad" and width != height:
            scale = self.size / max(width, height)
            inner = self._resized(
                pixels, max(1, round(height * scale)), max(1, round(width * scale))
            )
            top = (self.size - inner.shape[1]) // 2
            left = (self.size - inner.shape[2]) // 2
            pixels = torch.full((3, self.size, self.size), 255, dtype=torch.uint8)
            pixels[:, top : top + inner.shape[1], left : left + inner.shape[2]] = inner
        else:
            pixels = self._resized(pixels, self.size, self.size)
        if mirror:
            return pixels.flip(2)
        return pixels

    def _resized(self, pixels: Tensor, height: int, width: int) -> Tensor:
        """(3, H, W) uint8 to (3, height, width).

        Within a level of what Pillow makes of it, in a fifth of its time.
        """
        if pixels.shape[1:] == (height, width):
            return pixels
        if self.interpolation in ("bilinear", "bicubic"):
            size = (height, width)
            return F.interpolate(pixels[None], size=size, mode=self.interpolation, antialias=True)[
                0
            ]
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        return torch.from_numpy(
            np.array(picture.resize((width, height), FILTERS[self.interpolation]))
        ).permute(2, 0, 1)


def part_of(pixels: Tensor, area: float, rng: np.random.Generator) -> Tensor:
    """A random part of a picture (3, H, W) with this share of its area and its aspect ratio."""
    height, width = (max(1, round(side * area**0.5)) for side in pixels.shape[1:])
    top, left = (
        int(rng.integers(0, all_ - part + 1))
        for all_, part in zip(pixels.shape[1:], (height, width), strict=True)
    )
    return pixels[:, top : top + height, left : left + width]


class ImageTower(Tower):
    """Base of the image towers.

    Args:
        preprocess: of this tower.
        mean: of each color channel, 0 to 1.
        std: of each color channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, preprocess: PicturePreprocess, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.preprocess = preprocess
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def drop_patches(self, share: float) -> None:
        """Drop a random share of each picture's patches, except in the last tenth of a training.

        A step takes about as much less time (arXiv:2212.00794).

        Args:
            share: of the patches, 0 (none) to below 1.

        Raises:
            ValueError: share out of range, or a model whose pictures are not cut into patches.
        """
        if not 0 <= share < 1:
            raise ValueError(
                f"patch_dropout={share} is a share of the patches: choose 0 to below 1."
            )
        self.patch_dropout = share
        if share == 0:
            return
        found = False
        # timm and open_clip both keep a placeholder for it, under two names.
        for module in list(self.modules()):
            # The names of timm and of open_clip; both drop nothing by default.
            for name in (
                "patch_drop",
                "patch_dropout",
            ):
                if isinstance(getattr(module, name, None), nn.Module):
                    prefix = getattr(module, "num_prefix_tokens", 1)
                    setattr(module, name, PatchDropout(share, num_prefix_tokens=prefix))
                    found = True
        if not found:
            raise ValueError(
                f"patch_dropout={share}: this model does not cut pictures into patches (a ViT "
                "does)."
            )

    def at(self, progress: float) -> None:
        """See `Tower.at`: whole pictures in the last tenth."""
        for module in self.modules():
            if isinstance(module, PatchDropout):
                if progress < WHOLE_PICTURES:
                    module.prob = self.patch_dropout
                else:
                    module.prob = 0.0

    def normalize(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> float32 with the model's mean and standard deviation.

        Done where the pixels are.

        Channels lie last in memory: convolutions keep that up and are faster with it (EfficientNet
        on a CPU: 1.4 times, forth and back); a ViT sees no difference.
        """
        normal = (pixels.to(self.mean.dtype) / 255 - self.mean) / self.std
        return normal.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class PictureOptions:
    """How pictures become the pixels that a timm backbone reads.

    Attributes:
        image_size: pixels of a side; null takes the model's own.
        resize: `pad` keeps the whole picture on white, `crop` takes the middle, `squash` changes
            the aspect ratio.
        interpolation: `nearest`, `bilinear`, `bicubic` or `lanczos`; null takes the model's own.
        mean: of each color channel, 0 to 1; null takes the model's own.
        std: of each color channel; null takes the model's own.
        augment: vary the pictures in training (crops of 70 to 100 %, mirrored at random).
    """

    image_size: int | None = None
    resize: Resize = "pad"
    interpolation: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    augment: bool = False

    def __post_init__(self) -> None:
        """Refuse an unknown interpolation.

        Raises:
            ValueError: not one of `FILTERS`.
        """
        if self.interpolation is not None and self.interpolation not in FILTERS:
            raise ValueError(
                f"interpolation={self.interpolation!r}: choose one of {', '.join(FILTERS)}."
            )


DEFAULT_PICTURES = PictureOptions()


class TimmImage(ImageTower):
    """Any backbone of the timm library.

    Args:
        model: name in timm, e.g. `vit_base_patch16_224` or `tf_efficientnet_lite0`, or
            `hf-hub:org/repo`.
        pretrained: true loads timm's weights by the model's name; a path loads a local weights
            file.
        model_args: further arguments of the timm model, e.g. `{depths: [1, 1, 2, 1]}`.
        pictures: how pictures become pixels.
        freeze: keep the weights as they are; their features can then be cached.
        freeze_lower: share of the blocks, from the input on, whose weights are kept; 0.5 takes
            about half of the time.
        patch_dropout: share of a ViT's patches that training leaves out, in all but its last tenth.
    """

    def __init__(
        self,
        model: str,
        pretrained: bool | Path = False,
        model_args: dict[str, Any] | None = None,
        pictures: PictureOptions = DEFAULT_PICTURES,
        freeze: bool = False,
        freeze_lower: float = 0.0,
        patch_dropout: float = 0.0,
    ) -> None:
        if isinstance(pretrained, Path) and not pretrained.is_file():
            raise FileNotFoundError(f"pretrained={pretrained}: no such weights file.")
        if isinstance(pretrained, Path):
            overlay = {"file": str(pretrained)}
        else:
            overlay = None
        backbone = timm.create_model(
            model,
            pretrained=bool(pretrained),
            pretrained_cfg_overlay=overlay,
            num_classes=0,
            **(model_args or {}),
        )
        # The model's own settings, where no others are named.
        own = timm.data.resolve_model_data_config(backbone)
        preprocess = PicturePreprocess(
            pictures.image_size or own["input_size"][-1],
            pictures.resize,
            pictures.interpolation or own["interpolation"],
            pictures.augment,
        )
        super().__init__(
            preprocess, list(pictures.mean or own["mean"]), list(pictures.std or own["std"])
        )
        self.name = model
        self.model_args = dict(model_args or {})
        if model.startswith("hf-hub:"):  # the model folder must not need the hub again
            _, self.name, hub_args = timm.models.load_model_config_from_hf(
                model.removeprefix("hf-hub:")
            )
            self.model_args = {**hub_args, **self.model_args}
        self.model = backbone
        self.pretrained = bool(pretrained)
        self.out_dim = backbone.num_features
        self.drop_patches(patch_dropout)
        self.freeze_lower(freeze_lower)
        if freeze:
            self.freeze()

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> (N, F)."""
        return self.model(self.normalize(pixels))

    def architecture(self) -> dict[str, Any]:
        """See `Tower.architecture`."""
        pictures = {
            "image_size": self.preprocess.size,
            "resize": self.preprocess.resize,
            "interpolation": self.preprocess.interpolation,
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
            "augment": self.preprocess.augment,
        }
        return {"model": self.name, "model_args": self.model_args, "pictures": pictures}

    @classmethod
    def rebuild(cls, architecture: dict[str, Any], assets: Path) -> TimmImage:
        """See `Tower.rebuild`."""
        pictures = PictureOptions(**architecture["pictures"])
        return cls(**{**architecture, "pictures": pictures})
