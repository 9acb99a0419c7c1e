"""Judged queries as questions: a product that asks is no answer to itself, whatever was judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.support.catalogues import write_catalogue
from tests.support.embedded import DIM, unit, write_embeddings
from tritower.retrieval.building.build import build_index
from tritower.retrieval.building.options import BuildOptions
from tritower.retrieval.evaluating.evaluate import evaluate
from tritower.retrieval.evaluating.judgements import make_evaluation_queries
from tritower.retrieval.evaluating.search_tasks import EvaluationOptions
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.products.catalogue import PreparedCatalogue
from tritower.retrieval.vectors.embeddings import EmbeddingReader, EmbeddingWriter


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalogue with its embeddings and an exact index."""
    root = tmp_path_factory.mktemp("judgements")
    write_catalogue(root / "catalogue", num_groups=60)
    write_embeddings(root / "catalogue", root / "embeddings")
    build_index(
        EmbeddingReader(root / "embeddings" / "products"), root / "index", BuildOptions("Flat")
    )
    return root


def report_of(root: Path, qrels: Path | None = None) -> dict:
    return evaluate(
        ProductIndex.open(root / "index"),
        *(EmbeddingReader(root / "embeddings" / name) for name in ("products", "queries")),
        catalogue=PreparedCatalogue(root / "catalogue"),
        qrels=qrels,
        options=EvaluationOptions(split="test", latency_queries=0),
    ).report


@pytest.fixture(scope="module")
def expected(root: Path) -> dict:
    """The report without judgements of the products that ask for themselves."""
    return report_of(root)


def asking_products(root: Path) -> pa.Table:
    """The queries that are products."""
    queries = PreparedCatalogue(root / "catalogue").queries()
    return queries.filter(pc.is_valid(queries["source_product_id"]))


@pytest.mark.parametrize("grade", [1.0, 3.0, 9.0])
def test_a_judgement_of_the_asked_product_itself_changes_no_figure(
    root: Path, expected: dict, tmp_path: Path, grade: float
) -> None:
    """Whatever its grade: it is neither relevant, nor a gain, nor does it raise what counts as
    relevant.
    """
    qrels, asks = PreparedCatalogue(root / "catalogue").qrels(), asking_products(root)
    own = {
        "query_id": asks["query_id"],
        "product_id": asks["source_product_id"],
        "relevance": [grade] * len(asks),
    }
    pq.write_table(pa.concat_tables([pa.table(own), qrels]), tmp_path / "qrels.parquet")
    found = report_of(root, tmp_path / "qrels.parquet")
    assert (
        expected["queries"]["product:text"]["count"] == 4 and expected["settings"]["threshold"] == 3
    )
    assert (
        expected["tasks"]["exact"]["product:text"] and expected["baselines"]["bm25"]["product:text"]
    )
    assert found == expected


def test_a_query_of_which_the_asked_product_alone_is_judged_is_dropped(
    root: Path, tmp_path: Path
) -> None:
    qrels, asks = PreparedCatalogue(root / "catalogue").qrels(), asking_products(root)
    asks = asks.filter(pc.equal(asks["split"], "test"))
    own = {
        "query_id": asks["query_id"][:1],
        "product_id": asks["source_product_id"][:1],
        "relevance": [3.0],
    }
    others = qrels.filter(pc.not_equal(qrels["query_id"], asks["query_id"][0]))
    pq.write_table(pa.concat_tables([pa.table(own), others]), tmp_path / "qrels.parquet")
    found = report_of(root, tmp_path / "qrels.parquet")
    assert found["queries"]["product:text"] == {"count": 3, "dropped": 1}
    assert found["dropped_queries"] == 1


def test_the_asked_product_is_no_answer_where_the_index_lacks_it(tmp_path: Path) -> None:
    """As one that was taken out since.

    It is not among the judged products that are never found, either.
    """
    products = EmbeddingWriter(tmp_path / "products", dim=DIM)
    products.write("s", ["p1", "p2"], unit(np.eye(2, DIM)))
    products.finish(["s"])
    build_index(EmbeddingReader(tmp_path / "products"), tmp_path / "index", BuildOptions("Flat"))
    queries = EmbeddingWriter(tmp_path / "queries", dim=DIM, id_column="query_id")
    queries.write("s", ["q", "alone"], unit(np.eye(2, DIM)), ["fused", "fused"])
    queries.finish(["s"])
    questions = make_evaluation_queries(
        EmbeddingReader(tmp_path / "queries"),
        pa.table(
            {
                "query_id": ["q", "q", "alone"],
                "product_id": ["gone", "p2", "gone"],
                "relevance": [1.0] * 3,
            }
        ),
        ProductIndex.open(tmp_path / "index"),
        queries=pa.table({"query_id": ["q", "alone"], "source_product_id": ["gone", "gone"]}),
    )
    assert questions.ids.tolist() == ["q"]
    assert (questions.relevant.tolist(), questions.judged.tolist(), questions.grades.tolist()) == (
        [[1]],
        [[1]],
        [[1]],
    )
    assert (questions.dropped, questions.dropped_queries, questions.unknown) == ({"fused": 1}, 1, 0)
