"""Measure what an index finds: three recalls that are never mixed, beside traditional search, with intervals.

    exact         relevant products found by comparing with every vector: how good the embeddings are
    ann           relevant products found through the index: what users get
    ann_vs_exact  the index against exact search: what the index costs

The result is one JSON object; docs/index.md names its keys.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from retrieval import metrics
from retrieval.catalogue import PreparedCatalogue, read_qrels
from retrieval.embeddings import EmbeddingReader
from retrieval.engine import Settings
from retrieval.exact import exact_search
from retrieval.hits import Hits
from retrieval.index import ProductIndex
from retrieval.judgements import Questions, make_questions, rows_of
from retrieval.latency import measure_latency
from retrieval.lexical import LEXICAL, reciprocal_rank_fusion

REPORT_VERSION = 1
DEPTH = 100
"""Results measured per query."""

CUTS = (1, 10, 100)
SERVED = 10
"""Results that a user asks for."""


@dataclass(frozen=True)
class Options:
    """What is asked and how.

    Attributes:
        split: the queries to ask, "train", "val" or "test"; None for all.
        threshold: the lowest grade that is relevant; None for the highest there is.
        recall: the recall that searches are asked for, of an index built for one; None for the one it was built for.
        nprobe: lists visited; None for what the kind of query needs.
        exclude_identical: also leave out products whose vector equals that of the product asked.
        lexical: measure BM25, TF-IDF and Jaccard where texts are known.
        lexical_fields: fields of products they read; None for the title and all attributes but numbers.
        lexical_weight: of BM25's ranks beside 1 of the index's, where both are fused.
        latency_queries: timed searches; 0 for none.
    """

    split: str | None = "test"
    threshold: float | None = None
    recall: float | None = None
    nprobe: int | None = None
    exclude_identical: bool = False
    lexical: bool = True
    lexical_fields: Sequence[str] | None = None
    lexical_weight: float = 1.0
    latency_queries: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.lexical_weight < math.inf:
            raise ValueError(
                f"lexical_weight={self.lexical_weight} weighs BM25's ranks beside 1 of the index's: choose above 0."
            )


@dataclass(frozen=True)
class Evaluation:
    """The report, and what it was made from.

    Attributes:
        report: plain JSON.
        questions: Q queries.
        found: task -> (Q, DEPTH) rows of the index, -1 padded: "exact" and "ann".
        by_words: DEPTH products that BM25 found for each query that has words.
    """

    report: dict[str, Any]
    questions: Questions
    found: Mapping[str, NDArray[np.int64]]
    by_words: Hits


def evaluate(
    index: ProductIndex,
    products: EmbeddingReader,
    queries: EmbeddingReader,
    *,
    catalogue: PreparedCatalogue | None = None,
    qrels: Path | None = None,
    options: Options | None = None,
) -> Evaluation:
    """Measure an index on queries with judged answers.

    Args:
        index: what users search.
        products: the embeddings it was built from.
        queries: embedded queries.
        catalogue: tells queries' splits, source products and texts; its judgements are used unless `qrels` is given.
        qrels: file of judgements (query_id, product_id, relevance), for anyone's vectors.
        options: what is asked and how.

    Raises:
        ValueError: no judgements, no queries left, or settings that do not suit the index.
        ArtefactError: embeddings of another model, or of other products than the index holds.
    """
    options = options or Options()
    index.check_model(queries.meta.get("model"), str(queries.source))
    index.check_model(products.meta.get("model"), str(products.source))
    if qrels is None and catalogue is None:
        raise ValueError("nothing says which products are relevant: give a catalogue with judgements, or qrels")
    judgements = read_qrels(qrels) if qrels else catalogue.qrels()  # type: ignore[union-attr]
    table = catalogue.queries() if catalogue else None
    questions = make_questions(
        queries,
        judgements,
        index,
        queries=table,
        split=options.split if catalogue else None,
        threshold=options.threshold,
    )
    found, identical = _search(index, products, questions, options)
    baselines, by_words = _baselines(index, catalogue, table, questions, found["ann"], options)
    report = {
        "version": REPORT_VERSION,
        "index": _describe(index),
        "settings": {
            "split": options.split if catalogue else None,
            "threshold": questions.threshold,
            "lexical_weight": options.lexical_weight,
            **index.resolve(options.nprobe, recall=options.recall)._asdict(),
            "by_kind": {kind: _settings(index, options, kind)._asdict() for kind in questions.all_kinds},
            "depth": DEPTH,
            "exclude_self": True,
            "exclude_identical": options.exclude_identical,
        },
        "queries": {
            kind: {"count": len(questions.of_kind(kind)), "dropped": questions.dropped.get(kind, 0)}
            for kind in questions.all_kinds
        },
        "dropped_queries": questions.dropped_queries,
        "identical_to_source": identical,
        "judged_products_not_in_index": questions.unknown,
        "catalogue_is_that_of_the_index": catalogue is None
        or catalogue.fingerprint == index.manifest.meta["catalogue"],
        "tasks": _tasks(questions, found),
        "baselines": baselines,
    }
    if options.latency_queries:
        settings = index.resolve(options.nprobe, recall=options.recall)
        report["latency"] = measure_latency(
            index, questions.vectors, repeats=options.latency_queries, settings=settings
        )
    return Evaluation(report, questions, found, by_words)


def _describe(index: ProductIndex) -> dict[str, Any]:
    meta = index.manifest.meta
    size = sum(entry.bytes for entry in index.manifest.files.values())
    names = ("model", "catalogue", "metric", "dim", "count", "factory", "reason")
    return {
        **{name: meta[name] for name in names},
        "fingerprint": index.manifest.fingerprint,
        "bytes": size,
        "bytes_per_product": round(size / len(index), 1),
    }


def _search(
    index: ProductIndex, products: EmbeddingReader, questions: Questions, options: Options
) -> tuple[dict[str, NDArray[np.int64]], int]:
    """What exact and approximate search find, without the product asked.

    Returns:
        Task -> (Q, DEPTH) rows, and how many questions met another product with the same vector as the one asked.
    """
    spare = 1  # for the product asked
    while True:
        exact = exact_search(products, index, questions.vectors, DEPTH + spare)
        twins = _twins(questions.source, exact.hits.rows, exact.content)
        if not options.exclude_identical or spare > int(twins.sum(axis=1).max(initial=0)) or spare >= len(index):
            break
        spare *= 4
    approximate = _served(index, questions, spare, options)
    found = {}
    for task, rows in (("exact", exact.hits.rows), ("ann", approximate)):
        kept = (rows != questions.source[:, None]) & (rows >= 0)
        if options.exclude_identical:
            kept &= ~_twins(questions.source, rows, exact.content)
        found[task] = Hits.in_order(rows).first(kept, DEPTH).rows
    return found, int(twins.any(axis=1).sum())


def _settings(index: ProductIndex, options: Options, kind: str) -> Settings:
    """How queries of a kind are searched for."""
    return index.resolve(options.nprobe, recall=options.recall, kind=kind)


def _served(index: ProductIndex, questions: Questions, spare: int, options: Options) -> NDArray[np.int64]:
    """(Q, DEPTH + spare) rows: the first ones as a search for 10 finds them, then what a deeper search adds.

    A deeper search ranks more candidates again, so its first 10 are better than those that users see.
    """
    rows = np.full((len(questions.vectors), min(DEPTH + spare, len(index))), metrics.NONE)
    for kind in questions.all_kinds:
        of, settings = questions.of_kind(kind), _settings(index, options, kind)
        first = index.search(questions.vectors[of], SERVED + spare, settings=settings).rows
        deep = index.search(questions.vectors[of], DEPTH + spare, settings=settings).rows
        again = (deep[:, :, None] == first[:, None, :]).any(axis=2)
        both = np.concatenate([first, np.where(again, metrics.NONE, deep)], axis=1)
        order = np.argsort(both == metrics.NONE, axis=1, kind="stable")[:, : rows.shape[1]]
        rows[of] = np.take_along_axis(both, order, axis=1)
    return rows


def _twins(source: NDArray[np.int64], rows: NDArray[np.int64], content: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(Q, K) bool: another product than the one asked, with the same vector."""
    same: NDArray[np.bool_] = content[rows] == content[source][:, None]
    return same & (rows != source[:, None]) & (rows >= 0) & (source[:, None] >= 0)


