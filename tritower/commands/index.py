"""The commands of an index: `python index.py embed | build | search | evaluate | update | verify`.

Each command explains its options: `python index.py search --help`. docs/indexes.md is the guide.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from tritower.artefacts.storage import ArtefactError
from tritower.commands.build import build
from tritower.commands.embed import embed
from tritower.commands.evaluate import evaluate
from tritower.commands.search import search
from tritower.commands.update import update
from tritower.commands.verify import verify
from tritower.terminal.commands import exit_code, make_parser, run

COMMANDS: dict[str, Callable[..., int]] = {
    "embed": embed,
    "build": build,
    "search": search,
    "evaluate": evaluate,
    "update": update,
    "verify": verify,
}
USER_ERRORS = (ArtefactError, ValueError, OSError)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `tritower-index`.

    Returns:
        The exit code: 1 for a problem with what was given, 2 for usage.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("tritower").setLevel(logging.INFO)
    parser = make_parser("index.py", __doc__ or "", COMMANDS)
    return exit_code(lambda: run(parser, COMMANDS, arguments), USER_ERRORS, "interrupted")
