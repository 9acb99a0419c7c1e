"""The attribute tower: numbers, categories, category paths and multi-valued sets as features."""

from __future__ import annotations

import logging
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tritower.datamodules.batch import AttributeTensors
from tritower.datamodules.preprocess import stable_hash
from tritower.datamodules.schema import Attribute, Schema
from tritower.towers.tower import Tower

logger = logging.getLogger(__name__)

Value = str | float | Sequence[str]

LARGEST = 1e38
"""Numbers are float32."""


@lru_cache(maxsize=1 << 20)
def value_hash(name: str, value: str) -> int:
    """Hash of one value of one attribute; case, width and surrounding space do not matter."""
    return stable_hash(f"{name}={unicodedata.normalize('NFKC', value).casefold().strip()}")


def levels(attribute: Attribute, value: Value) -> list[str]:
    """The values of an attribute as texts.

    For a path one for each level, so that relatives share the upper ones.

    A size may be 38 or 38.0, and is "38" in both cases. Empty values are left out.
    """
    if not isinstance(value, Sequence):
        if math.isnan(value):
            return []
        return [f"{value:.15g}"]
    values = [value] if isinstance(value, str) else list(value)
    if attribute.attribute_type == "path":
        values = [" > ".join(values[: depth + 1]) for depth in range(len(values))]
    return [value for value in values if value.strip()]


@dataclass(frozen=True)
class AttributePreprocess:
    """Attributes to raw numbers and hashes of values.

    Attributes that the schema does not know are left out.
    """

    schema: Schema

    def __call__(self, attributes: Sequence[Mapping[str, Value]]) -> AttributeTensors:
        """The attributes of B items."""
        numbers = self.schema.numbers
        categories = self.schema.categories
        number = np.full((len(attributes), len(numbers)), math.nan, np.float32)
        hashes: list[tuple[int, int, list[int]]] = []
        # Numbers stay numbers, NaN where missing. Categories become hashes, one for each level or
        # value.
        for row, facts in enumerate(attributes):
            for column, attribute in enumerate(numbers):
                number[row, column] = as_number(attribute.name, facts.get(attribute.name))
            for column, attribute in enumerate(categories):
                if (value := facts.get(attribute.name)) is not None:
                    hashes.append(
                        (
                            row,
                            column,
                            [value_hash(attribute.name, v) for v in levels(attribute, value)],
                        )
                    )
        # Pad the hashes of all products to the same width; 0 is none.
        width = max([1, *(len(values) for _, _, values in hashes)])
        category = np.zeros((len(attributes), len(categories), width), np.int64)
        for row, column, values in hashes:
            category[row, column, : len(values)] = values
        return AttributeTensors(torch.from_numpy(number), torch.from_numpy(category))


def as_number(name: str, value: Value | None) -> float:
    """A finite number, or NaN for what is none.

    Text where numbers were learned is a missing value, not a zero.
    """
    if isinstance(value, (int, float)) and math.isfinite(value):
        return max(-LARGEST, min(LARGEST, float(value)))
    if value and not isinstance(value, float):
        warn_of_text(name)
    return math.nan


@lru_cache
def warn_of_text(name: str) -> None:
    """Once for each attribute."""
    logger.warning(
        "The attribute %r is a number for this model: what is given as text counts as missing", name
    )


