"""The data module: batches of a prepared catalogue, and its held-out queries."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.catalogues import write_catalogue
from tests.support.data_modules import data_module
from tritower.datamodules.batch import NO_KEY, Batch
from tritower.datamodules.catalogue import Table
from tritower.datamodules.example_rows import is_split
from tritower.datamodules.negatives import Negatives
from tritower.datamodules.preprocess import stable_hash
from tritower.datamodules.products import ProductDataModule, all_items


def flat(batch: Batch) -> list[torch.Tensor]:
    """All tensors of a batch."""
    tensors: list[torch.Tensor] = []
    stack: list[Any] = [batch]
    while stack:
        part = stack.pop()
        if isinstance(part, torch.Tensor):
            tensors.append(part)
        elif isinstance(part, tuple):
            stack += part
    return tensors


def same(one: Batch, other: Batch) -> bool:
    return all(
        torch.equal(a.nan_to_num(-7), b.nan_to_num(-7))
        for a, b in zip(flat(one), flat(other), strict=True)
    )


def test_examples_are_products_and_judgements_of_the_train_split(tiny_catalogue: Path) -> None:
    both = data_module(tiny_catalogue)
    products, pairs = (
        data_module(tiny_catalogue, types=[source]) for source in ("catalogue", "pairs")
    )
    assert len(products.training.rows) == 72
    assert len(pairs.training.rows) > 30
    assert len(both.training.rows) == len(products.training.rows) + len(pairs.training.rows)
    assert set(both.products.row(int(row))["split"] for row in both.training.rows.product) == {
        "train"
    }


def note_rows(table: Table, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The numbers of the rows that are read from a table from now on."""
    noted: set[int] = set()
    read = table.row

    def row(number: int) -> dict[str, Any]:
        noted.add(number)
        return read(number)

    monkeypatch.setattr(table, "row", row)
    return noted


