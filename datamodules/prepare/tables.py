"""A user's file of records: CSV, TSV, JSONL or Parquet, its columns and how it is written."""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from tritower.datamodules.prepare.records import (
    Lines,
    Record,
    clean_name,
    csv_reader,
    csv_records,
    json_records,
    parquet_records,
)

FORMATS = {
    ".csv": "csv",
    ".txt": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}


class CatalogueError(ValueError):
    """The files as a whole cannot become a catalogue; nothing is published."""


@dataclass
class Table:
    """A file of records.

    Args:
        path: its ending decides the format: .csv, .tsv, .jsonl or .parquet.
        encoding: of text files; byte order marks are understood.
        delimiter: of CSV files; None takes the one that separates the header.
        quote: the quote character of CSV and TSV files; empty for files that quote nothing.

    Raises:
        CatalogueError: no such file, an unknown ending, or a header that cannot be used.
    """

    path: Path
    encoding: str = "utf-8"
    delimiter: str | None = None
    quote: str = '"'
    columns: list[str] = field(init=False)

    def __post_init__(self) -> None:
        if not self.path.is_file():
            raise CatalogueError(f"{self.path}: no such file")
        # The format follows from the name, the columns from the header.
        try:
            self.format = FORMATS[self.path.suffix.lower()]
            codecs.lookup(self.encoding)
        except KeyError:
            known = ", ".join(FORMATS)
            raise CatalogueError(
                f"{self.path}: unknown file type; its name must end in one of {known}"
            ) from None
        except LookupError:
            raise CatalogueError(
                f"unknown --encoding {self.encoding!r}; try utf-8, latin-1 or gb18030"
            ) from None
        if self.format == "parquet":
            self.columns = _parquet_columns(self.path)
        else:
            self.encoding = _encoding_of(self.path, self.encoding)
            if self.format == "jsonl":
                self.columns = self._json_columns()
            else:
                self.columns = self._header()

    def __str__(self) -> str:
        if self.format in ("csv", "tsv"):
            return f"{self.path.name} (delimiter {self.delimiter!r}, {self.encoding})"
        return f"{self.path.name} ({self.format})"

    def records(self) -> Iterator[Record]:
        """All records, in order; may be called again.

        Raises:
            CatalogueError: ENCODING_ERROR or UNREADABLE_FILE: the file cannot be read any further.
        """
        try:
            if self.format == "parquet":
                yield from parquet_records(self.path, self.columns)
                return
            with self._open() as stream:
                lines = Lines(stream, self.encoding)
                if self.format == "jsonl":
                    yield from json_records(lines)
                else:
                    yield from csv_records(lines, self.columns, self.delimiter or ",", self.quote)
        except UnicodeError as error:
            raise CatalogueError(f"{self.path}: ENCODING_ERROR: {error}; set --encoding") from None
        except (OSError, pa.ArrowException) as error:
            raise CatalogueError(f"{self.path}: UNREADABLE_FILE: {error}") from None

    def _open(self) -> TextIO:
        # Undecodable bytes become lone surrogates, so that a bad row can be named while the others
        # are read.
        return self.path.open(encoding=self.encoding, errors="surrogateescape", newline="")

    def _header(self) -> list[str]:
        try:
            # Guess the delimiter, then read the header with it.
            if self.delimiter is None:
                if self.format == "tsv":
                    self.delimiter = "\t"
                else:
                    self.delimiter = self._guess_delimiter()
            if len(self.delimiter) != 1:
                raise CatalogueError(f"--delimiter {self.delimiter!r} must be one character")
            with self._open() as stream:
                header: list[str] = next(csv_reader(stream, self.delimiter, self.quote), [])
        except (csv.Error, UnicodeError) as error:
            raise CatalogueError(f"{self.path}: the header line cannot be read: {error}") from None
        if not header:
            raise CatalogueError(
                f"{self.path} is empty: a header line with the names of the columns is expected"
            )
        if any(not name.isascii() and "\udc80" <= max(name) <= "\udfff" for name in header):
            shown = [name.encode("utf-8", "replace").decode() for name in header]
            raise CatalogueError(
                f"{self}: ENCODING_ERROR: the header {shown} is not {self.encoding}; set --encoding"
            )
        return _names(header, self.path)

    def _guess_delimiter(self) -> str:
        with self._open() as stream:
            line = re.sub(r'"[^"]*"', "", stream.readline(1_000_000))
        return max(",;\t|", key=line.count)

    def _json_columns(self) -> list[str]:
        columns: dict[str, None] = {}
        fault = None
        for record in self.records():
            columns.update(dict.fromkeys(record.cells))
            fault = fault or record.fault
        if not columns and fault is not None:
            raise CatalogueError(f"{self.path}: no line can be read; the first one: {fault}")
        return list(columns)


def _names(names: Sequence[str], path: Path) -> list[str]:
    """The columns' names without invisible characters; a column without a name gets its number."""
    cleaned = [clean_name(name) or f"column_{number}" for number, name in enumerate(names, 1)]
    twice = sorted({name for name in cleaned if cleaned.count(name) > 1})
    if twice:
        raise CatalogueError(f"{path}: columns {twice} appear twice; found {cleaned}")
    return cleaned


def _encoding_of(path: Path, encoding: str) -> str:
    """The encoding, by the byte order mark where there is one."""
    with path.open("rb") as stream:
        start = stream.read(4)
    if start.startswith(codecs.BOM_UTF8) and codecs.lookup(encoding).name == "utf-8":
        return "utf-8-sig"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return encoding


def _parquet_columns(path: Path) -> list[str]:
    try:
        return _names(pq.read_schema(path).names, path)
    except (OSError, pa.ArrowException) as error:
        raise CatalogueError(f"{path}: UNREADABLE_FILE: {error}") from None
