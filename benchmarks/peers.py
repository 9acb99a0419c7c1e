"""Losses of other libraries on the towers of configs/fashion.yaml, each at the best of its trials.

    python -m benchmarks.peers --data DIR --weights DIR --json FILE [--split val|test]

Every arm has the same towers, examples and epochs. Every arm has `TRIALS` trials of its own, of
learning rates and temperatures. The defaults of its library are among them. A trial says its
temperature itself, so that the configuration's is never in effect. The trial of the highest nDCG@10
of product queries on the val split is chosen. Its settings are trained with every seed, and
measured as `benchmarks.catalogues` measures. They are trained for as many epochs as the trials: a
learning rate suits the length of its schedule.

`benchmarks/peer_trials.json` keeps the trials; those that it lacks are made first, on val alone.
Its keys: "ARM/NUMBER" -> {"splits", "arguments", "epochs", "val": {METRIC: value}, "seconds"}.
"splits" is the salt of `benchmarks.splits`.

The keys of FILE are those of `benchmarks.catalogues`, and so is what guards the test split.
"""

from __future__ import annotations

import csv
import json as json_format
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ablation import CATALOGUE, PRODUCTS
from benchmarks.catalogues import (
    ALONE,
    LOSS,
    SPLITS,
    WHOLE,
    Bench,
    BenchOptions,
    Catalogue,
    Results,
    call,
    run_all,
)
from benchmarks.command import ALL, Folders, Reading, chosen, run
from benchmarks.ledger import Ledger
from tritower.artefacts.storage import write_json

PEERS = "benchmarks.peer_losses"
FUSED = [*PRODUCTS, WHOLE]
TEXT = [*ALONE["text"], CATALOGUE]
LARGE_BATCH = ["--data.batch_size=2048"]
TRIAL_EPOCHS = 5
CHOSEN_BY = "val/product_queries/ndcg@10"


@dataclass(frozen=True)
class Arm:
    """A loss and what it is tried with.

    Attributes:
        arguments: of `train.py`, all but the loss.
        loss: class of the loss.
        temperature: its own default, tried with three learning rates.
        other: another temperature, tried with the middle one.
        lr: the middle one; a third and three times as much are tried too.
        more: further arguments of the loss.
    """

    arguments: list[str]
    loss: str
    temperature: float
    other: float = 0.02
    lr: float = 1.5e-3
    more: tuple[str, ...] = ()

    def trials(self) -> list[list[str]]:
        """The arguments of each trial."""
        rates = (self.lr / 3, self.lr, self.lr * 3)
        tried = [*((rate, self.temperature) for rate in rates), (self.lr, self.other)]
        return [self.arguments_of(rate, temperature) for rate, temperature in tried]

    def arguments_of(self, lr: float, temperature: float) -> list[str]:
        """Those of `train.py`; the temperature is always given."""
        loss = [
            f"--model.loss={self.loss}",
            f"{LOSS}.temperature={temperature:g}",
            *(f"{LOSS}.{argument}" for argument in self.more),
        ]
        return [*self.arguments, *loss, f"--model.optimizer.lr={lr:g}"]


ARMS = {
    "ours": Arm(FUSED, "InfoNCE", 0.02, other=0.07),  # the temperature of the configuration
    "open_clip's ClipLoss": Arm(FUSED, f"{PEERS}.OpenClipLoss", 0.07),
    "open_clip's SigLipLoss": Arm(FUSED, f"{PEERS}.OpenClipSigmoid", 0.1, more=("bias=-10",)),
    "sentence-transformers' loss": Arm(FUSED, f"{PEERS}.MultipleNegativesRanking", 0.05),
    "sentence-transformers' cached loss, batch 2,048": Arm(
        [*FUSED, *LARGE_BATCH], f"{PEERS}.CachedMultipleNegativesRanking", 0.05, lr=1e-3
    ),
    "text alone, ours": Arm(TEXT, "InfoNCE", 0.02, other=0.07),
    "text alone, sentence-transformers' loss": Arm(TEXT, f"{PEERS}.MultipleNegativesRanking", 0.05),
}
TRIALS = 4
"""Of each arm."""


class Trials:
    """The file of trials: read at the start, written after every one."""

    def __init__(self, file: Path) -> None:
        self.file = file
        if file.is_file():
            text = file.read_text(encoding="utf-8")
        else:
            text = "{}"
        self.data: dict[str, dict[str, Any]] = json_format.loads(text)

    def make(self, bench: Bench, name: str) -> None:
        """Train what is missing of an arm's trials, or was made with other arguments or epochs."""
        for number, arguments in enumerate(ARMS[name].trials()):
            key = f"{name}/{number}"
            made = {"splits": bench.catalogue.salt, "arguments": arguments, "epochs": TRIAL_EPOCHS}
            if made.items() <= self.data.get(key, {}).items():
                continue
            started = time.monotonic()
            run = bench.work / "runs" / bench.catalogue.folder / "trials" / name / str(number)
            shutil.rmtree(run, ignore_errors=True)
            call("train.py", *bench.fit_arguments(run, [*arguments, *short(TRIAL_EPOCHS)], seed=0))
            val = last_figures(run)
            seconds = round(time.monotonic() - started, 1)
            self.data[key] = {**made, "val": val, "seconds": seconds}
            write_json(self.file, self.data)
            print(f"{key}: {val[CHOSEN_BY]:.4f}, {seconds} s", flush=True)

    def best(self, name: str) -> list[str]:
        """The arguments of the arm's best trial."""
        of = [self.data[f"{name}/{number}"] for number in range(TRIALS)]
        found: list[str] = max(of, key=lambda trial: trial["val"][CHOSEN_BY])["arguments"]
        return found


def short(epochs: int) -> list[str]:
    """The arguments of a training of a few epochs, with one validation at its end."""
    return [f"--trainer.max_epochs={epochs}", f"--trainer.check_val_every_n_epoch={epochs}"]


def last_figures(run: Path) -> dict[str, float]:
    """The val figures of a run's last validation."""
    with (run / "logs" / "version_0" / "metrics.csv").open(encoding="utf-8", newline="") as read:
        rows = [row for row in csv.DictReader(read) if row[CHOSEN_BY]]
    of_val = {name: value for name, value in rows[-1].items() if name.startswith("val/") and value}
    return {name: round(float(value), 4) for name, value in of_val.items()}


def main(
    folders: Folders,
    reading: Reading,
    seeds: int = 1,
    arms: list[str] = ALL,
    trials: Path = Path("benchmarks/peer_trials.json"),
) -> None:
    """Try, choose, train and measure all arms. Trials are measured on val.

    Args:
        folders: what is read and written
        reading: which queries are measured
        seeds: trainings per arm.
        arms: names of arms; all when not given.
        trials: where trials are stored, and resumed from.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    names = chosen(arms, ARMS)
    made = Trials(trials)
    results = Results(folders.json, Ledger(again=reading.again))
    catalogue = Catalogue("fashion", seeds=seeds, trained=tuple(names), splits=SPLITS["fashion"])
    table: dict[str, list[str]] = {}
    bench = Bench(catalogue, folders, reading.split, results, BenchOptions(arms=table))
    bench.check()
    bench.prepare()
    for name in names:
        made.make(bench, name)
        table[name] = [*made.best(name), *short(TRIAL_EPOCHS)]
        print(f"{name}: {' '.join(table[name])}", flush=True)
    run_all([bench], results, reading.split)


if __name__ == "__main__":
    run("benchmarks.peers", main, "Peers at their own best, trained on the same data.")
