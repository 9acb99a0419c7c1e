"""Prepare a catalogue with options by their names, as the command line takes them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from tritower.datamodules.prepare import command
from tritower.datamodules.prepare.summary import Report

GROUPS = {
    "judged": command.JudgedFiles,
    "columns": command.ColumnOptions,
    "pictures": command.PictureOptions,
    "text": command.TextOptions,
    "splits": command.SplitOptions,
    "run": command.RunOptions,
}


def prepare(products: Path, output: Path | None = None, *places: Path, **options: Any) -> Report:
    """`prepare` with flat options; `places` are image_root and columns."""
    options |= dict(zip(("image_root", "columns"), places, strict=False))
    groups = {}
    for name, kind in GROUPS.items():
        own = {f.name: options.pop(f.name) for f in fields(kind) if f.name in options}
        groups[name] = kind(**own)
    assert not options, f"no such options: {list(options)}"
    return command.prepare(products, output, **groups)
