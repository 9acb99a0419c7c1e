"""`index.py evaluate`: measure an index on judged queries."""

from __future__ import annotations

import sys
from pathlib import Path

from tritower.commands.folders import one_side


def evaluate(
    index: Path,
    embeddings: Path,
    output: Path,
    catalogue: Path | None = None,
    queries_embeddings: Path | None = None,
    qrels: Path | None = None,
    split: str = "test",
    threshold: float | None = None,
    recall: float | None = None,
    nprobe: int | None = None,
    exclude_identical: bool = False,
    untrained: Path | None = None,
    latency_queries: int = 1000,
    examples: int = 2,
    oracle: Path | None = None,
    gate: list[str] = [],  # noqa: B006
    normalize: bool = False,
) -> int:
    """Measure an index on judged queries.

    Exact task, ANN task and ANN against exact, beside traditional search.

    Writes report.json and report.html, and prints a table. Warns of each kind of query that loses
    more than a point of hit@10 or recall@10 by the index.

    Args:
        index: index folder.
        embeddings: what `embed` made; or the products' embeddings alone, together with
            queries_embeddings.
        output: folder of the report.
        catalogue: prepared catalogue: judgements, splits and texts; the one that was embedded when
            not given.
        queries_embeddings: embedded queries; EMBEDDINGS/queries when not given.
        qrels: judgements as .csv or .parquet (query_id, product_id, relevance); the catalogue's
            when not given.
        split: queries to ask: train, val, test or all.
        threshold: lowest grade that is relevant; the highest there is when not given.
        recall: recall that searches are asked for; the one the index was built for when not given.
        nprobe: lists to visit; what each kind of query needs when not given.
        exclude_identical: also leave out products whose vector equals that of the product asked.
        untrained: features of the pretrained towers before training, as embed writes them;
            EMBEDDINGS/untrained when not given, and left out where there are none.
        latency_queries: timed searches; 0 for none.
        examples: queries of each kind to show with their hits.
        oracle: oracle.json of the sample catalogue, to show beside the figures.
        gate: figures that must be reached, else the exit code is 1: ann_vs_exact.*.recall@10>=0.95
        normalize: bring vectors of any length to length 1.
    """
    from tritower.retrieval.evaluating import evaluate as measuring
    from tritower.retrieval.evaluating import report
    from tritower.retrieval.evaluating.comparison_table import below_floor, terminal_table
    from tritower.retrieval.index import ProductIndex
    from tritower.retrieval.showing.present import find_catalogue, show
    from tritower.retrieval.vectors.embeddings import EmbeddingReader

    opened = ProductIndex.open(index)
    known = find_catalogue(opened, catalogue)
    asked = queries_embeddings or embeddings / "queries"
    products = EmbeddingReader(
        one_side(embeddings, "products"), metric=opened.metric, normalize=normalize
    )
    queries = EmbeddingReader(asked, metric=opened.metric, normalize=normalize, asks=True)
    options = measuring.Options(
        split=None if split == "all" else split,
        threshold=threshold,
        recall=recall,
        nprobe=nprobe,
        exclude_identical=exclude_identical,
        latency_queries=latency_queries,
    )
    towers = measuring.open_untrained(
        untrained or embeddings / "untrained", required=untrained is not None
    )
    measured = measuring.evaluate(
        opened, products, queries, catalogue=known, qrels=qrels, untrained=towers, options=options
    )
    sections = report.examples(measured, opened, known, examples) if known and examples else []
    report.write_report(
        output, measured, sections, measuring.read_oracle(oracle) if oracle else None
    )
    show(terminal_table(measured.report))
    print(report.summary(measured.report))
    for line in below_floor(measured.report):
        print(f"warning: {line}", file=sys.stderr)
    print(f"report: {output / 'report.json'}, page: {output / 'report.html'}")
    for warning in measured.report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    failures = measuring.failed_gates(measured.report, gate)
    for failure in failures:
        print(f"error: gate not reached: {failure}", file=sys.stderr)
    return 1 if failures else 0
