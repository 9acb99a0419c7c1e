"""Texts by their exact words.

Hashed n-grams, for what sets one product apart and a text tower blurs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from tritower.datamodules.batch import Item, Side
from tritower.datamodules.preprocess import stable_hash
from tritower.datamodules.schema import Schema
from tritower.towers.text import Template, padded, split_words
from tritower.towers.tower import Tower


@lru_cache(maxsize=1 << 14)
def ngram_hashes(text: str, max_ngram: int, max_length: int) -> np.ndarray:
    """(G,) int64, ascending.

    The hash of each different n-gram. Kept, because a small catalogue is read every epoch.
    """
    words = split_words(text)[:max_length] if text else []
    sizes = range(1, max_ngram + 1)
    ngrams = {" ".join(words[i : i + size]) for size in sizes for i in range(len(words) - size + 1)}
    return np.array(sorted(map(stable_hash, ngrams)), np.int64)


@dataclass(frozen=True)
class NgramPreprocess:
    """Template, n-grams of words, their hashes."""

    template: Template
    max_ngram: int
    max_length: int
    typed: bool
    reads_attributes: ClassVar[bool] = False

    def render(self, item: Item) -> str:
        """The text of an item; empty where it has none, or is a typed query that is not read."""
        if "query" in item.text and not self.typed:
            return ""
        return self.template.render(item)

    def __call__(self, items: Sequence[Item], side: Side) -> tuple[Tensor | None, np.ndarray]:
        """(B, G) int64 hashes of the different n-grams of each item, 0 = padding; None for none.

        And (B,) bool, which items have a text.
        """
        texts = [self.render(item) for item in items]
        has_text = np.array([text != "" for text in texts], bool)
        if not has_text.any():
            return None, has_text
        hashes = [ngram_hashes(text, self.max_ngram, self.max_length) for text in texts]
        return padded(hashes), has_text


class HashedNgrams(Tower):
    """The words and neighboring words of a text, hashed into a vector of fixed size.

    Feature hashing (Weinberger et al., ICML 2009): each n-gram adds +1 or -1 to the place that its
    hash names, so the inner product of two vectors is the number of n-grams that two texts share,
    and collisions are noise around zero. Rows have unit length. There is nothing to learn before
    the projection, and every language is read alike.

    Args:
        template: how text fields are joined, e.g. `"{description}"`; fields that a product lacks
            are left out. Null joins all fields of the catalogue.
        out_dim: size of the features; larger has fewer collisions.
        max_ngram: the longest n-gram, in words: 1 takes single words, 2 pairs of neighbors too.
        max_length: words that are read.
        typed: whether typed queries are read. They name a few words of what is wanted, and a model
            must be trained on some (`data.examples.types`) to make use of that.
    """

    frozen = True

    def __init__(
        self,
        template: str | None = None,
        out_dim: int = 1024,
        max_ngram: int = 2,
        max_length: int = 256,
        typed: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (
            ("out_dim", out_dim),
            ("max_ngram", max_ngram),
            ("max_length", max_length),
        ):
            if value < 1:
                raise ValueError(f"{name}={value}: choose at least 1.")
        self.preprocess = NgramPreprocess(Template(template), max_ngram, max_length, typed)
        self.out_dim = out_dim

    def set_schema(self, schema: Schema) -> None:
        """Refuse a template that names none of the catalogue's text fields."""
        self.preprocess.template.check(schema)

    def forward(self, ngrams: Tensor) -> Tensor:
        """(B, G) int64 -> (B, F) unit vectors, zeros for a text without words."""
        place = (ngrams >> 1) % self.out_dim
        sign = (2.0 * (ngrams & 1) - 1) * (ngrams != 0)
        counts = sign.new_zeros(len(ngrams), self.out_dim).scatter_add_(1, place, sign)
        return F.normalize(counts, dim=-1)

    def architecture(self) -> dict[str, Any]:
        """See `Tower.architecture`."""
        p = self.preprocess
        return {
            "template": p.template.template,
            "out_dim": self.out_dim,
            "max_ngram": p.max_ngram,
            "max_length": p.max_length,
            "typed": p.typed,
        }
