"""What `evaluate` measures is what searches serve, and no ranking finds the product that asks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.catalogues import write_catalogue
from tests.support.embedded import DIM, unit, write_embeddings
from tritower.retrieval.building.build import build_index
from tritower.retrieval.building.options import BuildOptions
from tritower.retrieval.evaluating.evaluate import Evaluation, evaluate
from tritower.retrieval.evaluating.search_tasks import EvaluationOptions
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.ivf.operating_points import OperatingPoint, Tuning
from tritower.retrieval.products.catalogue import PreparedCatalogue
from tritower.retrieval.vectors.embeddings import EmbeddingReader, EmbeddingWriter


def evaluated(
    root: Path, index: ProductIndex, split: str | None, qrels: Path | None = None
) -> Evaluation:
    return evaluate(
        index,
        *(EmbeddingReader(root / "embeddings" / name) for name in ("products", "queries")),
        catalogue=PreparedCatalogue(root / "catalogue"),
        qrels=qrels,
        options=EvaluationOptions(split=split, latency_queries=0),
    )


def test_the_first_ten_are_those_of_a_search_for_ten_with_the_settings_of_the_kind(
    tmp_path: Path,
) -> None:
    """Typed texts are served by a search for ten.

    A product that asks by one for eleven, without itself.
    """
    write_catalogue(tmp_path / "catalogue", num_groups=200)
    write_embeddings(tmp_path / "catalogue", tmp_path / "embeddings")
    products = EmbeddingReader(tmp_path / "embeddings" / "products")
    build_index(products, tmp_path / "index", BuildOptions("IVF8,PQ8x4fsr,Refine(SQ8)"))
    index = ProductIndex.open(tmp_path / "index")
    query_types = ["text", "image", "fused", "product:text"]
    points = {
        query_type: [OperatingPoint(nprobe, 1.0, recall=0.9)]
        for nprobe, query_type in zip((1, 2, 4, 8), query_types, strict=True)
    }
    index.tuning = Tuning(10, points, dict.fromkeys(query_types, 100))
    index.manifest.meta["target"] = {"recall": 0.9}
    result = evaluated(tmp_path, index, "test")
    questions, served = result.queries, result.rows["ann"]
    assert set(query_types) <= set(questions.distinct_types)
    for query_type in query_types:
        of = questions.positions_of_type(query_type)
        source, first = questions.source[of], served[of, :10].tolist()

        def search(
            k: int, query_type: str, of: np.ndarray = of, source: np.ndarray = source
        ) -> list[list[int]]:
            rows = index.search(
                questions.vectors[of], k, settings=index.resolve(query_type=query_type)
            ).rows.tolist()
            kept = [
                [row for row in some if row not in (own, -1)]
                for some, own in zip(rows, source, strict=True)
            ]
            return [(some + [-1] * 10)[:10] for some in kept]

        asks = query_type in ("fused", "product:text")  # the others are typed or photos
        assert ((source >= 0) == asks).all()
        assert first == search(11 if asks else 10, query_type)
        assert first != search(10 if asks else 11, query_type)
        assert first != search(100, query_type), "a deeper search ranks more candidates again"
        assert all(
            first != search(11 if asks else 10, other)
            for other in query_types
            if other != query_type
        )
        assert (
            result.report["settings"]["by_query_type"][query_type]
            == points[query_type][0].settings._asdict()
        )


def write_alike(root: Path) -> None:
    """Thirty things of two offers.

    The words find a thing's other offer alone, vectors also one of its neighbor.

    An asked product is nearest to itself, then to its other offer, then to the first offer of the
    neighboring thing.
    """
    write_catalogue(root / "catalogue", num_groups=30)
    ids, vectors, asked, asking = [], [], [], []
    for file in sorted((root / "catalogue" / "products").glob("*.parquet")):
        table, rows = pq.read_table(file), []
        for row in table.to_pylist():
            thing, offer = int(row["group"][1:]), int(row["product_id"][-1])
            word = f"zor{chr(97 + thing % 26)}{chr(97 + thing // 26)}k"
            rows.append({**row, "text": {"title": word, "description": None}})
            ids.append(row["product_id"])
            away = (0.10, 0.11)[offer] if thing % 3 == 0 else (0.15, 0.30)[offer]
            vectors.append(np.eye(DIM)[thing // 2] + away * np.eye(DIM)[-1])
            if thing % 3 == 0 and offer == 0:
                asked.append(f"product-{thing}")
                asking.append(vectors[-1])
        pq.write_table(pa.Table.from_pylist(rows, table.schema), file)
    for name, names, rows in (("products", ids, vectors), ("queries", asked, asking)):
        id_column = "product_id" if name == "products" else "query_id"
        writer = EmbeddingWriter(root / "embeddings" / name, dim=DIM, id_column=id_column)
        writer.write(
            "s",
            names,
            unit(np.stack(rows)),
            None if name == "products" else ["product:text"] * len(names),
        )
        writer.finish(["s"])
    build_index(
        EmbeddingReader(root / "embeddings" / "products"), root / "index", BuildOptions("Flat")
    )


def test_no_ranking_beside_the_index_finds_the_asked_product(tmp_path: Path) -> None:
    """Relevant are the other offer and the neighbor.

    Only the asked product could come before or between them.
    """
    write_alike(tmp_path)
    things = range(0, 30, 3)
    relevant = [(f"product-{t}", id) for t in things for id in (f"{t:03d}-1", f"{t ^ 1:03d}-0")]
    columns = dict(
        zip(("query_id", "product_id"), map(list, zip(*relevant, strict=True)), strict=True)
    )
    pq.write_table(pa.table(columns), tmp_path / "qrels.parquet")
    result = evaluated(
        tmp_path, ProductIndex.open(tmp_path / "index"), None, tmp_path / "qrels.parquet"
    ).report
    assert result["queries"] == {"product:text": {"count": 10, "dropped": 0}}
    assert result["tasks"]["exact"]["product:text"]["map"]["value"] == 1
    assert result["baselines"].keys() >= {"bm25", "tfidf", "hybrid"}
    for name, query_types in result["baselines"].items():
        figures = {
            metric: figure["value"] for metric, figure in query_types["product:text"].items()
        }
        assert figures["hit@1"] == figures["mrr"] == 1, name
        assert figures["map"] == (1 if name == "hybrid" else 0.5), name
