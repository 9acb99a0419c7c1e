from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritower.retrieval.filtering.group_by import (
    mask_with_relatives,
    search_excluding,
    search_grouped,
)
from tritower.retrieval.ranking.hits import Hits


class Exact:
    """Search by brute force over (N, 2) vectors; counts how often it is asked."""

    def __init__(self, vectors):
        self.vectors, self.calls = vectors, 0

    def among(self, queries, k, allowed):
        self.calls += 1
        scores = np.where(allowed, queries @ self.vectors.T, -np.inf).astype(np.float32)
        order = np.argsort(-scores, axis=1, kind="stable")
        order = np.pad(order, ((0, 0), (0, max(0, k - order.shape[1]))), constant_values=0)[:, :k]
        best = np.take_along_axis(scores, order, axis=1)
        best[:, len(self.vectors) :] = -np.inf
        return Hits(best, np.where(np.isfinite(best), order, -1))

    def search(self, queries, k):
        return self.among(queries, k, np.ones(len(self.vectors), bool))

    def without(self, queries, k, mask):
        return self.among(queries, k, ~mask)


def naive(vectors, query, k, codes):
    """Walk down the ranking; take a row unless its code was taken."""
    taken, hits = set(), []
    for row in np.argsort(-(vectors @ query), kind="stable"):
        if codes[row] >= 0 and codes[row] in taken:
            continue
        taken.add(codes[row])
        hits.append(row)
    return (hits + [-1] * k)[:k]


@given(st.data(), st.integers(1, 60), st.integers(1, 8), st.integers(1, 6))
@settings(max_examples=300, deadline=None)
def test_one_of_each_is_the_ranking_without_what_belongs_to_an_earlier_hit(data, count, k, groups):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    vectors, queries = (
        rng.standard_normal((count, 2)).astype(np.float32),
        rng.standard_normal((3, 2)).astype(np.float32),
    )
    codes = rng.integers(-1, groups, count).astype(np.int32)
    exact = Exact(vectors)
    scores, rows = search_grouped(exact.search, exact.without, queries, k, codes)
    assert rows.tolist() == [naive(vectors, query, k, codes) for query in queries]
    found = rows >= 0
    assert np.allclose(scores[found], (queries @ vectors.T)[np.nonzero(found)[0], rows[found]])
    assert (scores[~found] == -np.inf).all()


def test_one_group_that_fills_every_first_result_hides_no_other():
    """10,000 rows of one group come before the first of another."""
    angles = np.concatenate([np.linspace(0, 0.1, 10_000), np.linspace(1, 1.2, 5)])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    codes = np.array([0] * 10_000 + [1, 2, 2, -1, 3], np.int32)
    exact = Exact(vectors)
    rows = search_grouped(
        exact.search, exact.without, np.array([[1.0, 0.0]], np.float32), 4, codes
    )[1]
    assert rows.tolist() == [[0, 10_000, 10_001, 10_003]]
    assert exact.calls == 3  # two of growing size, one without the large group
    rows = search_grouped(
        exact.search, exact.without, np.array([[1.0, 0.0]], np.float32), 7, codes
    )[1]
    assert rows.tolist() == [[0, 10_000, 10_001, 10_003, 10_004, -1, -1]]


def test_one_search_is_enough_where_nothing_belongs_together():
    vectors = np.random.default_rng(0).standard_normal((100, 2)).astype(np.float32)
    exact = Exact(vectors)
    rows = search_grouped(exact.search, exact.without, vectors[:5], 10, np.full(100, -1, np.int32))[
        1
    ]
    assert exact.calls == 1
    assert rows.tolist() == exact.search(vectors[:5], 10)[1].tolist()


@pytest.mark.parametrize(
    ("rows", "relatives"),
    [([], []), ([1], [1, 4]), ([0], [0]), ([1, 2], [1, 2, 3, 4]), ([0, 5], [0, 5])],
)
def test_relatives_are_all_rows_of_the_same_code(rows, relatives):
    codes = np.array([-1, 7, 3, 3, 7, -1], np.int32)
    assert (
        np.flatnonzero(mask_with_relatives(np.array(rows, np.int64), codes)).tolist() == relatives
    )


@given(st.integers(0, 1000), st.integers(1, 20), st.integers(1, 8), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_rows_left_out_leave_the_ranking_of_the_others(seed, count, k, left_out):
    rng = np.random.default_rng(seed)
    vectors, queries = (
        rng.standard_normal((count, 2)).astype(np.float32),
        rng.standard_normal((2, 2)).astype(np.float32),
    )
    out = rng.permutation(count)[:left_out]
    rows = search_excluding(Exact(vectors).search, queries, k, out)[1]
    for query, found in zip(queries, rows, strict=True):
        ranking = [row for row in np.argsort(-(vectors @ query), kind="stable") if row not in out]
        assert found.tolist() == (ranking + [-1] * k)[:k]
