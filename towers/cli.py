"""The command line of training.

Configuration, one folder per run, logs, checkpoints, resuming, export.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import zipfile
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.table import Table

from tritower import configs
from tritower.artefacts.storage import ArtefactError, write_json
from tritower.datamodules.batch import Side
from tritower.datamodules.products import ProductDataModule
from tritower.retrieval.evaluating.comparison_table import TABLE_WIDTH, below_floor, terminal_table
from tritower.towers.floor import floor_report
from tritower.towers.losses.contrastive import Loss
from tritower.towers.losses.cross_batch_memory import CrossBatchMemory
from tritower.towers.losses.info_nce import InfoNCE
from tritower.towers.losses.pairs import CoSENT, PairLoss
from tritower.towers.losses.sigmoid import SigmoidLoss
from tritower.towers.losses.sogclr import SogCLRNormalizer
from tritower.towers.mining import HardNegatives
from tritower.towers.model_folder import save_model
from tritower.towers.quiet import quiet_lightning
from tritower.towers.step_times import StepTimes
from tritower.towers.tower import Tower
from tritower.towers.tracking import wandb_logger
from tritower.towers.two_tower import TwoTower
from tritower.towers.untrained import untrained_towers

logger = logging.getLogger(__name__)

PARSER = {"allow_abbrev": False}
USAGE = "%(prog)s [--config FILE] [--OPTION VALUE ...]"
"""In front of an error; the list of all options would bury it."""

LOSSES: tuple[type[Loss], ...] = (InfoNCE, SigmoidLoss, CoSENT, PairLoss)
NEGATIVES = (CrossBatchMemory, SogCLRNormalizer)
"""Classes that a configuration may name without their module."""

VAL_FIGURE = r"val/((product|other)_queries/)?(hit@1|hit@10|recall@10|mrr@10|ndcg@10)"

USER_ERRORS = (
    OSError,
    ValueError,
    ArtefactError,
    FloatingPointError,
    ImportError,
    MisconfigurationException,
)


class RunCheckpoint(ModelCheckpoint):
    """Remembers its best checkpoint also where the run's folder was moved since."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ModelCheckpoint, which forgets all scores when its folder has another name."""
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
    """Saves every few steps, but not before a validation.

    A run that went on from there would leave it out.
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


class TrainingCLI(LightningCLI):
    """`fit`, `validate` and `test` of a TwoTower on a ProductDataModule."""

    @classmethod
    def launch(cls, args: list[str] | None = None) -> int:
        """Run a command; returns the exit code.

        Errors of the user are one line, without a traceback.
        """
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        quiet_lightning()
        if args is None:
            sys.argv[1:] = configs.resolve(
                sys.argv[1:]
            )  # where the processes of other devices find them, too
        else:
            args = configs.resolve(args)
        try:
            cls.start(args)
        except USER_ERRORS as error:
            if os.environ.get("TRITOWER_TRACEBACK"):
                raise
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0

    @classmethod
    def start(cls, args: list[str] | None = None, model: type[TwoTower] = TwoTower) -> TrainingCLI:
        """Run a command on a model of this class; errors are raised."""
        return cls(
            model,
            ProductDataModule,
            args=args,
            seed_everything_default=0,
            trainer_defaults={
                "max_epochs": 10,
                "log_every_n_steps": 10,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,  # batches are drawn and shared out by BatchStream
            },
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            parser_kwargs={
                **PARSER,
                **{command: {**PARSER, "usage": USAGE} for command in cls.subcommands()},
            },
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Embedding is a command of index.py, so there is no `predict`."""
        skipped = {"model", "datamodule"}
        return {
            "fit": skipped | {"train_dataloaders", "val_dataloaders", "ckpt_path", "weights_only"},
            "validate": skipped | {"dataloaders", "weights_only"},
            "test": skipped | {"dataloaders", "weights_only"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What a run needs beside trainer, model and data."""
        parser.add_argument(
            "--run",
            type=Path,
            default=Path("runs/default"),
            help="Folder of checkpoints, logs and the exported model.",
        )
        parser.add_argument(
            "--resume",
            type=bool,
            default=False,
            help="Go on from the run's newest valid checkpoint.",
        )
        parser.add_argument(
            "--replan",
            type=bool,
            default=False,
            help="A resumed run may have another number of steps than planned.",
        )
        parser.add_argument(
            "--checkpoint_every_steps",
            type=PositiveInt | None,
            default=None,
            help="Save a checkpoint to resume from after so many steps, not only at validations.",
        )
        parser.add_argument(
            "--then_test",
            type=bool,
            default=False,
            help="After fit: the best model's figures on the test split.",
        )
        parser.add_argument(
            "--floor",
            type=bool,
            default=True,
            help="After fit: the best model beside search without training (words, pretrained "
            "towers, their weighted sum), for each type of query of the val split.",
        )
        parser.add_argument(
            "--wandb",
            type=Literal["off", "online", "offline"],
            default="off",
            help="Log to Weights & Biases too.",
        )
        parser.add_argument(
            "--wandb_project", type=str, default="tritower", help="Project in Weights & Biases."
        )
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(HardNegatives, "hard_negatives")
        parser.add_lightning_class_args(StepTimes, "step_times")
        parser.set_defaults(
            {
                "early_stopping.monitor": "val/ndcg@10",
                "early_stopping.mode": "max",
                "early_stopping.patience": 5,
                "checkpoint.monitor": "val/ndcg@10",
                "checkpoint.mode": "max",
                "checkpoint.filename": "best",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.enable_version_counter": False,
            }
        )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """A trainer that writes into the run's folder."""
        self.run_folder: Path = self._get(self.config_init, "run")
        loggers: list[Logger] = [CSVLogger(self.run_folder, name="logs")]
        mode = self._get(self.config_init, "wandb")
        if mode != "off":
            project = self._get(self.config_init, "wandb_project")
            loggers += wandb_logger(self.run_folder, project, offline=mode == "offline")
        self._check_monitors()
        trainer = super().instantiate_trainer(
            logger=loggers, default_root_dir=self.run_folder, **kwargs
        )
        best = trainer.checkpoint_callback
        assert isinstance(best, ModelCheckpoint)
        best.dirpath = str(self.checkpoints.resolve())
        trainer.callbacks += (
            self._last_checkpoints()
        )  # the first one is `trainer.checkpoint_callback`
        trainer.callbacks.insert(0, LearningRateMonitor("step"))
        return trainer

    def _check_monitors(self) -> None:
        options = self.config[self.subcommand]
        for name in ("early_stopping", "checkpoint"):
            monitor = options[name].monitor
            if options.trainer.limit_val_batches == 0 and monitor != "train/loss":
                raise ValueError(
                    f"{name}.monitor={monitor} needs held-out queries, and "
                    "trainer.limit_val_batches=0 asks none: "
                    "monitor train/loss with mode=min, or leave limit_val_batches out."
                )
            if monitor != "train/loss" and not re.fullmatch(VAL_FIGURE, monitor or ""):
                raise ValueError(
                    f"{name}.monitor={monitor!r} is no figure of a run. Choose val/ndcg@10, "
                    "val/hit@1, val/hit@10, "
                    "val/recall@10 or val/mrr@10, those of val/product_queries/ or "
                    "val/other_queries/, or train/loss."
                )

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.run_folder / "checkpoints"

    def _last_checkpoints(self) -> list[RunCheckpoint]:
        every = self._get(self.config_init, "checkpoint_every_steps")
        two = {
            "dirpath": self.checkpoints.resolve(),
            "save_top_k": 2,
            "monitor": "step",
            "mode": "max",
        }  # to fall back
        last = RunCheckpoint(filename="last-{step}", **two)
        if every is None:
            return [last]
        return [last, WithinEpochs(filename="within-{step}", every_n_train_steps=every, **two)]

    def fit(self, **kwargs: Any) -> None:
        """Train, then export the best model and, if asked, measure it."""
        path = self._checkpoint_to_resume()
        self.model.replan = self._get(self.config_init, "replan")
        # Under max_steps Lightning takes a finished epoch for one to be gone on with, and leaves
        # its validation out.
        self.trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]
        untrained = self._untrained_towers()
        self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=path, weights_only=True)
        self._export(untrained)
        if (
            self._get(self.config_init, "floor")
            and self.trainer.limit_val_batches != 0
            and self.trainer.is_global_zero
        ):
            self._show_floor(untrained)
        if self._get(self.config_init, "then_test"):
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
            figures = {}
            for n, v in self.trainer.callback_metrics.items():
                if n.startswith("test/"):
                    figures[n] = float(v)
            write_json(self.run_folder / "test.json", figures)
            show_figures(figures)

    def _untrained_towers(self) -> dict[Side, dict[str, Tower]]:
        """The pretrained towers of each side as they are before training."""
        product = untrained_towers(self.model.product)
        own_query = self.model.own_query
        return {
            "product": product,
            "query": product if own_query is None else untrained_towers(own_query),
        }

    def _show_floor(self, untrained: dict[Side, dict[str, Tower]]) -> None:
        """Write floor.json and show the model beside the best search without training."""
        report = floor_report(self.model, self.datamodule, self.datamodule.val_split, untrained)
        write_json(self.run_folder / "floor.json", report)
        Console(width=max(TABLE_WIDTH, Console().width)).print(terminal_table(report))
        for line in below_floor(report):
            logger.warning("%s", line)

    def validate(self, **kwargs: Any) -> None:
        """Held-out queries of the validation split, by the best checkpoint or `--ckpt_path`."""
        self.trainer.validate(
            **{**kwargs, "ckpt_path": self._checkpoint_to_measure(kwargs)}, weights_only=True
        )

    def test(self, **kwargs: Any) -> None:
        """Held-out queries of the test split, by the run's best checkpoint or `--ckpt_path`."""
        self.trainer.test(
            **{**kwargs, "ckpt_path": self._checkpoint_to_measure(kwargs)}, weights_only=True
        )

    def _checkpoint_to_measure(self, kwargs: dict[str, Any]) -> Path:
        path = Path(kwargs["ckpt_path"] or self.checkpoints / "best.ckpt")
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such checkpoint. Name the run (--run) or a checkpoint (--ckpt_path)."
            )
        newest_valid_checkpoint([path])
        return path

    def _parse_ckpt_path(self) -> None:
        """Our checkpoints hold no configuration.

        Lightning would import whatever class a foreign one names.
        """

    def _checkpoint_to_resume(self) -> Path | None:
        there = sorted(self.checkpoints.glob("*.ckpt")) if self.checkpoints.is_dir() else []
        if not self._get(self.config_init, "resume"):
            if there:
                raise ValueError(
                    f"{self.run_folder} holds a run already ({len(there)} checkpoints). "
                    "Go on with --resume true, or choose another folder with --run."
                )
            return None
        path = newest_valid_checkpoint(there)
        logger.info("resuming from %s", path) if path else logger.info(
            "no checkpoint in %s: starting", self.checkpoints
        )
        return path

    def _export(self, untrained: dict[Side, dict[str, Tower]]) -> None:
        best = self.trainer.checkpoint_callback
        assert isinstance(best, ModelCheckpoint)
        if not best.best_model_path:
            logger.warning(
                "No validation was run, so no best model is known: exporting the last weights."
            )
        else:
            state = torch.load(best.best_model_path, weights_only=True, map_location="cpu")[
                "state_dict"
            ]
            self.model.load_state_dict(state)
        if self.trainer.is_global_zero:
            if best.best_model_score is None:
                meta = {}
            else:
                meta = {str(best.monitor): float(best.best_model_score)}
            save_model(
                self.model,
                self.run_folder / "model",
                untrained=untrained,
                meta=meta,
                overwrite=True,
            )
            logger.info("exported the best model to %s", self.run_folder / "model")


