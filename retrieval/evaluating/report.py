"""An evaluation as a terminal table, report.json and one self-contained page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tritower.artefacts import storage
from tritower.retrieval.evaluating.comparison import CUTS, DEPTH
from tritower.retrieval.evaluating.comparison_table import TASKS, gain_of, row_name, rows_of_kind
from tritower.retrieval.evaluating.evaluate import Evaluation, index_warnings
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
    "exact": "Relevant products, found by comparing with every vector: how good the embeddings "
    "are. Some rows need "
    "no training; the best of them has a star, and the gain is what the model adds to it on the "
    "same queries.",
    "ann": "Relevant products, found through the index: what users get.",
    "ann_vs_exact": "The index against exact search, whose first k results are the relevant ones: "
    "what it costs.",
}


def write_report(
    folder: Path,
    evaluation: Evaluation,
    sections: Sequence[Section],
    oracle: Mapping[str, Any] | None = None,
) -> None:
    """Write `report.json` and `report.html`.

    Args:
        folder: where; made when missing.
        evaluation: what was measured.
        sections: example queries with their hits.
        oracle: what an oracle's file says, stored beside the figures.
    """
    report = evaluation.report
    if oracle is not None:
        report["oracle"] = dict(oracle)
    report["warnings"] = index_warnings(report)
    storage.write_json(folder / "report.json", report)
    page = render(
        "report.html",
        summary=summary(report),
        plots=_plots(evaluation),
        tables=[_html_table(task, report) for task in TASKS],
        sections=sections_of(sections),
    )
    storage.write_text(folder / "report.html", page)


def summary(report: Mapping[str, Any]) -> str:
    """One sentence of what was measured."""
    index = report["index"]
    settings = report["settings"]
    latency = report.get("latency")
    parts = [
        f"{index['count']:,} products, {index['factory']}, {index['bytes_per_product']:,.0f} bytes "
        "a product",
        f"split {settings['split'] or 'all'}, relevant from grade {settings['threshold']:g}",
    ]
    if settings["nprobe"]:
        parts.append(f"{settings['nprobe']} lists probed")
    if latency:
        parts.append(
            f"{latency['p50_ms']:.2f} ms p50, {latency['p99_ms']:.2f} ms p99 a query on one "
            "thread, "
            f"{latency['qps']:,.0f} queries/s on {latency['threads']} (load {latency['load']})"
        )
    if report["dropped_queries"]:
        parts.append(f"{report['dropped_queries']:,} queries without relevant products dropped")
    if report["identical_to_source"]:
        what = "left out" if settings["exclude_identical"] else "counted"
        parts.append(
            f"{report['identical_to_source']:,} queries met products with the same vector as "
            f"theirs ({what})"
        )
    return "; ".join(parts)


def examples(
    evaluation: Evaluation,
    index: ProductIndex,
    catalogue: PreparedCatalogue,
    per_kind: int,
    hits: int = 8,
) -> list[Section]:
    """A few measured queries of each kind with their first hits, drawn at random."""
    questions = evaluation.questions
    found = evaluation.found["ann"]
    generator = np.random.default_rng(0)
    chosen = [
        int(i)
        for kind in questions.all_kinds
        for i in generator.permutation(questions.of_kind(kind))[:per_kind]
    ]
    rows = found[chosen, :hits] if chosen else np.zeros((0, hits), np.int64)
    ids = index.ids(rows)
    cards = catalogue.products({i for i in ids.ravel() if i is not None}, images=True)
    asked = catalogue.query_cards({questions.ids[i] for i in chosen}, images=True)
    vectors = questions.vectors[chosen]
    nprobe = evaluation.report["settings"]["nprobe"]
    scores = index.search(vectors, DEPTH + 1, nprobe=nprobe) if chosen else None
    sections = []
    for n, i in enumerate(chosen):
        if scores:
            score_of = dict(zip(scores.rows[n].tolist(), scores.scores[n].tolist(), strict=True))
        else:
            score_of = {}
        shown = []
        for product_id, row in zip(ids[n], rows[n].tolist(), strict=True):
            if product_id is not None:
                shown.append(
                    Hit(
                        product_id,
                        score_of.get(row, float("nan")),
                        cards.get(product_id, Card()),
                        row in questions.relevant[i],
                    )
                )
        query = _as_asked(asked.get(questions.ids[i], Card()), questions.kinds[i])
        sections.append(Section(query, shown, questions.ids[i], f"kind: {questions.kinds[i]}"))
    return sections


def _as_asked(card: Card, kind: str) -> Card:
    """Only what a query of this kind shows."""
    return {
        "product:text": Card(text=card.text),
        "product:image": Card(images=card.images),
        "product:attribute": Card(attributes=card.attributes),
    }.get(kind, card)


def _interval(figure: Mapping[str, float]) -> str:
    return f"[{figure['low']:.2f}, {figure['high']:.2f}]"


def _html_table(task: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """One task as a table; exact search also has the untrained rows and the model's gain."""
    rows = []
    for kind in report["queries"]:
        shown = []
        for row in rows_of_kind(report, kind):
            if row[1] == task or (task == "exact" and row[1] not in TASKS):
                shown.append(row)
        for name, key, figures in shown:
            mark, gain, is_below = gain_of(report, kind, key)
            cells = [_html_cell(kind), _html_cell(f"{name}{mark}", below=is_below)]
            for column in COLUMNS:
                figure = figures.get(column)
                best = figures.get(f"best_{column}")
                interval = "" if figure is None or "low" not in figure else _interval(figure)
                if best is not None and best["value"] < 1:
                    interval += f" best {best['value']:.3f}"
                cells.append(
                    _html_cell("" if figure is None else f"{figure['value']:.3f}", interval)
                )
            rows.append([*cells, _html_cell(gain, below=is_below)])
    columns = ["kind", "row", *COLUMNS, "gain in ndcg@10"]
    return {"title": TASKS[task], "note": NOTES[task], "columns": columns, "rows": rows}


