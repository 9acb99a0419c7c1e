"""What the benchmark of catalogues keeps."""

from __future__ import annotations

import importlib
import json as json_format
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ledger
from benchmarks.command import Folders
from benchmarks.ledger import Ledger
from benchmarks.splits import NewSplits

catalogues = importlib.import_module("benchmarks.catalogues")


ARMS = ("fused", "text alone")


def bench(
    tmp_path: Path,
    json: str,
    again: str | None = None,
    splits: NewSplits | None = None,
) -> Any:
    """Of a catalogue with two arms and two seeds, on the test split."""
    results = catalogues.Results(tmp_path / json, Ledger(tmp_path / "reads.json", again))
    catalogue = catalogues.Catalogue("shop", seeds=2, trained=ARMS, splits=splits)
    arms: dict[str, list[str]] = {name: [] for name in ARMS}
    folders = Folders(tmp_path, tmp_path, tmp_path / json, tmp_path)
    options = catalogues.BenchOptions(arms=arms, robust=("fused",))
    return catalogues.Bench(catalogue, folders, "test", results, options)


def reads(tmp_path: Path) -> list[Any]:
    return json_format.loads((tmp_path / "reads.json").read_text(encoding="utf-8"))


def test_every_reading_of_the_test_split_is_kept_with_its_arms(tmp_path: Path) -> None:
    made = bench(tmp_path, "figures.json", splits=NewSplits(7))
    made.results.store("arms", "shop/fused/0", {"split": "val"}, salt=7)
    assert not (tmp_path / "reads.json").exists()
    made.store("arms", "fused/0", {"query_types": {}})
    made.store("missing", "fused/0/queries without text", {"query_types": {}})
    [read] = reads(tmp_path)
    assert set(read) == {"date", "commit", "catalogue", "splits", "command", "arms", "reason"}
    assert (read["catalogue"], read["splits"], read["reason"]) == ("shop", 7, None)
    assert read["arms"] == ["fused/0", "fused/0/queries without text"]
    kept = catalogues.Results(tmp_path / "figures.json", Ledger(tmp_path / "reads.json"))
    assert kept.done("arms", "shop/fused/0", "test", salt=7)
    assert not kept.done("arms", "shop/fused/0", "test", salt=8)
    assert not kept.done("arms", "shop/fused/0", "val", salt=7)


def test_an_arm_is_not_read_twice_without_a_reason_that_is_kept(tmp_path: Path) -> None:
    bench(tmp_path, "figures.json").store("arms", "fused/0", {"query_types": {}})
    refused = r"fused/0 of shop \(splits: None\) was read .* --again REASON"
    with pytest.raises(SystemExit, match=refused):
        bench(tmp_path, "other.json").check()
    with pytest.raises(SystemExit, match="--again is empty"):
        bench(tmp_path, "other.json", again=" ").check()
    again = bench(tmp_path, "other.json", again="the index was damaged")
    again.check()
    again.store("arms", "fused/0", {"query_types": {}})
    assert [read["reason"] for read in reads(tmp_path)] == [None, "the index was damaged"]


def test_a_refused_reading_leaves_everything_as_it_is(tmp_path: Path) -> None:
    bench(tmp_path, "figures.json").store("arms", "text alone/1", {"query_types": {}})
    before = (tmp_path / "reads.json").read_bytes()
    refused = bench(tmp_path, "other.json")
    with pytest.raises(SystemExit):
        catalogues.run_all([refused], refused.results, "test")
    assert (tmp_path / "reads.json").read_bytes() == before
    assert not refused.prepared.exists() and not (tmp_path / "other.json").exists()


def test_an_interrupted_reading_goes_on_with_the_arms_that_it_lacks(tmp_path: Path) -> None:
    first = bench(tmp_path, "figures.json")
    first.check()
    for arm in ("fused/0", "text alone/0", "fused/1"):
        first.store("arms", arm, {"query_types": {}})
    second = bench(tmp_path, "figures.json")
    second.check()
    second.store("arms", "text alone/1", {"query_types": {}})
    assert [read["arms"] for read in reads(tmp_path)] == [
        ["fused/0", "text alone/0", "fused/1"],
        ["text alone/1"],
    ]


def test_new_splits_and_val_are_no_second_reading(tmp_path: Path) -> None:
    first = bench(tmp_path, "figures.json", splits=NewSplits(1))
    first.store("arms", "fused/0", {"query_types": {}})
    first.store("arms", "floor/0", {"query_types": {}})  # its weights are chosen, on val
    assert [read["arms"] for read in reads(tmp_path)] == [["fused/0", "floor/0"]]
    bench(tmp_path, "other.json", splits=NewSplits(2)).check()
    of_val = bench(tmp_path, "other.json", splits=NewSplits(1))
    of_val.split = "val"
    of_val.check()


def test_the_readings_under_version_control_are_told_apart_by_their_splits() -> None:
    for read in Ledger().reads:
        assert set(read) == {"date", "commit", "catalogue", "splits", "command", "arms", "reason"}
    assert {one.name: one.folder for one in catalogues.CATALOGUES} == {
        "luma": "luma-1",
        "fashion": "fashion-1",
        "flipkart": "flipkart",
        "grocery": "grocery",
    }


def test_commands_are_kept_without_the_folders_that_they_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = [
        "/a/benchmarks/peers.py",
        "--data",
        "/home/me/data",
        "--json=/tmp/f.json",
        "--arms",
        '["of 1/2"]',
    ]
    monkeypatch.setattr("sys.argv", given)
    expected = 'python -m benchmarks.peers --data data --json=f.json --arms ["of 1/2"]'
    assert ledger.command() == expected


def test_a_catalogue_without_a_configuration_is_trained_with_those_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    monkeypatch.setattr(catalogues, "call", lambda *arguments: called.append(arguments[2]))
    flipkart = next(one for one in catalogues.CATALOGUES if one.name == "flipkart")
    results = catalogues.Results(tmp_path / "figures.json", Ledger(tmp_path / "reads.json"))
    folders = Folders(tmp_path, tmp_path, tmp_path / "figures.json", tmp_path)
    options = catalogues.BenchOptions(quick=True)
    made = catalogues.Bench(flipkart, folders, "val", results, options)
    for name in flipkart.trained:
        made.train(name, made.arms[name], seed=0)
    assert called == ["--config=configs/fashion.yaml", "--config=configs/luma.yaml"]


def test_names_that_are_not_there_are_refused_with_those_that_are() -> None:
    names = ["ours", "ours, some products new"]
    assert catalogues.chosen([], names) == names
    assert catalogues.chosen(["ours, some products new"], names) == ["ours, some products new"]
    with pytest.raises(
        SystemExit,
        match='there is no "some products new"; choose of "ours", "ours, some products new"',
    ):
        catalogues.chosen(["ours", "some products new"], names)
