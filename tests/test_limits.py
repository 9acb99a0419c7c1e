"""Left out rows and one hit per group, against rows sorted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.limits import limited


def exact(vectors, allowed, log=None):
    """An exact search that never finds more than asked for."""

    def search(queries, k, mask):
        if log is not None:
            log.append((k, mask is not None))
        inside = allowed if mask is None else allowed & mask
        scores = np.where(inside, queries @ vectors.T, -np.inf).astype(np.float32)
        rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(scores, rows, axis=1)
        rows, best = (
            np.pad(array, ((0, 0), (0, k - array.shape[1])), constant_values=fill)
            for array, fill in ((rows, -1), (best, -np.inf))
        )
        return best, np.where(np.isinf(best), -1, rows)

    return search


def by_hand(scores, allowed, k, excluded, codes):
    """Rows of one query, taken one after another in the order of their scores."""
    rows, seen = [], set()
    for row in np.argsort(-scores, kind="stable").tolist():
        group = None if codes is None or codes[row] < 0 else codes[row]
        if allowed[row] and row not in excluded and group not in seen and len(rows) < k:
            rows.append(row)
            seen |= {group} - {None}
    return rows + [-1] * (k - len(rows))


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_hits_are_the_best_rows_one_after_another(data):
    count = data.draw(st.integers(1, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    vectors = rng.standard_normal((count, 3)).astype(np.float32)
    queries = rng.standard_normal((3, 3)).astype(np.float32)
    allowed = rng.random(count) < data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    excluded = rng.integers(0, count, data.draw(st.integers(0, 5)))
    groups = data.draw(st.sampled_from([None, 1, 3, 30]))
    codes = None if groups is None else rng.integers(-1, groups, count).astype(np.int32)
    k = data.draw(st.integers(1, 12))
    scores, rows = limited(exact(vectors, allowed), lambda: allowed, queries, k, excluded=excluded, codes=codes)
    truth = queries @ vectors.T
    assert rows.tolist() == [by_hand(truth[q], allowed, k, set(excluded.tolist()), codes) for q in range(3)]
    assert np.array_equal(scores == -np.inf, rows < 0)
    assert np.allclose(scores[rows >= 0], np.take_along_axis(truth, rows, axis=1)[rows >= 0], atol=1e-6)


def test_a_group_that_fills_all_that_was_fetched_hides_no_other():
    vectors = np.linspace(1, 0, 1000, dtype=np.float32)[:, None]
    codes = np.where(np.arange(1000) < 990, 0, np.arange(1000)).astype(np.int32)
    log = []
    search = exact(vectors, np.ones(1000, bool), log)
    rows = limited(search, lambda: np.ones(1000, bool), np.ones((1, 1), np.float32), 5, codes=codes)[1]
    assert rows.tolist() == [[0, 990, 991, 992, 993]]
    assert log == [(20, False), (16, True)]


def test_rows_of_no_group_are_all_shown():
    vectors = np.linspace(1, 0, 6, dtype=np.float32)[:, None]
    codes = np.array([-1, -1, 7, 7, -1, 7], np.int32)
    search = exact(vectors, np.ones(6, bool))
    rows = limited(search, lambda: np.ones(6, bool), np.ones((1, 1), np.float32), 6, codes=codes)[1]
    assert rows.tolist() == [[0, 1, 2, 4, -1, -1]]


@pytest.mark.parametrize("allowed", [np.ones(8, bool), np.arange(8) < 3])
def test_nothing_is_asked_again_where_nothing_is_left(allowed):
    log = []
    search = exact(np.linspace(1, 0, 8, dtype=np.float32)[:, None], allowed, log)
    rows = limited(search, lambda: allowed, np.ones((2, 1), np.float32), 20, excluded=[0, 0])[1]
    assert (rows >= 0).sum() == 2 * (allowed.sum() - 1)
    assert log == [(21, False)]


def test_a_search_that_finds_nothing_more_ends_it():
    def blind(queries, k, mask):
        return np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)

    scores, rows = limited(blind, lambda: np.ones(5, bool), np.ones((1, 1), np.float32), 2)
    assert rows.tolist() == [[-1, -1]]
    assert np.isneginf(scores).all()
