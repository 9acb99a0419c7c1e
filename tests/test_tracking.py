"""Weights & Biases: works without a network, and never stops a training."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger

from tests.support.training import TEXT_ONLY, fit, logged
from tritower.towers.tracking import PatientWandbLogger, wandb_logger

FAST = (*TEXT_ONLY, "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1")


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, no settings of the user, and a run that is finished after the test."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))


@pytest.fixture(autouse=True)
def finished() -> Any:
    yield
    wandb.finish()


def test_offline_needs_no_network_and_no_key(tiny_catalogue: Path, tmp_path: Path) -> None:
    started = time.perf_counter()
    assert fit(tiny_catalogue, tmp_path / "plain", *FAST) == 0
    plain = time.perf_counter() - started
    started = time.perf_counter()
    assert fit(tiny_catalogue, tmp_path / "run", *FAST, "--wandb=offline") == 0
    tracked = time.perf_counter() - started
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert logged(tmp_path / "run", "train/loss") == logged(tmp_path / "plain", "train/loss")
    assert tracked - plain < 20  # seconds; 1 to 3 on a free machine


def test_online_without_a_key_becomes_offline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="tritower.towers.tracking"):
        [logger] = wandb_logger(tmp_path / "run", "tritower", offline=False)
    assert "Weights & Biases cannot start online: " in caplog.text
    assert logger.experiment.offline
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_online_without_a_network_becomes_offline_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setattr("tritower.towers.tracking.INIT_TIMEOUT_S", 2)
    started = time.perf_counter()
    with caplog.at_level(logging.WARNING, logger="tritower.towers.tracking"):
        [logger] = wandb_logger(tmp_path / "run", "tritower", offline=False)
    assert time.perf_counter() - started < 25
    assert "cannot start online" in caplog.text
    assert logger.experiment.offline


def test_where_nothing_starts_there_is_no_logger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(OSError("disk full")))
    with caplog.at_level(logging.WARNING, logger="tritower.towers.tracking"):
        assert wandb_logger(tmp_path / "run", "tritower", offline=True) == []
    assert "Weights & Biases cannot start offline: disk full" in caplog.text


def test_a_tracker_that_fails_never_stops_training(
    tiny_catalogue: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = []

    def fail(self: WandbLogger, *_: Any, **__: Any) -> None:
        calls.append(self)
        raise ConnectionError("stalled")

    for name in ("log_metrics", "log_hyperparams", "after_save_checkpoint", "finalize"):
        monkeypatch.setattr(WandbLogger, name, fail, raising=False)
    with caplog.at_level(logging.WARNING, logger="tritower.towers.tracking"):
        assert fit(tiny_catalogue, tmp_path / "run", *FAST, "--wandb=offline") == 0
    assert len(calls) == 1
    assert [r.getMessage() for r in caplog.records if "failed" in r.getMessage()] == [
        "Weights & Biases failed (stalled): training goes on, its log is in the run's folder."
    ]
    assert len(logged(tmp_path / "run", "train/loss")) == 10


def test_a_tracker_that_works_gets_the_figures(
    tiny_catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}
    original = PatientWandbLogger.log_metrics

    def spy(self: PatientWandbLogger, metrics: dict[str, float], step: int | None = None) -> None:
        for name in metrics:
            seen[name] = seen.get(name, 0) + 1
        original(self, metrics, step)

    monkeypatch.setattr(PatientWandbLogger, "log_metrics", spy)
    assert fit(tiny_catalogue, tmp_path / "run", *FAST, "--wandb=offline") == 0
    assert seen["train/loss"] == 10 and seen["val/hit@10"] == 2
