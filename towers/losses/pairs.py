"""Losses of labeled pairs: a label from 0 (not similar at all) to 1 for a query and a product.

Pairs without a label have no part in them; a batch without labels has loss 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritower.datamodules.batch import Batch
from tritower.towers.losses.contrastive import Loss
from tritower.towers.losses.gather import gather_rows, num_processes


class PairLoss(Loss):
    """Pull similar pairs together, and push others apart until their cosine is below a margin.

    label * (1 - cosine)^2 + (1 - label) * max(cosine - margin, 0)^2, averaged over labeled pairs
    (Hadsell, Chopra and LeCun 2006).

    Args:
        margin: cosine up to which a pair of label 0 is left alone.

    Raises:
        ValueError: a margin that is no cosine below 1.
    """

    def __init__(self, margin: float = 0.3) -> None:
        super().__init__()
        if not -1 <= margin < 1:
            raise ValueError(f"margin={margin} is no cosine below 1.")
        self.margin = margin

    def forward(self, query: Tensor, product: Tensor, batch: Batch) -> Tensor:
        """The () mean over the labeled pairs of all processes' (B, D) rows; see `Loss.forward`."""
        cosine, label = labeled_pairs(query, product, batch)
        attraction = label * (1 - cosine) ** 2
        repulsion = (1 - label) * (cosine - self.margin).clamp(min=0) ** 2
        count = gather_rows(torch.tensor([float(len(label))], device=query.device)).sum()
        return num_processes() * (attraction + repulsion).sum() / count.clamp(min=1)


class CoSENT(Loss):
    """Of two labeled pairs, the one with the higher label should have the higher cosine.

    log(1 + sum exp((cosine_i - cosine_j) / temperature)) over all i, j with label_i < label_j
    (Su 2022, https://kexue.fm/archives/8847).

    Args:
        temperature: in cosine; a wrong order by more than this weighs heavily.

    Raises:
        ValueError: a temperature that is not above 0.
    """

    def __init__(self, temperature: float = 0.05) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be above 0.")
        self.temperature = temperature

    def forward(self, query: Tensor, product: Tensor, batch: Batch) -> Tensor:
        """The () loss over the labeled pairs of all processes' (B, D) rows; see `Loss.forward`."""
        cosine, label = labeled_pairs(query, product, batch, gather=True)
        difference = (cosine[:, None] - cosine[None, :]) / self.temperature  # (n, n)
        should_be_below = label[:, None] < label[None, :]
        terms = torch.cat([difference.new_zeros(1), difference[should_be_below]])
        # The zero keeps the graph connected where no pair has a label.
        return terms.logsumexp(0) + 0.0 * query.sum()


def labeled_pairs(
    query: Tensor, product: Tensor, batch: Batch, gather: bool = False
) -> tuple[Tensor, Tensor]:
    """(n,) cosines and (n,) labels of the pairs that have a label.

    Args:
        query: (B, D) unit vectors.
        product: (P, D) unit vectors.
        batch: labels.
        gather: take the pairs of all processes.
    """
    label = batch.label
    if label is None:
        label = batch.weight.new_full((len(query),), torch.nan)
    cosine = (query.float() * product[: len(query)].float()).sum(1)  # (B,)
    if gather:
        cosine = gather_rows(cosine)
        label = gather_rows(label)
    has_label = ~label.isnan()
    return cosine[has_label], label[has_label]
