"""The facts of a run: as report.json keeps them, and as a person reads them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from tritower.datamodules.prepare.columns import ATTRIBUTES, Columns
from tritower.datamodules.prepare.preparation import Preparation
from tritower.datamodules.prepare.splits import SPLIT_NAMES, SplitPlan, leaks, product_leaks

Report = dict[str, Any]


def make_report(
    run: Preparation, columns: Columns, split_plan: SplitPlan, query_splits: list[str]
) -> Report:
    """The content of report.json; it depends only on the input and the settings."""
    members = run.members
    counts = next(iter(run.log.files.values()))
    # Products that joined another family because they share a picture.
    moved = sum(
        own != family for own, family in zip(members.families, split_plan.families, strict=True)
    )
    queries = zip(run.queries.contents, query_splits, run.queries.ids, strict=True)
    return {
        "rows": counts.rows,
        "accepted": counts.accepted,
        "rejected": counts.rejected,
        "files": {name: file.to_dict() for name, file in run.log.files.items()},
        "problems": dict(sorted(run.log.codes.items())),
        "columns": {
            role: [c.name for c in columns.of(role)] for role in ("text", "image", *ATTRIBUTES)
        },
        "products": {name.replace(" ", "_"): number for name, number in sorted(run.counts.items())},
        "splits": _count_splits(split_plan.splits),
        "groups": _of_two_or_more(members.groups),
        "families": _of_two_or_more(split_plan.families),
        "family_from_picture": moved,
        "largest_set": split_plan.largest,
        "placeholder_pictures": {
            picture.hex(): n for picture, n in sorted(split_plan.placeholders.items())
        },
        "leaks": product_leaks(members, split_plan) | {"query": leaks(queries)},
        "queries": {
            "count": len(run.queries),
            "splits": _count_splits(query_splits),
            "judgements": len(run.judgements) - run.judgements.repeated,
            "irrelevant": run.judgements.irrelevant,
            "repeated": run.judgements.repeated,
            "unread_columns": run.unread,
        },
    }


def _count_splits(splits: list[str]) -> dict[str, int]:
    counts = Counter(splits)
    return {name: counts[name] for name in SPLIT_NAMES}


def _of_two_or_more(keys: list[str | None]) -> int:
    """How many groups or families have two members or more."""
    return sum(count > 1 for key, count in Counter(keys).items() if key is not None)


def summary(report: Report, seconds: float, output: Path) -> dict[str, str]:
    """What a person wants to know of a run, by name."""
    products = report["products"]
    queries = report["queries"]
    leaking = []
    for leak_type, leak in report["leaks"].items():
        if leak["count"]:
            leaking.append(f"{leak_type} {leak['count']:,}")
    # What people look at first: how many products, pictures and splits there are.
    facts = {
        "products": f"{report['accepted']:,}, with picture {products['with_picture']:,}, with text "
        f"{products['with_text']:,}, with attributes {products['with_attributes']:,}",
        "pictures": f"{products['pictures']:,}",
        "splits": _numbers(report["splits"]),
        "groups": f"{report['groups']:,} of two or more",
        "families": f"{report['families']:,} of two or more; "
        f"by picture {report['family_from_picture']:,} products",
        "leaks": "none between splits"
        if not leaking
        else f"{', '.join(leaking)}: in more than one split, see report.json",
    }
    if report["placeholder_pictures"]:
        most = max(report["placeholder_pictures"].values())
        facts["placeholders"] = (
            f"{len(report['placeholder_pictures'])} pictures that up to {most:,} products share"
        )
    if queries["count"]:
        facts["queries"] = f"{queries['count']:,}: {_numbers(queries['splits'])}"
        if queries["repeated"]:
            repeated = f", and {queries['repeated']:,} rows that repeat one"
        else:
            repeated = ""
        facts["judgements"] = f"{queries['judgements']:,}{repeated}"
        unread = []
        for name, columns in queries["unread_columns"].items():
            if columns:
                unread.append(f"{name}: {', '.join(columns)}")
        if unread:
            facts["not read"] = "; ".join(unread)
    facts["time"] = f"{seconds:,.1f} s, {report['rows'] / max(seconds, 0.1):,.0f} rows/s"
    facts["catalogue"] = str(output)
    return facts


def _numbers(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())
