"""InfoNCE against the whole catalogue from small batches.

What a batch cannot show is remembered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritower.datamodules.batch import RELATIONS
from tritower.towers.losses.gather import gather_rows
from tritower.towers.losses.loss import InfoNCE, Targets


class GlobalInfoNCE(InfoNCE):
    """Contrastive loss whose normaliser is a moving average over steps (SogCLR, arXiv:2202.12387).

    InfoNCE compares a row with the negatives of its batch, so that its gradient is wrong by more
    the smaller the batch. Here each row's sum over negatives is remembered from the batches it
    stood in, and its gradient is divided by that. The remembered sums are part of a checkpoint.

    Args:
        memory: 0 to 1, how much of what is remembered stays when a row is seen again.
        num_slots: places for rows, a power of two; rows are told apart by hashes, so take several
            times their number.
        **settings: those of `InfoNCE`.
    """

    last: Tensor

    def __init__(
        self,
        memory: float = 0.8,
        num_slots: int = 1 << 18,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if not 0 <= memory < 1:
            raise ValueError(f"memory={memory}: choose 0 (none) to below 1.")
        if num_slots < 2 or num_slots & (num_slots - 1):
            raise ValueError(f"num_slots={num_slots} is not a power of two, e.g. {1 << 18}.")
        self.memory, self.num_slots = memory, num_slots
        self.register_buffer(
            "last", torch.full((2, num_slots), torch.nan)
        )  # logarithms; NaN: never seen

    def of_logits(self, logits: Tensor, target: Targets) -> Tensor:
        """The logarithm of the mean, over negatives, of exp(logit - logit of the positives); -inf without negatives."""
        negative = target.counts & (target.positive == 0)
        attract = (logits.masked_fill(target.positive == 0, 0.0) * target.positive).sum(
            1
        ) / target.positive.sum(1)
        alone = ~negative.any(1)  # its gradient would not be a number
        kept = logits.masked_fill(~negative & ~alone[:, None], float("-inf"))
        mean = kept.logsumexp(1) - negative.sum(1).clamp(min=1).log()
        return (mean - attract).masked_fill(alone, float("-inf"))

    def over_batches(self, side: str, losses: Tensor, keys: Tensor) -> Tensor:
        """exp(now - remembered): its gradient is that of the logarithm of the global mean."""
        remembered = self.last[0 if side == "query" else 1]
        with torch.no_grad():
            slots = slots_of(gather_rows(keys), self.num_slots)
            now, before = gather_rows(losses.detach()).float(), remembered[slots]
            mixed = torch.logaddexp(before + _log(self.memory), now + _log(1 - self.memory))
            after = torch.where(before.isnan(), now, mixed)
            seen = after.isfinite()
            remembered[slots[seen]] = after[seen]
            # Of rows that share a place one is remembered: each has at least its own share in what
            # it is divided by.
            own = torch.maximum(
                remembered[slots_of(keys, self.num_slots)], losses.float() + _log(1 - self.memory)
            )
        known = losses.isfinite()
        return (losses.masked_fill(~known, 0.0) - own.nan_to_num()).exp() * known


def slots_of(keys: Tensor, num_slots: int) -> Tensor:
    """(B, R) keys -> (B,) places: by the product, and by the query where it is a judged one."""
    product, query = (keys[:, RELATIONS.index(relation)] for relation in ("product", "query"))
    return (product * 0x1E3779B97F4A7C15 + query * 0x3C6EF372FE94F82B >> 20) & (num_slots - 1)


def _log(value: float) -> float:
    return float(torch.tensor(value).log())
