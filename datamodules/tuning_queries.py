"""Queries to tune an index by, made of some products of a catalogue: nobody has judged them.

Judged queries measure an index, so they must not choose how it is searched. Here products are
queries as a whole and by one modality alone, and by a few words of their title, as somebody would
type them.
"""

from __future__ import annotations

import math

import numpy as np
import pyarrow.compute as pc

from tritower.datamodules.batch import Item
from tritower.datamodules.catalogue import Table

MOST_PRODUCTS = 1000
"""Number of products as queries: a recall of .98 is then known to less than half a point."""

SHARE = 0.1
"""Share of a small catalogue's products that are queries.

Embedding them must not take longer than the products.
"""

ROW_GROUPS = 64
"""Products are drawn from so many row groups of the catalogue.

A group is read as a whole, with its pictures.
"""

WORDS = 3
"""Words of a typed query at most."""

SEED = 0


class TuningQueries:
    """Products as tuning queries, and the texts that somebody would type for them.

    Args:
        products: the catalogue.
        queries: its judged queries, or None. Products that ask there do not ask here, and what is
            typed there is not typed here.

    Attributes:
        rows: (T,) int64 rows of these products, ascending.
    """

    def __init__(self, products: Table, queries: Table | None) -> None:
        self._judged: frozenset[str] = frozenset()
        is_judged = np.zeros(len(products), bool)
        if queries is not None:
            texts = pc.drop_null(queries.column("text").unique()).to_pylist()
            self._judged = frozenset(_plain(text) for text in texts)
            sources = queries.column("source_product_id").unique()
            is_judged = pc.is_in(products.column("product_id"), value_set=sources, skip_nulls=True)
            is_judged = is_judged.to_numpy()
        # Groups first, then rows of these: whole groups are read whatever few rows are wanted.
        rng = np.random.default_rng(SEED)
        starts = products.group_starts
        groups = rng.permutation(len(starts) - 1)[:ROW_GROUPS]
        near = np.concatenate([np.arange(starts[group], starts[group + 1]) for group in groups])
        free = near[~is_judged[near]]
        count = min(MOST_PRODUCTS, math.ceil(SHARE * len(products)))
        self.rows = np.sort(rng.permutation(free)[:count]).astype(np.int64)

    def typed(self, row: int, item: Item) -> Item | None:
        """One to three words of a product's title, in its order; None where they occur elsewhere.

        Args:
            row: of the product; decides which words.
            item: the product.
        """
        title = next(iter(item.text.values()), "")
        words = [word for word in _plain(title).split() if any(map(str.isalnum, word))]
        if not words:
            return None
        rng = np.random.default_rng((SEED, row))
        count = min(len(words), int(rng.integers(1, WORDS + 1)))
        places = np.sort(rng.permutation(len(words))[:count])
        text = " ".join(words[place] for place in places)
        if text in self._judged:
            return None
        return Item({"query": text})


def _plain(text: str) -> str:
    """Small letters, and one space between words."""
    return " ".join(text.lower().split())
