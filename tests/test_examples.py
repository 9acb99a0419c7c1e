"""Training examples: which query goes with which product."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tritower.datamodules.batch import NO_KEY, RELATIONS, Example, Item
from tritower.datamodules.catalogue import Table, product_item
from tritower.datamodules.collate import collate
from tritower.datamodules.example_rows import (
    NO_ROW,
    ExampleRows,
    JudgementOptions,
    catalogue_examples,
    judgement_examples,
)
from tritower.datamodules.examples import ExampleData, TrainingBatches
from tritower.datamodules.negatives import Negatives
from tritower.datamodules.positives import GroupRelation, Judgements, SameGroup
from tritower.datamodules.preprocess import ItemPreprocess, Preprocess, part_of, stable_hash
from tritower.datamodules.stream import Draw
from tritower.datamodules.views import Views
from tritower.towers.lexical import NgramPreprocess
from tritower.towers.text import HashedWords, Template, TextPreprocess

PRODUCTS = [  # id, group, family, split
    ("p0", "g0", "f0", "train"),
    ("p1", "g0", "f0", "train"),
    ("p2", "g1", "f0", "train"),
    ("p3", "g2", None, "train"),
    ("p4", "g2", None, "val"),
    ("p5", None, "g2", "train"),  # a family with the name of a group
    ("p6", None, None, "train"),
]
QUERIES = [  # id, split, text, source
    ("q0", "train", "a text", None),
    ("q1", "val", "another", None),
    ("q2", "train", None, "p0"),
    ("q3", "train", None, "p4"),
    ("q4", "train", "lost source", "gone"),
]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Table, Table]:
    folder = tmp_path_factory.mktemp("tables")
    products = [
        {
            "product_id": i,
            "group": g,
            "family": f,
            "split": s,
            "text": {"title": i, "brand": "b"},
            "images": [],
        }
        for i, g, f, s in PRODUCTS
    ]
    queries = [
        {"query_id": i, "split": s, "text": t, "images": [], "source_product_id": p}
        for i, s, t, p in QUERIES
    ]
    for name, rows in (("products", products), ("queries", queries)):
        (folder / name).mkdir()
        pq.write_table(
            pa.Table.from_pylist(rows), folder / name / "shard-00000.parquet", row_group_size=3
        )
    return Table(folder / "products"), Table(folder / "queries")


def judgements(*rows: tuple[str, str, float]) -> pa.Table:
    return pa.table(
        dict(
            zip(
                ("query_id", "product_id", "relevance"),
                map(list, zip(*rows, strict=True)),
                strict=True,
            )
        )
    )


def test_pairs_have_both_ends_in_the_split_and_scaled_weights(tables: tuple[Table, Table]) -> None:
    qrels = judgements(
        ("q0", "p0", 3.0),
        ("q0", "p1", 1.0),
        ("q0", "p4", 3.0),  # product of another split
        ("q1", "p0", 3.0),  # query of another split
        ("q2", "p1", 2.0),  # a product asks
        ("q2", "p0", 3.0),  # for itself
        ("q3", "p0", 3.0),  # a product of another split asks
        ("q0", "p2", 0.0),  # not relevant at all
        ("gone", "p0", 3.0),
        ("q0", "gone", 3.0),
    )
    rows = judgement_examples(qrels, *tables, "train")
    found = {
        (p, q, s): w
        for p, q, s, w in zip(
            rows.product, rows.query, rows.query_product, rows.weight, strict=True
        )
    }
    assert found == {
        (0, 0, NO_ROW): 1.0,
        (1, 0, NO_ROW): pytest.approx(1 / 3),
        (1, NO_ROW, 0): pytest.approx(2 / 3),
    }


def test_a_query_whose_source_is_gone_is_a_query_of_its_own(tables: tuple[Table, Table]) -> None:
    rows = judgement_examples(judgements(("q4", "p0", 1.0)), *tables, "train")
    assert (rows.product.tolist(), rows.query.tolist(), rows.query_product.tolist()) == (
        [0],
        [4],
        [NO_ROW],
    )


@pytest.mark.parametrize(
    ("cut", "kept"), [(1, {0, 1, 2}), (2, {0, 1, 2}), (3, {0, 1, 2}), (4, {0, 1, 2, 3, 5})]
)
def test_a_cut_leaves_products_that_are_no_less_relevant_among_the_answers(
    tables: tuple[Table, Table], cut: int, kept: set[int]
) -> None:
    """p0, p1 and p2 of grade 3, p3 and p5 of grade 1: any cut among equals is drawn at random."""
    said = [
        ("q0", f"p{row}", grade)
        for row, grade in ((0, 3.0), (1, 3.0), (2, 3.0), (3, 1.0), (5, 1.0), (4, 3.0))
    ]
    qrels = judgements(*said, ("q4", "p6", 1.0))
    shown = judgement_examples(qrels, *tables, "train", JudgementOptions(cut))
    answers = judgement_examples(qrels, *tables, "train", JudgementOptions(cut, keep_ties=True))
    of_q0 = shown.product[shown.query == 0]
    assert len(of_q0) == cut and set(of_q0) <= kept
    assert set(answers.product[answers.query == 0]) == kept
    assert set(answers.product[answers.query == 4]) == {6}


def test_no_judgements_are_no_examples(tables: tuple[Table, Table]) -> None:
    assert len(judgement_examples(judgements(("q1", "p4", 1.0)), *tables, "train")) == 0


def test_joined_examples_are_ordered_by_product() -> None:
    joined = ExampleRows.join(
        [catalogue_examples(np.array([1, 4])), catalogue_examples(np.array([0, 2, 4]))]
    )
    assert joined.product.tolist() == [0, 1, 2, 4, 4]
    assert len(joined) == 5


@pytest.mark.parametrize(
    ("relation", "mates"),
    [
        ("none", [[], [], [], [], [], []]),
        ("group", [[1], [0], [], [], [], []]),
        ("family", [[1, 2], [0, 2], [0, 1], [], [], []]),
    ],
)
def test_mates_are_of_the_split_and_never_the_product_itself(
    tables: tuple[Table, Table], relation: str, mates: list[list[int]]
) -> None:
    train = np.array([0, 1, 2, 3, 5, 6])
    found = SameGroup(tables[0], relation, train)
    assert [found.others(int(row)).tolist() for row in train] == mates


@pytest.mark.parametrize("relation", ["none", "group", "family"])
def test_one_of_each_has_no_mate_among_the_others(
    tables: tuple[Table, Table], relation: GroupRelation
) -> None:
    rows = np.array([0, 2, 3, 4, 6])
    mates = SameGroup(tables[0], relation, rows)
    kept = mates.one_per_group(rows).tolist()
    assert kept == [
        row for row in rows.tolist() if not any(mate < row for mate in mates.others(row))
    ]
    assert all(not set(mates.others(row).tolist()) & set(kept) for row in kept)
    assert set(kept) | {int(m) for row in kept for m in mates.others(row)} == set(rows.tolist())


def test_mates_of_a_group_whose_families_are_unknown(tables: tuple[Table, Table]) -> None:
    found = SameGroup(tables[0], "family", np.arange(7))
    assert found.others(3).tolist() == [4]
    assert found.others(5).tolist() == []  # its family is called like their group


def text_preprocess() -> Preprocess:
    text = TextPreprocess(HashedWords(), Template(None))
    return Preprocess(ItemPreprocess("query", text), ItemPreprocess("product", text))


def batches(
    tables: tuple[Table, Table], rows: ExampleRows, mate_share: float, views: Views | None = None
):
    mates = SameGroup(tables[0], "group", np.arange(7))
    data = ExampleData(*tables, rows, mates, mate_share)
    return TrainingBatches(data, views or Views(0, 0, 0), text_preprocess(), seed=0)


PRODUCT, QUERY = RELATIONS.index("product"), RELATIONS.index("query")


def test_a_product_is_asked_for_by_itself_or_a_mate(tables: tuple[Table, Table]) -> None:
    rows = catalogue_examples(np.arange(7))
    alone, mates = batches(tables, rows, 0.0), batches(tables, rows, 1.0)
    items = [product_item(tables[0].row(row)) for row in range(7)]
    assert [alone.example(0, n).query for n in range(7)] == items
    asked = [mates.example(0, n) for n in range(7)]
    assert [example.query for example in asked] == [
        items[1],
        items[0],
        items[2],
        items[4],
        items[3],
        *items[5:],
    ]
    assert asked[0].query_keys[PRODUCT] != asked[0].product_keys[PRODUCT]
    assert asked[0].query_keys[1] == asked[0].product_keys[1]


def test_a_judged_query_shows_itself_and_shares_all_keys_with_its_product(
    tables: tuple[Table, Table],
) -> None:
    rows = judgement_examples(
        judgements(("q0", "p0", 3.0), ("q0", "p1", 1.5), ("q2", "p1", 3.0)), *tables, "train"
    )
    data = batches(tables, rows, 1.0)
    typed, other, source = (data.example(0, n) for n in range(3))
    assert typed.query == Item(text={"query": "a text"})
    assert typed.query_keys == typed.product_keys
    assert typed.query_keys[QUERY] == other.product_keys[QUERY] != source.query_keys[QUERY]
    assert (typed.weight, other.weight) == (1.0, 0.5)
    assert source.query == product_item(tables[0].row(0))


def test_all_answers_to_one_product_are_answers(tables: tuple[Table, Table]) -> None:
    """Else the others of its answers in a batch would push it away."""
    rows = judgement_examples(
        judgements(("q2", "p1", 3.0), ("q2", "p3", 1.0), ("q0", "p3", 3.0)), *tables, "train"
    )
    data = batches(tables, rows, 1.0)
    one, other, typed = (data.example(0, n) for n in range(3))
    if typed.query != Item(text={"query": "a text"}):
        other, typed = typed, other
    assert (
        one.query_keys[QUERY]
        == one.product_keys[QUERY]
        == other.query_keys[QUERY]
        == other.product_keys[QUERY]
    )
    assert NO_KEY != one.query_keys[QUERY] != typed.query_keys[QUERY]
    assert one.query_keys[PRODUCT] != one.product_keys[PRODUCT]


def test_queries_and_products_that_ask_know_all_that_answers_them(
    tables: tuple[Table, Table],
) -> None:
    """Also in a view of the catalogue; judged or shown twice is one answer, irrelevant is none."""
    qrels = judgements(
        ("q0", "p0", 3.0),
        ("q0", "p1", 1.5),
        ("q0", "p6", 0.0),
        ("q2", "p1", 3.0),
        ("q2", "p3", 1.0),
        ("q2", "p3", 1.5),
    )
    pairs = judgement_examples(qrels, *tables, "train", JudgementOptions(labeled=True))
    rows = ExampleRows.join([pairs, pairs, catalogue_examples(np.arange(4))])
    data = batches(tables, rows, 0.0)
    p0, p1, p3 = (stable_hash(name) for name in ("p0", "p1", "p3"))
    expected = {"typed": {p0: 1.0, p1: 0.5}, "p0": {p1: 1.0, p3: 0.5}}
    seen = set()
    for number in range(len(rows)):
        example = data.example(0, number)
        asks = "typed" if "query" in example.query.text else example.query.text["title"]
        found = dict(zip(example.judged_products, example.judgement_weights, strict=True))
        assert len(example.judged_products) == 2 and found == expected.get(asks, {NO_KEY: 0.0})
        seen.add(asks)
    assert seen == {"typed", "p0", "p1", "p2", "p3"}
    batch = data[Draw(0, np.arange(len(rows)))]
    assert (
        batch.judged_products.dtype == torch.int64
        and batch.judged_products.shape
        == batch.judgement_weights.shape
        == (
            len(rows),
            2,
        )
    )


def test_the_strongest_answers_are_kept(tables: tuple[Table, Table]) -> None:
    qrels = judgements(("q0", "p0", 1.0), ("q0", "p1", 3.0), ("q0", "p2", 2.0), ("q2", "p3", 3.0))
    answers = Judgements(tables[0], judgement_examples(qrels, *tables, "train"), max_per_query=2)
    keys, weights = answers.of_query(0, NO_ROW)
    assert keys == [stable_hash("p1"), stable_hash("p2")] and weights == pytest.approx([1, 2 / 3])
    assert answers.of_query(NO_ROW, 0) == ([stable_hash("p3"), NO_KEY], [1.0, 0.0])
    assert answers.of_query(NO_ROW, 6) == ([NO_KEY] * 2, [0.0] * 2)


def test_of_equal_answers_those_that_are_shown_are_kept(tables: tuple[Table, Table]) -> None:
    qrels = judgements(*((f"q{0}", f"p{row}", 1.0) for row in (0, 1, 2, 3, 5, 6)))
    shown = judgement_examples(qrels, *tables, "train", JudgementOptions(2))
    answers = Judgements(
        tables[0], shown, [judgement_examples(qrels, *tables, "train")], max_per_query=3
    )
    keys, weights = answers.of_query(0, NO_ROW)
    assert {stable_hash(f"p{row}") for row in shown.product} <= set(keys)
    assert len(set(keys)) == 3 and weights == [1.0] * 3


def test_without_judgements_a_batch_has_no_lists(tables: tuple[Table, Table]) -> None:
    batch = batches(tables, catalogue_examples(np.arange(7)), 0.0)[Draw(0, np.arange(7))]
    assert batch.judged_products is None and batch.judgement_weights is None


def test_labeled_pairs_keep_those_that_are_no_answers(tables: tuple[Table, Table]) -> None:
    qrels = judgements(("q0", "p0", 2.0), ("q0", "p1", 1.0), ("q0", "p2", 0.0), ("q2", "p3", 0.0))
    rows = judgement_examples(qrels, *tables, "train", JudgementOptions(labeled=True))
    found = {
        (p, q): (w, label)
        for p, q, w, label in zip(rows.product, rows.query, rows.weight, rows.label, strict=True)
    }
    assert found == {(0, 0): (1, 1), (1, 0): (0.5, 0.5), (2, 0): (0, 0), (3, NO_ROW): (0, 0)}
    data = batches(tables, rows, 0.0)
    answer, _, wrong, unlike = (data.example(0, n) for n in range(4))
    assert [e.label for e in (answer, wrong, unlike)] == [1.0, 0.0, 0.0]
    equal = [a == b != NO_KEY for a, b in zip(wrong.query_keys, wrong.product_keys, strict=True)]
    assert not any(equal)
    assert wrong.query_keys[QUERY] == answer.product_keys[QUERY] != wrong.product_keys[QUERY]
    batch = data[Draw(0, np.arange(4))]
    torch.testing.assert_close(batch.label, torch.tensor([1.0, 0.5, 0.0, 0.0]))
    torch.testing.assert_close(batch.weight, batch.label)


@pytest.mark.parametrize(("power", "weight"), [(0.0, 1.0), (1.0, 0.5), (2.0, 0.25)])
def test_relevance_counts_by_its_power(
    tables: tuple[Table, Table], power: float, weight: float
) -> None:
    qrels = judgements(("q0", "p0", 2.0), ("q0", "p1", 1.0), ("q0", "p2", 0.0))
    rows = judgement_examples(qrels, *tables, "train", JudgementOptions(power=power))
    assert rows.weight.tolist() == [1.0, weight]
    assert np.isnan(rows.label).all()


def test_a_batch_holds_its_negatives_behind_its_answers(
    tables: tuple[Table, Table], tmp_path: Path
) -> None:
    np.save(tmp_path / "mined.npy", np.array([[5], [6], [6], [-1], [-1], [-1], [-1]], np.int32))
    data = batches(tables, catalogue_examples(np.array([0, 1, 1])), 0.0)
    batch = data[Draw(0, np.array([0, 2]), Negatives(tmp_path / "mined.npy", 1, 1.0))]
    ids = [stable_hash(f"p{row}") for row in (0, 1, 5, 6)]
    assert batch.product_keys[:, PRODUCT].tolist() == ids
    assert (len(batch.query_keys), len(batch.weight), len(batch.product.present)) == (2, 2, 4)
    torch.testing.assert_close(
        batch.frequency, torch.tensor([2 / 3, 4 / 3, 0.0, 0.0])
    )  # 3 examples of 2 products


def test_slices_of_a_batch_hold_what_the_whole_holds_whatever_negatives_it_has(
    tables: tuple[Table, Table], tmp_path: Path
) -> None:
    """As two processes draw them: the same views and the same parts of answers and negatives."""
    np.save(
        tmp_path / "mined.npy",
        np.array([[5, 3], [6, 2], [6, 1], [-1, -1], [0, 2], [1, 4], [0, 1]], np.int32),
    )
    mined = Negatives(tmp_path / "mined.npy", 3, 0.5)
    data = batches(tables, catalogue_examples(np.arange(7)), 0.5, Views(0.5, 0.5))
    sides = data.preprocess.query, data.preprocess.product
    data.preprocess = Preprocess(
        *(replace(side, lexical=NgramPreprocess(Template(None), 1, 64, False)) for side in sides)
    )
    rows = np.array([3, 0, 6, 1])
    whole, *halves = (data[Draw(2, part, mined)].product for part in (rows, rows[:2], rows[2:]))
    answers, extra = slice(2), slice(2, None)
    for name in ("present", "part"):
        parts = [getattr(half, name)[of] for of in (answers, extra) for half in halves]
        assert torch.equal(getattr(whole, name), torch.cat(parts))
    alone = data[Draw(2, rows)].product
    assert torch.equal(whole.part[:4], alone.part)
    assert (whole.part.sum(1) < whole.present.sum(1)).any()


def test_negatives_lose_facts_as_answers_do(tables: tuple[Table, Table]) -> None:
    data = batches(tables, catalogue_examples(np.arange(7)), 0.0, Views(0, 1.0))
    assert len(product_item(tables[0].row(0)).text) > 1
    assert len(data.negative(0, np.random.default_rng(0)).item.text) == 1


@pytest.mark.parametrize("there", [[True, True, True], [True, False, True]])
def test_a_part_is_some_of_what_is_there_and_not_all(there: list[bool]) -> None:
    present, rng = np.array(there), np.random.default_rng(0)
    parts = {tuple(part_of(present, rng).tolist()) for _ in range(200)}
    expected = {p for p in product(*([there_, False] for there_ in there)) if any(p)}
    assert parts == expected - {tuple(there)}


def test_the_part_of_a_single_modality_is_all_of_it() -> None:
    rng = np.random.default_rng(0)
    assert part_of(np.array([False, True, False]), rng).tolist() == [False, True, False]
    assert part_of(np.zeros(3, bool), rng).tolist() == [False] * 3


def test_an_example_follows_from_seed_epoch_and_number(tables: tuple[Table, Table]) -> None:
    rows = catalogue_examples(np.arange(7))
    data, again = (batches(tables, rows, 0.5, Views(0.5, 0.5)) for _ in range(2))
    for epoch in range(3):
        assert [data.example(epoch, n) for n in range(7)] == [
            again.example(epoch, n) for n in reversed(range(7))
        ][::-1]
    assert any(data.example(0, n) != data.example(1, n) for n in range(7))


def test_a_batch_holds_its_examples_in_the_order_of_the_draw(tables: tuple[Table, Table]) -> None:
    data = batches(tables, catalogue_examples(np.arange(7)), 0.0)
    batch = data[Draw(0, np.array([3, 0, 3]))]
    keys = [data.example(0, n).product_keys for n in (3, 0, 3)]
    assert batch.product_keys.tolist() == keys
    assert batch.query.text.shape[0] == len(batch.weight) == 3
    assert batch.label is None


def test_a_draw_of_anything_else_is_refused(tables: tuple[Table, Table]) -> None:
    with pytest.raises(TypeError, match="use_distributed_sampler=false"):
        batches(tables, catalogue_examples(np.arange(7)), 0.0)[3]


def example(text: str, label: float | None = None, weight: float = 0.5) -> Example:
    item = Item({"title": text} if text else {}, (b"unread",))
    return Example(
        item, Item({"title": "x"}), [1] * len(RELATIONS), [2] * len(RELATIONS), weight, label
    )


def test_a_pair_of_which_the_model_sees_nothing_weighs_nothing() -> None:
    batch = collate([example("mug"), example("")], text_preprocess())
    assert batch.weight.tolist() == [0.5, 0.0]


def test_views_show_what_the_model_reads(tables: tuple[Table, Table]) -> None:
    """A text model is never shown a view without text of a product that has one."""
    data = batches(tables, catalogue_examples(np.arange(7)), 0.0, Views(modality_dropout=1.0))
    original = data.data.products.row
    table = SimpleNamespace(
        row=lambda number: {**original(number), "images": [b"1"], "attributes": {"a": 1.0}}
    )
    data.data = replace(data.data, products=table)
    for epoch in range(5):
        batch = data[Draw(epoch, np.arange(7))]
        assert batch.weight.tolist() == [1.0] * 7
        assert {*map(len, data.example(epoch, 0).query[1:])} == {0}


def test_labels_are_kept_and_missing_ones_are_nan() -> None:
    batch = collate([example("mug", 0.2), example("lamp", 1.0)], text_preprocess())
    torch.testing.assert_close(batch.label, torch.tensor([0.2, 1.0]))
    mixed = collate([example("mug", 0.2), example("lamp")], text_preprocess()).label
    torch.testing.assert_close(mixed, torch.tensor([0.2, torch.nan]), equal_nan=True)
