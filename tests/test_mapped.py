import io
from itertools import pairwise

import faiss
import numpy as np
import pytest

from tritower.artefacts.storage import ArtefactError
from tritower.retrieval.building.build import build_index
from tritower.retrieval.building.options import BuildOptions
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.ivf import ivf_pq as mapped
from tritower.retrieval.ivf.engine import Settings
from tritower.retrieval.ivf.inverted_lists import read_lists
from tritower.retrieval.ivf.ivf_pq import (
    centroids_of,
    open_refine,
    search_parameters,
    train,
    write_refine_header,
)
from tritower.retrieval.ivf.spec import parse_ivf_pq
from tritower.retrieval.ranking import metrics
from tritower.retrieval.vectors.embeddings import EmbeddingReader, EmbeddingWriter

DIM = 32


def clustered(count, seed=0, dim=DIM, clusters=60):
    generator = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((clusters, dim))
    vectors = centers[generator.integers(0, clusters, count)] + 0.6 * generator.standard_normal(
        (count, dim)
    )
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def write(folder, vectors, metric="cosine"):
    writer = EmbeddingWriter(folder, dim=vectors.shape[1], metric=metric)
    writer.write("s", [f"p{i}" for i in range(len(vectors))], vectors)
    writer.finish(["s"])
    return EmbeddingReader(folder)


def stored(reader):
    return np.concatenate([batch.vectors for batch in reader.batches()])


def exact(queries, vectors, k):
    return np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :k]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return write(tmp_path_factory.mktemp("embeddings") / "e", clustered(6000))


@pytest.fixture(scope="module")
def queries():
    return clustered(100, seed=1)


@pytest.fixture(scope="module")
def many(tmp_path_factory, reader):
    """An index whose lists are so many that they are found through groups."""
    folder = tmp_path_factory.mktemp("many") / "i"
    build_index(reader, folder, BuildOptions("IVF2048,PQ8x4fsr,Refine(SQ8)"))
    return ProductIndex.open(folder)


@pytest.fixture(scope="module")
def spilled(tmp_path_factory, reader):
    """Factory -> an index with second lists and one without, alike otherwise."""
    root = tmp_path_factory.mktemp("spilled")
    found = {}
    for factory in (
        "IVF64,PQ8x4fsr,Refine(SQ8)",
        "IVF64,PQ8x4fsr",
        "IVF2048,PQ8x4fsr,Refine(SQfp16)",
    ):
        for spill in (False, True):
            build_index(reader, root / f"{factory}{spill}", BuildOptions(factory, spill=spill))
        found[factory] = [ProductIndex.open(root / f"{factory}{spill}") for spill in (True, False)]
    return found


@pytest.mark.parametrize("query_type", ["SQ8", "SQfp16"])
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_a_streamed_file_of_finer_vectors_is_that_of_faiss(tmp_path, query_type, count):
    sample, vectors = clustered(500, seed=2), clustered(count, seed=3)
    refine = train(sample, parse_ivf_pq(f"IVF4,PQ8x4fsr,Refine({query_type})"), seed=0).refine
    added = faiss.clone_index(refine)
    added.add(vectors)
    with (tmp_path / "f").open("wb") as file:
        write_refine_header(file, refine, count)
        for block in np.array_split(vectors, 3):
            file.write(refine.sa_encode(block).tobytes() if len(block) else b"")
    assert (tmp_path / "f").read_bytes() == faiss.serialize_index(added).tobytes()
    opened = open_refine(tmp_path / "f", count, DIM)
    if count:
        for found, wanted in zip(
            opened.search(sample[:5], 1), added.search(sample[:5], 1), strict=True
        ):
            assert np.array_equal(found, wanted)
        assert np.array_equal(opened.reconstruct_n(0, count), added.reconstruct_n(0, count))


def test_finer_vectors_of_another_index_are_refused(tmp_path):
    refine = train(clustered(500), parse_ivf_pq("IVF4,PQ8x4fsr,Refine(SQ8)"), seed=0).refine
    with (tmp_path / "f").open("wb") as file:
        write_refine_header(file, refine, 3)
        file.write(refine.sa_encode(clustered(3)).tobytes())
    for count, dim in ((4, DIM), (3, 16)):
        with pytest.raises(
            ArtefactError, match=rf"f holds 3 vectors of 32 dimensions, expected {count} of {dim}"
        ):
            open_refine(tmp_path / "f", count, dim)
    (tmp_path / "f").write_bytes(b"no such file")
    with pytest.raises(ArtefactError, match="f cannot be opened"):
        open_refine(tmp_path / "f", 3, DIM)


