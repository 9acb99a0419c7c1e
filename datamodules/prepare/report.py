"""What a run of prepare did.

Every problem in a file, counts that add up, and tables for the person who ran it.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from tritower.datamodules.prepare.columns import Columns
from tritower.datamodules.prepare.rows import NOTES, Problem, Row
from tritower.datamodules.prepare.tables import CatalogueError


@dataclass(frozen=True)
class Threshold:
    """How many rows of a file may have a problem.

    Attributes:
        share: of the rows, 0 to 1; None where `count` decides.
        count: of rows.
        text: as the user wrote it.
    """

    share: float | None
    count: int
    text: str

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """`1%`, `0.5%` or `10`.

        Raises:
            CatalogueError: anything else.
        """
        try:
            if text.endswith("%"):
                share = float(text[:-1]) / 100
                if 0 <= share <= 1:
                    return cls(share, 0, text)
            elif int(text) >= 0:
                return cls(None, int(text), text)
        except ValueError:
            pass
        raise CatalogueError(
            f"--max-problems {text!r} must be a share such as 1% or a number of rows such as 10"
        )

    def exceeded(self, problems: int, rows: int) -> bool:
        """Whether this many rows with problems, of so many, are too many."""
        return problems > (self.count if self.share is None else self.share * rows)


class Counts:
    """How the records of one file ended."""

    def __init__(self) -> None:
        self.rows = self.accepted = self.rejected = 0
        self.with_problem: set[int] = set()

    def ended(self) -> tuple[int, int]:
        """Accepted and rejected rows."""
        return self.accepted, self.rejected

    def to_dict(self) -> dict[str, int]:
        """For the report."""
        counts = {"rows": self.rows, "accepted": self.accepted, "rejected": self.rejected}
        return counts | {"with_problem": len(self.with_problem)}


class ProblemLog:
    """Writes problems.csv as the problems come, and counts.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8", errors="backslashreplace", newline="")
        self.writer = csv.writer(self.file, lineterminator="\n")
        self.writer.writerow(Problem._fields)
        self.codes: Counter[str] = Counter()
        self.files: dict[str, Counts] = {}
        self.examples: dict[str, Problem] = {}

    def add(self, row: Row, counted: bool = True) -> None:
        """Take in one row that was read.

        Args:
            row: with its problems.
            counted: False where the same record comes once more.
        """
        counts = self.files.setdefault(row.file, Counts())
        if counted:
            counts.rows += 1
            counts.accepted += row.item is not None
            counts.rejected += row.item is None
        for problem in row.problems:
            self.writer.writerow(problem)
            self.codes[problem.code] += 1
            self.examples.setdefault(problem.code, problem)
            if problem.code not in NOTES:
                counts.with_problem.add(problem.row)

    def most_frequent(self) -> str:
        """The most frequent problem, with an example."""
        code, count = max(self.codes.items(), key=lambda pair: pair[1])
        return f"most often {code} ({count:,} times, for example {self.examples[code].reason})"

    def check(self, threshold: Threshold) -> None:
        """Refuse a run with too many problems.

        Raises:
            CatalogueError: naming the file and its figures.
        """
        for file, counts in self.files.items():
            bad = len(counts.with_problem)
            if threshold.exceeded(bad, counts.rows):
                share = f"{bad / counts.rows:.1%}"
                share = f"{bad:,} of {counts.rows:,} rows of {file} ({share}) have a problem"
                raise CatalogueError(f"{share}; --max-problems {threshold.text} allows fewer")

    def __enter__(self) -> ProblemLog:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.close()


def console(stderr: bool = False) -> Console:
    """Where tables go; a file or a pipe gets lines long enough not to be folded."""
    found = Console(highlight=False, stderr=stderr)
    if found.is_terminal:
        return found
    return Console(highlight=False, stderr=stderr, width=160)


def columns_grid(columns: Columns, rows: int) -> Grid:
    """The role of every column, aligned; keys that are too rare share one line."""
    lines = []
    rare = [column for column in columns.of("ignore") if column.why.startswith("in fewer than")]
    for column in columns.columns:
        if column not in rare:
            examples = ", ".join(column.examples)
            lines.append(
                (column.name, column.role, f"{column.filled / rows:.0%}", column.why, examples)
            )
    # Rare keys of JSON objects share one line.
    if rare:
        lines.append(
            (
                f"{len(rare)} more keys",
                "ignore",
                "",
                rare[0].why,
                ", ".join(column.name for column in rare),
            )
        )
    return _grid(
        ("column", "is", "filled", "why", "examples"), lines, right=("filled",), shrinks=True
    )


def files_grid(files: Mapping[str, Counts]) -> Grid:
    """Rows in, accepted and rejected of every file."""
    # One line for each file of rows: table, queries, judgements.
    lines = []
    for file, counts in files.items():
        lines.append(
            (
                file,
                *(
                    f"{n:,}"
                    for n in (
                        counts.rows,
                        counts.accepted,
                        counts.rejected,
                        len(counts.with_problem),
                    )
                ),
            )
        )
    header = ("file", "rows", "accepted", "rejected", "with a problem")
    return _grid(header, lines, right=header[1:])


def problems_grid(log: ProblemLog) -> Grid:
    """Problems by code, the most frequent first, each with an example."""
    lines = []
    for code, count in sorted(log.codes.items(), key=lambda pair: (-pair[1], pair[0])):
        example = log.examples[code]
        where = f"{example.file} row {example.row}" + (
            f", {example.column}" if example.column else ""
        )
        lines.append((code, f"{count:,}", f"{where}: {example.reason}"))
    return _grid(("problem", "count", "for example"), lines, right=("count",), shrinks=True)


def summary_grid(facts: Mapping[str, str]) -> Grid:
    """Name and value, aligned."""
    return _grid(("", ""), list(facts.items()), right=())


def _grid(
    header: Sequence[str],
    lines: Sequence[Sequence[str]],
    right: Sequence[str],
    shrinks: bool = False,
) -> Grid:
    """Aligned columns, one line per row.

    Where the screen is too narrow, the last column is cut if it `shrinks`.
    """
    grid = Grid(box=None, pad_edge=False, header_style="bold", show_header=any(header))
    room = console().width
    # The last column takes the room that is left.
    for number, name in enumerate(header):
        last = shrinks and number == len(header) - 1
        width = max([cell_len(name), *(cell_len(line[number]) for line in lines)])
        width = max(12, min(width, room)) if last else width
        room -= width + 2
        if name in right:
            justify: Literal["left", "right"] = "right"
        else:
            justify = "left"
        grid.add_column(
            name,
            justify=justify,
            no_wrap=shrinks,
            overflow="ellipsis",
            width=width if shrinks else None,
        )
    for line in lines:
        grid.add_row(*map(Text, line))
    return grid
