"""Losses of open_clip and sentence-transformers in place of ours.

Identical towers, batches and steps.
"""

from __future__ import annotations

import importlib

import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn

from tritower.datamodules.batch import Batch
from tritower.towers.losses.contrastive import ContrastiveLoss


class OpenClipLoss(ContrastiveLoss):
    """open_clip's ClipLoss: row i of the queries belongs to row i of the products and to no other.

    Args:
        temperature: of the start, in cosine; it is learned.
        min_temperature: it never falls below this.
    """

    def __init__(self, temperature: float = 0.07, min_temperature: float = 0.01) -> None:
        super().__init__(temperature, min_temperature)
        self.peer = ClipLoss()

    def forward(self, query: Tensor, product: Tensor, batch: Batch) -> Tensor:
        """See `Loss.forward`."""
        loss: Tensor = self.peer(query.float(), product[: len(query)].float(), self.scale)
        return loss


class OpenClipSigmoid(ContrastiveLoss):
    """open_clip's SigLipLoss, with its learned bias.

    Args:
        temperature: of the start, in cosine; it is learned.
        min_temperature: it never falls below this.
        bias: added to all logits at the start; it is learned.
    """

    def __init__(
        self, temperature: float = 0.1, min_temperature: float = 0.01, bias: float = -10.0
    ) -> None:
        super().__init__(temperature, min_temperature)
        self.peer = SigLipLoss()
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, query: Tensor, product: Tensor, batch: Batch) -> Tensor:
        """See `Loss.forward`."""
        loss: Tensor = self.peer(
            query.float(), product[: len(query)].float(), self.scale, self.bias
        )
        return loss


class MultipleNegativesRanking(ContrastiveLoss):
    """sentence-transformers' MultipleNegativesRankingLoss.

    Queries against products, at a temperature that stays.

    Args:
        temperature: in cosine; 1 / 20 is its default.
        min_temperature: without effect.
    """

    def __init__(self, temperature: float = 0.05, min_temperature: float = 0.01) -> None:
        super().__init__(temperature, min_temperature)
        losses = importlib.import_module("sentence_transformers.losses")  # of the extra "bench"
        self.peer = losses.MultipleNegativesRankingLoss(nn.Identity(), scale=1 / temperature)

    def forward(self, query: Tensor, product: Tensor, batch: Batch) -> Tensor:
        """See `Loss.forward`."""
        loss: Tensor = self.peer.compute_loss_from_embeddings(
            [query.float(), product[: len(query)].float()], None
        )
        return loss


class CachedMultipleNegativesRanking(ContrastiveLoss):
    """sentence-transformers' CachedMultipleNegativesRankingLoss, for batches of thousands.

    It holds the similarities of a few queries at a time. Loss and gradients are those of
    MultipleNegativesRankingLoss. Where towers are trained, `model.encoding.chunk_size` caches
    gradients as the library does.

    Args:
        temperature: in cosine; 1 / 20 is its default.
        min_temperature: without effect.
        mini_batch_size: queries that are compared with all products at a time.
    """

    def __init__(
        self,
        temperature: float = 0.05,
        min_temperature: float = 0.01,
        mini_batch_size: int = 512,
    ) -> None:
        super().__init__(temperature, min_temperature)
        losses = importlib.import_module("sentence_transformers.losses")  # of the extra "bench"
        self.peer = losses.CachedMultipleNegativesRankingLoss(
            nn.Sequential(nn.Identity()), scale=1 / temperature, mini_batch_size=mini_batch_size
        )

    def forward(self, query: Tensor, product: Tensor, batch: Batch) -> Tensor:
        """See `Loss.forward`."""
        columns = [[query.float()], [product[: len(query)].float()]]
        loss: Tensor = self.peer.calculate_loss(columns)
        return loss
