"""Build an index, killed again and again; prints what came of it as JSON.

python killed_builds.py EMBEDDINGS FOLDER KILLS OLD_INDEX|- FACTORY
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

from forks import ended, forked, kill

import tritower.retrieval.building.build
import tritower.retrieval.building.candidates
import tritower.retrieval.showing.search_result  # noqa: F401
from tritower.artefacts import storage, versions
from tritower.commands import index
from tritower.retrieval.ivf import ivf_pq as mapped


def build(embeddings: str, root: Path, factory: str, log: Path) -> int:
    encode, noted = (
        mapped.TrainedQuantizers.encode,
        os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    )

    def noting(self, vectors):
        os.write(noted, b".")
        return encode(self, vectors)

    mapped.TrainedQuantizers.encode = noting
    arguments = [
        "--embeddings",
        embeddings,
        "--output",
        str(root),
        "--factory",
        factory,
        "--overwrite",
    ]
    return index.main(["build", *arguments])


def checked(root: Path, had_version: bool) -> None:
    """A version in use is good at any moment; one that was there is never gone."""
    if had_version or (root / "CURRENT").exists():
        storage.verify(versions.current(root), "index")


def digests(root: Path) -> dict[str, str]:
    return {
        name: entry.sha256 for name, entry in storage.verify(versions.current(root)).files.items()
    }


def main(embeddings: str, folder: Path, kills: int, old: str, factory: str) -> None:
    chance, output = random.Random(0), folder / "output.txt"
    started = time.monotonic()
    code = ended(
        forked(lambda: build(embeddings, folder / "whole", factory, folder / "whole.log"), output)
    )
    took = time.monotonic() - started
    assert code == 0, output.read_text()
    expected, blocks = digests(folder / "whole"), (folder / "whole.log").stat().st_size
    done = {
        "kills": 0,
        "builds": 0,
        "equal": 0,
        "left": 0,
        "encoded too often": 0,
        "blocks": blocks,
    }
    while done["kills"] < kills:
        place = folder / str(done["builds"])
        root, log = place / "index", place / "log"
        place.mkdir()
        had_version = old != "-" and done["builds"] % 2 == 1
        if had_version:
            shutil.copytree(old, root)
        killed = 0
        while True:
            child = forked(lambda root=root, log=log: build(embeddings, root, factory, log), output)
            time.sleep(chance.uniform(0, took))
            finished = os.waitpid(child, os.WNOHANG)
            if finished[0]:
                code = os.waitstatus_to_exitcode(finished[1])
            elif done["kills"] < kills:
                code = kill(child)
            else:
                code = ended(child)
            if code >= 0:
                break
            killed += 1
            done["kills"] += 1
            checked(root, had_version)
        assert code == 0, output.read_text()
        done["builds"] += 1
        done["equal"] += digests(root) == expected
        done["left"] += len([*place.rglob("*.tmp"), *place.glob("*.building")])
        done["encoded too often"] += max(
            0, log.stat().st_size - blocks * _versions_made(root, had_version) - killed
        )
        if done["builds"] > 1:
            shutil.rmtree(place)
    print(json.dumps(done))


def _versions_made(root: Path, had_version: bool) -> int:
    """A build killed after it has published, before it has ended, is made once more when it is run
    again.
    """
    return int(versions.current(root).name) - had_version


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
