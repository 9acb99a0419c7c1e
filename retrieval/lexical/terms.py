"""From a field's tokens to its index terms: analyzed words, and pairs of neighbors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from tritower.retrieval.lexical.analyzer import Analyzer
from tritower.retrieval.lexical.records import EXACT_FIELDS
from tritower.retrieval.lexical.tokenizer import is_cjk


class TermReader:
    """Reads the terms of fields; each distinct token is analyzed once.

    Args:
        analyzer: maps tokens to terms.
        neighbors: pairs of neighboring words are terms, too.
    """

    def __init__(self, analyzer: Analyzer, neighbors: bool = False) -> None:
        self.analyzer = analyzer
        self.neighbors = neighbors
        self._term_of: dict[str, str | None] = {}  # token -> term, None for a stop word
        self._cjk: set[str] = set()  # terms that are a character

    def read(self, tokens: Sequence[str], field: str) -> list[str]:
        """The terms of a field, and pairs of neighbors.

        Chinese, Japanese and Korean characters always form pairs: a single one is hardly a word.
        """
        if field in EXACT_FIELDS:
            return list(tokens)
        term_of = self._term_of
        for token in tokens:
            if token not in term_of:
                term_of[token] = self.analyzer.term(token)
                if is_cjk(token):
                    self._cjk.add(token)
        terms = [term for token in tokens if (term := term_of[token]) is not None]
        if not self.neighbors and self._cjk.isdisjoint(terms):
            return terms
        # Pairs of neighbors, as "a b".
        pairs = [f"{a} {b}" for a, b in pairwise(terms) if self.neighbors or {a, b} <= self._cjk]
        return terms + pairs
