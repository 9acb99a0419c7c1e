"""A record of a user's file that was read, and the problems that were found on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

from tritower.datamodules.bad_value import BadValue
from tritower.datamodules.batch import Item
from tritower.datamodules.prepare.records import Record

P = ParamSpec("P")
T = TypeVar("T")

FATAL = frozenset({"PATH_OUTSIDE_ROOT"})
"""Problems of a field that reject the row under every policy."""

NOTES = frozenset({"TEXT_EMPTY", "SELF_JUDGEMENT"})
"""Recorded for the user, but no reason to reject a row or to fail a run."""


class Problem(NamedTuple):
    """Something in the user's files that could not be used: one line of problems.csv.

    Attributes:
        file: name of the file.
        row: number of the record, from 1.
        line: its first physical line, from 1; 0 in Parquet.
        id: of the record, empty where unknown.
        column: its name, empty for the record as a whole.
        code: stable and machine-readable; all are listed in docs/catalogue.md.
        reason: for a person.
    """

    file: str
    row: int
    line: int
    id: str
    column: str
    code: str
    reason: str


class Row(NamedTuple):
    """A record that was read; rejected when `item` is None.

    Attributes:
        file: name of the file.
        row: number of the record.
        line: its first physical line.
        id: of the product or query, verbatim.
        item: what it is.
        group: the same thing, for example from another seller.
        family: variants of one style.
        split: train, val, test or None.
        source: a query's own product.
        problems: what could not be used.
    """

    file: str
    row: int
    line: int
    id: str
    item: Item | None
    group: str | None = None
    family: str | None = None
    split: str | None = None
    source: str | None = None
    problems: tuple[Problem, ...] = ()

    def rejected(self, code: str, reason: str) -> Row:
        """The same record, rejected for one more problem."""
        problem = Problem(self.file, self.row, self.line, self.id, "", code, reason)
        return self._replace(item=None, problems=(*self.problems, problem))


class RowBuilder:
    """Collects the problems of one record."""

    def __init__(self, file: str, record: Record, id: str) -> None:
        self.file = file
        self.record = record
        self.id = id
        self.problems: list[Problem] = []

    def note(self, column: str, problem: BadValue) -> None:
        """Record a problem."""
        where = (self.file, self.record.row, self.record.line, self.id)
        self.problems.append(Problem(*where, column, problem.code, problem.reason))

    def read(
        self, column: str, parse: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T | None:
        """What `parse` makes of a cell of `column`, or None and a recorded problem."""
        try:
            return parse(*args, **kwargs)
        except BadValue as error:
            self.note(column, error)
            return None

    def fails(self, strict: bool) -> bool:
        """Whether the problems reject the record."""
        codes = {problem.code for problem in self.problems}
        return bool(codes & FATAL or (strict and codes - NOTES))

    def row(
        self,
        item: Item | None,
        group: str | None = None,
        family: str | None = None,
        split: str | None = None,
        source: str | None = None,
    ) -> Row:
        """The record with its problems."""
        where = (self.file, self.record.row, self.record.line, self.id)
        return Row(*where, item, group, family, split, source, tuple(self.problems))
