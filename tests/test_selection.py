from __future__ import annotations

import threading

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritower.retrieval.building.build import build_index
from tritower.retrieval.building.options import BuildOptions
from tritower.retrieval.filtering import selected_lists, selection
from tritower.retrieval.filtering.selected_lists import SelectedLists, lists_of_rows, stepped
from tritower.retrieval.filtering.selection import CACHED, SelectiveSearch
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.ivf import clustering
from tritower.retrieval.ivf import ivf_pq as mapped
from tritower.retrieval.ivf.engine import Engine, Settings
from tritower.retrieval.vectors.embeddings import EmbeddingReader, EmbeddingWriter

DIM, COUNT = 16, 3000
CLUSTERS = 30


def unit(array):
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


def around(centers, cluster_of, seed):
    return unit(
        centers[cluster_of]
        + 0.25 * np.random.default_rng(seed).standard_normal((len(cluster_of), DIM))
    )


CENTRES = unit(np.random.default_rng(1).standard_normal((CLUSTERS, DIM)))
CLUSTER_OF = np.random.default_rng(2).integers(0, CLUSTERS, COUNT)
VECTORS = around(CENTRES, CLUSTER_OF, 3)
QUERY_CLUSTERS = np.random.default_rng(4).integers(0, CLUSTERS, 60)
QUERIES = around(CENTRES, QUERY_CLUSTERS, 5)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Factory -> opened index of the vectors."""
    root = tmp_path_factory.mktemp("indexes")
    writer = EmbeddingWriter(root / "e", dim=DIM)
    writer.write("s", [f"p{i}" for i in range(COUNT)], VECTORS)
    writer.finish(["s"])
    built = {}

    def make(factory, spill=False):
        if (factory, spill) not in built:
            path = root / str(len(built))
            build_index(EmbeddingReader(root / "e"), path, BuildOptions(factory, spill=spill))
            built[factory, spill] = ProductIndex.open(path)
        return built[factory, spill].engine

    return make


@pytest.fixture
def many(monkeypatch):
    """No selection is so small that its rows are compared one by one."""
    monkeypatch.setattr(selection, "FEW_BYTES", -1)


def stored(engine):
    """(N, D) vectors as the index keeps them."""
    refine = engine.index if engine.refine is None else engine.refine
    return refine.reconstruct_n(0, engine.count)


def brute_force(vectors, mask, queries, k):
    rows = np.flatnonzero(mask)
    scores = queries @ vectors[rows].T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), rows[order]


def recall(found, truth):
    return np.mean(
        [len({*a} & {*b}) / len(b) for a, b in zip(found.tolist(), truth.tolist(), strict=True)]
    )


def check_complete(scores, rows, mask, k):
    """As many different rows of the mask as there are, best first, then nothing."""
    there = min(k, int(mask.sum()))
    assert scores.shape == rows.shape == (len(QUERIES), k)
    assert (rows[:, there:] == -1).all() and np.isneginf(scores[:, there:]).all()
    assert mask[rows[:, :there]].all() and np.isfinite(scores[:, :there]).all()
    assert all(len(set(row)) == there for row in rows[:, :there].tolist())
    assert (np.diff(scores[:, :there], axis=1) <= 0).all()


ATTRIBUTE_TYPES = [
    ("Flat", False),
    ("IVF32,PQ8x4fsr,Refine(SQ8)", False),
    ("IVF32,PQ8x4fsr,Refine(SQ8)", True),
    ("IVF32,PQ8x4fsr,Refine(SQfp16)", False),
    ("IVF32,PQ8x4fsr,Refine(Flat)", False),
    ("IVF32,PQ8x4fsr", False),
    ("IVF32,PQ8x4fsr", True),
    ("IVF32,Flat", False),
    ("PCAR8,IVF32,SQ8", False),
    ("PCAR8,IVF32,PQ4x4fsr,Refine(SQ8)", False),
    ("IVF32_HNSW8,SQ8", False),
    ("HNSW8", False),
    ("SQ8", False),
]


@pytest.mark.parametrize(("factory", "spill"), ATTRIBUTE_TYPES)
@pytest.mark.parametrize("few_bytes", [-1, 3 << 20])
def test_every_selection_gives_as_many_results_as_it_has_rows(
    build, monkeypatch, factory, spill, few_bytes
):
    monkeypatch.setattr(selection, "FEW_BYTES", few_bytes)
    engine = build(factory, spill)
    search, rng = SelectiveSearch(engine), np.random.default_rng(0)
    plain = Settings(1 if engine.lists else None, 1.0)  # a search that does as little as it can
    for size in (0, 1, 2, 9, 10, 11, 30, 300, 1500, 2999, 3000):
        mask = np.zeros(COUNT, bool)
        mask[rng.permutation(COUNT)[:size]] = True
        found = search.search(QUERIES, 10, plain, search.select(mask))
        check_complete(*found, mask, 10)


@pytest.mark.parametrize("k", [1, 40, 400, 3000, 5000])
def test_any_number_of_results(build, many, k):
    search = SelectiveSearch(build("IVF32,PQ8x4fsr,Refine(SQ8)", True))
    mask = np.random.default_rng(0).random(COUNT) < 0.1
    check_complete(*search.search(QUERIES, k, Settings(1, 1.0), search.select(mask)), mask, k)


@pytest.mark.parametrize(("factory", "spill"), ATTRIBUTE_TYPES[:5])
@pytest.mark.parametrize("few_bytes", [-1, 3 << 20])
def test_a_thorough_search_among_some_rows_is_exact(build, monkeypatch, factory, spill, few_bytes):
    monkeypatch.setattr(selection, "FEW_BYTES", few_bytes)
    engine = build(factory, spill)
    search, everything = SelectiveSearch(engine), Settings(engine.lists, 300.0)
    for share in (0.01, 0.2, 0.7, 1):
        mask = np.random.default_rng(0).random(COUNT) < share
        scores, rows = search.search(QUERIES, 10, everything, search.select(mask))
        truth_scores, truth = brute_force(stored(engine), mask, QUERIES, 10)
        assert np.allclose(scores, truth_scores, atol=1e-5)
        assert recall(rows, truth) > 0.999  # ties


def test_rows_that_are_compared_one_by_one_are_found_by_the_worst_settings(build):
    engine = build("IVF32,PQ8x4fsr,Refine(SQ8)")
    search, mask = SelectiveSearch(engine), np.random.default_rng(0).random(COUNT) < 0.5
    rows = search.search(QUERIES, 10, Settings(1, 1.0), search.select(mask))[1]
    assert np.array_equal(rows, brute_force(stored(engine), mask, QUERIES, 10)[1])


def masks():
    rng = np.random.default_rng(7)
    towards = VECTORS @ CENTRES[0]
    return {
        "random half": rng.random(COUNT) < 0.5,
        "random tenth": rng.random(COUNT) < 0.1,
        "random fiftieth": rng.random(COUNT) < 0.02,
        "one cluster": CLUSTER_OF == 3,
        "three clusters": CLUSTER_OF < 3,
        "half of the clusters": CLUSTER_OF < CLUSTERS // 2,
        "all but three clusters": CLUSTER_OF >= 3,
        "one side": towards > np.quantile(towards, 0.8),
        "the other side": towards < np.quantile(towards, 0.2),
        "three clusters and strays": (CLUSTER_OF < 3) | (rng.random(COUNT) < 0.02),
    }


@pytest.mark.parametrize(("spill", "compared"), [(False, 6000), (True, 6000), (False, 0)])
@pytest.mark.parametrize("name", masks())
def test_a_selection_keeps_the_recall_of_a_search_among_all(
    build, many, monkeypatch, name, spill, compared
):
    """Also where the rows that may be found are far from the query, asked with the settings that
    suit all rows.
    """
    monkeypatch.setattr(selected_lists, "COMPARED_LISTS", compared)
    engine = build("IVF64,PQ8x4fsr,Refine(SQ8)", spill)
    search, mask = SelectiveSearch(engine), masks()[name]
    everything = np.ones(COUNT, bool)
    truth = brute_force(VECTORS, everything, QUERIES, 10)[1]
    points = (
        Settings(nprobe, k_factor) for k_factor in (2.0, 3.0, 4.0, 8.0) for nprobe in range(1, 65)
    )
    plain = next(
        point for point in points if recall(engine.search(QUERIES, 10, point)[1], truth) >= 0.95
    )
    rows = search.search(QUERIES, 10, plain, search.select(mask))[1]
    assert recall(rows, brute_force(VECTORS, mask, QUERIES, 10)[1]) >= 0.94


@pytest.mark.parametrize("compared", [0, 6000])
def test_a_query_is_answered_alone_as_among_others(build, many, monkeypatch, compared):
    monkeypatch.setattr(selected_lists, "COMPARED_LISTS", compared)
    engine = build("IVF64,PQ8x4fsr,Refine(SQ8)", True)
    search = SelectiveSearch(engine)
    for mask in masks().values():
        chosen = search.select(mask)
        scores, rows = search.search(QUERIES, 10, Settings(4, 4.0), chosen)
        for query, its_scores, its_rows in zip(QUERIES, scores, rows, strict=True):
            alone = search.search(query[None], 10, Settings(4, 4.0), chosen)
            assert np.allclose(alone[0][0], its_scores, atol=1e-6)
            assert recall(alone[1], its_rows[None]) == 1


def test_blocks_of_queries_are_answered_as_one(build, many, monkeypatch):
    search = SelectiveSearch(build("IVF64,PQ8x4fsr,Refine(SQ8)"))
    chosen = search.select(masks()["one side"])
    whole = search.search(QUERIES, 10, Settings(4, 4.0), chosen)
    monkeypatch.setattr(selection, "BLOCK_BYTES", 4 * DIM * 50)
    parts = search.search(QUERIES, 10, Settings(4, 4.0), chosen)
    assert np.array_equal(whole[1], parts[1]) and np.allclose(whole[0], parts[0], atol=1e-6)


@pytest.mark.parametrize("compared", [0, 6000])
@pytest.mark.parametrize(
    "name", ["random half", "one cluster", "half of the clusters", "three clusters and strays"]
)
def test_lists_found_through_groups_give_the_same(tmp_path, monkeypatch, many, name, compared):
    monkeypatch.setattr(selected_lists, "COMPARED_LISTS", compared)
    for module in (clustering, mapped):
        monkeypatch.setattr(module, "FLAT_LISTS", 16)
    writer = EmbeddingWriter(tmp_path / "e", dim=DIM)
    writer.write("s", [f"p{i}" for i in range(COUNT)], VECTORS)
    writer.finish(["s"])
    build_index(
        EmbeddingReader(tmp_path / "e"), tmp_path / "i", BuildOptions("IVF64,PQ8x4fsr,Refine(SQ8)")
    )
    engine = ProductIndex.open(tmp_path / "i").engine
    assert isinstance(faiss.downcast_index(engine.ivf.quantizer), faiss.IndexRefine)
    search, mask = SelectiveSearch(engine), masks()[name]
    chosen = search.select(mask)
    found = search.search(QUERIES, 10, Settings(16, 8.0), chosen)
    check_complete(*found, mask, 10)
    assert recall(found[1], brute_force(VECTORS, mask, QUERIES, 10)[1]) >= 0.94
    alone = [search.search(query[None], 10, Settings(16, 8.0), chosen)[1][0] for query in QUERIES]
    assert recall(np.stack(alone), found[1]) == 1


# --- Which lists.


def test_every_row_stands_in_its_lists(build):
    for spill in (False, True):
        engine = build("IVF32,PQ8x4fsr,Refine(SQ8)", spill)
        lists_of, lists = lists_of_rows(engine), engine.ivf.invlists
        assert lists_of.shape == (1 + spill, COUNT) and lists_of.itemsize == 1
        held = [set() for _ in range(32)]
        for number in range(32):
            if size := lists.list_size(number):
                held[number] = set(faiss.rev_swig_ptr(lists.get_ids(number), size).tolist())
        for row in range(COUNT):
            assert {int(number) for number in lists_of[:, row] if number < 32} == {
                number for number in range(32) if row in held[number]
            }


def lists_for(build, mask):
    engine = build("IVF64,PQ8x4fsr,Refine(SQ8)")
    return engine, SelectedLists(engine.ivf, lists_of_rows(engine), mask)


def test_lists_without_rows_are_passed_over(build):
    engine, lists = lists_for(build, CLUSTER_OF == 3)
    held = {int(number) for number in lists_of_rows(engine)[0, CLUSTER_OF == 3]}
    assert len(held) < 32
    for numbers, scores in (lists.to_visit(QUERIES, 4, 10), lists.all(QUERIES)):
        visited = set(numbers.ravel().tolist()) - {-1}
        assert visited <= held
        assert (
            scores[numbers < 0] == 0
        ).all()  # or what FAISS gives for nothing spoils all other scores
    assert all(set(row) - {-1} == held for row in lists.all(QUERIES)[0].tolist())


def test_a_selection_that_has_nothing_to_do_with_the_vectors_is_told_from_one_that_has(build):
    unrelated = {name: lists_for(build, mask)[1].unrelated for name, mask in masks().items()}
    assert unrelated == {name: name.startswith(("random", "all but")) for name in masks()} | {
        "all but three clusters": unrelated["all but three clusters"]
    }


def test_half_of_the_rows_cost_a_root_of_two_as_many_lists(build):
    _, lists = lists_for(build, masks()["random half"])
    assert lists.to_visit(QUERIES, 10, 10)[0].shape[1] == stepped(10 / np.sqrt(0.5))
    _, lists = lists_for(build, np.ones(COUNT, bool))
    assert lists.to_visit(QUERIES, 10, 10)[0].shape[1] == stepped(10)


@given(st.integers(1, 10**6))
def test_numbers_of_lists_are_rounded_up_to_few(number):
    assert number <= stepped(number) <= np.ceil(number * 1.25)


@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize(
    ("name", "times"), [("random half", 1), ("one side", 4), ("three clusters and strays", 4)]
)
def test_candidates_that_codes_hardly_tell_apart_are_more(
    build, many, monkeypatch, name, times, spill
):
    """Ten candidates per result, of rows that may be found.

    Rows in two lists are met more often.
    """
    search, widths, scan = (
        SelectiveSearch(build("IVF64,PQ8x4fsr,Refine(SQ8)", spill)),
        [],
        SelectiveSearch._scan,
    )
    monkeypatch.setattr(
        SelectiveSearch, "_scan", lambda *args: widths.append(args[4]) or scan(*args)
    )
    chosen = search.select(masks()[name])
    for k in (5, 10, 20, 1000):
        search.search(QUERIES, k, Settings(4, 10.0), chosen)
    wanted = [
        min(width, chosen.count) for width in (times * 100, times * 100, times * 200, chosen.count)
    ]
    assert [*dict.fromkeys(widths)] == [
        *dict.fromkeys(np.ceil(width * (1.5 if spill else 1)) for width in wanted)
    ]


# --- Selections.


def test_rows_without_a_product_are_never_found(build, many):
    engine = build("IVF32,PQ8x4fsr,Refine(SQ8)")
    alive = np.random.default_rng(0).random(COUNT) < 0.6
    search = SelectiveSearch(engine, alive)
    for mask in (None, np.ones(COUNT, bool), np.random.default_rng(1).random(COUNT) < 0.3):
        chosen = search.select(mask)
        wanted = alive if mask is None else alive & mask
        assert chosen.count == wanted.sum()
        assert np.array_equal(chosen.mask, wanted)
        check_complete(*search.search(QUERIES, 10, Settings(4, 2.0), chosen), wanted, 10)


def test_a_mask_of_other_rows_is_refused(build):
    with pytest.raises(ValueError, match=r"mask of shape \(5,\); expected \(3000,\)"):
        SelectiveSearch(build("Flat")).select(np.ones(5, bool))


def test_no_queries_have_no_results(build):
    search = SelectiveSearch(build("IVF32,PQ8x4fsr,Refine(SQ8)"))
    scores, rows = search.search(QUERIES[:0], 10, Settings(4, 2.0), search.select())
    assert scores.shape == rows.shape == (0, 10)


def test_an_index_that_gives_nothing_back_says_so(build):
    class Silent:
        d = DIM

        def reconstruct_batch(self, rows):
            raise RuntimeError("reconstruct not implemented for this type of index")

    search = SelectiveSearch(Engine(faiss.IndexLSH(DIM, 8), COUNT))
    search.engine.index = Silent()
    with pytest.raises(
        ValueError, match=r"cannot search among some rows only, .* \(reconstruct not implemented"
    ):
        search.search(QUERIES, 10, Settings(None), search.select(np.arange(COUNT) < 100))


def test_a_named_selection_is_made_once_and_kept_for_some_time(build):
    search, made = SelectiveSearch(build("Flat")), []

    def make(name):
        made.append(name)
        return np.arange(COUNT) % CLUSTERS == name

    first = search.remembered("0", lambda: make(0))
    assert search.remembered("0", lambda: make(0)) is first
    assert made == [0]
    for name in range(1, CACHED + 1):
        search.remembered(str(name), lambda name=name: make(name))
        search.remembered("1", lambda: make(1))  # what is used stays
    assert made == [*range(CACHED + 1)]
    assert search.remembered("1", lambda: make(1)).count == COUNT // CLUSTERS
    search.remembered("0", lambda: make(0))
    assert made == [*range(CACHED + 1), 0]


def test_threads_search_one_selection(build, many):
    search = SelectiveSearch(build("IVF64,PQ8x4fsr,Refine(SQ8)"))
    chosen = {name: search.select(mask) for name, mask in masks().items()}
    expected = {
        name: SelectiveSearch(search.engine)
        .search(QUERIES, 10, Settings(4, 4.0), search.select(mask))[1]
        .tolist()
        for name, mask in masks().items()
    }
    wrong = []

    def ask():
        for name in chosen:
            if (
                search.search(QUERIES, 10, Settings(4, 4.0), chosen[name])[1].tolist()
                != expected[name]
            ):
                wrong.append(name)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_mask_and_settings(build, data):
    engine = build("IVF64,PQ8x4fsr,Refine(SQ8)", data.draw(st.booleans()))
    search = SelectiveSearch(engine)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    mask = rng.random(COUNT) < data.draw(st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.5, 0.99, 1.0]))
    mask &= np.isin(CLUSTER_OF, rng.permutation(CLUSTERS)[: data.draw(st.integers(1, CLUSTERS))])
    k = data.draw(st.integers(1, 50))
    plain = Settings(data.draw(st.integers(1, 64)), data.draw(st.floats(1, 20)))
    few_bytes, selection.FEW_BYTES = (
        selection.FEW_BYTES,
        data.draw(st.sampled_from([-1, 500, 5000])),
    )
    try:
        check_complete(*search.search(QUERIES, k, plain, search.select(mask)), mask, k)
    finally:
        selection.FEW_BYTES = few_bytes
