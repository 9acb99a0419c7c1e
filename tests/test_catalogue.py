"""One row of a user's file: what is kept of it, and what is recorded about the rest."""

from __future__ import annotations

import re
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.pictures import encode, noise
from tritower.datamodules.prepare.catalogue import FieldReader, ProductParser, parse_attribute
from tritower.datamodules.prepare.columns import Column, Columns, Role
from tritower.datamodules.prepare.pictures import PictureReader
from tritower.datamodules.prepare.records import Record
from tritower.datamodules.prepare.rows import Row
from tritower.datamodules.prepare.values import Cell, Number
from tritower.datamodules.schema import Attribute

ROLES: dict[str, Role] = {
    "id": "id",
    "title": "text",
    "about": "text",
    "picture": "image",
    "price": "price",
    "weight": "number",
    "brand": "category",
    "category": "path",
    "colors": "set",
    "more": "json",
    "group": "group",
    "family": "family",
    "split": "split",
}
COLUMNS = Columns(
    (
        *(Column(name, name, None, role) for name, role in ROLES.items()),
        Column("size", "more", "size", "category"),
    )
)


def parse(cells: dict[str, Cell], root: Path = Path("/nowhere"), **options: object) -> Row:
    parser = ProductParser("products.csv", COLUMNS, FieldReader(PictureReader(root), **options))
    return parser(Record(3, 7, {"id": "007", "title": "Shoe"} | cells))


def codes(row: Row) -> list[tuple[str, str]]:
    return [(problem.column, problem.code) for problem in row.problems]


def test_whole_row(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(noise()))
    row = parse(
        {
            "about": "For <b>running</b>",
            "picture": "a.png",
            "price": "$1,600.00",
            "weight": "-3.5",
            "brand": " Acme ",
            "category": "Shoes > Boots & more",
            "colors": "red|blue|red",
            "more": '{"size": "42", "unknown": 1}',
            "group": "g1",
            "family": " f1",
            "split": "Validation",
        },
        tmp_path,
    )
    assert row.item is not None
    assert row.id == "007"
    assert row.item.text == {"title": "Shoe", "about": "For running"}
    assert len(row.item.images) == 1
    assert row.item.attributes == {
        "price": 1600.0,
        "weight": -3.5,
        "brand": "Acme",
        "category": ["Shoes", "Boots & more"],
        "colors": ["red", "blue"],
        "size": "42",
    }
    assert (row.group, row.family, row.split) == ("g1", " f1", "val")
    assert not row.problems


@pytest.mark.parametrize(
    "title", ["None", "null", "NA", "nan", "N/A", "Null Island tee", "0", "false"]
)
def test_titles_that_look_like_nothing_are_kept(title: str) -> None:
    assert parse({"title": title}).item.text == {"title": title}


@pytest.mark.parametrize("title", ["", "  ", None, "<b></b>"])
def test_empty_title_is_noted_and_rejects_only_where_nothing_else_is_there(
    title: str | None,
) -> None:
    row = parse({"title": title, "brand": "A"}, strict=True)
    assert row.item is not None
    assert codes(row) == [("title", "TEXT_EMPTY")]
    row = parse({"title": title})
    assert row.item is None
    assert codes(row) == [("title", "TEXT_EMPTY"), ("", "NOTHING_USABLE")]


def test_html_can_be_kept() -> None:
    assert (
        parse({"title": "a &amp; <b>b</b>"}, clean_html=False).item.text["title"]
        == "a &amp; <b>b</b>"
    )


@pytest.mark.parametrize("id", ["", None, ["a"], {"a": "b"}])
def test_row_without_an_id_is_rejected(id: Cell) -> None:
    row = parse({"id": id})
    assert row.item is None
    assert codes(row) == [("id", "ID_MISSING")]
    assert (row.problems[0].row, row.problems[0].line) == (3, 7)


@given(st.text(min_size=1))
def test_ids_are_verbatim(id: str) -> None:
    assert parse({"id": id}).id == id


