import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritower.artefacts import storage
from tritower.artefacts.storage import ArtefactError
from tritower.retrieval.building import build as build_module
from tritower.retrieval.building.build import build_index
from tritower.retrieval.building.choose_spec import default_nprobe
from tritower.retrieval.building.options import BuildOptions
from tritower.retrieval.building.training_sample import uniform_sample
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.ranking import metrics
from tritower.retrieval.vectors.embeddings import EmbeddingReader, EmbeddingWriter

DIM = 32


def unit(array):
    return (array / np.linalg.norm(array, axis=1, keepdims=True)).astype(np.float32)


def clustered(count, seed=0, dim=DIM, clusters=60):
    generator = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((clusters, dim))
    return unit(
        centers[generator.integers(0, clusters, count)]
        + 0.6 * generator.standard_normal((count, dim))
    )


def embed(folder, vectors, shards=3, ids=None, model="model-a"):
    ids = ids or [f"p{i}" for i in range(len(vectors))]
    writer = EmbeddingWriter(folder, dim=vectors.shape[1], model=model, catalogue="c")
    names = [f"shard-{i}" for i in range(shards)]
    for name, rows in zip(names, np.array_split(np.arange(len(vectors)), shards), strict=True):
        writer.write(name, [ids[i] for i in rows], vectors[rows])
    writer.finish(names)
    return EmbeddingReader(folder)


def exact(queries, vectors, k):
    return np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :k]


@pytest.fixture(scope="module")
def vectors():
    return clustered(6000)


@pytest.fixture(scope="module")
def queries():
    return clustered(200, seed=1)


@pytest.fixture(scope="module")
def reader(tmp_path_factory, vectors):
    return embed(tmp_path_factory.mktemp("embeddings") / "e", vectors)


@pytest.fixture(scope="module")
def stored(reader):
    """The vectors as they stand on disk."""
    return np.concatenate([batch.vectors for batch in reader.batches()])


@pytest.fixture(scope="module")
def flat(tmp_path_factory, reader):
    folder = tmp_path_factory.mktemp("flat") / "i"
    build_index(reader, folder, BuildOptions("Flat"))
    return ProductIndex.open(folder)


@pytest.fixture(scope="module")
def ivf(tmp_path_factory, reader):
    folder = tmp_path_factory.mktemp("ivf") / "i"
    build_index(reader, folder, BuildOptions("IVF128,PQ8x4fsr,Refine(SQfp16)"))
    return ProductIndex.open(folder)


def test_flat_is_brute_force(flat, stored, queries):
    hits = flat.search(queries, 10)
    assert np.array_equal(hits.rows, exact(queries, stored, 10))
    assert np.allclose(hits.scores, np.take_along_axis(queries @ stored.T, hits.rows, 1), atol=1e-5)
    assert flat.ids(hits.rows)[3, 4] == f"p{hits.rows[3, 4]}"


def test_every_vector_finds_itself_first(flat, stored):
    assert (flat.search(stored[:1000], 1).rows[:, 0] == np.arange(1000)).mean() > 0.999


def test_an_approximate_index_stays_close_to_exact(ivf, stored, queries):
    truth = exact(queries, stored, 10)
    assert metrics.recall_at_k(ivf.search(queries, 10).rows, truth, 10) > 0.9
    assert metrics.recall_at_k(ivf.search(queries, 10, nprobe=1).rows, truth, 10) < 0.9


def test_the_manifest_says_what_the_index_is(ivf, reader):
    meta = ivf.manifest.meta
    assert (meta["model"], meta["metric"], meta["dim"], meta["count"]) == (
        "model-a",
        "cosine",
        DIM,
        6000,
    )
    assert meta["training"].pop("seconds") >= 0
    assert meta["training"] == {"seed": 0, "vectors": 6000, "per_list": 46.88, "device": "cpu"}
    assert meta["embeddings"] == reader.fingerprint
    assert (len(ivf), ivf.dim, ivf.model, ivf.engine.lists) == (6000, DIM, "model-a", 128)
    assert ivf.settings == (default_nprobe(128), 8.0)


@pytest.mark.parametrize(
    ("factory", "floor"),
    [
        ("IVF32,Flat", 0.999),
        ("PCAR16,IVF32,Flat", 0.3),
        ("PCAR16,IVF32,PQ8x4fs,Refine(SQ8)", 0.7),
        ("IVF32,PQ16x4fsr,RFlat", 0.9),
    ],
)
def test_nprobe_and_k_factor_reach_the_lists_through_every_wrapper(
    tmp_path, reader, stored, queries, factory, floor
):
    build_index(reader, tmp_path / "i", BuildOptions(factory))
    index = ProductIndex.open(tmp_path / "i")
    truth = exact(queries, stored, 10)

    def recall(**settings):
        return metrics.recall_at_k(
            index.search(queries, 10, settings=index.resolve(**settings)).rows, truth, 10
        )

    full = recall(nprobe=32, k_factor=50)
    assert full >= floor
    assert (index.search(queries, 1000, nprobe=1).rows < 0).any()  # one list is too short
    assert (index.search(queries, 1000, nprobe=32).rows >= 0).all()
    if "R" in factory.split(",")[-1]:
        assert recall(nprobe=32, k_factor=1) < full - 0.01


