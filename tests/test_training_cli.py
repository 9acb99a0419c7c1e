"""The command line of training: what it makes, and how it says what is wrong."""

from __future__ import annotations

import csv
import logging
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.catalogues import write_catalogue
from tests.support.training import CONFIG, ROOT, TEXT_ONLY, fit, fit_arguments, logged
from tritower import configs
from tritower.artefacts.storage import read_manifest
from tritower.towers import cli as train
from tritower.towers.model_folder import load_model

FAST = (*TEXT_ONLY, "--trainer.max_epochs=1")


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of stderr; there is no traceback above it."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


# ---------------------------------------------------------------- what a run leaves


def test_a_run_leaves_checkpoints_a_log_its_configuration_and_a_model(tiny_run: Path) -> None:
    assert {path.name for path in (tiny_run / "checkpoints").iterdir()} == {
        "best.ckpt",
        "last-step=15.ckpt",
        "last-step=20.ckpt",
    }
    assert read_manifest(tiny_run / "model", artefact_type="model").meta["embed_dim"] == 32
    [config] = tiny_run.glob("logs/*/config.yaml")
    assert yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["optimizer"]["lr"] == 3e-3


def test_loss_temperature_shares_and_recall_are_logged(tiny_run: Path) -> None:
    losses = logged(tiny_run, "train/loss")
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    for side in ("query", "product"):
        shares = [
            logged(tiny_run, f"train/{side}_share_{name}")
            for name in ("text", "image", "attribute")
        ]
        assert [sum(row) for row in zip(*shares, strict=True)] == pytest.approx(
            [1.0] * 20, abs=1e-5
        )
    temperatures = logged(tiny_run, "train/temperature")
    assert len(temperatures) == 20 and 0.01 <= min(temperatures) <= max(temperatures) < 1
    for metric in ("val/hit@1", "val/hit@10", "val/recall@10", "val/mrr@10", "val/ndcg@10"):
        assert len(logged(tiny_run, metric)) == 4
    assert logged(tiny_run, "lr-AdamW/pg1") or logged(tiny_run, "lr-AdamW")


def test_checkpoints_hold_plain_data(tiny_run: Path) -> None:
    paths = sorted((tiny_run / "checkpoints").iterdir())
    assert "best.ckpt" in {path.name for path in paths} and len(paths) > 1
    for path in paths:
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["schema"]["text"] == ("title", "description")
        assert "hyper_parameters" not in checkpoint


def test_the_best_model_is_exported_and_not_the_last(tiny_catalogue: Path, tmp_path: Path) -> None:
    """Twelve epochs of a high learning rate.

    The last one is not the best, or no better than an earlier one.
    """
    run = tmp_path / "run"
    assert (
        fit(tiny_catalogue, run, *TEXT_ONLY, "--trainer.max_epochs=6", "--checkpoint.mode=min") == 0
    )
    scores = logged(run, "val/ndcg@10")
    assert read_manifest(run / "model").meta["val/ndcg@10"] == pytest.approx(min(scores))
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == 5 * (1 + scores.index(min(scores)))
    weights = load_model(run / "model").product.state_dict()
    assert all(
        torch.equal(tensor, best["state_dict"][f"product.{name}"])
        for name, tensor in weights.items()
    )


