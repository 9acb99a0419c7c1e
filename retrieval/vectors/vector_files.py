"""Where embeddings come from.

Parquet files or NumPy files with ids, each as parts that can be read in batches.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

ID_COLUMNS = ("product_id", "query_id", "id")
"""Columns taken for ids by default, in this order."""


class RawBatch(NamedTuple):
    """B rows of a file, unchecked.

    Ids (large_string), (B, D) floating point vectors, query types and contents or None.
    """

    ids: pa.Array
    vectors: NDArray[Any]
    query_types: pa.Array | None
    contents: NDArray[np.int64] | None = None


class Part(Protocol):
    """One shard of embeddings."""

    @property
    def name(self) -> str:
        """The file, for messages."""

    @property
    def files(self) -> Sequence[Path]:
        """The files that hold it."""

    @property
    def reads(self) -> str:
        """What is read of them: the names of columns."""

    @property
    def count(self) -> int:
        """Number of rows."""

    @property
    def dim(self) -> int:
        """D."""

    def ids(self) -> Iterator[pa.Array]:
        """The ids alone, in batches."""

    def batches(self, batch_size: int) -> Iterator[RawBatch]:
        """All rows, in batches."""


def find_parts(
    source: Path,
    files: Sequence[Path] | None,
    ids: Path | None,
    id_column: str | None,
    embedding_column: str | None,
) -> list[Part]:
    """The shards of a source, in natural order of their names.

    Args:
        source: a folder or a file.
        files: the files to read where a manifest lists them; None looks for *.parquet, then *.npy.
        ids: ids of .npy files: a file, or a folder of files matched by name.
        id_column: see `EmbeddingReader`.
        embedding_column: see `EmbeddingReader`.

    Raises:
        ValueError: nothing there to read, no rows, or vectors and ids that do not match.
    """
    ours = files is not None
    if files is None:
        if source.is_file():
            files = [source]
        else:
            files = _listed(source, ".parquet") or _listed(source, ".npy")
    if not files:
        raise ValueError(f"{source}: no .parquet and no .npy files there")
    # .npy files need a file of ids beside them; Parquet files have a column of ids.
    files = sorted(files, key=natural_key)
    parts: list[Part]
    if files[0].suffix == ".npy":
        if ids is None:
            raise ValueError(
                f"{source}: .npy files hold no ids: name them with ids (.txt, .npy, .csv or "
                ".parquet)"
            )
        parts = [NumpyPart(file, _partner(file, files, ids)) for file in files]
    else:
        parts = [ParquetPart(file, id_column, embedding_column, ours) for file in files]
    if not sum(part.count for part in parts):
        raise ValueError(f"{source}: no rows in {len(parts)} files")
    return [part for part in parts if part.count]


def natural_key(path: Path) -> list[Any]:
    """Sort key in which part-2 comes before part-10."""
    return [int(piece) if i % 2 else piece for i, piece in enumerate(re.split(r"(\d+)", path.name))]


def _open(file: Path) -> pq.ParquetFile:
    """Open a Parquet file for one pass.

    With its pre-buffering, a reader would keep all that it has read in memory.
    """
    return pq.ParquetFile(file, pre_buffer=False)


class ParquetPart:
    """A Parquet file with a column of ids and a column of vectors (lists of floats).

    Args:
        file: where it is.
        id_column: see `EmbeddingReader`.
        embedding_column: see `EmbeddingReader`.
        ours: whether it is of an embeddings folder of ours: in others, a column named content holds
            anything.
    """

    def __init__(
        self, file: Path, id_column: str | None, embedding_column: str | None, ours: bool
    ) -> None:
        self.name = str(file)
        self.files = [file]
        # Memory-mapped: only the rows of a batch are read.
        try:
            with _open(file) as opened:
                schema = opened.schema_arrow
                self.count = opened.metadata.num_rows
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file} is not a Parquet file: {error}") from None
        # Columns of ids and vectors, found by name or by type.
        self._embedding = find_column(
            schema, embedding_column, _is_vector, (), f"{file}: column of vectors"
        )
        self._id = find_column(schema, id_column, is_id, ID_COLUMNS, f"{file}: column of ids")
        self.reads = f"{self._id}, {self._embedding}"
        self._query_type = "query_type" if "query_type" in schema.names else None
        self._content = "content" if ours and "content" in schema.names else None
        self.dim = self._find_dim(schema.field(self._embedding).type)

    def ids(self) -> Iterator[pa.Array]:
        """See `Part`; reads no vectors."""
        with _open(self.files[0]) as file:
            for batch in file.iter_batches(columns=[self._id]):
                yield as_text(batch.column(self._id), self.name)

    def batches(self, batch_size: int) -> Iterator[RawBatch]:
        """See `Part`."""
        columns = [
            self._id,
            self._embedding,
            *(name for name in (self._query_type, self._content) if name),
        ]
        # Content digests are used only where every row of the batch has one.
        row = 0
        with _open(self.files[0]) as file:
            for batch in file.iter_batches(batch_size, columns=columns):
                if self._query_type:
                    query_types = as_text(batch.column(self._query_type), self.name)
                else:
                    query_types = None
                ids = as_text(batch.column(self._id), self.name)
                if self._content:
                    contents = batch.column(self._content)
                else:
                    contents = None
                if contents is None or contents.null_count:
                    known = None
                else:
                    known = contents.to_numpy()
                yield RawBatch(
                    ids, self._matrix(batch.column(self._embedding), row), query_types, known
                )
                row += len(ids)

    def _find_dim(self, column_type: pa.DataType) -> int:
        if pa.types.is_fixed_size_list(column_type):
            return int(column_type.list_size)
        with _open(self.files[0]) as file:
            first = next(file.iter_batches(1, columns=[self._embedding]), None)
        if first is None or not first.num_rows:
            return 0
        return len(first.column(0)[0].as_py() or ())

    def _matrix(self, column: pa.Array, row: int) -> NDArray[Any]:
        # Every row must have the same number of values, none of them missing.
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        wrong = lengths != self.dim
        if wrong.any():
            at = int(wrong.argmax())
            raise ValueError(
                f"{self.name}: row {row + at} has {lengths[at]} dimensions, row 0 has {self.dim}"
            )
        values = column.flatten()
        if values.null_count:
            at = pc.is_null(values).index(True).as_py() // self.dim
            raise ValueError(f"{self.name}: the vector of row {row + at} has a missing value")
        return values.to_numpy(zero_copy_only=False).reshape(-1, self.dim)


class NumpyPart:
    """A .npy file of (B, D) floats and a file of B ids in the same order."""

    def __init__(self, file: Path, ids: Path) -> None:
        self.name = str(file)
        self.files = [file, ids]
        self.reads = ""
        try:
            self._vectors = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{file} is not a .npy file of numbers: {error}") from None
        if self._vectors.ndim != 2:
            raise ValueError(
                f"{file}: shape {self._vectors.shape}; expected (B, D), one vector per row"
            )
        self.count, self.dim = self._vectors.shape
        self._ids = read_ids(ids, self.count)
        if len(self._ids) != self.count:
            raise ValueError(f"{file} has {self.count} vectors, {ids} has {len(self._ids)} ids")

    def ids(self) -> Iterator[pa.Array]:
        """See `Part`."""
        yield self._ids

    def batches(self, batch_size: int) -> Iterator[RawBatch]:
        """See `Part`; the file is memory-mapped."""
        for start in range(0, self.count, batch_size):
            rows = slice(start, start + batch_size)
            yield RawBatch(self._ids[rows], np.asarray(self._vectors[rows]), None)


def read_ids(file: Path, count: int) -> pa.Array:
    """Ids from a .txt (one per line), .npy, .csv or .parquet file, verbatim.

    Args:
        file: where they are.
        count: expected number: decides whether a .csv file has a header.
    """
    if file.suffix == ".npy":
        array = np.load(file, allow_pickle=False)
        if array.dtype.kind not in "Uiu" or array.ndim != 1:
            raise ValueError(
                f"{file}: dtype {array.dtype}, shape {array.shape}; expected (B,) integers or "
                "strings"
            )
        return pa.array([str(value) for value in array.tolist()], pa.large_string())
    if file.suffix == ".parquet":
        schema = pq.read_schema(file)
        column = find_column(schema, None, is_id, ID_COLUMNS, f"{file}: column of ids")
        return as_text(pq.read_table(file, columns=[column]).column(0).combine_chunks(), str(file))
    # Text files: one id a line, and the last line break ends the last line. Windows line breaks are
    # dropped only if every line has one: an id may end with a carriage return.
    with file.open(encoding="utf-8-sig", newline="") as stream:
        if file.suffix == ".csv":
            return pa.array(_csv_ids(list(csv.reader(stream)), count, file), pa.large_string())
        lines = stream.read().split("\n")
    if lines[-1] == "":
        lines.pop()
    if lines and all(line.endswith("\r") for line in lines):
        lines = [line[:-1] for line in lines]
    return pa.array(lines, pa.large_string())


def _csv_ids(records: list[list[str]], count: int, file: Path) -> list[str]:
    column = 0
    # One record more than vectors is a header; its column of ids must be clear.
    if len(records) == count + 1:
        header = records.pop(0)
        column = next(
            (header.index(name) for name in ID_COLUMNS if name in header),
            0 if len(header) == 1 else -1,
        )
        if column < 0:
            raise ValueError(
                f"{file}: no column {' or '.join(ID_COLUMNS)} among {', '.join(header)}"
            )
    elif records and len(records[0]) != 1:
        raise ValueError(
            f"{file}: {len(records)} records for {count} vectors, and no header to tell the ids by"
        )
    return [record[column] for record in records]


def _listed(folder: Path, suffix: str) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such file or folder")
    result = []
    for file in folder.iterdir():
        if file.suffix == suffix and not file.name.startswith("."):
            result.append(file)
    return result


def _partner(file: Path, files: Sequence[Path], ids: Path) -> Path:
    """The file of ids that belongs to a file of vectors.

    By equal name, else by the last number in the name.
    """
    if ids.is_file():
        if len(files) > 1:
            raise ValueError(
                f"{len(files)} files of vectors but one file of ids, {ids}: give a folder of files"
            )
        return ids
    # Match files of ids by name, else by the last number in the name.
    candidates = [
        c
        for suffix in (".txt", ".npy", ".csv", ".parquet")
        for c in _listed(ids, suffix)
        if c != file
    ]
    for key in (lambda path: path.stem, _last_number):
        matching = [c for c in candidates if key(c) is not None and key(c) == key(file)]
        if len(matching) == 1 and sum(key(f) == key(file) for f in files) == 1:
            return matching[0]
    raise ValueError(
        f"{file}: {ids} has no file of ids with the same name or number, or more than one"
    )


def _last_number(path: Path) -> int | None:
    numbers = re.findall(r"\d+", path.stem)
    if numbers:
        return int(numbers[-1])
    return None


def find_column(
    schema: pa.Schema, named: str | None, fits: Any, preferred: Sequence[str], what: str
) -> str:
    """The named column, the first preferred one that is there, or the only one that fits."""
    fitting = [field.name for field in schema if fits(field.type)]
    if named is not None:
        if named not in fitting:
            raise ValueError(
                f"{what}: {named!r} is not one of the fitting columns {fitting} (all: "
                f"{schema.names})"
            )
        return named
    # Known names win; otherwise only one column may fit.
    for name in preferred:
        if name in fitting:
            return name
    if len(fitting) != 1:
        raise ValueError(
            f"{what}: cannot be told; fitting columns {fitting} (all: {schema.names}). Name it"
        )
    return fitting[0]


def _is_vector(column_type: pa.DataType) -> bool:
    types = pa.types
    is_list = (
        types.is_list(column_type)
        or types.is_large_list(column_type)
        or types.is_fixed_size_list(column_type)
    )
    return is_list and types.is_floating(column_type.value_type)


def is_id(column_type: pa.DataType) -> bool:
    """Whether a column can be one of ids: text or integers."""
    types = pa.types
    if types.is_dictionary(column_type):
        column_type = column_type.value_type
    return (
        types.is_string(column_type)
        or types.is_large_string(column_type)
        or types.is_integer(column_type)
    )


def as_text(column: pa.Array, name: str) -> pa.Array:
    """A column as large_string; `name` is its file, for the message."""
    try:
        return column.cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{name}: ids cannot be read as text: {error}") from None
