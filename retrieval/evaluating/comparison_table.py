"""The terminal table of an evaluation: a model beside untrained search, for each query type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rich import box
from rich.markup import escape
from rich.table import Table

TASKS = {
    "exact": "exact task",
    "ann": "ANN task",
    "ann_vs_exact": "ANN vs exact",
}

ORACLE_QUERY_TYPES = {
    "text": "product:text",
    "image": "product:image",
    "attribute": "product:attribute",
    "text+image+attribute": "fused",
}
"""Set of modalities in the oracle's file -> the query type that shows just these."""

TABLE_WIDTH = 100
"""Columns of a terminal that the table needs."""

TABLE_METRICS = ("hit@1", "hit@10", "recall@10", "ndcg@10")

ROW_NAMES = {
    "bm25": "BM25",
    "tfidf": "TF-IDF",
    "numbers": "numbers",
    "sum": "sum",
    "floor": "floor",
    "hybrid": "hybrid",
}
"""Name of a baseline in a report -> as shown; other baselines are towers before training."""

_ROW_ORDER = {"bm25": 0, "tfidf": 1, "numbers": 3, "sum": 4, "floor": 5}
_TOWER_ORDER = 2


class FigureRow(NamedTuple):
    """One row of a table.

    Attributes:
        name: as shown.
        key: name in the report.
        figures: metric -> {"value", "low", "high"}.
    """

    name: str
    key: str
    figures: Mapping[str, Any]


class Gain(NamedTuple):
    """What a row gains over the best untrained row.

    Attributes:
        mark: a star for the best untrained row itself, else empty.
        text: gain in nDCG@10 with its paired interval, or empty.
        is_below: whether the gain is negative.
    """

    mark: str
    text: str
    is_below: bool


def row_name(baseline: str) -> str:
    """The name of a baseline in tables."""
    return ROW_NAMES.get(baseline, f"{baseline}, untrained")


def terminal_table(report: Mapping[str, Any]) -> Table:
    """All rows of all query types, in at most `TABLE_WIDTH` columns.

    The last column is the paired difference of nDCG@10 from the best untrained row, red if it is
    below 0. The report itself has more figures.
    """
    table = Table(
        title="Results for each query type",
        caption=(
            "± half a 95 % interval. sum: the better lexical model and all towers; floor: the same "
            "with weights chosen on other queries. gain: nDCG@10 above the best untrained row (*), "
            "on the same queries."
        ),
        box=box.SIMPLE_HEAD,
    )
    table.add_column("", no_wrap=True)
    for name in (*TABLE_METRICS, "gain"):
        table.add_column(name, justify="right", no_wrap=True)
    # A section for each query type, a row for each search.
    for query_type, queries in report["queries"].items():
        table.add_row(
            f"[bold]{escape(query_type)}[/bold]", f"[dim]{queries['count']:,} queries[/dim]"
        )
        for row in rows_of_type(report, query_type):
            gain = gain_of(report, query_type, row.key)
            cells = []
            for metric in TABLE_METRICS:
                cells.append(_cell(row.figures, metric, interval=metric.startswith("hit")))
            style = "red" if gain.is_below else ""
            table.add_row(f"  {escape(row.name)}{gain.mark}", *cells, gain.text, style=style)
        table.add_section()
    return table


def gain_of(report: Mapping[str, Any], query_type: str, key: str) -> Gain:
    """The gain of a row of a report."""
    differences = report.get("differences", {}).get(query_type, {})
    if differences and key == differences["best"]:
        return Gain(" *", "", False)
    if key not in differences:
        return Gain("", "", False)
    figure = differences[key]["ndcg@10"]
    text = f"{figure['value']:+.3f} [{figure['low']:+.2f}, {figure['high']:+.2f}]"
    return Gain("", text, figure["value"] < 0)


def below_floor(report: Mapping[str, Any]) -> list[str]:
    """One line for each query type for which the model is below untrained search."""
    lines = []
    for query_type, differences in report.get("differences", {}).items():
        figure = differences.get("exact", {}).get("ndcg@10")
        if figure is not None and figure["value"] < 0:
            chance = " (within chance)" if figure["high"] >= 0 else ""
            lines.append(
                f"{query_type} queries: the model's nDCG@10 is {-figure['value']:.3f} below "
                f"{row_name(differences['best'])}, which needs no training{chance}"
            )
    return lines


def rows_of_type(report: Mapping[str, Any], query_type: str) -> Iterator[FigureRow]:
    """The rows of a query type: untrained search, the model, the hybrid, the oracle."""
    baselines = report["baselines"]
    # Untrained search first.
    for key in sorted(baselines, key=lambda key: (_ROW_ORDER.get(key, _TOWER_ORDER), key)):
        if query_type in baselines[key] and key != "hybrid":
            yield FigureRow(row_name(key), key, baselines[key][query_type])
    # Then the model: exact, through the index, and one against the other.
    for task, name in TASKS.items():
        if query_type in report["tasks"].get(task, {}):
            yield FigureRow(name, task, report["tasks"][task][query_type])
    # Then the model fused with lexical search, and the best that anybody could do.
    if query_type in baselines.get("hybrid", {}):
        yield FigureRow(row_name("hybrid"), "hybrid", baselines["hybrid"][query_type])
    recall = oracle_recall(report, query_type)
    if recall is not None:
        yield FigureRow("oracle", "oracle", {"recall@10": {"value": recall}})


def oracle_recall(report: Mapping[str, Any], query_type: str) -> float | None:
    """The oracle's recall@10 for a query type; None if it has none."""
    recalls = (report.get("oracle") or {}).get("recall@10", {})
    for modalities, value in recalls.items():
        if ORACLE_QUERY_TYPES.get(modalities) == query_type:
            return value
    return None


def _cell(figures: Mapping[str, Any], metric: str, interval: bool = False) -> str:
    if metric not in figures:
        return ""
    figure = figures[metric]
    text = f"{figure['value']:.3f}"
    if interval and "low" in figure:
        text += f" ±{(figure['high'] - figure['low']) / 2:.2f}"
    return text