@pytest.mark.parametrize(
    ("column", "cell", "code"),
    [
        ("price", "140.000", "PRICE_AMBIGUOUS"),
        ("price", "1,600", "PRICE_AMBIGUOUS"),
        ("price", "-5", "PRICE_OUT_OF_RANGE"),
        ("price", "0", "PRICE_OUT_OF_RANGE"),
        ("price", "1e12", "PRICE_OUT_OF_RANGE"),
        ("price", "NaN", "PRICE_OUT_OF_RANGE"),
        ("price", "ask us", "PRICE_UNPARSEABLE"),
        ("weight", "12 kg", "NUMBER_UNPARSEABLE"),
        ("weight", "1.500", "NUMBER_AMBIGUOUS"),
        ("brand", ["A", "B"], "NOT_A_VALUE"),
        ("brand", {"a": "b"}, "NOT_A_VALUE"),
        ("colors", {"a": "b"}, "NOT_A_LIST"),
        ("title", {"a": "b"}, "NOT_A_TEXT"),
        ("more", "{broken", "JSON_INVALID"),
        ("more", "[1]", "JSON_INVALID"),
        ("group", ["a"], "NOT_A_VALUE"),
    ],
)
def test_bad_field_becomes_missing_and_the_policy_decides_on_the_row(
    column: str, cell: Cell, code: str
) -> None:
    cells = {"about": "x", column: cell}
    row = parse(cells)
    assert row.item is not None
    assert codes(row) == [(column, code)]
    assert column not in row.item.attributes
    assert column not in row.item.text
    assert getattr(row, column, None) is None
    rejected = parse(cells, strict=True)
    assert rejected.item is None
    assert codes(rejected) == [(column, code)]
    problem = row.problems[0]
    assert (problem.file, problem.id, len(problem.reason) < 200) == ("products.csv", "007", True)


def test_unknown_split_is_test_so_that_a_holdout_is_never_trained_on() -> None:
    row = parse({"about": "x", "split": "holdout"})
    assert (row.split, codes(row)) == ("test", [("split", "SPLIT_UNKNOWN")])
    assert parse({"about": "x", "split": "holdout"}, strict=True).item is None
    assert parse({"about": "x", "split": ""}).split is None


def test_decimal_sign_can_be_set() -> None:
    assert parse({"price": "140.000"}, decimal="comma").item.attributes["price"] == 140_000
    assert parse({"price": "140.000"}, decimal="point").item.attributes["price"] == 140
    assert parse({"price": Number("140.125")}).item.attributes["price"] == 140.125


def test_one_value_in_a_list_is_a_value() -> None:
    assert parse({"brand": ["A"], "title": ["one", "two"]}).item.attributes == {"brand": "A"}
    assert parse({"title": ["one", "two"]}).item.text == {"title": "one\ntwo"}


def test_several_pictures_and_the_bad_one_is_named(tmp_path: Path) -> None:
    for name, seed in (("a.png", 1), ("b.png", 2), ("c|d.png", 3)):
        (tmp_path / name).write_bytes(encode(noise(seed=seed)))
    (tmp_path / "cut.jpg").write_bytes(encode(noise(), "JPEG")[:300])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.jpg").write_text("<html>404", encoding="utf-8")
    row = parse({"picture": "a.png|cut.jpg|b.png|a.png|empty.jpg|page.jpg|gone.jpg"}, tmp_path)
    assert len(row.item.images) == 2
    assert [code for _, code in codes(row)] == [
        "TRUNCATED_IMAGE",
        "EMPTY_FILE",
        "NOT_AN_IMAGE",
        "FILE_MISSING",
    ]
    assert all(
        name in p.reason
        for name, p in zip(
            ("cut.jpg", "empty.jpg", "page.jpg", "gone.jpg"), row.problems, strict=True
        )
    )
    assert len(parse({"picture": '["a.png", "c|d.png"]'}, tmp_path).item.images) == 2
    assert (
        len(
            parse(
                {"picture": [b"no", {"bytes": encode(noise()), "path": "x"}]}, tmp_path
            ).item.images
        )
        == 1
    )


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_in_file_names_are_found_however_they_are_written(
    tmp_path: Path, form: str
) -> None:
    name = "连衣裙 é №5 100%#.png"
    (tmp_path / unicodedata.normalize("NFD" if form == "NFC" else "NFC", name)).write_bytes(
        encode(noise())
    )
    assert len(parse({"picture": unicodedata.normalize(form, name)}, tmp_path).item.images) == 1
    row = parse({"picture": f"x{name}"}, tmp_path)
    assert codes(row) == [("picture", "FILE_MISSING")]
    assert f"x{name}" in row.problems[0].reason


@pytest.mark.parametrize(
    "address",
    [
        "https://x.com/a.jpg",
        "file:///etc/hostname",
        "//host/a.jpg",
        "data:image/png;base64,AA",
        "S3://b/c",
    ],
)
def test_addresses_are_not_fetched(address: str) -> None:
    assert codes(parse({"picture": address})) == [("picture", "REMOTE_NOT_ALLOWED")]


