"""`index.py evaluate`: measure an index on judged queries."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from tritower.commands.options import EffortOptions, one_side


@dataclass(frozen=True)
class QueryOptions:
    """Which queries are measured, and what is relevant.

    Attributes:
        queries_embeddings: embedded queries; EMBEDDINGS/queries when not given.
        qrels: judgements as .csv or .parquet (query_id, product_id, relevance); the catalogue's
            when not given.
        split: of the queries: train, val, test or all.
        threshold: lowest grade that is relevant; the highest grade when not given.
        exclude_identical: also leave out products whose vector equals that of the query's own
            product.
        normalize: scale vectors of any length to length 1.
    """

    queries_embeddings: Path | None = None
    qrels: Path | None = None
    split: str = "test"
    threshold: float | None = None
    exclude_identical: bool = False
    normalize: bool = False


@dataclass(frozen=True)
class ReportOptions:
    """What is in the report beside the figures of the index.

    Attributes:
        untrained: features of the pretrained towers before training, as embed writes them;
            EMBEDDINGS/untrained when not given, and left out where there are none.
        latency_queries: timed searches; 0 for none.
        examples: queries of each type to show with their hits.
        oracle: oracle.json of the sample catalogue, to show beside the figures.
        gate: figures that must be reached, else the exit code is 1: ann_vs_exact.*.recall@10>=0.95
    """

    untrained: Path | None = None
    latency_queries: int = 1000
    examples: int = 2
    oracle: Path | None = None
    gate: list[str] = field(default_factory=list)


def evaluate(
    index: Path,
    embeddings: Path,
    output: Path,
    queries: QueryOptions,
    effort: EffortOptions,
    report: ReportOptions,
    catalogue: Path | None = None,
) -> int:
    """Measure an index on judged queries.

    Exact task, ANN task and ANN against exact, beside search without training.

    Writes report.json and report.html, and prints a table. Warns of each type of query that loses
    more than a point of hit@10 or recall@10 by the index.

    Args:
        index: index folder.
        embeddings: folder that `embed` made; or the products' embeddings alone, together with
            queries_embeddings.
        output: folder of the report.
        queries: which queries are measured, and what is relevant
        effort: how much searches look at
        report: what is in the report beside the figures of the index
        catalogue: prepared catalogue: judgements, splits and texts; the one that was embedded when
            not given.
    """
    # Imported here, so the help starts at once.
    from tritower.retrieval.evaluating import evaluate as evaluating
    from tritower.retrieval.evaluating.comparison_table import below_floor, terminal_table
    from tritower.retrieval.evaluating.gates import failed_gates
    from tritower.retrieval.evaluating.report import examples, summary, write_report
    from tritower.retrieval.evaluating.search_tasks import EvaluationOptions
    from tritower.retrieval.evaluating.untrained_readers import open_tower_features
    from tritower.retrieval.index import ProductIndex
    from tritower.retrieval.index_origins import find_catalogue
    from tritower.retrieval.vectors.embeddings import EmbeddingReader
    from tritower.terminal.tables import show

    opened = ProductIndex.open(index)
    texts = find_catalogue(opened, catalogue)
    product_reader = EmbeddingReader(
        one_side(embeddings, "products"), metric=opened.metric, normalize=queries.normalize
    )
    query_reader = EmbeddingReader(
        queries.queries_embeddings or embeddings / "queries",
        metric=opened.metric,
        normalize=queries.normalize,
        asks=True,
    )
    options = EvaluationOptions(
        split=None if queries.split == "all" else queries.split,
        threshold=queries.threshold,
        recall=effort.recall,
        nprobe=effort.nprobe,
        exclude_identical=queries.exclude_identical,
        latency_queries=report.latency_queries,
    )
    towers = open_tower_features(
        report.untrained or embeddings / "untrained", required=report.untrained is not None
    )
    evaluation = evaluating.evaluate(
        opened,
        product_reader,
        query_reader,
        catalogue=texts,
        qrels=queries.qrels,
        untrained=towers,
        options=options,
    )

    sections = []
    if texts is not None and report.examples:
        sections = examples(evaluation, opened, texts, report.examples)
    oracle = None if report.oracle is None else evaluating.read_oracle(report.oracle)
    write_report(output, evaluation, sections, oracle)
    show(terminal_table(evaluation.report))
    print(summary(evaluation.report))
    print(f"report: {output / 'report.json'}, page: {output / 'report.html'}")
    for warning in (*below_floor(evaluation.report), *evaluation.report["warnings"]):
        print(f"warning: {warning}", file=sys.stderr)
    failures = failed_gates(evaluation.report, report.gate)
    for failure in failures:
        print(f"error: gate not reached: {failure}", file=sys.stderr)
    if failures:
        return 1
    return 0
