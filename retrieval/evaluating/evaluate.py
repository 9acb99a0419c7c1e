"""Measure what an index finds.

Three recalls that are never mixed, beside traditional search, with intervals.

    exact         relevant products found by comparing with every vector: how good the embeddings
      are
    ann           relevant products found through the index: what users get
    ann_vs_exact  the index against exact search: what the index costs

The result is one JSON object; docs/indexes.md names its keys.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tritower.retrieval.evaluating.comparison import (
    CUTS,
    DEPTH,
    Asked,
    Compared,
    measure,
    search_untrained,
    untrained_report,
    with_intervals,
)
from tritower.retrieval.evaluating.evaluation_queries import Questions
from tritower.retrieval.evaluating.exact import exact_search
from tritower.retrieval.evaluating.judgements import make_questions, rows_of
from tritower.retrieval.evaluating.latency import measure_latency
from tritower.retrieval.evaluating.untrained import Untrained, number_features
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.ivf.engine import Settings
from tritower.retrieval.lexical.records import Record, record_of_kind, typed_record
from tritower.retrieval.products.catalogue import PreparedCatalogue, read_qrels
from tritower.retrieval.ranking import metrics
from tritower.retrieval.ranking.hits import Hits
from tritower.retrieval.vectors.embeddings import EmbeddingReader

REPORT_VERSION = 2
"""2: search without training is tuned, and differences to it are paired."""

TowerReaders = tuple[EmbeddingReader, EmbeddingReader]
"""Features of a pretrained tower: of products, and of queries."""

SERVED = 10
"""Results that a user asks for."""


@dataclass(frozen=True)
class Options:
    """What is asked and how.

    Attributes:
        split: the queries to ask, "train", "val" or "test"; None for all.
        threshold: the lowest grade that is relevant; None for the highest there is.
        recall: the recall that searches are asked for, of an index built for one; None for the one
            it was built for.
        nprobe: lists visited; None for what the kind of query needs.
        exclude_identical: also leave out products whose vector equals that of the product asked.
        untrained: measure search without training, where a catalogue is known.
        latency_queries: timed searches; 0 for none.
    """

    split: str | None = "test"
    threshold: float | None = None
    recall: float | None = None
    nprobe: int | None = None
    exclude_identical: bool = False
    untrained: bool = True
    latency_queries: int = 1000


@dataclass(frozen=True)
class Evaluation:
    """The report, and what it was made from.

    Attributes:
        report: plain JSON.
        questions: Q queries.
        found: task -> (Q, DEPTH) rows of the index, -1 padded: "exact" and "ann".
        untrained: kind -> name of a row -> (Q', DEPTH) rows that search without training found.
    """

    report: dict[str, Any]
    questions: Questions
    found: Mapping[str, NDArray[np.int64]]
    untrained: Mapping[str, Mapping[str, NDArray[np.int64]]]


def evaluate(
    index: ProductIndex,
    products: EmbeddingReader,
    queries: EmbeddingReader,
    *,
    catalogue: PreparedCatalogue | None = None,
    qrels: Path | None = None,
    untrained: Mapping[str, TowerReaders] | None = None,
    options: Options | None = None,
) -> Evaluation:
    """Measure an index on queries with judged answers.

    Args:
        index: what users search.
        products: the embeddings it was built from.
        queries: embedded queries.
        catalogue: tells queries' splits, source products and texts; its judgements are used unless
            `qrels` is given.
        qrels: file of judgements (query_id, product_id, relevance), for anyone's vectors.
        untrained: features of pretrained towers before training: name -> those of products, those
            of queries.
        options: what is asked and how.

    Raises:
        ValueError: no judgements, no queries left, or settings that do not suit the index.
        ArtefactError: embeddings of another model, or of other products than the index holds.
    """
    options = options or Options()
    index.check_model(queries.meta.get("model"), str(queries.source))
    index.check_model(products.meta.get("model"), str(products.source))
    if qrels is None and catalogue is None:
        raise ValueError(
            "nothing says which products are relevant: give a catalogue with judgements, or qrels"
        )
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
    compared = Compared({}, {})
    if catalogue is not None and options.untrained:
        choosing = _choosing_questions(queries, judgements, index, table, questions, options)
        compared = _without_training(
            index, catalogue, untrained or {}, questions, choosing, found["ann"], options
        )
    report = {
        "version": REPORT_VERSION,
        "index": _describe(index),
        "settings": {
            "split": options.split if catalogue else None,
            "threshold": questions.threshold,
            **index.resolve(options.nprobe, recall=options.recall)._asdict(),
            "by_kind": {
                kind: _settings(index, options, kind)._asdict() for kind in questions.all_kinds
            },
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
        **untrained_report(questions, compared, {"exact": found["exact"], "ann": found["ann"]}),
    }
    if options.latency_queries:
        settings = index.resolve(options.nprobe, recall=options.recall)
        report["latency"] = measure_latency(
            index, questions.vectors, repeats=options.latency_queries, settings=settings
        )
    return Evaluation(report, questions, found, compared.found)


def open_untrained(folder: Path, required: bool = False) -> dict[str, TowerReaders]:
    """The features of pretrained towers before training, as `index.py embed` writes them.

    Args:
        folder: a folder for each tower, with products/ and queries/ in it.
        required: whether it must be there.

    Raises:
        FileNotFoundError: it must be there and is not.
    """
    if not folder.is_dir():
        if required:
            raise FileNotFoundError(
                f"{folder}: no such folder. `index.py embed` writes EMBEDDINGS/untrained."
            )
        return {}
    towers = sorted(tower for tower in folder.iterdir() if (tower / "products").is_dir())
    return {
        tower.name: (EmbeddingReader(tower / "products"), EmbeddingReader(tower / "queries"))
        for tower in towers
    }


def _choosing_questions(
    queries: EmbeddingReader,
    judgements: pa.Table,
    index: ProductIndex,
    table: pa.Table | None,
    questions: Questions,
    options: Options,
) -> Questions | None:
    """The judged queries of the val split, where other queries are measured.

    None where there are none.
    """
    if (
        table is None
        or options.split in (None, "val")
        or "val" not in table.column("split").unique().to_pylist()
    ):
        return None
    try:
        return make_questions(
            queries, judgements, index, queries=table, split="val", threshold=questions.threshold
        )
    except ValueError:  # none of them has a relevant product
        return None


def _without_training(
    index: ProductIndex,
    catalogue: PreparedCatalogue,
    untrained: Mapping[str, TowerReaders],
    questions: Questions,
    choosing: Questions | None,
    served: NDArray[np.int64],
    options: Options,
) -> Compared:
    """Search without training, chosen on other queries than those that are measured."""
    products = _untrained_inputs(index, catalogue, untrained)
    table = catalogue.queries()

    def asked(of: Questions, trained: NDArray[np.int64]) -> Asked:
        return Asked(of, _untrained_queries(of, table, products, untrained), trained)

    others = None
    if choosing is not None:
        rows = _served(index, choosing, 1, options)
        kept = (rows != choosing.source[:, None]) & (rows >= 0)
        others = asked(choosing, Hits.from_order(rows).keep_first(kept, DEPTH).rows)
    return search_untrained(products, asked(questions, served), others)


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
        Task -> (Q, DEPTH) rows, and how many questions met another product with the same vector as
        the one asked.
    """
    spare = 1  # for the product asked
    while True:
        exact = exact_search(products, index, questions.vectors, DEPTH + spare)
        twins = _twins(questions.source, exact.hits.rows, exact.content)
        if (
            not options.exclude_identical
            or spare > int(twins.sum(axis=1).max(initial=0))
            or spare >= len(index)
        ):
            break
        spare *= 4
    approximate = _served(index, questions, spare, options)
    found = {}
    for task, rows in (("exact", exact.hits.rows), ("ann", approximate)):
        kept = (rows != questions.source[:, None]) & (rows >= 0)
        if options.exclude_identical:
            kept &= ~_twins(questions.source, rows, exact.content)
        found[task] = Hits.from_order(rows).keep_first(kept, DEPTH).rows
    return found, int(twins.any(axis=1).sum())


def _settings(index: ProductIndex, options: Options, kind: str) -> Settings:
    """How queries of a kind are searched for."""
    return index.resolve(options.nprobe, recall=options.recall, kind=kind)


def _served(
    index: ProductIndex, questions: Questions, spare: int, options: Options
) -> NDArray[np.int64]:
    """(Q, DEPTH + spare) rows.

    The first ones as a search for 10 finds them, then what a deeper search adds.

    A deeper search ranks more candidates again, so its first 10 are better than those that users
    see. For a product that asks, `spare` more are searched for, as it is left out afterwards.
    """
    rows = np.full((len(questions.vectors), min(DEPTH + spare, len(index))), metrics.NONE)
    asks = questions.source >= 0
    for kind, itself in product(questions.all_kinds, (False, True)):
        of = questions.of_kind(kind)
        settings = _settings(index, options, kind)
        of = of[asks[of] == itself]
        if not len(of):
            continue
        first = index.search(questions.vectors[of], SERVED + spare * itself, settings=settings).rows
        deep = index.search(questions.vectors[of], DEPTH + spare, settings=settings).rows
        again = (deep[:, :, None] == first[:, None, :]).any(axis=2)
        both = np.concatenate([first, np.where(again, metrics.NONE, deep)], axis=1)
        order = np.argsort(both == metrics.NONE, axis=1, kind="stable")[:, : rows.shape[1]]
        rows[of] = np.take_along_axis(both, order, axis=1)
    return rows


def _twins(
    source: NDArray[np.int64], rows: NDArray[np.int64], content: NDArray[np.int64]
) -> NDArray[np.bool_]:
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


def compare(rows: NDArray[np.int64], exact: NDArray[np.int64]) -> dict[str, Any]:
    """The same metrics of an approximate ranking, with exact search's first k as relevant.

    MRR, nDCG@10 and mAP take its first 10, all alike.
    """
    values = {f"hit@{k}": metrics.hit_at_k_per_query(rows, exact[:, :k], k) for k in CUTS}
    values |= {f"recall@{k}": metrics.recall_at_k_per_query(rows, exact[:, :k], k) for k in CUTS}
    ten = exact[:, :10]
    values["mrr"] = metrics.mrr_per_query(rows, ten)
    values["ndcg@10"] = metrics.ndcg_at_k_per_query(rows, ten, np.ones(ten.shape), 10)
    values["map"] = metrics.average_precision_per_query(rows, ten)
    return with_intervals(values)


def _untrained_inputs(
    index: ProductIndex, catalogue: PreparedCatalogue, untrained: Mapping[str, TowerReaders]
) -> Untrained:
    """What search without training reads of the products, by row of the index."""
    records: list[Record] = [{} for _ in range(index.engine.count)]
    numbers = np.full((index.engine.count, len(catalogue.number_attributes)), np.nan)
    for ids, own_records, own_numbers in catalogue.records():
        rows = rows_of(ids, index)
        numbers[rows[rows >= 0]] = own_numbers[rows >= 0]
        for row, record in zip(rows.tolist(), own_records, strict=True):
            if row >= 0:
                records[row] = record
    features = {"numbers": number_features(numbers)} if numbers.size else {}
    for name, (products, _) in untrained.items():
        features[name] = np.zeros((index.engine.count, products.dim), np.float16)
        for batch in products.batches():
            rows = index.rows_of(batch.ids)
            features[name][rows[rows >= 0]] = batch.vectors[rows >= 0]
    return Untrained(records, features)


def _untrained_queries(
    questions: Questions,
    table: pa.Table,
    products: Untrained,
    untrained: Mapping[str, TowerReaders],
) -> Untrained:
    """What search without training reads of the queries."""
    texts = dict(
        zip(table.column("query_id").to_pylist(), table.column("text").to_pylist(), strict=True)
    )
    records: list[Record] = []
    for query_id, kind, source in zip(
        questions.ids, questions.kinds, questions.source.tolist(), strict=True
    ):
        if source >= 0:
            record = record_of_kind(products.records[source], kind)
        else:
            record = typed_record(texts.get(query_id))
        records.append(record)
    features: dict[str, NDArray[np.floating]] = {}
    for name, (_, queries) in untrained.items():
        place = {key: n for n, key in enumerate(zip(questions.ids, questions.kinds, strict=True))}
        features[name] = np.zeros((len(records), queries.dim), np.float16)
        for batch in queries.batches():
            kinds = ["query"] * len(batch.ids) if batch.kinds is None else batch.kinds.to_pylist()
            for key, vector in zip(
                zip(batch.ids.to_pylist(), kinds, strict=True), batch.vectors, strict=True
            ):
                if key in place:
                    features[name][place[key]] = vector
    if "numbers" in products.features:
        shows_numbers = (questions.source >= 0) & np.isin(
            questions.kinds.astype(str), ("fused", "product:attribute")
        )
        numbers = products.features["numbers"][questions.source]
        features["numbers"] = np.where(shows_numbers[:, None], numbers, 0)
    return Untrained(records, features)


COSTS = 0.01
"""A loss of hit@10 or recall@10 through the index that is worth a warning."""


def index_warnings(report: Mapping[str, Any]) -> list[str]:
    """What the index costs in recall: one line for each query type that loses over a point.

    Args:
        report: with `tasks`, as `evaluate` makes it.
    """
    warnings = []
    for kind, exact in report["tasks"]["exact"].items():
        ann = report["tasks"]["ann"][kind]
        pairs = {
            name: (exact[name]["value"], ann[name]["value"]) for name in ("hit@10", "recall@10")
        }
        lost = [
            f"{name} {best:.3f} -> {got:.3f}"
            for name, (best, got) in pairs.items()
            if best - got > COSTS + 1e-9
        ]
        if lost:
            warnings.append(
                f"queries of kind {kind} lose by the index ({', '.join(lost)}, exact search -> "
                "index): build it with "
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
                raise ValueError(
                    f"gate {gate!r}: no {name}.{metric} in task {task}; kinds are "
                    f"{', '.join(kinds)}"
                )
            value = kinds[name][metric]["value"]
            if not value >= float(floor):
                failures.append(f"{task}.{name}.{metric} is {value:.4f}, below {floor}")
    return failures


def read_oracle(file: Path) -> dict[str, Any]:
    """The oracle's recall per set of modalities, from oracle.json of the sample catalogue."""
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return data
