"""Losses of many rows without holding all of their scores: block after block of rows.

A loss of B rows against P columns makes (B, P) scores, and its gradient about ten tensors of that
size. Here rows are taken in blocks of at most `MAX_SCORES` scores, and the backward pass computes
each block's scores again: a large batch costs time and never memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

MAX_SCORES = 1 << 22
"""Scores that are held at a time; each takes about 40 bytes while its gradient is computed."""


def losses_in_blocks(
    row_losses: Callable[..., Tensor], num_columns: int, shared: Sequence[Tensor], *rows: Tensor
) -> Tensor:
    """(B,) losses of B rows, computed in blocks of rows.

    Args:
        row_losses: function of (*shared, *(b, ...) of each of `rows`) -> (b,) losses.
        num_columns: P, scores of one row.
        shared: tensors that every block needs as a whole.
        rows: tensors with B rows each.
    """
    block_rows = max(1, MAX_SCORES // max(1, num_columns))
    if len(rows[0]) <= block_rows:
        return row_losses(*shared, *rows)
    losses: Tensor = _LossesInBlocks.apply(row_losses, block_rows, len(shared), *shared, *rows)
    return losses


class _LossesInBlocks(torch.autograd.Function):
    """The forward and backward pass of `losses_in_blocks`.

    All blocks write into one tensor. A small tensor for each block would keep the C library from
    reusing the memory between them: checkpoints of the blocks took tens of gigabytes that way.
    """

    @staticmethod
    def forward(
        ctx: Any,
        row_losses: Callable[..., Tensor],
        block_rows: int,
        num_shared: int,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.row_losses = row_losses
        ctx.block_rows = block_rows
        ctx.num_shared = num_shared
        ctx.save_for_backward(*tensors)
        shared = tensors[:num_shared]
        rows = tensors[num_shared:]
        losses = rows[0].new_empty(len(rows[0]))  # (B,)
        for start in range(0, len(losses), block_rows):
            block = slice(start, start + block_rows)
            losses[block] = row_losses(*shared, *(tensor[block] for tensor in rows))
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        needs_gradient = ctx.needs_input_grad[3:]
        totals: list[Tensor | None] = []
        for tensor, needed in zip(tensors, needs_gradient, strict=True):
            totals.append(torch.zeros_like(tensor) if needed else None)

        for start in range(0, len(gradient), ctx.block_rows):
            block = slice(start, start + ctx.block_rows)
            # The block's scores once more, this time with a graph.
            with torch.enable_grad():
                inputs = []
                for i, tensor in enumerate(tensors):
                    if i < ctx.num_shared:
                        part = tensor
                    else:
                        part = tensor[block]
                    inputs.append(part.detach().requires_grad_(needs_gradient[i]))
                leaves = [tensor for tensor in inputs if tensor.requires_grad]
                gradients = iter(
                    torch.autograd.grad(ctx.row_losses(*inputs), leaves, gradient[block])
                )
            for i, total in enumerate(totals):
                if total is not None:
                    if i < ctx.num_shared:
                        target = total
                    else:
                        target = total[block]
                    target.add_(next(gradients))
        return (None, None, None, *totals)