def test_all_lists_probed_is_exact(tmp_path, reader, stored, queries):
    build_index(reader, tmp_path / "i", BuildOptions("IVF32,Flat"))
    hits = ProductIndex.open(tmp_path / "i").search(queries, 20, nprobe=32)
    assert np.array_equal(hits.rows, exact(queries, stored, 20))


def test_settings_are_stored_and_read_back(tmp_path, reader):
    build_index(reader, tmp_path / "i", BuildOptions("IVF32,Flat", nprobe=5, k_factor=3))
    index = ProductIndex.open(tmp_path / "i")
    assert index.settings == (5, 3)
    assert index.resolve(nprobe=7) == (7, 3)


def test_a_moved_folder_still_searches(tmp_path, ivf, queries):
    shutil.copytree(ivf.path, tmp_path / "elsewhere")
    shutil.copytree(ivf.version, tmp_path / "alone")
    for place in ("elsewhere", "alone"):
        moved = ProductIndex.open(tmp_path / place)
        for got, wanted in zip(moved.search(queries, 5), ivf.search(queries, 5), strict=True):
            assert np.array_equal(got, wanted)


def test_shards_and_batches_do_not_change_the_index(tmp_path, vectors, reader):
    one = embed(tmp_path / "one", vectors, shards=1)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    for source, name in ((reader, "a"), (one, "b"), (reader, "c")):
        build_index(source, tmp_path / name, BuildOptions("IVF32,PQ16x4fsr,Refine(SQ8)"))
    faiss.omp_set_num_threads(threads)
    a, b, c = (ProductIndex.open(tmp_path / name).manifest for name in "abc")
    assert a.fingerprint == c.fingerprint  # one thread: the same bytes
    for name in ("index.faiss", "lists.bin", "lists.npy", "vectors.faiss"):
        assert a.files[name] == b.files[name]


@pytest.mark.parametrize("number", [1, 3])
def test_more_results_than_products_give_each_product_once(tmp_path, number):
    build_index(embed(tmp_path / "e", clustered(number), shards=1), tmp_path / "i")
    index = ProductIndex.open(tmp_path / "i")
    assert index.manifest.meta["factory"] == "Flat"
    assert f"{number} vectors of 32 dimensions are few enough" in index.manifest.meta["reason"]
    hits = index.search(clustered(2, seed=5), 10**9)
    assert hits.rows.shape == (2, number)
    assert sorted(index.ids(hits.rows[0])) == [f"p{i}" for i in range(number)]


@pytest.mark.parametrize("k", [700, 6000, 10**7])
def test_many_results_of_an_approximate_index_are_each_there_once(ivf, queries, k):
    rows = ivf.search(queries[:3], k, nprobe=128).rows
    assert rows.shape == (3, min(k, 6000))
    assert (np.diff(np.sort(rows, axis=1), axis=1) > 0).all() and rows.min() >= 0


def test_too_few_probed_products_are_minus_one_and_have_no_id(tmp_path, reader, queries):
    build_index(reader, tmp_path / "i", BuildOptions("IVF128,Flat"))
    index = ProductIndex.open(tmp_path / "i")
    hits = index.search(queries, 500, nprobe=1)
    missing = hits.rows < 0
    assert missing.any() and np.isneginf(hits.scores[missing]).all()
    ids = index.ids(hits.rows)
    assert (ids[missing] == None).all() and (ids[~missing] != None).all()  # noqa: E711
    with pytest.raises(ValueError, match="rows from -2 to 0; expected -1 to 5999"):
        index.ids(np.array([-2, 0]))
    with pytest.raises(ValueError, match="rows from 6000 to 6000"):
        index.ids(np.array([6000]))


