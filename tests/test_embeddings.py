import csv

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritower.artefacts.storage import ArtefactError
from tritower.retrieval.vectors.checks import checked_vectors
from tritower.retrieval.vectors.embeddings import EmbeddingReader, EmbeddingWriter

DIM = 8


def unit(count, seed=0, dim=DIM):
    vectors = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def collect(reader, batch_size=7):
    batches = list(reader.batches(batch_size))
    return [i for b in batches for i in b.ids.to_pylist()], np.concatenate(
        [b.vectors for b in batches]
    )


def parquet(path, ids, vectors, **columns):
    pq.write_table(
        pa.table({"product_id": ids, "embedding": list(np.asarray(vectors)), **columns}), path
    )


def test_what_is_written_is_read_back_in_order(tmp_path):
    vectors = unit(30)
    writer = EmbeddingWriter(tmp_path / "e", dim=DIM, model="m", catalogue="c")
    for shard in (2, 0, 1):
        rows = slice(shard * 10, shard * 10 + 10)
        writer.write(f"shard-{shard}", [f"p{i}" for i in range(30)][rows], vectors[rows])
    writer.finish([f"shard-{i}" for i in range(3)], hints={"model": "runs/1"})
    reader = EmbeddingReader(tmp_path / "e")
    ids, read = collect(reader)
    assert ids == [f"p{i}" for i in range(30)]
    assert np.abs(read - vectors).max() < 1e-3  # float16 on disk
    assert np.allclose(np.linalg.norm(read, axis=1), 1, atol=1e-6)
    assert (reader.count, reader.dim, reader.metric) == (30, DIM, "cosine")
    assert reader.meta["model"] == "m" and reader.meta["hints"] == {"model": "runs/1"}
    column = pq.read_schema(tmp_path / "e" / "shard-0.parquet").field("embedding").type
    assert column == pa.list_(pa.float16(), DIM)


def test_queries_keep_their_kinds(tmp_path):
    writer = EmbeddingWriter(tmp_path / "q", dim=DIM, id_column="query_id")
    writer.write("shard-0", ["a", "a"], unit(2), ["text", "fused"])
    writer.finish(["shard-0"])
    (batch,) = EmbeddingReader(tmp_path / "q").batches()
    assert batch.query_types.to_pylist() == ["text", "fused"]


def test_a_killed_run_goes_on_and_another_model_is_refused(tmp_path):
    first = EmbeddingWriter(tmp_path / "e", dim=DIM, model="m")
    first.write("shard-0", ["a"], unit(1))
    second = EmbeddingWriter(tmp_path / "e", dim=DIM, model="m")
    assert second.done("shard-0") and not second.done("shard-1")
    with pytest.raises(ArtefactError, match="model: there 'm', now 'other'"):
        EmbeddingWriter(tmp_path / "e", dim=DIM, model="other")
    second.write("shard-1", ["b"], unit(1, 1))
    second.finish(["shard-0", "shard-1"])
    assert EmbeddingReader(tmp_path / "e").count == 2


def test_an_unfinished_folder_of_ours_is_refused(tmp_path):
    EmbeddingWriter(tmp_path / "e", dim=DIM).write("shard-0", ["a"], unit(1))
    with pytest.raises(ArtefactError, match=r"no manifest\.json, .* stopped half-way"):
        EmbeddingReader(tmp_path / "e")


def test_the_writer_refuses_what_is_not_an_embedding(tmp_path):
    writer = EmbeddingWriter(tmp_path / "e", dim=DIM)
    with pytest.raises(ValueError, match=r"embeddings of s: row 1 \(id 'b'\) holds NaN"):
        writer.write("s", ["a", "b"], np.stack([unit(1)[0], np.full(DIM, np.nan)]))
    with pytest.raises(ValueError, match=r"shape \(1, 4\); expected \(B, 8\)"):
        writer.write("s", ["a"], unit(1, dim=4))
    with pytest.raises(ValueError, match="1 ids, 2 vectors"):
        writer.write("s", ["a"], unit(2))
    assert not writer.done("s")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("fixed", [True, False])
