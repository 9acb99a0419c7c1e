"""Measure an index on queries with relevance judgements.

Three tasks that are never mixed, beside untrained search, with intervals:

    exact         relevant products found by comparing with every vector: how good the embeddings
                  are
    ann           relevant products found through the index: what users get
    ann_vs_exact  the index against exact search: what the index costs

The result is one JSON object; docs/indexes.md names its keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tritower.retrieval.evaluating.evaluation_queries import EvaluationQueries
from tritower.retrieval.evaluating.judgements import make_evaluation_queries
from tritower.retrieval.evaluating.latency import measure_latency
from tritower.retrieval.evaluating.metric_report import (
    DEPTH,
    ann_vs_exact_metrics,
    ranking_metrics,
)
from tritower.retrieval.evaluating.search_tasks import (
    EvaluationOptions,
    search_as_served,
    search_tasks,
    settings_for,
)
from tritower.retrieval.evaluating.untrained_comparison import (
    ComparedQueries,
    UntrainedRankings,
    search_untrained,
    untrained_report,
)
from tritower.retrieval.evaluating.untrained_readers import (
    TowerReaders,
    read_product_inputs,
    read_query_inputs,
)
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.products.catalogue import PreparedCatalogue, read_qrels
from tritower.retrieval.ranking.hits import Hits
from tritower.retrieval.vectors.embeddings import EmbeddingReader

REPORT_VERSION = 3
"""Version of the report's layout. 3: query types and judgements under their present names."""


@dataclass(frozen=True)
class Evaluation:
    """The report, and what it was made from.

    Attributes:
        report: plain JSON.
        queries: Q queries.
        rows: task ("exact" or "ann") -> (Q, DEPTH) rows of the index, -1 padded.
        untrained: query type -> name of a ranking -> (Q', DEPTH) rows that untrained search found.
    """

    report: dict[str, Any]
    queries: EvaluationQueries
    rows: Mapping[str, NDArray[np.int64]]
    untrained: Mapping[str, Mapping[str, NDArray[np.int64]]]


def evaluate(
    index: ProductIndex,
    products: EmbeddingReader,
    queries: EmbeddingReader,
    *,
    catalogue: PreparedCatalogue | None = None,
    qrels: Path | None = None,
    untrained: Mapping[str, TowerReaders] | None = None,
    options: EvaluationOptions | None = None,
) -> Evaluation:
    """Measure an index on queries with relevance judgements.

    Args:
        index: the index that users search.
        products: the embeddings that it was built from.
        queries: embedded queries.
        catalogue: has the splits, source products and texts of queries; and the judgements, unless
            `qrels` is given.
        qrels: file of judgements (query_id, product_id, relevance), for vectors of any origin.
        untrained: name of a tower -> features of products and queries before training.
        options: which queries are measured, and how they are searched.

    Raises:
        ValueError: no judgements, no queries left, or settings that do not suit the index.
        ArtefactError: embeddings of another model, or of other products than those of the index.
    """
    options = options or EvaluationOptions()
    index.check_model(queries.meta.get("model"), str(queries.source))
    index.check_model(products.meta.get("model"), str(products.source))
    # Queries with their judgements, as rows of the index.
    judgements = _read_judgements(catalogue, qrels)
    if catalogue is None:
        table = None
        split = None
    else:
        table = catalogue.queries()
        split = options.split
    evaluation_queries = make_evaluation_queries(
        queries, judgements, index, queries=table, split=split, threshold=options.threshold
    )

    # What the model finds, exactly and through the index, and what untrained search finds.
    result = search_tasks(index, products, evaluation_queries, options)
    rankings = UntrainedRankings({}, {})
    if catalogue is not None and options.untrained:
        choosing = _choosing_queries(queries, judgements, index, table, evaluation_queries, options)
        rankings = _search_untrained(
            index, catalogue, untrained or {}, evaluation_queries, choosing, result.ann, options
        )

    # All figures as plain JSON.
    rows = {"exact": result.exact, "ann": result.ann}
    report = {
        "version": REPORT_VERSION,
        "index": _describe_index(index),
        "settings": _describe_settings(index, evaluation_queries, split, options),
        "queries": _count_queries(evaluation_queries),
        "dropped_queries": evaluation_queries.dropped_queries,
        "identical_to_source": result.num_with_duplicates,
        "judged_products_not_in_index": evaluation_queries.unknown,
        "catalogue_is_that_of_the_index": catalogue is None
        or catalogue.fingerprint == index.manifest.meta["catalogue"],
        "tasks": _measure_tasks(evaluation_queries, rows),
        **untrained_report(evaluation_queries, rankings, rows),
    }
    if options.latency_queries:
        settings = index.resolve(options.nprobe, recall=options.recall)
        report["latency"] = measure_latency(
            index,
            evaluation_queries.vectors,
            repeats=options.latency_queries,
            settings=settings,
        )
    return Evaluation(report, evaluation_queries, rows, rankings.rows)


