"""A run that was killed and resumed equals one that was not.

Losses, learning rates, order of the examples.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.training import (
    TEXT_ONLY,
    diary,
    entries,
    fit,
    fit_arguments,
    logged,
    run_program,
)
from tritower.artefacts.storage import read_manifest
from tritower.towers import cli as train
from tritower.towers.checkpoints import newest_valid_checkpoint

ARGUMENTS = (
    *TEXT_ONLY,
    "--trainer.max_epochs=3",
    "--early_stopping.patience=3",
)  # 5 steps per epoch


@pytest.fixture(scope="module")
def uninterrupted(tiny_catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 15 steps; its diary is beside it."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert fit(tiny_catalogue, run, *ARGUMENTS, *diary(run.with_suffix(".jsonl"))) == 0
    return run


@pytest.fixture
def whole(uninterrupted: Path) -> list[dict[str, Any]]:
    return entries(uninterrupted.with_suffix(".jsonl"))


def stopped(catalogue: Path, run: Path, step: int, *arguments: str) -> list[dict[str, Any]]:
    """A run that an exception ends after this step; returns its diary."""
    path = run.with_suffix(".jsonl")
    with pytest.raises(RuntimeError, match="stopped for a test"):
        fit(catalogue, run, *ARGUMENTS, *arguments, *diary(path, fail_at=step))
    found = entries(path)
    path.unlink()
    return found


def resume(catalogue: Path, run: Path, *arguments: str) -> list[dict[str, Any]]:
    path = run.with_suffix(".jsonl")
    assert fit(catalogue, run, *ARGUMENTS, "--resume=true", *arguments, *diary(path)) == 0
    return entries(path)


def test_every_example_comes_once_per_epoch(whole: list[dict[str, Any]]) -> None:
    assert [entry["epoch"] for entry in whole] == [0] * 5 + [1] * 5 + [2] * 5
    orders = [
        [key for entry in whole[5 * e : 5 * e + 5] for key in entry["products"]] for e in range(3)
    ]
    assert len({tuple(order) for order in orders}) == 3
    counts = [
        {key: order[:152].count(key) for key in set(order[:152])} for order in orders
    ]  # the rest is the fill
    assert counts[0] == counts[1] == counts[2]


def test_a_run_killed_within_an_epoch_goes_on_where_it_was(
    tiny_catalogue: Path, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    run, path = tmp_path / "run", tmp_path / "killed.jsonl"
    killed = run_program(
        "train.py",
        *fit_arguments(
            tiny_catalogue, run, *ARGUMENTS, "--checkpoint_every_steps=3", *diary(path, kill_at=8)
        ),
    )
    assert killed.returncode == -signal.SIGKILL, killed.stdout
    assert entries(path) == whole[:8]
    assert resume(tiny_catalogue, run, "--checkpoint_every_steps=3") == whole[6:]


@pytest.mark.parametrize(
    ("every", "step", "first"),
    [
        (1, 3, 2),  # within the first epoch, before anything was validated
        (1, 6, 4),  # after an epoch whose last step is saved with its validation
        (4, 10, 8),  # at the end of an epoch
        (None, 9, 5),  # saved at validations alone
    ],
)
def test_a_run_that_failed_anywhere_goes_on_where_it_was(
    tiny_catalogue: Path,
    whole: list[dict[str, Any]],
    tmp_path: Path,
    every: int | None,
    step: int,
    first: int,
) -> None:
    arguments = [] if every is None else [f"--checkpoint_every_steps={every}"]
    assert stopped(tiny_catalogue, tmp_path / "run", step, *arguments) == whole[:step]
    resumed = resume(tiny_catalogue, tmp_path / "run", *arguments)
    first = resumed[0]["step"] - 1 if every == 1 else first
    assert resumed == whole[first:]
    assert first < step


@pytest.mark.parametrize(
    ("every", "saved"),
    [
        (5, set()),
        (4, {"within-step=8", "within-step=12"}),
        (1, {"within-step=11", "within-step=12"}),
    ],
)
def test_nothing_is_saved_between_an_epoch_and_its_validation(
    tiny_catalogue: Path, tmp_path: Path, every: int, saved: set[str]
) -> None:
    """A run that went on from there would not know how good that epoch was."""
    stopped(tiny_catalogue, tmp_path / "run", 13, f"--checkpoint_every_steps={every}")
    there = {path.stem for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert there == {"best", "last-step=5", "last-step=10"} | saved


def test_a_run_of_so_many_steps_goes_on_after_an_epoch(
    tiny_catalogue: Path, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    steps = "--trainer.max_steps=15"
    assert stopped(tiny_catalogue, tmp_path / "run", 12, steps) == whole[:12]
    assert resume(tiny_catalogue, tmp_path / "run", steps) == whole[10:]
    assert len(logged(tmp_path / "run", "val/hit@10")) == 1


@pytest.mark.parametrize("negatives", ["CrossBatchMemory", "SogCLRNormalizer"])
def test_what_a_loss_remembers_goes_on(
    tiny_catalogue: Path, tmp_path: Path, negatives: str
) -> None:
    key = "--model.loss.init_args.negatives"
    settings: tuple[str, ...] = ()
    if negatives == "CrossBatchMemory":
        settings = (f"{key}.init_args.warmup=2", f"{key}.init_args.size=40")
    loss = ("--model.loss=InfoNCE", f"{key}={negatives}")
    arguments = (*loss, *settings, "--checkpoint_every_steps=4")
    path = tmp_path / "whole.jsonl"
    assert fit(tiny_catalogue, tmp_path / "whole", *ARGUMENTS, *arguments, *diary(path)) == 0
    whole = entries(path)
    assert stopped(tiny_catalogue, tmp_path / "run", 7, *arguments) == whole[:7]
    assert resume(tiny_catalogue, tmp_path / "run", *arguments) == whole[5:]


def test_a_resumed_run_exports_the_same_model(
    tiny_catalogue: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    stopped(tiny_catalogue, tmp_path / "run", 9)
    resume(tiny_catalogue, tmp_path / "run")
    one, other = (
        folder / "model" / "model.safetensors" for folder in (uninterrupted, tmp_path / "run")
    )
    assert one.read_bytes() == other.read_bytes()
    assert logged(tmp_path / "run", "val/hit@10") == logged(uninterrupted, "val/hit@10")[1:]


def test_the_patience_of_early_stopping_is_remembered(tiny_catalogue: Path, tmp_path: Path) -> None:
    """Nothing is ever better by 2: the run ends after the first epoch and three more."""
    arguments = ("--early_stopping.min_delta=2", "--trainer.max_epochs=9")
    stopped(tiny_catalogue, tmp_path / "run", 13, *arguments)
    resumed = resume(tiny_catalogue, tmp_path / "run", *arguments)
    assert [resumed[0]["step"], resumed[-1]["step"]] == [11, 20]


def test_a_finished_run_is_resumed_to_nothing(
    tiny_catalogue: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    before = (run / "model" / "model.safetensors").read_bytes()
    assert fit(tiny_catalogue, run, *ARGUMENTS, "--resume=true") == 0
    assert (run / "model" / "model.safetensors").read_bytes() == before


def test_a_moved_run_is_resumed(
    tiny_catalogue: Path, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    """It knows its best model still; the lowest score is asked for, since that comes first."""
    run, lowest = tmp_path / "moved", ("--checkpoint.mode=min", "--checkpoint.monitor=val/ndcg@10")
    stopped(tiny_catalogue, tmp_path / "run", 14, *lowest)
    before = logged(tmp_path / "run", "val/ndcg@10")
    (tmp_path / "run").rename(run)
    assert resume(tiny_catalogue, run, *lowest) == whole[10:]
    after = logged(run, "val/ndcg@10")
    assert (len(before), len(after)) == (2, 1)
    assert read_manifest(run / "model").meta["val/ndcg@10"] == pytest.approx(min(before + after))
    assert min(before) < after[0]


# ---------------------------------------------------------------- what is refused or skipped


def test_a_second_run_into_a_folder_is_refused(
    tiny_catalogue: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(uninterrupted.rglob("*"))
    assert fit(tiny_catalogue, uninterrupted, *ARGUMENTS) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {uninterrupted} holds a run already (")
    assert error.endswith("Go on with --resume true, or choose another folder with --run.")
    assert [path for path in sorted(uninterrupted.rglob("*")) if "logs" not in path.parts] == [
        path for path in before if "logs" not in path.parts
    ]


def test_another_number_of_steps_needs_to_be_said(
    tiny_catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped(tiny_catalogue, tmp_path / "run", 9)
    longer = (*ARGUMENTS, "--resume=true", "--trainer.max_epochs=4")
    assert fit(tiny_catalogue, tmp_path / "run", *longer) == 1
    assert "planned for 15 steps and would now have 20" in capsys.readouterr().err.splitlines()[-1]
    path = tmp_path / "run.jsonl"
    assert fit(tiny_catalogue, tmp_path / "run", *longer, "--replan=true", *diary(path)) == 0
    assert [entry["step"] for entry in entries(path)] == list(range(6, 21))


def test_a_torn_checkpoint_is_skipped_by_name(
    tiny_catalogue: Path,
    whole: list[dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    arguments = (
        "--checkpoint_every_steps=3",
        "--checkpoint.mode=min",
    )  # the best is the first one, and older
    stopped(tiny_catalogue, tmp_path / "run", 12, *arguments)
    saved = (tmp_path / "run" / "checkpoints").glob("*-*.ckpt")
    *others, newest = sorted(saved, key=lambda path: int(path.stem.split("=")[1]))
    assert [path.name for path in others] == [
        "last-step=5.ckpt",
        "within-step=6.ckpt",
        "within-step=9.ckpt",
    ]
    assert newest.name == "last-step=10.ckpt"  # step 12 fails before it is saved
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    with caplog.at_level(logging.INFO, logger="tritower.towers.checkpoints"):
        resumed = resume(tiny_catalogue, tmp_path / "run", *arguments)
    assert f"skipped {newest}: it cannot be read (" in caplog.text
    assert resumed == whole[9:]


@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "text", "missing key"])
def test_the_newest_checkpoint_that_can_be_read_is_taken(
    uninterrupted: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("last-step=10.ckpt", "last-step=15.ckpt"):
        shutil.copy(uninterrupted / "checkpoints" / name, tmp_path)
    bad = tmp_path / "last-step=15.ckpt"
    data = bytearray(bad.read_bytes())
    middle = len(data) // 2
    data[middle] ^= 1
    if damage == "missing key":
        torch.save({"state_dict": {}}, bad)
    else:
        contents = {"cut": data[:-200], "empty": b"", "flip": data, "text": b"<html>404</html>"}
        bad.write_bytes(contents[damage])
    with caplog.at_level(logging.WARNING, logger="tritower.towers.checkpoints"):
        found = newest_valid_checkpoint(sorted(tmp_path.glob("*.ckpt")))
    assert found == tmp_path / "last-step=10.ckpt"
    assert f"skipped {bad}" in caplog.text


def test_steps_are_compared_as_numbers(uninterrupted: Path, tmp_path: Path) -> None:
    for step in (5, 10):
        torch.save({"global_step": step}, tmp_path / f"last-step={step}.ckpt")
    assert (
        newest_valid_checkpoint(sorted(tmp_path.glob("*.ckpt"))) == tmp_path / "last-step=10.ckpt"
    )
    torch.save({"global_step": 10}, tmp_path / "within-step=10.ckpt")
    assert (
        newest_valid_checkpoint(sorted(tmp_path.glob("*.ckpt"))) == tmp_path / "last-step=10.ckpt"
    )
    assert newest_valid_checkpoint([]) is None


def test_with_no_readable_checkpoint_nothing_starts_from_scratch(
    tiny_catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last-step=3.ckpt").write_bytes(b"")
    assert fit(tiny_catalogue, tmp_path / "run", *ARGUMENTS, "--resume=true") == 1
    assert "error: None of the checkpoints can be read:" in capsys.readouterr().err


class Marker:
    """Loading this runs code: it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("by", ["torch.save", "pickle"])
