"""Run configurations as package data.

One YAML file is one run, and its first comment is the command that runs it.

From a checkout they are just `configs/*.yaml`; installed, the same names are found here.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def resolve(arguments: list[str]) -> list[str]:
    """Command-line arguments whose `--config configs/NAME.yaml` names a file.

    The user's own, else the packaged one.
    """
    resolved = list(arguments)
    for i, argument in enumerate(arguments):
        option, separator, value = argument.partition("=")
        if option not in ("--config", "-c"):
            continue
        place, name = (
            (i, value) if separator else (i + 1, arguments[i + 1] if i + 1 < len(arguments) else "")
        )
        packaged = FOLDER.parent / name
        if name.startswith("configs/") and not Path(name).exists() and packaged.is_file():
            resolved[place] = f"{option}={packaged}" if separator else str(packaged)
    return resolved
