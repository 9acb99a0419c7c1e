import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritower.retrieval.ivf import clustering
from tritower.retrieval.ivf.clustering import (
    GROUPS_VISITED,
    SPILL_CANDIDATES,
    Centroids,
    find_centroids,
    grouped,
)


def unit(array):
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


def clustered(count, dim, seed=0, centers=60):
    generator = np.random.default_rng(seed)
    center = np.random.default_rng(99).standard_normal((centers, dim))
    return unit(
        center[generator.integers(0, centers, count)]
        + 0.6 * generator.standard_normal((count, dim))
    )


def flat(vectors):
    return grouped(np.asarray(vectors, np.float32), np.empty((0, len(vectors[0])), np.float32))


@pytest.fixture(scope="module")
def sample():
    return clustered(20_000, 24)


@pytest.fixture(scope="module")
def two_levels(sample):
    return find_centroids(sample, 2048, seed=3)


@pytest.fixture(scope="module")
def one_level(sample):
    return find_centroids(sample, 100, seed=3)


def visited_groups(centroids, vectors):
    """(B, L) whether a list is in one of the nearest groups, by full sorting."""
    order = np.argsort(-(vectors @ centroids.groups.T), axis=1, kind="stable")[:, :GROUPS_VISITED]
    return (centroids.group_of[None, None] == order[:, :, None]).any(axis=1)


@pytest.mark.parametrize("which", ["one_level", "two_levels"])
def test_centroids_have_unit_length_and_are_as_many_as_asked_for(request, which):
    centroids = request.getfixturevalue(which)
    assert centroids.vectors.shape == ({"one_level": 100, "two_levels": 2048}[which], 24)
    assert centroids.vectors.dtype == centroids.groups.dtype == np.float32
    assert np.allclose(np.linalg.norm(centroids.vectors, axis=1), 1, atol=1e-5)


def test_few_lists_have_no_groups_and_many_stand_in_their_nearest_group(one_level, two_levels):
    assert one_level.groups.shape == (0, 24) and not one_level.group_of.any()
    assert len(two_levels.groups) == pytest.approx(math.sqrt(2048), rel=0.5)
    assert np.array_equal(
        two_levels.group_of, (two_levels.vectors @ two_levels.groups.T).argmax(axis=1)
    )
    assert set(two_levels.group_of) == set(range(len(two_levels.groups)))


def test_the_list_of_a_vector_is_that_of_the_nearest_centroid(one_level):
    vectors = clustered(3000, 24, seed=1)
    scores = vectors @ one_level.vectors.T
    best, lists = one_level.nearest(vectors)
    assert np.array_equal(lists[:, 0], scores.argmax(axis=1))
    assert np.allclose(best[:, 0], scores.max(axis=1), atol=1e-6)
    assert np.array_equal(one_level.lists_of(vectors), lists)
    several = one_level.nearest(vectors, 5)[1]
    assert np.array_equal(several, np.argsort(-scores, axis=1, kind="stable")[:, :5])


def test_through_groups_nearly_every_vector_finds_its_nearest_list(
    two_levels,
):
    vectors = clustered(3000, 24, seed=1)
    scores = vectors @ two_levels.vectors.T
    best, lists = two_levels.nearest(vectors)
    compared = np.where(visited_groups(two_levels, vectors), scores, -np.inf)
    assert np.array_equal(lists[:, 0], compared.argmax(axis=1))
    assert np.allclose(best[:, 0], compared.max(axis=1), atol=1e-6)
    assert (lists[:, 0] == scores.argmax(axis=1)).mean() >= 0.97
    best, lists = two_levels.nearest(vectors, 9)
    assert np.allclose(best, -np.sort(-compared, axis=1)[:, :9], atol=1e-6)
    assert np.allclose(best, np.take_along_axis(compared, lists, 1), atol=1e-6)
    assert (np.diff(np.sort(lists, axis=1), axis=1) > 0).all()


def test_fewer_lists_than_asked_for_are_filled_up():
    best, lists = flat(np.eye(3)).nearest(unit(np.array([[3.0, 2.0, 1.0]])), 5)
    assert lists.tolist() == [[0, 1, 2, -1, -1]]
    assert np.isneginf(best[0, 3:]).all() and np.isfinite(best[0, :3]).all()
    centroids = grouped(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)[:2])
    best, lists = centroids.nearest(unit(np.array([[3.0, 2.0, 1.0]])), 5)
    assert lists.tolist() == [[0, 1, 2, -1, -1]]
    assert (best[0, 3:] < -1e30).all()


def test_groups_without_lists_are_left_out_so_that_every_vector_finds_a_list():
    """Its nearest groups may be without lists.

    K-means of few distinct vectors makes such groups.
    """
    angles = np.linspace(0, 1, 20)
    groups = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    centroids = grouped(groups[-1:].copy(), groups)
    assert centroids.groups.tolist() == groups[-1:].tolist() and centroids.group_of.tolist() == [0]
    assert centroids.nearest(groups)[1].ravel().tolist() == [0] * 20
    assert (centroids.lists_of(groups, spill=True)[:, 0] == 0).all()


@pytest.mark.parametrize("count", [64, 1200])
def test_fewer_distinct_vectors_than_lists(count, sample):
    vectors = np.repeat(sample[:5], 400, axis=0)
    centroids = find_centroids(vectors, count, seed=0)
    assert len(centroids) == count
    lists = centroids.lists_of(vectors, spill=True)
    assert (lists >= 0).all()
    assert (np.einsum("bd,bd->b", vectors, centroids.vectors[lists[:, 0]]) > 0.999).all()


