"""Held-out queries: what they are, where they are searched, what answers them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tritower.datamodules.batch import Item
from tritower.datamodules.catalogue import Table, product_item
from tritower.datamodules.example_rows import NO_ROW
from tritower.datamodules.held_out import HeldOut, HeldOutOptions, held_out_queries
from tritower.datamodules.held_out_rows import CandidateRows, QueryRows, RowBatches
from tritower.datamodules.preprocess import ItemPreprocess
from tritower.towers.text import HashedWords, Template, TextPreprocess

NUM_PRODUCTS, NUM_QUERIES = 60, 30


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A random catalogue with judgements, as rows and as tables."""
    rng = np.random.default_rng(0)
    splits = np.array(["train", "val", "test"])
    products = [
        {
            "product_id": f"p{i}",
            "group": f"g{rng.integers(25)}" if rng.random() < 0.8 else None,
            "family": f"f{rng.integers(15)}" if rng.random() < 0.6 else None,
            "split": str(rng.choice(splits)),
            "text": {"title": f"title {i}", "description": "long"},
            "images": [],
        }
        for i in range(NUM_PRODUCTS)
    ]
    queries = [
        {
            "query_id": f"q{i}",
            "split": str(rng.choice(splits)),
            "text": None if i % 3 == 0 else f"text {i}",
            "images": [],
            "source_product_id": f"p{rng.integers(NUM_PRODUCTS)}" if i % 3 == 0 else None,
        }
        for i in range(NUM_QUERIES)
    ]
    judged = [
        (
            f"q{rng.integers(NUM_QUERIES + 2)}",
            f"p{rng.integers(NUM_PRODUCTS + 3)}",
            float(rng.choice([1.0, 2.0, 3.0])),
        )
        for _ in range(300)
    ]
    judged += judged[:20]  # judged twice
    judged += [
        (q["query_id"], q["source_product_id"], 3.0) for q in queries if q["source_product_id"]
    ]  # itself
    folder = tmp_path_factory.mktemp("world")
    for name, rows in (("products", products), ("queries", queries)):
        (folder / name).mkdir()
        pq.write_table(
            pa.Table.from_pylist(rows), folder / name / "shard-00000.parquet", row_group_size=16
        )
    columns = dict(
        zip(
            ("query_id", "product_id", "relevance"),
            map(list, zip(*judged, strict=True)),
            strict=True,
        )
    )
    return {
        "products": products,
        "queries": queries,
        "judged": judged,
        "tables": (Table(folder / "products"), Table(folder / "queries"), pa.table(columns)),
    }


def ask(world: dict[str, Any], judged: bool = True, **settings: Any) -> HeldOut:
    products, queries, qrels = world["tables"]
    options = {"max_queries": 1000, "max_products": 1000}
    options |= {name: settings.pop(name) for name in (*options, "threshold") if name in settings}
    relation = settings.pop("mates", "family")
    split = settings.pop("split", "val")
    tables = (queries, qrels) if judged else (None, None)
    return held_out_queries(
        products, *tables, relation, split, HeldOutOptions(**options), **settings
    )


def answers(found: HeldOut) -> list[tuple[int, int, int, frozenset[int]]]:
    """Query, source, own product and relevant products, as row numbers."""
    gallery = found.candidates
    return [
        (q, s, int(gallery[own]) if own >= 0 else -1, frozenset(gallery[r[r >= 0]].tolist()))
        for q, s, own, r in zip(
            found.query.tolist(),
            found.query_product.tolist(),
            found.own.tolist(),
            found.relevant,
            strict=True,
        )
    ]


@pytest.mark.parametrize("split", ["val", "test"])
def test_judged_queries_match_brute_force(world: dict[str, Any], split: str) -> None:
    expected = []
    for number, query in enumerate(world["queries"]):
        source = int(query["source_product_id"][1:]) if query["source_product_id"] else NO_ROW
        relevant = {
            int(p[1:]) for q, p, grade in world["judged"] if q == query["query_id"] and grade == 3.0
        }
        relevant = {p for p in relevant if p < NUM_PRODUCTS} - {source}
        if query["split"] == split and relevant:
            expected.append(
                (NO_ROW if source >= 0 else number, source, source, frozenset(relevant))
            )
    found = ask(world, split=split)
    assert answers(found) == expected
    assert len(expected) > 3
    assert found.candidates.tolist() == list(range(NUM_PRODUCTS))
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() >= 1 for row in found.relevant)


def mates_by_brute_force(
    world: dict[str, Any], row: int, relation: str, split: str
) -> frozenset[int]:
    products = world["products"]

    def key(product: dict[str, Any]) -> tuple[str, str] | None:
        if relation == "family" and product["family"] is not None:
            return ("family", product["family"])
        return None if product["group"] is None else ("group", product["group"])

    mine = key(products[row])
    return frozenset(
        i
        for i, p in enumerate(products)
        if i != row and p["split"] == split and mine is not None and key(p) == mine
    )


@pytest.mark.parametrize("relation", ["group", "family"])
def test_without_judgements_products_ask_for_their_mates(
    world: dict[str, Any], relation: str
) -> None:
    found = ask(world, judged=False, mates=relation)
    rows = [i for i, p in enumerate(world["products"]) if p["split"] == "val"]
    expected = [
        (NO_ROW, i, i, m) for i in rows if (m := mates_by_brute_force(world, i, relation, "val"))
    ]
    assert answers(found) == expected
    assert found.origin == "products with a group" and len(expected) > 3


