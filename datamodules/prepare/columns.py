"""The role of each column of a user's table, and the small YAML file that sets it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import yaml

from tritower.datamodules.prepare.tables import CatalogueError

Role = Literal[
    "id",
    "text",
    "image",
    "price",
    "number",
    "category",
    "path",
    "set",
    "json",
    "group",
    "family",
    "split",
    "ignore",
]
ROLES: tuple[Role, ...] = get_args(Role)
SINGLE: tuple[Role, ...] = ("id", "group", "family", "split")
ATTRIBUTES: tuple[Role, ...] = ("price", "number", "category", "path", "set")

SEPARATORS = {"path_separator": " > ", "value_separator": "|"}
"""Between the levels of a path, and between the values of a set or the pictures of a product."""


@dataclass(frozen=True)
class Column:
    """A column, or one key of a column of JSON objects, and what it is.

    Attributes:
        name: in the prepared catalogue.
        column: its name in the user's table.
        key: of the JSON objects in `column`; None for the column itself.
        role: what it is.
        why: the reason, for the user.
        filled: rows that have a value.
        examples: some of its values.
    """

    name: str
    column: str
    key: str | None
    role: Role
    why: str = ""
    filled: int = 0
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Columns:
    """The columns of a table with their roles.

    Text fields are in the order in which they are joined.
    """

    columns: tuple[Column, ...]
    path_separator: str = SEPARATORS["path_separator"]
    value_separator: str = SEPARATORS["value_separator"]

    def of(self, *roles: Role) -> list[Column]:
        """The columns with one of these roles, in order."""
        return [column for column in self.columns if column.role in roles]

    def one(self, role: Role) -> Column | None:
        """The column with a role that at most one column has."""
        return next(iter(self.of(role)), None)

    def to_yaml(self, comment: str) -> str:
        """The text of a file that `Override.load` reads."""
        roles: dict[str, str | list[str]] = {}
        for role in ROLES:
            names = [column.name for column in self.of(role)]
            if names:
                roles[role] = names[0] if role in SINGLE else names
        separators = {
            "path_separator": self.path_separator,
            "value_separator": self.value_separator,
        }
        return f"# {comment}\n" + yaml.safe_dump(
            roles | separators, sort_keys=False, allow_unicode=True, width=110
        )


@dataclass(frozen=True)
class Override:
    """The content of a user's YAML file.

    The roles of the columns that it names; every other column is guessed.

    Attributes:
        roles: name of a column -> its role, in the order of the file.
        closed: roles that no other column gets: id, group, family and split where the file names
            them, and roles that it gives to none (`text: null`).
        path_separator: see `SEPARATORS`.
        value_separator: see `SEPARATORS`.
    """

    roles: Mapping[str, Role]
    closed: frozenset[Role] = frozenset()
    path_separator: str = SEPARATORS["path_separator"]
    value_separator: str = SEPARATORS["value_separator"]

    @classmethod
    def load(cls, path: Path) -> Override:
        """Read the file.

        Raises:
            CatalogueError: not YAML, an unknown role, or a column with two roles.
        """
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeError, yaml.YAMLError) as error:
            raise CatalogueError(f"{path}: cannot be read: {error}") from None
        if not isinstance(data, dict):
            raise CatalogueError(f"{path}: lines such as `text: [title, description]` are expected")
        # Separators first; everything else is a role.
        separators = {name: data.pop(name, default) for name, default in SEPARATORS.items()}
        for name, value in separators.items():
            if not isinstance(value, str) or not value:
                raise CatalogueError(f"{path}: {name}: {value!r} is no text; put it in quotes")
        roles: dict[str, Role] = {}
        for role, names in data.items():
            if role not in ROLES:
                raise CatalogueError(
                    f"{path}: unknown role {role!r}; known are {', '.join([*ROLES, *SEPARATORS])}"
                )
            # A column has one role.
            for name in _listed(names, role, path):
                if name in roles:
                    raise CatalogueError(
                        f"{path}: {name!r} is both {roles[name]} and {role}; a column has one role"
                    )
                roles[name] = role
        closed = frozenset(role for role in data if role in SINGLE or data[role] in (None, []))
        return cls(roles, closed, **separators)


def _listed(names: object, role: Role, path: Path) -> list[str]:
    """The column names of one line of the file."""
    # YAML gives a list, one name, or nothing.
    if isinstance(names, list):
        listed: list[object] = names
    elif names is None:
        listed = []
    else:
        listed = [names]
    if role in SINGLE and len(listed) > 1:
        raise CatalogueError(f"{path}: {role} is one column, not {listed}")
    wrong = [name for name in listed if not isinstance(name, str)]
    if wrong:
        raise CatalogueError(
            f"{path}: {role}: {wrong[0]!r} is no name of a column; put it in quotes"
        )
    return [name for name in listed if isinstance(name, str)]
