"""Checkpoints of a run: saving, choosing one to resume from, and the monitored figure."""

from __future__ import annotations

import logging
import re
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

logger = logging.getLogger(__name__)

VAL_FIGURE = r"val/((product|other)_queries/)?(hit@1|hit@10|recall@10|mrr@10|ndcg@10)"
"""Figures of validation that a run can be monitored by."""


class RunCheckpoint(ModelCheckpoint):
    """Remembers its best checkpoint even if the run's folder was moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ModelCheckpoint, which forgets all scores if its folder has another name."""
        old = state_dict["dirpath"]
        new = str(self.dirpath)

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {moved(path): score for path, score in value.items()}
            if isinstance(value, str) and value.startswith(old):
                return new + value.removeprefix(old)
            return value

        super().load_state_dict({name: moved(value) for name, value in state_dict.items()})


class WithinEpochs(RunCheckpoint):
    """Saves every few steps, but not right before a validation.

    A run resumed from such a checkpoint would skip that validation.
    """

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """As ModelCheckpoint; after a validation the other checkpoint saves."""
        if not _validation_follows(trainer, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def _validation_follows(trainer: L.Trainer, batch_idx: int) -> bool:
    every = trainer.val_check_batch
    epochs = trainer.check_val_every_n_epoch
    if not trainer.enable_validation or every is None or every == float("inf"):
        return False
    if epochs is None:
        return (trainer.fit_loop.total_batch_idx + 1) % every == 0
    return (trainer.current_epoch + 1) % epochs == 0 and (batch_idx + 1) % every == 0


def last_checkpoints(folder: Path, every_n_steps: int | None) -> list[RunCheckpoint]:
    """Callbacks that keep the last two checkpoints: a second one, if the first is damaged.

    Args:
        folder: of the checkpoints.
        every_n_steps: also save within epochs, after this many steps.
    """
    options = {"dirpath": folder, "save_top_k": 2, "monitor": "step", "mode": "max"}
    last = RunCheckpoint(filename="last-{step}", **options)
    if every_n_steps is None:
        return [last]
    within = WithinEpochs(filename="within-{step}", every_n_train_steps=every_n_steps, **options)
    return [last, within]


def check_monitor(name: str, monitor: str | None, validates: bool) -> None:
    """Refuse a monitored figure that a run does not have.

    Args:
        name: of the option, for the message.
        monitor: the figure.
        validates: whether the run has validations.

    Raises:
        ValueError: an unknown figure, or one of validation in a run without.
    """
    if monitor == "train/loss":
        return
    if not validates:
        raise ValueError(
            f"{name}.monitor={monitor} needs held-out queries, and trainer.limit_val_batches=0 "
            "asks none: monitor train/loss with mode=min, or leave limit_val_batches out."
        )
    if not re.fullmatch(VAL_FIGURE, monitor or ""):
        raise ValueError(
            f"{name}.monitor={monitor!r} is no figure of a run. Choose val/ndcg@10, val/hit@1, "
            "val/hit@10, val/recall@10 or val/mrr@10, those of val/product_queries/ or "
            "val/other_queries/, or train/loss."
        )


def checkpoint_to_resume(run_folder: Path, checkpoints: Path, resume: bool) -> Path | None:
    """The checkpoint that `fit` starts from; None to start anew.

    Raises:
        ValueError: the folder holds a run that is not to be resumed, or only damaged checkpoints.
    """
    if checkpoints.is_dir():
        existing = sorted(checkpoints.glob("*.ckpt"))
    else:
        existing = []
    # A new run must not overwrite an old one by mistake.
    if not resume:
        if existing:
            raise ValueError(
                f"{run_folder} holds a run already ({len(existing)} checkpoints). Go on with "
                "--resume true, or choose another folder with --run."
            )
        return None
    path = newest_valid_checkpoint(existing)
    if path is None:
        logger.info("no checkpoint in %s: starting", checkpoints)
    else:
        logger.info("resuming from %s", path)
    return path


def newest_valid_checkpoint(paths: list[Path]) -> Path | None:
    """The readable checkpoint with the most steps; damaged ones are named and skipped.

    Raises:
        ValueError: there are checkpoints, but none can be read.
    """
    steps: dict[Path, int] = {}
    for path in paths:
        try:
            steps[path] = _read_step(path)
        except Exception as error:  # a torn file raises whatever its first wrong byte leads to
            problem = (str(error) or type(error).__name__).splitlines()[0]
            logger.warning("skipped %s: it cannot be read (%s)", path, problem)
    if paths and not steps:
        raise ValueError(f"None of the checkpoints can be read: {', '.join(map(str, paths))}.")

    # Of one step, the checkpoint after its validation goes before the one within an epoch.
    def order(path: Path) -> tuple[int, bool, str]:
        return steps[path], not path.name.startswith("within"), path.name

    return max(steps, key=order, default=None)


def _read_step(path: Path) -> int:
    """The step of a checkpoint, after a check of its digests."""
    # torch writes digests, and never compares them.
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged:
        raise ValueError(f"{damaged} is damaged")
    checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    return int(checkpoint["global_step"])
