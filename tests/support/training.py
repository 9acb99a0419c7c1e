"""Training the tiny model in tests: the command, and a diary of what every step saw and did."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L

from tritower.towers import cli as train

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "tiny.yaml"

TEXT_ONLY = ("--model.product.image=null", "--model.product.attribute=null")
"""Arguments that leave the text tower alone: the fastest model."""


def fit_arguments(catalogue: Path, run: Path, *arguments: str) -> list[str]:
    """Those of `train.py fit` with the tiny configuration."""
    return [
        "fit",
        "--config",
        str(CONFIG),
        f"--data.catalogue={catalogue}",
        f"--run={run}",
        *arguments,
    ]


def fit(catalogue: Path, run: Path, *arguments: str) -> int:
    """`train.py fit` with the tiny configuration, in this process; returns the exit code."""
    return train.main(fit_arguments(catalogue, run, *arguments))


class Diary(L.Callback):
    """Writes a line for every step.

    The products it saw, the learning rates, the loss with all its bits.

    Args:
        path: of the file, which grows.
        kill_at: step after which the process is killed as by the system.
        fail_at: step after which an exception ends the run.
    """

    def __init__(self, path: Path, kill_at: int = -1, fail_at: int = -1) -> None:
        self.path, self.kill_at, self.fail_at = Path(path), kill_at, fail_at

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        line = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "products": batch.product_keys[:, 0].tolist(),
            "queries": batch.query_keys[:, 0].tolist(),
            "lr": [group["lr"] for group in trainer.optimizers[0].param_groups],
            "loss": outputs["loss"].item().hex(),
            "scale": module.loss.scale.item().hex(),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if trainer.global_step == self.fail_at:
            raise RuntimeError("stopped for a test")


def diary(path: Path, **settings: int) -> list[str]:
    """Arguments that let a run keep a diary."""
    return [
        "--trainer.callbacks+=tests.support.training.Diary",
        f"--trainer.callbacks.path={path}",
        *(f"--trainer.callbacks.{name}={value}" for name, value in settings.items()),
    ]


def entries(path: Path) -> list[dict[str, Any]]:
    """The lines of a diary."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_program(
    script: str, *arguments: str, timeout_s: float = 150
) -> subprocess.CompletedProcess[str]:
    """`python SCRIPT ...` with all the processes it starts.

    They are killed when it takes too long.
    """
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{script} hung for {timeout_s} s:\n{output}") from None
    return subprocess.CompletedProcess(arguments, process.returncode, output)


def logged(run: Path, name: str) -> list[float]:
    """The values of a column of the run's newest log, in the order of the steps."""
    newest = max(
        (run / "logs").iterdir(), key=lambda folder: int(folder.name.removeprefix("version_"))
    )
    with (newest / "metrics.csv").open(encoding="utf-8") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]