def test_code_in_a_checkpoint_is_never_run(
    tiny_catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "last-step=3.ckpt"
    checkpoint.parent.mkdir(parents=True)
    content = {"global_step": 3, "state_dict": {}, "hyper_parameters": Marker(tmp_path / "marker")}
    if by == "pickle":
        checkpoint.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, checkpoint)
    config = fit_arguments(tiny_catalogue, tmp_path / "run", *TEXT_ONLY)[1:]
    assert train.main(["fit", *config, "--resume=true"]) == 1
    for command in ("validate", "test"):
        assert train.main([command, *config, f"--ckpt_path={checkpoint}"]) == 1
    assert not (tmp_path / "marker").exists()
    assert "Traceback" not in capsys.readouterr().err
    torch.load(checkpoint, weights_only=False) if by == "torch.save" else pickle.loads(
        checkpoint.read_bytes()
    )
    assert (tmp_path / "marker").exists()  # the trap itself works


def test_a_class_named_in_a_checkpoint_is_never_imported(
    tiny_catalogue: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text(
        f"import os; os.mkdir({str(tmp_path / 'marker')!r})", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    content = torch.load(uninterrupted / "checkpoints" / "best.ckpt", weights_only=True)
    content["hyper_parameters"] = {
        "_class_path": "evil.Model",
        "product": {"text": {"class_path": "evil.Text"}},
    }
    content["hparams_name"] = "kwargs"
    torch.save(content, tmp_path / "best.ckpt")
    config = fit_arguments(tiny_catalogue, tmp_path / "run", *TEXT_ONLY)[1:]
    assert train.main(["validate", *config, f"--ckpt_path={tmp_path / 'best.ckpt'}"]) == 0
    assert not (tmp_path / "marker").exists()
