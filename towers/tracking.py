"""Weights & Biases, as something that training never depends on."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger

logger = logging.getLogger(__name__)

INIT_TIMEOUT_S = 6
FINISH_TIMEOUT_S = 60
"""What is not uploaded by then stays in the run's folder, for `wandb sync`."""


class PatientWandbLogger(WandbLogger):
    """Logs until the first failure, which is reported; training continues without it."""

    broken = False

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """As WandbLogger."""
        self._try(super().log_metrics, metrics, step)

    def log_hyperparams(self, params: Any) -> None:
        """As WandbLogger."""
        self._try(super().log_hyperparams, params)

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """As WandbLogger."""
        self._try(super().after_save_checkpoint, checkpoint_callback)

    def finalize(self, status: str) -> None:
        """As WandbLogger."""
        self._try(super().finalize, status)

    def _try(self, function: Any, *args: Any) -> None:
        if self.broken:
            return
        try:
            function(*args)
        except Exception as error:  # whatever a tracker does, the run matters more
            self.broken = True
            logger.warning(
                "Weights & Biases failed (%s): training goes on, its log is in the run's folder.",
                error,
            )


def wandb_logger(folder: Path, project: str, *, offline: bool) -> list[Logger]:
    """A logger, or none where even offline logging fails.

    Online logging that cannot start within seconds (no network, no key) becomes offline logging.
    """
    import wandb

    # As a variable, older releases ignore it.
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(FINISH_TIMEOUT_S))
    # Without network or key, log offline; without a disk, not at all. Training continues.
    for mode in ("offline",) if offline else ("online", "offline"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            run = wandb.init(
                project=project,
                dir=folder,
                mode=mode,
                settings=wandb.Settings(
                    init_timeout=INIT_TIMEOUT_S, login_timeout=INIT_TIMEOUT_S, silent=True
                ),
            )
            return [PatientWandbLogger(experiment=run, save_dir=folder)]
        except Exception as error:  # no network, no key, a full disk: none may stop a training
            logger.warning(
                "Weights & Biases cannot start %s: %s",
                mode,
                str(error).splitlines()[0] if str(error) else error,
            )
    return []