@pytest.mark.parametrize(
    "same",
    [
        lambda v: v.astype(np.float64),
        np.asfortranarray,
        lambda v: np.repeat(v, 2, axis=0)[::2],
        lambda v: np.repeat(v, 2, axis=1)[:, ::2],
        lambda v: v[::-1].copy()[::-1],
        lambda v: v.tolist(),
        lambda v: tuple(map(tuple, v.tolist())),
    ],
    ids=[
        "float64",
        "Fortran order",
        "every other row",
        "every other column",
        "backwards",
        "lists",
        "tuples",
    ],
)
@pytest.mark.parametrize("which", ["flat", "ivf"])
def test_memory_order_and_type_of_queries_do_not_matter(request, queries, which, same):
    index = request.getfixturevalue(which)
    wanted, hits = index.search(queries, 10), index.search(same(queries), 10)
    assert np.array_equal(hits.rows, wanted.rows) and np.array_equal(hits.scores, wanted.scores)


def test_vectors_of_mixed_lengths_find_themselves_once_they_are_normalized(tmp_path):
    """By inner product of vectors as they are, long ones win."""
    vectors = clustered(1000) * np.random.default_rng(0).uniform(0.1, 10, (1000, 1))
    np.save(tmp_path / "v.npy", vectors)
    (tmp_path / "ids.txt").write_text("".join(f"{i}\n" for i in range(1000)))
    with pytest.raises(
        ValueError, match=r"has length .* cosine needs 1: normalize \(--normalize\)"
    ):
        build_index(EmbeddingReader(tmp_path / "v.npy", ids=tmp_path / "ids.txt"), tmp_path / "i")
    reader = EmbeddingReader(tmp_path / "v.npy", ids=tmp_path / "ids.txt", normalize=True)
    for factory in ("Flat", "IVF16,PQ8x4fsr,Refine(SQfp16)"):
        build_index(reader, tmp_path / factory, BuildOptions(factory))
        index = ProductIndex.open(tmp_path / factory)
        rows = index.search(unit(vectors), 1, settings=index.resolve(index.engine.lists, 50)).rows[
            :, 0
        ]
        assert (rows == np.arange(1000)).all()
    as_they_are = EmbeddingReader(
        tmp_path / "v.npy", ids=tmp_path / "ids.txt", metric="inner_product"
    )
    build_index(as_they_are, tmp_path / "long", BuildOptions("Flat"))
    assert (
        ProductIndex.open(tmp_path / "long").search(vectors, 1).rows[:, 0] == np.arange(1000)
    ).mean() < 0.7


def test_fifty_one_products_are_too_few_for_sixty_four_lists(tmp_path):
    reader = embed(tmp_path / "e", clustered(51), 1)
    for factory in ("IVF64,PQ8", "IVF64,Flat", "IVF64,PQ8x4fsr,Refine(SQ8)"):
        with pytest.raises(
            ValueError,
            match=r"at least 64 training .* has 51: at most IVF51, well trained IVF1; or Fl",
        ):
            build_index(reader, tmp_path / "i", BuildOptions(factory))
    assert os.listdir(tmp_path) == ["e"]
    build_index(reader, tmp_path / "i")
    index = ProductIndex.open(tmp_path / "i")
    assert index.manifest.meta["factory"] == "Flat"
    assert np.array_equal(index.search(clustered(51), 1).rows[:, 0], np.arange(51))


def bad_queries():
    good = clustered(2, seed=3)
    return {
        "shape": (good[:, :16], r"queries: shape \(2, 16\); expected \(B, 32\)"),
        "flat": (good[0], r"shape \(32,\)"),
        "dtype": (np.ones((1, DIM), np.int64), r"dtype int64"),
        "nan": (
            np.where(np.arange(DIM) == 3, np.nan, good),
            r"row 0 holds NaN or infinity; 2 of 2 rows",
        ),
        "zero": (good * [[1], [0]], r"row 1 is a zero vector"),
        "norm": (good * 2, r"row 0 has length 2, cosine needs 1"),
    }


@pytest.mark.parametrize("case", bad_queries())
def test_faulty_queries_never_reach_faiss(ivf, case):
    wrong, message = bad_queries()[case]
    with pytest.raises(ValueError, match=message):
        ivf.search(wrong, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"k=0; expected an integer of at least 1"),
        ({"k": -1}, r"k=-1"),
        ({"k": 1.5}, r"k=1\.5"),
        ({"k": "10"}, r"k='10'"),
        ({"k": None}, r"k=None"),
        ({"k": True}, r"k=True"),
        ({"nprobe": 0}, r"nprobe=0; expected an integer from 1 to 128"),
        ({"nprobe": 129}, r"nprobe=129; expected an integer from 1 to 128, the number of lists"),
        ({"nprobe": 2.0}, r"nprobe=2\.0"),
    ],
)
def test_faulty_arguments_are_refused(ivf, queries, options, message):
    with pytest.raises(ValueError, match=message):
        ivf.search(queries, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_factor": 0.5}, r"k_factor=0\.5; expected a number of at least 1"),
        ({"k_factor": float("nan")}, r"k_factor=nan"),
    ],
)
def test_faulty_settings_are_refused(ivf, options, message):
    with pytest.raises(ValueError, match=message):
        ivf.resolve(**options)


