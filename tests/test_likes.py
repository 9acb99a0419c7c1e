"""Weights as they are typed, and queries of several parts, against sums by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritower.retrieval.more_like_this import WeightedProduct, combined, parse_weighted_product


@pytest.mark.parametrize(
    ("text", "what", "weight"),
    [
        ("A", "A", 1.0),
        ("A=2", "A", 2.0),
        ("A=.5", "A", 0.5),
        ("A=1e-1", "A", 0.1),
        ("size=L", "size=L", 1.0),
        ("size=L=3", "size=L", 3.0),
        ("A=", "A=", 1.0),
        ("A=-2", "A=-2", 1.0),
        ("a\nb=2", "a\nb", 2.0),
    ],
)
def test_a_weight_follows_the_last_equals_sign(text, what, weight):
    assert parse_weighted_product(text) == WeightedProduct(what, weight)
    assert parse_weighted_product(text, sign=-1) == WeightedProduct(what, -weight)


def test_an_id_that_looks_like_a_weight_is_taken_as_it_stands():
    ids = {"A=2", "A"}
    assert parse_weighted_product("A=2", ids.__contains__) == WeightedProduct("A=2", 1.0)
    assert parse_weighted_product("A=2=3", ids.__contains__) == WeightedProduct("A=2", 3.0)
    assert parse_weighted_product("A=3", ids.__contains__) == WeightedProduct("A", 3.0)


@pytest.mark.parametrize("text", ["=2", "A=0", "A=0.0", "A=1e999"])
def test_a_weight_that_means_nothing_is_refused(text):
    with pytest.raises(ValueError, match=r"expected ID=WEIGHT with a weight above 0"):
        parse_weighted_product(text)


@given(st.text())
def test_any_text_is_a_part_or_refused(text):
    try:
        part = parse_weighted_product(text)
    except ValueError:
        return
    assert text.startswith(part.product_id)
    assert 0 < part.weight < float("inf")


def test_parts_are_summed_as_unit_vectors():
    right, up = np.array([5, 0], np.float32), np.array([[0, 0.1]], np.float32)
    assert np.allclose(combined([right, up]), [[0.5**0.5, 0.5**0.5]])
    assert np.allclose(combined([right, up], [3, -4]), [[0.6, -0.8]])
    assert combined([right]).tolist() == [[1, 0]]
    assert combined([right]).dtype == np.float32


def test_scaling_all_weights_changes_nothing():
    vectors = list(np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32))
    assert np.allclose(combined(vectors, [1, -2, 0.5]), combined(vectors, [1e-9, -2e-9, 0.5e-9]))


def test_parts_that_cancel_out_are_refused():
    one = np.array([1, 2], np.float32)
    with pytest.raises(ValueError, match="cancel each other out"):
        combined([one, 3 * one], [2, -2])


def test_no_part_or_one_without_direction_is_refused():
    with pytest.raises(ValueError, match="nothing to search for"):
        combined([])
    with pytest.raises(ValueError, match=r"part 1 of the query has length 0\.0"):
        combined([np.ones(2, np.float32), np.zeros(2, np.float32)])