def test_validate_and_test_measure_the_best_checkpoint(
    tiny_run: Path, tiny_catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = fit_arguments(
        tiny_catalogue, tmp_path / "run", f"--ckpt_path={tiny_run / 'checkpoints' / 'best.ckpt'}"
    )
    assert train.main(["validate", *arguments[1:]]) == 0
    assert logged(tmp_path / "run", "val/ndcg@10") == [max(logged(tiny_run, "val/ndcg@10"))]
    assert train.main(["test", *arguments[1:]]) == 0
    assert len(logged(tmp_path / "run", "test/hit@10")) == 1
    assert train.main(["test", *arguments[1:-1]]) == 1
    assert "best.ckpt: no such checkpoint. Name the run" in last_line(capsys)


def test_early_stopping_ends_a_run(tiny_catalogue: Path, tmp_path: Path) -> None:
    arguments = (
        "--trainer.max_epochs=9",
        "--early_stopping.patience=1",
        "--early_stopping.min_delta=2",
    )
    assert fit(tiny_catalogue, tmp_path / "run", *TEXT_ONLY, *arguments) == 0
    assert len(logged(tmp_path / "run", "val/hit@10")) == 2


def test_the_test_split_is_measured_when_asked(tiny_catalogue: Path, tmp_path: Path) -> None:
    assert fit(tiny_catalogue, tmp_path / "run", *FAST, "--then_test=true") == 0
    figures = yaml.safe_load((tmp_path / "run" / "test.json").read_text(encoding="utf-8"))
    assert 0 <= figures["test/hit@1"] <= figures["test/hit@10"] <= 1


@pytest.mark.parametrize("fusion", ["mean", "transformer"])
def test_every_fusion_and_the_sigmoid_loss_train(
    tiny_catalogue: Path, tmp_path: Path, fusion: str
) -> None:
    arguments = (
        f"--model.product.fusion={fusion}",
        "--model.loss=SigmoidLoss",
        "--model.encoding.chunk_size=20",
    )
    assert fit(tiny_catalogue, tmp_path / "run", *arguments, "--trainer.max_epochs=1") == 0
    assert load_model(tmp_path / "run" / "model").product.fusion_name == fusion


def test_compiled_towers_train_to_the_same_model(tiny_catalogue: Path, tmp_path: Path) -> None:
    for name, backend in (("plain", "null"), ("compiled", "eager")):
        arguments = (*FAST, f"--model.encoding.compile_backend={backend}")
        assert fit(tiny_catalogue, tmp_path / name, *arguments) == 0
    assert logged(tmp_path / "plain", "train/loss") == logged(tmp_path / "compiled", "train/loss")
    one, other = (
        load_model(tmp_path / name / "model").state_dict() for name in ("plain", "compiled")
    )
    assert one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def test_mixed_precision_stays_near_full_precision(tiny_catalogue: Path, tmp_path: Path) -> None:
    """All towers, at a temperature whose logits reach 100."""
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        run = tmp_path / precision
        arguments = (
            f"--trainer.precision={precision}",
            "--model.loss=InfoNCE",
            "--model.loss.temperature=0.01",
            "--trainer.log_every_n_steps=1",
        )
        assert fit(tiny_catalogue, run, *arguments, "--trainer.max_epochs=2") == 0
        losses[precision] = np.array(logged(run, "train/loss"))
        assert all(
            tensor.isfinite().all() for tensor in load_model(run / "model").state_dict().values()
        )
    assert np.isfinite(losses["bf16-mixed"]).all()
    np.testing.assert_allclose(losses["bf16-mixed"][:3], losses["32-true"][:3], rtol=0.05)


def test_a_backend_that_is_none_is_refused(
    tiny_catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        train.main(
            fit_arguments(
                tiny_catalogue, tmp_path / "run", "--model.encoding.compile_backend=inducer"
            )
        )
        == 1
    )
    assert "compile_backend='inducer': choose one of" in last_line(capsys)


def test_parts_towers_and_labels_are_compared_in_one_run(
    tiny_catalogue: Path, tmp_path: Path
) -> None:
    compare = (
        "[{}, {query: part, product: whole, weight: 0.5}, {query: image, product: image, weight: "
        "0.1}, "
        "{weight: 0.2, loss: {class_path: CoSENT}}]"
    )
    arguments = (
        f"--model.loss_terms={compare}",
        "--data.examples.types={catalogue: 1, labels: 2}",
        "--trainer.max_epochs=1",
    )
    assert fit(tiny_catalogue, tmp_path / "run", *arguments, "--trainer.log_every_n_steps=1") == 0
    whole, part, image, labels = (
        logged(tmp_path / "run", f"train/loss_{name}")
        for name in ("whole-whole", "part-whole", "image-image", "whole-whole-CoSENT")
    )
    total = logged(tmp_path / "run", "train/loss")
    assert total
    sums = [sum(values) for values in zip(whole, part, image, labels, strict=True)]
    assert total == pytest.approx(sums, rel=1e-5)


def test_a_short_last_batch_and_one_row_of_validation(tiny_catalogue: Path, tmp_path: Path) -> None:
    """152 examples in batches of 151, 12 queries in batches of 11."""
    assert fit(tiny_catalogue, tmp_path / "a", *FAST, "--data.batch_size=151") == 0
    assert (
        fit(
            tiny_catalogue,
            tmp_path / "b",
            *FAST,
            "--data.batch_size=11",
            "--trainer.limit_train_batches=2",
        )
        == 0
    )
    assert (
        len(logged(tmp_path / "a", "val/hit@10")) == len(logged(tmp_path / "b", "val/hit@10")) == 1
    )


# ---------------------------------------------------------------- what is wrong


def test_a_loss_that_is_no_number_stops_the_run_and_names_products(
    tiny_catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        fit(
            tiny_catalogue,
            tmp_path / "run",
            *FAST,
            "--model.optimizer.lr=1e30",
            "--checkpoint_every_steps=1",
        )
        == 1
    )
    error = last_line(capsys)
    assert error.startswith("error: The loss is nan at step 1 (temperature inf, products 0")
    assert "Lower model.optimizer.lr" in error
    saved = list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    assert not any("best" in path.name for path in saved)
    assert not (tmp_path / "run" / "model").exists()


def test_a_model_that_breaks_in_the_last_step_is_not_saved_as_the_best(
    tiny_catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss of the only step is fine, and the weights after it are not."""
    arguments = (
        "--model.optimizer.lr=1e36",
        "--trainer.limit_train_batches=1",
        "--model.optimizer.warmup=0",
    )
    assert fit(tiny_catalogue, tmp_path / "run", *FAST, *arguments) == 1
    error = last_line(capsys)
    assert not (tmp_path / "run" / "model").exists()
    if "The loss is nan at step 1" in error:
        return  # weights overflowed to embeddings of zeros: the next epoch's loss fails
    assert "Embeddings of held-out queries or products are not numbers at step 1" in error
    assert not (tmp_path / "run" / "checkpoints").exists() or not any(
        (tmp_path / "run" / "checkpoints").iterdir()
    )


@pytest.mark.parametrize(
    "abbreviation", ["--model.warm=0.1", "--data.batch=8", "--res=true", "--trainer.max_ep=1"]
)
def test_abbreviations_are_refused(
    tiny_catalogue: Path, tmp_path: Path, abbreviation: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fit(tiny_catalogue, tmp_path / "run", *FAST, abbreviation)
    assert stopped.value.code == 2
    assert last_line(capsys) == f"error: unrecognized arguments: {abbreviation}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.batch_size=many"], "data.batch_size"),
        (["--wandb=maybe"], "wandb"),
        (["--checkpoint_every_steps=0"], "checkpoint_every_steps"),
        (["--model.product.text.hiden_dim=3"], "hiden_dim"),
        (["--model.product.fusion=sum"], "fusion"),
    ],
)
def test_a_wrong_value_names_its_key(
    tiny_catalogue: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fit(tiny_catalogue, tmp_path / "run", *arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error.partition("\nerror: ")[2]
    assert len(error.splitlines()) < 20 and "Traceback" not in error


def test_an_unknown_key_of_a_configuration_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["model"]["learning_rate"] = 1
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        train.main(["fit", "--config", str(tmp_path / "bad.yaml")])
    assert stopped.value.code == 2
    assert "learning_rate" in last_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data.catalogue=nowhere"],
            "error: nowhere is not a prepared catalogue (it has no schema.json).",
        ),
        (
            ["--data.validation.val_split=dev"],
            "error: The dev split has no products and no queries.",
        ),
        (["--model.optimizer.warmup=3"], "error: warmup=3.0 is a share of all steps"),
        (["--model.product.embed_dim=0"], "error: embed_dim=0"),
        (["--model.loss_terms=[]"], "error: loss_terms=[] leaves nothing to learn from"),
        (
            ["--trainer.max_epochs=-1"],
            "error: The learning rate falls over a known number of steps",
        ),
        (
            ["--data.validation.threshold=0"],
            "error: threshold=0.0: products of relevance 0 are not relevant",
        ),
        (
            ["--model.product.text.template={name}"],
            "error: template='{name}' names no text field of the catalogue",
        ),
        pytest.param(
            ["--trainer.accelerator=gpu"],
            "error: No supported gpu backend found!",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_a_wrong_setting_is_one_line(
    tiny_catalogue: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fit(tiny_catalogue, tmp_path / "run", *TEXT_ONLY, *arguments) == 1
    assert last_line(capsys).startswith(message)


def test_queries_that_are_not_there_are_no_way_to_choose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only products ask; or only titles do, and the model reads none."""
    mates = write_catalogue(tmp_path / "mates", num_groups=12, queries=False)
    monitor = "--checkpoint.monitor=val/product_queries/hit@1"
    assert fit(mates, tmp_path / "a", *FAST, monitor) == 1
    assert "all val queries are of one type here" in last_line(capsys)
    pictures = (
        "--model.product.text=null",
        "--model.product.attribute=null",
        "--trainer.max_epochs=1",
    )
    assert fit(mates, tmp_path / "b", *pictures, "--data.examples.positives=none") == 1
    error = last_line(capsys)
    assert "val queries (titles of products) has anything that this model reads (image)" in error


def test_queries_that_a_model_cannot_read_find_nothing_and_are_counted(
    tiny_catalogue: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Typed ones, of a model that reads attributes alone."""
    attributes = (
        "--model.product.text=null",
        "--model.product.image=null",
        "--trainer.max_epochs=1",
    )
    with caplog.at_level(logging.WARNING, logger="tritower.towers.two_tower"):
        assert fit(tiny_catalogue, tmp_path / "run", *attributes) == 0
    [line] = [
        record.getMessage() for record in caplog.records if "find nothing" in record.getMessage()
    ]
    unread, total = (int(word) for word in line.split(" val queries")[0].split(" of "))
    assert 0 < unread < total
    assert logged(tmp_path / "run", "val/hit@10")[0] <= 1 - unread / total


def test_a_checkpoint_of_another_model_is_refused(
    tiny_run: Path, tiny_catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = f"--ckpt_path={tiny_run / 'checkpoints' / 'best.ckpt'}"
    arguments = fit_arguments(
        tiny_catalogue, tmp_path / "run", "--model.product.embed_dim=48", best
    )
    assert train.main(["validate", *arguments[1:]]) == 1
    error = last_line(capsys)
    assert error.startswith(
        "error: The checkpoint is of another model than this configuration makes ("
    )
    assert "logs/version_0/config.yaml" in error


def test_a_run_is_measured_by_the_configuration_that_it_left(
    tiny_run: Path, tmp_path: Path
) -> None:
    """It names everything, as the catalogue that the command line named."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    config = str(run / "logs" / "version_0" / "config.yaml")
    assert train.main(["validate", "--config", config, f"--run={run}"]) == 0
    assert train.main(["fit", "--config", config, f"--run={run}", "--resume=true"]) == 0


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name
)
def test_every_configuration_can_be_read(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is downloaded by reading it, and its first line is the command that runs it."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was tried"))
    assert path.read_text(encoding="utf-8").startswith(
        f"# python train.py fit --config configs/{path.name}"
    )
    with pytest.raises(SystemExit) as stopped:
        train.main(["fit", "--config", str(path), "--print_config"])
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (
        printed["data"]["catalogue"] and printed["model"]["product"]["init_args"]["embed_dim"] >= 8
    )


def test_help_explains_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.main(["fit", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "continue from the run's newest valid checkpoint",
        "learning rate of pretrained towers",
        "whose views may be the query of a product",
        "items that are encoded at once",
    ):
        assert words in text


def test_packaged_configurations_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    packaged = str(configs.FOLDER / "tiny.yaml")
    assert configs.resolve(["fit", "--config", "configs/tiny.yaml"]) == [
        "fit",
        "--config",
        packaged,
    ]
    assert configs.resolve(["fit", "--config=configs/tiny.yaml"]) == ["fit", f"--config={packaged}"]
    assert configs.resolve(["-c", "configs/none.yaml", "--config"]) == [
        "-c",
        "configs/none.yaml",
        "--config",
    ]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.yaml").write_text("seed_everything: 1", encoding="utf-8")
    assert configs.resolve(["--config", "configs/tiny.yaml"]) == ["--config", "configs/tiny.yaml"]


def test_the_log_is_on_disk_while_a_run_goes_on(tiny_catalogue: Path, tmp_path: Path) -> None:
    """A run that is killed leaves the figures so far."""
    from tests.support.training import diary

    with pytest.raises(RuntimeError, match="stopped for a test"):
        fit(
            tiny_catalogue,
            tmp_path / "run",
            *TEXT_ONLY,
            "--trainer.log_every_n_steps=1",
            *diary(tmp_path / "diary", fail_at=18),
        )
    [log] = (tmp_path / "run").glob("logs/*/metrics.csv")
    with log.open(encoding="utf-8") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert max(steps) >= 9


@pytest.mark.parametrize("callback", ["early_stopping", "checkpoint"])
def test_a_figure_that_no_run_has_is_refused_before_it_starts(
    tiny_catalogue: Path, tmp_path: Path, callback: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        train.main(
            fit_arguments(tiny_catalogue, tmp_path / "run", f"--{callback}.monitor=val/hit@11")
        )
        == 1
    )
    assert last_line(capsys).startswith(
        f"error: {callback}.monitor='val/hit@11' is no figure of a run."
    )
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_training_leaves_the_statistics_of_batch_norms_as_they_are(
    tiny_catalogue: Path, tmp_path: Path
) -> None:
    """Lightning takes modules' modes as they are and never calls train().

    A norm must keep them from the start.
    """
    image = "--model.product.image.init_args"
    alone = [
        "--model.product.text=null",
        "--model.product.attribute=null",
        "--trainer.max_epochs=2",
    ]
    arguments = [*alone, f"{image}.model=resnet10t", f"{image}.model_args={{}}"]
    assert fit(tiny_catalogue, tmp_path / "run", *arguments) == 0
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    batches = [
        value.item() for name, value in weights.items() if name.endswith("num_batches_tracked")
    ]
    assert batches and not any(batches)
    assert all(
        (value == 0).all() for name, value in weights.items() if name.endswith("running_mean")
    )


# ---------------------------------------------------------------- weights averaged over steps


def test_averaged_weights_are_validated_exported_and_resumed(
    tiny_catalogue: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    averaging = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.9"]
    two = ["--model.product.image=null", "--trainer.max_epochs=2", *averaging]
    assert fit(tiny_catalogue, run, *two) == 0
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    name = "product.projections.text.weight"
    averaged, current = best["state_dict"][name], best["current_model_state"][name]
    assert not torch.equal(averaged, current)
    assert torch.equal(load_file(run / "model" / "model.safetensors")[name], averaged)
    assert (
        fit(tiny_catalogue, run, *two, "--resume=true", "--trainer.max_epochs=3", "--replan=true")
        == 0
    )
    assert len(logged(run, "val/ndcg@10")) == 1, "goes on after the second epoch"


def test_without_validation_there_is_nothing_to_choose_by(
    tiny_catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tiny_catalogue, tmp_path / "run", *FAST, "--trainer.limit_val_batches=0") == 1
    assert "limit_val_batches=0 asks none: monitor train/loss" in last_line(capsys)
