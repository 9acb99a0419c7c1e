"""What a filter is made of, and which rows match it.

    price < 50 and brand in (Acme, Zed)      All((Test("price", "<", (50.0,)), Test("brand", "in",
    ("Acme", "Zed"))))

Logic is that of SQL: what is unknown is matched neither by a test nor by its opposite. A product
without a price matches neither `price < 50` nor `not price < 50`, only `price is missing`. So rows
are evaluated twice: where a term surely holds and where it surely does not; `not` exchanges the
two.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import reduce
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tritower.retrieval.products.attribute_cells import (
    LEVEL_SEPARATOR,
    TEXT,
    VALUE_SEPARATOR,
    AttributeType,
    path_text,
    value_text,
)
from tritower.retrieval.products.attribute_table import AttributeTable, Mask, Numbers, Texts

Operator = Literal["<", "<=", ">", ">=", "=", "in", "under", "has", "known"]

OPERATORS: dict[AttributeType, tuple[str, ...]] = {
    "number": ("<", "<=", ">", ">=", "=", "in", "known"),
    "category": ("=", "in", "known"),
    "path": ("=", "in", "under", "has", "known"),
    "set": ("has", "known"),
}
ADVICE: dict[AttributeType, str] = {
    "number": "a number: compare it with <, <=, >, >=, =, != or in",
    "category": "a category, which is one text without order: use =, != or in",
    "path": 'a path without order: use under "A > B", has, =, != or in',
    "set": "a set: use has, one for each value",
}
KEYWORDS = frozenset({"and", "or", "not", "in", "under", "has", "is"})
UNSIGNED_NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
NUMBER = rf"[+-]?{UNSIGNED_NUMBER}"
WORD = r"""[^\s()<>=!,"'`;|{}\[\]\\“”„‟‘’‚‛≤≥≠]+"""
SHOWN = 12
"""Names of attributes in a message at most."""

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
OPPOSITES = {"<": ">=", "<=": ">", ">": "<=", ">=": "<"}

Value = float | str


@dataclass(frozen=True)
class Test:
    """One attribute compared with values.

    Attributes:
        attribute: its name.
        operator: `=` and `in` for equal values, `under` for paths that begin so, `has` for sets and
            levels of paths, `known` for any value.
        values: one; several for `in`, none for `known`.
        position: its position in the text, for messages.
    """

    __test__ = False  # pytest takes it for a test otherwise

    attribute: str
    operator: Operator
    values: tuple[Value, ...] = ()
    position: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return self.text(True)

    def text(self, holds: bool) -> str:
        """As it is written; `holds` is False for its opposite."""
        if not _is_word(self.attribute):
            name = _quoted(self.attribute)
        else:
            name = self.attribute
        no = "" if holds else "not "
        values = ", ".join(map(_value_text, self.values))
        if self.operator == "known":
            return f"{name} is {'known' if holds else 'missing'}"
        if self.operator == "in":
            return f"{name} {no}in ({values})"
        if self.operator == "=":
            return f"{name} {'=' if holds else '!='} {values}"
        return f"{no}{name} {self.operator} {values}"


@dataclass(frozen=True)
class Not:
    """What does not match a term."""

    term: Term

    def __str__(self) -> str:
        if isinstance(self.term, Test):
            return self.term.text(False)
        return f"not ({self.term})"


@dataclass(frozen=True)
class And:
    """What matches every one of two or more terms."""

    terms: tuple[Term, ...]

    def __str__(self) -> str:
        return " and ".join(
            f"({term})" if isinstance(term, Or) else str(term) for term in self.terms
        )


@dataclass(frozen=True)
class Or:
    """What matches at least one of two or more terms."""

    terms: tuple[Term, ...]

    def __str__(self) -> str:
        return " or ".join(map(str, self.terms))


Term = Test | Not | And | Or


def and_of(terms: list[Term]) -> Term:
    """`And`, without another one inside."""
    flat = [inner for term in terms for inner in (term.terms if isinstance(term, And) else (term,))]
    if len(flat) == 1:
        return flat[0]
    return And(tuple(flat))


def or_of(terms: list[Term]) -> Term:
    """`Or`, without another one inside."""
    flat = []
    for term in terms:
        for inner in term.terms if isinstance(term, Or) else (term,):
            flat.append(inner)
    if len(flat) == 1:
        return flat[0]
    return Or(tuple(flat))


def negated(term: Term) -> Term:
    """`Not`, without another one inside."""
    if isinstance(term, Not):
        return term.term
    return Not(term)


def tests_of(term: Term) -> Iterator[Test]:
    """All tests, in the order of the text."""
    if isinstance(term, Test):
        yield term
    elif isinstance(term, Not):
        yield from tests_of(term.term)
    else:
        for inner in term.terms:
            yield from tests_of(inner)


def type_problem(test: Test, attribute_types: Mapping[str, AttributeType]) -> str | None:
    """Why a test cannot be asked of a table with such attributes; None where it can.

    Args:
        test: of a filter.
        attribute_types: attribute -> type.
    """
    name = test.attribute
    attribute_type = attribute_types.get(test.attribute)
    if attribute_type is None:
        # Suggest the names that look most alike.
        nearest = sorted(
            attribute_types,
            key=lambda other: -SequenceMatcher(None, name.lower(), other.lower()).ratio(),
        )
        if len(nearest) > SHOWN:
            more = f" and {len(nearest) - SHOWN} more"
        else:
            more = ""
        if attribute_types:
            return f"no attribute {name!r}; there are {', '.join(nearest[:SHOWN])}{more}"
        return "no attributes"
    if test.operator not in OPERATORS[attribute_type]:
        return f"{name} is {ADVICE[attribute_type]}"
    # Values must be numbers for a number, and text for everything else.
    for value in test.values:
        if (attribute_type == "number") != isinstance(value, float):
            if attribute_type == "number":
                return f"{name} is a number, {value!r} is text"
            number = _value_text(value)
            return (
                f"{name} is a {attribute_type}, {number} is a number: put it in quotes for the text"
            )
        if isinstance(value, str) and not value.strip():
            return f"{name}: a blank text is stored as unknown: write {test.attribute} is missing"
    return None


def matches(term: Term, table: AttributeTable, holds: bool = True) -> Mask:
    """(N,) rows for which a term surely holds, or surely does not.

    Args:
        term: its tests all fit the table.
        table: of N rows.
        holds: False for the rows for which it does not hold.
    """
    if isinstance(term, Not):
        return matches(term.term, table, not holds)
    if isinstance(term, Test):
        column = table.column(term.attribute)
        if isinstance(column, Numbers):
            return _match_numbers(term, column, holds)
        return _match_texts(term, column, table.attribute_types[term.attribute], holds)
    join = np.logical_and if isinstance(term, And) == holds else np.logical_or
    masks = (matches(inner, table, holds) for inner in term.terms)
    return reduce(lambda one, other: join(one, other, out=one), masks)


def _match_numbers(test: Test, column: Numbers, holds: bool) -> Mask:
    values = column.values
    wanted = [float(value) for value in test.values]
    if test.operator in COMPARISONS:  # NaN, the unknown, is neither below nor above anything
        # The opposite of "<" is ">=": a missing number matches neither.
        compare = COMPARISONS[test.operator if holds else OPPOSITES[test.operator]]
        return cast(Mask, compare(values, wanted[0]))
    is_known = cast(Mask, values == values)
    if test.operator == "known":
        if holds:
            return is_known
        return ~is_known
    few = len(wanted) <= 8  # compared one by one is faster then
    if few:
        equal: Mask = reduce(np.logical_or, [values == value for value in wanted])
    else:
        equal = np.isin(values, wanted)
    if holds:
        return equal
    return is_known & ~equal


def _match_texts(test: Test, column: Texts, attribute_type: AttributeType, holds: bool) -> Mask:
    if test.operator == "known":
        if holds:
            return column.codes >= 0
        return column.codes < 0
    # The test runs on the vocabulary, and rows look up its results; the last one is for code -1.
    is_match = np.zeros(len(column.vocabulary) + 1, np.bool_)
    is_match[:-1] = _match_vocabulary(test, column.vocabulary, attribute_type) == holds
    return np.take(is_match, column.codes, mode="wrap")


def _match_vocabulary(
    test: Test, vocabulary: pa.Array, attribute_type: AttributeType
) -> NDArray[np.bool_]:
    wanted = [
        path_text(str(value)) if attribute_type == "path" else str(value) for value in test.values
    ]
    if test.operator in ("=", "in"):
        return _bools(pc.is_in(vocabulary, value_set=pa.array(wanted, TEXT)))
    if test.operator == "under":
        within = pc.starts_with(vocabulary, wanted[0] + LEVEL_SEPARATOR)
        return _bools(pc.or_(pc.equal(vocabulary, pa.scalar(wanted[0], TEXT)), within))
    # `has`: the value between separators. Substrings are found first, as that is fast.
    sign = pa.scalar(VALUE_SEPARATOR if attribute_type == "set" else LEVEL_SEPARATOR, TEXT)
    value = value_text(wanted[0])
    is_match = _bools(pc.match_substring(vocabulary, value))
    # Only these can contain it as a whole value.
    maybe = np.flatnonzero(is_match)
    enclosed = pc.binary_join_element_wise(
        sign, vocabulary.take(pa.array(maybe)), sign, pa.scalar("", TEXT)
    )
    is_match[maybe] = _bools(pc.match_substring(enclosed, f"{sign}{value}{sign}"))
    return is_match


def _bools(array: pa.Array) -> NDArray[np.bool_]:
    bools: NDArray[np.bool_] = array.to_numpy(zero_copy_only=False)
    return bools


def _value_text(value: Value) -> str:
    if isinstance(value, str):
        if _is_word(value):
            return value
        return _quoted(value)
    if value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return repr(value)


def _is_word(text: str) -> bool:
    if text.lower() in KEYWORDS or re.fullmatch(NUMBER, text):
        return False
    return re.fullmatch(WORD, text) is not None


def _quoted(text: str) -> str:
    signs: dict[str, Any] = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(signs.get(sign, sign) for sign in text) + '"'
