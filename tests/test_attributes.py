from __future__ import annotations

import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.attribute_rows import RowProvider, table_of, write_table
from tests.support.catalogues import write_catalogue
from tritower.artefacts import storage
from tritower.artefacts.storage import ArtefactError
from tritower.retrieval.filtering.filters import parse
from tritower.retrieval.products.attribute_cells import TEXT, cells, path_text
from tritower.retrieval.products.attribute_providers import CatalogueProvider, FileProvider
from tritower.retrieval.products.attribute_table import AttributeTable, TableProvider
from tritower.retrieval.products.attribute_writer import write_attributes

ATTRIBUTE_TYPES = {
    "price": "number",
    "brand": "category",
    "category": "path",
    "tags": "set",
    "group": "category",
}


def rows_of(table):
    """The whole table as an Arrow reader shows it, which knows nothing of ours."""
    return pa.ipc.open_file(table.file).read_all().to_pylist()


def test_attributes_are_joined_by_id_and_never_by_order(tmp_path):
    rows = [
        {"id": f"p{n}", "price": float(n), "brand": f"b{n % 3}", "tags": [f"t{n}"]}
        for n in range(10)
    ]
    order = ["p7", "p0", None, "stranger", "p3", "p9"]
    table, report = write_table(tmp_path / "a.arrow", order, RowProvider(rows, ATTRIBUTE_TYPES))
    assert [row["price"] for row in rows_of(table)] == [7, 0, None, None, 3, 9]
    assert [row["brand"] for row in rows_of(table)] == ["b1", "b0", None, None, "b0", "b0"]
    assert [row["tags"] for row in rows_of(table)] == ["t7", "t0", None, None, "t3", "t9"]
    assert report == {
        "attribute_types": ATTRIBUTE_TYPES,
        "rows": 6,
        "rows_without": 1,
        "unused": 6,
        "ignored": {},
    }
    assert table.count == len(table) == 6
    assert table.attribute_types == ATTRIBUTE_TYPES


values = st.none() | st.text(max_size=3)
row = st.fixed_dictionaries(
    {
        "price": st.none() | st.floats(allow_nan=False, allow_infinity=True),
        "brand": values,
        "category": st.none() | st.lists(st.text(alphabet="ab é\x1f>\n ", max_size=3), max_size=3),
        "tags": st.none() | st.lists(values, max_size=3),
    }
)


@given(st.dictionaries(st.text(), row, max_size=12), st.randoms())
@settings(max_examples=100, deadline=None)
def test_every_value_stands_in_the_row_of_its_id(tmp_path_factory, products, random):
    attribute_types = {
        name: attribute_type for name, attribute_type in ATTRIBUTE_TYPES.items() if name != "group"
    }
    ids = [*products, *(f"stranger {n}" for n in range(3) if f"stranger {n}" not in products), None]
    random.shuffle(ids)
    rows = [{"id": id} | values for id, values in products.items()]
    table, report = write_table(
        tmp_path_factory.mktemp("t") / "a.arrow", ids, RowProvider(rows, attribute_types, batch=4)
    )
    nothing = dict.fromkeys(attribute_types)
    for id, shown in zip(ids, rows_of(table), strict=True):
        wanted = products.get(id, nothing)
        assert shown["price"] == wanted["price"]
        assert shown["brand"] == (wanted["brand"] if (wanted["brand"] or "").strip() else None)
        tags = [tag.replace("\x1f", " ") for tag in wanted["tags"] or [] if tag]
        assert (shown["tags"] or "") == ("\x1f".join(tags) if "".join(tags).strip() else "")
        path = path_text(
            " > ".join(part.replace("\x1f", " ") for part in wanted["category"] or [] if part)
        )
        assert (shown["category"] or "") == (path if path.strip() else "")
    assert report["rows_without"] == sum(id is not None and id not in products for id in ids)
    assert report["unused"] == 0


