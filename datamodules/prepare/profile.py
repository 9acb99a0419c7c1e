"""Statistics of the columns of a table.

Counted in one pass, so that their roles can be guessed and explained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from tritower.datamodules.bad_value import excerpt
from tritower.datamodules.prepare.tables import CatalogueError, Table
from tritower.datamodules.prepare.values import Cell, is_number, parse_json

LOOKED_AT = 20_000
"""Values of each column that are looked at closely; the others are only counted."""

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""Value of a split column -> name of the split."""

_PICTURE = re.compile(
    r"[^\s].*\.(?:jpe?g|jfif|png|gif|webp|bmp|tiff?|avif)(?:[|\"].*)?", re.IGNORECASE | re.DOTALL
)
_ADDRESS = re.compile(r"(?:https?|ftp|s3|gs)://\S+", re.IGNORECASE)
_DATE = re.compile(r"\d{4}-\d\d?-\d\d?(?:[T ]\d\d?:\d\d.*)?|\d\d?[./]\d\d?[./]\d{4}")
_DIGIT = re.compile(r"\d")
_WIDE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


@dataclass
class Profile:
    """Statistics of one column, or of one key in a column of JSON objects.

    Attributes:
        name: the column's name; a key's own name, or `column.key` where that is taken.
        column: its name.
        key: of the JSON objects in `column`; None for the column itself.
        filled: rows that have a value.
        seen: of these, how many were looked at; all other counts are of them.
    """

    name: str
    column: str
    key: str | None = None
    filled: int = 0
    seen: int = 0
    objects: int = 0
    lists: int = 0
    bytes: int = 0
    numbers: int = 0
    fractions: int = 0
    currencies: int = 0
    codes: int = 0
    bars: int = 0
    arrows: int = 0
    words: float = 0.0
    pictures: int = 0
    addresses: int = 0
    dates: int = 0
    splits: int = 0
    lengths: set[int] = field(default_factory=set)
    values: set[int] = field(default_factory=set)
    examples: list[str] = field(default_factory=list)

    @property
    def distinct(self) -> int:
        """How many different values were seen."""
        return len(self.values)

    def share(self, count: float) -> float:
        """`count` as a share of the values seen, 0 to 1."""
        if self.seen:
            return count / self.seen
        return 0.0

    def add(self, cell: Cell) -> None:
        """Count one value."""
        if cell is None or (isinstance(cell, str) and not cell.strip()) or cell == []:
            return
        self.filled += 1
        if self.seen == LOOKED_AT:
            return
        # Everything is counted; values are looked at in the first rows only.
        self.seen += 1
        text = cell if isinstance(cell, str) else str(cell)[:1000]
        self.values.add(hash(text))
        if (
            len(self.examples) < 3
            and not isinstance(cell, (bytes, Mapping))
            and (shown := excerpt(text.strip(), 24)) not in self.examples
        ):
            self.examples.append(shown)
        if isinstance(cell, Mapping):
            self.objects += 1
        elif isinstance(cell, bytes):
            self.bytes += 1
        elif isinstance(cell, str):
            self._add_text(cell.strip())
        else:
            self.lists += 1
            self.pictures += (
                bool(cell) and isinstance(cell[0], str) and _PICTURE.fullmatch(cell[0]) is not None
            )

    def _add_text(self, text: str) -> None:
        self.lengths.add(len(text))
        # Numbers: prices have currencies, codes have leading zeros.
        if _DIGIT.search(text) and is_number(text):
            self.numbers += 1
            self.fractions += not text.isdigit()
            self.currencies += re.fullmatch(r"[\d.,\s'’eE+−-]+", text) is None
            self.codes += text.isdigit() and len(text) > 1 and text[0] == "0"
        else:
            # Texts: separators hint at lists and paths, file names at pictures.
            start = text[:2000]
            self.words += len(start.split()) + len(_WIDE.findall(start)) / 2
            self.bars += "|" in text
            self.arrows += " > " in text
            self.lists += text[0] == "[" and text[-1] == "]"
            self.pictures += _PICTURE.fullmatch(start) is not None
            self.addresses += _ADDRESS.match(start) is not None
            self.dates += _DATE.fullmatch(start) is not None
        self.splits += text.lower() in SPLITS


def profile(table: Table) -> tuple[list[Profile], int]:
    """The profiles of all columns and of the keys of their JSON objects, and the number of records.

    Raises:
        CatalogueError: the table has no records.
    """
    columns = {name: Profile(name, name) for name in table.columns}
    keys: dict[tuple[str, str], Profile] = {}
    rows = 0
    for record in table.records():
        rows += 1
        if record.fault is not None:
            continue
        # Keys of JSON objects are profiled like columns.
        for name, cell in record.cells.items():
            value = _as_object(cell)
            columns[name].add(value)
            if isinstance(value, Mapping):
                for key, part in value.items():
                    if (name, key) not in keys:
                        keys[name, key] = Profile(key, name, key)
                    keys[name, key].add(part)
    if not rows:
        raise CatalogueError(f"{table.path} has no rows")
    return list(_named(columns, keys)), rows


def _as_object(cell: Cell) -> Cell:
    """The cell, parsed where it is a JSON object."""
    if isinstance(cell, str) and cell.startswith("{") and cell.endswith("}"):
        try:
            return parse_json(cell)
        except ValueError:
            return cell
    return cell


def _named(
    columns: Mapping[str, Profile], keys: Mapping[tuple[str, str], Profile]
) -> Iterator[Profile]:
    """All profiles, with a name for each key that no column and no other key has."""
    yield from columns.values()
    taken = set(columns)
    for (column, key), found in keys.items():
        found.name = f"{column}.{key}" if key in taken else key
        while found.name in taken:
            found.name += "_"
        taken.add(found.name)
        yield found
