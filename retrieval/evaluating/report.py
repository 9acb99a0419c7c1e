"""An evaluation as report.json and one self-contained page, report.html."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritower.artefacts import storage
from tritower.retrieval.evaluating.comparison_table import (
    TASKS,
    FigureRow,
    gain_of,
    row_name,
    rows_of_type,
)
from tritower.retrieval.evaluating.evaluate import Evaluation
from tritower.retrieval.evaluating.gates import index_warnings
from tritower.retrieval.evaluating.metric_report import CUTS, DEPTH
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.products.catalogue import Card, PreparedCatalogue
from tritower.retrieval.ranking.metrics import recall_at_k_per_query
from tritower.retrieval.showing.pages import Hit, Section, data_url, render, sections_of

COLUMNS = (
    "hit@1",
    "hit@10",
    "hit@100",
    "recall@1",
    "recall@10",
    "recall@100",
    "mrr",
    "ndcg@10",
    "map",
)
NOTES = {
    "exact": "Relevant products found by comparing with every vector: how good the embeddings are. "
    "Some rows need no training; the best of them has a star, and the gain is what the model adds "
    "to it on the same queries.",
    "ann": "Relevant products found through the index: what users get.",
    "ann_vs_exact": "The index compared with exact search, whose first k results are the relevant "
    "ones: what the index costs.",
}
PLOTTED_CUTS = (1, 2, 3, 5, 10, 20, 50, CUTS[-1])
"""The k of the recall curves."""


def write_report(
    folder: Path,
    evaluation: Evaluation,
    sections: Sequence[Section],
    oracle: Mapping[str, Any] | None = None,
) -> None:
    """Write `report.json` and `report.html`.

    Args:
        folder: where to write; made when missing.
        evaluation: the measured figures.
        sections: example queries with their hits.
        oracle: content of an oracle's file, stored beside the figures.
    """
    report = evaluation.report
    if oracle is not None:
        report["oracle"] = dict(oracle)
    report["warnings"] = index_warnings(report)
    storage.write_json(folder / "report.json", report)
    # Everything is inlined: the page can be sent to somebody.
    page = render(
        "report.html",
        summary=summary(report),
        plots=_plots(evaluation),
        tables=[_html_table(task, report) for task in TASKS],
        sections=sections_of(sections),
    )
    storage.write_text(folder / "report.html", page)


def summary(report: Mapping[str, Any]) -> str:
    """One line: the index, the queries, and how fast they were searched."""
    index = report["index"]
    settings = report["settings"]
    parts = [
        f"{index['count']:,} products, {index['factory']}, {index['bytes_per_product']:,.0f} bytes "
        "a product",
        f"split {settings['split'] or 'all'}, relevant from grade {settings['threshold']:g}",
    ]
    if settings["nprobe"]:
        parts.append(f"{settings['nprobe']} lists probed")
    if latency := report.get("latency"):
        parts.append(
            f"{latency['p50_ms']:.2f} ms p50, {latency['p99_ms']:.2f} ms p99 a query on one "
            f"thread, {latency['qps']:,.0f} queries/s on {latency['threads']} (load "
            f"{latency['load']})"
        )
    if report["dropped_queries"]:
        parts.append(f"{report['dropped_queries']:,} queries without relevant products dropped")
    if report["identical_to_source"]:
        if settings["exclude_identical"]:
            treatment = "left out"
        else:
            treatment = "counted"
        parts.append(
            f"{report['identical_to_source']:,} queries found products with the same vector as "
            f"their own ({treatment})"
        )
    return "; ".join(parts)


def examples(
    evaluation: Evaluation,
    index: ProductIndex,
    catalogue: PreparedCatalogue,
    per_type: int,
    hits: int = 8,
) -> list[Section]:
    """A few measured queries of each type with their first hits, drawn at random."""
    queries = evaluation.queries
    generator = np.random.default_rng(0)
    # The same number of queries of each type.
    positions: list[int] = []
    for query_type in queries.distinct_types:
        drawn = generator.permutation(queries.positions_of_type(query_type))[:per_type]
        positions += drawn.tolist()
    if not positions:
        return []

    # Titles and pictures of the queries and of their hits.
    rows = evaluation.rows["ann"][positions, :hits]
    ids = index.ids(rows)
    shown_ids = {product_id for product_id in ids.ravel() if product_id is not None}
    cards = catalogue.products(shown_ids, images=True)
    query_cards = catalogue.query_cards({queries.ids[p] for p in positions}, images=True)
    found = index.search(
        queries.vectors[positions],
        DEPTH + 1,
        nprobe=evaluation.report["settings"]["nprobe"],
    )

    # A section for each query, with scores where the search for them found the same product.
    sections = []
    for number, position in enumerate(positions):
        scores = found.scores[number].tolist()
        score_of = dict(zip(found.rows[number].tolist(), scores, strict=True))
        shown = []
        for product_id, row in zip(ids[number], rows[number].tolist(), strict=True):
            if product_id is not None:
                score = score_of.get(row, float("nan"))
                card = cards.get(product_id, Card())
                is_relevant = row in queries.relevant[position]
                shown.append(Hit(product_id, score, card, is_relevant))
        query_id = queries.ids[position]
        query_type = queries.query_types[position]
        card = _visible_card(query_cards.get(query_id, Card()), query_type)
        sections.append(Section(card, shown, query_id, f"query type: {query_type}"))
    return sections


def _visible_card(card: Card, query_type: str) -> Card:
    """The parts of a card that a query of this type contains."""
    parts = {
        "product:text": Card(text=card.text),
        "product:image": Card(images=card.images),
        "product:attribute": Card(attributes=card.attributes),
    }
    return parts.get(query_type, card)


# ---------------------------------------------------------------------- tables of the page


def _html_table(task: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """One task as a table; that of exact search also has the untrained rows."""
    rows = []
    for query_type in report["queries"]:
        for row in rows_of_type(report, query_type):
            is_untrained = row.key not in TASKS
            if row.key == task or (task == "exact" and is_untrained):
                rows.append(_html_row(report, query_type, row))
    columns = ["query type", "row", *COLUMNS, "gain in ndcg@10"]
    return {"title": TASKS[task], "note": NOTES[task], "columns": columns, "rows": rows}


def _html_row(report: Mapping[str, Any], query_type: str, row: FigureRow) -> list[dict[str, Any]]:
    gain = gain_of(report, query_type, row.key)
    cells = [_html_cell(query_type), _html_cell(f"{row.name}{gain.mark}", below=gain.is_below)]
    for column in COLUMNS:
        figure = row.figures.get(column)
        if figure is None:
            cells.append(_html_cell(""))
            continue
        # "[low, high]", and the best possible value where that is below 1.
        interval = ""
        if "low" in figure:
            interval = f"[{figure['low']:.2f}, {figure['high']:.2f}]"
        best = row.figures.get(f"best_{column}")
        if best is not None and best["value"] < 1:
            interval += f" best {best['value']:.3f}"
        cells.append(_html_cell(f"{figure['value']:.3f}", interval))
    cells.append(_html_cell(gain.text, below=gain.is_below))
    return cells


def _html_cell(value: str, interval: str = "", below: bool = False) -> dict[str, Any]:
    return {"value": value, "interval": interval, "below": below}


# ---------------------------------------------------------------------- plots of the page


def _plots(evaluation: Evaluation) -> list[dict[str, str]]:
    """Both plots as PNG data URLs with their captions."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    # Drawn to PNG in memory, so the page needs no other file.
    plots = []
    for draw, caption in (
        (_draw_bars, "hit@10 for each query type, with 95 % intervals"),
        (_draw_curves, "Recall of the index by number of results; dotted: the best possible"),
    ):
        figure, axes = pyplot.subplots(figsize=(6, 3.6), dpi=110)
        draw(axes, evaluation)
        axes.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        pyplot.close(figure)
        plots.append({"image": data_url(buffer.getvalue(), "png"), "caption": caption})
    return plots


