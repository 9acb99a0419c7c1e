"""Extra negatives of a batch: mined products, and others drawn at random."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Negatives(NamedTuple):
    """Mined negatives, and how many of them a batch takes.

    Attributes:
        file: (N, K) int32 rows of products that are hard negatives of each of N products, hardest
            first; -1 = none.
        per_example: extra products per example.
        share: 0 to 1, of those that are mined; the rest is drawn at random.
    """

    file: Path
    per_example: int
    share: float

    def draw(self, row: int, rng: np.random.Generator, others: np.ndarray) -> np.ndarray:
        """(per_example,) rows of products.

        Args:
            row: the example's own product.
            rng: of the example.
            others: (n,) rows to draw from at random.
        """
        mined = _table(self.file)[row]
        mined = mined[mined >= 0]
        drawn = others[rng.integers(len(others), size=self.per_example)]
        if not len(mined):
            return drawn
        hard = mined[rng.integers(len(mined), size=self.per_example)]
        return np.where(rng.random(self.per_example) < self.share, hard, drawn)


@lru_cache(2)
def _table(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="r", allow_pickle=False)
