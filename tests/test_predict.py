"""What is predicted of an index before it is built, against what the built one does."""

import faiss
import numpy as np
import pytest

from tests.support.clustered import DIM, clustered, embed, unit
from tritower.retrieval.building.build import build_index
from tritower.retrieval.building.options import BuildOptions
from tritower.retrieval.building.tuning.mock_index import mock_index
from tritower.retrieval.building.tuning.predict import (
    Predictor,
    choose_refine,
    code_ranks,
    list_ranks,
    neighbors_in_sample,
    recall_of_8_bits,
)
from tritower.retrieval.building.tuning.tuning_queries import (
    TuningQueries,
    find_neighbors,
    product_queries,
)
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.ivf.clustering import find_centroids
from tritower.retrieval.ivf.engine import Settings
from tritower.retrieval.ivf.ivf_pq import train
from tritower.retrieval.ivf.operating_points import OperatingPoint, Target
from tritower.retrieval.ivf.spec import IvfPqSpec
from tritower.retrieval.ranking import metrics

COUNT, LISTS = 40_000, 256


@pytest.fixture(scope="module")
def vectors():
    return clustered(COUNT, noise=1.0)


def queries(query_type="photo", count=400, seed=5):
    rows = clustered(count, seed=seed, noise=1.0)
    return TuningQueries(query_type, rows, np.full(count, -1), np.empty((count, 0), np.int64))


@pytest.mark.parametrize("spill", [False, True])
def test_depths_are_the_places_of_the_lists_that_vectors_stand_in(vectors, spill):
    centroids, rows = find_centroids(vectors[:2000], 40, 0), np.arange(600).reshape(300, 2)
    lists = centroids.lists_of(vectors, spill)[rows]
    found = list_ranks(queries(count=300).vectors, lists.astype(np.int32), centroids)
    for query, both, needed in zip(queries(count=300).vectors, lists, found, strict=True):
        order = np.argsort(-(centroids.vectors @ query)).tolist()
        assert needed.tolist() == [min(order.index(one) + 1 for one in mine) for mine in both]


def test_vectors_without_a_second_list_are_met_in_their_first(vectors):
    centroids = find_centroids(vectors[:100], 3, 0)
    assert (
        list_ranks(
            centroids.vectors, np.array([[[0, -1]], [[1, -1]], [[2, -1]]], np.int32), centroids
        )
        == 1
    ).all()


def test_crowds_count_what_scores_higher_by_its_better_code():
    query = np.array([[1.0, 0.0]], np.float32)
    first = np.array([[[0.5, 0], [0.4, 0], [0.6, 0], [0.1, 0]]], np.float32)
    second = np.array([[[0.2, 0], [0.7, 0], [0.0, 0], [0.65, 0]]], np.float32)
    assert code_ranks(query, [first], 2).tolist() == [[1, 2]]
    assert code_ranks(query, [first, second], 2).tolist() == [[3, 0]]


