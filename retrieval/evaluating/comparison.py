"""A trained model beside the best search without training, with paired intervals."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritower.retrieval.evaluating.evaluation_queries import Questions
from tritower.retrieval.evaluating.untrained import (
    MIN_CHOOSING,
    WORDS,
    Choice,
    Untrained,
    UntrainedSearch,
    ndcg,
)
from tritower.retrieval.lexical.tuning import language_of
from tritower.retrieval.ranking import metrics
from tritower.retrieval.ranking.hits import Hits
from tritower.retrieval.ranking.rank_fusion import reciprocal_rank_fusion

logger = logging.getLogger(__name__)

DEPTH = 100
"""Results measured per query."""

CUTS = (1, 10, 100)

HYBRID_WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0, 16.0, 64.0)
"""Weights of the words' ranks beside 1 of the model's that are tried."""

MAX_CHOOSING = 200
"""Queries of a kind that choose settings; more hardly change the choice."""

MAX_CHOOSING_PRODUCTS = 5_000
"""Products searched while settings are chosen:

those that are judged, and others up to this number.
"""

COMPARED = ("hit@1", "hit@10", "ndcg@10")
"""Metrics whose differences are shown."""

HYBRID = "hybrid"


@dataclass(frozen=True)
class Asked:
    """Q queries with what is known of them.

    Attributes:
        questions: their judgements.
        queries: what search without training reads of them, in the same order.
        trained: (Q, DEPTH) rows that the model finds for them, best first, -1 padded.
    """

    questions: Questions
    queries: Untrained
    trained: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.queries)

    def take(self, positions: NDArray[np.int64]) -> Asked:
        """Some of the queries."""
        return Asked(
            self.questions.take(positions), self.queries.take(positions), self.trained[positions]
        )


@dataclass(frozen=True)
class Compared:
    """What is found with nothing trained, and together with the model.

    Attributes:
        found: kind -> name of a row ("bm25", "tfidf", a tower, "sum", "floor", "hybrid") -> (Q',
            DEPTH) rows.
        choices: kind -> what was chosen, as plain JSON; of two halves, a list of two.
    """

    found: Mapping[str, Mapping[str, NDArray[np.int64]]]
    choices: Mapping[str, Sequence[Mapping[str, Any]]]


def search_untrained(
    products: Untrained, asked: Asked, choosing: Asked | None, seed: int = 0
) -> Compared:
    """Search with nothing trained, and fuse its words with the model, per kind of query.

    Settings and weights are chosen on other queries than those that are measured: on `choosing`,
      or, where there is no
    other split, on each half of the queries for the other half. Too few queries choose nothing:
    defaults are taken.

    Args:
        products: what is searched, by row.
        asked: the queries that are measured.
        choosing: the queries of another split, such as val.
        seed: of the products and queries that are drawn for choosing.
    """
    language = language_of(products.records)
    search = UntrainedSearch(products, language)
    drawn = _drawn(asked if choosing is None else choosing, seed)
    rows = _choosing_products(drawn.questions, len(products), seed)
    sample = UntrainedSearch(products.take(rows), language)
    found: dict[str, dict[str, NDArray[np.int64]]] = {}
    choices: dict[str, list[Mapping[str, Any]]] = {}
    for kind in asked.questions.all_kinds:
        of_kind = asked.take(asked.questions.of_kind(kind))
        parts: list[tuple[NDArray[np.int64], Asked]]
        if choosing is not None:
            parts = [(np.arange(len(of_kind)), choosing.take(choosing.questions.of_kind(kind)))]
        else:
            even = np.arange(0, len(of_kind), 2)
            odd = np.arange(1, len(of_kind), 2)
            parts = [(even, of_kind.take(odd)), (odd, of_kind.take(even))]
        found[kind] = {}
        choices[kind] = []
        for positions, choosers in parts:
            choice = _choose(sample, rows, choosers, seed)
            hybrid_weight = _hybrid_weight(search, choosers, choice)
            ranked = _ranked(search, of_kind.take(positions), choice, hybrid_weight)
            for name, part in ranked.items():
                every = found[kind].setdefault(name, np.full((len(of_kind), DEPTH), metrics.NONE))
                every[positions] = part
            choices[kind].append({**choice.to_json(), "hybrid_weight": hybrid_weight})
        logger.info(
            "%s queries: search without training tuned on %s other queries",
            kind,
            " and ".join(str(c["queries"]) for c in choices[kind]),
        )
    return Compared(found, choices)


def _drawn(asked: Asked, seed: int) -> Asked:
    """At most `MAX_CHOOSING` queries of each kind."""
    generator = np.random.default_rng(seed)
    kinds = [asked.questions.of_kind(kind) for kind in asked.questions.all_kinds]
    return asked.take(
        np.sort(np.concatenate([generator.permutation(of)[:MAX_CHOOSING] for of in kinds]))
    )


def _choosing_products(questions: Questions, count: int, seed: int) -> NDArray[np.int64]:
    """Ascending rows: all products that are judged or asked, and others drawn at random."""
    needed = np.unique(np.concatenate([questions.judged.ravel(), questions.source]))
    needed = needed[(needed >= 0) & (needed < count)]
    others = np.random.default_rng(seed).permutation(np.setdiff1d(np.arange(count), needed))
    return np.sort(np.concatenate([needed, others[: max(0, MAX_CHOOSING_PRODUCTS - len(needed))]]))


def _choose(sample: UntrainedSearch, rows: NDArray[np.int64], choosers: Asked, seed: int) -> Choice:
    """Choose on a sample of the products."""
    if len(choosers) < MIN_CHOOSING:
        return sample.default_choice(choosers.queries)
    drawn = _drawn(choosers, seed)
    return sample.choose(drawn.queries, drawn.questions.among(rows))


def _hybrid_weight(search: UntrainedSearch, choosers: Asked, choice: Choice) -> float:
    """The weight of the words' ranks with the highest nDCG@10; 1 where nothing can be chosen."""
    if len(choosers) < MIN_CHOOSING or not choice.words:
        return 1.0
    choosers = _drawn(choosers, 0)
    words = _words(search, choosers, choice)
    figures = []
    for weight in HYBRID_WEIGHTS:
        figures.append(ndcg(_fuse(words, choosers.trained, weight), choosers.questions))
    return HYBRID_WEIGHTS[int(np.argmax(figures))]


