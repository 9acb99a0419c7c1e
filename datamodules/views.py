"""Two people never describe a product the same way.

A view is an item with some of its facts left out.

Views are what makes any subset of modalities work as a query or a product, and what a catalogue
without any queries is trained on: two views of one product belong together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from tritower.datamodules.batch import Item

T = TypeVar("T")


@dataclass(frozen=True)
class Views:
    """How much is left out of an item in training. Something always stays.

    Attributes:
        modality_dropout: chance, 0 to 1, that a modality (text, pictures, attributes) is left out
            of an item.
        field_dropout: chance, 0 to 1, that one text field or one attribute is left out; a modality
            keeps at least one.
        picture_dropout: chance, 0 to 1, that one of several pictures is left out.
    """

    modality_dropout: float = 0.15
    field_dropout: float = 0.1
    picture_dropout: float = 0.3

    def __post_init__(self) -> None:
        for name in ("modality_dropout", "field_dropout", "picture_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a chance between 0 and 1.")

    def __call__(self, item: Item, rng: np.random.Generator) -> Item:
        """A view of `item`; the same for the same state of `rng`."""
        text = dict(item.text)
        images = tuple(item.images)
        attributes = dict(item.attributes)
        there = [bool(text), bool(images), bool(attributes)]
        keep_text, keep_images, keep_attributes = keep_some(there, self.modality_dropout, rng)
        return Item(
            text=keep_fields(text, self.field_dropout, rng) if keep_text else {},
            images=keep_pictures(images, self.picture_dropout, rng) if keep_images else (),
            attributes=keep_fields(attributes, self.field_dropout, rng) if keep_attributes else {},
        )


def keep_some(there: list[bool], dropout: float, rng: np.random.Generator) -> list[bool]:
    """Drop each that is there with chance `dropout`, but never all of them."""
    kept = []
    for is_there, chance in zip(there, rng.random(len(there)), strict=True):
        kept.append(is_there and chance >= dropout)
    if any(there) and not any(kept):
        candidates = np.flatnonzero(there)
        kept[int(candidates[rng.integers(len(candidates))])] = True
    return kept


def keep_fields(fields: dict[str, T], dropout: float, rng: np.random.Generator) -> dict[str, T]:
    """Some of the fields, at least one where there are any."""
    kept = keep_some([True] * len(fields), dropout, rng)
    return {name: value for (name, value), keep in zip(fields.items(), kept, strict=True) if keep}


def keep_pictures(
    images: tuple[bytes, ...], dropout: float, rng: np.random.Generator
) -> tuple[bytes, ...]:
    """Some of the pictures, at least one where there are any."""
    kept = keep_some([True] * len(images), dropout, rng)
    return tuple(picture for picture, keep in zip(images, kept, strict=True) if keep)
