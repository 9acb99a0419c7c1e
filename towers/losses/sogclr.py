"""SogCLR: the sum over negatives is a moving average over steps, so small batches suffice."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tritower.datamodules.batch import RELATIONS, Side
from tritower.towers.losses.gather import gather_rows
from tritower.towers.losses.targets import Targets


def log_mean_negatives(logits: Tensor, targets: Targets) -> Tensor:
    """(B, P) logits -> (B,) log of the mean over negatives of exp(logit - logit of the positives).

    -inf for a row without negatives.
    """
    is_positive = targets.positive > 0
    is_negative = targets.included & ~is_positive
    attraction = (logits.masked_fill(~is_positive, 0.0) * targets.positive).sum(1)
    attraction = attraction / targets.positive.sum(1)  # (B,)
    # A row without negatives keeps its logits here: the gradient of -inf is not a number.
    has_none = ~is_negative.any(1)
    kept = logits.masked_fill(~is_negative & ~has_none[:, None], float("-inf"))
    log_mean = kept.logsumexp(1) - is_negative.sum(1).clamp(min=1).log()
    return (log_mean - attraction).masked_fill(has_none, float("-inf"))


class SogCLRNormalizer(nn.Module):
    """Each row's mean over negatives, remembered over steps (Yuan et al. 2022, arXiv:2202.12387).

    InfoNCE compares a row with the negatives of its batch, so its gradient is biased, the more so
    the smaller the batch. Here each row's mean over negatives is averaged over the batches it was
    in, and its gradient is divided by that average. The averages are part of a checkpoint.

    Args:
        decay: 0 to 1, the share of the average that stays when a row is seen again.
        num_slots: places for rows, a power of two. Rows are hashed to places, so take several
            times their number.

    Raises:
        ValueError: decay outside 0 to 1, or num_slots that is no power of two.
    """

    log_mean: Tensor

    def __init__(self, decay: float = 0.8, num_slots: int = 1 << 18) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: choose 0 (none) to below 1.")
        if num_slots < 2 or num_slots & (num_slots - 1):
            raise ValueError(f"num_slots={num_slots} is not a power of two, e.g. {1 << 18}.")
        self.decay = decay
        self.num_slots = num_slots
        # NaN where a slot was never used.
        self.register_buffer("log_mean", torch.full((2, num_slots), torch.nan))

    def normalize(self, side: Side, values: Tensor, keys: Tensor) -> Tensor:
        """exp(value - average): its gradient is that of the logarithm of the global mean.

        Args:
            side: of the rows.
            values: (B,) `log_mean_negatives` of this process's rows.
            keys: (B, R) int64.

        Returns:
            (B,) losses, 0 for rows without negatives.
        """
        average = self.log_mean[0 if side == "query" else 1]  # (num_slots,)
        log_new_share = _log(1 - self.decay)
        with torch.no_grad():
            # Update the averages with the rows of all processes.
            slots = slots_of(gather_rows(keys), self.num_slots)
            now = gather_rows(values.detach()).float()
            before = average[slots]
            mixed = torch.logaddexp(before + _log(self.decay), now + log_new_share)
            after = torch.where(before.isnan(), now, mixed)
            is_finite = after.isfinite()
            average[slots[is_finite]] = after[is_finite]
            # Rows that share a slot overwrite each other: each divides at least by its own share.
            remembered = average[slots_of(keys, self.num_slots)]
            divisor = torch.maximum(remembered, values.float() + log_new_share)
        has_negatives = values.isfinite()
        difference = values.masked_fill(~has_negatives, 0.0) - divisor.nan_to_num()
        return difference.exp() * has_negatives


def slots_of(keys: Tensor, num_slots: int) -> Tensor:
    """(B, R) keys -> (B,) slots, hashed from the product, and from the query of a judged pair."""
    product = keys[:, RELATIONS.index("product")]
    query = keys[:, RELATIONS.index("query")]
    mixed = product * 0x1E3779B97F4A7C15 + query * 0x3C6EF372FE94F82B
    return (mixed >> 20) & (num_slots - 1)


def _log(value: float) -> float:
    """The logarithm in float32, and -inf for 0."""
    if value > 0:
        return math.log(value)
    return -math.inf
