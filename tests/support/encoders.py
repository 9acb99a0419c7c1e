"""A small encoder with all towers, and items for it."""

from __future__ import annotations

import numpy as np
import torch

from tests.support.catalogues import SCHEMA, picture
from tests.support.tiny_models import TIMM, TIMM_ARGS
from tritower.datamodules.batch import Item
from tritower.towers.attribute import AttributeTower
from tritower.towers.encoder import Encoder
from tritower.towers.image import PictureOptions, TimmImage
from tritower.towers.lexical import HashedNgrams
from tritower.towers.text import BiLSTM

RNG = np.random.default_rng(0)


PICTURES = [picture((200, 30, 30), RNG), picture((30, 30, 200), RNG), picture((30, 200, 30), RNG)]


TEXT, ATTRIBUTES = (
    {"title": "red mug", "description": "A mug."},
    {"brand": "Acme", "price": 9.0, "tags": ["red"]},
)


ITEMS = [
    Item(TEXT, PICTURES[:2], ATTRIBUTES),
    Item({"title": "lamp"}),
    Item(images=PICTURES[2:]),
    Item(attributes={"category": ["home", "lamp"]}),
    Item({"query": "blue bag"}, PICTURES[1:]),
]


def make_encoder(fusion: str = "gated") -> Encoder:
    """All towers, with weights away from where training starts."""
    encoder = Encoder(
        16,
        BiLSTM("{title}", num_buckets=256, word_dim=8, hidden_dim=6),
        TimmImage(TIMM, model_args=TIMM_ARGS, pictures=PictureOptions(image_size=32)),
        AttributeTower(12, value_dim=4, num_buckets=256),
        HashedNgrams("{description}", 32),
        fusion,
    )
    encoder.set_schema(SCHEMA)
    for parameter in encoder.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return encoder.eval()
