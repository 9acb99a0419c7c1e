"""The table of an evaluation.

A model beside the best search without training, per kind of query.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

TASKS = {
    "exact": "exact task",
    "ann": "ANN task",
    "ann_vs_exact": "ANN vs exact",
}

ORACLE_KINDS = {
    "text": "product:text",
    "image": "product:image",
    "attribute": "product:attribute",
    "text+image+attribute": "fused",
}
"""Subset of modalities in an oracle's file -> the kind of query that shows just these."""

TABLE_WIDTH = 100
"""Columns of a terminal that the table needs."""

ROW_NAMES = {
    "bm25": "BM25",
    "tfidf": "TF-IDF",
    "numbers": "numbers",
    "sum": "sum",
    "floor": "floor",
    "hybrid": "hybrid",
}
"""Name of a baseline in a report -> as shown; others are pretrained towers before training."""


def row_name(baseline: str) -> str:
    """How a baseline is called in tables."""
    return ROW_NAMES.get(baseline, f"{baseline}, untrained")


def terminal_table(report: Mapping[str, Any]) -> Table:
    """Every kind of query with its rows; fits into `TABLE_WIDTH` columns.

    The report itself holds more figures.

    The last column is the paired difference of nDCG@10 to the best row without training; red where
    it is below 0.
    """
    caption = (
        "± half a 95 % interval. sum: of the better words and all towers; floor: the same with "
        "weights chosen on other "
        "queries. gain: nDCG@10 above the best row without training (*), on the same queries."
    )
    table = Table(title="What is found, per kind of query", caption=caption, box=box.SIMPLE_HEAD)
    columns = ("hit@1", "hit@10", "recall@10", "ndcg@10")
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("gain", justify="right", no_wrap=True)
    for kind, queries in report["queries"].items():
        table.add_row(f"[bold]{escape(kind)}[/bold]", f"[dim]{queries['count']:,} queries[/dim]")
        for name, key, figures in rows_of_kind(report, kind):
            cells = [
                _cell(figures, column, interval=column in ("hit@1", "hit@10")) for column in columns
            ]
            mark, gain, is_below = gain_of(report, kind, key)
            table.add_row(f"  {escape(name)}{mark}", *cells, gain, style="red" if is_below else "")
        table.add_section()
    return table


def gain_of(report: Mapping[str, Any], kind: str, key: str) -> tuple[str, str, bool]:
    """What a row gains over the best row without training.

    Returns:
        A star for that best row, the gain in nDCG@10 with its paired interval, and whether it is
        below 0.
    """
    differences = report.get("differences", {}).get(kind, {})
    if differences and key == differences["best"]:
        return " *", "", False
    if key not in differences:
        return "", "", False
    figure = differences[key]["ndcg@10"]
    return (
        "",
        f"{figure['value']:+.3f} [{figure['low']:+.2f}, {figure['high']:+.2f}]",
        figure["value"] < 0,
    )


def below_floor(report: Mapping[str, Any]) -> list[str]:
    """One line for each query type for which the model is below search without training."""
    lines = []
    for kind, differences in report.get("differences", {}).items():
        figure = differences.get("exact", {}).get("ndcg@10")
        if figure is not None and figure["value"] < 0:
            chance = " (within chance)" if figure["high"] >= 0 else ""
            lines.append(
                f"{kind} queries: the model's nDCG@10 is {-figure['value']:.3f} below "
                f"{row_name(differences['best'])}, "
                f"which needs no training{chance}"
            )
    return lines


def rows_of_kind(
    report: Mapping[str, Any], kind: str
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Name as shown, key, and figures of each row: without training first, then the model."""
    baselines = report["baselines"]
    for name in sorted(baselines, key=_order_of_row):
        if kind in baselines[name] and name != "hybrid":
            yield row_name(name), name, baselines[name][kind]
    for task, name in TASKS.items():
        if kind in report["tasks"].get(task, {}):
            yield name, task, report["tasks"][task][kind]
    if kind in baselines.get("hybrid", {}):
        yield row_name("hybrid"), "hybrid", baselines["hybrid"][kind]
    if (value := oracle_recall(report, kind)) is not None:
        yield "oracle", "oracle", {"recall@10": {"value": value}}


def _order_of_row(name: str) -> tuple[int, str]:
    """Words, towers by name, numbers, sums."""
    first = ("bm25", "tfidf")
    last = ("numbers", "sum", "floor")
    if name in first:
        return first.index(name), name
    if name in last:
        return (10 + last.index(name), name)
    return (5, name)


def oracle_recall(report: Mapping[str, Any], kind: str) -> float | None:
    """The oracle's recall@10 for a kind of query, None where it says nothing."""
    recalls = (report.get("oracle") or {}).get("recall@10", {})
    return next(
        (value for subset, value in recalls.items() if ORACLE_KINDS.get(subset) == kind), None
    )


def _cell(figures: Mapping[str, Any], name: str, interval: bool = False) -> str:
    if name not in figures:
        return ""
    figure = figures[name]
    half = f" ±{(figure['high'] - figure['low']) / 2:.2f}" if interval and "low" in figure else ""
    return f"{figure['value']:.3f}{half}"
