"""What columns are: guessed from names and values, explained.

And overridden by a small YAML file.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from tritower.datamodules.prepare.columns import Columns, Override
from tritower.datamodules.prepare.guess import guess_columns
from tritower.datamodules.prepare.profile import profile
from tritower.datamodules.prepare.tables import CatalogueError, Table


def guess(folder: Path, rows: list[dict[str, str]], yaml: str | None = None) -> Columns:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    (folder / "products.csv").write_text(buffer.getvalue(), encoding="utf-8")
    table = Table(folder / "products.csv")
    if yaml is None:
        return guess_columns(table, *profile(table))
    (folder / "columns.yaml").write_text(yaml, encoding="utf-8")
    return guess_columns(table, *profile(table), Override.load(folder / "columns.yaml"))


def roles(columns: Columns) -> dict[str, str]:
    return {column.name: column.role for column in columns.columns}


def shop(n: int = 40) -> list[dict[str, str]]:
    """Rows with every kind of column."""
    return [
        {
            "": str(i),
            "product_id": f"{i:04d}",
            "Product Name": f"Shoe {i % 7}",
            "notes": f"a shoe with number {i} made for walking",
            "image_url": f"https://example.com/{i}.jpg",
            "picture": f"img/{i}.jpg|img/{i}_b.jpg",
            "category": "Shoes > Boots" if i % 2 else "Shoes",
            "tree": f"Home > Room {i % 5}",
            "Preis": f"{i},99 €",
            "weight": f"{i}.5",
            "size": str(38 + i % 5),
            "zip": f"{i:05d}",
            "stock": str(i * 3),
            "colors": "red|blue" if i % 3 else "red",
            "brand": f"Brand{i % 4}",
            "ean": str(4_000_000_000_000 + i),
            "added": f"2024-01-{i % 28 + 1:02d}",
            "currency": "EUR",
            "empty": "",
            "extra": json.dumps(
                {"material": f"wool {i % 3}", "tags": "a|b" if i % 2 else "c", "brand": f"x{i % 2}"}
            ),
            "item_group_id": f"style{i // 2}",
            "split": "train" if i % 4 else "test",
            "language": "en" if i % 2 else "de",
        }
        for i in range(1, n + 1)
    ]


def test_every_kind_of_column_is_recognized(tmp_path: Path) -> None:
    assert roles(guess(tmp_path, shop())) == {
        "column_1": "ignore",
        "product_id": "id",
        "Product Name": "text",
        "notes": "text",
        "image_url": "ignore",
        "picture": "image",
        "category": "path",
        "tree": "path",
        "Preis": "price",
        "weight": "number",
        "size": "category",
        "zip": "ignore",
        "stock": "number",
        "colors": "set",
        "brand": "category",
        "ean": "ignore",
        "added": "ignore",
        "currency": "ignore",
        "empty": "ignore",
        "extra": "json",
        "item_group_id": "family",
        "split": "split",
        "language": "ignore",
        "material": "category",
        "tags": "set",
        "extra.brand": "category",
    }


def test_title_comes_first_and_every_column_has_a_reason(tmp_path: Path) -> None:
    columns = guess(tmp_path, shop())
    assert [column.name for column in columns.of("text")] == ["Product Name", "notes"]
    assert all(column.why for column in columns.columns)
    assert columns.one("id").examples == ("'0001'", "'0002'", "'0003'")


def test_rare_keys_of_json_are_left_out_unless_named(tmp_path: Path) -> None:
    rows = [
        {
            "id": str(i),
            "title": "x",
            "more": json.dumps({"a": str(i % 3)} | ({"b": "y"} if i == 7 else {})),
        }
        for i in range(300)
    ]
    assert roles(guess(tmp_path, rows))["b"] == "ignore"
    assert roles(guess(tmp_path, rows, "category: b"))["b"] == "category"
    assert roles(guess(tmp_path, rows, "set: a")) == {
        "a": "set",
        "id": "id",
        "title": "text",
        "more": "json",
        "b": "ignore",
    }


def test_key_with_the_name_of_a_column_keeps_both(tmp_path: Path) -> None:
    rows = [{"id": str(i), "brand": "A", "more": '{"brand": "B"}'} for i in range(3)]
    columns = guess(tmp_path, rows, "category: [brand, more.brand]")
    assert [(c.name, c.column, c.key) for c in columns.of("category")] == [
        ("brand", "brand", None),
        ("more.brand", "more", "brand"),
    ]


def test_same_word_everywhere_is_left_out_of_large_tables_only(tmp_path: Path) -> None:
    rows = [{"id": str(i), "title": "t", "brand": "Luma"} for i in range(30)]
    assert roles(guess(tmp_path, rows))["brand"] == "ignore"
    assert roles(guess(tmp_path, rows[:3]))["brand"] == "category"


def test_number_of_things_is_a_category_and_codes_are_no_numbers(tmp_path: Path) -> None:
    rows = [
        {
            "id": f"p{i}",
            "title": "t",
            "pockets": str(i % 3),
            "code": f"0{i % 30}",
            "ref": str(100_000 + i % 25),
        }
        for i in range(60)
    ]
    found = roles(guess(tmp_path, rows))
    assert (found["pockets"], found["code"], found["ref"]) == ("category",) * 3


def test_groups_of_hundreds_are_a_kind_of_product(tmp_path: Path) -> None:
    rows = [{"id": str(i), "title": "t", "group": f"kind{i % 2}"} for i in range(300)]
    assert roles(guess(tmp_path, rows))["group"] == "category"
    assert roles(guess(tmp_path, rows, "group: group"))["group"] == "group"


def test_id_is_found_by_its_values_where_no_name_tells(tmp_path: Path) -> None:
    rows = [{"kind": "a", "nummer": str(i), "produkt": f"Schuh {i}"} for i in range(5)]
    found = roles(guess(tmp_path, rows))
    assert found["nummer"] == "id"
    assert found["produkt"] == "text"


def test_image_addresses_stay_the_image_column_where_there_is_no_other(tmp_path: Path) -> None:
    rows = [{"id": str(i), "image": f"https://example.com/{i}"} for i in range(5)]
    assert roles(guess(tmp_path, rows))["image"] == "image"


def test_override_names_roles_and_the_rest_is_guessed(tmp_path: Path) -> None:
    yaml = "id: ean\ntext: [notes]\nfamily: null\nset: brand\nvalue_separator: ';'\n"
    columns = guess(tmp_path, shop(), yaml)
    found = roles(columns)
    assert (found["ean"], found["brand"], found["item_group_id"]) == ("id", "set", "category")
    assert found["product_id"] != "id"
    assert [column.name for column in columns.of("text")] == ["notes", "Product Name"]
    assert columns.value_separator == ";"


def test_role_given_to_none_is_guessed_for_none(tmp_path: Path) -> None:
    columns = guess(tmp_path, shop(), "text: null\nimage: []\n")
    assert not columns.of("text")
    assert not columns.of("image")


def test_written_columns_are_read_back_the_same(tmp_path: Path) -> None:
    columns = guess(tmp_path, shop())
    again = guess(tmp_path, shop(), columns.to_yaml("What is what."))
    assert roles(again) == roles(columns)
    assert [c.name for c in again.of("text")] == [c.name for c in columns.of("text")]


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("title: x", r"unknown role 'title'; known are id, text, image"),
        (
            "text: [gone]",
            r"COLUMN_MISSING: products.csv \(delimiter ',', utf-8\) has no column \['gone'\], "
            r"which --columns names",
        ),
        ("text: notes\nimage: notes", "'notes' is both text and image"),
        ("id: [ean, zip]", r"id is one column, not \['ean', 'zip'\]"),
        ("text: 7", "7 is no name of a column; put it in quotes"),
        ("- a", "lines such as `text:"),
        ("a: [", "cannot be read"),
        ("value_separator: 5", "value_separator: 5 is no text"),
    ],
)
def test_overrides_that_make_no_sense(tmp_path: Path, yaml: str, message: str) -> None:
    with pytest.raises(CatalogueError, match=message):
        guess(tmp_path, shop(), yaml)


def test_no_id_names_the_columns_and_the_delimiter(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("id,title\n1,a\n1,a\n", encoding="utf-8")
    table = Table(path, delimiter="\t")
    with pytest.raises(
        CatalogueError,
        match=r"COLUMN_MISSING: p.csv \(delimiter '\\t', utf-8\).*its columns are \['id,title'\]",
    ):
        guess_columns(table, *profile(table))
