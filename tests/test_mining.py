"""Hard negatives: which neighbors are taken, and that training sees them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.training import TEXT_ONLY, diary, entries, fit
from tritower.datamodules.batch import NO_KEY
from tritower.datamodules.catalogue import Table
from tritower.datamodules.example_rows import is_split
from tritower.datamodules.negatives import Negatives
from tritower.datamodules.preprocess import stable_hash
from tritower.towers.mining import HardNegatives

KEYS = np.array([[0, 7], [1, 7], [2, NO_KEY], [3, NO_KEY], [4, 8], [5, NO_KEY]])
"""Six products: an id and a group; 0 and 1 are of one group."""

MINED = (
    "--hard_negatives.every_n_epochs=1",
    "--hard_negatives.first_rank=1",
    "--hard_negatives.max_similarity=1.1",
)


def choose(neighbors: list[int], scores: list[float], **settings: float) -> tuple[list[int], int]:
    """What product 0 is given."""
    miner = HardNegatives(1, **{"first_rank": 1, "last_rank": 5, "max_similarity": 1.0, **settings})
    rows, is_suspected = miner.choose(
        np.array([0]), np.array([neighbors]), np.array([scores], np.float32), KEYS
    )
    return rows[0].tolist(), is_suspected


def test_the_product_itself_and_its_mates_are_no_negatives() -> None:
    assert choose([0, 2, 1, 3], [1.0, 0.9, 0.9, 0.8]) == ([2, 3, -1], 0)


def test_candidates_as_near_as_the_farthest_mate_are_suspected() -> None:
    assert choose([0, 2, 1, 3, 4], [1.0, 0.95, 0.9, 0.8, 0.7]) == ([3, 4, -1, -1], 1)
    assert choose([0, 2, 1, 3, 4], [1.0, 0.95, 0.9, 0.8, 0.7], max_similarity=0.85) == (
        [4, -1, -1, -1],
        2,
    )


def test_without_mates_a_candidate_may_be_no_copy_of_the_product() -> None:
    assert choose([2, 0, 3], [0.99, 1.0, 0.5], max_similarity=0.95) == ([3, -1], 1)


def test_ranks_count_neighbors_that_are_no_mates() -> None:
    neighbors, scores = [0, 1, 2, 3, 4, 5], [1.0, 0.9, 0.6, 0.5, 0.4, 0.3]
    assert choose(neighbors, scores, first_rank=2, last_rank=3) == ([3, 4, -1, -1, -1], 0)


def test_neighbors_that_were_not_found_are_none() -> None:
    assert choose([0, 2, -1], [1.0, 0.5, -np.inf]) == ([2, -1], 0)


def test_nothing_related_is_a_negative_unless_told() -> None:
    assert HardNegatives(1).related == ["product", "group", "family", "title", "picture"]


def test_mined_and_random_negatives_in_their_shares(tmp_path: Path) -> None:
    np.save(tmp_path / "mined.npy", np.array([[3, 4, -1], [-1, -1, -1]], np.int32))
    others, rng = np.array([8, 9]), np.random.default_rng(0)

    def drawn(row: int, share: float) -> set[int]:
        return set(Negatives(tmp_path / "mined.npy", 100, share).draw(row, rng, others).tolist())

    assert drawn(0, 1.0) == {3, 4}
    assert drawn(0, 0.0) == {8, 9}
    assert drawn(0, 0.5) == {3, 4, 8, 9}
    assert drawn(1, 1.0) == {8, 9}


def test_batches_hold_what_was_mined_and_nothing_of_another_split(
    cut_catalogue: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = (*TEXT_ONLY, "--trainer.max_epochs=3", "--early_stopping.patience=3", *MINED)
    assert (
        fit(
            cut_catalogue, run, *arguments, "--hard_negatives.per_example=2", *diary(tmp_path / "d")
        )
        == 0
    )
    steps = entries(tmp_path / "d")
    assert {(s["epoch"], len(s["products"]) / len(s["queries"])) for s in steps} == {
        (0, 1.0),
        (1, 3.0),
        (2, 3.0),
    }
    assert sorted(file.name for file in (run / "negatives").iterdir()) == [
        "epoch-00001.npy",
        "epoch-00002.npy",
    ]
    table = np.load(run / "negatives" / "epoch-00002.npy")
    assert (table >= 0).any()
    assert (table != np.arange(len(table))[:, None]).all()
    products = Table(cut_catalogue / "products")
    of_train = is_split(products, "train")
    assert of_train[np.unique(table[table >= 0])].all() and (table[~of_train] == -1).all()
    train_keys = {
        stable_hash(name) for name in np.array(products.column("product_id").to_pylist())[of_train]
    }
    assert all(set(step["products"]) <= train_keys for step in steps)


def test_a_resumed_run_has_the_same_negatives(tiny_catalogue: Path, tmp_path: Path) -> None:
    arguments = (*TEXT_ONLY, "--trainer.max_epochs=3", "--early_stopping.patience=3", *MINED)
    assert fit(tiny_catalogue, tmp_path / "whole", *arguments, *diary(tmp_path / "d")) == 0
    whole = entries(tmp_path / "d")
    for step, every in ((6, None), (7, "1"), (12, None), (10, "5")):
        run, saved = (
            tmp_path / f"run{step}",
            () if every is None else (f"--checkpoint_every_steps={every}",),
        )
        with pytest.raises(RuntimeError, match="stopped for a test"):
            fit(tiny_catalogue, run, *arguments, *saved, *diary(tmp_path / f"{step}", fail_at=step))
        (tmp_path / f"{step}").unlink()
        assert (
            fit(
                tiny_catalogue,
                run,
                *arguments,
                *saved,
                "--resume=true",
                *diary(tmp_path / f"{step}"),
            )
            == 0
        )
        again = entries(tmp_path / f"{step}")
        assert again == whole[len(whole) - len(again) :]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_epochs": -1}, "every_n_epochs=-1"),
        ({"per_example": 0}, "per_example=0"),
        ({"first_rank": 9, "last_rank": 3}, "first_rank=9, last_rank=3"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HardNegatives(**settings)
