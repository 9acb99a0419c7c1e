"""The terms that are summed into the loss: the embeddings that each of them compares."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from tritower.datamodules.batch import Batch
from tritower.towers.encoder import Encoded, Encoder
from tritower.towers.losses.contrastive import ContrastiveLoss, Loss
from tritower.towers.losses.info_nce import InfoNCE
from tritower.towers.metric import Metric, to_score_space

View = Literal["whole", "part", "text", "image", "attribute", "lexical"]
"""The embeddings of items: of all modalities, of a random part of them, or of a single one."""


@dataclass(frozen=True)
class LossTerm:
    """One term of the loss. Pairs of which one side lacks the modality have no part in it.

    Attributes:
        query: embeddings of the queries.
        product: embeddings of the products.
        weight: of this term in the sum.
        loss: null takes the model's loss, with a temperature of its own.
    """

    query: View = "whole"
    product: View = "whole"
    weight: float = 1.0
    loss: Loss | None = None

    def __str__(self) -> str:
        name = f"{self.query}-{self.product}"
        if self.loss is None:
            return name
        return f"{name}-{type(self.loss).__name__}"


class LossTerms(nn.Module):
    """All terms of a model, each with a loss module of its own.

    Args:
        terms: at least one.
        default: the loss of terms that name none; null takes InfoNCE. The first such term takes it
            itself, the others a copy.
        encoders: of queries and of products; every view must be one of their towers.
        metric: of the model.

    Raises:
        ValueError: no terms, a view without a tower, or a loss that does not suit the metric.
    """

    def __init__(
        self,
        terms: Sequence[LossTerm],
        default: ContrastiveLoss | None,
        encoders: tuple[Encoder, Encoder],
        metric: Metric,
    ) -> None:
        super().__init__()
        if not terms:
            raise ValueError(
                "loss_terms=[] leaves nothing to learn from: leave it out to compare whole with "
                "whole."
            )
        self.terms = list(terms)
        self.metric = metric
        shared = default if default is not None else InfoNCE()
        losses: list[Loss] = []
        # Terms share the default loss, each with a copy of its own: a temperature is learned per
        # term.
        for term in self.terms:
            loss = term.loss
            if loss is None:
                if shared in losses:
                    loss = copy.deepcopy(shared)
                else:
                    loss = shared
            losses.append(loss)
        for loss in losses:
            _check_metric(loss, metric)
            loss.set_dim(encoders[1].embed_dim)
        for term in self.terms:
            _check_views(term, encoders)
        self.losses = nn.ModuleList(losses)

    @property
    def main(self) -> Loss:
        """The first contrastive loss, whose temperature is shown; else the first loss."""
        for loss in self.losses:
            if isinstance(loss, ContrastiveLoss):
                return loss
        first = self.losses[0]
        assert isinstance(first, Loss)
        return first

    def clamp(self) -> None:
        """Keep the learned parameters of all losses within their bounds."""
        for loss in self.losses:
            assert isinstance(loss, Loss)
            loss.clamp()

    def forward(
        self, encoders: tuple[Encoder, Encoder], query: Encoded, product: Encoded, batch: Batch
    ) -> list[Tensor]:
        """The weighted () loss of each term.

        Args:
            encoders: of queries and of products.
            query: B encoded queries.
            product: P encoded products; row i < B is the positive of query i.
            batch: keys, weights and labels.
        """
        values = []
        for term, loss in zip(self.terms, self.losses, strict=True):
            value = self.term_loss(term, loss, encoders, query, product, batch)
            values.append(term.weight * value)
        return values

    def term_loss(
        self,
        term: LossTerm,
        loss: nn.Module,
        encoders: tuple[Encoder, Encoder],
        query: Encoded,
        product: Encoded,
        batch: Batch,
    ) -> Tensor:
        """The () loss of one term; arguments as of `forward`."""
        query_vectors, query_present = encoders[0].view(query, term.query)
        product_vectors, product_present = encoders[1].view(product, term.product)
        # A pair counts where both of its sides have the modality.
        both_present = query_present & product_present[: len(batch.weight)]
        label = batch.label
        if label is not None:
            label = label.masked_fill(~both_present, float("nan"))
        batch = batch._replace(
            weight=batch.weight * both_present,
            label=label,
            query_present=query_present,
            product_present=product_present,
        )
        value: Tensor = loss(
            to_score_space(query_vectors, "query", self.metric),
            to_score_space(product_vectors, "product", self.metric),
            batch,
        )
        return value


def _check_metric(loss: Loss, metric: Metric) -> None:
    within_side = getattr(loss, "same_side", False)
    if metric == "kl" and (within_side or not isinstance(loss, ContrastiveLoss)):
        raise ValueError(
            f"metric=kl compares queries with products; {type(loss).__name__} needs the cosine of "
            "a pair or compares within a side: choose metric=cosine, or InfoNCE or SigmoidLoss "
            "without same_side."
        )
    if metric == "inner_product" and getattr(loss, "memory", None) is not None:
        raise ValueError(
            "CrossBatchMemory keeps embeddings of one size, and the blocks of BlockEncoder differ "
            "in size: leave loss.negatives out, or choose SogCLRNormalizer."
        )


def _check_views(term: LossTerm, encoders: tuple[Encoder, Encoder]) -> None:
    for name in (term.query, term.product):
        if name in ("whole", "part"):
            continue
        if not all(name in encoder.towers for encoder in encoders):
            raise ValueError(
                f"loss_terms names {name!r}, but an encoder has no such tower: leave it out."
            )
