"""What the benchmark of catalogues keeps."""

from __future__ import annotations

import importlib
from pathlib import Path

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
