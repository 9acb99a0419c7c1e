"""Cross-batch memory: embeddings of past batches as further negatives (XBM)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritower.datamodules.batch import NO_KEY, RELATIONS
from tritower.towers.losses.rows import LossRows

FIELDS = ("vectors", "keys", "offset", "present")
"""The fields of `LossRows` that are remembered; judgements of past queries are not."""


class CrossBatchMemory(nn.Module):
    """The last `size` embeddings of each side (XBM, Wang et al. 2020, arXiv:1912.06798).

    They cost no encoding, and are as old as `size` examples are; so learning rates should be low.
    Keys and judgements of the batch's queries decide about pairs with them too. The memory is part
    of a checkpoint.

    Args:
        size: embeddings of each side.
        warmup: steps before they are used: embeddings change fastest at first.

    Raises:
        ValueError: size below 1, or a negative warmup.
    """

    steps: Tensor

    def __init__(self, size: int = 8192, warmup: int = 100) -> None:
        super().__init__()
        if size < 1 or warmup < 0:
            raise ValueError(
                f"size={size}, warmup={warmup}: choose a size of at least 1, and no negative "
                "warmup."
            )
        self.size = size
        self.warmup = warmup

    def allocate(self, dim: int) -> None:
        """Make room for embeddings of size D."""
        for side in ("query", "product"):
            self.register_buffer(f"{side}_vectors", torch.zeros(self.size, dim))
            self.register_buffer(f"{side}_keys", torch.full((self.size, len(RELATIONS)), NO_KEY))
            self.register_buffer(f"{side}_offset", torch.zeros(self.size))
            self.register_buffer(f"{side}_present", torch.zeros(self.size, dtype=torch.bool))
            self.register_buffer(f"{side}_written", torch.zeros((), dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def extend(self, queries: LossRows, products: LossRows) -> tuple[LossRows, LossRows]:
        """(B, D) rows to (B + memory, D): remembered ones are appended; training adds to them."""
        longer_queries = self._with_remembered("query", queries)
        longer_products = self._with_remembered("product", products)
        if self.training:
            self._remember("query", queries)
            self._remember("product", products)
            self.steps += 1
        return longer_queries, longer_products

    def _with_remembered(self, side: str, rows: LossRows) -> LossRows:
        filled = min(int(getattr(self, f"{side}_written")), self.size)
        if self.steps < self.warmup or not filled:
            return rows
        joined = []
        for name in FIELDS:
            remembered = getattr(self, f"{side}_{name}")[:filled]
            joined.append(torch.cat([getattr(rows, name), remembered]))
        judged = F.pad(rows.judged_products, (0, 0, 0, filled), value=NO_KEY)
        weights = F.pad(rows.judgement_weights, (0, 0, 0, filled), value=0)
        vectors, keys, offset, present = joined
        return LossRows(vectors, keys, offset, present, judged, weights)

    def _remember(self, side: str, rows: LossRows) -> None:
        """Write the rows over the oldest ones, in a ring."""
        written: Tensor = getattr(self, f"{side}_written")
        count = min(len(rows.vectors), self.size)
        place = (written + torch.arange(count, device=written.device)) % self.size
        for name in FIELDS:
            buffer: Tensor = getattr(self, f"{side}_{name}")
            latest = getattr(rows, name)[-self.size :].detach()
            buffer[place] = latest.to(buffer.dtype)
        written += count
