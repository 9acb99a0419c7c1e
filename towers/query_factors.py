"""Each kind of query weighs the blocks in its own way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tritower.datamodules.batch import Items, TermTensors
from tritower.towers.sparse_terms import BUCKETS

TYPED_WEIGHTS = {"lexical": 1.0, "text": 0.5}
"""Of typed queries, where there are too few to choose on."""


class QueryFactors(nn.Module):
    """Factors of the blocks of queries, for each kind of query.

    A kind is the set of blocks that a query has, and whether it was typed.

    Args:
        names: of the M blocks, in the order of modalities.
        columns: their places on the modality axis.
    """

    factors: Tensor

    def __init__(self, names: Sequence[str], columns: Sequence[int]) -> None:
        super().__init__()
        self.names = list(names)
        self.columns = list(columns)
        self.typed = 2 ** len(self.names)
        self.register_buffer("factors", torch.ones(2 * self.typed, len(self.names)))

    def forward(self, items: Items) -> Tensor:
        """(B, M) float32 factors of B queries."""
        return self.factors[self.kinds(items)]

    def kinds(self, items: Items) -> Tensor:
        """(B,) int64 kinds of B queries."""
        present = items.present[:, self.columns]  # (B, M)
        places = 2 ** torch.arange(present.shape[1], device=present.device)
        kinds = (present * places).sum(1)
        if isinstance(items.lexical, TermTensors):
            is_typed = (items.lexical.term >= BUCKETS).any(1)
            kinds = kinds + is_typed * self.typed
        return kinds

    def blocks(self, kind: int) -> list[str]:
        """The blocks of a kind of query."""
        return [name for place, name in enumerate(self.names) if kind >> place & 1]

    def label(self, kind: int) -> str:
        """A kind in words, `text + lexical, typed`."""
        typed = ", typed" if kind >= self.typed else ""
        return " + ".join(self.blocks(kind)) + typed

    @torch.no_grad()
    def set(self, weights: Mapping[int, Mapping[str, float]], products: Tensor) -> None:
        """Choose factors so that scores are weighted sums of the blocks' cosines.

        Args:
            weights: kind -> block -> weight; typed queries without any take `TYPED_WEIGHTS`, and
                other kinds the weights of the products.
            products: (M,) weights of the products' blocks, squares of which add up to 1.
        """
        squares = products.square().cpu()  # a block's weight counts on both sides
        self.factors.fill_(1.0)
        for kind in range(len(self.factors)):
            own = weights.get(kind, TYPED_WEIGHTS if kind >= self.typed else None)
            if own is None:
                continue
            wanted = torch.tensor([own.get(name, 0.0) for name in self.names])
            factors = wanted / squares
            self.factors[kind] = factors / factors.max().clamp(min=1e-9)