OPENED: list[str] = []
WATCHING: list[bool] = []
# An audit hook cannot be taken away again: it does nothing while WATCHING is empty.
sys.addaudithook(
    lambda event, args: OPENED.append(str(args[0])) if WATCHING and event == "open" else None
)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "../../../../etc/hostname",
        "/etc/hostname",
        "a/../../secret.png",
        "link.png",
        "linked/secret.png",
        ".",
    ],
)
def test_nothing_outside_the_picture_folder_is_opened(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(encode(noise()))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "linked").symlink_to(tmp_path)
    OPENED.clear()
    WATCHING.append(True)
    row = parse({"picture": name}, root)
    WATCHING.clear()
    assert not [path for path in OPENED if "secret" in path or "hostname" in path]
    if name == ".":
        assert codes(row) == [("picture", "FILE_MISSING")]
    else:
        assert row.item is None
        assert codes(row) == [("picture", "PATH_OUTSIDE_ROOT")]


def test_paths_that_stay_inside_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b.png").write_bytes(encode(noise()))
    (tmp_path / "l.png").symlink_to("b.png")
    for name in ("a/../b.png", "./b.png", "l.png", str(tmp_path / "b.png")):
        assert len(parse({"picture": name}, tmp_path).item.images) == 1


@pytest.mark.parametrize("name", ["a\0.png", "x" * 5000, "%2e%2e/secret.png", "loop.png", "dir"])
def test_odd_paths_are_problems_and_not_crashes(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "dir").mkdir()
    row = parse({"picture": name}, tmp_path)
    assert row.item is not None
    assert codes(row)[0][1] in ("FILE_MISSING", "FILE_UNREADABLE")


def test_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(10**9)
    assert codes(parse({"picture": "a.png"}, tmp_path)) == [("picture", "FILE_TOO_LARGE")]


CELLS = st.recursive(
    st.none() | st.text(max_size=20) | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(cells=st.dictionaries(st.sampled_from(sorted(ROLES)), CELLS), strict=st.booleans())
def test_any_cells_are_accepted_or_rejected_with_a_reason(
    tmp_path: Path, cells: dict[str, Cell], strict: bool
) -> None:
    row = parse(cells, tmp_path, strict=strict)
    assert row.item is not None or row.problems
    if row.item is not None:
        assert row.id == cells.get("id", "007")
        assert all(row.item.text.values())
        assert all(value not in (None, "", []) for value in row.item.attributes.values())
    for problem in row.problems:
        assert problem.code.isupper()
        assert len(problem.reason) < 400


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("number", "59.9", 59.9),
        ("number", "$1,600.00", 1600.0),
        ("category", " Acme ", "Acme"),
        ("path", "Shoes > Boots", ["Shoes", "Boots"]),
        ("path", "Shoes>Boots", ["Shoes", "Boots"]),
        ("set", "red|blue", ["red", "blue"]),
    ],
)
def test_attribute_typed_by_a_person(kind: str, text: str, value: object) -> None:
    assert parse_attribute(Attribute("x", kind), text) == value


@pytest.mark.parametrize(
    ("attribute", "text", "message"),
    [
        (
            Attribute("size", "number"),
            "M",
            r"size='M': 'M' is not a number; a number such as 1600 or 59.9 is expected",
        ),
        (
            Attribute("price", "number"),
            "1,600",
            r"price='1,600': '1,600' can be read in two ways; a number such as 1600",
        ),
        (Attribute("price", "number", log=True), "-3", r"price='-3': must not be negative"),
        (Attribute("brand", "category"), "  ", r"brand='  ': no value"),
        (Attribute("tree", "path"), " > ", r"tree=' > ': no value"),
    ],
)
def test_attribute_that_cannot_be_meant(attribute: Attribute, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_attribute(attribute, text)


def test_guide_names_every_code() -> None:
    root = Path(__file__).parent.parent
    guide = (root / "docs/catalogue.md").read_text(encoding="utf-8")
    source = "".join(
        path.read_text(encoding="utf-8") for path in sorted((root / "datamodules").rglob("*.py"))
    )
    codes = set(re.findall(r'(?:BadValue|ImageError|rejected)\(\s*"([A-Z_]+)"', source))
    assert {"EMPTY_FILE", "ID_MISSING", "UNKNOWN_QUERY"} <= codes
    assert {code for code in codes if f"`{code}`" not in guide} == set()
