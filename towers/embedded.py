"""Encoded items in NumPy: dense vectors, and sparse ones where a model has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from tritower.datamodules.batch import Items, Side
from tritower.towers.block_encoder import BlockEncoder, HybridVectors
from tritower.towers.encoder import Encoder
from tritower.towers.encoding import encode_in_chunks
from tritower.towers.metric import Metric, to_score_space
from tritower.towers.sparse_terms import NUM_TERMS


@dataclass(frozen=True)
class Embedded:
    """n encoded items; the score of two is the sum of their inner products.

    Attributes:
        dense: (n, E) float32; zeros where the model reads nothing.
        sparse: (n, T) float32, T = `NUM_TERMS`; None for a model without sparse vectors.
    """

    dense: NDArray[np.float32]
    sparse: sp.csr_array | None = None

    def __len__(self) -> int:
        return len(self.dense)

    @classmethod
    def of(cls, vectors: HybridVectors) -> Embedded:
        """From a batch of vectors as the model returns them."""
        term = vectors.term.cpu().numpy()
        weight = vectors.weight.float().cpu().numpy()
        is_used = (term > 0) & (weight != 0)
        starts = np.concatenate([[0], np.cumsum(is_used.sum(axis=1))])
        parts = (weight[is_used], term[is_used], starts)
        sparse = sp.csr_array(parts, shape=(len(term), NUM_TERMS))
        return cls(vectors.dense.float().cpu().numpy(), sparse)

    @classmethod
    def concatenate(cls, parts: Sequence[Embedded]) -> Embedded:
        """All parts, one after the other; at least one."""
        dense = np.concatenate([part.dense for part in parts])
        sparse = [part.sparse for part in parts if part.sparse is not None]
        return cls(dense, sp.vstack(sparse, format="csr") if sparse else None)

    def select(self, rows: NDArray[np.integer] | NDArray[np.bool_]) -> Embedded:
        """The items at (R,) rows, or where a (n,) mask is True."""
        return Embedded(self.dense[rows], None if self.sparse is None else self.sparse[rows])

    @property
    def is_empty(self) -> NDArray[np.bool_]:
        """(n,) bool: items of which the model reads nothing."""
        empty = np.asarray(~self.dense.any(axis=1), bool)
        if self.sparse is not None:
            empty &= np.diff(self.sparse.indptr) == 0
        return empty

    def scores(self, products: Embedded) -> NDArray[np.float32]:
        """(n, N) float32 scores with N products."""
        scores = self.dense @ products.dense.T
        if self.sparse is not None:
            scores += (self.sparse @ products._by_term).toarray()
        return scores

    @cached_property
    def _by_term(self) -> sp.csr_array:
        """(T, n): the items of each term."""
        assert self.sparse is not None
        return self.sparse.T.tocsr()


def embed_items(
    encoder: Encoder, items: Items, side: Side, metric: Metric, chunk_size: int | None
) -> Embedded:
    """B items as they are compared exactly; zeros where nothing can be read.

    Args:
        encoder: of that side.
        items: B items.
        side: `query` or `product`.
        metric: of the model.
        chunk_size: items that are encoded at once; None for all.
    """
    if isinstance(encoder, BlockEncoder):
        return Embedded.of(encoder.vectors(items, side))
    encoded = encode_in_chunks(encoder, items, chunk_size)
    vectors = to_score_space(encoded.embedding.float(), side, metric)
    return Embedded((vectors * encoded.present.any(1, keepdim=True)).cpu().numpy())
