"""The shipped source as syntax trees, for the tests that check rules on it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FOLDERS = ("artefacts", "configs", "datamodules", "retrieval", "terminal", "towers", "tritower")
"""Of the checkout: all but `tritower` itself become packages inside of `tritower`."""


class Import(NamedTuple):
    """One imported module.

    Attributes:
        module: its full dotted name; for `from a import b` that is `a.b` where this is a module of
            ours, else `a`.
        line: 1-based.
        lazy: stands inside a function, so importing the file does not run it.
    """

    module: str
    line: int
    lazy: bool


def shipped_files() -> list[Path]:
    """Every Python file that the distribution holds."""
    return sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))


def module_name(path: Path) -> str:
    """`towers/text.py` -> `tritower.towers.text`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts).removesuffix(".__init__")
    return name if parts[0] == "tritower" else f"tritower.{name}"


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of one file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> list[Import]:
    """What a file imports when it runs; imports for type checkers only are left out."""
    return list(_imports(tree(path), lazy=False))


def _imports(node: ast.AST, *, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import(names=names):
                yield from (Import(alias.name, child.lineno, lazy) for alias in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield from (
                    Import(_imported(module, alias.name), child.lineno, lazy) for alias in names
                )
            case ast.ImportFrom():
                raise ValueError(f"line {child.lineno}: relative import; write the full name")
            case ast.If(test=ast.Name("TYPE_CHECKING")):
                for statement in child.orelse:
                    yield from _imports(statement, lazy=lazy)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield from _imports(child, lazy=True)
            case _:
                yield from _imports(child, lazy=lazy)


def _imported(module: str, name: str) -> str:
    """`from tritower.towers import text` is a module.

    `from tritower.towers.text import pool` is `towers.text`.
    """
    return f"{module}.{name}" if f"{module}.{name}" in module_names() else module


@cache
def module_names() -> frozenset[str]:
    """The dotted names of all modules and packages that are shipped."""
    return frozenset(map(module_name, shipped_files()))
