"""Rows of a prepared catalogue by their number."""

from __future__ import annotations

import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tritower.datamodules.batch import NO_KEY, RELATIONS
from tritower.datamodules.catalogue import Table, product_item, product_keys, query_item


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Rows 0 to 24 in three shards, the second one empty."""
    for shard, (start, stop) in enumerate([(0, 10), (10, 10), (10, 25)]):
        rows = pa.table({"id": pa.array([f"p{i}" for i in range(start, stop)], pa.string())})
        pq.write_table(rows, tmp_path / f"shard-{shard:05d}.parquet", row_group_size=4)
    return Table(tmp_path, cached_groups=2)


def test_rows_are_found_in_any_order(table: Table) -> None:
    assert len(table) == 25
    for number in [0, 24, 3, 10, 9, 11, 24, 0]:
        assert table.row(number) == {"id": f"p{number}"}
    assert table.shard_starts == [0, 10, 10, 25]


@pytest.mark.parametrize("number", [-1, 25])
def test_rows_outside_are_refused(table: Table, number: int) -> None:
    with pytest.raises(IndexError, match=f"row {number} of a table of 25 rows"):
        table.row(number)


def test_memory_is_bounded_and_neighbors_are_read_once(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, i, **k: reads.append(i) or original(self, i, **k),
    )
    for number in range(25):
        table.row(number)
        assert len(table._cache) <= 2
    assert len(reads) == 7
    table.row(24), table.row(20)
    assert len(reads) == 7


def test_columns_run_over_all_shards(table: Table) -> None:
    assert table.column("id").to_pylist() == [f"p{i}" for i in range(25)]


def test_a_table_travels_without_its_rows(table: Table) -> None:
    table.row(0)
    copy = pickle.loads(pickle.dumps(table))
    assert not copy._cache
    assert copy.row(12) == {"id": "p12"}


def test_a_folder_without_shards_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"datamodules\.prepare"):
        Table(tmp_path)


def test_an_item_holds_no_nulls_and_no_empty_values_but_zeros() -> None:
    row = {
        "text": {"title": "Mug", "description": None, "brand": ""},
        "images": [b"1"],
        "attributes": {"price": 0.0, "stock": None, "color": "", "tags": [], "sizes": ["S"]},
    }
    item = product_item(row)
    assert item == ({"title": "Mug"}, (b"1",), {"price": 0.0, "sizes": ["S"]})
    assert product_item({"text": None, "images": None}) == ({}, (), {})


def test_a_query_has_a_text_or_pictures_or_neither() -> None:
    assert query_item({"text": "red mug", "images": None}) == ({"query": "red mug"}, (), {})
    assert query_item({"text": None, "images": [b"1"]}) == ({}, (b"1",), {})
    assert query_item({"text": None, "images": []}) == ({}, (), {})


def keys(**changes: object) -> dict[str, int]:
    row = {
        "product_id": "7",
        "group": "g",
        "family": "f",
        "text": {"title": "Red  Mug"},
        "images": [b"1", b"2"],
    }
    row |= {"attributes": {"brand": "Acme", "mpn": "X-1", "category": ["Home", "Kitchen", "Mugs"]}}
    return dict(zip(RELATIONS, product_keys({**row, **changes}), strict=True))


def test_keys_are_equal_where_products_are_related() -> None:
    base, other = keys(), keys(product_id="8", text={"title": "red mug"}, images=[b"1", b"3"])
    assert [name for name in RELATIONS if base[name] == other[name]] == list(RELATIONS[1:])
    assert base["query"] == NO_KEY
    assert len({base[name] for name in RELATIONS}) == len(RELATIONS)


@pytest.mark.parametrize(
    ("attributes", "same"),
    [
        (
            {"brand": "ACME", "model": "x-1", "category": ["Home", "Kitchen", "Bowls"]},
            ["model", "branch"],
        ),
        (
            {"brand": "Other", "mpn": "X-1", "category": ["Home", "Kitchen", "Mugs"]},
            ["category", "branch"],
        ),
        ({"brand": "Acme", "category": ["Home", "Garden", "Mugs"]}, []),
        ({"mpn": "X-1", "category": "Home"}, []),
        ({}, []),
    ],
)
def test_brand_and_model_and_place_in_the_tree_are_keys(
    attributes: dict[str, object], same: list[str]
) -> None:
    base, other = keys(), keys(attributes=attributes)
    assert [name for name in ("model", "category", "branch") if base[name] == other[name]] == same


def test_what_a_product_lacks_has_no_key() -> None:
    bare = keys(group=None, family=None, text={"title": None}, images=[], attributes=None)
    assert {name for name in RELATIONS if bare[name] == NO_KEY} == {*RELATIONS} - {"product"}
