import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritower.artefacts.storage import ArtefactError
from tritower.retrieval.building.build import build_index
from tritower.retrieval.building.options import BuildOptions
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.ivf import engine as engine_module
from tritower.retrieval.ivf.engine import Engine, Settings, drop_repeated_rows, lists_of
from tritower.retrieval.ranking.hits import Hits
from tritower.retrieval.vectors.embeddings import EmbeddingReader, EmbeddingWriter

DIM = 16


def unit(count, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Factory -> engine of an index of 1,000 vectors."""
    root = tmp_path_factory.mktemp("engines")
    writer = EmbeddingWriter(root / "e", dim=DIM)
    writer.write("s", [f"p{i}" for i in range(1000)], unit(1000))
    writer.finish(["s"])
    built = {}

    def make(factory, spill=False):
        name = f"{factory}{spill}"
        if name not in built:
            build_index(
                EmbeddingReader(root / "e"), root / name, BuildOptions(factory, spill=spill)
            )
            built[name] = ProductIndex.open(root / name)
        return built[name].engine

    return make


def test_the_first_of_each_by_hand():
    rows = np.array([[5, 3, 5, 7, 3, 9], [1, 1, -1, -1, -1, -1], [2, 4, 6, 8, 0, 1]])
    scores = np.array([[6, 5, 4, 3, 2, 1]] * 3, np.float32)
    first, found = drop_repeated_rows(Hits(scores, rows), 3, adjacent=False)
    assert found.tolist() == [[5, 3, 7], [1, -1, -1], [2, 4, 6]]
    assert first[0].tolist() == [6, 5, 3] and first[1, 0] == 6 and first[2].tolist() == [6, 5, 4]
    every = drop_repeated_rows(Hits(scores, rows), 6, adjacent=False)[1].tolist()
    assert every == [[5, 3, 7, 9, -1, -1], [1, *[-1] * 5], [2, 4, 6, 8, 0, 1]]


@given(
    st.lists(st.lists(st.integers(-1, 6), min_size=8, max_size=8), min_size=1, max_size=5),
    st.integers(1, 8),
)
def test_the_first_of_each_keeps_order_and_pads(rows, k):
    scores = np.tile(np.arange(8, 0, -1, dtype=np.float32), (len(rows), 1))
    first, found = drop_repeated_rows(Hits(scores, np.array(rows)), k, adjacent=False)
    for given_rows, got, its_scores in zip(rows, found.tolist(), first.tolist(), strict=True):
        distinct = list(dict.fromkeys(row for row in given_rows if row >= 0))[:k]
        assert [row for row in got if row >= 0] == distinct
        assert [score for row, score in zip(got, its_scores, strict=True) if row >= 0] == [
            8 - given_rows.index(row) for row in distinct
        ]
        assert len(got) == k


@given(
    st.lists(st.integers(0, 2), min_size=7, max_size=7),
    st.lists(st.integers(0, 6), max_size=10),
    st.randoms(),
)
def test_rows_that_score_the_same_wherever_they_are_found_are_told_apart_by_a_shorter_way(
    score_of, rows, random
):
    """Ties among different rows stand in any order."""
    random.shuffle(rows)
    rows = np.array([[*sorted(rows, key=lambda row: -score_of[row]), -1, -1]])
    scores = np.array([[score_of[row] if row >= 0 else -9 for row in rows[0]]], np.float32)
    for k in (1, 3, rows.shape[1]):
        short, general = (
            drop_repeated_rows(Hits(scores, rows), k, adjacent=beside) for beside in (True, False)
        )
        assert np.array_equal(short[0], general[0]) and np.array_equal(short[1], general[1])


@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize("k", [1, 100, 900, 1000])
def test_no_more_candidates_than_rows_are_asked_for(build, monkeypatch, spill, k):
    engine, asked = build("IVF16,PQ4x4fsr,Refine(SQ8)", spill), []
    original = engine_module._parameters_of

    def watch(index, settings, selector):
        asked.append(settings.k_factor)
        return original(index, settings, selector)

    monkeypatch.setattr(engine_module, "_parameters_of", watch)
    engine._parameters.clear()
    rows = engine.search(unit(3, 5), k, Settings(16, 50.0))[1]
    assert (rows >= 0).all() and (np.diff(np.sort(rows, axis=1), axis=1) > 0).all()
    copies = 1.5 if spill else 1  # candidates per candidate, where a row may be met twice
    candidates = asked[0] * k * (1 + spill)
    assert candidates == pytest.approx(max(k * (1 + spill), min(50 * max(k, 10), 1000) * copies))


def test_too_few_are_padded_with_minus_infinity_and_minus_one(build):
    for factory, spill in (
        ("IVF16,PQ4x4fsr,Refine(SQ8)", False),
        ("IVF16,PQ4x4fsr", True),
        ("IVF16,Flat", False),
    ):
        scores, rows = build(factory, spill).search(unit(20, 5), 700, Settings(1, 8.0))
        missing = rows < 0
        assert missing[:, -1].all() and not missing[:, 0].any()
        assert np.isneginf(scores[missing]).all() and np.isfinite(scores[~missing]).all()
        assert (rows[missing] == -1).all()
        assert (np.diff(missing.astype(int), axis=1) >= 0).all()  # at the end


@pytest.mark.parametrize(
    ("factory", "spill"),
    [
        ("Flat", False),
        ("IVF16,Flat", False),
        ("PCAR8,IVF16,Flat", False),
        ("IVF16,PQ4x4fsr,Refine(SQ8)", False),
        ("IVF16,PQ4x4fsr,Refine(SQ8)", True),
        ("IVF16,PQ4x4fsr", True),
        ("IVF16,SQ8", False),
    ],
)
def test_a_selector_reaches_every_layer(build, factory, spill):
    engine = build(factory, spill)
    wanted = np.arange(0, 1000, 13)
    settings = Settings(16 if engine.lists else None, 8.0)
    selector = faiss.IDSelectorBatch(wanted)
    scores, rows = engine.search(unit(5, 5), 200, settings, selector)
    for found, its_scores in zip(rows, scores, strict=True):
        assert np.array_equal(np.sort(found[found >= 0]), wanted)
        assert np.isneginf(its_scores[len(wanted) :]).all()
    assert (
        engine.search(unit(5, 5), 200, settings)[1] >= 0
    ).all()  # the selector is not remembered


def test_scores_are_those_of_the_finer_vectors(build):
    engine, queries = build("IVF16,PQ4x4fsr,Refine(SQ8)", True), unit(10, 5)
    scores, rows = engine.search(queries, 10, Settings(16, 20.0))
    vectors = np.stack([[engine.vector(int(row)) for row in found] for found in rows])
    assert np.allclose(scores, np.einsum("qd,qkd->qk", queries, vectors), atol=1e-5)


@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat", "IVF16,PQ4x4fsr,Refine(SQ8)"])
def test_it_knows_its_parts(build, factory):
    engine = build(factory)
    assert engine.lists == (None if factory == "Flat" else 16)
    assert (engine.ivf is None) == (factory == "Flat")
    assert (engine.refine is None) == (factory == "IVF16,Flat")
    assert lists_of(engine.index) is None or lists_of(engine.index).nlist == 16
    assert engine.count == 1000
    assert engine.vector(7) @ unit(1000)[7] > 0.999


@pytest.mark.parametrize(
    ("settings", "lists", "message"),
    [
        (Settings(3), None, r"nprobe=3, but this index has no lists"),
        (Settings(None), 8, r"nprobe=None; expected an integer from 1 to 8"),
        (Settings(9), 8, r"nprobe=9; expected an integer from 1 to 8"),
        (Settings(True), 8, r"nprobe=True"),
        (Settings(1.0), 8, r"nprobe=1\.0"),
        (Settings(1, 0.99), 8, r"k_factor=0\.99; expected a number of at least 1"),
        (Settings(1, float("nan")), 8, r"k_factor=nan"),
    ],
)
def test_settings_that_do_not_suit_are_refused(settings, lists, message):
    with pytest.raises(ValueError, match=message):
        settings.checked(lists)


def test_settings_that_suit_are_kept():
    assert Settings(8, 1).checked(8) == (8, 1) and Settings().checked(None) == (None, 8.0)
    assert Settings(np.int64(3)).checked(8).nprobe == 3


@pytest.mark.parametrize(("rows", "dim"), [(999, DIM), (1000, 8)])
@pytest.mark.parametrize("factory", ["Flat", "IVF16,PQ4x4fsr,Refine(SQ8)"])
def test_files_of_other_sizes_than_the_manifest_says_are_refused(
    build, tmp_path_factory, factory, rows, dim
):
    build(factory)
    folder = (
        next(tmp_path_factory.getbasetemp().glob(f"engines*/{factory}False"))
        / "versions"
        / "000001"
    )
    with pytest.raises(
        ArtefactError, match=rf"manifest {rows} vectors of {dim} dim|expected {rows} of {dim}"
    ):
        Engine.open(folder, {"count": rows, "dim": dim})


@pytest.mark.parametrize("content", [b"null", b"", b"IxFI", b"junk" * 100])
def test_a_file_that_is_no_index_is_refused(tmp_path, content):
    (tmp_path / "index.faiss").write_bytes(content)
    with pytest.raises(ArtefactError, match="cannot be opened as an index"):
        Engine.open(tmp_path, {"count": 10, "dim": 16})