def _ranked(
    search: UntrainedSearch, asked: Asked, choice: Choice, hybrid_weight: float
) -> dict[str, NDArray[np.int64]]:
    """Name of a row -> (Q, DEPTH) rows of products."""
    hits = search.search(asked.queries, asked.questions.source, choice, DEPTH)
    found = {name: of_name.rows for name, of_name in hits.items()}
    if choice.words and len(asked):
        words = hits[preferred_words(choice)]
        found[HYBRID] = _fuse(words, asked.trained, hybrid_weight)
    return found


def preferred_words(choice: Choice) -> str:
    """The model of words that takes part in the chosen sum."""
    return next((model for model in WORDS if choice.weights.get(model)), WORDS[0])


def _words(search: UntrainedSearch, asked: Asked, choice: Choice) -> Hits:
    return search.search_words(
        asked.queries, asked.questions.source, choice.words[preferred_words(choice)], DEPTH
    )


def _fuse(words: Hits, trained: NDArray[np.int64], weight: float) -> NDArray[np.int64]:
    return reciprocal_rank_fusion([words, Hits.from_order(trained)], [weight, 1.0])


# ---------------------------------------------------------------------- figures


def measure(
    rows: NDArray[np.int64],
    relevant: NDArray[np.int64],
    judged: NDArray[np.int64],
    grades: NDArray[np.float64],
) -> dict[str, Any]:
    """All metrics of a ranking, each with its 95 % interval.

    Args:
        rows: (Q, DEPTH) rows, best first, -1 padded.
        relevant: (Q, R) relevant rows, -1 padded.
        judged: (Q, J) judged rows, -1 padded.
        grades: (Q, J) their grades.
    """
    best = {f"best_recall@{k}": {"value": metrics.best_recall_at_k(relevant, k)} for k in CUTS}
    return with_intervals(per_query(rows, relevant, judged, grades)) | best


