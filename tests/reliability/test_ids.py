"""Whatever text a product is called by, it comes back as it was given, at its own vector."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import DIM, FACTORY, FULL, answers, build, embed, unit_vectors

from tritower.retrieval.bulk import bulk_search
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.vectors.embeddings import EmbeddingReader, EmbeddingWriter

ALIKE = [
    "7",
    "07",
    "007",
    "7.0",
    " 7",
    "7 ",
    "７",
    "é",
    "e\u0301",
    "E\u0301",
    "\0",
    "a\0",
    "a",
    "nan",
    "None",
    "null",
]
ALIKE += [
    "-1",
    "9223372036854775813",
    "9007199254740993",
    "1E5",
    "100000.0",
    "\ufeffa",
    "a\u200d",
    "🦆",
    "\u202ea",
    "a\n",
]
texts = st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40
)  # lone surrogates are not Unicode text
some_ids = st.lists(st.one_of(texts, st.sampled_from(ALIKE)), min_size=1, max_size=40, unique=True)
# The examples are the same in every run: a test that fails now and then would be believed by
# nobody.
thorough = settings(
    max_examples=500 if FULL else 30,
    deadline=None,
    derandomize=not FULL,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@thorough
@given(ids=some_ids, shards=st.integers(1, 3))
def test_any_text_comes_back_verbatim_at_its_own_vector(tmp_path_factory, figures, ids, shards):
    folder = tmp_path_factory.mktemp("ids")
    root = build(
        embed(folder / "e", len(ids), min(shards, len(ids)), ids=ids), folder / "index", "Flat"
    )
    index = ProductIndex.open(root)
    assert index.id_table.column.to_pylist() == ids
    vectors = unit_vectors(len(ids)).astype(np.float16).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert index.ids(index.search(vectors, 1).rows).ravel().tolist() == ids
    assert [index.row_of(product_id) for product_id in ids] == list(range(len(ids)))
    bulk_search(index, EmbeddingReader(folder / "e"), folder / "hits.parquet", k=len(ids))
    hits = pq.read_table(folder / "hits.parquet").to_pydict()
    assert sorted(zip(hits["query_id"], hits["product_id"], strict=True)) == sorted(
        (q, p) for q in ids for p in ids
    )
    figures["T14 ids returned verbatim"] += len(ids)


def test_ids_that_look_alike_stay_apart_in_an_index_with_lists(tmp_path, figures):
    ids = [*ALIKE, *(f"{number:03d}" for number in range(200) if f"{number:03d}" not in ALIKE)]
    index = ProductIndex.open(
        build(embed(tmp_path / "e", len(ids), 3, ids=ids), tmp_path / "index")
    )
    assert index.id_table.column.to_pylist() == ids
    found = index.search(unit_vectors(len(ids)), 1, nprobe=8)
    assert index.ids(found.rows).ravel().tolist() == ids
    figures["T14 ids returned verbatim"] += len(ids)


@pytest.mark.parametrize("factory", [FACTORY, "IVF8,Flat"])
def test_where_fewer_are_found_no_product_stands_in(tmp_path, factory):
    index = ProductIndex.open(build(embed(tmp_path / "e", 200), tmp_path / "index", factory))
    last = index.id_table.column[199].as_py()
    hits = index.search(unit_vectors(20, seed=3), 200, nprobe=1)
    missing = hits.rows < 0
    assert (
        missing.any(axis=1).all()
        and (hits.rows[missing] == -1).all()
        and (hits.scores[missing] == -np.inf).all()
    )
    ids = index.ids(hits.rows)
    assert all(product_id is None for product_id in ids[missing])
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in hits.rows)
    assert (ids == last).sum() == (hits.rows == 199).sum()
    bulk_search(
        index,
        EmbeddingReader(tmp_path / "e"),
        tmp_path / "hits.parquet",
        k=200,
        settings=index.resolve(1),
    )
    written = pq.read_table(tmp_path / "hits.parquet")
    assert len(written) < 200 * 200 and written.column("product_id").null_count == 0


def test_a_row_is_the_place_of_its_id_whatever_order_shards_have(tmp_path):
    ids = [f"{number}" for number in np.random.default_rng(0).permutation(300)]
    root = build(embed(tmp_path / "e", 300, 12, ids=ids), tmp_path / "index")
    assert ProductIndex.open(root).id_table.column.to_pylist() == ids
    assert all(row[0] is not None for row in answers(root)[0])


@pytest.mark.parametrize(
    ("ids", "message"),
    [(["a", ""], "row 1 has no id"), (["a", "b", "a"], "1 ids appear more than once; 'a' 2 times")],
)
def test_ids_that_are_missing_or_repeated_are_refused(tmp_path, ids, message):
    with pytest.raises(ValueError, match=message):
        build(embed(tmp_path / "e", len(ids), ids=ids), tmp_path / "index", "Flat")
    assert not (tmp_path / "index").exists()


def test_text_that_is_no_unicode_is_refused(tmp_path):
    writer = EmbeddingWriter(tmp_path / "e", dim=DIM)
    with pytest.raises(ValueError, match="surrogates not allowed"):
        writer.write("shard-00000", ["\ud800"], unit_vectors(1))


@pytest.mark.parametrize("shape", [(1, DIM // 2), (1, DIM * 2), (DIM,)])
def test_a_query_of_another_dimension_is_refused(tmp_path, shape):
    index = ProductIndex.open(build(embed(tmp_path / "e", 200), tmp_path / "index"))
    query = np.ones(shape, np.float32)
    with pytest.raises(ValueError, match=r"dimension|shape"):
        index.search(query / np.linalg.norm(query), 1)
