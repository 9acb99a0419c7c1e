"""Choose how words are searched on held-out queries: analysis, field weights, k1 and b."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from tritower.retrieval.lexical.analyzer import Analyzer, detect_language
from tritower.retrieval.lexical.ranking import LexicalIndex, Scoring
from tritower.retrieval.lexical.records import EXACT_FIELDS, FIELDS, Record

WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Weights of a field that are tried."""

K1 = (0.4, 0.8, 1.2, 2.0, 4.0)
B = (0.0, 0.25, 0.5, 0.75, 1.0)

MIN_GAIN = 0.001
"""A setting is changed for at least so much more of the figure: less is chance."""


@dataclass(frozen=True)
class LexicalSettings:
    """Everything that decides how words are searched.

    Attributes:
        analyzer: maps tokens to terms.
        neighbors: pairs of neighboring words are terms, too.
        scoring: how counts become scores.
    """

    analyzer: Analyzer
    neighbors: bool = False
    scoring: Scoring = field(default_factory=Scoring)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


class LexicalIndexes:
    """Indexes of the same records for several analyzers, each made once.

    Args:
        records: of N products.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self._made: dict[tuple[Analyzer, bool], LexicalIndex] = {}

    def get(self, settings: LexicalSettings) -> LexicalIndex:
        """The index that these settings search."""
        key = (settings.analyzer, settings.neighbors)
        if key not in self._made:
            self._made[key] = LexicalIndex(self.records, *key)
        return self._made[key]


def language_of(records: Sequence[Record]) -> str | None:
    """The language of most of the products' words."""
    word_fields = [name for name in FIELDS if name not in EXACT_FIELDS]
    counts = Counter(
        token for record in records for name in word_fields for token in record.get(name, ())
    )
    return detect_language(counts)


def choose_settings(
    start: LexicalSettings, measure: Callable[[LexicalSettings], float]
) -> tuple[LexicalSettings, float]:
    """Change one setting at a time and keep what gains.

    Args:
        start: what to begin with; its model (`bm25` or `tfidf`) stays.
        measure: the figure to maximize, such as nDCG@10 of held-out queries.

    Returns:
        The settings and their figure.
    """
    best = start
    figure = measure(start)

    # Weights of the fields, then how soon counts saturate and how much length matters.
    for name in ("texts", "numbers", "facts", "attributes", "title"):
        best, figure = climb(
            partial(_with_weight, best, name), WEIGHTS, best.scoring.weights[name], figure, measure
        )
    if start.scoring.model == "bm25":
        best, figure = climb(partial(_with_value, best, "k1"), K1, best.scoring.k1, figure, measure)
        best, figure = climb(partial(_with_value, best, "b"), B, best.scoring.b, figure, measure)

    # Stop words, stems and pairs of neighbors.
    for candidate in _analyses(best):
        value = figure if candidate == best else measure(candidate)
        if value >= figure + MIN_GAIN:
            best = candidate
            figure = value
    return best, figure


def climb(
    make: Callable[[float], LexicalSettings],
    values: Sequence[float],
    start: float,
    figure: float,
    measure: Callable[[LexicalSettings], float],
) -> tuple[LexicalSettings, float]:
    """Go up and down an ascending grid from a value, each way as long as the figure rises.

    Args:
        make: value -> settings with it.
        values: the grid; the start is one of them. The lowest is always tried: leaving a field out
            is no small step.
        start: where to begin.
        figure: of the start.
        measure: settings -> figure to maximize.

    Returns:
        The best settings and their figure.
    """
    best = start
    place = values.index(start)
    for way in (values[place + 1 :], values[:place][::-1], values[:1]):
        for value in way:
            found = measure(make(value))
            if found < figure + MIN_GAIN:
                break
            best = value
            figure = found
    return make(best), figure


def _with_weight(settings: LexicalSettings, name: str, weight: float) -> LexicalSettings:
    weights = {**settings.scoring.weights, name: weight}
    return replace(settings, scoring=replace(settings.scoring, weights=weights))


def _with_value(settings: LexicalSettings, name: str, value: float) -> LexicalSettings:
    change: dict[str, Any] = {name: value}
    return replace(settings, scoring=replace(settings.scoring, **change))


def _analyses(settings: LexicalSettings) -> Iterator[LexicalSettings]:
    """The settings with every way to make terms of tokens."""
    language = settings.analyzer.language
    if language:
        choices = [(True, True), (True, False), (False, False)]
    else:
        choices = [(False, False)]
    for neighbors in (False, True):
        for stop_words, stem in choices:
            analyzer = Analyzer(language, stop_words, stem)
            yield replace(settings, analyzer=analyzer, neighbors=neighbors)
