"""The index benchmark as tables in the terminal and as plots."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.compare.figures import exponent, train_add

COLUMNS = ("train+add s", "tune s", "build s", "peak MB", "disk B", "own B", "touched B")
TUNING = ("choose", "measure")
AT = ("recall", "queries/s", "p50 ms", "p99 ms", "cold p50", "cold p99", "lists %")


def show(report: dict[str, Any]) -> None:
    """Print all tables."""
    console = Console(width=None if sys.stdout.isatty() else 170)
    for table in (_builds(report), *(_searches(report, level) for level in report["ratios"])):
        console.print(table)
    if isinstance(report.get("filters"), list):
        console.print(_filters(report["filters"]))
    if report.get("updates"):
        console.print(
            "update:", ", ".join(f"{name} {value}" for name, value in report["updates"].items())
        )


def _filters(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table(
        "searches among some rows, one at a time on one thread",
        "x: p50 over that of a search among all",
    )
    for name in ("rows", "share", "number", "recall@10", "p50 ms", "p99 ms", "x", "first ms"):
        table.add_column(name, justify="left" if name == "rows" else "right", no_wrap=True)
    for row in rows:
        figures = (
            f"{row['recall']:.3f}",
            f"{row['p50_ms']:.3f}",
            f"{row['p99_ms']:.3f}",
            f"{row['ratio']:.2f}",
        )
        table.add_row(
            row["filter"],
            f"{row['share']:.2%}",
            f"{row['rows']:,}",
            *figures,
            f"{row['first_ms']:.1f}",
        )
    return table


def _builds(report: dict[str, Any]) -> Table:
    data = report["data"]
    machine = report["machine"]
    table = _table(
        f"{data['n']:,} vectors of {data['dim']} dimensions, {machine['threads']} threads of "
        f"{machine['cpu']}",
        "per vector: disk; own = growth of anonymous memory; touched = with codes, rows and "
        "centers that are mapped. "
        "peak: all pages, those of mapped files too",
    )
    for name in ("arm", *COLUMNS, "index"):
        table.add_column(
            name, justify="left" if name in ("arm", "index") else "right", no_wrap=name != "index"
        )
    for name, arm in report["arms"].items():
        if arm["status"] != "ok":
            table.add_row(name, *["-"] * len(COLUMNS), arm["error"])
            continue
        build = arm["build"]
        figures = [
            _number(train_add(arm), ".1f"),
            _number(sum(build["seconds"].get(name, 0.0) for name in TUNING) or None, ".1f"),
            f"{build['total_s']:,.1f}",
            f"{build['peak_rss_bytes'] / 1e6:,.0f}",
            *(f"{arm[f'{what}_per_vector']:,.0f}" for what in ("disk", "resident", "touched")),
        ]
        table.add_row(name, *figures, build["settings"])
    return table


def _searches(report: dict[str, Any], level: str) -> Table:
    our_arms = list(report["ratios"][level])
    table = _table(
        f"recall@10 {level}: the cheapest measured point that reaches it",
        "x: queries a second of our arms over the row's, both interpolated to the recall itself; "
        "<=: the row could be "
        "faster, even its cheapest setting finds more; - : not reached",
    )
    for name in ("arm", *AT, *(f"{name} x" for name in our_arms), "settings"):
        table.add_column(
            name,
            justify="left" if name in ("arm", "settings") else "right",
            no_wrap=name != "settings",
        )
    for name, arm in report["arms"].items():
        if arm["status"] != "ok":
            continue
        at = arm["at"].get(level)
        if at is None:
            best = max((point["recall"] for point in arm["search"]["points"]), default=0.0)
            table.add_row(
                name, f"{best:.3f}", *["-"] * (len(AT) - 1 + len(our_arms)), "the most it reaches"
            )
            continue
        point = at["point"]
        share = point.get("lists_share")
        ratios = [report["ratios"][level][m].get(name) for m in our_arms]
        table.add_row(
            name,
            f"{point['recall']:.4f}",
            f"{point['qps']:,.0f}",
            f"{point['p50_ms']:.3f}",
            f"{point['p99_ms']:.3f}",
            _number(at.get("cold_p50_ms"), ".3f"),
            _number(at.get("cold_p99_ms"), ".3f"),
            _number(None if share is None else 100 * share, ".3f"),
            *(
                ("<=" if at.get("bound") and value else "") + _number(value, ".2f")
                for value in ratios
            ),
            ", ".join(
                str(v) if k == "parameters" else f"{k} {v:g}" for k, v in point["settings"].items()
            ),
        )
    return table


def draw(report: dict[str, Any], file: Path) -> Path:
    """Plot queries a second over recall, one line per arm; returns the file."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120)
    for name, arm in report["arms"].items():
        if arm["status"] == "ok":
            points = [point for point in arm["search"]["points"] if point["recall"] >= 0.6]
            own = name.startswith("ours")
            axes.plot(
                [point["recall"] for point in points],
                [point["qps"] for point in points],
                "o-" if own else "s--",
                linewidth=2 if own else 1,
                markersize=3,
                color="black" if name == "exact" else None,
                label=name,
            )
    axes.set_yscale("log")
    axes.set_xlabel("recall@10 against exact search")
    axes.set_ylabel(f"queries a second, {report['machine']['threads']} threads")
    axes.set_title(
        f"{report['data']['n']:,} vectors of {report['data']['dim']} dimensions", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    pyplot.close(figure)
    return file


GROWING: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "build s": lambda arm: arm["build"]["total_s"],
    "p50 ms at 0.95": lambda arm: arm["at"].get("0.95", {}).get("p50_ms"),
    "peak MB": lambda arm: arm["build"]["peak_rss_bytes"] / 1e6,
    "own MB": lambda arm: arm["search"]["resident_bytes"] / 1e6,
}
"""What is followed over the number of vectors."""


