"""Checks on a report: warnings about the index, and figures that must be reached."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

MAX_INDEX_LOSS = 0.01
"""A larger loss of hit@10 or recall@10 through the index is warned about."""

_GATE = re.compile(r"(exact|ann|ann_vs_exact)\.([^.\s]+)\.([^.\s]+)\s*>=\s*([0-9.]+)")


def index_warnings(report: Mapping[str, Any]) -> list[str]:
    """One line for each query type that loses more than a point of recall by the index.

    Args:
        report: with `tasks`, as `evaluate` makes it.
    """
    warnings = []
    for query_type, exact in report["tasks"]["exact"].items():
        ann = report["tasks"]["ann"][query_type]
        # Rounding must not cause a warning, hence the 1e-9.
        losses = []
        for metric in ("hit@10", "recall@10"):
            best = exact[metric]["value"]
            reached = ann[metric]["value"]
            if best - reached > MAX_INDEX_LOSS + 1e-9:
                losses.append(f"{metric} {best:.3f} -> {reached:.3f}")
        if losses:
            warnings.append(
                f"queries of type {query_type} lose by the index ({', '.join(losses)}, exact "
                "search -> index): build it with --recall 0.99 --queries QUERIES, or with "
                "--factory Flat for exact search"
            )
    return warnings


def failed_gates(report: Mapping[str, Any], gates: Sequence[str]) -> list[str]:
    """One line for each figure below its gate.

    Args:
        report: as `evaluate` makes it.
        gates: "TASK.TYPE.METRIC>=FLOOR" each; TYPE is a query type, or * for every one.

    Raises:
        ValueError: a gate of another form, or a query type or metric that the report lacks.
    """
    failures = []
    for gate in gates:
        # "TASK.TYPE.METRIC>=FLOOR"
        match = _GATE.fullmatch(gate.strip())
        if match is None:
            raise ValueError(f"gate {gate!r}; expected for example ann_vs_exact.*.recall@10>=0.95")
        task, wanted_type, metric, floor = match.groups()
        figures = report["tasks"][task]
        for query_type in figures if wanted_type == "*" else [wanted_type]:
            if query_type not in figures or metric not in figures[query_type]:
                raise ValueError(
                    f"gate {gate!r}: no {query_type}.{metric} in task {task}; query types are "
                    f"{', '.join(figures)}"
                )
            value = figures[query_type][metric]["value"]
            if not value >= float(floor):
                failures.append(f"{task}.{query_type}.{metric} is {value:.4f}, below {floor}")
    return failures
