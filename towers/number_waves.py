"""Numbers as sines and cosines of their logarithms: close numbers have close features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tritower.datamodules.batch import AttributeTensors
from tritower.datamodules.schema import Schema
from tritower.retrieval.evaluating.untrained_inputs import number_features
from tritower.towers.attribute import AttributePreprocess
from tritower.towers.tower import Tower


class NumberWaves(Tower):
    """Prices and other numbers, without anything to learn.

    Features are those of `tritower.retrieval.evaluating.untrained_inputs.number_features`, folded
    into a fixed size with signs where a catalogue has many numbers. Categories are left to the
    words of the record (`tritower.towers.sparse_terms`).

    Args:
        out_dim: size of the features.
    """

    frozen = True

    def __init__(self, out_dim: int = 256) -> None:
        super().__init__()
        if out_dim < 1:
            raise ValueError(f"out_dim={out_dim}: choose at least 1.")
        self.out_dim = out_dim

    def set_schema(self, schema: Schema) -> None:
        """Take the names of the numbers."""
        numbers = Schema(schema.text, schema.images, schema.numbers)
        self.preprocess = AttributePreprocess(numbers)

    def forward(self, attributes: AttributeTensors) -> Tensor:
        """(B, A) numbers -> (B, F) unit vectors, zeros where every number is missing."""
        values = attributes.number.cpu().double().numpy()
        waves = torch.from_numpy(number_features(values)).to(attributes.number.device)  # (B, W)
        if waves.shape[1] <= self.out_dim:
            return F.pad(waves, (0, self.out_dim - waves.shape[1]))
        # More waves than places: wave w adds to place w % F, every second round with a minus.
        place = torch.arange(waves.shape[1], device=waves.device)
        sign = 1.0 - 2 * (place // self.out_dim % 2)
        folded = waves.new_zeros(len(waves), self.out_dim)
        folded = folded.index_add(1, place % self.out_dim, waves * sign)
        return F.normalize(folded, dim=1)

    def architecture(self) -> dict[str, Any]:
        """See `Tower.architecture`."""
        return {"out_dim": self.out_dim}
