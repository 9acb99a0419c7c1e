import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritower.retrieval.ranking import metrics as m

ONE_OF_THREE = np.array([[10, 11, 7, 12, 13]]), np.array([[7, 8, 9]])


def test_one_of_three_relevant_products_in_five_is_a_hit_and_a_third_of_recall():
    retrieved, relevant = ONE_OF_THREE
    assert m.hit_at_k(retrieved, relevant, 5) == 1
    assert m.recall_at_k(retrieved, relevant, 5) == pytest.approx(1 / 3)
    assert m.hit_at_k(retrieved, relevant, 2) == 0
    assert m.mrr(retrieved, relevant) == pytest.approx(1 / 3)
    assert m.average_precision(retrieved, relevant) == pytest.approx(1 / 9)


def test_best_recall_is_the_ceiling_of_many_relevant_products():
    assert m.best_recall_at_k([[1, 2, 3, 4], [1, -1, -1, -1]], 2) == pytest.approx((0.5 + 1) / 2)


def test_ndcg_by_hand_uses_grades_and_the_ideal_over_all_judged():
    got = m.ndcg_at_k([[5, 6, 7]], [[6, 7, 8]], [[3.0, 1.0, 2.0]], 2)
    assert got == pytest.approx((3 / math.log2(3)) / (3 + 2 / math.log2(3)))


def test_padding_is_never_a_result():
    assert m.hit_at_k([[-1, -1]], [[3, -1]], 2) == 0
    assert m.recall_at_k([[3, -1]], [[3, -1]], 2) == 1


def test_large_hashes_are_compared_exactly():
    big = 2**62
    assert m.hit_at_k([[big + 1]], [[big]], 1) == 0
    assert m.hit_at_k([[big]], [[big]], 1) == 1


@pytest.mark.parametrize(
    ("retrieved", "relevant", "k", "message"),
    [
        ([[1, 2]], [[1]], 3, r"k=3 but only 2 results"),
        ([[1, 2]], [[1]], 0, r"k=0; expected an integer of at least 1"),
        ([[1, 2]], [[1]], True, r"k=True"),
        ([[1, 2]], [[1]], 1.5, r"k=1.5"),
        ([[1], [2]], [[1], [-1]], 1, r"query 1 has no relevant products"),
        ([[1], [2]], [[1]], 1, r"retrieved has 2 queries, relevant has 1"),
        ([[1, 1]], [[1]], 1, r"retrieved: query 0 has id 1 more than once"),
        ([[1, 2]], [[4, 4]], 1, r"relevant: query 0 has id 4 more than once"),
        ([[-1, 2]], [[4]], 1, r"query 0 has -1 before a product"),
        ([1, 2], [[4]], 1, r"retrieved has shape \(2,\)"),
        ([[0.5]], [[4]], 1, r"dtype float64"),
        (np.zeros((0, 3), int), np.zeros((0, 3), int), 1, r"no queries"),
    ],
)
def test_bad_input_is_refused_with_its_values(retrieved, relevant, k, message):
    with pytest.raises(ValueError, match=message):
        m.recall_at_k(retrieved, relevant, k)


@pytest.mark.parametrize(
    ("grades", "message"),
    [
        ([[1.0]], r"grades has shape \(1, 1\), relevant has \(1, 2\)"),
        ([[1.0, -2.0]], r"query 0 has grade -2.0"),
        ([[1.0, math.nan]], r"query 0 has grade nan"),
        ([[0.0, 0.0]], r"query 0 has no grade above 0"),
    ],
)
def test_bad_grades_are_refused(grades, message):
    with pytest.raises(ValueError, match=message):
        m.ndcg_at_k([[1]], [[1, 2]], grades, 1)


def test_bootstrap_interval_holds_the_mean_and_narrows_with_more_queries():
    values = np.tile([0.0, 1.0], 50)
    low, high = m.bootstrap_interval(values)
    assert low < 0.5 < high
    wide, narrow = high - low, np.ptp(m.bootstrap_interval(np.tile(values, 100)))
    assert narrow < wide / 5
    both = m.bootstrap_interval(np.stack([values, 1 - values], 1))
    assert both.shape == (2, 2)
    assert np.allclose(both[:, 0], [low, high])
    with pytest.raises(ValueError, match="at least one query"):
        m.bootstrap_interval([])
    with pytest.raises(ValueError, match="query 1 are not finite"):
        m.bootstrap_interval([0.0, math.nan])


@pytest.mark.parametrize(
    ("level", "deviations"), [(0.95, 1.959964), (0.8, 1.281552), (0.99, 2.575829)]
)
def test_bootstrap_interval_of_many_queries_is_the_normal_one(level, deviations):
    """The mean and as many of its standard errors to either side as a normal distribution has at
    this level.
    """
    values = np.random.default_rng(0).beta(2, 3, 500)
    error = values.std() / math.sqrt(500)
    low, high = m.bootstrap_interval(values, level=level, samples=10_000)
    assert high - low == pytest.approx(2 * deviations * error, rel=0.04)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.1 * error)


