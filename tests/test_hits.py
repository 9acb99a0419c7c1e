import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tritower.retrieval.ranking.hits import Hits


def hits(scores, rows):
    return Hits(np.array(scores, np.float32), np.array(rows))


def lists(found):
    return found.scores.tolist(), found.rows.tolist()


FOUND = hits([[9, 8, 7, 6], [5, 4, -np.inf, -np.inf]], [[3, 1, 4, 0], [2, 6, -1, -1]])


def test_the_first_that_are_kept_move_up():
    kept = np.array([[False, True, False, True], [True, False, False, False]])
    assert lists(FOUND.keep_first(kept, 2)) == ([[8, 6], [5, -np.inf]], [[1, 0], [2, -1]])
    assert lists(FOUND.keep_first(kept, 1)) == ([[8], [5]], [[1], [2]])


def test_more_than_there_are_is_padded():
    every = FOUND.keep_first(FOUND.rows >= 0, 6)
    assert lists(every.select_queries(np.array([1]))) == (
        [[5, 4] + [-np.inf] * 4],
        [[2, 6, -1, -1, -1, -1]],
    )
    assert every.scores.dtype == np.float32 and every.rows.dtype == np.int64
    assert lists(FOUND.keep_first(np.zeros((2, 4), bool), 3)) == lists(Hits.empty(2, 3))


@given(st.lists(st.booleans(), min_size=6, max_size=6), st.integers(1, 8))
def test_the_first_that_are_kept_equal_a_loop(kept, k):
    found = hits([range(6, 0, -1)], [[5, 2, 7, 0, 1, 9]])
    left = [place for place in range(6) if kept[place]][:k]
    missing = k - len(left)
    assert lists(found.keep_first(np.array([kept]), k)) == (
        [[float(6 - place) for place in left] + [-np.inf] * missing],
        [[int(found.rows[0, place]) for place in left] + [-1] * missing],
    )


def test_equal_scores_of_different_queries_share_no_rank():
    assert hits([[2, 1, -np.inf], [1, 1, 1]], [[3, 5, -1], [5, 3, 1]]).mean_ranks().tolist() == [
        [1, 2, 3],
        [2, 2, 2],
    ]


def test_rows_in_order_share_no_rank():
    found = Hits.from_order(np.array([[4, 2, 9], [7, -1, -1]]))
    assert found.mean_ranks()[0].tolist() == [1, 2, 3] and found.mean_ranks()[1, 0] == 1
    assert np.array_equal(np.isinf(found.scores), found.rows == -1)
