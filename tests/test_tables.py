"""Records of user files: nothing is retyped, and what cannot be read is named with its place."""

from __future__ import annotations

import csv
import datetime
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tritower.datamodules.prepare.tables import CatalogueError, Table

IDS = [
    "007",
    "08",
    "7",
    "135217135789158401",
    "1352171357E+5",
    "None",
    "NA",
    "1E5",
    "true",
    " x ",
    "null",
]


def table(path: Path, content: bytes | str, **options: str) -> Table:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Table(path, **options)


def rows(found: Table) -> list[tuple[int, int, object]]:
    """Row, line and cells or code of every record."""
    return [(r.row, r.line, r.fault.code if r.fault else dict(r.cells)) for r in found.records()]


def write(path: Path, ids: list[str]) -> Path:
    """The same column of ids in the format that the name says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"id": ids}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": id}) + "\n" for id in ids), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(
                file, delimiter="\t" if path.suffix == ".tsv" else ",", quoting=csv.QUOTE_ALL
            )
            writer.writerows([["id"], *([id] for id in ids)])
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_ids_come_back_verbatim(tmp_path: Path, suffix: str) -> None:
    assert [r.cells["id"] for r in Table(write(tmp_path / f"p{suffix}", IDS)).records()] == IDS


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    ids=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
        min_size=1,
        max_size=8,
    )
)
def test_any_text_comes_back_verbatim(tmp_path: Path, suffix: str, ids: list[str]) -> None:
    assert [r.cells["id"] for r in Table(write(tmp_path / f"p{suffix}", ids)).records()] == ids


def test_numbers_of_parquet_say_the_same_as_text(tmp_path: Path) -> None:
    data = {
        "id": [2**62, 7],
        "size": [12.0, None],
        "width": pa.array([59.9, float("nan")], pa.float32()),
        "new": [True, False],
        "day": [datetime.date(2020, 1, 2), None],
        "tags": [["a", "b"], []],
        "more": [{"k": 1.5}, None],
    }
    pq.write_table(pa.table(data), tmp_path / "p.parquet")
    first, second = Table(tmp_path / "p.parquet").records()
    assert first.cells == {
        "id": str(2**62),
        "size": "12",
        "width": "59.9",
        "new": "true",
        "day": "2020-01-02",
        "tags": ["a", "b"],
        "more": {"k": "1.5"},
    }
    assert second.cells == {
        "id": "7",
        "size": None,
        "width": None,
        "new": "false",
        "day": None,
        "tags": [],
        "more": None,
    }


def test_record_and_line_numbers_differ_with_quoted_newlines(tmp_path: Path) -> None:
    found = table(tmp_path / "p.csv", 'id,title\n1,"a\nb"\n2,"x "y" z"\n\n3,ok\n')
    assert rows(found) == [
        (1, 2, {"id": "1", "title": "a\nb"}),
        (2, 4, "UNREADABLE_ROW"),
        (3, 6, {"id": "3", "title": "ok"}),
    ]


def test_open_quote_takes_only_its_own_row(tmp_path: Path) -> None:
    found = table(tmp_path / "p.csv", 'id,title\n1,"open\n2,fine\n3,"quoted"\n4,last\n')
    assert [row[2] for row in rows(found)] == [
        "UNREADABLE_ROW",
        {"id": "2", "title": "fine"},
        {"id": "3", "title": "quoted"},
        {"id": "4", "title": "last"},
    ]
    only = table(tmp_path / "p.csv", 'id,title\n1,a\n2,"never closed\n3,b\n')
    assert [row[2] for row in rows(only)] == [
        {"id": "1", "title": "a"},
        "UNREADABLE_ROW",
        {"id": "3", "title": "b"},
    ]


def test_wrong_number_of_cells(tmp_path: Path) -> None:
    found = table(tmp_path / "p.csv", "id,title\n1,a,b\n2\n3,ok\n")
    assert [row[2] for row in rows(found)] == [
        "COLUMN_COUNT",
        "COLUMN_COUNT",
        {"id": "3", "title": "ok"},
    ]
    first = next(iter(found.records()))
    assert first.cells["id"] == "1"
    assert str(first.fault) == "COLUMN_COUNT: 3 cells where the header has 2: '1,a,b'"


def test_byte_that_is_not_in_the_encoding_is_named(tmp_path: Path) -> None:
    found = table(tmp_path / "p.csv", "id,title\n1,über\n2,Prêt-à-porter\n3,ok\n".encode("latin-1"))
    records = list(found.records())
    assert [r.fault.code if r.fault else None for r in records] == [
        "ENCODING_ERROR",
        "ENCODING_ERROR",
        None,
    ]
    content = (tmp_path / "p.csv").read_bytes()
    assert f"byte {content.index(bytes([0xEA]))} (line 3) is not utf-8" in records[1].fault.reason
    declared = Table(tmp_path / "p.csv", encoding="latin-1")
    assert [r.cells["title"] for r in declared.records()] == ["über", "Prêt-à-porter", "ok"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks(tmp_path: Path, encoding: str) -> None:
    assert rows(table(tmp_path / "p.csv", "id;title\n1;Prêt, à\n".encode(encoding))) == [
        (1, 2, {"id": "1", "title": "Prêt, à"})
    ]


def test_cut_off_utf_16_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match=r"ENCODING_ERROR.*set --encoding"):
        rows(table(tmp_path / "p.csv", "id,title\n1,ab\n".encode("utf-16")[:-1]))


def test_invisible_characters_of_the_header_are_removed(tmp_path: Path) -> None:
    found = table(tmp_path / "p.csv", "\ufeffid\u200b, title\u00a0,\n1,2,3\n")
    assert found.columns == ["id", "title", "column_3"]


@pytest.mark.parametrize(
    ("header", "delimiter"),
    [("id,a;b", ","), ("id;a,b;c", ";"), ("id\ta", "\t"), ("id|a", "|"), ("id", ",")],
)
def test_delimiter_is_that_of_the_header(tmp_path: Path, header: str, delimiter: str) -> None:
    assert table(tmp_path / "p.csv", header + "\n").delimiter == delimiter


def test_broken_json_lines(tmp_path: Path) -> None:
    lines = [
        '{"id": "1"}',
        "",
        "[1]",
        '{"id": 007}',
        '{"a":1,"a":2}',
        '{"id": "\\ud83d"}',
        '{"id": "2", "x ": "y"}',
    ]
    found = table(tmp_path / "p.jsonl", "\n".join(lines))
    assert found.columns == ["id", "x"]
    bad = "UNREADABLE_ROW"
    assert [row[:2] for row in rows(found)] == [(1, 1), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7)]
    assert [row[2] for row in rows(found)] == [
        {"id": "1"},
        bad,
        bad,
        bad,
        "ENCODING_ERROR",
        {"id": "2", "x": "y"},
    ]


def test_megabyte_cells_are_read_and_endless_ones_are_not(tmp_path: Path) -> None:
    buffer = io.StringIO()
    csv.writer(buffer).writerows([["id", "t"], ["1", "x" * 2_000_000], ["2", "y"]])
    assert [len(r.cells["t"]) for r in table(tmp_path / "p.csv", buffer.getvalue()).records()] == [
        2_000_000,
        1,
    ]
    endless = 'id,t\n1,"' + "x" * (17 * 2**20) + "\n2,fine\n"
    assert [row[2] for row in rows(table(tmp_path / "p.csv", endless))] == [
        "UNREADABLE_ROW",
        {"id": "2", "t": "fine"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("p.xlsx", b"", {}, r"unknown file type; its name must end in one of .csv"),
        ("p.csv", b"", {}, "is empty: a header line"),
        ("p.csv", b"id,id\n", {}, r"columns \['id'\] appear twice"),
        ("p.csv", b"id\n", {"encoding": "utf-9"}, "unknown --encoding 'utf-9'"),
        ("p.csv", b"id\n", {"delimiter": ",,"}, "--delimiter ',,' must be one character"),
        ("p.csv", "idé\n".encode("latin-1"), {}, "ENCODING_ERROR: the header"),
        ("p.parquet", b"PAR1junk", {}, "UNREADABLE_FILE"),
        ("p.jsonl", b"[1]\n{", {}, r"no line can be read; the first one: UNREADABLE_ROW"),
    ],
)
def test_files_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes, options: dict[str, str], message: str
) -> None:
    with pytest.raises(CatalogueError, match=message):
        table(tmp_path / name, content, **options)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match=r"gone\.csv: no such file"):
        Table(tmp_path / "gone.csv")
