"""Metrics of rankings as plain JSON: means over queries, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritower.retrieval.evaluating.evaluation_queries import EvaluationQueries
from tritower.retrieval.ranking import metrics

DEPTH = 100
"""Results measured per query."""

CUTS = (1, 10, 100)
"""The k of hit@k and recall@k."""

SHOWN_METRICS = ("hit@1", "hit@10", "ndcg@10")
"""Metrics whose paired differences are reported."""


def ranking_metrics(rows: NDArray[np.int64], queries: EvaluationQueries) -> dict[str, Any]:
    """All metrics of a ranking, each with its 95 % interval.

    Args:
        rows: (Q, DEPTH) rows of products, best first, -1 padded.
        queries: the Q queries that were ranked for.

    Returns:
        Metric -> {"value", "low", "high"}; "best_recall@k" is what a perfect ranking would reach.
    """
    result = means_with_intervals(metrics_per_query(rows, queries))
    for k in CUTS:
        best = metrics.best_recall_at_k(queries.relevant, k)
        result[f"best_recall@{k}"] = {"value": best}
    return result


def metrics_per_query(
    rows: NDArray[np.int64], queries: EvaluationQueries
) -> dict[str, NDArray[np.float64]]:
    """Metric -> (Q,) values of a (Q, DEPTH) ranking."""
    relevant = queries.relevant
    values = {}
    for k in CUTS:
        values[f"hit@{k}"] = metrics.hit_at_k_per_query(rows, relevant, k)
    for k in CUTS:
        values[f"recall@{k}"] = metrics.recall_at_k_per_query(rows, relevant, k)
    values["mrr"] = metrics.mrr_per_query(rows, relevant)
    values["ndcg@10"] = metrics.ndcg_at_k_per_query(rows, queries.judged, queries.grades, 10)
    values["map"] = metrics.average_precision_per_query(rows, relevant)
    return values


def ann_vs_exact_metrics(rows: NDArray[np.int64], exact: NDArray[np.int64]) -> dict[str, Any]:
    """The same metrics, with the first k results of exact search as the relevant products.

    MRR, nDCG@10 and mAP count its first 10, all of grade 1.

    Args:
        rows: (Q, DEPTH) rows found through the index.
        exact: (Q, DEPTH) rows found by exact search.
    """
    values = {}
    for k in CUTS:
        values[f"hit@{k}"] = metrics.hit_at_k_per_query(rows, exact[:, :k], k)
    for k in CUTS:
        values[f"recall@{k}"] = metrics.recall_at_k_per_query(rows, exact[:, :k], k)
    first_ten = exact[:, :10]
    values["mrr"] = metrics.mrr_per_query(rows, first_ten)
    values["ndcg@10"] = metrics.ndcg_at_k_per_query(rows, first_ten, np.ones(first_ten.shape), 10)
    values["map"] = metrics.average_precision_per_query(rows, first_ten)
    return means_with_intervals(values)


def means_with_intervals(values: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
    """Metric -> mean of its (Q,) values, with both ends of its 95 % bootstrap interval."""
    low, high = metrics.bootstrap_interval(np.stack(list(values.values()), axis=1))
    result = {}
    for i, (name, column) in enumerate(values.items()):
        result[name] = {"value": float(column.mean()), "low": float(low[i]), "high": float(high[i])}
    return result


def paired_differences(
    queries: EvaluationQueries,
    untrained: Mapping[str, NDArray[np.int64]],
    trained: Mapping[str, NDArray[np.int64]],
) -> dict[str, Any]:
    """How far rankings of a model are above the best untrained ranking, on the same queries.

    Args:
        queries: Q queries of one type.
        untrained: name -> (Q, DEPTH) rows; the one with the highest nDCG@10 is the best.
        trained: name -> (Q, DEPTH) rows.

    Returns:
        "best": name of the best untrained ranking; then name of a trained ranking -> metric -> mean
        difference with its paired 95 % bootstrap interval. Empty if there is no untrained ranking.
    """
    if not untrained:
        return {}
    # The untrained ranking to beat is the one with the highest nDCG@10.
    best = ""
    best_values: dict[str, NDArray[np.float64]] = {}
    for name, rows in untrained.items():
        values = metrics_per_query(rows, queries)
        if not best or values["ndcg@10"].mean() > best_values["ndcg@10"].mean():
            best = name
            best_values = values

    # Differences are taken query by query, so their intervals are those of paired samples.
    result: dict[str, Any] = {"best": best}
    for name, rows in trained.items():
        values = metrics_per_query(rows, queries)
        gains = {metric: values[metric] - best_values[metric] for metric in SHOWN_METRICS}
        result[name] = means_with_intervals(gains)
    return result
