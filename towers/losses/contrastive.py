"""The base of all losses, and of those that compare every query with every product."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from tritower.datamodules.batch import Batch, Relation
from tritower.towers.losses.targets import PairRules

DEFAULT_POSITIVES: dict[Relation, float] = {"product": 1.0, "group": 1.0, "query": 1.0}
DEFAULT_IGNORED: list[Relation] = ["family", "title", "picture"]


class Loss(nn.Module, ABC):
    """Base of all losses of a batch of queries and products."""

    def set_dim(self, dim: int) -> None:
        """Receive D, the size of embeddings; called once, before anything else."""

    def clamp(self) -> None:
        """Keep learned parameters within their bounds; called before every step."""

    @abstractmethod
    def forward(self, query: Tensor, product: Tensor, batch: Batch) -> Tensor:
        """The loss of this process's rows, a scalar.

        Args:
            query: (B, D) unit vectors.
            product: (P, D) unit vectors; row i < B is the positive of query i.
            batch: keys, weights and labels.
        """


class ContrastiveLoss(Loss):
    """Base of the losses that compare every query with every product.

    Args:
        temperature: at the start, in cosine; it is learned.
        min_temperature: lower bound of the learned temperature.
        positives: relation -> weight of pairs that are positives beside each query's own product;
            null takes `product`, `group` and `query` with weight 1.
        ignored: relations that leave a pair out; null takes `family`, `title` and `picture`.

    Raises:
        ValueError: a temperature out of order, or an unknown relation.
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
            raise ValueError(
                f"temperature={temperature} must be at least min_temperature={min_temperature} > 0."
            )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.max_logit_scale = math.log(1 / min_temperature)
        self.rules = PairRules(
            dict(DEFAULT_POSITIVES) if positives is None else positives,
            list(DEFAULT_IGNORED) if ignored is None else ignored,
        )

    @property
    def scale(self) -> Tensor:
        """1 / temperature, a () tensor, within its bound."""
        return self.logit_scale.clamp(max=self.max_logit_scale).exp()

    def clamp(self) -> None:
        """Keep the learned scale below its bound, where its gradient is not zero."""
        with torch.no_grad():
            # float32 may round the bound to above itself, where the scale could never move again.
            self.logit_scale.clamp_(max=self.max_logit_scale - 1e-6)