def test_probing_an_index_without_lists_is_an_error(flat, queries):
    with pytest.raises(ValueError, match="nprobe=4, but this index has no lists"):
        flat.search(queries, 5, nprobe=4)


def test_queries_of_another_model_are_refused_with_both_shown(ivf, tmp_path):
    ivf.check_model("model-a", "q")
    ivf.check_model(None, "q")
    with pytest.raises(ArtefactError, match=r"q is of model model-b, but .* embeddings of model-a"):
        ivf.check_model("model-b", "q")
    build_index(embed(tmp_path / "e", clustered(5), 1, model=None), tmp_path / "i")
    with pytest.raises(ArtefactError, match="of an unknown model"):
        ProductIndex.open(tmp_path / "i").check_model("model-a", "q")


@pytest.mark.parametrize(
    "factory", ["Flat", "IVF32,Flat", "IVF32,SQ8", "IVF32,PQ16x4fsr,Refine(SQ8)"]
)
def test_the_vector_of_a_product_comes_back(tmp_path, reader, stored, factory):
    build_index(reader, tmp_path / "i", BuildOptions(factory))
    index = ProductIndex.open(tmp_path / "i")
    for row in (0, 4321, 5999):
        vector = index.vector_of(f"p{row}")
        assert vector @ stored[row] > 0.999
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match=r"no product 'p6000' among the 6,000"):
        index.vector_of("p6000")


def test_codes_that_give_no_vectors_back_say_so(tmp_path, reader):
    build_index(reader, tmp_path / "i", BuildOptions("IVF32,PQ16x4fsr"))
    with pytest.raises(ValueError, match=r'fast-scan codes.* build with ",Refine\(SQ8\)"'):
        ProductIndex.open(tmp_path / "i").vector_of("p1")


SMALL_AND_LARGER = pytest.mark.parametrize(
    ("count", "factory"), [(10, "Flat"), (700, "IVF8,PQ8x4fsr,Refine(SQ8)")]
)


@SMALL_AND_LARGER
def test_ids_that_appear_twice_stop_the_build_before_anything_is_there(tmp_path, count, factory):
    reader = embed(
        tmp_path / "e", clustered(count), ids=[f"p{i % (count - 1)}" for i in range(count)]
    )
    with pytest.raises(ValueError, match="'p0' 2 times"):
        build_index(reader, tmp_path / "new" / "i", BuildOptions(factory))
    assert os.listdir(tmp_path) == ["e"]


@SMALL_AND_LARGER
def test_faulty_vectors_stop_the_build_and_nothing_is_left(tmp_path, count, factory):
    np.save(tmp_path / "v.npy", np.concatenate([clustered(count - 1), np.full((1, DIM), np.nan)]))
    (tmp_path / "ids.txt").write_text("".join(f"{i}\n" for i in range(count)))
    reader = EmbeddingReader(tmp_path / "v.npy", ids=tmp_path / "ids.txt")
    with pytest.raises(
        ValueError, match=rf"v\.npy: row {count - 1} \(id '{count - 1}'\) holds NaN"
    ):
        build_index(reader, tmp_path / "new" / "i", BuildOptions(factory))
    assert sorted(os.listdir(tmp_path)) == ["ids.txt", "v.npy"]


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            "IVF7000,Flat",
            r"needs at least 7000 training vectors and has 6000: at most IVF6000, well trained "
            r"IVF153",
        ),
        (
            "IVF64,PQ16x13",
            r"needs at least 8192 training vectors for its 13-bit codes and has 6000: at most 12 "
            r"bits",
        ),
        (
            "IVF64,PQ7x4fsr",
            r"does not fit 32 dimensions: .*PQ sizes that fit .*: 1, 2, 4, 8, 16, 32",
        ),
        ("IFV64,Flat", r"factory 'IFV64,Flat' does not fit"),
        ("IDMap,Flat", r"leave IDMap out"),
    ],
)
def test_factory_strings_that_do_not_fit_say_what_would(tmp_path, reader, unread, factory, message):
    with pytest.raises(ValueError, match=message):
        build_index(reader, tmp_path / "i", BuildOptions(factory))
    assert os.listdir(tmp_path) == []


