"""Train a two-tower model: `python train.py fit --config configs/demo.yaml`.

Everything in the configuration can be given on the command line too, e.g. `--model.lr 3e-4`; `fit --help` explains all
of it. A run goes into one folder (`--run`), which at the end holds the exported model (`RUN/model`).
"""

from __future__ import annotations

import sys

from towers.cli import TrainingCLI


def main(args: list[str] | None = None) -> int:
    """Entry point of `tritower-train`; returns the exit code."""
    return TrainingCLI.launch(args)


if __name__ == "__main__":
    sys.exit(main())