def test_a_prepared_catalogue_gives_all_it_knows(tmp_path):
    catalogue = write_catalogue(tmp_path / "catalogue", num_groups=20)
    source = CatalogueProvider(catalogue)
    shown = {row["product_id"]: row for row in pq.read_table(catalogue / "products").to_pylist()}
    ids = sorted(shown, reverse=True)
    table, report = write_table(tmp_path / "a.arrow", ids, source)
    assert table.attribute_types == {"group": "category", "family": "category"} | {
        "price": "number",
        "brand": "category",
        "category": "path",
        "tags": "set",
    }
    assert (report["rows_without"], report["unused"]) == (0, 0)
    for id, row in zip(ids, rows_of(table), strict=True):
        facts = shown[id]["attributes"]
        assert (row["price"], row["brand"]) == (facts["price"], facts["brand"])
        assert row["category"] == " > ".join(facts["category"])
        assert (row["tags"] or "") == "\x1f".join(facts["tags"])
        assert (row["group"], row["family"]) == (shown[id]["group"], shown[id]["family"])


def test_rows_of_a_group_are_those_that_share_it(tmp_path):
    groups = ["a", None, "b", "a", "b", "a"]
    rows = [{"id": str(n), "group": group} for n, group in enumerate(groups)]
    table = table_of(tmp_path / "a.arrow", rows, {"group": "category"})
    codes = table.group_codes()
    assert codes.dtype == np.int32
    assert [table.rows_of_group(code).tolist() for code in codes] == [
        [0, 3, 5],
        [],
        [2, 4],
        [0, 3, 5],
        [2, 4],
        [0, 3, 5],
    ]
    assert table.family_codes() is None


def test_a_table_without_groups_has_no_rows_of_any(tmp_path):
    table = table_of(tmp_path / "a.arrow", [{"id": "0"}], {"price": "number"})
    assert table.group_codes() is None
    assert table.rows_of_group(0).tolist() == []


def test_a_later_source_describes_a_product_as_a_whole(tmp_path):
    old = RowProvider(
        [{"id": "a", "price": 1.0, "brand": "x"}, {"id": "b", "price": 2.0, "brand": "y"}],
        ATTRIBUTE_TYPES,
        "old",
    )
    new = RowProvider(
        [{"id": "b", "price": 3.0}, {"id": "c", "price": 4.0, "stock": 5.0}],
        {"price": "number", "stock": "number"},
        "new",
    )
    table, report = write_table(tmp_path / "a.arrow", ["c", "b", "a"], old, new)
    assert [(r["price"], r["brand"], r["stock"]) for r in rows_of(table)] == [
        (4, None, 5),
        (3, None, None),
        (1, "x", None),
    ]
    assert report["unused"] == 0  # the old b is replaced, not unused


def test_sources_that_disagree_on_a_kind_are_refused(tmp_path):
    one, other = (
        RowProvider([], {"size": "number"}, "one.csv"),
        RowProvider([], {"size": "category"}, "other.csv"),
    )
    with pytest.raises(
        ValueError, match=r"'size' is a number in one.csv and a category in other.csv"
    ):
        write_table(tmp_path / "a.arrow", ["a"], one, other)


def test_an_id_twice_is_refused(tmp_path):
    rows = [{"id": id} for id in ["a", "b", "c", "b", "a"]]
    with pytest.raises(
        ValueError, match=r"rows: the id 'b' is there more than once, again in row 3"
    ):
        write_table(tmp_path / "a.arrow", ["a"], RowProvider(rows, {}))


def test_the_next_version_keeps_the_attributes_of_what_it_keeps(tmp_path):
    rows = [
        {"id": f"p{n}", "price": float(n), "brand": f"b{n % 3}", "tags": [f"t{n}"] * (n % 2)}
        for n in range(9)
    ]
    table = table_of(tmp_path / "old.arrow", rows, ATTRIBUTE_TYPES)
    ids = pa.chunked_array(
        [["p0", None, "p2"], ["p3", "p4", "p5", "p6", "p7", "p8"]], TEXT
    )  # p1 was deleted
    kept = TableProvider(table, ids, "old")
    kept.block = 4
    changed = RowProvider(
        [{"id": "p3", "price": 33.0}, {"id": "p1", "price": 11.0}], ATTRIBUTE_TYPES
    )
    new, report = write_table(tmp_path / "new.arrow", ["p8", "p1", "p3", "p0", None], kept, changed)
    assert [(r["price"], r["brand"]) for r in rows_of(new)] == [
        (8, "b2"),
        (11, None),
        (33, None),
        (0, "b0"),
        (None, None),
    ]
    assert new.attribute_types == ATTRIBUTE_TYPES
    assert report["rows_without"] == 0