@pytest.fixture
def unread(monkeypatch):
    """Whoever reads embeddings fails: neither ids nor vectors."""
    for name in ("ids", "part_batches"):
        monkeypatch.setattr(EmbeddingReader, name, lambda *_: pytest.fail("embeddings were read"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BuildOptions("IVF64,PQ8x4fsr", nprobe=65), r"nprobe=65; expected an integer from 1 to 64"),
        (BuildOptions("IVF64,Flat", nprobe=0), r"nprobe=0; expected an integer from 1 to 64"),
        (BuildOptions("Flat", nprobe=1), r"nprobe=1, but this index has no lists"),
        (BuildOptions(k_factor=0.5), r"k_factor=0\.5; expected a number of at least 1"),
        (BuildOptions(nprobe=4, train_sample=0), r"train_sample=0; expected at least 1"),
        (
            BuildOptions("IVF64,PQ8x4fsr", train_sample=100, strict=True),
            r"under-trained: 100 .* for 64 lists, .*strict",
        ),
        (
            BuildOptions("IVF64,Flat", spill=True),
            r"'IVF64,Flat' has no mapped lists, which spill is for",
        ),
        (BuildOptions(nprobe=4, memory=1 << 20), r"needs about .* of memory, 1\.0 MB is allowed"),
    ],
)
def test_what_cannot_be_is_refused_before_embeddings_are_read(
    tmp_path, reader, unread, options, message
):
    with pytest.raises(ValueError, match=message):
        build_index(reader, tmp_path / "new" / "i", options)
    assert os.listdir(tmp_path) == []


def test_an_under_trained_index_is_reported_and_strict_refuses_it(tmp_path, caplog):
    reader = embed(tmp_path / "e", clustered(300))
    manifest = build_index(reader, tmp_path / "i", BuildOptions("IVF32,PQ8x4fsr"))
    stored = ProductIndex.open(tmp_path / "i").manifest.meta["training"]
    assert stored == manifest.meta["training"]
    assert (stored["vectors"], stored["per_list"]) == (300, 9.38)
    assert (
        "under-trained: 300 training vectors for 32 lists, 9.4 each; 39 are wanted" in caplog.text
    )
    with pytest.raises(ValueError, match=r"under-trained: .*strict"):
        build_index(reader, tmp_path / "j", BuildOptions("IVF32,PQ8x4fsr", strict=True))


def test_training_sees_all_shards_alike(tmp_path):
    count, size = 4000, 1000
    angle = np.linspace(0, np.pi / 2, count)  # a sorted catalogue
    reader = embed(
        tmp_path / "e", np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32), shards=8
    )
    sample = uniform_sample(reader, size, seed=3)
    rows = np.arctan2(sample[:, 1], sample[:, 0]) / (np.pi / 2) * count
    counts = np.histogram(rows, bins=8, range=(0, count))[0]
    assert counts.sum() == size and (np.abs(counts - size / 8) < 5 * np.sqrt(size / 8)).all()
    assert np.array_equal(sample, uniform_sample(reader, size, seed=3))
    assert not np.array_equal(sample, uniform_sample(reader, size, seed=4))
    assert len(np.unique(rows)) > 0.9 * size


def test_every_damaged_file_is_refused_at_open(tmp_path, ivf):
    shutil.copytree(ivf.path, tmp_path / "i")
    generator = np.random.default_rng(0)
    there = sorted((tmp_path / "i" / "versions" / "000001").iterdir())
    assert [file.name for file in there] == [
        "ids.arrow",
        "index.faiss",
        "lists.bin",
        "lists.npy",
        "manifest.json",
        "settings.json",
        "vectors.faiss",
    ]
    for file in [*there, tmp_path / "i" / "CURRENT"]:
        fall_back = (
            file.name != "CURRENT"
        )  # there is no older version to fall back to, but a damaged name may name one
        data = file.read_bytes()
        for offset in generator.integers(0, len(data), 25):
            bit = 1 << int(generator.integers(8))
            file.write_bytes(data[:offset] + bytes([data[offset] ^ bit]) + data[offset + 1 :])
            with pytest.raises(ArtefactError, match=file.name):
                ProductIndex.open(tmp_path / "i", fall_back=fall_back)
        file.write_bytes(data)
    ProductIndex.open(tmp_path / "i")


class Marker:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize(
    "name", ["index.faiss", "ids.arrow", "settings.json", "lists.bin", "lists.npy", "vectors.faiss"]
)
def test_no_code_runs_from_an_index_folder_even_with_right_digests(tmp_path, ivf, name):
    shutil.copytree(ivf.version, tmp_path / "i")
    (tmp_path / "i" / name).write_bytes(pickle.dumps(Marker(str(tmp_path / "marker"))))
    (tmp_path / "i" / "manifest.json").unlink()
    storage.seal(tmp_path / "i", artefact_type="index", meta=ivf.manifest.meta)
    with pytest.raises(ArtefactError, match="cannot be opened"):
        ProductIndex.open(tmp_path / "i")
    assert not (tmp_path / "marker").exists()


