"""The whole command: files go in, a folder comes out, and every row is accounted for."""

from __future__ import annotations

import csv
import io
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.pictures import encode, noise, png_header
from tests.support.preparing import prepare
from tritower.artefacts import storage
from tritower.datamodules.images import decode
from tritower.datamodules.prepare.command import main
from tritower.datamodules.prepare.summary import summary
from tritower.datamodules.prepare.tables import CatalogueError
from tritower.datamodules.schema import Schema

Rows = list[dict[str, str]]


def write_csv(path: Path, rows: Rows) -> Path:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(buffer.getvalue(), encoding="utf-8")
    return path


def read(folder: Path, name: str = "products") -> Rows:
    return [
        row
        for shard in sorted((folder / name).glob("shard-*.parquet"))
        for row in pq.read_table(shard).to_pylist()
    ]


def problems(file: Path) -> Rows:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def codes(folder: Path) -> list[tuple[str, str, str]]:
    return [
        (problem["row"], problem["id"], problem["code"])
        for problem in problems(folder / "problems.csv")
    ]


def shop(folder: Path, n: int = 60, image_side: int = 40) -> Rows:
    """Products with pictures in files, one picture of its own each."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n):
        (folder / f"img/{i}.png").write_bytes(encode(noise(image_side, 30, seed=i)))
        facts = {"price": f"{i + 1}.5", "brand": f"B{i % 3}", "style_id": f"s{i // 2}"}
        rows.append(
            {"id": f"{i:03d}", "title": f"Red shoe number {i}", "image": f"img/{i}.png"} | facts
        )
    return rows


def test_folder_holds_everything_in_the_agreed_layout(tmp_path: Path) -> None:
    report = prepare(write_csv(tmp_path / "products.csv", shop(tmp_path)), tmp_path / "c")
    manifest = storage.verify(tmp_path / "c", "catalogue")
    assert manifest.meta["settings"]["clean_html"] is True
    assert manifest.meta["accepted"] == report["accepted"] == 60
    assert sorted(manifest.files) == sorted(
        [
            "schema.json",
            "report.json",
            "problems.csv",
            *(f"products/shard-0000{n}.parquet" for n in range(3)),
        ]
    )
    rows = read(tmp_path / "c")
    assert list(rows[0]) == [
        "product_id",
        "group",
        "family",
        "split",
        "text",
        "images",
        "attributes",
    ]
    assert {row["product_id"] for row in rows} == {f"{i:03d}" for i in range(60)}
    assert [row["split"] for row in rows] == sorted(
        (row["split"] for row in rows), key=["train", "val", "test"].index
    )
    schema = Schema.load(tmp_path / "c/schema.json")
    assert (schema.text, schema.images) == (("title",), True)
    assert [(a.name, a.attribute_type) for a in schema.attributes] == [
        ("price", "number"),
        ("brand", "category"),
    ]
    train = [row["attributes"]["price"] for row in rows if row["split"] == "train"]
    price = schema.numbers[0]
    assert price.mean == pytest.approx(sum(train) / len(train))
    assert (price.minimum, price.maximum, price.present, price.log) == (
        min(train),
        max(train),
        1.0,
        False,
    )
    assert json.loads((tmp_path / "c/report.json").read_text(encoding="utf-8")) == report


def test_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    rows = shop(tmp_path, 80)
    rows[7]["image"] = "gone.png"
    rows[70]["id"] = rows[3]["id"]
    write_csv(tmp_path / "products.csv", rows)
    for workers in (0, 1, 2):
        prepare(tmp_path / "products.csv", tmp_path / f"c{workers}", num_workers=workers)
    fingerprints = {storage.fingerprint(tmp_path / f"c{workers}") for workers in (0, 1, 2)}
    assert len(fingerprints) == 1


def test_one_cut_off_picture_in_a_thousand(tmp_path: Path) -> None:
    rows = shop(tmp_path, 40)
    rows = [{**rows[i % 40], "id": str(i)} for i in range(1000)]
    (tmp_path / "img/cut.jpg").write_bytes(encode(noise(100, 80), "JPEG")[:500])
    rows[699]["image"] = "img/cut.jpg"
    table = write_csv(tmp_path / "products.csv", rows)
    report = prepare(table, tmp_path / "keep", max_problems="1%")
    assert (report["rows"], report["accepted"], report["rejected"]) == (1000, 1000, 0)
    assert codes(tmp_path / "keep") == [("700", "699", "TRUNCATED_IMAGE")]
    assert report["products"]["with_picture"] == 999
    strict = prepare(table, tmp_path / "strict", on_bad_field="reject")
    assert (strict["accepted"], strict["rejected"]) == (999, 1)
    with pytest.raises(
        CatalogueError,
        match=r"1 of 1,000 rows of products.csv \(0.1%\) have a problem; --max-problems 0 ",
    ):
        prepare(table, tmp_path / "none", max_problems="0")


def test_good_rows_are_the_same_with_and_without_bad_ones(tmp_path: Path) -> None:
    good = shop(tmp_path, 30)
    bad = [
        {"id": "", "title": "no id"},
        {"id": "b1", "title": "leaves", "image": "../../etc/hostname"},
        {"id": "b2"},
        {"id": "000", "title": "the row 000 is there already"},
    ]
    mixed = [bad[0], *good[:10], bad[1], *good[10:20], bad[2], *good[20:], bad[3]]
    prepare(write_csv(tmp_path / "good.csv", good), tmp_path / "good")
    report = prepare(write_csv(tmp_path / "mixed.csv", mixed), tmp_path / "mixed")
    assert read(tmp_path / "good") == read(tmp_path / "mixed")
    assert (report["rows"], report["accepted"], report["rejected"]) == (34, 30, 4)
    assert codes(tmp_path / "mixed") == [
        ("1", "", "ID_MISSING"),
        ("12", "b1", "PATH_OUTSIDE_ROOT"),
        ("23", "b2", "TEXT_EMPTY"),
        ("23", "b2", "NOTHING_USABLE"),
        ("34", "000", "ID_DUPLICATE"),
    ]


def test_rejected_row_does_not_take_its_id_away(tmp_path: Path) -> None:
    rows = [
        {"id": "1", "title": "x", "image": "../out.png"},
        {"id": "1", "title": "second"},
        {"id": "1", "title": "third"},
    ]
    prepare(write_csv(tmp_path / "p.csv", rows), tmp_path / "c")
    assert [row["text"]["title"] for row in read(tmp_path / "c")] == ["second"]
    assert codes(tmp_path / "c") == [("1", "1", "PATH_OUTSIDE_ROOT"), ("3", "1", "ID_DUPLICATE")]


def failing(n: int, **cells: str) -> Rows:
    return [
        {"id": str(i)} | {name: cell.format(i) for name, cell in cells.items()} for i in range(n)
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            failing(3, image="https://x.com/{}.jpg"),
            "none of the 3 rows of p.csv .* was accepted: most often",
        ),
        (
            failing(10, title="t", image="https://x.com/{}.jpg"),
            "none of 10 pictures .* most often REMOTE_NOT_ALLOWED",
        ),
        (
            failing(50, title="t", image="{}.jpg"),
            r"none of 50 pictures .* most often FILE_MISSING .* --image-root",
        ),
        (
            [{"id": "", "title": "t"}] * 2,
            "none of the 2 rows of p.csv .* was accepted: most often ID_MISSING",
        ),
    ],
)
def test_nothing_is_published_where_everything_fails(
    tmp_path: Path, rows: Rows, message: str
) -> None:
    with pytest.raises(CatalogueError, match=message):
        prepare(
            write_csv(tmp_path / "p.csv", rows), tmp_path / "c", columns=_yaml(tmp_path, "id: id")
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "c.problems.csv",
        "columns.yaml",
        "p.csv",
    ]
    assert len(problems(tmp_path / "c.problems.csv")) >= len(rows)


def _yaml(folder: Path, text: str) -> Path:
    (folder / "columns.yaml").write_text(text, encoding="utf-8")
    return folder / "columns.yaml"


def test_catalogue_without_pictures_and_one_without_rows(tmp_path: Path) -> None:
    report = prepare(
        write_csv(tmp_path / "p.csv", [{"id": "1", "title": "only text"}]), tmp_path / "c"
    )
    assert report["products"]["with_picture"] == 0
    assert not Schema.load(tmp_path / "c/schema.json").images
    assert read(tmp_path / "c")[0]["images"] == []
    assert "attributes" not in read(tmp_path / "c")[0]
    (tmp_path / "empty.csv").write_text("id,title\n", encoding="utf-8")
    with pytest.raises(CatalogueError, match=r"empty.csv has no rows"):
        prepare(tmp_path / "empty.csv", tmp_path / "d")


def test_pictures_without_texts(tmp_path: Path) -> None:
    rows = [{"id": row["id"], "image": row["image"]} for row in shop(tmp_path, 3)]
    report = prepare(write_csv(tmp_path / "p.csv", rows), tmp_path / "c")
    assert report["problems"] == {}
    assert "text" not in read(tmp_path / "c")[0]
    assert Schema.load(tmp_path / "c/schema.json").text == ()


def test_pictures_are_downsized_once_and_turned(tmp_path: Path) -> None:
    exif = noise().getexif()
    exif[0x0112] = 6
    (tmp_path / "a.jpg").write_bytes(encode(noise(900, 300), "JPEG", exif=exif))
    (tmp_path / "b.jpg").write_bytes(encode(noise(50, 40), "JPEG"))
    (tmp_path / "huge.png").write_bytes(png_header(30_000, 30_000))
    rows = [{"id": "1", "image": "a.jpg|b.jpg|huge.png"}]
    prepare(write_csv(tmp_path / "p.csv", rows), tmp_path / "c", image_size=96)
    first, second = read(tmp_path / "c")[0]["images"]
    assert decode(first).size == (32, 96)
    assert second == (tmp_path / "b.jpg").read_bytes()
    assert codes(tmp_path / "c") == [("1", "1", "IMAGE_TOO_LARGE"), ("1", "1", "TEXT_EMPTY")][:1]


def test_html_cleaning_is_on_and_can_be_switched_off(tmp_path: Path) -> None:
    table = write_csv(
        tmp_path / "p.csv", [{"id": "1", "title": "Tom &amp; Jerry&#39;s <b>mug</b>"}]
    )
    for clean, title in ((True, "Tom & Jerry's mug"), (False, "Tom &amp; Jerry&#39;s <b>mug</b>")):
        prepare(table, tmp_path / "c", clean_html=clean, overwrite=True)
        assert read(tmp_path / "c")[0]["text"]["title"] == title
        assert storage.read_manifest(tmp_path / "c").meta["settings"]["clean_html"] is clean


def test_blank_cell_does_not_retype_a_column(tmp_path: Path) -> None:
    sizes = ["12", "38", "12", ""]
    for name, values in (("full", sizes[:3]), ("blank", sizes)):
        rows = [{"id": str(i), "title": "t", "size_code": size} for i, size in enumerate(values)]
        prepare(write_csv(tmp_path / "p.csv", rows), tmp_path / name)
        numbers = [
            {**row, "size_code": float(row["size_code"]) if row["size_code"] else None}
            for row in rows
        ]
        pq.write_table(pa.Table.from_pylist(numbers), tmp_path / "p.parquet")
        prepare(tmp_path / "p.parquet", tmp_path / f"{name}-parquet")
    found = [
        {row["attributes"]["size_code"] for row in read(tmp_path / n)} - {None}
        for n in ("full", "blank", "full-parquet", "blank-parquet")
    ]
    assert found == [{"12", "38"}] * 4


def test_prices_of_one_column(tmp_path: Path) -> None:
    prices = [
        "1,299.00",
        "1600",
        "$1,600.00",
        "140.000",
        ",89",
        "1,600",
        "-5",
        "0",
        "1e12",
        "NaN",
        "",
    ]
    rows = [{"id": str(i), "title": "t", "price": price} for i, price in enumerate(prices)]
    prepare(write_csv(tmp_path / "p.csv", rows), tmp_path / "c")
    kept = {row["product_id"]: row["attributes"]["price"] for row in read(tmp_path / "c")}
    assert [kept[str(i)] for i in range(11)] == [1299, 1600, 1600, *[None] * 8]
    assert [code for _, _, code in codes(tmp_path / "c")] == ["PRICE_AMBIGUOUS"] * 3 + [
        "PRICE_OUT_OF_RANGE"
    ] * 4


def test_skewed_numbers_are_described_by_their_logarithm(tmp_path: Path) -> None:
    rows = [
        {"id": str(i), "title": "t", "price": f"{1.2**i:.2f}", "grams": str(i + 100)}
        for i in range(1, 60)
    ]
    prepare(write_csv(tmp_path / "p.csv", rows), tmp_path / "c")
    assert {a.name: a.log for a in Schema.load(tmp_path / "c/schema.json").numbers} == {
        "price": True,
        "grams": False,
    }


def test_statistics_come_from_the_train_split_only(tmp_path: Path) -> None:
    rows = [
        {
            "id": str(i),
            "title": "t",
            "price": "1000000" if i == 7 else f"{i}.5",
            "split": "test" if i == 7 else "train",
        }
        for i in range(30)
    ]
    prepare(write_csv(tmp_path / "p.csv", rows), tmp_path / "c")
    price = Schema.load(tmp_path / "c/schema.json").numbers[0]
    assert price.maximum == 29.5
    assert price.present == 1


def test_split_column_is_kept_and_leaks_are_reported(tmp_path: Path) -> None:
    rows = shop(tmp_path, 8)
    for i, row in enumerate(rows):
        row["split"] = ["train", "test"][i % 2]
    report = prepare(write_csv(tmp_path / "p.csv", rows), tmp_path / "c")
    assert report["splits"] == {"train": 4, "val": 0, "test": 4}
    assert report["leaks"]["family"]["count"] == 4
    assert report["leaks"]["family"]["examples"][0] == {
        "key": "s0",
        "ids": {"test": ["001"], "train": ["000"]},
    }


def test_some_unknown_names_neither_hide_a_split_column_nor_reach_training(tmp_path: Path) -> None:
    rows = [
        {"id": str(i), "title": f"t{i}", "split": ["train", "train", "val", "holdout"][i % 4]}
        for i in range(40)
    ]
    report = prepare(write_csv(tmp_path / "p.csv", rows), tmp_path / "c")
    assert report["problems"] == {"SPLIT_UNKNOWN": 10}
    named = {"train": "train", "val": "val", "holdout": "test"}
    assert {row["product_id"]: row["split"] for row in read(tmp_path / "c")} == {
        row["id"]: named[row["split"]] for row in rows
    }


def test_column_of_other_values_is_an_attribute_whatever_its_name(tmp_path: Path) -> None:
    rows = [
        {"id": str(i), "title": f"t{i}", "split": ["hem", "back", "none"][i % 3]} for i in range(40)
    ]
    prepare(write_csv(tmp_path / "p.csv", rows), tmp_path / "c")
    assert {row["attributes"]["split"] for row in read(tmp_path / "c")} == {"hem", "back", "none"}


def test_same_picture_under_two_ids_is_one_family_in_one_split(tmp_path: Path) -> None:
    rows = [{"id": row["id"], "title": "t", "image": row["image"]} for row in shop(tmp_path, 40)]
    for i in range(0, 40, 2):
        (tmp_path / f"img/{i + 1}.png").write_bytes((tmp_path / f"img/{i}.png").read_bytes())
    report = prepare(
        write_csv(tmp_path / "p.csv", rows), tmp_path / "c", val_share=0.3, test_share=0.3
    )
    found = {row["product_id"]: (row["family"], row["split"]) for row in read(tmp_path / "c")}
    assert all(found[f"{i:03d}"] == found[f"{i + 1:03d}"] for i in range(0, 40, 2))
    assert (
        report["families"],
        report["family_from_picture"],
        report["leaks"]["picture"]["count"],
    ) == (20, 40, 0)


def test_equal_input_gives_an_equal_fingerprint_and_overwrite_is_asked_for(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "p.csv", [{"id": "1", "title": "t"}])
    prepare(table, tmp_path / "c")
    first = storage.fingerprint(tmp_path / "c")
    with pytest.raises(storage.ArtefactError, match="already exists"):
        prepare(table, tmp_path / "c")
    prepare(table, tmp_path / "c", overwrite=True)
    assert storage.fingerprint(tmp_path / "c") == first


def test_failed_run_leaves_the_catalogue_that_was_there(tmp_path: Path) -> None:
    prepare(write_csv(tmp_path / "p.csv", [{"id": "1", "title": "t"}]), tmp_path / "c")
    bad = write_csv(tmp_path / "p.csv", [{"id": "", "title": "t"}])
    with pytest.raises(CatalogueError, match="none of the 1 rows"):
        prepare(bad, tmp_path / "c", columns=_yaml(tmp_path, "id: id"), overwrite=True)
    assert [row["product_id"] for row in read(tmp_path / "c")] == ["1"]


# Queries and judgements


def products(folder: Path) -> Path:
    splits = ["train", "train", "val", "test", "test"]
    return write_csv(
        folder / "products.csv",
        [{"id": f"p{i}", "title": f"t{i}", "split": split} for i, split in enumerate(splits)],
    )


def test_pairs_that_ask_the_same_are_one_query(tmp_path: Path) -> None:
    (tmp_path / "q.png").write_bytes(encode(noise()))
    rows = [
        {
            "query": "red shoe",
            "query_image": "",
            "query_product_id": "",
            "product_id": "p0",
            "weight": "3",
        },
        {
            "query": "red shoe",
            "query_image": "",
            "query_product_id": "",
            "product_id": "p3",
            "weight": "1",
        },
        {
            "query": "",
            "query_image": "q.png",
            "query_product_id": "",
            "product_id": "p2",
            "weight": "2.5",
        },
        {
            "query": "",
            "query_image": "",
            "query_product_id": "p3",
            "product_id": "p4",
            "weight": "1",
        },
        {
            "query": "like it, in red",
            "query_image": "q.png",
            "query_product_id": "p0",
            "product_id": "p1",
            "weight": "1",
        },
        {
            "query": "red shoe",
            "query_image": "",
            "query_product_id": "",
            "product_id": "p3",
            "weight": "2",
        },
        {
            "query": "red shoe",
            "query_image": "",
            "query_product_id": "",
            "product_id": "p1",
            "weight": "0",
        },
    ]
    report = prepare(
        products(tmp_path), tmp_path / "c", pairs=write_csv(tmp_path / "pairs.csv", rows)
    )
    queries = {
        (q["text"], bool(q["images"]), q["source_product_id"]): q
        for q in read(tmp_path / "c", "queries")
    }
    assert {key: q["split"] for key, q in queries.items()} == {
        ("red shoe", False, None): "train",
        (None, True, None): "val",
        (None, False, "p3"): "test",
        ("like it, in red", True, "p0"): "train",
    }
    qrels = pq.read_table(tmp_path / "c/qrels.parquet")
    assert qrels.schema.types == [pa.string(), pa.string(), pa.float32()]
    red = queries["red shoe", False, None]["query_id"]
    assert [
        (r["product_id"], r["relevance"]) for r in qrels.to_pylist() if r["query_id"] == red
    ] == [
        ("p0", 3),
        ("p3", 2),
        ("p1", 0),
    ]
    assert report["queries"] == {
        "count": 4, "splits": {"train": 2, "val": 1, "test": 1},
        "judgements": 6, "irrelevant": 1, "repeated": 1,
        "unread_columns": {"pairs.csv": []},
    }  # fmt: skip
    assert report["files"]["pairs.csv"] == {
        "rows": 7,
        "accepted": 7,
        "rejected": 0,
        "with_problem": 0,
    }


def test_columns_of_a_log_that_are_not_read_are_named_and_repeated_rows_counted(
    tmp_path: Path,
) -> None:
    """A raw log has a row for each click, and events that are no grades."""
    rows = [
        {"time": str(i), "query": "red shoe", "product_id": f"p{i % 2}", "event": "click"}
        for i in range(5)
    ]
    report = prepare(
        products(tmp_path), tmp_path / "c", pairs=write_csv(tmp_path / "log.csv", rows)
    )
    assert report["queries"]["unread_columns"] == {"log.csv": ["time", "event"]}
    facts = summary(report, 1.0, tmp_path / "c")
    assert facts["judgements"] == "2, and 3 rows that repeat one"
    assert facts["not read"] == "log.csv: time, event"


def test_problems_of_pairs_are_named_and_never_crash(tmp_path: Path) -> None:
    rows = [
        {"query_id": "q1", "query": "red", "image": "", "product_id": "p0", "weight": "1"},
        {"query_id": "q1", "query": "blue", "image": "", "product_id": "p1", "weight": "1"},
        {"query_id": "q2", "query": "", "image": "gone.png", "product_id": "p1", "weight": "1"},
        {"query_id": "q2", "query": "", "image": "gone.png", "product_id": "p0", "weight": "1"},
        {"query_id": "q3", "query": "x", "image": "", "product_id": "nobody", "weight": "1"},
        {"query_id": "q3", "query": "x", "image": "", "product_id": "p0", "weight": "-1"},
        {"query_id": "", "query": "x", "image": "", "product_id": "p0", "weight": "1"},
        {"query_id": "q3", "query": "x", "image": "", "product_id": "p1", "weight": ""},
        {"query_id": "q3", "query": "x", "image": "", "product_id": "p1", "weight": "1"},
    ]
    report = prepare(
        products(tmp_path), tmp_path / "c", pairs=write_csv(tmp_path / "pairs.csv", rows)
    )
    assert codes(tmp_path / "c") == [
        ("3", "q2", "FILE_MISSING"),
        ("3", "q2", "NOTHING_USABLE"),
        ("7", "", "ID_MISSING"),
        ("2", "q1", "QUERY_CONFLICT"),
        ("4", "q2", "UNKNOWN_QUERY"),
        ("5", "q3", "UNKNOWN_PRODUCT"),
        ("6", "q3", "WEIGHT_INVALID"),
        ("8", "q3", "WEIGHT_INVALID"),
    ]
    counts = report["files"]["pairs.csv"]
    assert (counts["rows"], counts["accepted"], counts["rejected"], counts["with_problem"]) == (
        9,
        2,
        7,
        7,
    )


def test_queries_with_judgements(tmp_path: Path) -> None:
    queries = [
        {
            "query_id": "007",
            "type": "text",
            "text": "None",
            "image": "",
            "source_product_id": "",
            "split": "test",
        },
        {
            "query_id": "7",
            "type": "product",
            "text": "copy",
            "image": "copy.jpg",
            "source_product_id": "p2",
            "split": "",
        },
        {
            "query_id": "7",
            "type": "text",
            "text": "again",
            "image": "",
            "source_product_id": "",
            "split": "",
        },
        {
            "query_id": "8",
            "type": "product",
            "text": "copy",
            "image": "",
            "source_product_id": "gone",
            "split": "",
        },
        {
            "query_id": "9",
            "type": "text",
            "text": "nobody answers",
            "image": "",
            "source_product_id": "",
            "split": "dev",
        },
    ]
    qrels = [
        {"query_id": "007", "product_id": "p0", "relevance": "3"},
        {"query_id": "7", "product_id": "p2", "relevance": "3"},
        {"query_id": "7", "product_id": "p0", "relevance": "1"},
        {"query_id": "8", "product_id": "p0", "relevance": "1"},
        {"query_id": "08", "product_id": "p0", "relevance": "1"},
    ]
    report = prepare(
        products(tmp_path),
        tmp_path / "c",
        queries=write_csv(tmp_path / "queries.csv", queries),
        qrels=write_csv(tmp_path / "qrels.csv", qrels),
    )
    assert read(tmp_path / "c", "queries") == [
        {"query_id": "7", "split": "val", "text": None, "images": [], "source_product_id": "p2"},
        {
            "query_id": "9",
            "split": "val",
            "text": "nobody answers",
            "images": [],
            "source_product_id": None,
        },
        {
            "query_id": "007",
            "split": "test",
            "text": "None",
            "images": [],
            "source_product_id": None,
        },
    ]
    assert codes(tmp_path / "c") == [
        ("3", "7", "ID_DUPLICATE"),
        ("4", "8", "UNKNOWN_PRODUCT"),
        ("2", "7", "SELF_JUDGEMENT"),
        ("4", "8", "UNKNOWN_QUERY"),
        ("5", "08", "UNKNOWN_QUERY"),
    ]
    assert report["files"]["queries.csv"]["accepted"] == 3
    assert report["queries"]["judgements"] == 2


def test_judgements_follow_products_that_were_shuffled(tmp_path: Path) -> None:
    table = products(tmp_path)
    pairs = write_csv(
        tmp_path / "pairs.csv", [{"query": f"find {i}", "product_id": f"p{i}"} for i in range(5)]
    )
    prepare(table, tmp_path / "a", pairs=pairs)
    lines = table.read_text(encoding="utf-8").splitlines()
    table.write_text("\n".join([lines[0], *reversed(lines[1:])]), encoding="utf-8")
    prepare(table, tmp_path / "b", pairs=pairs)
    judged = [
        {
            (q["query_id"], q["product_id"])
            for q in pq.read_table(tmp_path / name / "qrels.parquet").to_pylist()
        }
        for name in "ab"
    ]
    assert judged[0] == judged[1]
    assert len(judged[0]) == 5
    assert storage.fingerprint(tmp_path / "a") != storage.fingerprint(tmp_path / "b")


def test_query_with_answers_everywhere_goes_to_each_split_as_often_as_they_do(
    tmp_path: Path,
) -> None:
    pairs = [
        {"query": f"query {n}", "product_id": f"p{i}", "weight": "1"}
        for n in range(200)
        for i in range(5)
    ]
    pairs += [{"query": f"query {n}", "product_id": "p2", "weight": "0.5"} for n in range(200)]
    report = prepare(
        products(tmp_path), tmp_path / "c", pairs=write_csv(tmp_path / "pairs.csv", pairs)
    )
    splits = report["queries"]["splits"]
    assert splits["train"] == pytest.approx(80, abs=25)
    assert splits["val"] == pytest.approx(40, abs=20)
    assert splits["test"] == pytest.approx(80, abs=25)
    assert report["queries"]["repeated"] == 200


@pytest.mark.parametrize("kind", ["queries", "pairs"])
def test_query_of_an_unknown_split_is_of_test(tmp_path: Path, kind: str) -> None:
    rows = [
        {
            "query_id": str(i),
            "query" if kind == "pairs" else "text": f"t{i}",
            "product_id": f"p{i}",
            "split": split,
        }
        for i, split in enumerate(["train", "holdout", "val"])
    ]
    prepare(products(tmp_path), tmp_path / "c", **{kind: write_csv(tmp_path / "q.csv", rows)})
    found = {row["text"]: row["split"] for row in read(tmp_path / "c", "queries")}
    assert found == {"t0": "train", "t1": "test", "t2": "val"}
    assert [code for _, _, code in codes(tmp_path / "c")].count("SPLIT_UNKNOWN") == 1


def test_queries_in_two_splits_are_a_leak(tmp_path: Path) -> None:
    queries = [
        {"query_id": str(i), "text": "same", "split": split}
        for i, split in enumerate(["train", "test"])
    ]
    report = prepare(
        products(tmp_path), tmp_path / "c", queries=write_csv(tmp_path / "q.csv", queries)
    )
    assert report["leaks"]["query"]["count"] == 1


# The command line


def test_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    table = write_csv(tmp_path / "products.csv", shop(tmp_path, 20))
    assert (
        main(
            [
                str(table),
                "--output",
                str(tmp_path / "c"),
                "--on-bad-field",
                "reject",
                "--max-problems",
                "1%",
            ]
        )
        == 0
    )
    lines = [" ".join(line.split()) for line in capfd.readouterr().out.splitlines()]
    assert lines[0] == "products.csv (delimiter ',', utf-8): 20 rows"
    assert "id id 100% its name '000', '001', '002'" in lines
    assert "products.csv 20 20 0 0" in lines
    assert "products 20, with picture 20, with text 20, with attributes 20" in lines
    assert main([str(table), "--output", str(tmp_path / "c")]) == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: ")
    assert main([str(table)]) == 1
    assert "error: --output is missing" in capfd.readouterr().err
    for wrong in (["--on-bad-field", "maybe"], ["--image-siz", "3"], ["--gone"]):
        with pytest.raises(SystemExit) as error:
            main([str(table), "--output", str(tmp_path / "d"), *wrong])
        assert error.value.code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-problems", "many"], "--max-problems 'many' must be a share such as 1%"),
        (["--max-problems", "101%"], "--max-problems '101%' must be"),
        (["--image-root", "/gone"], "--image-root /gone: no such folder"),
        (["--image-size", "2"], "--image-size 2: at least 16"),
        (["--background", "no"], "--background 'no' is no color"),
        (["--qrels", "products.csv"], "need different names"),
        (["--val-share", "1"], "must sum to less than 1"),
        (
            ["--delimiter", "\t"],
            "COLUMN_MISSING: products.csv (delimiter '\\t', utf-8) has no column for the id",
        ),
        (["--columns", "gone.yaml"], "gone.yaml: cannot be read"),
    ],
)
def test_mistakes_are_one_clear_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "products.csv", [{"id": "1", "title": "t"}, {"id": "1", "title": "t"}])
    assert main(["products.csv", "--output", "c", *options]) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not (tmp_path / "c").exists()


def test_columns_are_written_edited_and_used(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "products.csv", shop(tmp_path, 20))
    columns = tmp_path / "columns.yaml"
    assert main([str(table), "--write-columns", str(columns)]) == 0
    text = columns.read_text(encoding="utf-8")
    assert text.startswith("# What the columns of products.csv are.\nid: id\ntext:\n- title\n")
    columns.write_text(text.replace("category:\n- brand\n", "set:\n- brand\n"), encoding="utf-8")
    assert main([str(table), "--columns", str(columns), "--output", str(tmp_path / "c")]) == 0
    assert read(tmp_path / "c")[0]["attributes"]["brand"] == ["B0"]


def test_prepare_starts_without_torch_pandas_and_lightning() -> None:
    code = (
        "import sys, tritower.datamodules.prepare.command; "
        "assert not {'torch', 'pandas', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# Anything a user's export may hold


def fuzzed(rng: random.Random, n: int, folder: Path) -> Rows:
    """Good rows with faults of every kind in between."""
    odd = [
        "",
        "None",
        "NA",
        "nan",
        "x" * 3000,
        "&amp;<b>",
        'say "hi"',
        "a\nb",
        "a,b;c\td|e",
        "连衣裙",
        "\u200b",
        "0",
        "=1+1",
        "\x00",
    ]
    prices = ["12.5", "1,600", "$1,299.00", "-5", "NaN", "1e12", "free", "", "140.000"]
    images = [
        "",
        "ok.png",
        "gone.png",
        "cut.jpg",
        "../up.png",
        "http://x/y.png",
        "ok.png|cut.jpg",
        "[",
    ]
    ids = ["", "007", "7", " 7", "1352171357E+5"]
    return [
        {
            "id": rng.choice(ids) if rng.random() < 0.2 else f"{i:04d}",
            "title": rng.choice(odd) if rng.random() < 0.5 else f"Product {i}",
            "price": rng.choice(prices),
            "image": rng.choice(images),
            "more": rng.choice(
                ["", '{"a": "1"}', '{"a": ["x", "y"]}', "{broken", "[1]", '{"a": {"b": 1}}']
            ),
            "split": rng.choice(["", "", "train", "test", "holdout"]),
        }
        for i in range(n)
    ]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("seed", range(3))
def test_rows_in_are_rows_accepted_and_rejected(tmp_path: Path, kind: str, seed: int) -> None:
    rng = random.Random(seed)
    (tmp_path / "ok.png").write_bytes(encode(noise()))
    (tmp_path / "cut.jpg").write_bytes(encode(noise(), "JPEG")[:400])
    rows = fuzzed(rng, 150, tmp_path)
    path = tmp_path / f"products.{kind}"
    broken = 0
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        lines = []
        for row in rows:
            buffer = io.StringIO()
            if kind == "jsonl":
                buffer.write(json.dumps(row, ensure_ascii=False) + "\n")
            else:
                csv.writer(
                    buffer, delimiter="\t" if kind == "tsv" else ",", quoting=csv.QUOTE_ALL
                ).writerow(row.values())
            lines.append(buffer.getvalue().encode())
            if rng.random() < 0.1:
                broken += 1
                lines.append(
                    rng.choice(
                        [b"\xff\xfe,x\n", b"only one cell\n", b'"ab"c"\n', b"1,2,3,4,5,6,7,8,9\n"]
                    )
                )
        header = "\t".join(rows[0]) if kind == "tsv" else ",".join(rows[0])
        path.write_bytes(b"" if kind == "jsonl" else f"{header}\n".encode())
        with path.open("ab") as file:
            file.writelines(lines)
    report = prepare(path, tmp_path / "c")
    assert report["rows"] == 150 + broken == report["accepted"] + report["rejected"]
    kept = [row["product_id"] for row in read(tmp_path / "c")]
    assert len(kept) == len(set(kept)) == report["accepted"]
    assert set(kept) <= {row["id"] for row in rows}
    found = problems(tmp_path / "c/problems.csv")
    assert Counter(problem["code"] for problem in found) == report["problems"]
    rejected = {problem["row"] for problem in found}
    assert len(rejected) >= report["rejected"]
    assert all(problem["row"] and problem["code"] and problem["reason"] for problem in found)
    assert all(problem["line"] != "0" for problem in found) is (kind != "parquet")


@pytest.mark.parametrize("name", ["retaildemo", "luma"])
def test_real_catalogues_need_no_options(data_dir: Path, tmp_path: Path, name: str) -> None:
    folder = data_dir / name
    facts = json.loads((folder / "MANIFEST.json").read_text(encoding="utf-8"))
    report = prepare(
        folder / "products.csv",
        tmp_path / "c",
        queries=folder / "queries.csv",
        qrels=folder / "qrels.csv",
    )
    assert report["problems"] == {}
    assert report["accepted"] == facts["products"]
    assert report["products"]["with_picture"] == facts["products_with_image"]
    assert report["splits"] == facts["splits"]
    assert (report["groups"], report["families"]) == (
        facts["groups_of_2_or_more"],
        facts["families_of_2_or_more"],
    )
    assert (report["queries"]["count"], report["queries"]["judgements"]) == (
        facts["queries"],
        facts["qrels"],
    )
    assert all(leak["count"] == 0 for leak in report["leaks"].values())
