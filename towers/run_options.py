"""Options of a training run beside those of trainer, model and data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jsonargparse.typing import PositiveInt


@dataclass(frozen=True)
class RunOptions:
    """What a run needs beside trainer, model and data.

    Attributes:
        run: folder of checkpoints, logs and the exported model.
        resume: continue from the run's newest valid checkpoint.
        replan: a resumed run may have another number of steps than planned.
        checkpoint_every_steps: save a checkpoint to resume from after so many steps, not only at
            validations.
        then_test: after fit: the best model's figures on the test split.
        floor: after fit: the best model beside untrained search (words, pretrained towers, their
            weighted sum), for each query type of the val split.
        wandb: log to Weights & Biases, too.
        wandb_project: project in Weights & Biases.
    """

    run: Path = Path("runs/default")
    resume: bool = False
    replan: bool = False
    checkpoint_every_steps: PositiveInt | None = None
    then_test: bool = False
    floor: bool = True
    wandb: Literal["off", "online", "offline"] = "off"
    wandb_project: str = "tritower"


DEFAULTS = {
    "early_stopping.monitor": "val/ndcg@10",
    "early_stopping.mode": "max",
    "early_stopping.patience": 5,
    "checkpoint.monitor": "val/ndcg@10",
    "checkpoint.mode": "max",
    "checkpoint.filename": "best",
    "checkpoint.auto_insert_metric_name": False,
    "checkpoint.enable_version_counter": False,
}
"""Defaults of callbacks: the best model has the highest nDCG@10 on val."""
