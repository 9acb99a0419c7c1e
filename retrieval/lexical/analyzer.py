"""From tokens to index terms: stop words and stems of the catalogue's language."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import bm25s.stopwords as lists
import Stemmer

STOP_WORDS: Mapping[str, frozenset[str]] = {
    "danish": frozenset(lists.STOPWORDS_DANISH),
    "dutch": frozenset(lists.STOPWORDS_DUTCH),
    "english": frozenset(lists.STOPWORDS_EN),
    "french": frozenset(lists.STOPWORDS_FRENCH),
    "german": frozenset(lists.STOPWORDS_GERMAN),
    "italian": frozenset(lists.STOPWORDS_ITALIAN),
    "norwegian": frozenset(lists.STOPWORDS_NORWEGIAN),
    "portuguese": frozenset(lists.STOPWORDS_PORTUGUESE),
    "russian": frozenset(lists.STOPWORDS_RUSSIAN),
    "spanish": frozenset(lists.STOPWORDS_SPANISH),
    "swedish": frozenset(lists.STOPWORDS_SWEDISH),
    "turkish": frozenset(lists.STOPWORDS_TURKISH),
}
"""Language -> its stop words, by the bm25s library.

The languages have a Snowball stemmer of the same name.
"""

MIN_STOP_WORD_SHARE = 0.02
"""A catalogue with fewer stop words among its tokens has no language that can be detected."""


@dataclass(frozen=True)
class Analyzer:
    """Maps a token to its index term.

    Attributes:
        language: a key of `STOP_WORDS`; None where it is not known, then tokens stay as they are.
        stop_words: leave out the language's stop words.
        stem: reduce words to their stem (Snowball, by the PyStemmer library): "dresses" becomes
            "dress". Tokens with a digit, such as model codes and sizes, are never stemmed.
    """

    language: str | None = None
    stop_words: bool = True
    stem: bool = True

    def term(self, token: str) -> str | None:
        """The term of a token; None for a stop word."""
        if self.language is None:
            return token
        if self.stop_words and token in STOP_WORDS[self.language]:
            return None
        if self.stem and token.isalpha():
            return self._stemmer.stemWord(token)
        return token

    def __getstate__(self) -> dict[str, Any]:
        """Without the stemmer, which cannot be pickled."""
        return {name: value for name, value in self.__dict__.items() if name != "_stemmer"}

    @cached_property
    def _stemmer(self) -> Stemmer.Stemmer:
        return Stemmer.Stemmer(self.language)


def detect_language(counts: Mapping[str, int]) -> str | None:
    """The language whose stop words cover most of a catalogue's tokens.

    Args:
        counts: token -> number of occurrences.

    Returns:
        A key of `STOP_WORDS`; None where no language covers `MIN_STOP_WORD_SHARE` of the tokens, as
        in Chinese.
    """
    total = sum(counts.values())
    covered = {
        name: sum(counts.get(word, 0) for word in words) for name, words in STOP_WORDS.items()
    }
    best = max(covered, key=lambda name: covered[name])
    if covered[best] >= MIN_STOP_WORD_SHARE * max(total, 1):
        return best
    return None