def test_as_many_lists_as_vectors_are_the_vectors_made_unit():
    vectors = 3 * clustered(50, 8)
    centroids = find_centroids(vectors, 50, seed=0)
    assert np.allclose(np.linalg.norm(centroids.vectors, axis=1), 1, atol=1e-6)
    assert np.allclose(centroids.vectors, unit(vectors), atol=1e-6)


@pytest.mark.parametrize("count", [50, 1100])
def test_the_seed_decides(sample, count):
    same, again, other = (find_centroids(sample[:4000], count, seed) for seed in (5, 5, 6))
    assert np.array_equal(same.vectors, again.vectors) and np.array_equal(same.groups, again.groups)
    assert not np.array_equal(same.vectors, other.vectors)


def test_lists_hold_vectors_that_are_near(sample, two_levels, one_level):
    """More lists: nearer to their centroids; and two levels lose little against one."""
    near = {len(c): c.nearest(sample)[0].mean() for c in (one_level, two_levels)}
    single = flat(clustering._kmeans(sample, 2048, seed=3))
    assert near[100] < near[2048]
    assert near[2048] > single.nearest(sample)[0].mean() - 0.01


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40), st.floats(0, 1))
def test_shares_sum_up_and_are_in_proportion(sizes, part):
    sizes = np.array([*sizes, 1])
    count = max(1, round(part * sizes.sum()))
    shares = clustering._shares(sizes, count)
    assert shares.sum() == count
    assert ((shares >= 0) & (shares <= sizes)).all()
    assert (np.abs(shares - sizes * count / sizes.sum()) < 1 + 1e-9).all()


def soar(vector, first, others):
    """SOAR's loss of each second centroid, in plain Python."""
    residual = [v - c for v, c in zip(vector, first, strict=True)]
    length = math.sqrt(sum(r * r for r in residual))
    losses = []
    for other in others:
        second = [v - c for v, c in zip(vector, other, strict=True)]
        along = (
            sum(a * b for a, b in zip(residual, second, strict=True)) / length if length else 0.0
        )
        losses.append(sum(s * s for s in second) + clustering.SPILL_WEIGHT * along**2)
    return losses


def test_the_second_list_points_elsewhere_than_the_first():
    """The vector leans from its first centroid (10 degrees in y).

    One at 20 degrees on the other side is nearer than one at 25 degrees in z, but lies along the
    same residual: losses by hand 0.2331 and 0.1875.
    """

    def tilted(degrees, axis):
        vector = np.zeros(3, np.float32)
        vector[[0, axis]] = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        return vector

    centroids = flat([tilted(10, 1), tilted(-20, 1), tilted(25, 2), tilted(180, 1)])
    vector = np.array([[1, 0, 0]], np.float32)
    losses = soar(
        vector[0].tolist(), *(c.tolist() for c in (centroids.vectors[0], centroids.vectors[1:3]))
    )
    assert losses == pytest.approx([0.2331, 0.1875], abs=1e-4)
    assert centroids.nearest(vector, 3)[1].tolist() == [[0, 1, 2]]
    assert centroids.lists_of(vector, spill=True).tolist() == [[0, 2]]


@pytest.mark.parametrize("which", ["one_level", "two_levels"])
def test_second_lists_are_others_with_the_least_loss(request, which):
    centroids = request.getfixturevalue(which)
    vectors = clustered(200, 24, seed=2)
    lists = centroids.lists_of(vectors, spill=True)
    assert lists.shape == (200, 2) and (lists >= 0).all()
    assert (lists[:, 0] != lists[:, 1]).all()
    assert np.array_equal(lists[:, :1], centroids.lists_of(vectors))
    near = centroids.nearest(vectors, 1 + SPILL_CANDIDATES)[1]
    for vector, (first, second), others in zip(vectors, lists, near[:, 1:], strict=True):
        losses = soar(
            vector.tolist(), centroids.vectors[first].tolist(), centroids.vectors[others].tolist()
        )
        assert losses[others.tolist().index(second)] <= min(losses) + 1e-6


def test_a_vector_that_is_a_centroid_has_the_nearest_other_one_as_its_second(one_level):
    vectors = one_level.vectors
    lists = one_level.lists_of(vectors, spill=True)
    between = vectors @ vectors.T
    np.fill_diagonal(between, -np.inf)
    assert np.array_equal(lists[:, 0], np.arange(100))
    assert (between[np.arange(100), lists[:, 1]] >= between.max(axis=1) - 1e-6).all()


def test_with_few_lists_there_is_another_one_or_none():
    two = flat(np.eye(2)).lists_of(unit(np.array([[2.0, 1.0], [1.0, 2.0]])), spill=True)
    assert two.tolist() == [[0, 1], [1, 0]]
    assert flat([[1.0, 0.0]]).lists_of(np.eye(2, dtype=np.float32), spill=True).tolist() == [
        [0],
        [0],
    ]
    # Alone in the only group that is visited: no second list, and it is said so.
    far = unit(np.array([[1, 0.1 * i] for i in range(5)], np.float32))
    alone = Centroids(
        np.array([[0, 1], [0, -1]], np.float32), np.concatenate([far, -far]), np.array([0, 9])
    )
    assert alone.lists_of(far[:1], spill=True).tolist() == [[0, -1]]
