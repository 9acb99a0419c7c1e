"""What a training step logs beside its loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tritower.towers.encoder import Encoded
from tritower.towers.losses.contrastive import ContrastiveLoss

if TYPE_CHECKING:
    from tritower.towers.two_tower import TwoTower


def log_step(
    model: TwoTower, terms: list[Tensor], encoded: tuple[Encoded, Encoded], size: int
) -> None:
    """Log each term of the loss, the temperature, and the mean share of each modality.

    Args:
        model: that is trained.
        terms: () loss of each term.
        encoded: queries and products.
        size: B, number of queries.
    """
    if len(terms) > 1:
        for term, value in zip(model.loss_terms.terms, terms, strict=True):
            model.log(f"train/loss_{term}", value, batch_size=size, sync_dist=True)
    if isinstance(model.loss, ContrastiveLoss):
        model.log("train/temperature", 1 / model.loss.scale, batch_size=size)
    for side, encoder, rows in zip(("query", "product"), model.encoders, encoded, strict=True):
        for name, share in zip(encoder.towers, rows.shares.detach().mean(0), strict=True):
            model.log(f"train/{side}_share_{name}", share, batch_size=size)
