"""Search with nothing trained.

Words of the whole record, features of pretrained towers, and numbers, added up.

A product is blocks, and a score is the weighted sum of the blocks' scores. Weights are chosen per
kind of query on held-out queries, so the best sum is the floor that a trained model has to beat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritower.retrieval.evaluating.evaluation_queries import Questions
from tritower.retrieval.lexical.analyzer import Analyzer
from tritower.retrieval.lexical.ranking import Scoring, highest
from tritower.retrieval.lexical.records import Record
from tritower.retrieval.lexical.tuning import WordIndexes, WordSettings, choose_settings
from tritower.retrieval.ranking.hits import Hits
from tritower.retrieval.ranking.metrics import ndcg_at_k

MAX_CELLS = 40_000_000
"""Scores of a block of queries that are held at a time."""

OCTAVES = 7
"""Frequencies of the features of a number."""

BLOCK_WEIGHTS = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Weights of a block that are tried."""

WORDS = ("bm25", "tfidf")
"""The two blocks of words; a sum has one of them."""

MIN_CHOOSING = 20
"""Fewer queries choose nothing: then defaults are taken."""

MIN_GAIN = 0.001


@dataclass(frozen=True)
class Untrained:
    """What search with nothing trained reads of N products or Q queries.

    Attributes:
        records: N records, empty where there are no words.
        features: tower -> (N, F) unit vectors, zeros where an item lacks the modality. "numbers"
            are those of `number_features`.
    """

    records: Sequence[Record]
    features: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def take(self, rows: NDArray[np.int64]) -> Untrained:
        """Some of the items."""
        return Untrained(
            [self.records[row] for row in rows.tolist()],
            {name: features[rows] for name, features in self.features.items()},
        )


@dataclass(frozen=True)
class Choice:
    """How one kind of query is searched.

    Attributes:
        words: model -> settings, for both models of words; empty where the queries have no words.
        weights: block -> weight in the sum; one of `WORDS` at most.
        by: number of queries that chose; 0 for defaults.
    """

    words: Mapping[str, WordSettings]
    weights: Mapping[str, float]
    by: int = 0

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        words = {model: settings.to_json() for model, settings in self.words.items()}
        return {"queries": self.by, "words": words, "weights": dict(self.weights)}


