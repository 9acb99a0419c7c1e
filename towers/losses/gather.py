"""Rows of all processes, with gradient.

Each process returns its share of the loss times the number of processes. Distributed training
averages gradients, so they are exactly those of one process with the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rank = dist.get_rank()
        ctx.num_rows = len(rows)
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Autograd may use the original elsewhere, so a copy is summed.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        # Every process has a share of the loss on these rows.
        dist.all_reduce(gradient)
        start = ctx.rank * ctx.num_rows
        return gradient[start : start + ctx.num_rows]


def num_processes() -> int:
    """The number of training processes; 1 where training is not distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return 1


def rank_offset(num_rows: int) -> int:
    """The position of this process's first row among the gathered ones."""
    if num_processes() > 1:
        return num_rows * dist.get_rank()
    return 0


def gather_rows(rows: Tensor) -> Tensor:
    """(n, ...) of each process -> (n * processes, ...), in the order of ranks, with gradient.

    All processes must have the same n. Summed over processes, the gradient is that of one process
    with all rows.
    """
    if num_processes() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows)
    return gathered


def weighted_mean(losses: Tensor, weight: Tensor) -> Tensor:
    """(B,) losses and (B,) weights of this process -> its share of the mean over all processes."""
    total_weight = gather_rows(weight).sum().clamp(min=1e-9)
    return num_processes() * (weight * losses).sum() / total_weight
