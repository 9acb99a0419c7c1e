"""Attributes as features: numbers, categories, paths and sets, and what is missing of them."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tritower.datamodules.schema import Attribute, Schema
from tritower.towers import attribute as attribute_module
from tritower.towers.attribute import AttributePreprocess, AttributeTower, bucket, value_hash

SCHEMA = Schema(
    text=("title",),
    images=False,
    attributes=(
        Attribute("brand", "category"),
        Attribute("price", "number", log=True, mean=3.0, std=0.5),
        Attribute("category", "path"),
        Attribute("size", "number", mean=40.0, std=2.0),
        Attribute("tags", "set"),
    ),
)


@pytest.fixture(params=[False, True], ids=["close", "exact"])
def tower(request: pytest.FixtureRequest) -> AttributeTower:
    tower = AttributeTower(out_dim=24, value_dim=8, num_buckets=1024, exact_numbers=request.param)
    tower.set_schema(SCHEMA)
    return tower.eval()


def features(tower: AttributeTower, *facts: dict[str, Any]) -> torch.Tensor:
    return tower(tower.preprocess(facts))


def test_nothing_that_an_average_over_steps_would_change_is_a_buffer(tower: AttributeTower) -> None:
    """Averages are made in float32, where a name's 63 bits would be another name's."""
    assert all(buffer.dtype in (torch.float32, torch.bool) for buffer in tower.buffers())


def test_unseen_values_null_and_empty_are_finite(tower: AttributeTower) -> None:
    rows = features(
        tower, {"brand": "Acme"}, {"brand": "never seen"}, {}, {"brand": ""}, {"brand": "  "}
    )
    assert rows.shape == (5, 24)
    assert rows.isfinite().all()
    assert not torch.allclose(rows[0], rows[1])
    assert not torch.allclose(rows[1], rows[2])
    torch.testing.assert_close(rows[3:], rows[2].expand(2, -1))


@pytest.mark.parametrize(
    ("name", "empty"), [("category", []), ("category", [""]), ("tags", []), ("tags", ["", " "])]
)
def test_an_empty_path_or_set_is_missing(
    tower: AttributeTower, name: str, empty: list[str]
) -> None:
    rows = features(tower, {name: empty, "brand": "Acme"}, {"brand": "Acme"})
    torch.testing.assert_close(rows[0], rows[1])


@pytest.mark.parametrize("price", [-5, 0, 1e12, 1e300, -1e300, 0.01])
def test_extreme_numbers_are_finite_and_not_missing(tower: AttributeTower, price: float) -> None:
    rows = features(tower, {"price": price, "size": price}, {})
    assert rows.isfinite().all()
    assert not torch.allclose(rows[0], rows[1])


@pytest.mark.parametrize("price", [math.nan, math.inf, -math.inf, "cheap", "", None])
def test_what_is_no_number_is_missing(tower: AttributeTower, price: Any) -> None:
    rows = features(tower, {"price": price, "brand": "Acme"}, {"brand": "Acme"})
    torch.testing.assert_close(rows[0], rows[1])


def test_text_where_numbers_were_learned_is_missing_and_warned_of_once(
    tower: AttributeTower, caplog: pytest.LogCaptureFixture
) -> None:
    attribute_module.warn_of_text.cache_clear()
    with caplog.at_level(logging.WARNING, logger="tritower.towers.attribute"):
        rows = features(tower, {"size": "M"}, {"size": "L"}, {"size": math.nan}, {})
    assert [record.getMessage() for record in caplog.records] == [
        "The attribute 'size' is a number for this model: what is given as text counts as missing"
    ]
    torch.testing.assert_close(rows, rows[3].expand(4, -1))


def test_missing_differs_from_zero(tower: AttributeTower) -> None:
    rows = features(tower, {"price": 0.0}, {})
    assert not torch.allclose(rows[0], rows[1])


def test_numbers_are_standardized_by_the_catalogue_after_the_log(tower: AttributeTower) -> None:
    value, price = 0.7, math.expm1(3.0 + 0.7 * 0.5)
    angle = 2 * math.pi * tower.frequency * value  # (2, k)
    periodic = torch.cat([angle.sin(), angle.cos()], -1)  # (2, 2 k)
    expected = torch.relu((periodic.unsqueeze(-1) * tower.number_weight).sum(1) + tower.number_bias)
    vectors = tower.number_vectors(torch.tensor([[price, 40.0 + 0.7 * 2.0]]))[0]
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=0)


def test_far_outside_of_what_was_learned_is_all_the_same(tower: AttributeTower) -> None:
    rows = tower.number_vectors(tower.preprocess([{"size": 1e6}, {"size": 1e9}]).number)
    torch.testing.assert_close(rows[0], rows[1])


def test_exact_numbers_tell_equal_from_close() -> None:
    """9.99 and 10.00 are nearly the same number.

    And no more the same value than 9.99 and 500 are.
    """
    torch.manual_seed(0)
    tower = AttributeTower(out_dim=64, exact_numbers=True)
    tower.set_schema(SCHEMA)
    tower.eval()
    close = tower.number_vectors(tower.preprocess([{"price": p} for p in (9.99, 10.0)]).number)[
        :, 0
    ].detach()
    assert float(F.cosine_similarity(close[0], close[1], dim=0)) > 0.99
    prices = [round(0.5 + 0.01 * i, 2) for i in range(2000)]
    exact = tower.exact_vectors(tower.preprocess([{"price": p} for p in prices]).number)[
        :, 0
    ].detach()
    assert len(exact.unique(dim=0)) == 2000
    unit = F.normalize(exact, dim=-1)
    cosines = unit @ unit.T - torch.eye(2000)
    assert abs(float(cosines.mean())) < 0.01 and float(cosines.std()) < 1.2 / math.sqrt(32)


def test_an_exact_number_is_one_of_its_attribute_and_none_where_it_is_missing() -> None:
    tower = AttributeTower(out_dim=64, exact_numbers=True)
    tower.set_schema(SCHEMA)
    facts = [{"price": 40, "size": 40}, {"price": 40.0}, {}, {"price": -0.0}, {"price": 0}]
    price, size = tower.exact_vectors(tower.preprocess(facts).number).unbind(1)
    assert torch.equal(price[0], price[1]) and torch.equal(price[3], price[4])
    assert not torch.allclose(price[0], size[0])
    assert not price[2].any() and not size[1].any()


def test_relatives_of_a_category_tree_are_nearer_than_strangers() -> None:
    schema = Schema((), False, (Attribute("category", "path"),))
    near = []
    for seed in range(5):
        torch.manual_seed(seed)
        tower = AttributeTower(value_dim=64, num_buckets=1 << 14)
        tower.set_schema(schema)
        paths = [
            ["home", "kitchen", "mugs"],
            ["home", "kitchen", "cups"],
            ["garden", "tools", "mugs"],
        ]
        mug, cup, tool = tower.eval().category_vectors(
            tower.preprocess([{"category": p} for p in paths]).category
        )[:, 0]
        near.append((F.cosine_similarity(mug, cup, 0) - F.cosine_similarity(mug, tool, 0)).item())
    assert min(near) > 0.3  # two of three levels are shared


def test_the_same_word_on_different_levels_is_not_the_same_value() -> None:
    tensors = AttributePreprocess(SCHEMA)(
        [{"category": ["shoes", "men"]}, {"category": ["men", "shoes"]}]
    )
    assert not set(tensors.category[0, 1].tolist()) & set(tensors.category[1, 1].tolist())


def test_the_order_of_a_set_does_not_matter(tower: AttributeTower) -> None:
    rows = features(tower, {"tags": ["red", "cotton", "new"]}, {"tags": ["new", "red", "cotton"]})
    torch.testing.assert_close(rows[0], rows[1], atol=1e-6, rtol=0)


def test_case_width_and_space_do_not_matter_but_the_attribute_does() -> None:
    assert (
        value_hash("brand", " ACME ")
        == value_hash("brand", "acme")
        == value_hash("brand", "ＡＣＭＥ")
    )
    assert value_hash("brand", "red") != value_hash("color", "red")


def test_a_category_given_as_a_number_is_the_text_of_it() -> None:
    preprocess = AttributePreprocess(SCHEMA)
    hashes = preprocess(
        [{"brand": "38"}, {"brand": 38}, {"brand": 38.0}, {"brand": math.nan}]
    ).category[:, 0, 0]
    assert hashes[0] == hashes[1] == hashes[2] != 0
    assert hashes[3] == 0


def test_neighbors_in_the_batch_do_not_matter(tower: AttributeTower) -> None:
    facts = [{"brand": "Acme", "tags": ["a"]}, {"tags": ["a", "b", "c"], "price": 3.0}, {}]
    together = features(tower, *facts)
    alone = torch.cat([features(tower, fact) for fact in facts])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def test_attributes_that_the_schema_does_not_know_are_left_out(tower: AttributeTower) -> None:
    rows = features(tower, {"brand": "Acme", "weight": 3.0}, {"brand": "Acme"})
    torch.testing.assert_close(rows[0], rows[1])


def test_hash_functions_fill_the_table_evenly_and_differ() -> None:
    values = torch.tensor([value_hash("sku", str(i)) for i in range(8192)])
    rows = [bucket(values, number, 256) for number in range(4)]
    for row in rows:
        assert 0 <= row.min() and row.max() < 256
        counts = torch.bincount(row, minlength=256)  # 32 expected, standard deviation 5.6
        assert counts.min() > 5 and counts.max() < 70
    assert (rows[0] == rows[1]).float().mean() < 0.02


def test_a_catalogue_without_attributes_is_refused() -> None:
    with pytest.raises(ValueError, match="attribute: null"):
        AttributeTower().set_schema(Schema(("title",), False, ()))


@pytest.mark.parametrize(
    ("settings", "message"), [({"num_buckets": 1000}, "1000"), ({"num_hashes": 5}, "num_hashes=5")]
)
def test_impossible_tables_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttributeTower(**settings)


def test_a_tower_without_schema_says_so() -> None:
    with pytest.raises(RuntimeError, match="set_schema"):
        _ = AttributeTower().preprocess