def test_bootstrap_interval_is_of_95_percent_unless_told():
    values = np.random.default_rng(0).beta(2, 3, 500)
    assert np.array_equal(m.bootstrap_interval(values), m.bootstrap_interval(values, level=0.95))
    low, high = m.bootstrap_interval(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(500), rel=0.1)


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_bootstrap_interval_holds_the_truth_as_often_as_its_level_says(level):
    """Of 1000 samples with the mean 1/2, as columns.

    Each end is missed on its own side half of the rest.
    """
    samples = np.random.default_rng(0).uniform(size=(100, 1000))
    low, high = m.bootstrap_interval(samples, level=level, samples=500)
    assert np.mean((low <= 0.5) & (0.5 <= high)) == pytest.approx(level, abs=0.04)
    assert np.mean(low > 0.5) == pytest.approx((1 - level) / 2, abs=0.03)
    assert np.mean(high < 0.5) == pytest.approx((1 - level) / 2, abs=0.03)


@st.composite
def rankings(draw):
    ids = st.integers(0, 12)
    num_queries, k_max = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    retrieved, relevant, grades = [], [], []
    for _ in range(num_queries):
        got = draw(st.lists(ids, unique=True, max_size=k_max))
        judged = draw(
            st.dictionaries(ids, st.sampled_from([1.0, 2.0, 3.0]), min_size=1, max_size=6)
        )
        retrieved.append(got + [-1] * (k_max - len(got)))
        relevant.append(list(judged) + [-1] * (6 - len(judged)))
        grades.append(list(judged.values()) + [0.0] * (6 - len(judged)))
    return np.array(retrieved), np.array(relevant), np.array(grades), draw(st.integers(1, k_max))


def oracle(retrieved, relevant, grades, k):
    """The definitions, one query after the other."""
    rows = []
    for got, judged, grade in zip(
        retrieved.tolist(), relevant.tolist(), grades.tolist(), strict=True
    ):
        grade_of = {i: g for i, g in zip(judged, grade, strict=True) if i >= 0}
        found = [i in grade_of for i in got if i >= 0]
        precisions = [sum(found[: r + 1]) / (r + 1) for r, f in enumerate(found) if f]
        gains = [grade_of.get(i, 0.0) for i in got if i >= 0][:k]
        ideal = sorted(grade_of.values(), reverse=True)[:k]
        rows.append(
            [
                float(any(found[:k])),
                sum(found[:k]) / len(grade_of),
                min(k, len(grade_of)) / len(grade_of),
                next((1 / (r + 1) for r, f in enumerate(found) if f), 0.0),
                sum(precisions) / len(grade_of),
                sum(g / math.log2(r + 2) for r, g in enumerate(gains))
                / sum(g / math.log2(r + 2) for r, g in enumerate(ideal)),
            ]
        )
    return np.array(rows)


def measured(retrieved, relevant, grades, k):
    return np.stack(
        [
            m.hit_at_k_per_query(retrieved, relevant, k),
            m.recall_at_k_per_query(retrieved, relevant, k),
            m.best_recall_at_k_per_query(relevant, k),
            m.mrr_per_query(retrieved, relevant),
            m.average_precision_per_query(retrieved, relevant),
            m.ndcg_at_k_per_query(retrieved, relevant, grades, k),
        ],
        axis=1,
    )


@settings(max_examples=300, deadline=None)
@given(rankings())
def test_metrics_equal_the_definitions(case):
    got = measured(*case)
    assert np.abs(got - oracle(*case)).max() <= 1e-12
    assert (got >= 0).all() and (got <= 1 + 1e-12).all()
    assert (got[:, 1] <= got[:, 2] + 1e-12).all()  # recall never above its best
    retrieved, relevant, grades, k = case
    order = np.random.default_rng(0).permutation(relevant.shape[1])
    assert np.allclose(
        got, measured(retrieved, relevant[:, order], grades[:, order], k), atol=1e-12
    )
    means = [f(retrieved, relevant, k) for f in (m.hit_at_k, m.recall_at_k)]
    assert np.allclose(means, got[:, :2].mean(axis=0), atol=1e-12)


def test_prepared_ndcg_equals_ndcg_of_the_same_rankings():
    generator = np.random.default_rng(0)
    judged = np.stack([generator.permutation(30)[:6] for _ in range(20)])
    judged[:10, 4:] = -1
    grades = generator.uniform(0.1, 3, judged.shape) * (judged >= 0)
    prepared = m.PreparedNdcg(judged, grades, 25, k=10)  # rows from 25 on are never found
    for _ in range(3):
        rows = np.stack([generator.permutation(25)[:12] for _ in range(20)])
        rows[0, 5:] = -1
        assert prepared.mean(rows) == pytest.approx(m.ndcg_at_k(rows, judged, grades, 10))
