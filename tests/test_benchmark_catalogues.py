"""What the benchmark of catalogues keeps."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

catalogues = importlib.import_module("benchmarks.catalogues")


def test_every_reading_of_the_test_split_is_kept_with_its_arm(tmp_path: Path) -> None:
    results = catalogues.Results(tmp_path / "results.json")
    results.store("arms", "shop/fused/0", {"split": "val", "hit@1": 0.5})
    assert not results.data["test_reads"]
    results.store("arms", "shop/fused/0", {"split": "test", "hit@1": 0.4})
    again = catalogues.Results(tmp_path / "results.json")
    again.store("missing", "shop/fused/0/queries without text", {"split": "test", "hit@1": 0.3})
    kept = catalogues.Results(tmp_path / "results.json")
    assert [read["arm"] for read in kept.data["test_reads"]] == ["shop/fused/0", "shop/fused/0/queries without text"]
    assert kept.done("arms", "shop/fused/0", "test") and not kept.done("arms", "shop/fused/0", "val")


def test_names_that_are_not_there_are_refused_with_those_that_are() -> None:
    names = ["ours", "ours, some products new"]
    assert catalogues.chosen(None, names) == names
    assert catalogues.chosen(["ours, some products new"], names) == ["ours, some products new"]
    with pytest.raises(
        SystemExit, match='there is no "some products new"; choose of "ours", "ours, some products new"'
    ):
        catalogues.chosen(["ours", "some products new"], names)