def test_a_table_belongs_to_its_ids(tmp_path):
    table = table_of(tmp_path / "a.arrow", [{"id": "0"}], ATTRIBUTE_TYPES)
    with pytest.raises(ArtefactError, match=r"version 1: 2 ids for 1 rows of attributes"):
        TableProvider(table, pa.chunked_array([["a", "b"]]), "version 1")


# --- Anyone's files.


def write_csv(path, text):
    path.write_text(text, encoding="utf-8")
    return path


CSV = """\ufeffproduct_id,price,sku,brand,category,tags,group_id,note,empty
007,1.50,0042,Acme,Shoes > Boots,wool|red,g1,"a
b",
7,,17,None,Shoes,,g1,,
1E5,+3e2,5,nan,"Home >Shoes",wool,,x,
"""


def test_csv_columns_are_read_for_what_they_hold(tmp_path):
    file = write_csv(tmp_path / "products.csv", CSV)
    source = FileProvider(file, attribute_types={"tags": "set"})
    assert source.attribute_types == {
        "price": "number",
        "sku": "category",  # 0042 is a code
        "brand": "category",
        "category": "path",
        "tags": "set",
        "group": "category",
        "note": "category",
    }
    assert source.ignored == {"empty": "it is empty"}
    table, _ = write_table(tmp_path / "a.arrow", ["7", "007", "1E5"], source)
    assert rows_of(table) == [
        {
            "price": None,
            "sku": "17",
            "brand": "None",
            "category": "Shoes",
            "tags": None,
            "group": "g1",
            "note": None,
        },
        {
            "price": 1.5,
            "sku": "0042",
            "brand": "Acme",
            "category": "Shoes > Boots",
            "tags": "wool\x1fred",
            "group": "g1",
            "note": "a\nb",
        },
        {
            "price": 300,
            "sku": "5",
            "brand": "nan",
            "category": "Home > Shoes",
            "tags": "wool",
            "group": None,
            "note": "x",
        },
    ]


def test_tsv_is_read_by_its_suffix(tmp_path):
    source = FileProvider(write_csv(tmp_path / "p.tsv", "id\tsize\na\t1,5\nb\t2\n"))
    assert source.attribute_types == {"size": "category"}
    assert pa.concat_arrays(source.column("size")).to_pylist() == ["1,5", "2"]


