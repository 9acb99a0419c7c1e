"""Command lines of the benchmarks, and the options that those on catalogues share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tritower.terminal.commands import call, make_command_parser

Split = Literal["val", "test"]

ALL: list[str] = []
"""Default of a list of names: all of them."""


@dataclass(frozen=True)
class Folders:
    """What benchmarks on catalogues read and write.

    Attributes:
        data: folder of the raw catalogues of docs/data.md.
        weights: folder of all-minilm-l6-v2/ and tf_efficientnet_lite0.safetensors.
        json: where figures are stored, and resumed from.
        work: folder of everything that is made; it may be kept between runs.
    """

    data: Path
    weights: Path
    json: Path
    work: Path = Path("benchmarks/results/catalogues")


@dataclass(frozen=True)
class Reading:
    """Which queries are measured.

    Attributes:
        split: of the queries; test is for the final table.
        again: why arms are read on the test split that were read before.
    """

    split: Split = "val"
    again: str | None = None


def run(module: str, main: Callable[..., Any], about: str) -> None:
    """Parse the command line of a benchmark and call its main function.

    Args:
        module: name of the module, "benchmarks.ablation".
        main: its parameters become options.
        about: description.
    """
    parser = make_command_parser(f"python -m {module}", about, main)
    call(main, parser.parse_args().as_dict())


def chosen(names: list[str], known: Iterable[str]) -> list[str]:
    """The named ones; all if none is named.

    Raises:
        SystemExit: a name that is not known.
    """
    known = list(known)
    for name in names:
        if name not in known:
            quoted = ", ".join(f'"{one}"' for one in known)
            raise SystemExit(
                f'there is no "{name}"; choose of {quoted} (a name with a space needs its quotes).'
            )
    return names or known
