"""The sigmoid loss of SigLIP: a yes-or-no question for every pair.

The loss of query i with scores s_ij, signs y_ij (+1 for positives, -1 for negatives) and weights
w_ij is -sum_j w_ij log sigmoid(y_ij s_ij).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritower.datamodules.batch import Batch, Relation
from tritower.towers.losses.blocks import losses_in_blocks
from tritower.towers.losses.contrastive import ContrastiveLoss
from tritower.towers.losses.gather import rank_offset, weighted_mean
from tritower.towers.losses.rows import LossRows, make_rows
from tritower.towers.losses.targets import judgement_weights, make_targets


class SigmoidLoss(ContrastiveLoss):
    """A yes-or-no question for every pair, summed over a query's products.

    Zhai et al. 2023 (SigLIP), arXiv:2303.15343.

    Args:
        temperature: at the start, in cosine; it is learned.
        min_temperature: lower bound of the learned temperature.
        bias: added to all logits at the start; it is learned.
        positives: relation -> weight of pairs that are positives beside each query's own product;
            null takes `product`, `group` and `query` with weight 1.
        ignored: relations that leave a pair out; null takes `family`, `title` and `picture`.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        min_temperature: float = 0.01,
        bias: float = -10.0,
        positives: dict[Relation, float] | None = None,
        ignored: list[Relation] | None = None,
    ) -> None:
        super().__init__(temperature, min_temperature, positives, ignored)
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, query: Tensor, product: Tensor, batch: Batch) -> Tensor:
        """The () loss of this process's (B, D) rows; see `Loss.forward`."""
        queries, products = make_rows(query, product, batch)
        all_products = products.gather()

        def block_losses(scale: Tensor, bias: Tensor, vectors: Tensor, *block: Tensor) -> Tensor:
            """(b,) losses of a block of queries."""
            rows = LossRows(*block[:-2])
            target_column, row_weight = block[-2:]
            judgement = judgement_weights(rows, all_products)
            targets = make_targets(
                rows.keys,
                all_products.keys,
                target_column,
                self.rules,
                judgement=judgement,
                present=(rows.present, all_products.present),
            )
            logits = scale * (rows.vectors @ vectors.T) + bias  # (b, P)
            is_positive = targets.positive > 0
            sign = torch.where(is_positive, 1.0, -1.0)
            weight = torch.where(is_positive, targets.positive, targets.included.float())
            if judgement is not None and self.rules.positives.get("query"):
                # A judged pair has the weight of its judgement, whatever its row's weight.
                is_judged = is_positive & (judgement > 0)
                of_judgement = weight / row_weight[:, None].clamp(min=1e-9)
                weight = torch.where(is_judged, of_judgement, weight)
            row = torch.arange(len(target_column), device=target_column.device)
            weight[row, target_column] = 1.0
            return -(weight * F.logsigmoid(sign * logits)).sum(1)

        row = torch.arange(len(query), device=query.device)
        target_column = rank_offset(len(product)) + row
        weight = batch.weight.float()
        float_rows = queries._replace(vectors=query.float())
        shared = (self.scale.float(), self.bias, all_products.vectors)
        losses = losses_in_blocks(
            block_losses, len(all_products.keys), shared, *float_rows, target_column, weight
        )
        return weighted_mean(losses, weight)