def test_parquet_types_tell_the_kind(tmp_path):
    table = pa.table(
        {
            "id": pa.array([1, 2, 3]),
            "price": pa.array([59.9, None, float("nan")], pa.float32()),
            "count": pa.array([1, 2, 3], pa.int8()),
            "cost": pa.array([1, None, 3], pa.decimal128(5, 2)),
            "brand": pa.array(["x", None, " "]).dictionary_encode(),
            "path": ["a > b", "a", None],
            "code": ["1", "2", "3"],
            "new": [True, False, None],
            "tags": [["a", "b"], [], None],
            "levels": pa.array([["a", None, "b"], [], None]),
            "family": pa.array([10, 11, None]),
            "text": ["long " * 100] * 3,
            "embedding": [[0.5]] * 3,
            "image": [b"x"] * 3,
            "dotted.name": [1.5, 2.5, 3.5],
            "dotted": [1.0, 2.0, 3.0],
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    source = FileProvider(tmp_path / "p.parquet", attribute_types={"levels": "path"})
    assert source.ignored == {
        "text": "texts of 500 characters",
        "embedding": "lists of double; expected texts",
        "image": "binary is not an attribute type",
    }
    written, report = write_table(tmp_path / "a.arrow", ["3", "2", "1"], source)
    assert report["ignored"] == source.ignored
    assert rows_of(written)[2] == {
        "price": 59.9,
        "count": 1,
        "cost": 1,
        "brand": "x",
        "path": "a > b",
        "code": "1",
        "new": "true",
        "tags": "a\x1fb",
        "levels": "a > b",
        "family": "10",
        "dotted.name": 1.5,
        "dotted": 1,
    }
    assert rows_of(written)[0] == dict.fromkeys(written.attribute_types) | {
        "count": 3,
        "cost": 3,
        "code": "3",
        "dotted.name": 3.5,
        "dotted": 3,
    }
    assert parse("price = 59.9").mask(written).tolist() == [False, False, True]


def test_a_folder_of_parquet_files_is_one_source(tmp_path):
    for number in (10, 2):
        pq.write_table(
            pa.table({"id": [f"p{number}"], "price": [number]}), tmp_path / f"part-{number}.parquet"
        )
    assert pa.concat_arrays(FileProvider(tmp_path).ids()).to_pylist() == ["p2", "p10"]
    pq.write_table(pa.table({"id": ["x"], "cost": [1]}), tmp_path / "part-11.parquet")
    with pytest.raises(
        ValueError, match=r"part-11.parquet has other columns than .*part-2.parquet"
    ):
        FileProvider(tmp_path)


def test_only_the_named_columns_are_taken(tmp_path):
    source = FileProvider(write_csv(tmp_path / "p.csv", CSV), columns=["price"], id_column="sku")
    assert source.attribute_types == {"price": "number"}
    assert pa.concat_arrays(source.ids()).to_pylist() == ["0042", "17", "5"]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("id,a,a\n1,2,3\n", {}, r"the column 'a' is there more than once"),
        ("id,a\n1,2,3\n", {}, r"p.csv cannot be read: .*Expected 2 columns, got 3"),
        ("a,b\n1,2\n", {}, r"column of ids: cannot be told; fitting columns \['a', 'b'\]"),
        ("id,a\n1,2\n", {"attribute_types": {"b": "set"}}, r"no column 'b' among id, a"),
        ("id,a\n1,2\n", {"columns": ["id"]}, r"no column 'id' among id, a"),
        (
            "id,a\n1,2\n",
            {"attribute_types": {"a": "tag"}},
            r"column 'a': type 'tag'; expected one of number, category, path, set",
        ),
        ("id,group,group_id\n1,2,3\n", {}, r"'group' and 'group_id' are both a group"),
        ("", {}, r"p.csv cannot be read: Empty CSV file"),
    ],
)
def test_files_that_cannot_be_used_say_why(tmp_path, text, options, message):
    with pytest.raises(ValueError, match=message):
        FileProvider(write_csv(tmp_path / "p.csv", text), **options)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("id,a\nx,2\n,3\n", {}, r"p.csv: row 1 has no id \(id\)"),
        (
            "id,a\nx,2\ny,many\n",
            {"attribute_types": {"a": "number"}},
            r"column 'a' cannot be read as number: .*'many'",
        ),
        ("id,a\nx,2\nx,3\n", {}, r"the id 'x' is there more than once, again in row 1"),
    ],
)
def test_rows_that_cannot_be_used_say_why(tmp_path, text, options, message):
    source = FileProvider(write_csv(tmp_path / "p.csv", text), **options)
    with pytest.raises(ValueError, match=message):
        write_table(tmp_path / "a.arrow", ["x"], source)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "p.csv").write_bytes(b"id,a\nx,\xff\n")
    with pytest.raises(ValueError, match=r"p.csv cannot be read: .*UTF8"):
        FileProvider(tmp_path / "p.csv")


def test_integers_that_would_be_rounded_are_refused(tmp_path):
    pq.write_table(pa.table({"id": ["x"], "code": [2**53 + 1]}), tmp_path / "p.parquet")
    with pytest.raises(
        ValueError, match=r"column 'code' cannot be read as number: .*9007199254740993"
    ):
        write_table(tmp_path / "a.arrow", ["x"], FileProvider(tmp_path / "p.parquet"))
    table, _ = write_table(
        tmp_path / "b.arrow",
        ["x"],
        FileProvider(tmp_path / "p.parquet", attribute_types={"code": "category"}),
    )
    assert rows_of(table) == [{"code": "9007199254740993"}]


@pytest.mark.parametrize("name", ["p.xlsx", "nothing"])
def test_other_files_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}: expected a .parquet, .csv or .tsv file"):
        FileProvider(tmp_path / name)


# --- Values.