def test_files_of_two_indexes_do_not_mix(tmp_path, ivf):
    build_index(
        embed(tmp_path / "e", clustered(800), 1),
        tmp_path / "i",
        BuildOptions("IVF16,PQ8x4fsr,Refine(SQfp16)"),
    )
    small = ProductIndex.open(tmp_path / "i")
    for name, message in (
        ("ids.arrow", r"do not belong together: 800 vectors, 6000 ids"),
        (
            "vectors.faiss",
            r"vectors\.faiss holds 6000 vectors of 32 dimensions, expected 800 of 32",
        ),
        (
            "lists.bin",
            r"lists\.bin has \d+ bytes; 16 lists of 4-byte codes for an index of 16 lists need \d+",
        ),
        ("lists.npy", r"128 lists of 4-byte codes for an index of 16 lists"),
        ("index.faiss", r"16 lists of 4-byte codes for an index of 128 lists"),
    ):
        shutil.copytree(small.version, tmp_path / name)
        shutil.copy(ivf.version / name, tmp_path / name / name)
        (tmp_path / name / "manifest.json").unlink()
        storage.seal(tmp_path / name, artefact_type="index", meta=small.manifest.meta)
        with pytest.raises(ArtefactError, match=message):
            ProductIndex.open(tmp_path / name)


