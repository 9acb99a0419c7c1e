"""Products that ask, to tune an index by.

None that judged queries ask for, and words of their titles.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.support.catalogues import write_catalogue
from tritower.datamodules import tuning_queries as tuning
from tritower.datamodules.batch import Item
from tritower.datamodules.catalogue import Table, product_item
from tritower.datamodules.tuning_queries import TuningQueries


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Table, Table]:
    """600 products in row groups of 16, and judged queries."""
    folder: Path = write_catalogue(tmp_path_factory.mktemp("tuning") / "C", num_groups=300)
    return Table(folder / "products"), Table(folder / "queries")


def test_a_tenth_of_the_products_ask_and_at_most_a_thousand(
    tables: tuple[Table, Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    products, queries = tables
    rows = TuningQueries(products, queries).rows
    assert len(rows) == 60 and (np.diff(rows) > 0).all() and rows.max() < 600
    assert np.array_equal(rows, TuningQueries(products, queries).rows)  # every run draws the same
    monkeypatch.setattr(tuning, "MOST_PRODUCTS", 25)
    assert len(TuningQueries(products, None).rows) == 25


def test_few_row_groups_are_read(
    tables: tuple[Table, Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    products, _ = tables
    monkeypatch.setattr(tuning, "ROW_GROUPS", 3)
    monkeypatch.setattr(tuning, "SHARE", 1.0)
    rows = TuningQueries(products, None).rows
    groups = np.searchsorted(products.group_starts, rows, side="right")
    assert len(set(groups.tolist())) == 3


def test_products_that_judged_queries_ask_for_do_not_ask(
    tables: tuple[Table, Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    products, queries = tables
    monkeypatch.setattr(tuning, "SHARE", 1.0)
    sources = set(queries.column("source_product_id").to_pylist()) - {None}
    ids = np.array(products.column("product_id").to_pylist())
    asking = set(ids[TuningQueries(products, queries).rows].tolist())
    assert len(sources) == 100 and asking == set(ids.tolist()) - sources


def test_what_is_typed_are_one_to_three_words_of_the_title_in_their_order(
    tables: tuple[Table, Table],
) -> None:
    products, queries = tables
    tuned = TuningQueries(products, queries)
    lengths = set()
    for row in tuned.rows.tolist():
        item = product_item(products.row(row))
        typed = tuned.typed(row, item)
        assert typed is not None and not typed.images and not typed.attributes
        words, title = typed.text["query"].split(), item.text["title"].lower().split()
        left = iter(title)
        assert all(word in left for word in words), (
            words,
            title,
        )  # a part of it, in the same order
        lengths.add(len(words))
        assert typed == tuned.typed(row, item)
    assert lengths == {1, 2, 3}


def test_what_somebody_has_judged_is_not_typed(tables: tuple[Table, Table]) -> None:
    products, _ = tables
    mug = Item({"title": "Red Mug"})
    judged = pa.table({"text": ["  RED mug", None], "source_product_id": pa.nulls(2, pa.string())})
    free, wary = TuningQueries(products, None), TuningQueries(products, judged)
    typed = [free.typed(row, mug) for row in range(50)]
    assert {item.text["query"] for item in typed if item} == {"red", "mug", "red mug"}
    left = [None if item == Item({"query": "red mug"}) else item for item in typed]
    assert [wary.typed(row, mug) for row in range(50)] == left


@pytest.mark.parametrize("title", ["", "   ", "-- !", None])
def test_a_title_without_words_types_nothing(
    tables: tuple[Table, Table], title: str | None
) -> None:
    tuned = TuningQueries(*tables)
    assert tuned.typed(0, Item({} if title is None else {"title": title})) is None