def per_query(
    rows: NDArray[np.int64],
    relevant: NDArray[np.int64],
    judged: NDArray[np.int64],
    grades: NDArray[np.float64],
) -> dict[str, NDArray[np.float64]]:
    """Metric -> (Q,) values; arguments as of `measure`."""
    values = {f"hit@{k}": metrics.hit_at_k_per_query(rows, relevant, k) for k in CUTS}
    values |= {f"recall@{k}": metrics.recall_at_k_per_query(rows, relevant, k) for k in CUTS}
    values["mrr"] = metrics.mrr_per_query(rows, relevant)
    values["ndcg@10"] = metrics.ndcg_at_k_per_query(rows, judged, grades, 10)
    values["map"] = metrics.average_precision_per_query(rows, relevant)
    return values


def with_intervals(values: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
    """Metric -> mean over the queries, with the ends of its 95 % bootstrap interval."""
    low, high = metrics.bootstrap_interval(np.stack(list(values.values()), axis=1))
    result = {}
    for i, (name, column) in enumerate(values.items()):
        result[name] = {"value": float(column.mean()), "low": float(low[i]), "high": float(high[i])}
    return result


def differences(
    questions: Questions,
    untrained: Mapping[str, NDArray[np.int64]],
    trained: Mapping[str, NDArray[np.int64]],
) -> dict[str, Any]:
    """How far rankings of a model are above the best ranking without training, on the same queries.

    Args:
        questions: Q queries of one kind.
        untrained: name -> (Q, DEPTH) rows; the best one has the highest nDCG@10.
        trained: name -> (Q, DEPTH) rows.

    Returns:
        "best": its name; then name -> metric -> mean difference with its paired 95 % bootstrap
        interval. Empty where there is nothing untrained.
    """
    if not untrained:
        return {}
    judged = (questions.relevant, questions.judged, questions.grades)
    values = {name: per_query(rows, *judged) for name, rows in untrained.items()}
    best = max(values, key=lambda name: values[name]["ndcg@10"].mean())
    result: dict[str, Any] = {"best": best}
    for name, rows in trained.items():
        own = per_query(rows, *judged)
        result[name] = with_intervals(
            {metric: own[metric] - values[best][metric] for metric in COMPARED}
        )
    return result


def untrained_report(
    questions: Questions, compared: Compared, trained: Mapping[str, NDArray[np.int64]]
) -> dict[str, Any]:
    """What a report says of search without training, and how far a model is above it.

    Args:
        questions: what was asked.
        compared: what was found without training.
        trained: name -> (Q, DEPTH) rows that the model found.

    Returns:
        baselines: name -> kind -> metrics; differences: kind -> as of `differences`; chosen: kind
            -> settings.
    """
    baselines: dict[str, Any] = {}
    gains: dict[str, Any] = {}
    for kind, rows_of_name in compared.found.items():
        positions = questions.of_kind(kind)
        of_kind = questions.take(positions)
        for name, rows in rows_of_name.items():
            figures = measure(rows, of_kind.relevant, of_kind.judged, of_kind.grades)
            baselines.setdefault(name, {})[kind] = figures
        without = {name: rows for name, rows in rows_of_name.items() if name != HYBRID}
        own = {name: rows[positions] for name, rows in trained.items()}
        own |= {HYBRID: rows_of_name[HYBRID]} if HYBRID in rows_of_name else {}
        gains[kind] = differences(of_kind, without, own)
    return {"baselines": baselines, "differences": gains, "chosen": compared.choices}
