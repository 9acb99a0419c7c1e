"""A trained model compared with the best untrained search, for each query type."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritower.retrieval.evaluating.evaluation_queries import EvaluationQueries
from tritower.retrieval.evaluating.metric_report import DEPTH, paired_differences, ranking_metrics
from tritower.retrieval.evaluating.untrained_inputs import UntrainedInputs
from tritower.retrieval.evaluating.untrained_search import (
    MIN_CHOOSING,
    UntrainedSearch,
    UntrainedSettings,
    mean_ndcg,
    preferred_model,
)
from tritower.retrieval.lexical.tuning import language_of
from tritower.retrieval.ranking.hits import Hits
from tritower.retrieval.ranking.metrics import NO_ROW
from tritower.retrieval.ranking.rank_fusion import reciprocal_rank_fusion

logger = logging.getLogger(__name__)

HYBRID_WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0, 16.0, 64.0)
"""Candidate weights of lexical ranks; those of the model weigh 1."""

MAX_CHOOSING = 200
"""Queries of each type that settings are chosen on; more hardly change the choice."""

MAX_CHOOSING_PRODUCTS = 5_000
"""Products searched while settings are chosen: the judged ones, and others up to this number."""

HYBRID = "hybrid"


@dataclass(frozen=True)
class ComparedQueries:
    """Q queries, as the model and as untrained search see them.

    Attributes:
        queries: with their judgements.
        inputs: what untrained search reads of them, in the same order.
        trained: (Q, DEPTH) rows that the model finds, best first, -1 padded.
    """

    queries: EvaluationQueries
    inputs: UntrainedInputs
    trained: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.inputs)

    def select(self, positions: NDArray[np.int64]) -> ComparedQueries:
        """The queries at (P,) positions."""
        return ComparedQueries(
            self.queries.select(positions), self.inputs.select(positions), self.trained[positions]
        )

    def of_type(self, query_type: str) -> ComparedQueries:
        """The queries of one type."""
        return self.select(self.queries.positions_of_type(query_type))


@dataclass(frozen=True)
class UntrainedRankings:
    """Rankings of untrained search, and of its lexical part fused with the model.

    Attributes:
        rows: query type -> name ("bm25", "tfidf", a tower, "sum", "floor", "hybrid") -> (Q', DEPTH)
            rows of products.
        settings: query type -> chosen settings as plain JSON; one entry for each part of the
            queries that settings were chosen for.
    """

    rows: Mapping[str, Mapping[str, NDArray[np.int64]]]
    settings: Mapping[str, Sequence[Mapping[str, Any]]]


def search_untrained(
    products: UntrainedInputs,
    measured: ComparedQueries,
    choosing: ComparedQueries | None,
    seed: int = 0,
) -> UntrainedRankings:
    """Rank without training, and fuse lexical search with the model, for each query type.

    Settings and weights are chosen on other queries than those that are measured: on `choosing`,
    or, if there is no other split, on each half of the queries for the other half. With fewer than
    `MIN_CHOOSING` queries to choose on, defaults are used.

    Args:
        products: N searched products, in the order of their rows.
        measured: the queries to rank for.
        choosing: queries of another split, such as val.
        seed: draws the products and queries that settings are chosen on.
    """
    language = language_of(products.records)
    search = UntrainedSearch(products, language)
    chooser = _Chooser(search, products, measured if choosing is None else choosing, seed)
    rows: dict[str, dict[str, NDArray[np.int64]]] = {}
    settings: dict[str, list[Mapping[str, Any]]] = {}
    for query_type in measured.queries.distinct_types:
        queries = measured.of_type(query_type)
        if choosing is None:
            other = None
        else:
            other = choosing.of_type(query_type)
        rows[query_type] = {}
        settings[query_type] = []
        # Choose on one part of the queries, rank for the other.
        for positions, choosing_queries in _parts(queries, other):
            chosen = chooser.choose(choosing_queries)
            hybrid_weight = chooser.hybrid_weight(choosing_queries, chosen)
            part = _ranked(search, queries.select(positions), chosen, hybrid_weight)
            for name, part_rows in part.items():
                padding = np.full((len(queries), DEPTH), NO_ROW)
                rows[query_type].setdefault(name, padding)[positions] = part_rows
            settings[query_type].append({**chosen.to_json(), "hybrid_weight": hybrid_weight})
        counts = " and ".join(str(chosen["queries"]) for chosen in settings[query_type])
        logger.info("%s queries: untrained search tuned on %s other queries", query_type, counts)
    return UntrainedRankings(rows, settings)


def untrained_report(
    queries: EvaluationQueries,
    untrained: UntrainedRankings,
    trained: Mapping[str, NDArray[np.int64]],
) -> dict[str, Any]:
    """Figures of untrained search, and how far a model is above it.

    Args:
        queries: Q queries.
        untrained: what was found without training.
        trained: name -> (Q, DEPTH) rows that the model found.

    Returns:
        baselines: name -> query type -> metrics; differences: query type -> result of
        `paired_differences`; chosen: query type -> settings.
    """
    baselines: dict[str, Any] = {}
    gains: dict[str, Any] = {}
    for query_type, rankings in untrained.rows.items():
        positions = queries.positions_of_type(query_type)
        of_type = queries.select(positions)
        for name, rows in rankings.items():
            baselines.setdefault(name, {})[query_type] = ranking_metrics(rows, of_type)

        # The hybrid contains the model, so it is on the trained side of the comparison.
        without_training = dict(rankings)
        with_training = {name: rows[positions] for name, rows in trained.items()}
        if HYBRID in without_training:
            with_training[HYBRID] = without_training.pop(HYBRID)
        gains[query_type] = paired_differences(of_type, without_training, with_training)
    return {"baselines": baselines, "differences": gains, "chosen": untrained.settings}


class _Chooser:
    """Chooses the settings of untrained search on a sample of queries and products.

    Args:
        search: over all products.
        products: all N products.
        choosing: the queries that may be used for choosing.
        seed: draws the sample.
    """

    def __init__(
        self,
        search: UntrainedSearch,
        products: UntrainedInputs,
        choosing: ComparedQueries,
        seed: int,
    ) -> None:
        self._search = search
        self._seed = seed
        drawn = _draw_queries(choosing, seed)
        self._rows = _draw_products(drawn.queries, len(products), seed)  # (S,)
        self._sample = UntrainedSearch(products.select(self._rows), search.language)

    def choose(self, choosing: ComparedQueries) -> UntrainedSettings:
        """The settings with the highest nDCG@10 on the sample."""
        if len(choosing) < MIN_CHOOSING:
            return self._sample.default_settings(choosing.inputs)
        drawn = _draw_queries(choosing, self._seed)
        return self._sample.choose(drawn.inputs, drawn.queries.restricted_to(self._rows))

    def hybrid_weight(self, choosing: ComparedQueries, settings: UntrainedSettings) -> float:
        """The weight of lexical ranks with the highest nDCG@10; 1 if there is no way to choose."""
        if len(choosing) < MIN_CHOOSING or not settings.lexical:
            return 1.0
        drawn = _draw_queries(choosing, seed=0)
        lexical = self._search.search_lexical(
            drawn.inputs, drawn.queries.source, settings.lexical[preferred_model(settings)], DEPTH
        )
        figures = []
        for weight in HYBRID_WEIGHTS:
            fused = _fuse_with_lexical(lexical, drawn.trained, weight)
            figures.append(mean_ndcg(fused, drawn.queries))
        return HYBRID_WEIGHTS[int(np.argmax(figures))]


def _parts(
    queries: ComparedQueries, choosing: ComparedQueries | None
) -> list[tuple[NDArray[np.int64], ComparedQueries]]:
    """Positions of queries, each part with the queries that its settings are chosen on."""
    if choosing is not None:
        return [(np.arange(len(queries)), choosing)]
    even = np.arange(0, len(queries), 2)
    odd = np.arange(1, len(queries), 2)
    return [(even, queries.select(odd)), (odd, queries.select(even))]


def _draw_queries(queries: ComparedQueries, seed: int) -> ComparedQueries:
    """At most `MAX_CHOOSING` queries of each type."""
    generator = np.random.default_rng(seed)
    drawn = []
    for query_type in queries.queries.distinct_types:
        positions = queries.queries.positions_of_type(query_type)
        drawn.append(generator.permutation(positions)[:MAX_CHOOSING])
    return queries.select(np.sort(np.concatenate(drawn)))


def _draw_products(queries: EvaluationQueries, count: int, seed: int) -> NDArray[np.int64]:
    """(S,) ascending rows: all judged and source products, and others drawn at random."""
    needed = np.unique(np.concatenate([queries.judged.ravel(), queries.source]))
    needed = needed[(needed >= 0) & (needed < count)]
    unneeded = np.setdiff1d(np.arange(count), needed)
    room = max(0, MAX_CHOOSING_PRODUCTS - len(needed))
    drawn = np.random.default_rng(seed).permutation(unneeded)[:room]
    return np.sort(np.concatenate([needed, drawn]))


def _ranked(
    search: UntrainedSearch,
    queries: ComparedQueries,
    settings: UntrainedSettings,
    hybrid_weight: float,
) -> dict[str, NDArray[np.int64]]:
    """Name of a ranking -> (Q, DEPTH) rows of products."""
    hits = search.search(queries.inputs, queries.queries.source, settings, DEPTH)
    rows = {name: own.rows for name, own in hits.items()}
    if settings.lexical and len(queries):
        lexical = hits[preferred_model(settings)]
        rows[HYBRID] = _fuse_with_lexical(lexical, queries.trained, hybrid_weight)
    return rows


def _fuse_with_lexical(
    lexical: Hits, trained: NDArray[np.int64], weight: float
) -> NDArray[np.int64]:
    """(Q, DEPTH) rows: lexical ranks with a weight, ranks of the model with weight 1."""
    return reciprocal_rank_fusion([lexical, Hits.from_order(trained)], [weight, 1.0])