def show_figures(figures: dict[str, float]) -> None:
    """A table of figures by name."""
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)


def newest_valid_checkpoint(paths: list[Path]) -> Path | None:
    """The checkpoint with the most steps that can be read; damaged ones are named and skipped.

    Raises:
        ValueError: there are checkpoints, but none can be read.
    """
    steps: dict[Path, int] = {}
    for path in paths:
        try:
            with zipfile.ZipFile(path) as file:  # torch writes digests, and never compares them
                if damaged := file.testzip():
                    raise ValueError(f"{damaged} is damaged")
            steps[path] = int(
                torch.load(path, weights_only=True, map_location="cpu", mmap=True)["global_step"]
            )
        except Exception as error:  # a torn file raises whatever its first wrong byte leads to
            logger.warning(
                "skipped %s: it cannot be read (%s)",
                path,
                str(error).splitlines()[0] if str(error) else error,
            )
    if paths and not steps:
        raise ValueError(f"None of the checkpoints can be read: {', '.join(map(str, paths))}.")
    # Of one step, the checkpoint after its validation goes before the one within an epoch.
    return max(
        steps,
        key=lambda path: (steps[path], not path.name.startswith("within"), path.name),
        default=None,
    )


def main(args: list[str] | None = None) -> int:
    """Entry point of `tritower-train`; returns the exit code."""
    return TrainingCLI.launch(args)