def test_judgements_that_find_nothing_relevant_are_none(world: dict[str, Any]) -> None:
    products, queries, qrels = world["tables"]
    zeros = qrels.set_column(2, "relevance", pa.array([0.0] * len(qrels)))
    options = HeldOutOptions(1000, 1000)
    found = held_out_queries(products, queries, zeros, "group", "val", options)
    assert answers(found) == answers(ask(world, judged=False, mates="group"))


def test_a_threshold_is_of_judged_queries_alone(world: dict[str, Any]) -> None:
    products, queries, qrels = world["tables"]
    of_train = [q["query_id"] for q in world["queries"] if q["split"] == "train"]
    some = qrels.filter(pc.is_in(qrels["query_id"], pa.array(of_train)))
    options = HeldOutOptions(1000, 1000, threshold=9.0)
    found = held_out_queries(products, queries, some, "group", "val", options)
    assert answers(found) == answers(ask(world, judged=False, mates="group"))


@pytest.mark.parametrize("threshold", [1.0, 2.0])
def test_a_threshold_says_what_is_relevant(world: dict[str, Any], threshold: float) -> None:
    found = ask(world, threshold=threshold)
    best: dict[tuple[int, int], float] = {}
    for q, p, grade in world["judged"]:
        query, product = int(q[1:]), int(p[1:])
        if (
            query < NUM_QUERIES
            and product < NUM_PRODUCTS
            and world["queries"][query]["split"] == "val"
        ):
            if world["queries"][query]["source_product_id"] != p:
                best[query, product] = max(grade, best.get((query, product), 0.0))
    relevant = {pair for pair, grade in best.items() if grade >= threshold}
    expected = [
        frozenset(p for q, p in relevant if q == query)
        for query in sorted({q for q, _ in relevant})
    ]
    assert [hits for *_, hits in answers(found)] == expected
    assert len(found) > len(ask(world))
    assert (found.grade[found.judged >= 0] > 0).all() and found.grade.max() == 1


def test_judged_queries_without_a_relevant_product_are_counted(
    world: dict[str, Any], caplog: Any
) -> None:
    judged = {q for q, p, _ in world["judged"] if int(p[1:]) < NUM_PRODUCTS}
    of_val = [q for q in world["queries"] if q["split"] == "val" and q["query_id"] in judged]
    others = [q for q in of_val if any(a == q["query_id"] != p for a, p, _ in world["judged"])]
    found = ask(world)
    line = next(r.getMessage() for r in caplog.records if "left out" in r.getMessage())
    dropped, _, count = line.split(" judged")[0].split()
    assert int(count) - int(dropped) == len(found) and int(count) <= len(others)
    assert "relevance 3 or more" in line
    with pytest.raises(
        ValueError,
        match=r"None of the \d+ judged val queries has .*; the best there has 3"
        r".*data.validation.threshold",
    ):
        ask(world, threshold=4.0)


def test_without_mates_titles_ask_for_their_products(world: dict[str, Any]) -> None:
    found = ask(world, judged=False, mates="none")
    rows = [i for i, p in enumerate(world["products"]) if p["split"] == "val"]
    assert answers(found) == [(NO_ROW, i, -1, frozenset({i})) for i in rows]
    assert found.origin == "titles of products"
    queries = QueryRows(world["tables"][0], None, found, ItemPreprocess("query"))
    assert queries.item(0) == Item(text={"title": f"title {rows[0]}"})


def test_a_sampled_gallery_keeps_what_is_asked_and_relevant(world: dict[str, Any]) -> None:
    whole = ask(world)
    needed = set(whole.judged.ravel().tolist()) | set(whole.query_product.tolist()) - {NO_ROW}
    needed -= {-1}
    for room in (0, 3):
        sampled = ask(world, max_products=len(needed) + room)
        assert answers(sampled) == answers(whole)
        assert len(sampled.candidates) == len(needed) + room
        assert needed <= set(sampled.candidates.tolist())
    assert len(ask(world, max_products=1).candidates) == len(needed)


def test_sampled_queries_are_some_of_all_and_the_same_every_time(world: dict[str, Any]) -> None:
    some = answers(ask(world, max_queries=4))
    assert len(some) == 4
    assert set(some) <= set(answers(ask(world)))
    assert some == answers(ask(world, max_queries=4))
    assert some != answers(ask(world, max_queries=4, seed=5))


def test_a_split_of_nothing_is_refused(world: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="The holdout split has no products and no queries"):
        ask(world, split="holdout")


def test_queries_and_products_are_read_as_they_are_asked(world: dict[str, Any]) -> None:
    products, queries, _ = world["tables"]
    found = ask(world)
    preprocess = ItemPreprocess("query", TextPreprocess(HashedWords(), Template(None)))
    rows = QueryRows(products, queries, found, preprocess)
    for position, (query, source, _, _) in enumerate(answers(found)):
        text = (
            {"query": world["queries"][query]["text"]}
            if query >= 0
            else products.row(source)["text"]
        )
        assert rows.item(position) == Item(text=text)
    batch = rows[np.array([2, 0])]
    assert batch.row.tolist() == [2, 0]
    assert batch.items.present[:, 0].all()
    gallery = CandidateRows(products, found.candidates[::-1].copy(), preprocess)
    own = preprocess([product_item(products.row(NUM_PRODUCTS - 1))])
    assert gallery[np.array([0])].items.text.tolist() == own.text.tolist()


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [0, 1, 16, 21, 33])
def test_every_row_comes_once_over_all_ranks(num_rows: int, num_ranks: int) -> None:
    ranks = [RowBatches(num_rows, 8, rank, num_ranks) for rank in range(num_ranks)]
    rows = [row for batches in ranks for batch in batches for row in batch.tolist()]
    assert sorted(rows) == list(range(num_rows))
    assert all(len(list(batches)) == len(batches) for batches in ranks)
