"""Where attributes of products come from.

A prepared catalogue, or anyone's Parquet or CSV; read column by column.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from tritower.artefacts import storage
from tritower.artefacts.storage import ArtefactError
from tritower.retrieval.products.attribute_cells import (
    FAMILY,
    GROUP,
    LEVEL_SEPARATOR,
    TEXT,
    AttributeType,
    cells,
    checked_attribute_type,
    is_list,
    is_text,
)
from tritower.retrieval.products.catalogue import PreparedCatalogue
from tritower.retrieval.vectors.vector_files import (
    ID_COLUMNS,
    as_text,
    find_column,
    is_id,
    natural_key,
)

GROUPINGS = {"group": GROUP, "group_id": GROUP, "family": FAMILY, "family_id": FAMILY}
"""Columns that are groups and families, whatever they hold."""

LONG_TEXT = 200
"""A column whose texts are longer on average holds descriptions, not an attribute."""

NUMBER = r"^\s*[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?\s*$"
"""What makes a column of text one of numbers; 007 is a code."""

Batches = Iterator[pa.Array]


class AttributeProvider(Protocol):
    """Attributes of products, which `attribute_table` joins to the rows of an index by id."""

    @property
    def name(self) -> str:
        """What it is, for messages."""

    @property
    def attribute_types(self) -> Mapping[str, AttributeType]:
        """Attribute -> type; groups and families are categories called `group` and `family`."""

    @property
    def ignored(self) -> Mapping[str, str]:
        """Columns that are no attributes -> why."""

    def ids(self) -> Batches:
        """Product ids (large_string)."""

    def column(self, attribute: str) -> Batches:
        """The values in the order of the ids, as of `cells`."""


class CatalogueProvider:
    """The attributes, groups and families of a prepared catalogue.

    Args:
        path: its folder.

    Raises:
        ArtefactError: no finished catalogue.
    """

    def __init__(self, path: Path | str) -> None:
        catalogue = PreparedCatalogue(path)
        self.name = str(catalogue.path)
        self._files = catalogue.product_files()
        self._fields: dict[str, str | None] = {GROUP: None, FAMILY: None}
        # Every other column is guessed, or ignored with a reason.
        self.attribute_types: dict[str, AttributeType] = {GROUP: "category", FAMILY: "category"}
        self.ignored: dict[str, str] = {}
        # An attribute that is called like a grouping gets a longer name.
        for field, attribute_type in catalogue.attributes.items():
            if field in (GROUP, FAMILY):
                name = f"attributes.{field}"
            else:
                name = field
            self.attribute_types[name] = checked_attribute_type(attribute_type, field)
            self._fields[name] = field

    def ids(self) -> Batches:
        """See `AttributeProvider`."""
        for file in self._files:
            for batch in pq.ParquetFile(file).iter_batches(columns=["product_id"]):
                yield batch.column("product_id").cast(TEXT)

    def column(self, attribute: str) -> Batches:
        """See `AttributeProvider`."""
        field = self._fields[attribute]
        attribute_type = self.attribute_types[attribute]
        for file in self._files:
            if field is None:
                column = attribute
            else:
                column = f"attributes.{field}"
            for batch in pq.ParquetFile(file).iter_batches(columns=[column]):
                if field is None:
                    values = batch.column(attribute)
                else:
                    values = _field(batch.column("attributes"), field)
                yield cells(values, attribute_type)


class FileProvider:
    """Attributes from a Parquet file, a folder of such files, or a CSV file with a header (TSV.

    By its suffix).

    Numbers are numbers, lists of texts are sets, texts are categories, or paths where a value holds
    " > "; in a CSV file a column that holds nothing but numbers is one of numbers. `group` and
    `family` (also with _id) have their names' roles. Other columns, and long texts, are no
    attributes; `ignored` names the reasons.

    Args:
        path: where it is.
        id_column: the column of product ids; guessed when None.
        columns: the columns to take; None for all that can be attributes.
        attribute_types: column -> type, where the guess is wrong. A set in text is separated by
            "|".

    Raises:
        ValueError: it cannot be read, or such columns are not there.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        id_column: str | None = None,
        columns: Collection[str] | None = None,
        attribute_types: Mapping[str, str] | None = None,
    ) -> None:
        path = Path(path)
        self.name = str(path)
        self._files = _files(path)
        schema = self._common_schema()
        if repeated := sorted({name for name in schema.names if schema.names.count(name) > 1}):
            raise ValueError(f"{path}: the column {repeated[0]!r} is there more than once")
        self._id = find_column(schema, id_column, is_id, ID_COLUMNS, f"{path}: column of ids")
        # Types and columns that the caller names have to exist.
        named = {
            name: checked_attribute_type(attribute_type, name)
            for name, attribute_type in (attribute_types or {}).items()
        }
        for name in (*named, *(columns or ())):
            if name not in schema.names or name == self._id:
                raise ValueError(f"{path}: no column {name!r} among {', '.join(schema.names)}")
        self.attribute_types: dict[str, AttributeType] = {}
        self.ignored: dict[str, str] = {}
        self._columns: dict[str, str] = {}
        for field in schema:
            if field.name == self._id or (columns is not None and field.name not in columns):
                continue
            found = named.get(field.name) or self._guess(field)
            if found not in get_args(AttributeType):
                self.ignored[field.name] = found
                continue
            attribute = GROUPINGS.get(field.name, field.name)
            if attribute in self._columns:
                raise ValueError(
                    f"{path}: {self._columns[attribute]!r} and {field.name!r} are both a "
                    f"{attribute}"
                )
            self.attribute_types[attribute] = checked_attribute_type(found, field.name)
            self._columns[attribute] = field.name

    def ids(self) -> Batches:
        """See `AttributeProvider`.

        Raises:
            ValueError: a missing id.
        """
        row = 0
        for batch in self._read(self._id):
            ids = as_text(batch, self.name)
            missing = pc.or_kleene(pc.is_null(ids), pc.equal(ids, ""))
            if pc.any(missing).as_py():
                raise ValueError(
                    f"{self.name}: row {row + pc.index(missing, True).as_py()} has no id "
                    f"({self._id})"
                )
            yield ids
            row += len(ids)

    def column(self, attribute: str) -> Batches:
        """See `AttributeProvider`.

        Raises:
            ValueError: a value that is not of the column's type.
        """
        attribute_type = self.attribute_types[attribute]
        column = self._columns[attribute]
        for batch in self._read(column):
            try:
                yield cells(batch, attribute_type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise ValueError(
                    f"{self.name}: column {column!r} cannot be read as {attribute_type}: {error}"
                ) from None

    def _common_schema(self) -> pa.Schema:
        schemas = [_reader(file, None)[0] for file in self._files]
        for file, schema in zip(self._files, schemas, strict=True):
            if not schema.equals(schemas[0], check_metadata=False):
                raise ValueError(
                    f"{file} has other columns than {self._files[0]}: {schema.names}, "
                    f"{schemas[0].names}"
                )
        return schemas[0]

    def _read(self, column: str) -> Batches:
        for file in self._files:
            yield from _reader(file, column)[1]()

    def _guess(self, field: pa.Field) -> str:
        """The type of a column, or why it is no attribute."""
        types = pa.types
        type_ = field.type
        # Dictionaries count as their values.
        if types.is_dictionary(type_):
            type_ = type_.value_type
        if field.name in GROUPINGS:
            if is_id(field.type):
                return "category"
            return f"{field.name} holds {field.type}; expected texts or integers"
        if types.is_integer(type_) or types.is_floating(type_) or types.is_decimal(type_):
            return "number"
        if types.is_boolean(type_):
            return "category"
        if is_list(type_):
            if is_text(type_.value_type):
                return "set"
            return f"lists of {type_.value_type}; expected texts"
        if is_text(type_):
            return self._guess_text(field.name)
        return f"{type_} is not an attribute type"

    def _guess_text(self, column: str) -> str:
        known = characters = 0
        path = False
        numbers = self._files[0].suffix not in (".parquet", "")
        # Read all values: long texts are descriptions, and one level separator makes a path.
        for batch in self._read(column):
            values = batch.cast(TEXT).drop_null()
            known += len(values)
            characters += pc.sum(pc.utf8_length(values)).as_py() or 0
            path = path or bool(pc.any(pc.match_substring(values, LEVEL_SEPARATOR)).as_py())
            numbers = (
                numbers and pc.all(pc.match_substring_regex(values, NUMBER)).as_py() is not False
            )
        if not known:
            return "it is empty"
        if characters > LONG_TEXT * known:
            return f"texts of {characters / known:,.0f} characters"
        if numbers:
            return "number"
        if path:
            return "path"
        return "category"


def open_provider(path: Path) -> AttributeProvider:
    """The attributes in a prepared catalogue, or in anyone's files.

    Raises:
        ValueError: see `FileProvider`.
        ArtefactError: see `CatalogueProvider`.
    """
    if (path / storage.MANIFEST).exists():
        return CatalogueProvider(path)
    return FileProvider(path)


def catalogue_provider(meta: Mapping[str, Any]) -> AttributeProvider | None:
    """The catalogue that embeddings were made from, provided that it is there and still the same.

    Args:
        meta: of the embeddings: the catalogue's fingerprint, and a hint where it lies.
    """
    path = meta.get("hints", {}).get("catalogue")
    try:
        same = path is not None and PreparedCatalogue(path).fingerprint == meta.get("catalogue")
    except (ArtefactError, OSError, ValueError):
        return None
    if same:
        return CatalogueProvider(path)
    return None


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = []
        for file in path.iterdir():
            if file.suffix == ".parquet" and not file.name.startswith("."):
                files.append(file)
        if not files:
            raise ValueError(f"{path}: no .parquet files there")
        return sorted(files, key=natural_key)
    if not path.is_file() or path.suffix not in (".parquet", ".csv", ".tsv"):
        raise ValueError(
            f"{path}: expected a .parquet, .csv or .tsv file, or a folder of .parquet files"
        )
    return [path]


def _reader(file: Path, column: str | None) -> tuple[pa.Schema, Callable[[], Batches]]:
    """The schema of a file, and what reads one of its columns; cells of CSV stay text."""
    try:
        if file.suffix == ".parquet":
            parquet = pq.ParquetFile(file)
            return parquet.schema_arrow, lambda: (
                b.column(column) for b in parquet.iter_batches(columns=[column])
            )
        schema = pa.schema([(name, TEXT) for name in _open_csv(file, None).schema.names])
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    return schema, lambda: _csv_column(file, column)


def _csv_column(file: Path, column: str | None) -> Batches:
    try:
        for batch in _open_csv(file, column):
            yield batch.column(0)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} cannot be read: {error}") from None


def _open_csv(file: Path, column: str | None) -> pacsv.CSVStreamingReader:
    options = pacsv.ConvertOptions(
        include_columns=[] if column is None else [column],
        column_types={} if column is None else {column: TEXT},
        null_values=[""],  # a product may be called None
        strings_can_be_null=True,
    )
    parsing = pacsv.ParseOptions(
        delimiter="\t" if file.suffix == ".tsv" else ",", newlines_in_values=True
    )
    return pacsv.open_csv(file, convert_options=options, parse_options=parsing)


def _field(structs: pa.Array, field: str) -> pa.Array:
    """A field of structs, null where the struct is."""
    return structs.flatten()[structs.type.get_field_index(field)]
