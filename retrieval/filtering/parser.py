"""From the text of a filter to its terms; the grammar stands in retrieval/filtering/filters.py."""

from __future__ import annotations

import math
import re
from typing import NamedTuple, NoReturn, cast

from tritower.retrieval.filtering.terms import (
    KEYWORDS,
    NUMBER,
    WORD,
    Operator,
    Term,
    Test,
    Value,
    all_of,
    negated,
    some_of,
)

MAX_DEPTH = 50
"""Parentheses and `not` within each other."""

TOKEN = re.compile(
    rf"""\s*(?:
        (?P<sign> <= | >= | != | == | [<>=(),] )
      | (?P<quoted> "(?:[^"\\]|\\.)*" | '(?:[^'\\]|\\.)*' )
      | (?P<number> {NUMBER} (?! {WORD} ) )
      | (?P<word> {WORD} )
      | (?P<end> $ )
    )""",
    re.VERBOSE | re.DOTALL,
)
COMPARISON_SIGNS: dict[str, Operator] = {
    "<=": "<=",
    "<": "<",
    ">=": ">=",
    ">": ">",
    "=": "=",
    "==": "=",
}
ESCAPES = {"\\": "\\", '"': '"', "'": "'", "n": "\n", "t": "\t", "r": "\r"}
LOOKALIKES = (
    {"≤": "<=", "≥": ">=", "≠": "!="} | dict.fromkeys("“”„‟", '"') | dict.fromkeys("‘’‚‛`", "'")
)


def parse_term(text: str) -> Term:
    """The terms of a filter.

    Raises:
        ValueError: see `tritower.retrieval.filtering.filters.parse`.
    """
    parser = _Parser(_tokens(text), text)
    term = parser.any()
    parser.expect_end()
    return term


def fail(problem: str, text: str, at: int) -> NoReturn:
    """Raise a ValueError that shows where in the text the problem is, in one line."""
    start = max(0, at - 30)
    end = at + 40
    before, after = (_visible(part) for part in (text[start:at], text[at:end]))
    excerpt = f"{'...' if start else ''}{before}^{after}{'...' if end < len(text) else ''}"
    raise ValueError(f"filter: {problem}, at character {at + 1}: {excerpt}")


def _visible(text: str) -> str:
    return "".join(
        sign if sign.isprintable() else " " if sign.isspace() else "\ufffd" for sign in text
    )


class _Token(NamedTuple):
    token_type: str
    text: str
    at: int

    def is_word(self, word: str) -> bool:
        return self.token_type == "word" and self.text.lower() == word

    def __str__(self) -> str:
        if self.token_type == "end":
            return "the end"
        return _visible(self.text)


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    at = 0
    while not tokens or tokens[-1].token_type != "end":
        found = TOKEN.match(text, at)
        # Point at typographic quotes and signs: they are pasted from documents.
        if found is None:
            at += len(text[at:]) - len(text[at:].lstrip())
            sign = text[at]
            if sign in LOOKALIKES:
                fail(f"{sign} stands for nothing; write {LOOKALIKES[sign]}", text, at)
            fail(
                "a quote that is never closed"
                if sign in "\"'"
                else f"{_visible(sign)} must stand in quotes",
                text,
                at,
            )
        token_type = cast(str, found.lastgroup)
        tokens.append(_Token(token_type, found[token_type], found.start(token_type)))
        at = found.end()
    return tokens