def _tasks(questions: Questions, found: Mapping[str, NDArray[np.int64]]) -> dict[str, Any]:
    tasks: dict[str, Any] = {"exact": {}, "ann": {}, "ann_vs_exact": {}}
    for kind in questions.all_kinds:
        of = questions.of_kind(kind)
        for task in ("exact", "ann"):
            tasks[task][kind] = measure(
                found[task][of], questions.relevant[of], questions.judged[of], questions.grades[of]
            )
        tasks["ann_vs_exact"][kind] = compare(found["ann"][of], found["exact"][of])
    return tasks


def measure(
    rows: NDArray[np.int64], relevant: NDArray[np.int64], judged: NDArray[np.int64], grades: NDArray[np.float64]
) -> dict[str, Any]:
    """All metrics of a ranking, each with its 95 % interval.

    Args:
        rows: (Q, DEPTH) rows, best first, -1 padded.
        relevant: (Q, R) relevant rows, -1 padded.
        judged: (Q, J) judged rows, -1 padded.
        grades: (Q, J) their grades.
    """
    values = {f"hit@{k}": metrics.hit_at_k_per_query(rows, relevant, k) for k in CUTS}
    values |= {f"recall@{k}": metrics.recall_at_k_per_query(rows, relevant, k) for k in CUTS}
    values["mrr"] = metrics.mrr_per_query(rows, relevant)
    values["ndcg@10"] = metrics.ndcg_at_k_per_query(rows, judged, grades, 10)
    values["map"] = metrics.average_precision_per_query(rows, relevant)
    best = {f"best_recall@{k}": {"value": metrics.best_recall_at_k(relevant, k)} for k in CUTS}
    return _with_intervals(values) | best


