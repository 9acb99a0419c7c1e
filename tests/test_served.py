"""What `evaluate` measures is what searches serve, and no ranking finds the product that asks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.catalogues import write_catalogue
from tests.support.embedded import DIM, unit, write_embeddings
from tritower.retrieval.building.build import Recipe, build_index
from tritower.retrieval.evaluating.evaluate import Evaluation, Options, evaluate
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.ivf.operating_points import Point, Tuning
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
        options=Options(split=split, latency_queries=0),
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
    build_index(products, tmp_path / "index", Recipe("IVF8,PQ8x4fsr,Refine(SQ8)"))
    index = ProductIndex.open(tmp_path / "index")
    kinds = ["text", "image", "fused", "product:text"]
    points = {
        kind: [Point(nprobe, 1.0, recall=0.9)]
        for nprobe, kind in zip((1, 2, 4, 8), kinds, strict=True)
    }
    index.tuning = Tuning(10, points, dict.fromkeys(kinds, 100))
    index.manifest.meta["target"] = {"recall": 0.9}
    result = evaluated(tmp_path, index, "test")
    questions, served = result.questions, result.found["ann"]
    assert set(kinds) <= set(questions.all_kinds)
    for kind in kinds:
        of = questions.of_kind(kind)
        source, first = questions.source[of], served[of, :10].tolist()

        def search(
            k: int, kind: str, of: np.ndarray = of, source: np.ndarray = source
        ) -> list[list[int]]:
            rows = index.search(
                questions.vectors[of], k, settings=index.resolve(kind=kind)
            ).rows.tolist()
            kept = [
                [row for row in some if row not in (own, -1)]
                for some, own in zip(rows, source, strict=True)
            ]
            return [(some + [-1] * 10)[:10] for some in kept]

        asks = kind in ("fused", "product:text")  # the others are typed or photos
        assert ((source >= 0) == asks).all()
        assert first == search(11 if asks else 10, kind)
        assert first != search(10 if asks else 11, kind)
        assert first != search(100, kind), "a deeper search ranks more candidates again"
        assert all(first != search(11 if asks else 10, other) for other in kinds if other != kind)
        assert result.report["settings"]["by_kind"][kind] == points[kind][0].settings._asdict()


def write_alike(root: Path) -> None:
    """Thirty things of two offers.

    The words find a thing's other offer alone, vectors also one of its neighbour.

    An asked product is nearest to itself, then to its other offer, then to the first offer of the
    neighbouring thing.
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
    build_index(EmbeddingReader(root / "embeddings" / "products"), root / "index", Recipe("Flat"))


def test_no_ranking_beside_the_index_finds_the_asked_product(tmp_path: Path) -> None:
    """Relevant are the other offer and the neighbour:

    only the asked product could come before or between them.
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
    for name, kinds in result["baselines"].items():
        figures = {metric: figure["value"] for metric, figure in kinds["product:text"].items()}
        assert figures["hit@1"] == figures["mrr"] == 1, name
        assert figures["map"] == (1 if name == "hybrid" else 0.5), name