@pytest.mark.parametrize(
    "settings",
    [
        {"types": ["catalogue"], "positives": "group"},
        {"types": ["catalogue"], "positives": "family"},
        {"types": ["catalogue"], "positives": "family", "one_per_group": True},
        {"types": ["pairs"]},
        {"types": ["pairs"], "max_pairs_per_query": 1},
        {"types": ["labels"]},
        {"types": ["generated"]},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_no_product_and_no_query_of_another_split_has_a_part_in_training(
    cut_catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Not as what asks or answers, as a mate.

    As a negative, nor among the judged answers of a batch.
    """
    data = data_module(cut_catalogue, group_share=1.0, **settings)
    of_train = is_split(data.products, "train")
    assert 30 < of_train.sum() < 50
    np.save(
        tmp_path / "none.npy", np.full((len(of_train), 1), -1, np.int32)
    )  # nothing was mined: all are drawn
    data.negatives = Negatives(tmp_path / "none.npy", 2, 1.0)
    read, asked = note_rows(data.products, monkeypatch), note_rows(data.queries, monkeypatch)
    loader = data.train_dataloader()
    batches = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        batches += list(loader)
    assert len(read) > 10 and of_train[sorted(read)].all()
    assert is_split(data.queries, "train")[sorted(asked)].all()
    ids = np.array(data.products.column("product_id").to_pylist())
    train_keys = {stable_hash(name) for name in ids[of_train]}
    for batch in batches:
        assert len(batch.product_keys) == 3 * len(batch.query_keys)
        assert set(batch.product_keys[:, 0].tolist()) <= train_keys
        if batch.judged_products is not None:
            assert set(batch.judged_products.flatten().tolist()) - {NO_KEY} <= train_keys
    if settings["types"] == ["catalogue"]:
        asks, answers = (torch.cat(keys) for keys in zip(*map(_of_examples, batches), strict=True))
        assert (asks[:, 0] != answers[:, 0]).any(), "mates have asked"
        assert batches[0].judged_products is None and not asked
    else:
        assert all((batch.judged_products != NO_KEY).any() for batch in batches)
        assert bool(asked) == (settings["types"] != ["generated"])


def _of_examples(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys of the queries of a batch, and of the products of the same examples."""
    return batch.query_keys, batch.product_keys[: len(batch.query_keys)]


def test_batches_are_the_same_every_time_and_pictures_vary_by_epoch(tiny_catalogue: Path) -> None:
    loaders = [data_module(tiny_catalogue).train_dataloader() for _ in range(2)]
    first, again = (list(loader) for loader in loaders)
    assert len(first) == len(loaders[0])
    assert all(map(same, first, again))
    loaders[0].sampler.set_epoch(1)
    assert not any(map(same, loaders[0], again))


def test_judgements_that_no_source_trains_on_are_told(
    tiny_catalogue: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data_module(tiny_catalogue, types=["catalogue", "pairs"])
    assert "none is trained on" not in caplog.text
    data_module(tiny_catalogue, types={"catalogue": 1, "generated": 1})
    assert (
        "judgements of the train split, and none is trained on: data.examples.types=catalogue, "
        "generated names" in caplog.text
    )


def test_ranks_share_the_batch_of_one_process(tiny_catalogue: Path) -> None:
    whole = next(iter(data_module(tiny_catalogue).train_dataloader()))
    halves = [
        next(iter(data_module(tiny_catalogue, rank, 2).train_dataloader())) for rank in range(2)
    ]
    assert torch.equal(torch.cat([half.product_keys for half in halves]), whole.product_keys)
    assert torch.equal(torch.cat([half.query.present for half in halves]), whole.query.present)
    assert torch.equal(torch.cat([half.product.image for half in halves]), whole.product.image)


def test_a_restored_place_is_where_the_next_loader_starts(tiny_catalogue: Path) -> None:
    whole, resumed = data_module(tiny_catalogue), data_module(tiny_catalogue)
    loader = whole.train_dataloader()
    loader.sampler.set_epoch(2)
    resumed.load_state_dict({"epoch": 2, "step": 3, "batches": 2 * len(loader) + 3})
    assert all(map(same, list(loader)[3:], list(resumed.train_dataloader())))


@pytest.mark.parametrize(
    ("start", "per_epoch", "processed", "expected"),
    [
        # 5 epochs of 100 batches were done; then one of 200, and half of the next.
        ({"epoch": 5, "step": 0, "batches": 500}, 200, 800, {"epoch": 6, "step": 100}),
        # Step 6 of 10 of epoch 1; with 5 steps an epoch that one is over, and 5 more make epoch 2.
        ({"epoch": 1, "step": 6, "batches": 16}, 5, 21, {"epoch": 3, "step": 0}),
    ],
)
def test_epochs_before_a_start_may_have_been_of_another_length(
    tiny_catalogue: Path,
    start: dict[str, int],
    per_epoch: int,
    processed: int,
    expected: dict[str, int],
) -> None:
    data = data_module(tiny_catalogue)
    data.load_state_dict(start)
    progress = SimpleNamespace(total=SimpleNamespace(processed=processed))
    data.trainer.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    data.trainer.num_training_batches = per_epoch
    assert data.state_dict() == {**expected, "batches": processed, "negatives": None}


def test_validation_asks_every_query_and_searches_every_product(tiny_catalogue: Path) -> None:
    data = data_module(tiny_catalogue)
    queries, products = data.val_dataloader()
    assert torch.cat([batch.row for batch in queries]).tolist() == list(
        range(len(data.held_out["val"]))
    )
    assert torch.cat([batch.row for batch in products]).tolist() == list(range(120))


def test_all_items_can_be_read_more_than_once(tiny_catalogue: Path) -> None:
    data = data_module(tiny_catalogue)
    assert len(list(all_items(data))) == len(list(all_items(data))) == 120 + len(data.queries)


def test_products_of_a_batch_have_names(tiny_catalogue: Path) -> None:
    data = data_module(tiny_catalogue)
    batch = next(iter(data.train_dataloader()))
    names = data.product_ids(batch)
    assert {stable_hash(name) for name in names} == set(batch.product_keys[:, 0].tolist())


def test_a_catalogue_without_queries_trains_and_validates_on_mates(tmp_path: Path) -> None:
    data = data_module(
        write_catalogue(tmp_path / "C", num_groups=20, queries=False), positives="group"
    )
    assert len(data.training.rows) == 24
    assert len(data.held_out["val"]) == 8
    assert (data.held_out["val"].own >= 0).all()


def test_a_folder_that_is_no_catalogue_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no schema\.json.*datamodules\.prepare"):
        ProductDataModule(tmp_path).prepare_data()


def test_sources_without_examples_are_refused(tmp_path: Path) -> None:
    catalogue = write_catalogue(tmp_path / "C", num_groups=5, queries=False)
    with pytest.raises(
        ValueError, match=r"6 products of the train split, and data\.examples.types=\['pairs'\]"
    ):
        data_module(catalogue, types=["pairs"])


def test_the_share_of_mates_is_as_set(tiny_catalogue: Path) -> None:
    data = data_module(
        tiny_catalogue, types=["catalogue"], positives="group", group_share=0.3, batch_size=72
    )
    loader = data.train_dataloader()
    shares = []
    for epoch in range(8):
        loader.sampler.set_epoch(epoch)
        [batch] = loader
        shares.append((batch.query_keys[:, 0] != batch.product_keys[:, 0]).float().mean().item())
        assert torch.equal(
            batch.query_keys[:, 1], batch.product_keys[:, 1]
        )  # all mates are of the group
    assert np.mean(shares) == pytest.approx(0.3, abs=0.06)