def compare(rows: NDArray[np.int64], exact: NDArray[np.int64]) -> dict[str, Any]:
    """The same metrics of an approximate ranking, with exact search's first k as the relevant products.

    MRR, nDCG@10 and mAP take its first 10, all alike.
    """
    values = {f"hit@{k}": metrics.hit_at_k_per_query(rows, exact[:, :k], k) for k in CUTS}
    values |= {f"recall@{k}": metrics.recall_at_k_per_query(rows, exact[:, :k], k) for k in CUTS}
    ten = exact[:, :10]
    values["mrr"] = metrics.mrr_per_query(rows, ten)
    values["ndcg@10"] = metrics.ndcg_at_k_per_query(rows, ten, np.ones(ten.shape), 10)
    values["map"] = metrics.average_precision_per_query(rows, ten)
    return _with_intervals(values)


def _with_intervals(values: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
    low, high = metrics.bootstrap_interval(np.stack(list(values.values()), axis=1))
    return {
        name: {"value": float(column.mean()), "low": float(low[i]), "high": float(high[i])}
        for i, (name, column) in enumerate(values.items())
    }


def _baselines(
    index: ProductIndex,
    catalogue: PreparedCatalogue | None,
    table: pa.Table | None,
    questions: Questions,
    served: NDArray[np.int64],
    options: Options,
) -> tuple[dict[str, Any], Hits]:
    """BM25, TF-IDF and Jaccard on typed texts and on products asked by their title, and BM25 fused with the index.

    Args:
        index: what users search.
        catalogue: where texts are from; None: there are none.
        table: its queries.
        questions: what is asked.
        served: (Q, DEPTH) rows that the index found.
        options: how.

    Returns:
        Name -> kind -> metrics; and DEPTH products that BM25 found for each query, none where it has no words.
    """
    by_words = Hits.none(len(questions.ids), DEPTH)
    if catalogue is None or table is None or not options.lexical:
        return {}, by_words
    typed = dict(zip(table.column("query_id").to_pylist(), table.column("text").to_pylist(), strict=True))
    sources = dict(
        zip(table.column("query_id").to_pylist(), table.column("source_product_id").to_pylist(), strict=True)
    )
    asked = {kind: of for kind in ("text", "product:text") if len(of := questions.of_kind(kind))}
    if not asked:
        return {}, by_words
    ids, texts, titles = _texts(catalogue, options.lexical_fields)
    rows = rows_of(ids, index)
    words = {
        kind: [typed[i] or "" if kind == "text" else titles.get(sources[i], "") for i in questions.ids[of]]
        for kind, of in asked.items()
    }
    results: dict[str, Any] = {}
    for name, make in LEXICAL.items():
        rank = make(texts)
        results[name] = {}
        for kind, of in asked.items():
            ranked = rank(words[kind], DEPTH + 1)
            in_index = np.where(ranked.rows >= 0, rows[ranked.rows], metrics.NONE)
            kept = (in_index != questions.source[of][:, None]) & (in_index >= 0)
            got = Hits(ranked.scores, in_index).first(kept, DEPTH)
            judged = questions.relevant[of], questions.judged[of], questions.grades[of]
            results[name][kind] = measure(got.rows, *judged)
            if name == "bm25":
                by_words.scores[of], by_words.rows[of] = got
                both = reciprocal_rank_fusion([got, Hits.in_order(served[of])], [options.lexical_weight, 1.0])
                results.setdefault("hybrid", {})[kind] = measure(both, *judged)
    return results, by_words


def _texts(
    catalogue: PreparedCatalogue, fields: Sequence[str] | None
) -> tuple[list[str], list[str], dict[str | None, str]]:
    """Product ids, their words, and product id -> title."""
    ids: list[str] = []
    texts: list[str] = []
    titles: dict[str | None, str] = {}
    for (shard_ids, shard_texts), (_, shard_titles) in zip(
        catalogue.texts(fields), catalogue.texts(catalogue.text_fields[:1]), strict=True
    ):
        ids += shard_ids
        texts += shard_texts
        titles.update(zip(shard_ids, shard_titles, strict=True))
    return ids, texts, titles


COSTS = 0.01
"""A kind of query that loses more than this of hit@10 or recall@10 by the index is worth a warning."""


def index_warnings(report: Mapping[str, Any]) -> list[str]:
    """What queries lose because the index is not exact, one line for each kind that loses more than a point.

    Args:
        report: with `tasks`, as `evaluate` makes it.
    """
    warnings = []
    for kind, exact in report["tasks"]["exact"].items():
        ann = report["tasks"]["ann"][kind]
        pairs = {name: (exact[name]["value"], ann[name]["value"]) for name in ("hit@10", "recall@10")}
        lost = [f"{name} {best:.3f} -> {got:.3f}" for name, (best, got) in pairs.items() if best - got > COSTS + 1e-9]
        if lost:
            warnings.append(
                f"queries of kind {kind} lose by the index ({', '.join(lost)}, exact search -> index): build it with "
                "--recall 0.99 --queries QUERIES, or with --factory Flat for exact search"
            )
    return warnings


_GATE = re.compile(r"(exact|ann|ann_vs_exact)\.([^.\s]+)\.([^.\s]+)\s*>=\s*([0-9.]+)")


def failed_gates(report: Mapping[str, Any], gates: Sequence[str]) -> list[str]:
    """What falls short of `TASK.KIND.METRIC>=FLOOR`, one line each; KIND * asks every kind.

    Raises:
        ValueError: not of that form, or no such kind or metric in the report.
    """
    failures = []
    for gate in gates:
        match = _GATE.fullmatch(gate.strip())
        if match is None:
            raise ValueError(f"gate {gate!r}; expected for example ann_vs_exact.*.recall@10>=0.95")
        task, kind, metric, floor = match.groups()
        kinds = report["tasks"][task]
        for name in kinds if kind == "*" else [kind]:
            if name not in kinds or metric not in kinds[name]:
                raise ValueError(f"gate {gate!r}: no {name}.{metric} in task {task}; kinds are {', '.join(kinds)}")
            value = kinds[name][metric]["value"]
            if not value >= float(floor):
                failures.append(f"{task}.{name}.{metric} is {value:.4f}, below {floor}")
    return failures


def read_oracle(file: Path) -> dict[str, Any]:
    """The recall of an oracle per subset of modalities, as `datamodules.samples` writes it."""
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return data
