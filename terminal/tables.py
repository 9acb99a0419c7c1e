"""Tables on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

NARROWEST = 100
"""Columns assumed where the output is no terminal."""


def show(table: Table) -> None:
    """Print a table; wide enough to be read from a file too."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, NARROWEST))
    console.print(table)
