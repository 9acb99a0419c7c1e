"""Losses of labelled pairs.

People said of a query and a product how similar they are, from 0 (not at all) to 1.

Pairs without a label have no part in them; a batch without any loses nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritower.datamodules.batch import Batch
from tritower.towers.losses.gather import gather_rows, num_processes
from tritower.towers.losses.loss import Loss


class PairLoss(Loss):
    """Draws similar pairs together, and dissimilar ones apart until their cosine is below a margin (Hadsell 2006).

    Args:
        margin: cosine up to which a pair of label 0 is left alone.
    """

    def __init__(self, margin: float = 0.3) -> None:
        super().__init__()
        if not -1 <= margin < 1:
            raise ValueError(f"margin={margin} is no cosine below 1.")
        self.margin = margin

    def forward(self, query: Tensor, product: Tensor, batch: Batch) -> Tensor:
        """The mean over labelled pairs; see `Loss.forward`."""
        cosine, label = labelled(query, product, batch)
        losses = label * (1 - cosine) ** 2 + (1 - label) * (cosine - self.margin).clamp(min=0) ** 2
        count = gather_rows(torch.tensor([float(len(label))], device=query.device)).sum()
        return num_processes() * losses.sum() / count.clamp(min=1)


class CoSENT(Loss):
    """Asks that of two labelled pairs the one with the higher label has the higher cosine (Su 2022).

    Args:
        temperature: in cosine; a wrong order by more than this weighs heavily.
    """

    def __init__(self, temperature: float = 0.05) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be above 0.")
        self.temperature = temperature

    def forward(self, query: Tensor, product: Tensor, batch: Batch) -> Tensor:
        """log(1 + the sum of exp(cosine difference / temperature) over pairs of pairs); see `Loss.forward`."""
        cosine, label = labelled(query, product, batch, gather=True)
        worse = (
            cosine[:, None] - cosine[None, :]
        ) / self.temperature  # (n, n): row i should be below column j
        ordered = worse[label[:, None] < label[None, :]]
        return torch.cat([worse.new_zeros(1), ordered]).logsumexp(0) + 0.0 * query.sum()


def labelled(
    query: Tensor, product: Tensor, batch: Batch, gather: bool = False
) -> tuple[Tensor, Tensor]:
    """(n,) cosines and (n,) labels of the pairs that have one.

    Args:
        query: (B, D) unit vectors.
        product: (P, D) unit vectors.
        batch: labels.
        gather: of all processes.
    """
    label = batch.weight.new_full((len(query),), torch.nan) if batch.label is None else batch.label
    cosine = (query.float() * product[: len(query)].float()).sum(1)
    if gather:
        cosine, label = gather_rows(cosine), gather_rows(label)
    known = ~label.isnan()
    return cosine[known], label[known]
