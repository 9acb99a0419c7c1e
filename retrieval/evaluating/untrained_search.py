"""Search without training: lexical scores, features of pretrained towers, and numbers, summed.

A product is a set of blocks, and its score is the weighted sum of the blocks' scores. The weights
are chosen per query type on held-out queries. The best sum is the floor that a trained model has to
beat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritower.retrieval.evaluating.evaluation_queries import EvaluationQueries
from tritower.retrieval.evaluating.untrained_inputs import NUMBERS, UntrainedInputs
from tritower.retrieval.lexical.analyzer import Analyzer
from tritower.retrieval.lexical.ranking import LexicalModel, Scoring, top_positions
from tritower.retrieval.lexical.tuning import LexicalIndexes, LexicalSettings, choose_settings
from tritower.retrieval.ranking.hits import Hits
from tritower.retrieval.ranking.metrics import PreparedNdcg, ndcg_at_k

MAX_CELLS = 40_000_000
"""Scores held at a time; queries are searched in blocks of this many scores."""

BLOCK_WEIGHTS = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Candidate weights of a block."""

LEXICAL_MODELS: tuple[LexicalModel, ...] = ("bm25", "tfidf")
"""The two lexical blocks; a sum contains one of them."""

MIN_CHOOSING = 20
"""With fewer queries than this nothing is chosen: defaults are used."""

MIN_GAIN = 0.001
"""A setting changes only for at least this much more nDCG@10: less is chance."""


@dataclass(frozen=True)
class UntrainedSettings:
    """How queries of one type are searched.

    Attributes:
        lexical: model -> settings, for both lexical models; empty if the queries have no words.
        weights: block -> weight in the sum; at most one of `LEXICAL_MODELS`.
        num_queries: number of queries that the settings were chosen on; 0 for defaults.
    """

    lexical: Mapping[str, LexicalSettings]
    weights: Mapping[str, float]
    num_queries: int = 0

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        words = {model: settings.to_json() for model, settings in self.lexical.items()}
        return {"queries": self.num_queries, "words": words, "weights": dict(self.weights)}