class UntrainedSearch:
    """Searches N products by the blocks of `Untrained`.

    Args:
        products: what is searched.
        language: of the words, a key of `tritower.retrieval.lexical.analyzer.STOP_WORDS` or None.
    """

    def __init__(self, products: Untrained, language: str | None) -> None:
        self.products = products
        self.language = language
        self._indexes = WordIndexes(products.records)

    def search(
        self, queries: Untrained, source: NDArray[np.int64], choice: Choice, k: int
    ) -> dict[str, Hits]:
        """The hits of each block alone, of their plain sum, and of the chosen sum.

        Args:
            queries: Q queries.
            source: (Q,) row of the product that a query is, which is never found; -1 for none.
            choice: how.
            k: results per query.

        Returns:
            Name of a block, "sum" or "floor" -> Hits of Q queries. A block that no query has is
            left out.
        """
        size = max(1, MAX_CELLS // max(1, len(self.products)))
        found: dict[str, list[Hits]] = {}
        for first in range(0, len(queries), size):
            rows = np.arange(first, min(first + size, len(queries)))
            blocks = self.block_scores(queries.take(rows), choice)
            sums = {"sum": plain_weights(blocks, choice), "floor": choice.weights} if blocks else {}
            for name, scores in blocks.items():
                found.setdefault(name, []).append(best_of(scores, source[rows], k))
            for name, weights in sums.items():
                found.setdefault(name, []).append(
                    best_of(weighted_sum(blocks, weights), source[rows], k)
                )
        return {
            name: Hits(*(np.concatenate(part) for part in zip(*parts, strict=True)))
            for name, parts in found.items()
        }

    def search_words(
        self, queries: Untrained, source: NDArray[np.int64], settings: WordSettings, k: int
    ) -> Hits:
        """The k products with the most of the queries' words; arguments as of `search`."""
        found = self._indexes.get(settings).search(queries.records, k + 1, settings.scoring)
        return without_source(found, source, k)

    def block_scores(self, queries: Untrained, choice: Choice) -> dict[str, NDArray[np.float32]]:
        """Block -> (Q, N) float32 scores of at most 1.

        Those of BM25 are divided by the query's highest.
        """
        blocks: dict[str, NDArray[np.float32]] = {}
        for model, settings in choice.words.items():
            scores = self._indexes.get(settings).scores(queries.records, settings.scoring)
            if model == "bm25":
                scores = scores / scores.max(axis=1, keepdims=True, initial=1e-9)
            blocks[model] = scores
        for name, features in queries.features.items():
            if name in self.products.features and features.any():
                blocks[name] = (
                    features.astype(np.float32) @ self.products.features[name].astype(np.float32).T
                )
        return blocks

    def default_choice(self, queries: Untrained) -> Choice:
        """Words by BM25 and all towers, each of weight 1."""
        words: dict[str, WordSettings] = {}
        if any(any(record.values()) for record in queries.records):
            for model in WORDS:
                words[model] = WordSettings(Analyzer(self.language), scoring=Scoring(model))
        towers = []
        for name, features in queries.features.items():
            if name != "numbers" and features.any():
                towers.append(name)
        return Choice(words, dict.fromkeys([*list(words)[:1], *towers], 1.0))

    def choose(self, queries: Untrained, questions: Questions) -> Choice:
        """Choose the settings of words and the weights of blocks by nDCG@10.

        Args:
            queries: Q held-out queries of one kind.
            questions: their judgements, with rows of this search's products.
        """
        default = self.default_choice(queries)
        if len(queries) < MIN_CHOOSING:
            return default

        # Words by themselves, for both models.
        words = {}
        figures = {}
        for model, start in default.words.items():

            def ndcg_of_words(settings: WordSettings) -> float:
                return ndcg(
                    self.search_words(queries, questions.source, settings, 10).rows, questions
                )

            words[model], figures[model] = choose_settings(start, ndcg_of_words)

        # Weights of the sum, by coordinate descent from 1 each; the better model of words takes
        # part.
        blocks = self.block_scores(queries, Choice(words, {}))
        if not blocks:
            return default

        def ndcg_of_sum(weights: Mapping[str, float]) -> float:
            return ndcg(
                best_of(weighted_sum(blocks, weights), questions.source, 10).rows, questions
            )

        best: dict[str, float] = {}
        best_figure = -1.0
        models = sorted(figures, key=lambda name: -figures[name])
        for model in models or [""]:
            names = [name for name in blocks if name not in WORDS or name == model]
            weights, figure = choose_weights(names, ndcg_of_sum)
            if figure >= best_figure + MIN_GAIN:
                best = weights
                best_figure = figure
        return Choice(words, best, len(queries))


def choose_weights(
    names: Sequence[str], measure: Callable[[Mapping[str, float]], float], rounds: int = 3
) -> tuple[dict[str, float], float]:
    """Weights of blocks that maximize a figure.

    One at a time, from the best of 1 each and each block alone.
    """
    starts = [dict.fromkeys(names, 1.0)]
    starts += [{other: float(other == name) for other in names} for name in names]
    figures = [measure(start) for start in starts]
    best = starts[int(np.argmax(figures))]
    figure = max(figures)
    for _ in range(rounds):
        before = figure
        for name in names:
            for weight in BLOCK_WEIGHTS:
                candidate = best | {name: weight}
                if weight != best[name] and any(candidate.values()):
                    value = measure(candidate)
                    if value >= figure + MIN_GAIN:
                        best = candidate
                        figure = value
        if figure == before:
            break
    return best, figure


def plain_weights(blocks: Mapping[str, NDArray[np.float32]], choice: Choice) -> dict[str, float]:
    """1 for the words that the choice prefers and for each pretrained tower.

    A sum that nobody has tuned.
    """
    preferred = next((model for model in WORDS if choice.weights.get(model)), WORDS[0])
    result = {}
    for name in blocks:
        if name != "numbers" and (name not in WORDS or name == preferred):
            result[name] = 1.0
    return result


def weighted_sum(
    blocks: Mapping[str, NDArray[np.float32]], weights: Mapping[str, float]
) -> NDArray[np.float32]:
    """(Q, N) float32: the sum of the blocks' scores; blocks without a weight are left out."""
    total = np.zeros_like(next(iter(blocks.values())))
    for name, weight in weights.items():
        if weight and name in blocks:
            total += weight * blocks[name]
    return total


def best_of(scores: NDArray[np.float32], source: NDArray[np.int64], k: int) -> Hits:
    """The k products with the highest scores above 0, equal scores by row.

    Never a query's own source.

    Args:
        scores: (Q, N) float32.
        source: (Q,) row that is left out, -1 for none.
        k: results per query.
    """
    hits = Hits.empty(len(scores), k)
    scores = scores.copy()
    asks = np.flatnonzero(source >= 0)
    scores[asks, source[asks]] = 0
    for query, row in enumerate(scores):
        found = np.flatnonzero(row > 0)
        order = found[highest(row[found], found, k)]
        hits.scores[query, : len(order)] = row[order]
        hits.rows[query, : len(order)] = order
    return hits


def without_source(hits: Hits, source: NDArray[np.int64], k: int) -> Hits:
    """The first k hits that are not the product a query is."""
    return hits.keep_first((hits.rows != source[:, None]) & (hits.rows >= 0), k)


def ndcg(rows: NDArray[np.int64], questions: Questions) -> float:
    """nDCG@10 of (Q, K) rows."""
    return ndcg_at_k(rows, questions.judged, questions.grades, 10)


def number_features(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Sines and cosines of the logarithms of numbers: close numbers have close features.

    Args:
        values: (N, A); NaN, or not above 0, is missing.

    Returns:
        (N, 2 * OCTAVES * A) float32, rows of unit length, zeros for a missing number: the inner
        product of two rows is the mean over their numbers of the mean over frequencies 2^0 to 2^6
        of cos(2^i * log ratio).
    """
    there = values > 0  # False for NaN
    logs = np.log(np.where(there, values, 1.0))
    phases = logs[:, :, None] * 2.0 ** np.arange(OCTAVES)  # (N, A, 7)
    waves = np.concatenate([np.sin(phases), np.cos(phases)], axis=2) * there[:, :, None]
    flat = waves.reshape(len(values), -1)
    return (flat / np.linalg.norm(flat, axis=1, keepdims=True).clip(1e-9)).astype(np.float32)
