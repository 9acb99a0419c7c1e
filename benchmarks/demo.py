"""How the demo's models compare with the oracle of the sample catalogue.

Exit code 1 where they fall short.

    python -m benchmarks.demo demo

reads demo/raw/oracle.json, demo/report/report.json and the single towers' demo/NAME/test.json.
Figures are recall@10 of the same product queries of the test split, by exact search over the whole
catalogue.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SHARE_OF_ORACLE = 0.85
LEAD_OVER_SINGLE = 0.10
SINGLES = ("text", "image", "attribute")


def read(file: Path) -> dict[str, Any]:
    """A JSON file of the demo."""
    return dict(json.loads(file.read_text(encoding="utf-8")))


def main(folder: Path) -> int:
    """Print the comparison; returns the exit code."""
    oracle = read(folder / "raw" / "oracle.json")["recall@10"]
    tasks = read(folder / "report" / "report.json")["tasks"]
    fused, ann = (tasks[task]["fused"]["recall@10"]["value"] for task in ("exact", "ann"))
    singles = {n: read(folder / n / "test.json")["test/product_queries/recall@10"] for n in SINGLES}

    table = Table(title="recall@10 of product queries, test split", title_justify="left")
    for column in ("modalities", "oracle", "trained", "of the oracle"):
        table.add_column(column, justify="left" if column == "modalities" else "right")
    for subset, best in oracle.items():
        if subset == "+".join(SINGLES):
            trained = fused
        else:
            trained = singles.get(subset)
        if trained is None:
            share = []
        else:
            share = [f"{trained:.3f}", f"{trained / best:.2f}"]
        table.add_row(subset, f"{best:.3f}", *share)
    table.add_row("all three, through the index", "", f"{ann:.3f}", "")
    Console().print(table)

    floor = SHARE_OF_ORACLE * oracle["+".join(SINGLES)]
    best_single = max(singles.values())
    lead = f"it beats each single tower by {100 * LEAD_OVER_SINGLE:.0f} points"
    checks = {
        f"the fused model reaches {SHARE_OF_ORACLE} of the oracle": fused >= floor,
        lead: fused >= best_single + LEAD_OVER_SINGLE,
    }
    for claim, holds in checks.items():
        print(f"{'yes' if holds else 'NO ':3}  {claim}")
    print(
        f"queries with their hits as pictures: {folder / 'report' / 'report.html'}, "
        f"{folder / 'search.html'}"
    )
    if all(checks.values()):
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
