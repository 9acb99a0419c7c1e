"""InfoNCE with more negatives than a batch has: the embeddings of past batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tritower.datamodules.batch import NO_KEY, RELATIONS
from tritower.towers.losses.loss import InfoNCE, Rows


class MemoryInfoNCE(InfoNCE):
    """InfoNCE whose rows are compared with embeddings of earlier steps too (XBM, arXiv:1912.06798).

    They cost no encoding, and are as old as `size` examples are; so learning rates should be low.
    Equal keys make positives of them too, or leave them out, as do the judgements of the batch's
    queries; those of remembered queries are not kept. The memory is part of a checkpoint.

    Args:
        size: embeddings of each side that are remembered.
        warmup: steps before they count: embeddings change fastest at first.
        **settings: those of `InfoNCE`.
    """

    def __init__(
        self,
        size: int = 8192,
        warmup: int = 100,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if size < 1 or warmup < 0:
            raise ValueError(
                f"size={size}, warmup={warmup}: choose a size of at least 1, and no negative warmup."
            )
        self.size, self.warmup = size, warmup

    def set_dim(self, dim: int) -> None:
        """Make room for embeddings of this size."""
        for side in ("query", "product"):
            self.register_buffer(f"{side}_vectors", torch.zeros(self.size, dim))
            self.register_buffer(f"{side}_keys", torch.full((self.size, len(RELATIONS)), NO_KEY))
            self.register_buffer(f"{side}_offset", torch.zeros(self.size))
            self.register_buffer(f"{side}_present", torch.zeros(self.size, dtype=torch.bool))
            self.register_buffer(f"{side}_written", torch.zeros((), dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def known(self, side: str, rows: Rows) -> Rows:
        """The rows, and those that are remembered; afterwards the rows are remembered in place of the oldest."""
        memory = [
            getattr(self, f"{side}_{name}") for name in ("vectors", "keys", "offset", "present")
        ]
        written: Tensor = getattr(self, f"{side}_written")
        filled = min(int(written), self.size)
        both = rows
        if self.steps >= self.warmup and filled:
            known = (
                torch.cat([new, old[:filled]]) for new, old in zip(rows[:4], memory, strict=True)
            )
            judged, grades = (
                F.pad(new, (0, 0, 0, filled), value=none)
                for new, none in zip(rows[4:], (NO_KEY, 0), strict=True)
            )
            both = Rows(*known, judged, grades)
        if self.training:
            latest = [tensor[-self.size :].detach() for tensor in rows[:4]]
            place = (written + torch.arange(len(latest[0]), device=written.device)) % self.size
            for old, new in zip(memory, latest, strict=True):
                old[place] = new.to(old.dtype)
            written += len(latest[0])
            self.steps += side == "product"  # the second of a step
        return both