def test_anyones_parquet_is_read_whatever_its_types(tmp_path, dtype, fixed):
    vectors = unit(5).astype(dtype)
    flat = pa.array(vectors.ravel())
    embedding = (
        pa.FixedSizeListArray.from_arrays(flat, DIM)
        if fixed
        else pa.ListArray.from_arrays(pa.array(np.arange(0, 5 * DIM + 1, DIM), pa.int32()), flat)
    )
    table = pa.table(
        {"title": list("vwxyz"), "id": pa.array([7, 8, 9, 10, 2**60 + 1]), "vec": embedding}
    )
    pq.write_table(table, tmp_path / "x.parquet")
    ids, read = collect(EmbeddingReader(tmp_path / "x.parquet"), batch_size=2)
    assert ids == ["7", "8", "9", "10", str(2**60 + 1)]
    assert np.allclose(read, vectors, atol=1e-3)


def test_columns_that_cannot_be_told_must_be_named(tmp_path):
    columns = {"sku": ["a"], "ean": ["b"], "text": [unit(1)[0]], "image": [unit(1, 1)[0]]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(
        ValueError, match=r"column of vectors: cannot be told; fitting columns \['text', 'image'\]"
    ):
        EmbeddingReader(tmp_path / "x.parquet")
    with pytest.raises(
        ValueError, match=r"column of ids: cannot be told; fitting columns \['sku', 'ean'\]"
    ):
        EmbeddingReader(tmp_path / "x.parquet", embedding_column="image")
    with pytest.raises(ValueError, match="'nope' is not one of the fitting columns"):
        EmbeddingReader(tmp_path / "x.parquet", embedding_column="nope")
    reader = EmbeddingReader(tmp_path / "x.parquet", embedding_column="image", id_column="ean")
    assert collect(reader)[0] == ["b"]


def test_shards_come_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 2, 1):
        parquet(tmp_path / f"part-{number}.parquet", [f"p{number}"], unit(1, number))
    assert collect(EmbeddingReader(tmp_path))[0] == ["p1", "p2", "p10"]


def write_ids(path, ids):
    if path.suffix == ".npy":
        np.save(path, np.array(ids))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([["title", "product_id"], *([f"t{i}", i] for i in ids)])
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"product_id": ids}), path)
    else:
        path.write_text("".join(f"{i}\n" for i in ids), encoding="utf-8")


@pytest.mark.parametrize("suffix", [".txt", ".npy", ".csv", ".parquet"])
def test_npy_with_ids_in_any_format(tmp_path, suffix):
    ids = ["007", "7", "1352171357E+5", "連衣裙 №5", "None"]
    np.save(tmp_path / "v.npy", np.asfortranarray(unit(5).astype(np.float64)))
    write_ids(tmp_path / f"ids{suffix}", ids)
    read_ids, read = collect(EmbeddingReader(tmp_path / "v.npy", ids=tmp_path / f"ids{suffix}"))
    assert read_ids == ids
    assert np.allclose(read, unit(5))


def test_csv_of_ids_without_header_and_txt_with_windows_line_ends(tmp_path):
    np.save(tmp_path / "v.npy", unit(2))
    (tmp_path / "ids.csv").write_text('a\n"b,c"\n')
    assert collect(EmbeddingReader(tmp_path / "v.npy", ids=tmp_path / "ids.csv"))[0] == ["a", "b,c"]
    (tmp_path / "ids.txt").write_bytes(b"a\r\nb\r\n")
    assert collect(EmbeddingReader(tmp_path / "v.npy", ids=tmp_path / "ids.txt"))[0] == ["a", "b"]


def test_twelve_npy_shards_are_matched_with_their_ids_by_number(tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "m").mkdir()
    for number in range(1, 13):
        np.save(tmp_path / "v" / f"img_emb_{number}.npy", unit(2, number))
        write_ids(tmp_path / "m" / f"metadata_{number:03d}.txt", [f"p{number}a", f"p{number}b"])
    ids, read = collect(EmbeddingReader(tmp_path / "v", ids=tmp_path / "m"))
    for number in range(1, 13):
        assert np.allclose(read[ids.index(f"p{number}b")], unit(2, number)[1], atol=1e-6)
    (tmp_path / "m" / "metadata_007.txt").unlink()
    with pytest.raises(
        ValueError, match=r"img_emb_7\.npy: .* has no file of ids with the same name or number"
    ):
        EmbeddingReader(tmp_path / "v", ids=tmp_path / "m")


