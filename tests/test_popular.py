"""Counting as a baseline of products that go together."""

from __future__ import annotations

import csv
import importlib
import math
from pathlib import Path

import numpy as np
import pytest

popular = importlib.import_module("benchmarks.popular")


def test_a_familys_own_judgements_and_those_of_other_categories_do_not_count() -> None:
    category, family = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 2])
    linked = np.array([[0, 0, 0, 1], [0, 0, 1, 1], [1, 0, 0, 0], [0, 1, 0, 0]], bool)
    expected = np.array([[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0.5, 1], [0, 0, 0, 0]])
    of_any_category = np.array(
        [
            [1 / 2, 1 / 2, 0, 0],
            [1 / 2, 1 / 2, 0, 0],
            [0, 1 / 3, 1 / 3, 2 / 3],
            [1 / 3, 0, 1 / 3, 2 / 3],
        ]
    )
    np.testing.assert_allclose(
        popular.shares(linked, category, family), expected + of_any_category / 1000
    )


def test_a_product_is_ranked_without_itself() -> None:
    grades = np.array([[0, 3.0, 2], [0, 0, 0], [0, 0, 0]])
    score = np.array([[9.0, 1, 2], [0, 0, 0], [0, 0, 0]])
    worth = (2 + 3 / math.log2(3)) / (3 + 2 / math.log2(3))
    assert popular.ndcg(score, grades, np.array([0])) == pytest.approx(worth)


def test_judgements_of_other_splits_count_in_the_bound_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """v asks for w (its family) and t.

    Of its category, a names s and b, which is of val, names t.
    """
    folder = tmp_path / "shop"
    folder.mkdir()
    rows = {
        "products": [
            dict(zip(("id", "category", "family_id", "split"), row, strict=True))
            for row in (
                ("v", "shirts", "f", "val"),
                ("w", "shirts", "f", "val"),
                ("a", "shirts", "", "train"),
                ("b", "shirts", "", "val"),
                ("s", "bags", "", "train"),
                ("t", "bags", "", "train"),
            )
        ],
        "queries": [{"query_id": f"like-{i}", "source_product_id": i} for i in "vab"],
        "qrels": [
            {"query_id": f"like-{i}", "product_id": p, "relevance": g}
            for i, p, g in (
                ("v", "w", 3),
                ("v", "t", 2),
                ("a", "s", 2),
                ("b", "t", 2),
                ("b", "t", 2),
            )
        ],
    }
    for name, of in rows.items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, of[0])
            writer.writeheader()
            writer.writerows(of)
    popular.main(tmp_path, "shop", "val")
    first, *figures = capsys.readouterr().out.splitlines()
    assert first.startswith("shop, 1 query products of val")
    # after w: s is named and t is not, so it comes last, fifth; with all judgements both are named
    # once, t is third
    best = 3 + 2 / math.log2(3)
    assert float(figures[0].split()[-1]) == pytest.approx((3 + 2 / math.log2(6)) / best, abs=1e-3)
    assert float(figures[1].split()[-1]) == pytest.approx((3 + 2 / math.log2(4)) / best, abs=1e-3)