class UntrainedSearch:
    """Searches N products by the blocks of `UntrainedInputs`.

    Args:
        products: the searched products.
        language: of the words, a key of `tritower.retrieval.lexical.analyzer.STOP_WORDS` or None.
    """

    def __init__(self, products: UntrainedInputs, language: str | None) -> None:
        self.products = products
        self.language = language
        self._indexes = LexicalIndexes(products.records)

    def search(
        self,
        queries: UntrainedInputs,
        source: NDArray[np.int64],
        settings: UntrainedSettings,
        k: int,
    ) -> dict[str, Hits]:
        """The hits of each block alone, of their plain sum, and of the weighted sum.

        Args:
            queries: Q queries.
            source: (Q,) row of the product that is the query, which is never found; -1 for none.
            settings: how to search.
            k: results per query.

        Returns:
            Name of a block, "sum" or "floor" -> Hits of Q queries. Blocks that no query has are
            left out.
        """
        # Every block scores every product: queries are searched in parts that fit into memory.
        block_size = max(1, MAX_CELLS // max(1, len(self.products)))
        parts: dict[str, list[Hits]] = {}
        for first in range(0, len(queries), block_size):
            rows = np.arange(first, min(first + block_size, len(queries)))
            blocks = self.block_scores(queries.select(rows), settings)
            scores = dict(blocks)
            if blocks:
                scores["sum"] = weighted_sum(blocks, plain_weights(blocks, settings))
                scores["floor"] = weighted_sum(blocks, settings.weights)
            for name, own_scores in scores.items():
                parts.setdefault(name, []).append(top_hits(own_scores, source[rows], k))
        return {name: Hits.concatenate(hits) for name, hits in parts.items()}

    def search_lexical(
        self,
        queries: UntrainedInputs,
        source: NDArray[np.int64],
        settings: LexicalSettings,
        k: int,
    ) -> Hits:
        """The k products with the highest lexical scores, (Q, k); arguments as of `search`."""
        hits = self._indexes.get(settings).search(queries.records, k + 1, settings.scoring)
        return without_source(hits, source, k)

    def block_scores(
        self, queries: UntrainedInputs, settings: UntrainedSettings
    ) -> dict[str, NDArray[np.float32]]:
        """Block -> (Q, N) float32 scores of at most 1.

        BM25 scores are divided by the highest one of the query.
        """
        blocks: dict[str, NDArray[np.float32]] = {}
        for model, lexical in settings.lexical.items():
            scores = self._indexes.get(lexical).scores(queries.records, lexical.scoring)
            if model == "bm25":
                scores = scores / scores.max(axis=1, keepdims=True, initial=1e-9)
            blocks[model] = scores
        for name, features in queries.features.items():
            if name in self.products.features and features.any():
                own = self.products.features[name].astype(np.float32)  # (N, F)
                blocks[name] = features.astype(np.float32) @ own.T  # (Q, N)
        return blocks

    def default_settings(self, queries: UntrainedInputs) -> UntrainedSettings:
        """BM25 and all towers, each with weight 1."""
        lexical: dict[str, LexicalSettings] = {}
        if any(any(record.values()) for record in queries.records):
            for model in LEXICAL_MODELS:
                analyzer = Analyzer(self.language)
                lexical[model] = LexicalSettings(analyzer, scoring=Scoring(model))
        blocks = list(lexical)[:1]
        for name, features in queries.features.items():
            if name != NUMBERS and features.any():
                blocks.append(name)
        return UntrainedSettings(lexical, dict.fromkeys(blocks, 1.0))

    def choose(self, queries: UntrainedInputs, judgements: EvaluationQueries) -> UntrainedSettings:
        """Choose lexical settings and block weights by nDCG@10.

        Args:
            queries: Q held-out queries of one type.
            judgements: the same queries with their judgements, as rows of this search's products.
        """
        default = self.default_settings(queries)
        if len(queries) < MIN_CHOOSING:
            return default

        ndcg_of = PreparedNdcg(judgements.judged, judgements.grades, len(self.products))

        # Lexical settings first, for each model alone.
        lexical = {}
        figures = {}
        for model, start in default.lexical.items():

            def ndcg_of_lexical(settings: LexicalSettings) -> float:
                hits = self.search_lexical(queries, judgements.source, settings, 10)
                return ndcg_of.mean(hits.rows)

            lexical[model], figures[model] = choose_settings(start, ndcg_of_lexical)

        # Then the weights of the sum, with each lexical model in turn; the better one stays.
        blocks = self.block_scores(queries, UntrainedSettings(lexical, {}))
        if not blocks:
            return default

        def ndcg_of_sum(weights: Mapping[str, float]) -> float:
            hits = top_hits(weighted_sum(blocks, weights), judgements.source, 10)
            return ndcg_of.mean(hits.rows)

        best_weights: dict[str, float] = {}
        best_figure = -1.0
        models = sorted(figures, key=lambda model: -figures[model])
        for model in models or [""]:
            names = [name for name in blocks if name not in LEXICAL_MODELS or name == model]
            weights, figure = choose_weights(names, ndcg_of_sum)
            if figure >= best_figure + MIN_GAIN:
                best_weights = weights
                best_figure = figure
        return UntrainedSettings(lexical, best_weights, len(queries))


def choose_weights(
    names: Sequence[str], measure: Callable[[Mapping[str, float]], float], rounds: int = 3
) -> tuple[dict[str, float], float]:
    """Block weights that maximize a figure, by coordinate descent.

    Args:
        names: of the blocks.
        measure: weights -> figure.
        rounds: passes over all blocks at most.

    Returns:
        Block -> weight, and the figure.
    """
    # Start from the best of: all blocks with weight 1, or one block alone.
    starts = [dict.fromkeys(names, 1.0)]
    for name in names:
        starts.append({other: float(other == name) for other in names})
    figures = [measure(start) for start in starts]
    best = starts[int(np.argmax(figures))]
    figure = max(figures)

    # Change one weight at a time until a whole pass gains nothing.
    for _ in range(rounds):
        before = figure
        for name in names:
            for weight in BLOCK_WEIGHTS:
                candidate = best | {name: weight}
                if weight == best[name] or not any(candidate.values()):
                    continue
                value = measure(candidate)
                if value >= figure + MIN_GAIN:
                    best = candidate
                    figure = value
        if figure == before:
            break
    return best, figure


def plain_weights(
    blocks: Mapping[str, NDArray[np.float32]], settings: UntrainedSettings
) -> dict[str, float]:
    """Weight 1 for each pretrained tower and for the lexical model that the settings prefer.

    This is the sum before any tuning of weights. Blocks are (Q, N) float32 scores.
    """
    preferred = preferred_model(settings)
    weights = {}
    for name in blocks:
        is_other_lexical = name in LEXICAL_MODELS and name != preferred
        if name != NUMBERS and not is_other_lexical:
            weights[name] = 1.0
    return weights


def preferred_model(settings: UntrainedSettings) -> str:
    """The lexical model that has a weight in the chosen sum; BM25 if none has."""
    for model in LEXICAL_MODELS:
        if settings.weights.get(model):
            return model
    return LEXICAL_MODELS[0]


def weighted_sum(
    blocks: Mapping[str, NDArray[np.float32]], weights: Mapping[str, float]
) -> NDArray[np.float32]:
    """(Q, N) float32 weighted sum of the blocks' scores; blocks without a weight are left out."""
    total = np.zeros_like(next(iter(blocks.values())))
    for name, weight in weights.items():
        if weight and name in blocks:
            total += weight * blocks[name]
    return total


def top_hits(scores: NDArray[np.float32], source: NDArray[np.int64], k: int) -> Hits:
    """The k products with the highest scores above 0; equal scores in order of rows.

    Args:
        scores: (Q, N) float32.
        source: (Q,) row that is left out, -1 for none.
        k: results per query.
    """
    scores = scores.copy()
    is_product = np.flatnonzero(source >= 0)
    scores[is_product, source[is_product]] = 0  # a product is never its own hit
    hits = Hits.empty(len(scores), k)
    for query, own_scores in enumerate(scores):
        rows = np.flatnonzero(own_scores > 0)
        best = rows[top_positions(own_scores[rows], rows, k)]
        hits.scores[query, : len(best)] = own_scores[best]
        hits.rows[query, : len(best)] = best
    return hits


def without_source(hits: Hits, source: NDArray[np.int64], k: int) -> Hits:
    """The first k hits, (Q, k), of each query that are not its own source product, (Q,) int64."""
    is_other = (hits.rows != source[:, None]) & (hits.rows >= 0)
    return hits.keep_first(is_other, k)


def mean_ndcg(rows: NDArray[np.int64], queries: EvaluationQueries) -> float:
    """Mean nDCG@10 of (Q, K) rows."""
    return ndcg_at_k(rows, queries.judged, queries.grades, 10)
