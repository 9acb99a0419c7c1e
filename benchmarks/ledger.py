"""Every reading of a test split: `benchmarks/test_reads.json`, a file under version control.

An arm is read once for each catalogue and its splits. A run that was interrupted goes on with the
arms that it lacks. An arm that was read is refused, or read again for a reason that is kept:
`--again REASON`.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tritower.artefacts.storage import write_json

LEDGER = Path(__file__).with_name("test_reads.json")


class Ledger:
    """The readings so far, and those that this run adds.

    Args:
        file: list of {"date", "commit", "catalogue", "splits", "command", "arms", "reason"}.
            "splits" is the salt of `benchmarks.splits`, null for a catalogue's own splits.
        again: why arms are read that were read before; null refuses them.
    """

    def __init__(self, file: Path = LEDGER, again: str | None = None) -> None:
        self.file = file
        self.again = again
        self.commit = commit()  # of the start: the ledger itself changes while a run goes on
        if file.is_file():
            text = file.read_text(encoding="utf-8")
        else:
            text = "[]"
        self.reads: list[dict[str, Any]] = json.loads(text)
        self.of_this_run: dict[tuple[str, int | None], dict[str, Any]] = {}

    def check(self, catalogue: str, salt: int | None, arms: Iterable[str]) -> None:
        """Before anything is read.

        Raises:
            SystemExit: one of the arms was read, and there is no reason to read it again.
        """
        if self.again is not None:
            if not self.again.strip():
                raise SystemExit("--again is empty: say why the test split is read again.")
            return
        wanted = set(arms)
        for read in self.reads:
            of_it = (read["catalogue"], read["splits"]) == (catalogue, salt)
            if of_it and (known := sorted(wanted & set(read["arms"]))):
                raise SystemExit(
                    f"{self.file}: {', '.join(known)} of {catalogue} (splits: {salt}) was read on "
                    f"the test split on {read['date']} at commit {read['commit']}. "
                    "Give --again REASON, which is kept, or work on val."
                )

    def add(self, catalogue: str, salt: int | None, arm: str) -> None:
        """Write down that an arm is read; called before its figures are kept."""
        entry = self.of_this_run.get((catalogue, salt))
        if entry is None:
            entry = {
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "commit": self.commit,
                "catalogue": catalogue,
                "splits": salt,
                "command": command(),
                "arms": [],
                "reason": self.again,
            }
            self.of_this_run[catalogue, salt] = entry
            self.reads.append(entry)
        entry["arms"].append(arm)
        write_json(self.file, self.reads)


def commit() -> str:
    """The commit of the code, with a mark where files differ from it."""
    git = [
        "git",
        "-C",
        str(LEDGER.parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=9",
        "--exclude=*",
    ]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


def command() -> str:
    """This process's module and arguments, without the folders that they name."""
    module = Path(sys.argv[0]).stem
    return " ".join([f"python -m benchmarks.{module}", *map(_short, sys.argv[1:])])


def _short(argument: str) -> str:
    name, equals, value = argument.rpartition("=")
    if value.startswith("/"):
        return name + equals + Path(value).name
    return argument
