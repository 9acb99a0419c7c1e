"""`index.py verify`: compare every byte of an index with its digests."""

from __future__ import annotations

import sys
from pathlib import Path

from tritower.artefacts.storage import ArtefactError


def verify(index: Path) -> int:
    """Compare every byte of an index with its digests.

    The exit code is 1 where something is damaged. Opening an index does so too, but of very large
    files only for samples.

    Args:
        index: index folder: all its versions are read.
    """
    from tritower.artefacts import storage, versions

    folders = versions.versions(index) or [index]
    problems = []
    # Every version, not only the one in use.
    for folder in folders:
        try:
            manifest = storage.verify(folder, "index")
        except ArtefactError as error:
            problems.append(str(error))
            continue
        total = sum(entry.bytes for entry in manifest.files.values())
        print(f"{folder}: {len(manifest.files)} files, {total:,} bytes: good")
    if folders != [index]:
        print(f"in use: {versions.current(index).name}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        return 1
    return 0
