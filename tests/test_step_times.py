"""Where the time of a step goes."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from tests.support.training import TEXT_ONLY, fit, logged
from tritower.datamodules.examples import TrainingBatches
from tritower.towers.step_times import PARTS, StepTimes
from tritower.towers.two_tower import TwoTower

ARGUMENTS = (
    *TEXT_ONLY,
    "--trainer.max_epochs=2",
    "--trainer.log_every_n_steps=1",
    "--step_times.steps=3",
)


def slowed(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, seconds: float) -> None:
    """Let a method take longer."""
    plain = getattr(owner, name)

    def slow(*args, **kwargs):
        time.sleep(seconds)
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, slow)


@pytest.mark.parametrize(
    ("owner", "name", "part"),
    [(TrainingBatches, "__getitem__", "data"), (TwoTower, "training_step", "forward")],
)
def test_time_is_told_where_it_is_spent_and_slow_data_is_named(
    tiny_catalogue: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    owner: type,
    name: str,
    part: str,
) -> None:
    slowed(monkeypatch, owner, name, 0.2)
    with caplog.at_level(logging.WARNING):
        assert fit(tiny_catalogue, tmp_path / "run", *ARGUMENTS) == 0
    seconds = {p: logged(tmp_path / "run", f"train/seconds_{p}") for p in PARTS}
    assert all(len(values) == 10 for values in seconds.values())
    assert all(value >= 0.2 for value in seconds[part])
    assert all(value < 0.2 for p, values in seconds.items() if p != part for value in values[1:])
    assert any("waits for data" in message for message in caplog.messages) == (part == "data")


@pytest.mark.parametrize("settings", [{"warn_above": 0.0}, {"steps": 0}])
def test_impossible_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="choose a share above 0"):
        StepTimes(**settings)
