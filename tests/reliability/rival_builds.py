"""Two builds of one place begin at the same moment; prints how each pair ended as JSON.

python rival_builds.py EMBEDDINGS FOLDER ROUNDS OLD_INDEX|- FACTORY
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from forks import ended, forked

import tritower.retrieval.building.build
import tritower.retrieval.building.candidates
import tritower.retrieval.showing.search_result  # noqa: F401
from tritower.commands import index


def main(embeddings: str, folder: Path, rounds: int, old: str, factory: str) -> None:
    outcomes = []
    for number in range(rounds):
        root = folder / str(number) / "index"
        root.parent.mkdir()
        if old != "-":
            shutil.copytree(old, root)
        reading, writing = os.pipe()

        def build(seed, root=root, reading=reading, writing=writing):
            os.close(writing)
            os.read(reading, 1)  # ends when the starter closes its end
            arguments = [
                "--embeddings",
                embeddings,
                "--output",
                str(root),
                "--factory",
                factory,
                "--seed",
                str(seed),
            ]
            return index.main(["build", *arguments, *(["--overwrite"] if old != "-" else [])])

        outputs = [root.with_name(f"output{seed}.txt") for seed in (0, 1)]
        children = [
            forked(lambda seed=seed, build=build: build(seed), output)
            for seed, output in enumerate(outputs)
        ]
        os.close(writing)
        codes = [ended(child) for child in children]
        os.close(reading)
        outcomes.append(
            {
                "codes": codes,
                "outputs": [output.read_text() for output in outputs],
                "index": str(root),
            }
        )
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
