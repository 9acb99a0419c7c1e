"""A row of the user's file becomes an item, or is rejected.

Every fact that cannot be used is a recorded problem.

A bad field (a picture, a price) becomes missing and the row is kept. A row is rejected when it has
no id or another row's, when it cannot be read, when nothing usable is left, or when it names a file
outside the picture folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tritower.datamodules.batch import Item
from tritower.datamodules.prepare.columns import ATTRIBUTES, Column, Columns, Role
from tritower.datamodules.prepare.pictures import PictureReader
from tritower.datamodules.prepare.profile import SPLITS
from tritower.datamodules.prepare.records import Record
from tritower.datamodules.prepare.rows import Row, RowBuilder
from tritower.datamodules.prepare.values import (
    BadValue,
    Cell,
    Decimal,
    clean_html,
    excerpt,
    parse_json,
    parse_list,
    parse_number,
)
from tritower.datamodules.schema import Attribute

Value = str | float | list[str]


@dataclass(frozen=True)
class FieldReader:
    """How cells are read.

    Attributes:
        pictures: reads the picture files.
        decimal: the decimal sign of numbers written as text.
        clean_html: remove HTML tags and entities from text.
        strict: a bad field rejects its row.
    """

    pictures: PictureReader
    decimal: Decimal = "auto"
    clean_html: bool = True
    strict: bool = False

    def text(self, cell: Cell) -> str | None:
        """A text without HTML and surrounding blanks; lines of a list are joined.

        None where nothing is left.
        """
        if isinstance(cell, (bytes, Mapping)):
            raise BadValue("NOT_A_TEXT", f"{excerpt(cell)} is not text")
        if cell is not None and not isinstance(cell, str):
            cell = "\n".join(parse_list(cell, "\n"))
        if cell:
            return self._clean(cell)
        return None

    def attribute(self, attribute_type: str, cell: Cell, columns: Columns) -> Value | None:
        """The value of an attribute; None where it is missing."""
        # Lists: levels keep their order, values of a set are unique.
        if attribute_type in ("path", "set"):
            if attribute_type == "path":
                separator = columns.path_separator
            else:
                separator = columns.value_separator
            parts = [clean for part in parse_list(cell, separator) if (clean := self._clean(part))]
            return (parts if attribute_type == "path" else list(dict.fromkeys(parts))) or None
        if isinstance(cell, list) and len(cell) == 1:
            cell = cell[0]
        if cell is None or (isinstance(cell, str) and not cell.strip()):
            return None
        if not isinstance(cell, str):
            raise BadValue("NOT_A_VALUE", f"{excerpt(cell)} is not one value")
        # Single values: numbers, or cleaned text.
        if attribute_type in ("number", "price"):
            return parse_number(
                cell, self.decimal, "price" if attribute_type == "price" else "number"
            )
        return self._clean(cell)

    def _clean(self, text: str) -> str | None:
        return (clean_html(text) if self.clean_html else text).strip() or None


@dataclass(frozen=True)
class ProductParser:
    """Reads the products of a file; picklable, so that worker processes can do it.

    Args:
        file: name of the file, for problems.
        columns: what is what.
        reader: how cells are read.
    """

    file: str
    columns: Columns
    reader: FieldReader

    def __call__(self, record: Record) -> Row:
        """One product."""
        id_column = self.columns.one("id")
        assert id_column is not None
        id = record.cells.get(id_column.column)
        builder = RowBuilder(self.file, record, id if isinstance(id, str) else "")
        # Rows that cannot be read, or that have no id, are rejected at once.
        if record.fault is not None:
            builder.note("", record.fault)
            return builder.row(None)
        if not builder.id:
            builder.note(
                id_column.name, BadValue("ID_MISSING", "a product needs an id" + _odd_id(id))
            )
            return builder.row(None)
        # Everything readable is kept; problems are noted by column.
        item = self._item(_Cells(record, self.columns, builder), builder)
        group, family, split = (
            self._fact(role, record, builder) for role in ("group", "family", "split")
        )
        # A row without any content, or with a problem in a strict run, is rejected.
        if not (item.text or item.images or item.attributes):
            builder.note(
                "", BadValue("NOTHING_USABLE", "no text, no picture and no attribute is left")
            )
            return builder.row(None)
        if builder.fails(self.reader.strict):
            return builder.row(None)
        return builder.row(item, group=group, family=family, split=split)

    def _item(self, cells: _Cells, builder: RowBuilder) -> Item:
        # Texts, pictures and attributes, each with its own problems.
        text: dict[str, str] = {}
        for column in self.columns.of("text"):
            words = builder.read(column.name, self.reader.text, cells.of(column))
            if words:
                text[column.name] = words
        if not text and self.columns.of("text"):
            builder.note(
                self.columns.of("text")[0].name, BadValue("TEXT_EMPTY", "the product has no text")
            )
        # The same picture twice counts once.
        images: dict[bytes, None] = {}
        for column in self.columns.of("image"):
            pictures, problems = self.reader.pictures.read(cells.of(column))
            images.update(dict.fromkeys(pictures))
            for problem in problems:
                builder.note(column.name, problem)
        attributes: dict[str, Value] = {}
        for column in self.columns.of(*ATTRIBUTES):
            value = builder.read(
                column.name, self.reader.attribute, column.role, cells.of(column), self.columns
            )
            if value is not None:
                attributes[column.name] = value
        return Item(text, tuple(images), attributes)

    def _fact(self, role: Role, record: Record, builder: RowBuilder) -> str | None:
        """The group or family of a product, verbatim, or its split.

        None where the table has none.
        """
        column = self.columns.one(role)
        if column is None:
            cell = None
        else:
            cell = record.cells.get(column.column)
        if column is None or cell is None or cell == "":
            return None
        if role == "split":
            return read_split(builder, column.name, cell)
        return builder.read(column.name, _key, cell)


def _key(cell: Cell) -> str:
    if not isinstance(cell, str):
        raise BadValue("NOT_A_VALUE", f"{excerpt(cell)} is not one value")
    return cell


def _odd_id(id: Cell) -> str:
    return "" if id is None or isinstance(id, str) else f"; {excerpt(id)} is none"


def read_split(builder: RowBuilder, column: str, cell: Cell) -> str:
    """The split of a cell; an unknown one is test, so that a holdout is never trained on."""
    return builder.read(column, _split, cell) or "test"


def _split(cell: Cell) -> str:
    if isinstance(cell, str):
        split = SPLITS.get(cell.strip().lower())
    else:
        split = None
    if split is None:
        raise BadValue("SPLIT_UNKNOWN", f"{excerpt(cell)} is none of {', '.join(SPLITS)}")
    return split


class _Cells:
    """The cells of a record, those in JSON objects included."""

    def __init__(self, record: Record, columns: Columns, builder: RowBuilder) -> None:
        self.cells = record.cells
        self.objects: dict[str, Mapping[str, Cell]] = {}
        for name in dict.fromkeys(
            c.column for c in columns.columns if c.role == "json" or c.key is not None
        ):
            self.objects[name] = builder.read(name, _object, self.cells.get(name)) or {}

    def of(self, column: Column) -> Cell:
        """The cell of a column, or of a key of its JSON object."""
        if column.key is None:
            return self.cells.get(column.column)
        return self.objects[column.column].get(column.key)


def _object(cell: Cell) -> Mapping[str, Cell]:
    try:
        if isinstance(cell, str) and cell.strip():
            value = parse_json(cell)
        else:
            value = cell or {}
    except ValueError as error:
        raise BadValue("JSON_INVALID", f"{error}: {excerpt(cell)}") from None
    if not isinstance(value, Mapping):
        raise BadValue("JSON_INVALID", f"not a JSON object: {excerpt(cell)}")
    return value


def parse_attribute(
    attribute: Attribute, text: str, decimal: Decimal = "auto"
) -> float | str | list[str]:
    """What a person types for an attribute: `59.9`, `Acme`, `Shoes > Boots`, `cotton|wool`.

    Args:
        attribute: of the catalogue's schema.
        text: the value.
        decimal: the decimal sign of numbers.

    Raises:
        ValueError: empty, or no number where the attribute is one, with what is expected.
    """
    if attribute.attribute_type in ("path", "set"):
        parts = parse_list(text, ">" if attribute.attribute_type == "path" else "|")
        if not parts:
            raise ValueError(f"{attribute.name}={text!r}: no value")
        return parts
    if not text.strip():
        raise ValueError(f"{attribute.name}={text!r}: no value")
    # Categories are taken as they are, numbers must be readable and within the log's range.
    if attribute.attribute_type == "category":
        return text.strip()
    try:
        value = parse_number(text, decimal)
    except BadValue as error:
        why = error.reason.partition(";")[0]  # the rest names an option of prepare
        raise ValueError(
            f"{attribute.name}={text!r}: {why}; a number such as 1600 or 59.9 is expected"
        ) from None
    if attribute.log and value < 0:
        raise ValueError(
            f"{attribute.name}={text!r}: must not be negative; the catalogue's smallest is 0 or "
            "more"
        )
    return value