def test_npy_faults_are_named(tmp_path):
    np.save(tmp_path / "v.npy", unit(3))
    write_ids(tmp_path / "two.txt", ["a", "b"])
    with pytest.raises(ValueError, match=r"has 3 vectors, .* has 2 ids"):
        EmbeddingReader(tmp_path / "v.npy", ids=tmp_path / "two.txt")
    with pytest.raises(ValueError, match="hold no ids"):
        EmbeddingReader(tmp_path / "v.npy")
    np.save(tmp_path / "flat.npy", unit(1)[0])
    with pytest.raises(ValueError, match=r"shape \(8,\); expected \(B, D\)"):
        EmbeddingReader(tmp_path / "flat.npy", ids=tmp_path / "two.txt")
    np.save(tmp_path / "floats.npy", np.array([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="dtype float64"):
        EmbeddingReader(tmp_path / "v.npy", ids=tmp_path / "floats.npy")
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"objects\.npy is not a \.npy file of numbers"):
        EmbeddingReader(
            tmp_path / "objects.npy", ids=tmp_path / "two.txt"
        )  # no code runs from data


@pytest.mark.parametrize(
    ("ids", "change", "message"),
    [
        (["a", None, "c"], lambda v: v, r"row 1 has no id"),
        (["a", "b", ""], lambda v: v, r"row 2 has no id"),
        (
            ["a", "b", "c"],
            lambda v: v * [[1], [3], [1]],
            r"row 1 \(id 'b'\) has length 3, .*--normalize",
        ),
        (["a", "b", "c"], lambda v: v * [[1], [1], [0]], r"row 2 \(id 'c'\) is a zero vector"),
        (
            ["a", "b", "c"],
            lambda v: v * [[1], [np.inf], [1]],
            r"row 1 \(id 'b'\) holds NaN or infinity",
        ),
    ],
)
def test_faulty_rows_are_refused_by_row_and_id(tmp_path, ids, change, message):
    parquet(tmp_path / "x.parquet", ids, change(unit(3)))
    with pytest.raises(ValueError, match=message):
        collect(EmbeddingReader(tmp_path / "x.parquet"), batch_size=1)


def test_ragged_and_missing_vectors_are_refused(tmp_path):
    for bad, message in (
        ([1.0, 0.0], "row 1 has 2 dimensions, row 0 has 8"),
        (None, "row 1 has 0 dimensions"),
    ):
        pq.write_table(
            pa.table({"id": ["a", "b"], "v": [unit(1)[0].tolist(), bad]}), tmp_path / "x.parquet"
        )
        with pytest.raises(ValueError, match=message):
            collect(EmbeddingReader(tmp_path / "x.parquet"))
    pq.write_table(pa.table({"id": ["a"], "v": [[None] + [1.0] * 7]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="the vector of row 0 has a missing value"):
        collect(EmbeddingReader(tmp_path / "x.parquet"))
    parquet(tmp_path / "y.parquet", ["c"], unit(1, dim=4))
    with pytest.raises(ValueError, match=r"y\.parquet has 4 dimensions, .*x\.parquet has 8"):
        EmbeddingReader(tmp_path)


def test_normalize_and_inner_product(tmp_path):
    vectors = unit(3) * np.array([[0.5], [2.0], [1e-30]], np.float32)
    parquet(tmp_path / "x.parquet", ["a", "b", "c"], vectors)
    assert np.allclose(collect(EmbeddingReader(tmp_path, normalize=True))[1], unit(3), atol=1e-6)
    assert np.array_equal(collect(EmbeddingReader(tmp_path, metric="inner_product"))[1], vectors)
    with pytest.raises(ValueError, match="metric 'l2'; expected one of cosine, inner_product"):
        EmbeddingReader(tmp_path, metric="l2")


def test_ids_that_appear_twice_are_refused_across_shards(tmp_path):
    parquet(tmp_path / "1.parquet", ["a", "b"], unit(2))
    parquet(tmp_path / "2.parquet", ["c", "a"], unit(2))
    with pytest.raises(ValueError, match="1 ids appear more than once; 'a' 2 times"):
        EmbeddingReader(tmp_path).check_unique()


def test_empty_sources_are_refused(tmp_path):
    parquet(tmp_path / "x.parquet", pa.array([], pa.string()), np.zeros((0, DIM)))
    with pytest.raises(ValueError, match=r"column of vectors|no rows"):
        EmbeddingReader(tmp_path)
    (tmp_path / "bad.parquet").write_bytes(b"<html>404")
    with pytest.raises(ValueError, match=r"bad\.parquet is not a Parquet file"):
        EmbeddingReader(tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match="no such file or folder"):
        EmbeddingReader(tmp_path / "nowhere")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(min_size=1), unique=True, min_size=1, max_size=20))
def test_ids_are_any_text_and_come_back_verbatim(tmp_path_factory, ids):
    folder = tmp_path_factory.mktemp("ids") / "e"
    writer = EmbeddingWriter(folder, dim=2)
    writer.write("s", ids, np.tile([[0.6, 0.8]], (len(ids), 1)))
    writer.finish(["s"])
    reader = EmbeddingReader(folder)
    reader.check_unique()
    assert collect(reader)[0] == ids


@pytest.mark.parametrize(
    "same",
    [
        lambda v: v.astype(np.float64),
        np.asfortranarray,
        lambda v: np.repeat(v, 2, axis=0)[::2],
        lambda v: np.repeat(v, 2, axis=1)[:, ::2],
        lambda v: v.tolist(),
    ],
)
def test_memory_order_and_dtype_do_not_matter(same):
    vectors = unit(4)
    checked = checked_vectors(same(vectors))
    assert checked.dtype == np.float32 and checked.flags.c_contiguous
    assert np.allclose(checked, vectors, atol=1e-7)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.ones((2, DIM), np.int8), r"dtype int8; expected float16, float32 or float64"),
        (np.array([["a"] * DIM]), r"dtype <U1"),
        (unit(1)[0], r"shape \(8,\); expected \(B, 8\)"),
        (np.zeros((1, DIM, 1)), r"shape \(1, 8, 1\)"),
        (np.full((1, DIM), 1e300), r"row 0 holds NaN or infinity"),
        (np.full((1, DIM), 1e-300), r"row 0 is a zero vector"),
    ],
)
def test_what_is_no_matrix_of_unit_vectors_is_refused(vectors, message):
    with pytest.raises(ValueError, match=message):
        checked_vectors(vectors, dim=DIM, where="queries")


def test_the_stamp_tells_columns_ids_and_changed_files_apart(tmp_path):
    columns = {"sku": ["a"], "ean": ["b"], "text": [unit(1)[0]], "image": [unit(1, 1)[0]]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")

    def stamp(column, ids):
        return EmbeddingReader(
            tmp_path / "x.parquet", embedding_column=column, id_column=ids
        ).stamp()

    assert stamp("image", "ean") == stamp("image", "ean")
    assert (
        len({str(stamp(column, ids)) for column in ("text", "image") for ids in ("sku", "ean")})
        == 4
    )
    before = stamp("image", "ean")
    pq.write_table(pa.table({**columns, "more": [1]}), tmp_path / "x.parquet")
    assert stamp("image", "ean") != before


def test_the_stamp_of_npy_files_changes_with_their_ids(tmp_path):
    np.save(tmp_path / "v.npy", unit(2))
    write_ids(tmp_path / "a.txt", ["a", "b"])
    write_ids(tmp_path / "b.txt", ["c", "d"])
    stamps = [
        EmbeddingReader(tmp_path / "v.npy", ids=tmp_path / f"{name}.txt").stamp() for name in "aab"
    ]
    assert stamps[0] == stamps[1] != stamps[2]
