"""Items to tensors: which modality is there, and whose pictures are whose."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from tritower.datamodules.batch import Item
from tritower.datamodules.preprocess import ItemPreprocess, stable_hash
from tritower.datamodules.schema import Attribute, Schema
from tritower.towers.attribute import AttributePreprocess
from tritower.towers.image import PicturePreprocess
from tritower.towers.lexical import HashedNgrams
from tritower.towers.text import HashedWords, Template, TextPreprocess

SCHEMA = Schema(("title",), True, (Attribute("price", "number"), Attribute("brand", "category")))


def picture(gray: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (gray, gray, gray)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def preprocess() -> ItemPreprocess:
    return ItemPreprocess(
        "product",
        text=TextPreprocess(HashedWords(), Template("{title}")),
        image=PicturePreprocess(8),
        attribute=AttributePreprocess(SCHEMA),
        lexical=HashedNgrams("{description}").preprocess,
    )


ITEMS = [
    Item({"title": "mug", "description": "a mug"}, (picture(10), picture(20)), {"price": 3.0}),
    Item(images=(picture(30),)),
    Item({"title": "lamp"}, (), {"brand": "Acme"}),
    Item({"other": "x"}, (), {"price": math.nan, "brand": "", "weight": 3.0}),
]


def test_present_says_what_is_there(preprocess: ItemPreprocess) -> None:
    items = preprocess(ITEMS)
    text, image, attribute, words = items.present.T.tolist()
    assert text == [True, False, True, False]
    assert image == [True, True, False, False]
    assert attribute == [True, False, True, False]
    assert words == [True, False, False, False]


def test_pictures_know_their_items(preprocess: ItemPreprocess) -> None:
    items = preprocess(ITEMS)
    assert items.image_row.tolist() == [0, 0, 1]
    assert items.image.shape == (3, 3, 8, 8)
    assert items.image[:, 0, 0, 0].tolist() == [10, 20, 30]


def test_a_modality_that_no_item_has_is_none(preprocess: ItemPreprocess) -> None:
    items = preprocess([Item({"title": "mug"}), Item({"title": "lamp"})])
    assert (items.image, items.image_row, items.attribute, items.lexical) == (
        None,
        None,
        None,
        None,
    )
    assert preprocess([Item(images=(picture(1),))]).text is None


def test_a_modality_without_a_tower_is_absent() -> None:
    items = ItemPreprocess("query", image=PicturePreprocess(8))(ITEMS)
    assert (items.text, items.attribute) == (None, None)
    assert items.present.tolist() == [[False, True, False, False]] * 2 + [[False] * 4] * 2


def test_rows_are_views_of_the_same_items(preprocess: ItemPreprocess) -> None:
    whole = preprocess(ITEMS)
    for start, stop in [(0, 2), (1, 3), (2, 4), (0, 4)]:
        part = whole.rows(start, stop)
        own = preprocess(ITEMS[start:stop])
        assert torch.equal(part.present, own.present)
        assert torch.equal(part.text, whole.text[start:stop]) and torch.equal(
            part.lexical, whole.lexical[start:stop]
        )
        if own.image is None:
            assert part.image is None and part.image_row is None
        else:
            assert torch.equal(part.image, own.image) and torch.equal(part.image_row, own.image_row)


def test_each_picture_varies_with_the_randomness_of_its_item(preprocess: ItemPreprocess) -> None:
    seen = []

    class Spy:
        def __call__(
            self, images: list[bytes], rngs: list[np.random.Generator] | None = None
        ) -> torch.Tensor:
            seen.append(rngs)
            return torch.zeros(len(images), 3, 8, 8)

    spied = ItemPreprocess("product", image=Spy())
    rngs = [np.random.default_rng(i) for i in range(4)]
    spied(ITEMS, rngs)
    assert [rngs.index(rng) for rng in seen[0]] == [0, 0, 1]
    spied(ITEMS)
    assert seen[1] is None


def test_no_items_are_no_rows(preprocess: ItemPreprocess) -> None:
    assert preprocess([]).present.shape == (0, 4)


def test_hashes_are_the_same_in_every_process_and_release() -> None:
    assert stable_hash("B07") == 131630056928031115
    assert stable_hash("B07") == stable_hash(b"B07")
    hashes = [stable_hash(str(i)) for i in range(1000)]
    assert len(set(hashes)) == 1000
    assert min(hashes) > 0 and max(hashes) < 2**63
    stable_hash("\ud800")  # half a character, as broken catalogues hold
