"""Index files that somebody has changed on purpose, digests and all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small import FACTORY, FULL, ROOT, build, describe, embed

from tritower.artefacts import versions

MEMORY_MIB, SECONDS = 512, 20


@pytest.mark.parametrize("factory", [FACTORY, "IVF8,PQ4x4fs", "Flat"])
def test_files_changed_with_their_digests_end_at_most_the_process_that_opens_them(
    tmp_path, factory, figures
):
    embeddings = embed(tmp_path / "e", 200)
    root = build(embeddings, tmp_path / "index", factory, attributes=describe(embeddings))
    (tmp_path / "work").mkdir()
    cases = 700 if FULL else 25
    arguments = [versions.current(root), tmp_path / "work", cases, MEMORY_MIB, SECONDS]
    program = Path(__file__).with_name("hostile_files.py")
    done = subprocess.run(
        [sys.executable, program, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["unexpected"] == []
    assert sum(report["done"][outcome] for outcome in ("refused", "answered", "ended")) == cases
    assert (
        report["done"]["refused"] > cases / 10 and report["most_bytes"] < (MEMORY_MIB + 512) << 20
    )
    for outcome in ("refused", "answered", "ended"):
        figures[f"T38 files changed on purpose: process {outcome}"] += report["done"][outcome]