@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize("wanted", [0.8, 0.95])
@pytest.mark.parametrize("sub_quantizers", [DIM // 2, DIM // 4])
def test_the_built_index_finds_what_was_predicted_from_samples(
    tmp_path, vectors, spill, wanted, sub_quantizers
):
    """Lists and candidates that a half of the vectors tells give the recall asked for on all of
    them.
    """
    drawn = np.random.default_rng(0).permutation(COUNT)
    sample, held_out = vectors[drawn[: COUNT // 4]], vectors[drawn[COUNT // 4 : COUNT // 2]]
    tuning_queries = [queries(), product_queries(held_out[:400], np.arange(400), "cosine")]
    centroids = find_centroids(sample, LISTS, 0)
    predictor = Predictor(
        sample, held_out, tuning_queries, Target(wanted), COUNT, 0, {LISTS: centroids}
    )
    spec = IvfPqSpec(LISTS, sub_quantizers, True, "SQfp16")
    prediction = predictor.predict(spec, spill)
    assert prediction.trained.spill == spill and prediction.trained.centroids is centroids
    options = BuildOptions(str(spec), spill=spill, train_sample=COUNT // 4)
    build_index(embed(tmp_path / "e", vectors), tmp_path / "i", options)
    index = ProductIndex.open(tmp_path / "i")
    (truth,) = find_neighbors([queries()], iter([vectors]), 10)
    assert prediction.points["photo"] or (wanted, sub_quantizers) == (0.95, DIM // 4)
    for point in prediction.points["photo"]:
        assert wanted <= point.recall < wanted + (0.02 if point.nprobe > 8 else 0.06)
        found = index.search(
            truth.vectors, 10, settings=index.resolve(point.nprobe, point.k_factor)
        ).rows
        # Codes in lists that are not visited crowd nobody out, so with few lists it is a little
        # better.
        assert -0.03 < metrics.recall_at_k(found, truth.truth, 10) - point.recall < 0.05
        assert point.qps > 0 and point.p50_ms > 0
    assert prediction.best["photo"] >= wanted and prediction.seconds > 0


def test_more_candidates_are_only_taken_where_they_save_lists(vectors):
    predictor = Predictor(
        vectors[:1000], vectors[:1000], [queries(count=10)], Target(0.5, k=1), 1000, 0, {}
    )
    depth, code_rank = (
        np.array([1, 1, 2, 2, 3, 3, 4, 8, 20, 30]),
        np.array([0, 5, 0, 3, 0, 3, 1, 0, 0, 9.0]),
    )
    points, best = predictor._predicted_points(
        depth, code_rank, 1.0, IvfPqSpec(30, 16, True, "SQ8")
    )
    assert points == [OperatingPoint(8, 2.0, 0.5), OperatingPoint(3, 4.0, 0.5)] and best == 1.0
    points, best = predictor._predicted_points(depth, code_rank, 0.8, IvfPqSpec(30, 16, True, None))
    assert points == [] and best == pytest.approx(0.4)


@pytest.mark.parametrize("refine", ["SQ8", None])
@pytest.mark.parametrize("spill", [False, True])
def test_a_stand_in_scans_as_many_codes_as_the_index_would(
    tmp_path, vectors, refine, spill, monkeypatch
):
    monkeypatch.setattr("tritower.retrieval.building.tuning.mock_index.SHARED_CODES", 200_000)
    monkeypatch.setattr("tritower.retrieval.building.tuning.mock_index.SHARED_VECTORS", 100_000)
    trained = train(vectors, IvfPqSpec(400, DIM // 2, True, refine), 0, spill)
    engine = mock_index(tmp_path, trained, trained.encode(vectors[:3000]), 1_000_000)
    assert engine.lists == 400
    assert [engine.ivf.invlists.list_size(i) for i in (0, 17, 399)] == [2500 * (1 + spill)] * 3
    assert (tmp_path / "mock-index.bin").stat().st_size <= 200_000
    _, rows = engine.search(vectors[:50], 10, Settings(8, 4.0))
    assert 0 <= rows.max() < engine.count


def test_vectors_to_rank_by_are_as_precise_as_the_recall_needs():
    rows = clustered(5000)
    near = neighbors_in_sample(
        rows, [product_queries(rows[:200], np.arange(200), "cosine")], 10, 5000
    )
    assert near[0].truth.shape == (200, 400)
    (found,) = recall_of_8_bits(rows, near, 10)
    eight = faiss.IndexScalarQuantizer(
        DIM, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    eight.train(rows)
    stored = eight.sa_decode(eight.sa_encode(rows))
    scores = rows[:200] @ stored.T
    scores[np.arange(200), np.arange(200)] = -np.inf
    order = np.argsort(-scores, axis=1)[:, :10]
    assert found == pytest.approx(metrics.recall_at_k(order, near[0].truth[:, :10], 10), abs=0.002)
    assert 0.9 < found < 0.995  # neighbors that are nearly tied


@pytest.mark.parametrize(("apart", "precision"), [(1.0, "SQ8"), (0.01, "SQfp16")])
def test_where_near_duplicates_abound_16_bits_are_stored(apart, precision):
    generator = np.random.default_rng(0)
    query_types = generator.standard_normal((200, 128))
    rows = unit(
        query_types[generator.integers(0, 200, 4000)]
        + apart * generator.standard_normal((4000, 128))
    )
    assert (
        choose_refine(rows, [product_queries(rows[:300], np.arange(300), "cosine")], 10, 4000)
        == precision
    )
