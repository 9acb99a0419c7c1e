from __future__ import annotations

import shutil

import numpy as np
import pytest

from tests.support.attribute_rows import table_of
from tritower.artefacts import storage
from tritower.artefacts.storage import ArtefactError
from tritower.retrieval.building.build import build_index
from tritower.retrieval.building.options import BuildOptions
from tritower.retrieval.filtering.filtered_search import FEW_EXCLUDED, Exclusion, FilteredSearch
from tritower.retrieval.filtering.filters import parse
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.ivf.engine import Settings
from tritower.retrieval.updating.update import update_index
from tritower.retrieval.vectors.embeddings import EmbeddingReader, EmbeddingWriter

DIM, COUNT = 16, 2000
QUERY_TYPES = {"price": "number", "brand": "category", "group": "category", "family": "category"}
RNG = np.random.default_rng(0)
PRICES, BRANDS, GROUPS = (
    RNG.uniform(0, 100, COUNT),
    RNG.integers(0, 5, COUNT),
    RNG.integers(-1, 400, COUNT),
)
CENTRES = RNG.standard_normal((400, DIM))
VECTORS = CENTRES[GROUPS] + 0.4 * RNG.standard_normal((COUNT, DIM))
VECTORS = (VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)).astype(np.float32)
QUERIES = VECTORS[:20]
ALIVE = RNG.random(COUNT) < 0.95
THOROUGH = Settings(32, 200.0)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    rows = [
        {
            "id": f"p{row}",
            "price": PRICES[row],
            "brand": f"b{BRANDS[row]}",
            "group": f"g{GROUPS[row]}" if GROUPS[row] >= 0 else None,
            "family": f"f{GROUPS[row] // 40}" if GROUPS[row] >= 0 else None,
        }
        for row in range(COUNT)
    ]
    return table_of(tmp_path_factory.mktemp("t") / "attributes.arrow", rows, QUERY_TYPES)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    root = tmp_path_factory.mktemp("i")
    writer = EmbeddingWriter(root / "e", dim=DIM)
    writer.write("s", [f"p{i}" for i in range(COUNT)], VECTORS)
    writer.finish(["s"])
    build_index(
        EmbeddingReader(root / "e"),
        root / "i",
        BuildOptions("IVF32,PQ8x4fsr,Refine(SQ8)", spill=True),
    )
    return ProductIndex.open(root / "i").engine


@pytest.fixture(params=[-1, 3 << 20], ids=["lists", "one by one"])
def finder(engine, table, request, monkeypatch):
    monkeypatch.setattr("tritower.retrieval.filtering.selection.FEW_BYTES", request.param)
    return FilteredSearch(engine, table, ALIVE)


def naive(engine, query, k, *, allowed=None, without=(), without_groups=False, codes=None):
    """Walk down the ranking of the vectors that the index keeps."""
    vectors = engine.refine.reconstruct_n(0, COUNT)
    banned = {GROUPS[row] for row in without if without_groups and GROUPS[row] >= 0}
    taken, hits = set(), []
    for row in np.argsort(-(vectors @ query), kind="stable"):
        if (
            not ALIVE[row]
            or row in without
            or GROUPS[row] in banned
            or not (allowed is None or allowed[row])
        ):
            continue
        if codes is not None and codes[row] in taken:
            continue
        taken |= {codes[row]} if codes is not None and codes[row] >= 0 else set()
        hits.append(int(row))
    return (hits + [-1] * k)[:k]