def read_oracle(file: Path) -> dict[str, Any]:
    """The oracle's recall per set of modalities, from oracle.json of the sample catalogue."""
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return data


def _read_judgements(catalogue: PreparedCatalogue | None, qrels: Path | None) -> pa.Table:
    if qrels is not None:
        return read_qrels(qrels)
    if catalogue is not None:
        return catalogue.qrels()
    raise ValueError("relevant products are unknown: give a catalogue with judgements, or qrels")


# ---------------------------------------------------------------------- untrained search


def _choosing_queries(
    reader: EmbeddingReader,
    judgements: pa.Table,
    index: ProductIndex,
    table: pa.Table | None,
    measured: EvaluationQueries,
    options: EvaluationOptions,
) -> EvaluationQueries | None:
    """The judged queries of the val split, if another split is measured; else None."""
    if table is None or options.split in (None, "val"):
        return None
    if "val" not in table.column("split").unique().to_pylist():
        return None
    try:
        return make_evaluation_queries(
            reader, judgements, index, queries=table, split="val", threshold=measured.threshold
        )
    except ValueError:  # none of them has a relevant product
        return None


def _search_untrained(
    index: ProductIndex,
    catalogue: PreparedCatalogue,
    towers: Mapping[str, TowerReaders],
    queries: EvaluationQueries,
    choosing: EvaluationQueries | None,
    ann: NDArray[np.int64],
    options: EvaluationOptions,
) -> UntrainedRankings:
    """Untrained search, with settings chosen on other queries than those that are measured."""
    products = read_product_inputs(index, catalogue, towers)
    table = catalogue.queries()

    def compared(own: EvaluationQueries, trained: NDArray[np.int64]) -> ComparedQueries:
        return ComparedQueries(own, read_query_inputs(own, table, products, towers), trained)

    # The queries that settings are chosen on need the model's results, too: the weight of the
    # hybrid depends on them.
    compared_choosing = None
    if choosing is not None:
        rows = search_as_served(index, choosing, 1, options)
        kept = (rows != choosing.source[:, None]) & (rows >= 0)
        trained = Hits.from_order(rows).keep_first(kept, DEPTH).rows
        compared_choosing = compared(choosing, trained)
    return search_untrained(products, compared(queries, ann), compared_choosing)


# ---------------------------------------------------------------------- the report


def _describe_index(index: ProductIndex) -> dict[str, Any]:
    meta = index.manifest.meta
    size = sum(entry.bytes for entry in index.manifest.files.values())
    names = ("model", "catalogue", "metric", "dim", "count", "factory", "reason")
    return {
        **{name: meta[name] for name in names},
        "fingerprint": index.manifest.fingerprint,
        "bytes": size,
        "bytes_per_product": round(size / len(index), 1),
    }


def _describe_settings(
    index: ProductIndex, queries: EvaluationQueries, split: str | None, options: EvaluationOptions
) -> dict[str, Any]:
    by_query_type = {}
    for query_type in queries.distinct_types:
        by_query_type[query_type] = settings_for(index, options, query_type)._asdict()
    return {
        "split": split,
        "threshold": queries.threshold,
        **index.resolve(options.nprobe, recall=options.recall)._asdict(),
        "by_query_type": by_query_type,
        "depth": DEPTH,
        "exclude_self": True,
        "exclude_identical": options.exclude_identical,
    }


def _count_queries(queries: EvaluationQueries) -> dict[str, Any]:
    counts = {}
    for query_type in queries.distinct_types:
        counts[query_type] = {
            "count": len(queries.positions_of_type(query_type)),
            "dropped": queries.dropped.get(query_type, 0),
        }
    return counts


def _measure_tasks(
    queries: EvaluationQueries, rows: Mapping[str, NDArray[np.int64]]
) -> dict[str, Any]:
    """Task -> query type -> metrics."""
    tasks: dict[str, Any] = {"exact": {}, "ann": {}, "ann_vs_exact": {}}
    for query_type in queries.distinct_types:
        positions = queries.positions_of_type(query_type)
        of_type = queries.select(positions)
        for task in ("exact", "ann"):
            tasks[task][query_type] = ranking_metrics(rows[task][positions], of_type)
        tasks["ann_vs_exact"][query_type] = ann_vs_exact_metrics(
            rows["ann"][positions], rows["exact"][positions]
        )
    return tasks
