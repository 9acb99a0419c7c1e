"""From the text of a filter to its terms; the grammar is in retrieval/filtering/filters.py."""

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
    and_of,
    negated,
    or_of,
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
    term = parser.parse_or()
    parser.expect_end()
    return term


def fail(problem: str, text: str, position: int) -> NoReturn:
    """Raise a ValueError that shows where in the text the problem is, in one line."""
    start = max(0, position - 30)
    end = position + 40
    before, after = (_visible(part) for part in (text[start:position], text[position:end]))
    excerpt = f"{'...' if start else ''}{before}^{after}{'...' if end < len(text) else ''}"
    raise ValueError(f"filter: {problem}, at character {position + 1}: {excerpt}")


def _visible(text: str) -> str:
    return "".join(
        sign if sign.isprintable() else " " if sign.isspace() else "\ufffd" for sign in text
    )


class _Token(NamedTuple):
    token_type: str
    text: str
    position: int

    def is_word(self, word: str) -> bool:
        return self.token_type == "word" and self.text.lower() == word

    def __str__(self) -> str:
        if self.token_type == "end":
            return "the end"
        return _visible(self.text)


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    position = 0
    while not tokens or tokens[-1].token_type != "end":
        found = TOKEN.match(text, position)
        # Point at typographic quotes and signs: they are pasted from documents.
        if found is None:
            position += len(text[position:]) - len(text[position:].lstrip())
            sign = text[position]
            if sign in LOOKALIKES:
                fail(f"{sign} stands for nothing; write {LOOKALIKES[sign]}", text, position)
            fail(
                "a quote that is never closed"
                if sign in "\"'"
                else f"{_visible(sign)} must stand in quotes",
                text,
                position,
            )
        token_type = cast(str, found.lastgroup)
        tokens.append(_Token(token_type, found[token_type], found.start(token_type)))
        position = found.end()
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

    def parse_or(self) -> Term:
        terms = [self.parse_and()]
        while self.accept_word("or"):
            terms.append(self.parse_and())
        return or_of(terms)

    def parse_and(self) -> Term:
        terms = [self.parse_not()]
        while self.accept_word("and"):
            terms.append(self.parse_not())
        return and_of(terms)

    def parse_not(self) -> Term:
        first = self.token
        self._depth += 1
        if self._depth > MAX_DEPTH:
            fail(
                f"more than {MAX_DEPTH} parentheses and not within each other",
                self._text,
                first.position,
            )
        # "not" binds tighter than "and" and "or".
        if self.accept_word("not"):
            term = negated(self.parse_not())
        elif self.accept_sign("("):
            term = self.parse_or()
            if not self.accept_sign(")"):
                self.unexpected("and, or or )")
        else:
            term = self.parse_test()
        self._depth -= 1
        return term

    def parse_test(self) -> Term:
        position = self.token.position
        name = self.parse_name()
        # NAME is known, NAME != value, NAME < value ..., NAME [not] in (values) ...
        if self.accept_word("is"):
            return self.parse_known_test(name, position)
        if self.accept_sign("!="):
            return negated(Test(name, "=", (self.parse_value(),), position))
        for sign, comparison in COMPARISON_SIGNS.items():
            if self.accept_sign(sign):
                return Test(name, comparison, (self.parse_value(),), position)
        holds = not self.accept_word("not")
        test = self.parse_word_test(name, position, holds)
        if holds:
            return test
        return negated(test)

    def parse_known_test(self, name: str, position: int) -> Term:
        """After `is`: `known`, `missing`, `not known` or `not missing`."""
        holds = not self.accept_word("not")
        is_known = self.accept_word("known")
        if not is_known and not self.accept_word("missing"):
            self.unexpected("missing or known")
        test = Test(name, "known", (), position)
        if is_known == holds:
            return test
        return negated(test)

    def parse_word_test(self, name: str, position: int, holds: bool) -> Test:
        """A test by `in`, `under` or `has`."""
        if self.accept_word("in"):
            return Test(name, "in", self.parse_values(), position)
        if self.accept_word("under"):
            return Test(name, "under", (self.parse_value(),), position)
        if self.accept_word("has"):
            return Test(name, "has", (self.parse_value(),), position)
        signs = "<, <=, >, >=, =, !=, in, under, has or is"
        self.unexpected(signs if holds else "in, under or has")

    def parse_name(self) -> str:
        if self.token.token_type not in ("word", "quoted") or self.token.text.lower() in KEYWORDS:
            self.unexpected("the name of an attribute")
        return cast(str, self.parse_value())

    def parse_values(self) -> tuple[Value, ...]:
        if not self.accept_sign("("):
            self.unexpected("(")
        parse_values = [self.parse_value()]
        while self.accept_sign(","):
            parse_values.append(self.parse_value())
        if not self.accept_sign(")"):
            self.unexpected(", or )")
        return tuple(parse_values)

    def parse_value(self) -> Value:
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
                fail(f"{token} is too large a number", self._text, token.position)
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
                    token.position + 1 + found.start(),
                )
            return ESCAPES[found[1]]

        return re.sub(r"\\(.)", escape, token.text[1:-1], flags=re.DOTALL)

    def accept_word(self, word: str) -> bool:
        return self._accept(self.token.is_word(word))

    def accept_sign(self, sign: str) -> bool:
        return self._accept(self.token.token_type == "sign" and self.token.text == sign)

    def _accept(self, taken: bool) -> bool:
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
        fail(f"expected {wanted}, found {found}{hint}", self._text, found.position)