@pytest.mark.parametrize("lists", [40, 2048])
def test_what_finds_lists_survives_writing_and_reading(lists):
    trained = train(clustered(6000), parse_ivf_pq(f"IVF{lists},PQ8x4fsr"), seed=0)
    index = faiss.deserialize_index(faiss.serialize_index(trained.index))
    read = centroids_of(index)
    assert len(read) == lists and (len(read.groups) > 1) == (lists == 2048)
    for name in ("vectors", "groups", "group_of"):
        assert np.array_equal(getattr(read, name), getattr(trained.centroids, name))
    queries = clustered(50, seed=1)
    for found, wanted in zip(
        index.quantizer.search(queries, 7), trained.index.quantizer.search(queries, 7), strict=True
    ):
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize(
    "factory", ["IVF40,PQ8x4fsr", "IVF40,PQ8x4fs", "IVF40,PQ16x4fs,Refine(SQfp16)"]
)
def test_codes_and_answers_are_those_of_faiss_with_the_same_quantizers(
    tmp_path, reader, queries, factory
):
    spec = parse_ivf_pq(factory)
    trained = train(stored(reader), spec, seed=0)
    plain = faiss.clone_index(trained.index)
    plain.add(stored(reader))
    build_index(reader, tmp_path / "i", BuildOptions(factory))
    index = ProductIndex.open(tmp_path / "i")
    assert index.engine.ivf.by_residual == plain.by_residual == spec.residual
    for nprobe in (1, 5, 40):
        wanted = plain.search(queries, 20, params=faiss.SearchParametersIVF(nprobe=nprobe))
        found = index.engine.ivf.search(
            queries, 20, params=search_parameters(index.engine.ivf, nprobe)
        )
        assert np.array_equal(found[0], wanted[0]) and np.array_equal(found[1], wanted[1])


@pytest.mark.parametrize("spill", [False, True])
def test_vectors_are_encoded_alike_alone_and_together(spill):
    vectors = clustered(6000)
    trained = train(vectors, parse_ivf_pq("IVF64,PQ8x4fsr,Refine(SQ8)"), seed=0, spill=spill)
    together, alone = (
        trained.encode(vectors),
        trained.encode(vectors[5000:5010]),
    )  # across the blocks of encode
    assert together.lists.shape == (6000, 1 + spill) and together.codes.shape == (
        1 + spill,
        6000,
        4,
    )
    assert together.refine.shape == (6000, DIM)
    assert np.array_equal(alone.lists, together.lists[5000:5010])
    assert np.array_equal(alone.codes, together.codes[:, 5000:5010])
    assert np.array_equal(alone.refine, together.refine[5000:5010])
    assert (
        together.lists[:, 0] == (vectors @ trained.centroids.vectors.T).argmax(axis=1)
    ).mean() > 0.999


def test_a_rerank_finds_nearly_what_exact_search_finds(many, reader, queries):
    truth = exact(queries, stored(reader), 10)
    assert (
        metrics.recall_at_k(
            many.search(queries, 10, settings=many.resolve(2048, 30)).rows, truth, 10
        )
        > 0.97
    )


def test_all_lists_probed_find_everything_though_lists_are_found_through_groups(many, queries):
    assert isinstance(faiss.downcast_index(many.engine.ivf.quantizer), faiss.IndexRefine)
    rows = many.search(queries, 6000, nprobe=2048).rows
    assert (np.sort(rows, axis=1) == np.arange(6000)).all()


@pytest.mark.parametrize("nprobe", [1, 10, 45, 300, 2000])
def test_the_lists_visited_are_nearly_the_nearest_ones(many, nprobe):
    ivf, vectors = many.engine.ivf, clustered(100, seed=4)
    centroids = centroids_of(ivf).vectors
    parameters = search_parameters(ivf, nprobe)
    lists = ivf.quantizer.search(vectors, nprobe, params=parameters.quantizer_params)[1]
    nearest = exact(vectors, centroids, nprobe)
    assert lists.min() >= 0
    assert metrics.recall_at_k(lists, nearest, nprobe) > (0.9 if nprobe == 1 else 0.95)


def test_more_lists_find_no_less(many, reader, queries):
    truth = exact(queries, stored(reader), 10)
    recalls = [
        metrics.recall_at_k(
            many.search(queries, 10, settings=many.resolve(nprobe, 20)).rows, truth, 10
        )
        for nprobe in (1, 8, 64, 512, 2048)
    ]
    assert all(more >= fewer - 0.002 for fewer, more in pairwise(recalls))
    assert recalls[0] < 0.7 < 0.95 < recalls[-1]


def rows_of_lists(index):
    ivf, folder = index.engine.ivf, index.version
    sizes = np.load(folder / "lists.npy")
    return [rows.copy() for _, rows in read_lists(folder / "lists.bin", ivf, sizes)]


