"""Counts what the tests of reliability did, and shows it as a table once all of them have run."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import faiss
import numpy as np
import pytest
from small import FULL

FIGURES = pytest.StashKey[Counter]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash.setdefault(FIGURES, Counter())


@pytest.fixture(autouse=True, scope="session")
def quick() -> Iterator[None]:
    """A flush takes long; what flushes are worth is told by a disk that loses power, not by the
    machine's own.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Counter:
    """Figure -> number; tests add to it."""
    return pytestconfig.stash.setdefault(FIGURES, Counter())


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    figures = config.stash.setdefault(FIGURES, Counter())
    if not FULL or not figures:
        return
    width = max(map(len, figures))
    terminalreporter.section("reliability")
    for name, number in figures.items():
        terminalreporter.write_line(f"{name:<{width}}  {number:>9,}")
    if target := os.environ.get("TRITOWER_RELIABILITY_REPORT"):
        machine = {
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        }
        report = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "passed": int(exitstatus) == 0,
            "machine": {**machine, "faiss": faiss.__version__, "numpy": np.__version__},
            "command": " ".join(sys.argv),
            "figures": dict(figures),
        }
        Path(target).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
