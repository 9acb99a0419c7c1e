"""Contrastive losses: a query and the product that answers it attract, all others in the batch repel.

Which other pairs of a batch are positives too, or are left out, follows from equal keys (see
`datamodules.batch.RELATIONS`): the same product twice in a batch is never pushed apart.

Under several processes each one holds its own rows; queries and products of all are gathered with gradient, and each
process returns its share of the loss times the number of processes. Distributed training averages gradients, so they
are exactly those of one process with the whole batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.batch import NO_KEY, RELATIONS, Batch, Relation
from towers.gather import gather_rows, num_processes


class Targets(NamedTuple):
    """What each pair of a query and a product is.

    Attributes:
        positive: (B, P) float32 weight of a positive, 0 for all other pairs.
        counts: (B, P) bool, False = the pair is left out.
    """

    positive: Tensor
    counts: Tensor


def targets(
    query_keys: Tensor, product_keys: Tensor, answer: Tensor, positives: dict[Relation, float], ignored: list[Relation]
) -> Targets:
    """Pairs by their keys: the largest weight of the relations that hold; else left out; else negative.

    Args:
        query_keys: (B, R) int64.
        product_keys: (P, R) int64.
        answer: (B,) int64 column of the product that answers each query: always a positive of weight 1.
        positives: weight of each relation that makes a positive.
        ignored: relations that leave a pair out which is no positive.
    """
    shape = (len(query_keys), len(product_keys))
    positive = torch.zeros(shape, device=query_keys.device)
    counts = torch.ones(shape, dtype=torch.bool, device=query_keys.device)
    for relation in ignored:
        counts &= ~same(query_keys, product_keys, relation)
    for relation, weight in positives.items():
        positive = torch.maximum(positive, weight * same(query_keys, product_keys, relation))
    positive[torch.arange(len(answer), device=answer.device), answer] = 1.0
    return Targets(positive, counts | (positive > 0))


def same(query_keys: Tensor, product_keys: Tensor, relation: Relation) -> Tensor:
    """(B, P) bool: both have a key of this relation, and it is the same."""
    column = RELATIONS.index(relation)
    keys = query_keys[:, column].unsqueeze(1)
    return (keys == product_keys[:, column]) & (keys != NO_KEY)


def multi_positive_info_nce(logits: Tensor, target: Targets) -> Tensor:
    """(B, P) logits -> (B,): cross-entropy against the row's positives (SupCon's L_out, arXiv:2004.11362).

    With one positive it is InfoNCE (arXiv:1807.03748). Of zero embeddings it is the log of the number of products.
    """
    log_share = logits.masked_fill(~target.counts, float("-inf")).log_softmax(1)
    attract = (log_share.masked_fill(target.positive == 0, 0.0) * target.positive).sum(1)
    return -attract / target.positive.sum(1)


class ContrastiveLoss(nn.Module):
    """Base of the losses: keys, temperature, processes.

    Args:
        temperature: of the start, in cosine; it is learned.
        min_temperature: it never falls below this.
        positives: relation -> weight of pairs that are positives beside the product that answers; null takes `product`,
            `group` and `query` with weight 1.
        ignored: relations that leave a pair out; null takes `family`, `title` and `picture`.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        min_temperature: float = 0.01,
        positives: dict[Relation, float] | None = None,
        ignored: list[Relation] | None = None,
    ) -> None:
        super().__init__()
        if not 0 < min_temperature <= temperature:
            raise ValueError(f"temperature={temperature} must be at least min_temperature={min_temperature} > 0.")
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.max_logit_scale = math.log(1 / min_temperature)
        self.positives: dict[Relation, float] = (
            positives if positives is not None else {"product": 1.0, "group": 1.0, "query": 1.0}
        )
        self.ignored: list[Relation] = ignored if ignored is not None else ["family", "title", "picture"]
        for relation in (*self.positives, *self.ignored):
            if relation not in RELATIONS:
                raise ValueError(f"{relation!r} is no relation: choose from {', '.join(RELATIONS)}.")

    @property
    def scale(self) -> Tensor:
        """1 / temperature, clamped."""
        return self.logit_scale.clamp(max=self.max_logit_scale).exp()

    def clamp(self) -> None:
        """Keep the learned scale where its gradient is alive; called before every step."""
        with torch.no_grad():  # float32 rounds the bound itself to above it, where it could never rise again
            self.logit_scale.clamp_(max=self.max_logit_scale - 1e-6)

    def forward(self, query: Tensor, product: Tensor, batch: Batch) -> Tensor:
        """The loss of this process's rows.

        Args:
            query: (B, D) unit vectors.
            product: (P, D) unit vectors; row i < B answers query i.
            batch: keys and weights.
        """
        raise NotImplementedError


class InfoNCE(ContrastiveLoss):
    """Multi-positive InfoNCE in both directions, rows weighted by graded relevance."""

    def forward(self, query: Tensor, product: Tensor, batch: Batch) -> Tensor:
        """See `ContrastiveLoss.forward`."""
        answers = len(query)
        weight = batch.weight.float()
        all_weight = gather_rows(weight)
        first = rank_offset(len(product))
        forth = self.direction(
            query, gather_rows(product), batch.query_keys, gather_rows(batch.product_keys), first, all_weight, weight
        )
        back = self.direction(
            product[:answers],
            gather_rows(query),
            batch.product_keys[:answers],
            gather_rows(batch.query_keys),
            rank_offset(answers),
            all_weight,
            weight,
        )
        return (forth + back) / 2

    def direction(
        self,
        rows: Tensor,
        columns: Tensor,
        row_keys: Tensor,
        column_keys: Tensor,
        first: int,
        all_weight: Tensor,
        weight: Tensor,
    ) -> Tensor:
        """This process's share of one direction, times the number of processes."""
        logits = self.scale.float() * (rows.float() @ columns.float().T)
        answer = first + torch.arange(len(rows), device=rows.device)
        losses = multi_positive_info_nce(logits, targets(row_keys, column_keys, answer, self.positives, self.ignored))
        return num_processes() * (weight * losses).sum() / all_weight.sum().clamp(min=1e-9)


class SigmoidLoss(ContrastiveLoss):
    """A yes-or-no question for every pair (SigLIP, arXiv:2303.15343), summed over a query's products.

    Args:
        temperature: of the start, in cosine; it is learned.
        min_temperature: it never falls below this.
        bias: added to all logits at the start; it is learned.
        positives: relation -> weight of pairs that are positives beside the product that answers; null takes `product`,
            `group` and `query` with weight 1.
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
        """See `ContrastiveLoss.forward`."""
        products, keys = gather_rows(product), gather_rows(batch.product_keys)
        logits = self.scale.float() * (query.float() @ products.float().T) + self.bias
        answer = rank_offset(len(product)) + torch.arange(len(query), device=query.device)
        target = targets(batch.query_keys, keys, answer, self.positives, self.ignored)
        is_positive = target.positive > 0
        sign = torch.where(is_positive, 1.0, -1.0)
        importance = torch.where(is_positive, target.positive, target.counts.float())
        losses = -(importance * F.logsigmoid(sign * logits)).sum(1)  # (B,)
        weight = batch.weight.float()
        return num_processes() * (weight * losses).sum() / gather_rows(weight).sum().clamp(min=1e-9)


def rank_offset(rows: int) -> int:
    """Where this process's rows start among the gathered ones."""
    return rows * torch.distributed.get_rank() if num_processes() > 1 else 0