class AttributeTower(Tower):
    """Attributes as features: one learned vector for each attribute, joined by a small network.

    Numbers are standardized by the statistics of the catalogue (after a logarithm where they are
    skewed) and take periodic embeddings (PLR, arXiv:2203.05556). Values of categories share one
    table of hash embeddings (arXiv:1709.03933), so that values never seen in training work; a path
    is the mean over its levels, a set the mean over its members. Each attribute has a learned
    vector for "missing".

    Args:
        out_dim: size of the features.
        value_dim: size of the vector of one attribute.
        num_buckets: rows of the table of hash embeddings, a power of two.
        num_hashes: rows of the table that are summed for one value.
        num_frequencies: of the periodic embeddings of a number.
        frequency_scale: standard deviation of the initial frequencies; higher separates closer
            numbers apart.
        exact_numbers: whether a number has a hash embedding of its exact value, too: that two
            prices are equal to the cent is stronger evidence than that they are close.
        dropout: of the vectors of attributes, 0 to 1.
    """

    log: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        out_dim: int = 256,
        value_dim: int = 32,
        num_buckets: int = 1 << 14,
        num_hashes: int = 2,
        num_frequencies: int = 16,
        frequency_scale: float = 0.3,
        exact_numbers: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if num_buckets < 2 or num_buckets & (num_buckets - 1):
            raise ValueError(f"num_buckets={num_buckets} is not a power of two, e.g. {1 << 14}.")
        if not 1 <= num_hashes <= 4:
            raise ValueError(f"num_hashes={num_hashes}: choose 1 to 4.")
        self.out_dim = out_dim
        self.value_dim = value_dim
        self.num_buckets = num_buckets
        self.num_hashes = num_hashes
        self.num_frequencies = num_frequencies
        self.frequency_scale = frequency_scale
        self.exact_numbers = exact_numbers
        self.dropout = nn.Dropout(dropout)
        self.schema: Schema | None = None

    @property
    def preprocess(self) -> AttributePreprocess:
        """Needs the schema."""
        if self.schema is None:
            raise RuntimeError("The attribute tower has no schema yet: call set_schema first.")
        return AttributePreprocess(self.schema)

    def set_schema(self, schema: Schema) -> None:
        """Make the parameters for the attributes of this catalogue.

        Raises:
            ValueError: the catalogue has no attributes.
        """
        if not schema.attributes:
            raise ValueError(
                "The catalogue has no attributes: leave the attribute tower out (attribute: null)."
            )
        self.schema = schema
        numbers = schema.numbers
        dim = self.value_dim
        self.register_buffer(
            "log", torch.tensor([a.log for a in numbers], dtype=torch.bool), persistent=False
        )
        self.register_buffer("mean", torch.tensor([a.mean for a in numbers]), persistent=False)
        self.register_buffer("std", torch.tensor([a.std for a in numbers]), persistent=False)
        # No buffer: averaged over steps, it would name others.
        self.names = torch.tensor([stable_hash(a.name) for a in numbers], dtype=torch.int64)
        frequencies = 2 * self.num_frequencies
        self.frequency = nn.Parameter(
            torch.randn(len(numbers), self.num_frequencies) * self.frequency_scale
        )
        self.number_weight = nn.Parameter(
            torch.randn(len(numbers), frequencies, dim) / math.sqrt(frequencies)
        )
        self.number_bias = nn.Parameter(torch.zeros(len(numbers), dim))
        self.buckets = nn.Embedding(self.num_buckets, dim)
        nn.init.normal_(self.buckets.weight, std=1 / math.sqrt(self.num_hashes))
        # Starts at zero, so two missing values do not count as a match.
        self.missing = nn.Parameter(torch.zeros(len(schema.attributes), dim))
        joined = dim * (len(schema.attributes) + (len(numbers) if self.exact_numbers else 0))
        self.join = nn.Sequential(nn.LayerNorm(joined), nn.Linear(joined, self.out_dim))
        last = nn.Linear(self.out_dim, self.out_dim)
        nn.init.zeros_(last.weight)  # starts at zero
        nn.init.zeros_(last.bias)
        self.refine = nn.Sequential(nn.GELU(), last)

    def forward(self, attributes: AttributeTensors) -> Tensor:
        """The attributes of B items -> (B, F)."""
        number, category = attributes
        missing = torch.cat([number.isnan(), (category == 0).all(-1)], 1).unsqueeze(-1)  # (B, A, 1)
        values = torch.cat(
            [self.number_vectors(number), self.category_vectors(category)], 1
        )  # (B, A, d)
        values = torch.where(missing, self.missing, values)
        if self.exact_numbers:
            values = torch.cat([values, self.exact_vectors(number)], 1)
        features = self.join(self.dropout(values).flatten(1))
        return features + self.refine(features)

    def number_vectors(self, number: Tensor) -> Tensor:
        """(B, A) raw values -> (B, A, d); those of NaN are arbitrary but finite."""
        value = number.nan_to_num(0.0)
        value = torch.where(self.log, value.clamp(min=0).log1p(), value)
        # All values far outside the training range look alike.
        value = ((value - self.mean) / self.std).clamp(-8, 8)
        angle = 2 * math.pi * self.frequency * value.unsqueeze(-1)  # (B, A, k)
        periodic = torch.cat([angle.sin(), angle.cos()], -1)
        return (
            torch.einsum("baf,afd->bad", periodic, self.number_weight).add(self.number_bias).relu()
        )

    def exact_vectors(self, number: Tensor) -> Tensor:
        """(B, A) raw values -> (B, A, d) hash embeddings of them, zeros for NaN."""
        bits = (number.float() + 0.0).view(torch.int32).long()  # -0.0 + 0.0 is 0.0
        if self.names.device != number.device:
            self.names = self.names.to(number.device)
        return self.hash_vectors(bits * MULTIPLIERS[0] ^ self.names) * ~number.isnan().unsqueeze(-1)

    def category_vectors(self, category: Tensor) -> Tensor:
        """(B, A, V) hashes -> (B, A, d), the mean over values that are there."""
        there = (category != 0).unsqueeze(-1)  # (B, A, V, 1)
        vectors = self.hash_vectors(category) * there  # (B, A, V, d)
        return vectors.sum(2) / there.sum(2).clamp(min=1)

    def hash_vectors(self, hashes: Tensor) -> Tensor:
        """Embeddings of hashes: (N,) int64 -> (N, d)."""
        rows = torch.stack(
            [bucket(hashes, i, self.num_buckets) for i in range(self.num_hashes)], -1
        )
        return self.buckets(rows).sum(-2)

    def architecture(self) -> dict[str, Any]:
        """See `Tower.architecture`."""
        return {
            "out_dim": self.out_dim,
            "value_dim": self.value_dim,
            "num_buckets": self.num_buckets,
            "num_hashes": self.num_hashes,
            "num_frequencies": self.num_frequencies,
            "frequency_scale": self.frequency_scale,
            "exact_numbers": self.exact_numbers,
            "dropout": self.dropout.p,
        }

    def save_assets(self, folder: Path) -> None:
        """Nothing: the model folder carries the schema."""


MULTIPLIERS = (0x1E3779B97F4A7C15, 0x3C6EF372FE94F82B, 0x5A5A6B2D1F3C9E77, 0x7F4A7C159E3779B9)
"""Odd, and far apart: one independent hash function each."""


def bucket(value: Tensor, number: int, num_buckets: int) -> Tensor:
    """The table rows of 63-bit values under hash function `number`: (N,) int64 -> (N,) int64.

    Multiply-shift, with overflow wanted.
    """
    bits = num_buckets.bit_length() - 1
    return (value * MULTIPLIERS[number] >> (62 - bits)) & (num_buckets - 1)