CASES = {
    "nothing": ({}, {}),
    "filter": (
        {"filter": parse("price < 30 and brand in (b1, b2)")},
        {"allowed": (PRICES < 30) & np.isin(BRANDS, (1, 2))},
    ),
    "few match": ({"filter": parse("price < 0.2")}, {"allowed": PRICES < 0.2}),
    "rows": ({"exclude": Exclusion(np.arange(5))}, {"without": range(5)}),
    "many rows": (
        {"exclude": Exclusion(np.arange(FEW_EXCLUDED + 1))},
        {"without": range(FEW_EXCLUDED + 1)},
    ),
    "rows and their groups": (
        {"exclude": Exclusion(np.arange(5), groups=True)},
        {"without": range(5), "without_groups": True},
    ),
    "rows and their groups, many": (
        {"exclude": Exclusion(np.arange(90), groups=True)},
        {"without": range(90), "without_groups": True},
    ),
    "one per group": ({"group_by": "group"}, {"codes": GROUPS}),
    "one per family": ({"group_by": "family"}, {"codes": np.where(GROUPS < 0, -1, GROUPS // 40)}),
    "all at once": (
        {
            "filter": parse("price > 20"),
            "exclude": Exclusion(np.arange(7), groups=True),
            "group_by": "group",
        },
        {"allowed": PRICES > 20, "without": range(7), "without_groups": True, "codes": GROUPS},
    ),
    "few match, one per family": (
        {
            "filter": parse("price < 1"),
            "exclude": Exclusion(np.arange(120)),
            "group_by": "family",
        },
        {
            "allowed": PRICES < 1,
            "without": range(120),
            "codes": np.where(GROUPS < 0, -1, GROUPS // 40),
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k", [1, 10, 60])
def test_what_is_found_is_the_ranking_without_what_may_not_be_found(finder, engine, case, k):
    asked, meaning = CASES[case]
    scores, rows = finder.search(QUERIES, k, THOROUGH, **asked)
    for query, its_scores, found in zip(QUERIES, scores, rows, strict=True):
        expected = naive(engine, query, k, **meaning)
        assert [row < 0 for row in found] == [row < 0 for row in expected]
        true_scores = (engine.refine.reconstruct_n(0, COUNT) @ query)[found[found >= 0]]
        assert np.allclose(its_scores[found >= 0], true_scores, atol=1e-6)
        assert len({*found.tolist()} ^ {*expected}) <= (2 if k > 10 else 0)  # ties


def test_deleted_products_are_not_counted(finder):
    assert finder.count(None) == ALIVE.sum()
    assert finder.count(parse("price < 50")) == (ALIVE & (PRICES < 50)).sum()
    assert finder.count(parse("price is missing")) == 0


def test_what_takes_attributes_says_when_there_are_none(engine, tmp_path):
    bare = FilteredSearch(engine, None, None)
    assert (bare.search(QUERIES, 5, THOROUGH, exclude=Exclusion(np.arange(3)))[1] >= 3).all()
    for asked in (
        {"filter": parse("a = b")},
        {"group_by": "group"},
        {"exclude": Exclusion(np.arange(3), groups=True)},
    ):
        with pytest.raises(
            ValueError,
            match="this index holds no attributes of its products: build it with attributes",
        ):
            bare.search(QUERIES, 5, THOROUGH, **asked)
    rows = [{"id": str(row), "price": 1.0} for row in range(COUNT)]
    ungrouped = FilteredSearch(
        engine, table_of(tmp_path / "a.arrow", rows, {"price": "number"}), None
    )
    with pytest.raises(
        ValueError,
        match=r"no attribute 'family' in .*a.arrow; there are price: build the index with",
    ):
        ungrouped.search(QUERIES, 5, THOROUGH, group_by="family")


def test_a_filter_that_does_not_fit_is_refused_each_time(finder):
    for _ in range(2):
        with pytest.raises(ValueError, match="no attribute 'prize'"):
            finder.search(QUERIES, 5, THOROUGH, filter=parse("prize < 5"))


# --- Through an index.


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """An index with the attributes of a CSV file in another order.

    Of which every seventh product was taken out.
    """
    root = tmp_path_factory.mktemp("index")
    writer = EmbeddingWriter(root / "e", dim=DIM)
    writer.write("s", [f"p{row}" for row in range(COUNT)], VECTORS)
    writer.finish(["s"])
    order = np.random.default_rng(3).permutation(COUNT)
    lines = [
        f"p{row},{float(PRICES[row])!r},b{BRANDS[row]},{'' if GROUPS[row] < 0 else GROUPS[row]}"
        for row in order
    ]
    (root / "a.csv").write_text("\n".join(["product_id,price,brand,group_id", *lines]))
    options = BuildOptions("IVF32,PQ8x4fsr,Refine(SQ8)")
    build_index(EmbeddingReader(root / "e"), root / "i", options, attributes=root / "a.csv")
    update_index(root / "i", delete=[f"p{row}" for row in range(0, COUNT, 7)])
    return ProductIndex.open(root / "i")


def test_an_index_finds_what_a_filter_matches(index):
    hits = index.search(QUERIES, 10, filter="price < 30 and brand in (b1, b2)")
    for id in index.ids(hits.rows).ravel():
        row = int(id[1:])
        assert PRICES[row] < 30 and BRANDS[row] in (1, 2) and row % 7
    alive = np.arange(COUNT) % 7 > 0
    assert index.count("price < 30") == (alive & (PRICES < 30)).sum()
    assert (
        index.count(parse("price is missing")) == 0
    )  # the rows of deleted products are no products without a price


@pytest.mark.parametrize("filter", ["price < 0.05", "price < -1", 'brand = "none"'])
def test_fewer_products_than_asked_for_are_all_found(index, filter):
    matching = {
        f"p{row}"
        for row in range(COUNT)
        if row % 7 and PRICES[row] < 0.05 and filter == "price < 0.05"
    }
    hits = index.search(QUERIES, 10, filter=filter)
    assert hits.rows.shape == (len(QUERIES), 10)
    for rows, scores in zip(hits.rows, hits.scores, strict=True):
        assert set(index.ids(rows[rows >= 0])) == matching
        assert np.isneginf(scores[rows < 0]).all()


def test_an_index_leaves_out_products_and_their_groups(index):
    rows = np.array([index.row_of("p1"), index.row_of("p2")])
    hits = index.search(QUERIES, 10, exclude=Exclusion(rows, groups=True), group_by="group")
    groups = [[GROUPS[int(id[1:])] for id in ids] for ids in index.ids(hits.rows)]
    assert {len(found) for found in groups} == {10}
    for found in groups:
        known = [group for group in found if group >= 0]
        assert 0 < len(known) == len(set(known))
        assert not {GROUPS[1], GROUPS[2]} & set(known)


def test_a_filter_on_an_index_is_checked(index):
    with pytest.raises(
        ValueError,
        match=r"filter: no attribute 'color'; there are price, brand, group, at character 1: "
        r"\^color",
    ):
        index.search(QUERIES, 10, filter="color = red")
    with pytest.raises(ValueError, match=r"filter: expected a value, found the end"):
        index.count("price <")


def test_attributes_of_other_rows_are_refused(index, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(index.version, copy)
    table_of(copy / "attributes.arrow", [{"id": "a", "price": 1.0}], {"price": "number"})
    meta = storage.read_manifest(copy).meta
    (copy / "manifest.json").unlink()
    storage.seal(copy, artefact_type="index", meta=meta)
    with pytest.raises(ArtefactError, match=r"do not belong together: 2000 ids, attributes of 1"):
        ProductIndex.open(copy)
