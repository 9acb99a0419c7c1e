"""Typed queries of facets against looking at every product."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.catalogues import PRODUCT_TYPES, SCHEMA
from tests.support.data_modules import data_module
from tests.support.training import fit
from tritower.datamodules import generated_queries as module
from tritower.datamodules.batch import NO_KEY, RELATIONS, Item
from tritower.datamodules.catalogue import Table, product_item
from tritower.datamodules.example_rows import NO_ROW
from tritower.datamodules.generated_queries import GeneratedQueries, generate_queries
from tritower.datamodules.preprocess import stable_hash
from tritower.datamodules.products import all_items
from tritower.datamodules.schema import Attribute, Schema
from tritower.towers.model_folder import load_model

QUERY = RELATIONS.index("query")


@pytest.fixture
def products(tiny_catalogue: Path) -> Table:
    return Table(tiny_catalogue / "products")


TRAIN = np.arange(72)
BY_LOSS = [
    f"--{name}.{key}"
    for name in ("checkpoint", "early_stopping")
    for key in ("monitor=train/loss", "mode=min")
]


def words(row: dict) -> set[str]:
    """All facets of a product; none of this catalogue has a space."""
    attributes = row["attributes"]
    values = [attributes["brand"], *attributes["category"], *(attributes["tags"] or ())]
    return {value.lower() for value in values if value}


def test_the_answers_are_all_products_with_all_facets(products: Table) -> None:
    found = generate_queries(products, TRAIN, SCHEMA, seed=0)
    assert len(found) == len(set(found.texts)) > 20
    for text, answers in zip(found.texts, found.products, strict=True):
        assert answers.tolist() == [
            row for row in TRAIN if set(text.split()) <= words(products.row(int(row)))
        ]
        assert len(answers) >= 1
        assert text.split()[-1] in PRODUCT_TYPES, "what it is comes last"
    assert {len(text.split()) for text in found.texts} >= {2, 3}


def test_only_the_rows_that_are_named_ask_and_answer(products: Table) -> None:
    """Others have the same facets: every third product has what its neighbors have."""
    some = np.arange(0, 120, 3)
    found = generate_queries(products, some, SCHEMA, seed=0)
    facets = {row: words(products.row(int(row))) for row in range(120)}
    shared = 0
    for text, answers in zip(found.texts, found.products, strict=True):
        having = [row for row in range(120) if set(text.split()) <= facets[row]]
        assert answers.tolist() == [row for row in having if row % 3 == 0]
        shared += len(having) > len(answers)
    assert shared > 5


def test_broad_queries_name_more_or_are_left_out(
    products: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PRODUCTS", 3)
    few = generate_queries(products, TRAIN, SCHEMA, seed=0)
    assert 1 <= max(map(len, few.products)) <= 3
    monkeypatch.setattr(module, "MAX_QUERIES", 4)
    assert 1 <= len(generate_queries(products, TRAIN, SCHEMA, seed=0)) <= 4


def test_a_seed_decides(products: Table) -> None:
    texts = [generate_queries(products, TRAIN, SCHEMA, seed).texts for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def table_of(folder: Path, attributes: list[dict] | None) -> Table:
    rows = [
        {"product_id": f"p{n}", "attributes": some} for n, some in enumerate(attributes or [{}])
    ]
    if attributes is None:
        rows = [{"product_id": "p0"}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "shard-00000.parquet")
    return Table(folder)


def test_values_that_say_nothing_are_no_words(tmp_path: Path) -> None:
    rows = [
        {"organic": "Yes", "color": "  Light\tBlue "},
        {"organic": "Yes", "color": "N/A"},
        {"organic": "No", "color": None},
    ]
    schema = Schema(
        ("title",), False, (Attribute("organic", "category"), Attribute("color", "category"))
    )
    found = generate_queries(table_of(tmp_path, rows), np.arange(3), schema, seed=0)
    assert (found.texts, [answers.tolist() for answers in found.products]) == (
        ["light blue"],
        [[0]],
    )


def test_without_attributes_there_are_none(tmp_path: Path) -> None:
    schema = Schema(("title",), False, ())
    assert len(generate_queries(table_of(tmp_path, None), np.arange(1), schema, seed=0)) == 0


def test_examples_draw_among_the_answers() -> None:
    queries = GeneratedQueries(["red mug", "blue"], [np.array([3, 5]), np.array([4])], weight=0.25)
    rows = queries.examples(first=10, times=40, seed=0)
    assert len(rows) == 80 and set(rows.product[rows.query == 10]) == {3, 5}
    assert set(rows.product[rows.query == 11]) == {4}
    assert (
        (rows.query_product == NO_ROW).all()
        and (rows.weight == 0.25).all()
        and np.isnan(rows.label).all()
    )
    pairs = queries.pairs(first=10)
    assert list(zip(pairs.query.tolist(), pairs.product.tolist(), strict=True)) == [
        (10, 3),
        (10, 5),
        (11, 4),
    ]


def test_a_batch_knows_all_answers_and_no_family_of_a_query(tiny_catalogue: Path) -> None:
    data = data_module(tiny_catalogue, types={"catalogue": 1, "generated": 2}, generated_weight=0.5)
    batches = pickle.loads(
        pickle.dumps(data.train_dataloader().dataset)
    )  # as loader processes get it
    first = len(data.queries)
    of_facets = np.flatnonzero(batches.data.rows.query >= first)
    assert len(of_facets) == 2 * len(data.training.queries.generated) > 40
    ids = data.products.column("product_id").to_pylist()
    for number in of_facets[::7]:
        query = int(batches.data.rows.query[number]) - first
        example = batches.example(0, int(number))
        assert example.query == Item(text={"query": data.training.queries.generated.texts[query]})
        answers = {
            stable_hash(ids[row]): 0.5 for row in data.training.queries.generated.products[query]
        }
        judged = {
            key: grade
            for key, grade in zip(example.judged_products, example.judgement_weights, strict=True)
            if key != NO_KEY
        }
        assert judged == answers
        assert set(example.query_keys[:QUERY]) == {NO_KEY}, (
            "a red one does not ask for the blue one of its family"
        )
        assert example.product_keys[QUERY] == example.query_keys[QUERY] != NO_KEY
        assert example.product_keys[0] in answers
        assert example.weight == 0.5
    typed = [item.text.get("query") for item in all_items(data)]
    assert set(data.training.queries.generated.texts) <= set(typed), (
        "frozen towers encode them once"
    )


def test_a_weight_that_is_none_is_refused(tiny_catalogue: Path) -> None:
    for weight in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"generated_weight={weight}: choose above 0"):
            data_module(tiny_catalogue, generated_weight=weight)


def test_words_are_learned_that_no_title_has(tiny_catalogue: Path, tmp_path: Path) -> None:
    """Colors stand among the tags of every second product, and in no text."""
    table = Table(tiny_catalogue / "products")
    rows = [row for row in map(table.row, TRAIN) if row["attributes"]["tags"]]
    shares = {}
    for name, sources in (("without", "{catalogue: 5}"), ("with", "{catalogue: 1, generated: 4}")):
        arguments = [
            "--model.product.image=null",
            f"--data.examples.types={sources}",
            "--data.examples.generated_weight=1",
        ]
        assert (
            fit(tiny_catalogue, tmp_path / name, *arguments, "--trainer.max_epochs=8", *BY_LOSS)
            == 0
        )
        model = load_model(tmp_path / name / "model")
        product = model.encode([product_item(row) for row in rows], "product")
        asked = sorted({tuple(row["attributes"]["tags"]) for row in rows})
        query = model.encode([Item(text={"query": " ".join(words)}) for words in asked])
        first = [rows[row]["attributes"]["tags"] for row in (query @ product.T).argmax(1)]
        shares[name] = np.mean(
            [color in tags for (color, _), tags in zip(asked, first, strict=True)]
        )
    assert shares["with"] > shares["without"] + 0.2, shares