def _draw_bars(axes: Any, evaluation: Evaluation) -> None:
    """hit@10 with its interval: a group of bars for each query type, a bar for each row."""
    report = evaluation.report
    query_types = list(report["queries"])
    series = {
        "exact": report["tasks"]["exact"],
        "ann": report["tasks"]["ann"],
        **report["baselines"],
    }
    width = 0.8 / len(series)
    for number, (name, figures) in enumerate(series.items()):
        # Bars of the searches are side by side.
        places = []
        values = []
        for place, query_type in enumerate(query_types):
            if query_type in figures:
                figure = figures[query_type]["hit@10"]
                places.append(place)
                values.append([figure["value"], figure["low"], figure["high"]])
        bars = np.array(values)  # (T, 3)
        errors = np.abs(bars[:, 1:] - bars[:, :1]).T  # (2, T)
        axes.bar(
            np.array(places) + (number - (len(series) - 1) / 2) * width,
            bars[:, 0],
            width,
            yerr=errors,
            label=TASKS.get(name) or row_name(name),
            error_kw={"linewidth": 0.8},
        )
    axes.set_xticks(range(len(query_types)), query_types, rotation=20, ha="right", fontsize=8)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("hit@10")
    axes.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.18), frameon=False)


def _draw_curves(axes: Any, evaluation: Evaluation) -> None:
    """Recall through the index by k, beside that of a perfect ranking."""
    queries = evaluation.queries
    for number, query_type in enumerate(queries.distinct_types):
        positions = queries.positions_of_type(query_type)
        rows = evaluation.rows["ann"][positions]
        relevant = queries.relevant[positions]
        count: NDArray[np.int64] = (relevant >= 0).sum(axis=1)
        # What the index reaches, and what a perfect ranking would reach.
        reached = []
        possible = []
        for k in PLOTTED_CUTS:
            reached.append(recall_at_k_per_query(rows, relevant, k).mean())
            possible.append((np.minimum(k, count) / count).mean())
        color = f"C{number}"
        axes.plot(PLOTTED_CUTS, reached, color=color, label=query_type)
        axes.plot(PLOTTED_CUTS, possible, ":", color=color, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(PLOTTED_CUTS, PLOTTED_CUTS)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("k")
    axes.set_ylabel("recall@k")
    axes.legend(fontsize=7, frameon=False)
