"""Tables of an index, its candidates, operating points and updates."""

from __future__ import annotations

from pathlib import Path

from rich import box, filesize
from rich.table import Table
from rich.text import Text

from tritower.artefacts.storage import Manifest
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.ivf.spec import parse_ivf_pq
from tritower.retrieval.updating.update import UpdateReport


def describe_index(path: Path, manifest: Manifest) -> Table:
    """What an index is, as a table of two columns."""
    meta = manifest.meta
    size = sum(entry.bytes for entry in manifest.files.values())
    training = meta["training"]
    facts = {
        "index": str(path),
        "products": f"{meta['count']:,} of {meta['dim']} dimensions, {meta['metric']}",
        "factory": meta["factory"],
        "reason": meta["reason"],
        "size": f"{filesize.decimal(size)}, {size / meta['count']:,.0f} bytes a product",
        "model": meta["model"] or "unknown",
    }
    if training["vectors"]:
        if "per_list" in training:
            per_list = f", {training['per_list']:g} for each list"
        else:
            per_list = ""
        facts["trained"] = (
            f"on {training['vectors']:,} vectors (seed {training['seed']}){per_list}, "
            f"{training['device']}"
        )
    table = Table(show_header=False, box=None)
    for name, fact in facts.items():
        table.add_row(name, Text(fact))
    return table


def describe_candidates(manifest: Manifest) -> Table:
    """The indexes that were compared, the chosen one first."""
    table = Table(
        title="Candidates, predicted for all vectors: the slowest query type, s to encode",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    names = (
        "lists",
        "each in",
        "code B",
        "recall",
        "p50 ms",
        "p99 ms",
        "QPS",
        "RAM B",
        "disk B",
        "s",
        "",
    )
    for name in names:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    count = manifest.meta["count"]
    # The first candidate was chosen; the others show why they were not.
    for place, one in enumerate(manifest.meta["candidates"]):
        spec = parse_ivf_pq(one["factory"])
        point = one["point"]
        figures = ["", "", "", ""]
        if point is not None:
            figures = [
                f"{point['recall']:.4f}",
                f"{point['p50_ms']:.3f}",
                f"{point['p99_ms']:.3f}",
                f"{point['qps']:,}",
            ]
        table.add_row(
            f"{spec.lists:,}" if spec else one["factory"],
            str(1 + one["spill"]),
            str(spec.code_size) if spec else "",
            *figures,
            f"{one['resident_bytes'] / count:,.0f}",
            f"{one['disk_bytes'] / count:,.0f}",
            "" if one["seconds"] is None else f"{one['seconds']:.1f}",
            one["rejected_because"]
            or ("chosen" if not place else "" if point else f"at most {one['best_recall']:.3f}"),
        )
    return table


def describe_points(path: Path, recall: float) -> Table:
    """How a built index reaches how much recall.

    For each query type the cheapest way to a few of them.
    """
    tuning = ProductIndex.open(path).tuning
    table = Table(
        title="Operating points, on all vectors", title_justify="left", box=box.SIMPLE_HEAD
    )
    names = (
        "query_type",
        "for",
        "nprobe",
        "k_factor",
        "recall",
        "+-",
        "p50 ms",
        "p99 ms",
        "queries/s",
    )
    for name in names:
        table.add_column(name, justify="left" if name == "query_type" else "right", no_wrap=True)
    if tuning is None:
        return table
    for query_type in tuning.points:
        # A few recalls beside the one that the index was built for.
        for wanted in sorted({recall, 0.9, 0.95, 0.99}):
            point = tuning.nearest(wanted, query_type)
            if point.reaches(wanted) or wanted == recall:
                if wanted == recall:
                    label = f"{wanted:g} *"
                else:
                    label = f"{wanted:g}"
                table.add_row(
                    query_type,
                    label if point.reaches(wanted) else f"below {label}",
                    str(point.nprobe),
                    f"{point.k_factor:g}",
                    f"{point.held_out:.4f}",
                    f"{point.interval:.4f}",
                    f"{point.p50_ms:.3f}",
                    f"{point.p99_ms:.3f}",
                    f"{point.qps:,.0f}",
                )
    table.caption = (
        "* what it is searched for by default; recall of queries that had no part in the choice"
    )
    return table


def describe_update(report: UpdateReport) -> Table:
    """What an update did, and how the index was before and after it."""
    if report.version:
        title = f"version {report.version}"
    else:
        title = "nothing to do"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in ("before", "after"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("given", "added", "replaced", "unchanged", "deleted"):
        table.add_row(name, "", f"{getattr(report, name):,}")
    if report.unknown:
        examples = ", ".join([*report.unknown[:3], *["..."] * (len(report.unknown) > 3)])
        table.add_row(Text(f"to delete, but not there: {examples}"), "", f"{len(report.unknown):,}")
    table.add_row("products", "", f"{report.count:,}")
    table.add_row(
        "rows, empty ones closed up" if report.compacted else "rows", "", f"{report.rows:,}"
    )
    # The state of the index before and after.
    if report.before is not None and report.after is not None:
        table.add_section()
        names = {
            "recall": "recall@10 of products",
            "imbalance": "imbalance of lists",
            "list_error": "distance to lists' centers",
            "new_list_error": "the same of new products",
            "code_error": "distance to codes",
            "new_code_error": "the same of new products",
            "new_refine_error": "distance of new products to vectors to re-rank by",
            "tombstone_share": "share of empty rows",
        }
        for name, words in names.items():
            values = (getattr(state, name) for state in (report.before, report.after))
            table.add_row(words, *("" if value is None else f"{value:.4f}" for value in values))
    table.caption = report.recommendation
    table.caption_justify = "left"
    return table