def test_a_full_disk_never_leaves_an_index(tmp_path, reader):
    build_index(embed(tmp_path / "e", clustered(5), 1), tmp_path / "i", BuildOptions("Flat"))
    before = ProductIndex.open(tmp_path / "i").manifest.fingerprint
    program = f"""
        import resource
        from tritower.retrieval.building.build import build_index
        from tritower.retrieval.building.options import BuildOptions
        from tritower.retrieval.vectors.embeddings import EmbeddingReader
        import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        reader = EmbeddingReader({str(reader.source)!r})
        build_index(reader, {str(tmp_path / "i")!r}, BuildOptions("Flat"), overwrite=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "could not be written" in done.stderr or "File too large" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["e", "i"]
    assert sorted(os.listdir(tmp_path / "i" / "versions")) == ["000001"]
    assert ProductIndex.open(tmp_path / "i").manifest.fingerprint == before


@pytest.mark.parametrize("factory", ["Flat", "IVF32,PQ8x4fsr"])
def test_an_index_that_faiss_lost_without_a_word_is_noticed(tmp_path, reader, monkeypatch, factory):
    build_index(embed(tmp_path / "e", clustered(5), 1), tmp_path / "i")
    original = faiss.write_index

    def lose_files(index, writer, *flags):
        if not isinstance(writer, faiss.PyCallbackIOWriter):
            original(index, writer, *flags)

    monkeypatch.setattr(faiss, "write_index", lose_files)
    with pytest.raises(
        ArtefactError, match=r"index\.faiss could not be written|cannot be opened as an index"
    ):
        build_index(reader, tmp_path / "i", BuildOptions(factory), overwrite=True)
    assert os.listdir(tmp_path / "i" / "versions") == ["000001"]
    assert len(ProductIndex.open(tmp_path / "i", fall_back=False)) == 5


def anonymous_growth(index, nprobe):
    """Bytes of memory that are no mapped file.

    What opening once more and visiting all lists adds.
    """
    program = f"""
        import numpy as np
        from tritower.retrieval.index import ProductIndex
        def anonymous():
            lines = open("/proc/self/status").read().splitlines()
            return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])
        first = ProductIndex.open({str(index)!r})
        vectors = np.full((100, first.dim), first.dim ** -0.5, np.float32)
        first.search(vectors, 100, nprobe={nprobe})
        before = anonymous()
        second = ProductIndex.open({str(index)!r})
        second.search(vectors, 100, nprobe={nprobe})
        print(anonymous() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    return 1024 * int(done.stdout)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """100,000 vectors of 64 dimensions."""
    vectors = unit(np.random.default_rng(0).standard_normal((100_000, 64), np.float32))
    return embed(tmp_path_factory.mktemp("large") / "e", vectors, 1)


def test_codes_and_finer_vectors_are_mapped(tmp_path, large):
    build_index(
        large, tmp_path / "i", BuildOptions("IVF256,PQ16x4fsr,Refine(SQ8)", train_sample=10_000)
    )
    version = ProductIndex.open(tmp_path / "i").version
    codes_and_rows, refine, centroids = large.count * (16 // 2 + 8), large.count * 64, 256 * 64 * 4
    assert (version / "lists.bin").stat().st_size >= codes_and_rows
    assert (version / "vectors.faiss").stat().st_size >= refine
    assert (version / "index.faiss").stat().st_size < 2 * centroids
    grown = anonymous_growth(tmp_path / "i", nprobe=256)
    assert grown < 15 * large.count + 2 * centroids
    assert grown < 0.5 * codes_and_rows + 2 * centroids + (1 << 20)


def test_of_an_index_in_one_file_codes_alone_are_read_into_memory(tmp_path, large):
    build_index(large, tmp_path / "i", BuildOptions("IVF64,PQ32x4fsr,RFlat", train_sample=4000))
    codes_and_rows, refine = large.count * (32 // 2 + 8), large.count * 64 * 4
    assert (
        ProductIndex.open(tmp_path / "i").version / "index.faiss"
    ).stat().st_size > codes_and_rows + refine
    assert anonymous_growth(tmp_path / "i", nprobe=64) < 1.5 * codes_and_rows + (1 << 20)


def test_threads_search_one_index_with_their_own_settings(ivf, queries):
    wanted = {nprobe: ivf.search(queries, 5, nprobe=nprobe).rows for nprobe in (1, 4, 128)}
    with ThreadPoolExecutor(3) as pool:
        asked = [1, 4, 128] * 10
        for nprobe, hits in zip(
            asked, pool.map(lambda n: ivf.search(queries, 5, nprobe=n), asked), strict=True
        ):
            assert np.array_equal(hits.rows, wanted[nprobe])


def test_checks_do_not_depend_on_assertions(ivf):
    program = f"""
        import numpy as np
        from tritower.retrieval.index import ProductIndex
        from tritower.artefacts.storage import ArtefactError
        assert False, "this runs with assertions off"
        index = ProductIndex.open({str(ivf.path)!r})
        good = np.full((1, {DIM}), {DIM} ** -0.5, np.float32)
        for arguments in ((good[:, :16],), (good * 2,), (good * np.nan,), (good, 0), (good, 5)):
            try:
                index.search(*arguments)
                print("passed")
            except ValueError:
                print("refused")
        try:
            index.search(good, nprobe=1000)
        except ValueError:
            print("refused")
        open(index.version / "settings.json", "ab").write(b" ")
        try:
            ProductIndex.open(index.path)
        except ArtefactError as error:
            print("damaged" if "settings.json" in str(error) else error)
    """
    settings_file = ivf.version / "settings.json"
    before = settings_file.read_bytes()
    try:
        done = subprocess.run(
            [sys.executable, "-O", "-c", textwrap.dedent(program)], capture_output=True, text=True
        )
    finally:
        settings_file.write_bytes(before)
    assert done.stdout.split() == ["refused"] * 4 + ["passed", "refused", "damaged"], done.stderr


def test_build_and_search_by_vector_need_no_torch(tmp_path):
    program = f"""
        import sys, numpy as np
        from tritower.retrieval.building.build import build_index
        from tritower.retrieval.vectors.embeddings import EmbeddingReader, EmbeddingWriter
        from tritower.retrieval.index import ProductIndex
        writer = EmbeddingWriter({str(tmp_path / "e")!r}, dim=2)
        writer.write("s", ["a"], np.array([[0.6, 0.8]])); writer.finish(["s"])
        build_index(EmbeddingReader({str(tmp_path / "e")!r}), {str(tmp_path / "i")!r})
        print(ProductIndex.open({str(tmp_path / "i")!r}).search([[1.0, 0.0]]).scores)
        sys.exit("torch" in sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(min_size=1), unique=True, min_size=1, max_size=12))
def test_any_text_is_an_id_and_comes_back_verbatim(tmp_path_factory, ids):
    folder = tmp_path_factory.mktemp("ids")
    angle = np.linspace(0, 1, len(ids))
    vectors = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    build_index(embed(folder / "e", vectors, 1, ids), folder / "i")
    index = ProductIndex.open(folder / "i")
    assert index.ids(index.search(vectors, 1).rows[:, 0]).tolist() == ids
    for product_id in ids:
        assert ids[index.row_of(product_id)] == product_id
    assert index.id_table.column.to_pylist() == ids


def test_inner_product_keeps_lengths(tmp_path):
    writer = EmbeddingWriter(tmp_path / "e", dim=2, metric="inner_product")
    writer.write("s", ["short", "long"], np.array([[1.0, 0.0], [3.0, 3.0]]))
    writer.finish(["s"])
    build_index(EmbeddingReader(tmp_path / "e"), tmp_path / "i")
    index = ProductIndex.open(tmp_path / "i")
    hits = index.search([[1.0, 0.0]])
    assert index.ids(hits.rows[0]).tolist() == ["long", "short"]
    assert index.vector_of("long").tolist() == [3.0, 3.0]


def test_an_existing_index_is_not_replaced_unasked(tmp_path):
    reader = embed(tmp_path / "e", clustered(4), 1)
    build_index(reader, tmp_path / "i")
    with pytest.raises(ArtefactError, match="already exists"):
        build_index(reader, tmp_path / "i")
    build_index(reader, tmp_path / "i", overwrite=True)
    version = tmp_path / "i" / "versions" / "000002"
    assert json.loads((version / "settings.json").read_text()) == {"nprobe": None, "k_factor": 8.0}


def test_overwriting_publishes_a_new_version_and_keeps_the_old_one(tmp_path):
    build_index(embed(tmp_path / "e", clustered(4), 1), tmp_path / "i")
    old = ProductIndex.open(tmp_path / "i")
    for count in (5, 6):
        build_index(
            embed(tmp_path / f"e{count}", clustered(count), 1), tmp_path / "i", overwrite=True
        )
    assert (tmp_path / "i" / "CURRENT").read_text() == "000003\n"
    new = ProductIndex.open(tmp_path / "i")
    assert (len(old), len(new), new.version.name, new.note) == (4, 6, "000003", "")
    assert len(ProductIndex.open(tmp_path / "i" / "versions" / "000002")) == 5
    assert old.ids(old.search(clustered(4), 1).rows[:, 0]).tolist() == ["p0", "p1", "p2", "p3"]
    assert old.version.is_dir()  # kept beyond the usual two versions as long as somebody reads it
    assert not (tmp_path / "i.building").exists()


@pytest.mark.parametrize("name", ["index.faiss", "ids.arrow", "settings.json", "manifest.json"])
def test_a_damaged_version_is_replaced_by_the_one_before_with_a_warning(tmp_path, caplog, name):
    build_index(embed(tmp_path / "e", clustered(4), 1), tmp_path / "i")
    build_index(embed(tmp_path / "e5", clustered(5), 1), tmp_path / "i", overwrite=True)
    file = tmp_path / "i" / "versions" / "000002" / name
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    index = ProductIndex.open(tmp_path / "i")
    assert (len(index), index.version.name) == (4, "000001")
    assert index.path == tmp_path / "i"
    for text in (index.note, caplog.text):
        assert "version 000001 is used" in text and name in text
    with pytest.raises(ArtefactError, match=name):
        ProductIndex.open(tmp_path / "i", fall_back=False)
    with pytest.raises(ArtefactError, match=name):
        ProductIndex.open(file.parent)
    shutil.copy(file, tmp_path / "i" / "versions" / "000001" / name)
    with pytest.raises(ArtefactError, match=f"{name}.*; .*{name}"):
        ProductIndex.open(tmp_path / "i")
    build_index(
        embed(tmp_path / "e6", clustered(6), 1), tmp_path / "i", overwrite=True
    )  # a new good one heals it
    assert len(ProductIndex.open(tmp_path / "i", fall_back=False)) == 6


@pytest.mark.parametrize("working", [True, False])
def test_k_means_runs_on_a_gpu_where_faiss_sees_one_and_the_stored_index_knows_nothing_of_it(
    tmp_path, reader, stored, queries, monkeypatch, caplog, working
):
    assigned = []

    def to_gpu(flat):
        if not working:
            raise RuntimeError("Error in somewhere at file.cpp:1: out of GPU memory")
        assigned.append(flat)
        return flat

    monkeypatch.setattr(build_module.faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(build_module.faiss, "index_cpu_to_all_gpus", to_gpu)
    manifest = build_index(reader, tmp_path / "i", BuildOptions("IVF32,Flat"))
    assert manifest.meta["training"]["device"] == ("gpu" if working else "cpu")
    assert len(assigned) == working
    assert (
        working
        or "faiss cannot use its GPU (out of GPU memory); training on the CPU" in caplog.text
    )
    hits = ProductIndex.open(tmp_path / "i").search(queries, 10, nprobe=32)
    assert np.array_equal(hits.rows, exact(queries, stored, 10))


def test_publishing_over_an_index_never_fails_a_reader(tmp_path, reader):
    small = embed(tmp_path / "small", clustered(40), 1)
    build_index(small, tmp_path / "i")
    program = f"""
        import sys, time
        from tritower.retrieval.index import ProductIndex
        end, opened = time.time() + 2.5, 0
        print("ready", flush=True)
        while time.time() < end:
            index = ProductIndex.open({str(tmp_path / "i")!r})
            assert len(index) in (40, 6000), len(index)
            opened += 1
        print(opened)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    published = 0
    while process.poll() is None:
        build_index(
            [reader, small][published % 2], tmp_path / "i", BuildOptions("Flat"), overwrite=True
        )
        published += 1
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert published > 3 and int(out) > 10
