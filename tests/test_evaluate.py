import base64
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.support.catalogues import write_catalogue
from tests.support.embedded import DIM, unit, write_embeddings
from tritower.artefacts.storage import ArtefactError
from tritower.retrieval.building.build import build_index
from tritower.retrieval.building.options import BuildOptions
from tritower.retrieval.evaluating import report
from tritower.retrieval.evaluating.comparison_table import below_floor, rows_of_type, terminal_table
from tritower.retrieval.evaluating.evaluate import evaluate
from tritower.retrieval.evaluating.exact import exact_search
from tritower.retrieval.evaluating.gates import failed_gates, index_warnings
from tritower.retrieval.evaluating.judgements import make_evaluation_queries
from tritower.retrieval.evaluating.metric_report import CUTS, ann_vs_exact_metrics, ranking_metrics
from tritower.retrieval.evaluating.search_tasks import EvaluationOptions
from tritower.retrieval.evaluating.untrained_readers import open_tower_features
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.products.catalogue import Card, PreparedCatalogue, read_qrels
from tritower.retrieval.ranking import metrics
from tritower.retrieval.showing.pages import Hit, Section, data_url, facts_of, shown, write_sheet
from tritower.retrieval.vectors.embeddings import EmbeddingReader, EmbeddingWriter

QUICK = EvaluationOptions(split="test", latency_queries=20, untrained=False)
UNTRAINED = EvaluationOptions(split="test", latency_queries=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    write_catalogue(root / "catalogue", num_groups=200)
    write_embeddings(root / "catalogue", root / "embeddings")
    build_index(
        EmbeddingReader(root / "embeddings" / "products"), root / "flat", BuildOptions("Flat")
    )
    build_index(
        EmbeddingReader(root / "embeddings" / "products"),
        root / "ivf",
        BuildOptions("IVF8,PQ8x4fsr,Refine(SQ8)", nprobe=2),
    )
    return root


def measured(folders, index="ivf", options=QUICK, **changes):
    parts = {
        "index": ProductIndex.open(folders / index),
        "products": EmbeddingReader(folders / "embeddings" / "products"),
        "queries": EmbeddingReader(folders / "embeddings" / "queries"),
        "catalogue": PreparedCatalogue(folders / "catalogue"),
    }
    return evaluate(**{**parts, **changes}, options=options)


def by_hand(folders, query_type):
    """hit@10, recall@10 and nDCG@10 of exact search for one query type, in plain Python."""
    products = {}
    for batch in EmbeddingReader(folders / "embeddings" / "products").batches():
        products.update(zip(batch.ids.to_pylist(), batch.vectors, strict=True))
    catalogue = PreparedCatalogue(folders / "catalogue")
    table = catalogue.queries().filter(pc.equal(catalogue.queries()["split"], "test")).to_pylist()
    source = {row["query_id"]: row["source_product_id"] for row in table}
    grades = {}
    for row in catalogue.qrels().to_pylist():
        grades.setdefault(row["query_id"], {})[row["product_id"]] = row["relevance"]
    figures = []
    (batch,) = EmbeddingReader(folders / "embeddings" / "queries").batches()
    for query_id, its_kind, vector in zip(
        batch.ids.to_pylist(), batch.query_types.to_pylist(), batch.vectors, strict=True
    ):
        if its_kind != query_type or query_id not in source:
            continue
        judged = {p: g for p, g in grades[query_id].items() if p != source[query_id]}
        ranked = sorted(
            (p for p in products if p != source[query_id]),
            key=lambda p: -float(products[p] @ vector),
        )
        relevant = {p for p, g in judged.items() if g >= 3}
        found = len(relevant & set(ranked[:10]))
        discounts = 1 / np.log2(np.arange(2, 12))
        gains = np.array([judged.get(p, 0.0) for p in ranked[:10]])
        ideal = np.array((sorted(judged.values(), reverse=True) + [0.0] * 10)[:10])
        figures.append((found > 0, found / len(relevant), gains @ discounts / (ideal @ discounts)))
    return np.mean(figures, axis=0), len(figures)


def test_the_figures_are_those_computed_by_hand(folders):
    result = measured(folders).report
    assert list(result["queries"]) == [
        "text",
        "image",
        "fused",
        "product:text",
        "product:image",
        "product:attribute",
    ]
    for query_type in result["queries"]:
        wanted, count = by_hand(folders, query_type)
        figures = result["tasks"]["exact"][query_type]
        got = [figures[name]["value"] for name in ("hit@10", "recall@10", "ndcg@10")]
        assert np.allclose(got, wanted, atol=1e-9), query_type
        assert result["queries"][query_type] == {"count": count, "dropped": 0}
        for figure in figures.values():
            assert figure.get("low", 0) <= figure["value"] <= figure.get("high", 1)
    assert "hit@100" in figures and "map" in figures and "best_recall@1" in figures


def test_a_flat_index_equals_the_exact_side(folders):
    result = measured(folders, "flat").report
    assert result["tasks"]["exact"] == result["tasks"]["ann"]
    for figures in result["tasks"]["ann_vs_exact"].values():
        assert all(figures[f"recall@{k}"]["value"] == 1 for k in CUTS)
        assert (
            figures["mrr"]["value"] == figures["map"]["value"] == figures["ndcg@10"]["value"] == 1
        )
    assert result["settings"]["nprobe"] is None


def test_an_approximate_index_is_compared_with_exact_search(folders):
    result = measured(folders).report
    assert result["settings"]["nprobe"] == 2
    assert 0.1 < result["tasks"]["ann_vs_exact"]["text"]["recall@10"]["value"] < 1
    more = measured(folders, options=EvaluationOptions(nprobe=8, latency_queries=0)).report
    for query_type in result["queries"]:
        few, all_lists = (
            r["tasks"]["ann_vs_exact"][query_type]["recall@10"]["value"] for r in (result, more)
        )
        assert few <= all_lists
    assert "latency" not in more
    assert more["settings"]["nprobe"] == 8


def test_a_bad_index_is_warned_of_and_an_exact_one_is_not(folders, tmp_path):
    bad = measured(folders, options=EvaluationOptions(nprobe=1, latency_queries=0))
    report.write_report(tmp_path / "bad", bad, [])
    written = json.loads((tmp_path / "bad" / "report.json").read_text())
    lossy = []
    for query_type, exact in written["tasks"]["exact"].items():
        ann = written["tasks"]["ann"][query_type]
        if any(exact[m]["value"] - ann[m]["value"] > 0.01 for m in ("hit@10", "recall@10")):
            lossy.append(query_type)
    assert len(lossy) > 2
    assert [warning.split()[3] for warning in written["warnings"]] == lossy
    figures = tuple(
        written["tasks"][task]["text"]["recall@10"]["value"] for task in ("exact", "ann")
    )
    said = next(warning for warning in written["warnings"] if " text " in warning)
    assert "recall@10 {:.3f} -> {:.3f}".format(*figures) in said
    assert "--recall 0.99 --queries" in said and "--factory Flat" in said
    good = measured(folders, "flat", options=EvaluationOptions(latency_queries=0))
    report.write_report(tmp_path / "good", good, [])
    assert json.loads((tmp_path / "good" / "report.json").read_text())["warnings"] == []


def test_a_loss_of_a_point_is_not_warned_of_and_more_is():
    def tasks(hit, recall):
        query_types = {"text": {"hit@10": {"value": hit}, "recall@10": {"value": recall}}}
        perfect = {"text": {"hit@10": {"value": 0.9}, "recall@10": {"value": 0.8}}}
        return {"tasks": {"exact": perfect, "ann": query_types}}

    assert index_warnings(tasks(0.89, 0.79)) == index_warnings(tasks(0.95, 0.85)) == []
    (hit,) = index_warnings(tasks(0.76, 0.8))
    assert (
        "queries of type text" in hit and "hit@10 0.900 -> 0.760" in hit and "recall@10" not in hit
    )
    (recall,) = index_warnings(tasks(0.9, 0.78))
    assert "recall@10 0.800 -> 0.780" in recall and "hit@10" not in recall


def test_compare_takes_the_first_k_of_exact_search_as_relevant():
    figures = ann_vs_exact_metrics(
        np.array([[1, 9, 3] + [-1] * 97]), np.array([[1, 2, 3, *range(10, 107)]])
    )
    assert figures["recall@1"]["value"] == 1
    assert figures["recall@10"]["value"] == pytest.approx(2 / 10)
    assert figures["recall@100"]["value"] == pytest.approx(2 / 100)
    assert figures["mrr"]["value"] == 1


def test_a_product_never_finds_itself(folders):
    result = measured(folders)
    asked = result.queries.source >= 0
    for rows in result.rows.values():
        assert rows.shape[1] == 100
        assert not (rows[asked] == result.queries.source[asked, None]).any()
        assert (rows[:, :50] >= 0).mean() > 0.9


def test_products_with_the_same_vector_are_reported_and_left_out_on_request(folders, tmp_path):
    twins = EmbeddingWriter(tmp_path / "products", dim=DIM)
    vectors = unit(np.random.default_rng(0).standard_normal((20, DIM)))
    vectors[10:15] = vectors[0]
    twins.write("s", [f"p{i}" for i in range(20)], vectors)
    twins.finish(["s"])
    queries = EmbeddingWriter(tmp_path / "queries", dim=DIM, id_column="query_id")
    queries.write("s", ["q0", "q1"], vectors[:2], ["fused", "fused"])
    queries.finish(["s"])
    products = EmbeddingReader(tmp_path / "products")
    build_index(products, tmp_path / "index", BuildOptions("Flat"))

    class Stub:
        fingerprint, text_fields = "c", ("title",)

        def queries(self):
            return pa.table(
                {"query_id": ["q0", "q1"], "split": ["test"] * 2, "source_product_id": ["p0", "p1"]}
            )

        def qrels(self):
            relevance = pa.array([1.0] * 3)
            return pa.table(
                {
                    "query_id": ["q0", "q0", "q1"],
                    "product_id": ["p5", "p0", "p6"],
                    "relevance": relevance,
                }
            )

    def run(exclude):
        options = EvaluationOptions(exclude_identical=exclude, untrained=False, latency_queries=0)
        index, reader = ProductIndex.open(tmp_path / "index"), EmbeddingReader(tmp_path / "queries")
        return evaluate(index, products, reader, catalogue=Stub(), options=options)

    counted, left_out = run(False), run(True)
    assert counted.report["identical_to_source"] == left_out.report["identical_to_source"] == 1
    assert set(range(10, 15)) <= set(counted.rows["exact"][0].tolist())
    for rows in left_out.rows.values():
        assert not set(range(10, 15)) & set(rows[0].tolist())
        assert set(range(1, 10)) <= set(rows[0].tolist())
    assert left_out.report["settings"]["exclude_identical"] is True


def test_queries_without_relevant_products_are_dropped_and_counted(folders, tmp_path):
    qrels = PreparedCatalogue(folders / "catalogue").qrels()
    texts = pc.starts_with(qrels["query_id"], "text")
    kept = qrels.filter(pc.invert(texts))
    pq.write_table(kept, tmp_path / "qrels.parquet")
    result = measured(folders, qrels=tmp_path / "qrels.parquet").report
    full = measured(folders).report
    assert "text" not in result["tasks"]["exact"]
    assert result["queries"]["image"] == full["queries"]["image"]
    assert (
        result["dropped_queries"] == full["queries"]["text"]["count"] > 0 == full["dropped_queries"]
    )
    with pytest.raises(
        ValueError, match=r"none of \d+ queries is left: 40 are of split|none of .* split 'nope'"
    ):
        measured(folders, options=EvaluationOptions(split="nope"))


def test_judged_products_that_the_index_lacks_count_as_never_found(folders, tmp_path):
    qrels = PreparedCatalogue(folders / "catalogue").qrels()
    ids = qrels["query_id"].unique()
    gone = pa.table(
        {
            "query_id": ids,
            "product_id": ["gone"] * len(ids),
            "relevance": pa.array([3.0] * len(ids)),
        }
    )
    pq.write_table(pa.concat_tables([qrels, gone]), tmp_path / "qrels.parquet")
    before, after = (
        measured(folders, "flat").report,
        measured(folders, "flat", qrels=tmp_path / "qrels.parquet").report,
    )
    assert after["judged_products_not_in_index"] == 1
    recall = [r["tasks"]["exact"]["fused"]["recall@100"]["value"] for r in (before, after)]
    assert recall[1] == pytest.approx(recall[0] / 2)


def test_words_stand_beside_the_model_for_every_kind_that_has_words(folders):
    result = measured(folders, options=UNTRAINED)
    baselines = result.report["baselines"]
    words = {"text", "fused", "product:text", "product:attribute"}
    assert set(baselines) == {"bm25", "tfidf", "numbers", "sum", "floor", "hybrid"}
    assert set(baselines["bm25"]) == set(baselines["tfidf"]) == set(baselines["hybrid"]) == words
    assert set(baselines["numbers"]) == {"fused", "product:attribute"}
    assert baselines["bm25"]["text"]["hit@10"]["value"] == 1  # the query is the title of a product
    for query_type in words:
        positions = result.queries.positions_of_type(query_type)
        own = result.queries.select(positions)
        for name, rows in result.untrained[query_type].items():
            assert rows.shape == (len(positions), 100)
            assert ranking_metrics(rows, own) == baselines[name][query_type]
            asks = own.source >= 0
            assert not (rows[asks] == own.source[asks, None]).any()


def test_differences_to_the_best_row_without_training_are_paired(folders):
    result = measured(folders, options=UNTRAINED)
    assert (
        "image" not in result.report["differences"]["image"]
    )  # photos have no words, and no towers are given
    for query_type in ("text", "fused"):
        own = result.queries.select(result.queries.positions_of_type(query_type))
        judged = own.judged, own.grades, 10
        values = {
            name: metrics.ndcg_at_k_per_query(rows, *judged)
            for name, rows in result.untrained[query_type].items()
            if name != "hybrid"
        }
        difference = result.report["differences"][query_type]
        best = difference["best"]
        assert values[best].mean() == max(value.mean() for value in values.values())
        trained = metrics.ndcg_at_k_per_query(
            result.rows["exact"][result.queries.positions_of_type(query_type)], *judged
        )
        assert difference["exact"]["ndcg@10"]["value"] == pytest.approx(
            (trained - values[best]).mean()
        )
        low, high = metrics.bootstrap_interval((trained - values[best])[:, None])[:, 0]
        width = difference["exact"]["ndcg@10"]["high"] - difference["exact"]["ndcg@10"]["low"]
        assert width == pytest.approx(high - low, rel=0.2)


def test_settings_are_chosen_on_val_and_on_halves_where_val_itself_is_measured(
    folders, monkeypatch
):
    monkeypatch.setattr("tritower.retrieval.evaluating.untrained_comparison.MIN_CHOOSING", 5)
    monkeypatch.setattr("tritower.retrieval.evaluating.untrained_search.MIN_CHOOSING", 5)
    for split, parts in (("test", 1), ("val", 2)):
        chosen = measured(
            folders, options=EvaluationOptions(split=split, latency_queries=0)
        ).report["chosen"]
        assert {
            query_type: len(choices) for query_type, choices in chosen.items()
        } == dict.fromkeys(chosen, parts)
    assert chosen["text"][0]["words"]["bm25"]["scoring"]["k1"] > 0
    assert chosen["text"][0]["queries"] == chosen["text"][1]["queries"] > 0


def test_what_is_measured_has_no_part_in_the_choice(folders):
    """Other judgements of the measured queries leave the settings as they are."""
    catalogue = PreparedCatalogue(folders / "catalogue")
    test = catalogue.queries().filter(pc.equal(catalogue.queries()["split"], "test"))["query_id"]

    class Turned(PreparedCatalogue):
        def qrels(self):
            table = super().qrels()
            asked = pc.is_in(table["query_id"], value_set=test.combine_chunks())
            ids = table["product_id"].to_pylist()
            turned = [
                other if own else plain
                for own, other, plain in zip(asked.to_pylist(), ids[::-1], ids, strict=True)
            ]
            return table.set_column(
                table.column_names.index("product_id"), "product_id", pa.array(turned)
            )

    once = measured(folders, options=UNTRAINED)
    again = measured(folders, options=UNTRAINED, catalogue=Turned(folders / "catalogue"))
    assert once.report["chosen"] == again.report["chosen"]
    assert once.report["tasks"] != again.report["tasks"]


def test_features_of_towers_before_training_are_rows_of_their_own(folders, tmp_path):
    """A tower that gives a product's group away finds the other offer first.

    Its sum with words may not lose it.
    """
    shards = write_embeddings(folders / "catalogue", tmp_path / "tower", noise=0.01)
    towers = {"text": (EmbeddingReader(shards / "products"), EmbeddingReader(shards / "queries"))}
    baselines = measured(folders, options=UNTRAINED, untrained=towers).report["baselines"]
    assert baselines["text"]["product:text"]["hit@1"]["value"] > 0.95
    assert (
        baselines["floor"]["product:text"]["ndcg@10"]["value"]
        >= baselines["bm25"]["product:text"]["ndcg@10"]["value"]
    )
    assert {"text", "fused", "product:image"} <= set(baselines["text"])
    assert open_tower_features(tmp_path / "nowhere") == {}
    with pytest.raises(
        FileNotFoundError, match=r"nowhere: no such folder. `index.py embed` writes"
    ):
        open_tower_features(tmp_path / "nowhere", required=True)


def test_a_model_below_what_needs_no_training_is_red_and_named(folders, tmp_path):
    """Embeddings of noise: words find more."""
    noise = write_embeddings(folders / "catalogue", tmp_path / "noise", noise=50.0)
    build_index(EmbeddingReader(noise / "products"), tmp_path / "index", BuildOptions("Flat"))
    result = measured(
        folders,
        options=UNTRAINED,
        index=tmp_path / "index",
        products=EmbeddingReader(noise / "products"),
        queries=EmbeddingReader(noise / "queries"),
    ).report
    lines = below_floor(result)
    assert any(line.startswith("text queries: the model's nDCG@10 is 0.") for line in lines)
    assert all("which needs no training" in line for line in lines)
    table = terminal_table(result)
    rows = [(name, row.style) for name, row in zip(table.columns[0].cells, table.rows, strict=True)]
    assert ("  exact task", "red") in rows and ("  BM25", "red") not in rows
    assert not any("exact" in line for line in below_floor(result | {"differences": {}}))


def test_the_order_of_shards_does_not_matter(folders, tmp_path):
    """Embeddings in another order than the index are joined by id."""
    reader = EmbeddingReader(folders / "embeddings" / "products")
    batches = list(reader.batches())
    ids = [i for b in batches for i in b.ids.to_pylist()][::-1]
    writer = EmbeddingWriter(tmp_path / "reversed", dim=DIM)
    writer.write("s", ids, np.concatenate([b.vectors for b in batches])[::-1])
    writer.finish(["s"])
    result = measured(folders, products=EmbeddingReader(tmp_path / "reversed")).report
    assert result["tasks"] == measured(folders).report["tasks"]


def test_embeddings_of_other_products_or_models_are_refused(folders, tmp_path):
    writer = EmbeddingWriter(tmp_path / "other", dim=DIM)
    writer.write("s", ["x", "000-0"], unit(np.ones((2, DIM))))
    writer.finish(["s"])
    with pytest.raises(
        ArtefactError, match="holds 400 products, the embeddings 2, of which 1 are not in the index"
    ):
        measured(folders, products=EmbeddingReader(tmp_path / "other"))
    other = write_embeddings(folders / "catalogue", tmp_path / "model-b", model="model-b")
    with pytest.raises(ArtefactError, match=r"model model-b, but .* embeddings of model-a"):
        measured(folders, queries=EmbeddingReader(other / "queries"))
    with pytest.raises(ValueError, match="give a catalogue with judgements, or qrels"):
        measured(folders, catalogue=None)


def test_anyones_vectors_with_qrels_as_csv(folders, tmp_path):
    generator = np.random.default_rng(0)
    vectors = unit(generator.standard_normal((50, 8)))
    pq.write_table(
        pa.table({"id": [f"p{i}" for i in range(50)], "v": list(vectors)}), tmp_path / "p.parquet"
    )
    pq.write_table(
        pa.table({"id": [f"q{i}" for i in range(5)], "v": list(vectors[:5])}),
        tmp_path / "q.parquet",
    )
    (tmp_path / "qrels.csv").write_text(
        "query_id,product_id\n" + "".join(f"q{i},p{i}\n" for i in range(4))
    )
    products = EmbeddingReader(tmp_path / "p.parquet")
    build_index(products, tmp_path / "i")
    index, queries = ProductIndex.open(tmp_path / "i"), EmbeddingReader(tmp_path / "q.parquet")
    result = evaluate(index, products, queries, qrels=tmp_path / "qrels.csv", options=QUICK).report
    assert result["queries"] == {"query": {"count": 4, "dropped": 1}}
    assert result["tasks"]["exact"]["query"]["hit@1"]["value"] == 1
    assert result["settings"]["split"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("query,product_id\na,b\n", r"no column 'query_id' among query, product_id"),
        ("query_id,product_id,relevance\na,b,high\n", r"relevance is not a number"),
        (
            "query_id,product_id,relevance\na,b,1\na,c,-2\n",
            r"row 1: relevance -2\.0; expected a number >= 0",
        ),
    ],
)
def test_faulty_judgements_are_named(tmp_path, text, message):
    (tmp_path / "qrels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_qrels(tmp_path / "qrels.csv")


def test_a_query_twice_in_one_kind_is_refused(folders, tmp_path):
    writer = EmbeddingWriter(tmp_path / "q", dim=DIM, id_column="query_id")
    writer.write("s", ["a", "a"], unit(np.ones((2, DIM))), ["text", "text"])
    writer.finish(["s"])
    with pytest.raises(ValueError, match="query 'a' appears twice in type 'text'"):
        make_evaluation_queries(
            EmbeddingReader(tmp_path / "q"),
            pa.table({"query_id": ["a"], "product_id": ["b"], "relevance": [1.0]}),
            ProductIndex.open(folders / "flat"),
        )


def test_random_and_constant_embeddings_find_no_more_than_chance(tmp_path):
    count, asked = 1000, 400
    generator = np.random.default_rng(0)
    for name, vectors in (
        ("random", unit(generator.standard_normal((count + asked, 8)))),
        ("constant", unit(np.ones((count + asked, 8)))),
    ):
        root = tmp_path / name
        root.mkdir()
        ids = [f"p{i}" for i in range(count)]
        pq.write_table(
            pa.table({"product_id": ids, "v": list(vectors[:count])}), root / "p.parquet"
        )
        pq.write_table(
            pa.table({"query_id": [f"q{i}" for i in range(asked)], "v": list(vectors[count:])}),
            root / "q.parquet",
        )
        answer = generator.integers(0, count, asked)
        (root / "qrels.csv").write_text(
            "query_id,product_id\n" + "".join(f"q{i},p{a}\n" for i, a in enumerate(answer))
        )
        products = EmbeddingReader(root / "p.parquet")
        build_index(products, root / "i", BuildOptions("Flat"))
        result = evaluate(
            ProductIndex.open(root / "i"),
            products,
            EmbeddingReader(root / "q.parquet"),
            qrels=root / "qrels.csv",
            options=EvaluationOptions(latency_queries=0),
        ).report
        chance = 10 / count
        list_columns = (chance * (1 - chance) / asked) ** 0.5
        assert abs(result["tasks"]["exact"]["query"]["hit@10"]["value"] - chance) < 4 * list_columns


def test_exact_search_does_not_depend_on_the_size_of_blocks(folders):
    index = ProductIndex.open(folders / "flat")
    products = EmbeddingReader(folders / "embeddings" / "products")
    (batch,) = EmbeddingReader(folders / "embeddings" / "queries").batches()
    small, large = (exact_search(products, index, batch.vectors, 20, block) for block in (7, 10**5))
    assert np.array_equal(small.hits.rows, large.hits.rows)
    assert np.allclose(small.hits.scores, large.hits.scores, atol=1e-6)
    assert np.array_equal(small.hits.rows, index.search(batch.vectors, 20).rows)
    assert np.array_equal(small.content, large.content)


def test_gates_name_what_falls_short(folders):
    result = measured(folders).report
    assert failed_gates(result, ["exact.fused.hit@10>=0.01", "ann_vs_exact.*.recall@10 >= 0"]) == []
    failures = failed_gates(result, ["ann_vs_exact.*.recall@10>=1.01"])
    assert len(failures) == 6
    assert re.fullmatch(r"ann_vs_exact\.text\.recall@10 is 0\.\d{4}, below 1\.01", failures[0])
    with pytest.raises(ValueError, match=r"gate 'recall>0\.9'; expected for example ann_vs_exact"):
        failed_gates(result, ["recall>0.9"])
    with pytest.raises(ValueError, match=r"no fused\.recall@7 in task ann"):
        failed_gates(result, ["ann.fused.recall@7>=0.5"])


def test_the_page_stands_alone_and_the_json_reads_back(folders, tmp_path):
    result = measured(folders)
    index, catalogue = ProductIndex.open(folders / "ivf"), PreparedCatalogue(folders / "catalogue")
    sections = report.examples(result, index, catalogue, per_type=2)
    assert [s.heading for s in sections].count("query type: text") == 2
    assert all(s.hits for s in sections)
    image_query = next(s for s in sections if s.heading == "query type: product:image")
    assert not image_query.query.text and not image_query.query.attributes
    oracle = {"recall@10": {"text": 0.5, "text+image+attribute": 0.9, "text+image": 0.8}}
    report.write_report(tmp_path / "r", result, sections, oracle)
    stored = json.loads((tmp_path / "r" / "report.json").read_text())
    assert stored["tasks"] == result.report["tasks"] and stored["oracle"] == oracle
    page = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    plots = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert len(plots) == 2 and all(base64.b64decode(plot).startswith(b"\x89PNG") for plot in plots)
    assert page.count("data:image/jpeg") > 20
    assert 'class="card relevant"' in page
    rows = {
        (query_type, name): figures
        for query_type in result.report["queries"]
        for _, name, figures in rows_of_type(result.report, query_type)
    }
    assert rows["fused", "oracle"] == {"recall@10": {"value": 0.9}}
    assert rows["product:text", "oracle"] == {"recall@10": {"value": 0.5}}
    assert ("text", "oracle") not in rows
    assert terminal_table(result.report).row_count == len(rows) + len(result.report["queries"])


def test_pages_escape_what_comes_from_catalogues(tmp_path):
    card = Card({"title": "<script>alert(1)</script> 连衣裙"}, {"brand": "A&B"}, (b"\x89PNG...",))
    write_sheet(tmp_path / "s.html", [Section(card, [Hit("<p1>", 0.5, card, True)])], "note")
    page = (tmp_path / "s.html").read_text(encoding="utf-8")
    assert (
        "<script>" not in page
        and "&lt;script&gt;" in page
        and "连衣裙" in page
        and "&lt;p1&gt;" in page
    )
    assert "A&amp;B" in page


def test_values_are_shown_as_people_write_them():
    assert (
        shown(59.9) == "59.9"
        and shown(40.0) == "40"
        and shown(0.0) == "0"
        and shown(1299.5) == "1299.5"
    )
    assert shown("Shoes > Boots") == "Shoes > Boots" and shown(["red", "wool"]) == "red, wool"
    assert [name for name, _ in facts_of({"size": "M", "price": 3.0, "brand": "Acme"})] == [
        "brand",
        "price",
        "size",
    ]
    assert data_url(b"\xff\xd8abc").startswith("data:image/jpeg;base64,")


def test_the_catalogue_gives_cards_by_id(folders):
    catalogue = PreparedCatalogue(folders / "catalogue")
    cards = catalogue.products(["001-1", "199-0", "nope"], images=True)
    assert set(cards) == {"001-1", "199-0"}
    assert cards["001-1"].title.endswith("no 1") and len(cards["001-1"].images) == 2
    assert cards["001-1"].attributes["category"].startswith("home > ")
    assert catalogue.products(["001-1"])["001-1"].images == ()
    assert catalogue.products([]) == {}
    (product, typed) = ("product-0", "text-1")
    queries = catalogue.query_cards([product, typed], images=True)
    assert queries[product] == catalogue.products(["000-0"], images=True)["000-0"]
    assert list(queries[typed].text) == ["query"]
    with pytest.raises(ArtefactError, match="no such folder"):
        PreparedCatalogue(folders / "nowhere")


def test_a_catalogue_without_judgements_says_so(tmp_path):
    write_catalogue(tmp_path / "c", num_groups=5, queries=False)
    catalogue = PreparedCatalogue(tmp_path / "c")
    assert len(catalogue.queries()) == 0
    with pytest.raises(ArtefactError, match="has no judgements"):
        catalogue.qrels()


def test_metrics_of_a_perfect_ranking_reach_the_best_recall(folders):
    questions = measured(folders).queries
    width = questions.relevant.shape[1]
    perfect = np.concatenate(
        [questions.relevant, np.full((len(questions.ids), 100 - width), -1)], axis=1
    )
    for k in CUTS:
        assert metrics.recall_at_k(perfect, questions.relevant, k) == metrics.best_recall_at_k(
            questions.relevant, k
        )


def test_the_report_names_the_index_by_its_fingerprint(folders):
    result = measured(folders).report
    assert result["index"]["fingerprint"] == ProductIndex.open(folders / "ivf").manifest.fingerprint
    assert result["index"]["bytes_per_product"] > 8
    assert result["catalogue_is_that_of_the_index"] is True
    assert (
        result["latency"]["queries"] == 20
        and result["latency"]["p99_ms"] >= result["latency"]["p50_ms"] > 0
    )