class _Parser:
    """Recursive descent over tokens; each method takes what the grammar above calls by its name."""

    def __init__(self, tokens: list[_Token], text: str) -> None:
        self._tokens = tokens
        self._text = text
        self._next = self._depth = 0

    @property
    def token(self) -> _Token:
        return self._tokens[self._next]

    def any(self) -> Term:
        terms = [self.every()]
        while self.take_word("or"):
            terms.append(self.every())
        return some_of(terms)

    def every(self) -> Term:
        terms = [self.one()]
        while self.take_word("and"):
            terms.append(self.one())
        return all_of(terms)

    def one(self) -> Term:
        first = self.token
        self._depth += 1
        if self._depth > MAX_DEPTH:
            fail(
                f"more than {MAX_DEPTH} parentheses and not within each other", self._text, first.at
            )
        # "not" binds tighter than "and" and "or".
        if self.take_word("not"):
            term = negated(self.one())
        elif self.take_sign("("):
            term = self.any()
            if not self.take_sign(")"):
                self.unexpected("and, or or )")
        else:
            term = self.test()
        self._depth -= 1
        return term

    def test(self) -> Term:
        at = self.token.at
        name = self.name()
        # NAME is known, NAME != value, NAME < value ..., NAME [not] in (values) ...
        if self.take_word("is"):
            return self.known_test(name, at)
        if self.take_sign("!="):
            return negated(Test(name, "=", (self.value(),), at))
        for sign, comparison in COMPARISON_SIGNS.items():
            if self.take_sign(sign):
                return Test(name, comparison, (self.value(),), at)
        holds = not self.take_word("not")
        test = self.word_test(name, at, holds)
        if holds:
            return test
        return negated(test)

    def known_test(self, name: str, at: int) -> Term:
        """After `is`: `known`, `missing`, `not known` or `not missing`."""
        holds = not self.take_word("not")
        is_known = self.take_word("known")
        if not is_known and not self.take_word("missing"):
            self.unexpected("missing or known")
        test = Test(name, "known", (), at)
        if is_known == holds:
            return test
        return negated(test)

    def word_test(self, name: str, at: int, holds: bool) -> Test:
        """A test by `in`, `under` or `has`."""
        if self.take_word("in"):
            return Test(name, "in", self.values(), at)
        if self.take_word("under"):
            return Test(name, "under", (self.value(),), at)
        if self.take_word("has"):
            return Test(name, "has", (self.value(),), at)
        signs = "<, <=, >, >=, =, !=, in, under, has or is"
        self.unexpected(signs if holds else "in, under or has")

    def name(self) -> str:
        if self.token.token_type not in ("word", "quoted") or self.token.text.lower() in KEYWORDS:
            self.unexpected("the name of an attribute")
        return cast(str, self.value())

    def values(self) -> tuple[Value, ...]:
        if not self.take_sign("("):
            self.unexpected("(")
        values = [self.value()]
        while self.take_sign(","):
            values.append(self.value())
        if not self.take_sign(")"):
            self.unexpected(", or )")
        return tuple(values)

    def value(self) -> Value:
        token = self.token
        if token.token_type not in ("word", "quoted", "number") or (
            token.token_type == "word" and token.text.lower() in KEYWORDS
        ):
            self.unexpected("a value")
        self._next += 1
        if token.token_type == "number":
            # A number without quotes is a number; words and quoted texts are text.
            number = float(token.text)
            if math.isinf(number):
                fail(f"{token} is too large a number", self._text, token.at)
            return number
        if token.token_type == "word":
            return token.text
        return self.unquoted(token)

    def unquoted(self, token: _Token) -> str:
        def escape(found: re.Match[str]) -> str:
            if found[1] not in ESCAPES:
                fail(
                    f"unknown escape {_visible(found[0])}: write \\\\ for \\",
                    self._text,
                    token.at + 1 + found.start(),
                )
            return ESCAPES[found[1]]

        return re.sub(r"\\(.)", escape, token.text[1:-1], flags=re.DOTALL)

    def take_word(self, word: str) -> bool:
        return self._take(self.token.is_word(word))

    def take_sign(self, sign: str) -> bool:
        return self._take(self.token.token_type == "sign" and self.token.text == sign)

    def _take(self, taken: bool) -> bool:
        self._next += taken
        return taken

    def expect_end(self) -> None:
        if self.token.token_type != "end":
            self.unexpected("and, or or the end")

    def unexpected(self, wanted: str) -> NoReturn:
        found = self.token
        if found.token_type == "word" and found.text.lower() in KEYWORDS:
            hint = "; put it in quotes"
        else:
            hint = ""
        fail(f"expected {wanted}, found {found}{hint}", self._text, found.at)
