"""The records of a CSV, JSONL or Parquet file, with every scalar as a string, one after the other.

A record that cannot be read comes out as a record with a fault; it never takes its neighbors with
it.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import re
import unicodedata
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tritower.datamodules.bad_value import BadValue, excerpt
from tritower.datamodules.prepare.values import Cell, Number, parse_json

MAX_CELL = 16 * 2**20
"""Characters of one CSV cell; a longer one is a quote that was never closed."""

_INVISIBLE = dict.fromkeys(map(ord, "\ufeff\u200b\u200c\u200d\u2060\u00ad"))
_UNDECODED = re.compile("[\ud800-\udfff]")


class Record(NamedTuple):
    """One record of a file.

    Attributes:
        row: its number, from 1; blank lines do not count.
        line: its first physical line, from 1; 0 in Parquet.
        cells: column -> value; of a faulty record only the id, if that.
        fault: `UNREADABLE_ROW`, `COLUMN_COUNT` or `ENCODING_ERROR` with a reason.
    """

    row: int
    line: int
    cells: Mapping[str, Cell]
    fault: BadValue | None = None


def csv_reader(lines: Iterator[str], delimiter: str, quote: str) -> Any:
    """A strict reader: text after a closing quote is an error, not a guess."""
    csv.field_size_limit(MAX_CELL)
    if not quote:
        return csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)
    return csv.reader(lines, delimiter=delimiter, quotechar=quote, strict=True)


def csv_records(
    lines: Lines, columns: Sequence[str], delimiter: str, quote: str
) -> Iterator[Record]:
    """The records of a CSV file after its header."""
    reader = csv_reader(lines, delimiter, quote)
    next(reader)
    row = 0
    while True:
        line = lines.start()
        try:
            cells = next(reader)
        except StopIteration:
            return
        # The reader may have swallowed good records: go back to the line after the bad one.
        except csv.Error as error:
            row += 1
            # An open quote swallowed lines that are records of their own.
            lines.rewind()
            reason = f"{error} near {excerpt(lines.first)}; reading went on at line {line + 1}"
            yield Record(row, line, {}, BadValue("UNREADABLE_ROW", reason))
            continue
        if not cells:  # a blank line
            continue
        row += 1
        fault = lines.undecoded()
        if fault is None and len(cells) != len(columns):
            text = excerpt(delimiter.join(cells))
            fault = BadValue(
                "COLUMN_COUNT", f"{len(cells)} cells where the header has {len(columns)}: {text}"
            )
        yield Record(row, line, dict(zip(columns, cells, strict=False)), fault)


def json_records(lines: Lines) -> Iterator[Record]:
    """The records of a file with one JSON object per line."""
    row = 0
    while True:
        number = lines.start()
        line = next(lines, None)
        if line is None:
            return
        # Blank lines are no records.
        if not line.strip():
            continue
        row += 1
        fault = lines.undecoded()
        cells: Mapping[str, Cell] = {}
        if fault is None:
            cells, fault = _json_record(line)
        yield Record(row, number, cells, fault)


def _json_record(line: str) -> tuple[Mapping[str, Cell], BadValue | None]:
    try:
        value = parse_json(line)
    except ValueError as error:
        return {}, BadValue("UNREADABLE_ROW", f"not JSON: {error}: {excerpt(line.strip())}")
    if not isinstance(value, Mapping):
        return {}, BadValue("UNREADABLE_ROW", f"not a JSON object: {excerpt(line.strip())}")
    # Names are compared without blanks at their ends.
    cells = {clean_name(key): cell for key, cell in value.items()}
    if len(cells) < len(value):
        return {}, BadValue(
            "UNREADABLE_ROW", f"keys that differ in blanks only: {excerpt(list(value))}"
        )
    column = _with_lone_surrogate(cells) if "\\u" in line else None
    if column is not None:
        return {}, BadValue("ENCODING_ERROR", f"column {excerpt(column)} holds half of a \\u pair")
    return cells, None


def _with_lone_surrogate(cell: Cell) -> str | None:
    """The first key or text that is not Unicode; None where all is well."""
    if isinstance(cell, str):
        if _UNDECODED.search(cell):
            return cell
        return None
    if isinstance(cell, Mapping):
        return next(
            (key for key, part in cell.items() if any(map(_with_lone_surrogate, (key, part)))), None
        )
    if isinstance(cell, Sequence) and not isinstance(cell, bytes):
        return next(
            (found for part in cell if (found := _with_lone_surrogate(part)) is not None), None
        )
    return None


def parquet_records(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    """The records of a Parquet file, a few hundred in memory at a time."""
    row = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256):
            for values in zip(*map(_parquet_values, batch.columns), strict=True):
                row += 1
                cells = dict(zip(columns, values, strict=True))
                bad = _with_lone_surrogate(cells)
                if bad is None:
                    fault = None
                else:
                    fault = BadValue("ENCODING_ERROR", f"column {excerpt(bad)} is not utf-8")
                yield Record(row, 0, cells, fault)


def _parquet_values(array: pa.Array) -> list[Cell]:
    # The shortest text of a float32 is what its writer meant: 0.1, not 0.10000000149.
    if pa.types.is_float32(array.type) or pa.types.is_float16(array.type):
        result = []
        for v in array.to_pylist():
            result.append(None if v is None or np.isnan(v) else _as_cell(float(str(np.float32(v)))))
        return result
    try:
        return [_as_cell(value) for value in array.to_pylist(maps_as_pydicts="lossy")]
    except UnicodeDecodeError:
        if not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
            raise
        raw = array.cast(pa.large_binary()).to_pylist()
        return [
            None if value is None else value.decode("utf-8", "surrogateescape") for value in raw
        ]


def _as_cell(value: Any) -> Cell:
    """A value of Parquet as an equivalent string.

    Whole floats have no `.0`, NaN is a missing value.
    """
    if value is None or isinstance(value, (str, bytes)):
        return value
    if isinstance(value, bool):
        if value:
            return "true"
        return "false"
    # NaN is how pandas writes a missing value.
    if isinstance(value, float):
        if value != value:
            return None
        return Number(int(value) if value.is_integer() and abs(value) < 1e15 else value)
    if isinstance(value, (int, decimal.Decimal)):
        return Number(value)
    if isinstance(value, dict):
        return {str(key): _as_cell(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_cell(part) for part in value]
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return str(value)


class Lines:
    """The lines of a text file with their numbers and byte offsets, and a way back."""

    def __init__(self, stream: TextIO, encoding: str) -> None:
        self.stream = stream
        self.encoding = encoding
        self.ahead: deque[str] = deque()
        self.taken: list[str] = []
        self.number = 0
        self.offset = 3 if encoding == "utf-8-sig" else 0  # bytes in front of the lines taken

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.ahead.popleft() if self.ahead else next(self.stream)
        self.taken.append(line)
        return line

    @property
    def first(self) -> str:
        """The first line of the record that was read last."""
        if self.taken:
            return self.taken[0].rstrip("\r\n")
        return ""

    def start(self) -> int:
        """Begin a record; returns the number of its first line."""
        self.number += len(self.taken)
        self.offset += sum(
            len(line) if line.isascii() else len(self._encode(line)) for line in self.taken
        )
        self.taken = []
        return self.number + 1

    def rewind(self) -> None:
        """Give all but the first line of this record back."""
        self.ahead.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]

    def undecoded(self) -> BadValue | None:
        """Which byte of this record is not in the file's encoding."""
        offset = self.offset
        # Find the first byte that could not be decoded, for the message.
        for number, line in enumerate(self.taken, self.number + 1):
            match = None if line.isascii() else _UNDECODED.search(line)
            if match:
                byte = offset + len(self._encode(line[: match.start()]))
                around = excerpt(
                    line[max(0, match.start() - 20) : match.start() + 20]
                    .encode("utf-8", "replace")
                    .decode()
                )
                where = f"byte {byte} (line {number}) is not {self.encoding.removesuffix('-sig')}"
                return BadValue("ENCODING_ERROR", f"{where}: {around}; set --encoding")
            offset += len(self._encode(line))
        return None

    def _encode(self, text: str) -> bytes:
        return text.encode(self.encoding.removesuffix("-sig"), "surrogateescape")


def clean_name(name: str) -> str:
    """A column's name without invisible characters and surrounding blanks."""
    return unicodedata.normalize("NFC", name.translate(_INVISIBLE)).strip()