def _html_cell(value: str, interval: str = "", below: bool = False) -> dict[str, Any]:
    return {"value": value, "interval": interval, "below": below}


def _plots(evaluation: Evaluation) -> list[dict[str, str]]:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    plots = []
    for draw, caption in (
        (_draw_bars, "hit@10 per kind of query, with 95 % intervals"),
        (_draw_curves, "Recall of the index by number of results; dotted: the best reachable"),
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
    report = evaluation.report
    kinds = list(report["queries"])
    series = {
        "exact": report["tasks"]["exact"],
        "ann": report["tasks"]["ann"],
        **report["baselines"],
    }
    width = 0.8 / len(series)
    for n, (name, by_kind) in enumerate(series.items()):
        there = [kind for kind in kinds if kind in by_kind]
        values = np.array(
            [[by_kind[kind]["hit@10"][key] for key in ("value", "low", "high")] for kind in there]
        )
        at = np.array([kinds.index(kind) for kind in there]) + (n - (len(series) - 1) / 2) * width
        errors = np.abs(values[:, 1:] - values[:, :1]).T
        axes.bar(
            at,
            values[:, 0],
            width,
            yerr=errors,
            label=TASKS.get(name) or row_name(name),
            error_kw={"linewidth": 0.8},
        )
    axes.set_xticks(range(len(kinds)), kinds, rotation=20, ha="right", fontsize=8)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("hit@10")
    axes.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.18), frameon=False)


def _draw_curves(axes: Any, evaluation: Evaluation) -> None:
    questions = evaluation.questions
    cuts = [1, 2, 3, 5, 10, 20, 50, CUTS[-1]]
    for n, kind in enumerate(questions.all_kinds):
        of = questions.of_kind(kind)
        found = evaluation.found["ann"][of]
        relevant = questions.relevant[of]
        count = (relevant >= 0).sum(axis=1)
        axes.plot(
            cuts,
            [recall_at_k_per_query(found, relevant, k).mean() for k in cuts],
            color=f"C{n}",
            label=kind,
        )
        axes.plot(
            cuts,
            [(np.minimum(k, count) / count).mean() for k in cuts],
            ":",
            color=f"C{n}",
            linewidth=0.8,
        )
    axes.set_xscale("log")
    axes.set_xticks(cuts, cuts)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("k")
    axes.set_ylabel("recall@k")
    axes.legend(fontsize=7, frameon=False)
