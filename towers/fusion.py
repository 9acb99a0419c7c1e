"""Fusion: one vector for each modality, and which of them are there, to one embedding.

All take vectors (B, M, D) and present (B, M) and return the fused (B, D) and the share (B, M) that
each modality had in it; shares of a row add up to 1. A modality that is absent is replaced by a
learned token before fusion (see `tritower.towers.encoder`), so its input never
matters.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

FusionName = Literal["gated", "mean", "transformer"]


class MeanFusion(nn.Module):
    """The sum of the modalities' vectors, absent tokens included."""

    def __init__(self, num_modalities: int, dim: int) -> None:
        super().__init__()

    def forward(self, vectors: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, D), (B, M) bool -> (B, D), (B, M)."""
        there = present.to(vectors.dtype)
        return vectors.sum(1), there / there.sum(1, keepdim=True).clamp(min=1)


class GatedFusion(nn.Module):
    """A weighted mean of the modalities that are there, plus a term of their combination.

    The gates see all vectors and the mask; the residual is a small network over the concatenation.
    Both start as nothing, so training starts from the mean.
    """

    def __init__(self, num_modalities: int, dim: int) -> None:
        super().__init__()
        joined = num_modalities * dim + num_modalities
        self.gate = nn.Linear(joined, num_modalities)
        hidden = nn.Linear(joined, dim)
        last = nn.Linear(dim, dim)
        self.residual = nn.Sequential(hidden, nn.GELU(), last)
        for layer in (self.gate, last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, vectors: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, D), (B, M) bool -> (B, D), (B, M)."""
        joined = torch.cat([vectors.flatten(1), present.to(vectors.dtype)], 1)
        # An item without any modality is the mean of the absent tokens.
        nothing = ~present.any(1, keepdim=True)
        shares = self.gate(joined).masked_fill(~present & ~nothing, float("-inf")).softmax(1)
        return (shares.unsqueeze(-1) * vectors).sum(1) + self.residual(joined), shares


class TransformerFusion(nn.Module):
    """One transformer layer over the modalities.

    A learned token attends to them (as ItemSage, arXiv:2205.11728).
    """

    def __init__(self, num_modalities: int, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.position = nn.Parameter(torch.randn(num_modalities + 1, dim) * dim**-0.5)
        heads = max(h for h in (1, 2, 4, 8) if dim % h == 0)
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )

    def forward(self, vectors: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, D), (B, M) bool -> (B, D), (B, M)."""
        tokens = (
            torch.cat([self.token.expand(len(vectors), 1, -1), vectors], 1) + self.position
        )  # (B, 1 + M, D)
        normed = self.norm(tokens)
        attended, weights = self.attention(normed[:, :1], normed, normed)
        fused = tokens[:, 0] + attended[:, 0] + vectors.mean(1)
        shares = weights[:, 0, 1:]
        return fused + self.mlp(fused), shares / shares.sum(1, keepdim=True)


FUSIONS: dict[str, type[nn.Module]] = {
    "gated": GatedFusion,
    "mean": MeanFusion,
    "transformer": TransformerFusion,
}
