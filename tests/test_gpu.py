"""No GPU is needed: FAISS's two functions for one are replaced."""

import faiss
import numpy as np
import pytest

from tritower.retrieval.ivf import clustering, gpu
from tritower.retrieval.ivf.clustering import find_centroids


def unit(count, dim=16, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(params=[True, False], ids=["working", "failing"])
def device(request, monkeypatch):
    """What was done on a GPU that FAISS sees, and whether it works."""
    used = []
    original = faiss.Kmeans

    def done(what):
        used.append(what)
        if not request.param:
            raise RuntimeError("Error in somewhere at file.cu:1\nout of GPU memory")

    def knn_gpu(resources, vectors, centers, count, **options):
        assert options.pop("metric") == faiss.METRIC_INNER_PRODUCT
        assert set(options) == {"vectorsMemoryLimit", "queriesMemoryLimit"}
        done("nearest")
        return faiss.knn(vectors, centers, count, metric=faiss.METRIC_INNER_PRODUCT)

    def kmeans(*arguments, gpu=False, **options):
        if gpu:
            done("k-means")
        return original(*arguments, **options)

    monkeypatch.setattr(gpu, "_broken", [])
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "knn_gpu", knn_gpu, raising=False)
    monkeypatch.setattr(faiss, "Kmeans", kmeans)
    return request.param, used


def test_nearest_centres_are_the_same_wherever_they_are_found(device, caplog):
    working, used = device
    vectors, centers = unit(100), unit(30, seed=1)
    for _ in range(2):
        scores, numbers = gpu.nearest(vectors, centers, 5)
        assert np.array_equal(
            numbers, np.argsort(-(vectors @ centers.T), axis=1, kind="stable")[:, :5]
        )
        assert np.allclose(scores, -np.sort(-(vectors @ centers.T), axis=1)[:, :5], atol=1e-6)
    assert used == ["nearest"] * (2 if working else 1)  # once failed, it is not asked again
    assert caplog.text.count("out of GPU memory): on the CPU from here on") == (not working)
    assert gpu.in_use() == working


@pytest.mark.parametrize("count", [300, 1100])
def test_k_means_and_lists_on_a_gpu(device, count):
    working, used = device
    sample = unit(4000)
    centroids = find_centroids(sample, count, seed=0)
    assert len(centroids) == count
    assert np.allclose(np.linalg.norm(centroids.vectors, axis=1), 1, atol=1e-5)
    scores = sample @ centroids.vectors.T
    lists = centroids.lists_of(sample, spill=True)
    assert used.count("k-means") == 1
    if (
        working or count <= clustering.FLAT_LISTS
    ):  # on a GPU all are compared, not those of some groups
        assert (scores[np.arange(4000), lists[:, 0]] >= scores.max(axis=1) - 1e-6).all()
    if not working:
        assert used == ["k-means"]
    assert (lists[:, 0] != lists[:, 1]).all() and lists.min() >= 0


def test_without_a_gpu_nothing_is_asked_of_one(monkeypatch):
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    monkeypatch.setattr(
        faiss, "knn_gpu", lambda *_, **__: pytest.fail("no GPU is there"), raising=False
    )
    assert not gpu.in_use()
    assert gpu.nearest(unit(3), unit(3), 1)[1].ravel().tolist() == [0, 1, 2]
