"""Two processes train, validate and embed as one does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.read_embeddings import read
from tests.support.tiny_models import write_bert
from tests.support.training import fit, fit_arguments, logged, run_program
from tritower.towers.embed import embed
from tritower.towers.embedding_shards import EmbedOptions

NO_DROPOUT = (
    "--model.product.text.init_args.dropout=0",
    "--model.product.attribute.init_args.dropout=0",
)


def test_a_training_of_two_processes_equals_one(tiny_catalogue: Path, tmp_path: Path) -> None:
    """Few rows for each process, so that often one has no picture.

    And fewer held-out queries than fill a batch.
    """
    arguments = (
        *NO_DROPOUT,
        "--data.batch_size=4",
        "--data.views.modality_dropout=0.5",
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=8",
        "--trainer.log_every_n_steps=1",
    )
    assert fit(tiny_catalogue, tmp_path / "one", *arguments) == 0
    distributed = fit_arguments(
        tiny_catalogue,
        tmp_path / "two",
        *arguments,
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
    )
    two = run_program("train.py", *distributed)
    assert two.returncode == 0, two.stdout
    alone, together = (logged(tmp_path / run, "train/loss") for run in ("one", "two"))
    assert len(alone) == 8
    assert together == pytest.approx(alone, abs=2e-6)
    for metric in ("val/hit@1", "val/hit@10", "val/recall@10", "val/mrr@10"):
        assert logged(tmp_path / "two", metric) == pytest.approx(
            logged(tmp_path / "one", metric), abs=1e-12
        )
    assert (tmp_path / "two" / "model" / "manifest.json").is_file()


def test_two_processes_mine_and_cache_as_one_does(tiny_catalogue: Path, tmp_path: Path) -> None:
    """Each process makes some of the frozen text tower's features.

    And some of the embeddings that are mined.
    """
    arguments = (
        *NO_DROPOUT,
        "--model.product.image=null",
        "--model.product.text=HuggingFaceText",
        f"--model.product.text.pretrained={write_bert(tmp_path / 'bert')}",
        "--model.product.text.freeze=true",
        "--data.batch_size=8",
        "--trainer.max_epochs=2",
        "--trainer.limit_train_batches=5",
        "--trainer.log_every_n_steps=1",
        "--hard_negatives.every_n_epochs=1",
        "--hard_negatives.per_example=2",
        "--hard_negatives.ramp=0",
    )
    one = ("--trainer.devices=1", f"--model.encoding.feature_cache={tmp_path / 'cache1'}")
    two = (
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        f"--model.encoding.feature_cache={tmp_path / 'cache2'}",
    )
    assert fit(tiny_catalogue, tmp_path / "one", *arguments, *one) == 0
    distributed = run_program(
        "train.py", *fit_arguments(tiny_catalogue, tmp_path / "two", *arguments, *two)
    )
    assert distributed.returncode == 0, distributed.stdout
    alone, together = (logged(tmp_path / run, "train/loss") for run in ("one", "two"))
    assert len(alone) == 10
    assert together == pytest.approx(alone, abs=2e-5)
    mined = [np.load(tmp_path / run / "negatives" / "epoch-00001.npy") for run in ("one", "two")]
    assert (mined[0] >= 0).any() and (mined[0] == mined[1]).mean() > 0.98  # near-ties may swap
    parts = sorted((tmp_path / "cache2").glob("text-*/digests-*.npy"))
    assert len(parts) == 2
    assert set(np.concatenate([np.load(part) for part in parts])) == set(
        np.load(next((tmp_path / "cache1").glob("text-*/digests-*.npy")))
    )


def test_two_processes_embed_as_one_does(
    tiny_run: Path, tiny_catalogue: Path, tmp_path: Path
) -> None:
    """Each writes shards of its own.

    Of the queries there is one shard, so one process has nothing to do.
    """
    embed(
        tiny_run / "model",
        tiny_catalogue,
        tmp_path / "one",
        options=EmbedOptions(accelerator="cpu", batch_size=16),
    )
    options = (
        "--model",
        str(tiny_run / "model"),
        "--catalogue",
        str(tiny_catalogue),
        "--output",
        str(tmp_path / "two"),
    )
    two = run_program(
        "index.py", "embed", *options, "--accelerator=cpu", "--devices=2", "--batch-size=16"
    )
    assert two.returncode == 0, two.stdout
    for side in ("products", "queries", "tuning"):
        alone, together = (read(tmp_path / run / side) for run in ("one", "two"))
        assert together.keys() == alone.keys()
        np.testing.assert_allclose(
            np.stack(list(together.values())), np.stack(list(alone.values())), atol=1e-3
        )
