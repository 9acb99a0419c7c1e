"""Where the time of a training step goes: waiting for data, forward, backward, the optimizer."""

from __future__ import annotations

import logging
import time
from typing import Any

import lightning as L
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

PARTS = ("data", "forward", "backward", "optimizer")
FIRST = 5
"""Steps that do not count: workers start, caches fill, kernels are chosen."""


class StepTimes(L.Callback):
    """Logs `train/seconds_data` and its like, and warns once where data is the limit.

    The model looks at the loss and at the gradients of every step, so that a GPU has finished what
    a part began before its time is taken.

    Args:
        warn_above: share of a step, 0 to 1, that waiting for data may take.
        steps: that are observed before a warning.
    """

    def __init__(self, warn_above: float = 0.3, steps: int = 50) -> None:
        if not 0 < warn_above <= 1 or steps < 1:
            raise ValueError(
                f"warn_above={warn_above}, steps={steps}: choose a share above 0, and at least one "
                "step."
            )
        self.warn_above = warn_above
        self.steps = steps
        self._last = 0.0
        self._seen = 0
        self._now = dict.fromkeys(PARTS, 0.0)
        self._all = dict.fromkeys(PARTS, 0.0)

    def _take(self, part: str) -> None:
        """What has passed since the last call belongs to this part."""
        now = time.perf_counter()
        self._now[part] += now - self._last
        self._all[part] += now - self._last
        self._last = now

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validation is no waiting for data."""
        self._last = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch has come."""
        self._take("data")
        if self._seen == FIRST:
            self._all = dict.fromkeys(PARTS, 0.0)

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        """The () loss is computed: the forward pass ends here."""
        self._take("forward")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The gradients are there."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._take("backward")

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """The step is over."""
        self._take("optimizer")
        self._seen += 1
        if trainer.log_every_n_steps and self._seen % trainer.log_every_n_steps == 0:
            means = {}
            for part, value in self._now.items():
                means[f"train/seconds_{part}"] = value / trainer.log_every_n_steps
            pl_module.log_dict(means, rank_zero_only=True)
            self._now = dict.fromkeys(PARTS, 0.0)
        if self._seen == FIRST + self.steps:
            self._warn(trainer)

    def _warn(self, trainer: L.Trainer) -> None:
        share = self._all["data"] / max(1e-9, sum(self._all.values()))
        if share > self.warn_above and trainer.is_global_zero:
            workers = trainer.datamodule.loader.num_workers
            logger.warning(
                "Training waits for data %.0f %% of the time: raise data.loader.num_workers (now "
                "%d), prepare smaller "
                "pictures, or keep the features of frozen towers (model.encoding.feature_cache).",
                100 * share,
                workers,
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nor is a validation within an epoch."""
        self._last = time.perf_counter()
