"""list[Item] -> Items, with the towers' own preprocessing. Picklable: loader workers run it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tritower.datamodules.batch import (
    MODALITIES,
    AttributeTensors,
    Item,
    Items,
    Side,
    TermTensors,
)


def stable_hash(text: str | bytes) -> int:
    """A positive 63-bit hash that is the same in every process and release; never 0."""
    if isinstance(text, str):
        data = text.encode("utf-8", "surrogatepass")
    else:
        data = text
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1 or 1


class TextPreprocess(Protocol):
    """The preprocessing of a text tower."""

    def render(self, item: Item, side: Side) -> str:
        """The text of an item on this side; empty where it has none."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, L) int64 token ids, or (B, F) float32 features.

        An empty text is a row like any other.
        """


class LexicalPreprocess(Protocol):
    """The preprocessing of a lexical tower."""

    reads_attributes: bool

    def __call__(
        self, items: Sequence[Item], side: Side
    ) -> tuple[Tensor | TermTensors | None, np.ndarray]:
        """The words of B items, None where no item has any; and (B,) bool, which have."""


class ImagePreprocess(Protocol):
    """The preprocessing of an image tower."""

    def __call__(
        self, images: Sequence[bytes], rngs: Sequence[np.random.Generator] | None = None
    ) -> Tensor:
        """(N, 3, H, W) uint8 pixels, or (N, F) float32 features.

        N `rngs` given = training, pictures may be varied.
        """


class AttributePreprocess(Protocol):
    """The preprocessing of an attribute tower."""

    def __call__(
        self, attributes: Sequence[Mapping[str, str | float | Sequence[str]]]
    ) -> AttributeTensors:
        """The attributes of B items."""


@dataclass(frozen=True)
class ItemPreprocess:
    """The preprocessing of one encoder on one side.

    A modality without a tower is None and stays absent.
    """

    side: Side
    text: TextPreprocess | None = None
    image: ImagePreprocess | None = None
    attribute: AttributePreprocess | None = None
    lexical: LexicalPreprocess | None = None

    def readable(self, item: Item) -> Item:
        """The item without the modalities that this encoder has no tower for."""
        lexical = self.lexical
        reads_text = self.text is not None or lexical is not None
        reads_attributes = self.attribute is not None or (
            lexical is not None and lexical.reads_attributes
        )
        return Item(
            text=item.text if reads_text else {},
            images=item.images if self.image is not None else (),
            attributes=item.attributes if reads_attributes else {},
        )

    def __call__(
        self, items: Sequence[Item], rngs: Sequence[np.random.Generator] | None = None
    ) -> Items:
        """B items as tensors.

        Args:
            items: B items. One of which this encoder knows no modality gets a row of `present`
                without a True.
            rngs: B of them in training: pictures may be varied with them, and a part of each item
                is drawn.
        """
        present = np.zeros((len(items), len(MODALITIES)), bool)
        image = image_row = attribute = None
        text, present[:, 0] = self._written(items)
        lexical = None
        if self.lexical is not None:
            lexical, present[:, 3] = self.lexical(items, self.side)
        # Pictures of all items in one tensor, with the item of each.
        if self.image is not None:
            counts = [len(item.images) for item in items]
            present[:, 1] = [count > 0 for count in counts]
            if present[:, 1].any():
                image_row = torch.from_numpy(np.repeat(np.arange(len(items)), counts))
                if rngs is None:
                    picture_rngs = None
                else:
                    picture_rngs = [rngs[row] for row in image_row.tolist()]
                image = self.image(
                    [picture for item in items for picture in item.images], picture_rngs
                )
        # An item has attributes if any number or category is known.
        if self.attribute is not None:
            attribute = self.attribute([item.attributes for item in items])
            number, category = attribute
            if number.shape[1]:
                known = ~number.isnan().all(1)
            else:
                known = torch.zeros(len(items), dtype=torch.bool)
            present[:, 2] = (known | (category != 0).flatten(1).any(1)).numpy()
            if not present[:, 2].any():
                attribute = None
        if rngs is None:
            # Parts of modalities are drawn in training only.
            part = None
        else:
            part = np.stack([part_of(row, rng) for row, rng in zip(present, rngs, strict=True)])
        return Items(
            text,
            image,
            image_row,
            attribute,
            torch.from_numpy(present),
            None if part is None else torch.from_numpy(part),
            lexical,
        )

    def _written(self, items: Sequence[Item]) -> tuple[Tensor | None, np.ndarray]:
        """The input of the text tower, None where no item has a text.

        And (B,) bool, which have.
        """
        has_text = np.zeros(len(items), bool)
        if self.text is None:
            return None, has_text
        texts = [self.text.render(item, self.side) for item in items]
        has_text[:] = [text != "" for text in texts]
        return (self.text(texts) if has_text.any() else None), has_text


def part_of(present: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(M,) bool -> (M,) bool.

    Some of the modalities that are there, not all; all sizes have the same chance.
    """
    there = np.flatnonzero(present)
    if len(there) < 2:
        return present
    part = np.zeros_like(present)
    part[rng.choice(there, rng.integers(1, len(there)), replace=False)] = True
    return part


@dataclass(frozen=True)
class Preprocess:
    """The preprocessing of a two-tower model: one per side."""

    query: ItemPreprocess
    product: ItemPreprocess