@pytest.mark.parametrize(
    ("attribute_type", "values", "stored"),
    [
        ("number", ["+5", " .5 ", "", None, "1e3"], [5, 0.5, None, None, 1000]),
        ("number", [1.0, float("nan"), float("inf")], [1, None, float("inf")]),
        ("category", [" x ", "", "  ", None], [" x ", None, None, None]),
        ("path", ["A>B", " A > B ", ">", "A>>B"], ["A > B", "A > B", " > ", "A >  > B"]),
        ("path", [["A", " B"], [""], [None, "C"], []], ["A > B", None, "C", None]),
        ("set", ["a|b", " a | | b |", "|", "a\x1fb"], ["a\x1fb", "a\x1fb", None, "a b"]),
        ("set", [["a|b", "c"], ["", None], ["a\x1fb"]], ["a|b\x1fc", None, "a b"]),
    ],
)
def test_values_as_they_are_stored(attribute_type, values, stored):
    assert cells(pa.array(values), attribute_type).to_pylist() == stored


# --- The file.


def test_a_table_takes_its_columns_from_the_file_without_a_copy(tmp_path):
    table = table_of(
        tmp_path / "a.arrow",
        [{"id": str(n), "price": n / 2, "brand": "x"} for n in range(100)],
        ATTRIBUTE_TYPES,
    )
    before = pa.total_allocated_bytes()
    price, brand = table.column("price"), table.column("brand")
    assert pa.total_allocated_bytes() == before
    assert not price.values.flags.owndata
    assert not price.values.flags.writeable
    assert price.values.tolist() == [n / 2 for n in range(100)]
    assert brand.codes.tolist() == [0] * 100
    assert table.column("price") is price


def test_an_empty_index_has_an_empty_table(tmp_path):
    table = table_of(tmp_path / "a.arrow", [], ATTRIBUTE_TYPES)
    assert (table.count, table.attribute_types) == (0, ATTRIBUTE_TYPES)
    assert parse("price < 5 and tags has x and category under y").mask(table).tolist() == []


@pytest.mark.parametrize("damage", ["cut", "junk", "empty", "absent", "foreign", "batches"])
def test_what_is_no_table_is_refused(tmp_path, damage):
    file = tmp_path / "a.arrow"
    table_of(file, [{"id": "0", "price": 1.0}], ATTRIBUTE_TYPES)
    data = file.read_bytes()
    if damage == "absent":
        file.unlink()
    elif damage in ("foreign", "batches"):
        schema = pa.schema([pa.field("x", pa.float64(), metadata={"type": "number"})])
        schema = (
            schema.with_metadata({"rows": "2"})
            if damage == "batches"
            else pa.schema([("x", pa.float64())])
        )
        with pa.ipc.new_file(file, schema) as writer:
            for value in (1.0, 2.0):
                writer.write_batch(pa.record_batch([pa.array([value])], schema=schema))
    else:
        file.write_bytes({"cut": data[: len(data) // 2], "junk": b"x" * 500, "empty": b""}[damage])
    with pytest.raises(ArtefactError, match=r"a.arrow is not a table of attributes: "):
        AttributeTable(file)


def test_threads_open_columns_together(tmp_path):
    table = table_of(
        tmp_path / "a.arrow",
        [{"id": str(n), "price": float(n)} for n in range(50)],
        ATTRIBUTE_TYPES,
    )
    seen = []
    threads = [
        threading.Thread(target=lambda: seen.append(table.column("price"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(column) for column in seen}) == 1


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    class Full(storage.files.System):
        def write(self, descriptor, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.files, "system", Full())
    with pytest.raises(
        ArtefactError, match=r"a.arrow could not be written: No space left on device"
    ):
        table_of(tmp_path / "a.arrow", [{"id": "0", "price": 1.0}], ATTRIBUTE_TYPES)


def test_nothing_is_left_in_the_folder_for_temporary_files(tmp_path):
    (tmp_path / "work").mkdir()
    with storage.create(tmp_path / "a.arrow") as file:
        write_attributes(
            file,
            [pa.array(["a"])],
            [RowProvider([{"id": "a"}], ATTRIBUTE_TYPES)],
            tmp_path / "work",
        )
    assert list((tmp_path / "work").iterdir()) == []
