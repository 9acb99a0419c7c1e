"""The command line of training: configuration, a folder per run, logs, resuming, export."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import torch
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
from tritower.towers.automatic import with_recipe
from tritower.towers.block_weights import choose_between_start_and_end
from tritower.towers.checkpoints import (
    RunCheckpoint,
    check_monitor,
    checkpoint_to_resume,
    last_checkpoints,
    newest_valid_checkpoint,
)
from tritower.towers.floor import CompareOptions, floor_report
from tritower.towers.losses.contrastive import Loss
from tritower.towers.losses.cross_batch_memory import CrossBatchMemory
from tritower.towers.losses.info_nce import InfoNCE
from tritower.towers.losses.pairs import CoSENT, PairLoss
from tritower.towers.losses.sigmoid import SigmoidLoss
from tritower.towers.losses.sogclr import SogCLRNormalizer
from tritower.towers.mining import HardNegatives
from tritower.towers.model_folder import save_model
from tritower.towers.quiet import quiet_lightning
from tritower.towers.run_options import DEFAULTS, RunOptions
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

USER_ERRORS = (
    OSError,
    ValueError,
    ArtefactError,
    FloatingPointError,
    ImportError,
    MisconfigurationException,
)
"""Errors that are shown in one line, without a traceback."""


class TrainingCLI(LightningCLI):
    """`fit`, `validate` and `test` of a TwoTower on a ProductDataModule."""

    @classmethod
    def launch(cls, args: list[str] | None = None) -> int:
        """Run a command; returns the exit code."""
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        quiet_lightning()
        try:
            if args is None:
                # Into sys.argv, where the processes of other devices find them, too.
                sys.argv[1:] = configs.resolve(with_recipe(sys.argv[1:]))
            else:
                args = configs.resolve(with_recipe(args))
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
        # Lightning's command line, with the defaults of this project.
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
        """Options of the run and of its callbacks."""
        parser.add_class_arguments(RunOptions, instantiate=False)
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(HardNegatives, "hard_negatives")
        parser.add_lightning_class_args(StepTimes, "step_times")
        parser.set_defaults(DEFAULTS)

    @property
    def options(self) -> RunOptions:
        """Options of the run."""
        values = {f.name: self._get(self.config_init, f.name) for f in fields(RunOptions)}
        return RunOptions(**values)

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.options.run / "checkpoints"

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """A trainer that writes into the run's folder."""
        options = self.options
        loggers: list[Logger] = [CSVLogger(options.run, name="logs")]
        if options.wandb != "off":
            loggers += wandb_logger(
                options.run, options.wandb_project, offline=options.wandb == "offline"
            )
        config = self.config[self.subcommand]
        for name in ("early_stopping", "checkpoint"):
            check_monitor(name, config[name].monitor, config.trainer.limit_val_batches != 0)
        trainer = super().instantiate_trainer(
            logger=loggers, default_root_dir=options.run, **kwargs
        )
        best = trainer.checkpoint_callback
        assert isinstance(best, ModelCheckpoint)
        best.dirpath = str(self.checkpoints.resolve())
        # Behind the best one: the first is `trainer.checkpoint_callback`.
        trainer.callbacks += last_checkpoints(
            self.checkpoints.resolve(), options.checkpoint_every_steps
        )
        trainer.callbacks.insert(0, LearningRateMonitor("step"))
        return trainer

    def fit(self, **kwargs: Any) -> None:
        """Train, export the best model, compare it with the floor, and measure it if asked."""
        options = self.options
        path = checkpoint_to_resume(options.run, self.checkpoints, options.resume)
        self.model.replan = options.replan
        # Under max_steps, Lightning would take a finished epoch for an unfinished one when it
        # resumes, and skip its validation.
        self.trainer.fit_loop._iteration_based_training = lambda: False
        untrained = _untrained_towers(self.model)
        self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=path, weights_only=True)
        export_best_model(self.trainer, self.model, options.run / "model", untrained)
        if options.floor and self.trainer.limit_val_batches != 0 and self.trainer.is_global_zero:
            self._show_floor(untrained)
        if options.then_test:
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
            figures = {}
            for name, value in self.trainer.callback_metrics.items():
                if name.startswith("test/"):
                    figures[name] = float(value)
            write_json(options.run / "test.json", figures)
            show_figures(figures)

    def _show_floor(self, untrained: dict[Side, dict[str, Tower]]) -> None:
        """Write floor.json and show the model beside the best untrained search."""
        options = CompareOptions(self.datamodule.val_split)
        report = floor_report(self.model, self.datamodule, options, untrained)
        write_json(self.options.run / "floor.json", report)
        Console(width=max(TABLE_WIDTH, Console().width)).print(terminal_table(report))
        for line in below_floor(report):
            logger.warning("%s", line)

    def validate(self, **kwargs: Any) -> None:
        """Held-out queries of the validation split, by the best checkpoint or `--ckpt_path`."""
        path = self._checkpoint_to_measure(kwargs)
        self.trainer.validate(**{**kwargs, "ckpt_path": path}, weights_only=True)

    def test(self, **kwargs: Any) -> None:
        """Held-out queries of the test split, by the run's best checkpoint or `--ckpt_path`."""
        path = self._checkpoint_to_measure(kwargs)
        self.trainer.test(**{**kwargs, "ckpt_path": path}, weights_only=True)

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


def export_best_model(
    trainer: L.Trainer, model: TwoTower, folder: Path, untrained: dict[Side, dict[str, Tower]]
) -> None:
    """Write the model folder with the weights of the best checkpoint.

    Args:
        trainer: after fit.
        model: takes the best weights.
        folder: the model folder.
        untrained: pretrained towers of each side before training.
    """
    best = trainer.checkpoint_callback
    assert isinstance(best, ModelCheckpoint)
    # Weights of the best checkpoint; every process loads them, one writes the folder.
    if best.best_model_path:
        checkpoint = torch.load(best.best_model_path, weights_only=True, map_location="cpu")
        model.load_state_dict(checkpoint["state_dict"])
        model.start_state = checkpoint.get("start_state", {})
    else:
        logger.warning(
            "No validation was run, so no best model is known: exporting the last weights."
        )
    if not trainer.is_global_zero:
        return
    if model.start_state:
        figures = choose_between_start_and_end(model, model.data, model.start_state)
        write_json(folder.parent / "blocks.json", figures)
    meta = {}
    if best.best_model_score is not None:
        meta[str(best.monitor)] = float(best.best_model_score)
    save_model(model, folder, untrained=untrained, meta=meta, overwrite=True)
    logger.info("exported the best model to %s", folder)


def _untrained_towers(model: TwoTower) -> dict[Side, dict[str, Tower]]:
    """The pretrained towers of each side as they are before training."""
    product = untrained_towers(model.product)
    query = product
    if model.own_query is not None:
        query = untrained_towers(model.own_query)
    return {"product": product, "query": query}


def show_figures(figures: dict[str, float]) -> None:
    """Print a table of figures by name."""
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)


def main(args: list[str] | None = None) -> int:
    """Entry point of `tritower-train`; returns the exit code."""
    return TrainingCLI.launch(args)