def growth(reports: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Figure -> arm -> [{n, value, exponent, times}], by n.

    Exponent and times from the report before.
    """
    reports = sorted(reports, key=lambda report: report["data"]["n"])
    found: dict[str, dict[str, list[dict[str, Any]]]] = {what: {} for what in GROWING}
    for report in reports:
        for name, arm in report["arms"].items():
            for what, value_of in GROWING.items() if arm["status"] == "ok" else ():
                value = value_of(arm)
                if not value or value <= 0:
                    continue
                rows = found[what].setdefault(name, [])
                n = report["data"]["n"]
                row: dict[str, Any] = {"n": n, "value": value, "exponent": None, "times": None}
                if rows and rows[-1]["n"] < n:
                    row["exponent"] = exponent((rows[-1]["n"], rows[-1]["value"]), (n, value))
                    row["times"] = value / rows[-1]["value"]
                rows.append(row)
    return found


def show_growth(reports: Sequence[dict[str, Any]], files: Sequence[Path]) -> int:
    """Print how figures grow with the number of vectors, and plot them beside the last file.

    Returns the exit code.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    found = growth(reports)
    table = _table(
        "growth with the number of vectors",
        "exponent e of value ~ N^e, and times, from the row before",
    )
    for name in ("figure", "arm", "N", "value", "exponent", "times"):
        table.add_column(
            name, justify="left" if name in ("figure", "arm") else "right", no_wrap=True
        )
    figure, plots = pyplot.subplots(
        1, len(found), figsize=(4 * len(found), 3.6), dpi=110, layout="constrained"
    )
    colors = {
        arm: f"C{i}"
        for i, arm in enumerate(dict.fromkeys(arm for arms in found.values() for arm in arms))
    }
    for axes, (what, arms) in zip(plots, found.items(), strict=True):
        for arm, rows in arms.items():
            for row in rows:
                cells = [f"{row['n']:,}", f"{row['value']:,.3f}", _number(row["exponent"], ".2f")]
                table.add_row(what, arm, *cells, _number(row["times"], ".2f"))
            values = [row["value"] for row in rows]
            axes.plot([row["n"] for row in rows], values, "o-", markersize=3, color=colors[arm])
        axes.set(xscale="log", yscale="log", xlabel="vectors", title=what)
        axes.grid(alpha=0.3)
    lines = [
        Line2D([], [], color=color, marker="o", markersize=3, label=arm)
        for arm, color in colors.items()
    ]
    figure.legend(handles=lines, fontsize=7, frameon=False, loc="outside right upper")
    file = files[-1].with_name("growth.png")
    figure.savefig(file)
    pyplot.close(figure)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(f"plot: {file}")
    return 0


def _table(title: str, caption: str) -> Table:
    return Table(title=title, caption=caption, box=box.SIMPLE_HEAD)


def _number(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{value:,{form}}"
