"""AdamW with two learning rates, warm-up and a cosine schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tritower.towers.encoder import Encoder


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer and its schedule.

    Attributes:
        lr: learning rate of new parts (projections, fusion, towers trained from scratch).
        pretrained_lr: learning rate of pretrained towers.
        weight_decay: of AdamW; norms, biases and the temperature have none.
        warmup: share of all steps in which the learning rate rises, 0 to below 1; then it falls as
            a cosine to zero.
    """

    lr: float = 1e-3
    pretrained_lr: float = 1e-5
    weight_decay: float = 0.05
    warmup: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(
                f"warmup={self.warmup} is a share of all steps: choose 0 <= warmup < 1."
            )


def parameter_groups(
    model: nn.Module, encoders: Iterable[Encoder], options: OptimizerOptions
) -> list[dict[str, Any]]:
    """The trained parameters by learning rate and decay.

    Matrices decay; vectors and scalars do not.
    """
    pretrained: set[int] = set()
    # Pretrained towers learn at a lower rate.
    for encoder in encoders:
        for tower in encoder.named_towers.values():
            if tower.pretrained:
                pretrained.update(id(parameter) for parameter in tower.parameters())
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in pretrained:
            lr = options.pretrained_lr
        else:
            lr = options.lr
        # Vectors and scalars, such as biases and norms, do not decay.
        decays = parameter.ndim > 1 and not name.endswith("bias")
        decay = options.weight_decay if decays else 0.0
        groups.setdefault((lr, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]


def make_optimizer(
    groups: list[dict[str, Any]], options: OptimizerOptions, steps: int
) -> dict[str, Any]:
    """AdamW and its schedule over a known number of steps, as Lightning takes them."""
    optimizer = torch.optim.AdamW(groups)
    warmup_steps = max(1, round(options.warmup * steps))

    # Linear warmup, then half a cosine down to 0.
    def factor(step: int) -> float:
        """The learning rate of a step, as a share of the highest one."""
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def plan_steps(estimated: float, planned: int | None, *, replan: bool) -> int:
    """The number of steps of a run.

    Args:
        estimated: by the trainer, from its epochs and the data.
        planned: of the run that is resumed; None for a new one.
        replan: allow another number than planned.

    Raises:
        ValueError: no end is known, or a resumed run would have another number of steps.
    """
    if math.isinf(estimated):
        raise ValueError(
            "The learning rate falls over a known number of steps, and trainer.max_epochs=-1 has "
            "no end: name trainer.max_epochs or trainer.max_steps (trainer.max_time may stop a run "
            "earlier)."
        )
    # A resumed run must have the schedule that it began with.
    steps = max(1, int(estimated))
    if planned not in (None, steps) and not replan:
        raise ValueError(
            f"This run was planned for {planned} steps and would now have {steps}, so its learning "
            "rate would jump. Resume it with the settings it began with, or say --replan true."
        )
    return steps
