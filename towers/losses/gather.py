"""Rows of all processes, with gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rank, ctx.num_rows = dist.get_rank(), len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(
            memory_format=torch.contiguous_format
        )  # autograd may use the original elsewhere
        dist.all_reduce(gradient)  # every process has a share of the loss on these rows
        return gradient[ctx.rank * ctx.num_rows : (ctx.rank + 1) * ctx.num_rows]


def num_processes() -> int:
    """1 where training is not distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(rows: Tensor) -> Tensor:
    """(n, ...) of each process -> (n * processes, ...), in the order of the ranks; gradients flow back to each.

    All processes must have the same n. Summed over processes, the gradient is that of one process
    with all rows.
    """
    if num_processes() == 1:
        return rows
    return _GatherRows.apply(rows)