@pytest.mark.parametrize("factory", ["IVF64,PQ8x4fsr,Refine(SQ8)", "IVF64,PQ8x4fsr"])
@pytest.mark.parametrize(
    ("k", "nprobe", "k_factor"),
    [(1, 1, 1), (10, 1, 1), (100, 1, 8), (5, 16, 1), (1000, 3, 2), (6000, 64, 1)],
)
def test_each_row_at_most_once_and_as_many_as_can_be_reached(
    spilled, queries, factory, k, nprobe, k_factor
):
    for index in spilled[factory]:
        lists = rows_of_lists(index)
        visited = index.engine.ivf.quantizer.search(queries, nprobe)[1]
        hits = index.search(queries, k, settings=index.resolve(nprobe, k_factor))
        for rows, scores, numbers in zip(hits.rows, hits.scores, visited, strict=True):
            reachable = np.unique(np.concatenate([lists[number] for number in numbers]))
            found = rows[rows >= 0]
            assert len(np.unique(found)) == len(found) == min(k, len(reachable))
            assert np.isin(found, reachable).all()
            assert (rows[len(found) :] == -1).all() and np.isneginf(scores[len(found) :]).all()
            assert (np.diff(scores[: len(found)]) <= 0).all()


def test_with_second_lists_every_row_stands_in_two_different_lists(spilled):
    for factory in spilled:
        index, without = spilled[factory]
        assert index.manifest.meta["spill"] and not without.manifest.meta["spill"]
        for each, times in ((index, 2), (without, 1)):
            lists = rows_of_lists(each)
            assert np.array_equal(
                np.bincount(np.concatenate(lists), minlength=6000), np.full(6000, times)
            )
            assert all((np.diff(rows) > 0).all() for rows in lists)


@pytest.mark.parametrize(
    "factory", ["IVF64,PQ8x4fsr,Refine(SQ8)", "IVF2048,PQ8x4fsr,Refine(SQfp16)"]
)
def test_second_lists_find_more_in_as_many_lists(spilled, reader, queries, factory):
    truth = exact(queries, stored(reader), 10)
    for nprobe in (1, 4, 16):
        with_spill, without = (
            metrics.recall_at_k(
                index.search(queries, 10, settings=index.resolve(nprobe, 20)).rows, truth, 10
            )
            for index in spilled[factory]
        )
        assert with_spill >= without
    assert (
        metrics.recall_at_k(spilled[factory][0].search(queries, 10, nprobe=4).rows, truth, 10) > 0.5
    )


def test_second_lists_make_the_same_answers_when_all_are_visited(spilled, queries):
    index, without = spilled["IVF64,PQ8x4fsr,Refine(SQ8)"]
    a, b = (each.search(queries, 10, settings=each.resolve(64, 200)) for each in (index, without))
    assert np.array_equal(a.rows, b.rows) and np.array_equal(a.scores, b.scores)


def test_inner_product_of_vectors_of_any_length(tmp_path):
    generator = np.random.default_rng(0)
    vectors = clustered(4000) * generator.uniform(0.2, 3, (4000, 1)).astype(np.float32)
    reader = write(tmp_path / "e", vectors, metric="inner_product")
    build_index(reader, tmp_path / "i", BuildOptions("IVF64,PQ16x4fsr,Refine(SQfp16)"))
    index, queries = ProductIndex.open(tmp_path / "i"), clustered(100, seed=1) * 2
    truth = exact(queries, stored(reader), 10)
    hits = index.search(queries, 10, settings=index.resolve(64, 30))
    assert metrics.recall_at_k(hits.rows, truth, 10) > 0.9
    assert np.allclose(
        hits.scores,
        np.take_along_axis(queries @ stored(reader).T, hits.rows, 1),
        rtol=5e-3,
        atol=5e-3,
    )


def test_settings_of_groups_by_hand(many, monkeypatch):
    """2048 lists in G groups.

    For 40 lists, G / 8 + 8 x 40 / (2048 / G) groups are visited, and 68 lists compared.
    """
    groups = len(centroids_of(many.engine.ivf).groups)
    made = []

    class Factory:
        """In place of FAISS's classes, which do not give their parameters back."""

        @staticmethod
        def SearchParametersIVF(**options):
            made.append(options)
            return options

        IndexRefineSearchParameters = SearchParametersIVF

    monkeypatch.setattr(mapped, "make", Factory)
    assert search_parameters(many.engine.ivf, 40)["nprobe"] == 40
    inner, refine, _ = made
    assert inner["nprobe"] == int(np.ceil(groups / 8 + 8 * 40 * groups / 2048))
    assert refine["k_factor"] * 40 == 68
    made.clear()
    search_parameters(many.engine.ivf, 2048, selector := object())
    inner, refine, outer = made
    assert (inner["nprobe"], refine["k_factor"], outer["sel"]) == (groups, 1, selector)
    assert many.settings == Settings(46, 8.0)  # the root of 2048, rounded up


def test_header_needs_no_codes_in_memory():
    refine = train(clustered(500), parse_ivf_pq("IVF4,PQ8x4fsr,Refine(SQ8)"), seed=0).refine
    stream = io.BytesIO()
    write_refine_header(stream, refine, 10**9)
    assert len(stream.getvalue()) < 1000
