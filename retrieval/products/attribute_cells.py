"""How a value of an attribute is stored, wherever it comes from: as a number or as a text.

A path is one text with its levels joined by " > ", a set one text with its values joined by a
control sign: texts that repeat are then stored once and compared once.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

AttributeType = Literal["number", "category", "path", "set"]

GROUP = "group"
FAMILY = "family"
LEVEL_SEPARATOR = " > "
BLANKS = " \t\n\r\f\v"
LEVEL_BORDER = f"[{BLANKS}]*>[{BLANKS}]*"

VALUE_SEPARATOR = "\x1f"
"""Between the values of a set; in a value it counts as a blank."""

CELL_SEPARATOR = "|"
"""Between the values of a set in a cell of text."""
CELL_BORDER = rf"[{BLANKS}]*([|][{BLANKS}]*)+"

TEXT = pa.large_string()


def cells(column: pa.Array, attribute_type: AttributeType) -> pa.Array:
    """The values of a column as they are stored.

    Float64 for numbers, else large_string; null where unknown.

    NaN, a blank text and an empty list are unknown values. Numbers of 16 and 32 bits become what
    they print as: a price of 59.9 stays 59.9, not 59.900001525878906.

    Raises:
        pa.ArrowInvalid: values that are not of this type, or integers that float64 cannot hold.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if attribute_type == "number":
        return _numbers(column)
    # Lists are joined by separators; texts of sets and paths are split and joined again.
    if is_list(column.type):
        texts = _joined(
            column.cast(pa.large_list(TEXT)),
            VALUE_SEPARATOR if attribute_type == "set" else LEVEL_SEPARATOR,
        )
    else:
        texts = column.cast(TEXT)
        if attribute_type == "set":
            texts = pc.utf8_trim(
                pc.replace_substring(texts, VALUE_SEPARATOR, " "), CELL_SEPARATOR + BLANKS
            )
            texts = pc.replace_substring_regex(texts, CELL_BORDER, VALUE_SEPARATOR)
    if attribute_type == "path":
        texts = pc.replace_substring_regex(
            pc.ascii_trim_whitespace(texts), LEVEL_BORDER, LEVEL_SEPARATOR
        )
    # Blank texts are missing.
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(texts), ""), None, texts)


def path_text(text: str) -> str:
    """A path as `cells` writes it: "Shoes>Boots " is "Shoes > Boots"."""
    return re.sub(LEVEL_BORDER, LEVEL_SEPARATOR, text.strip(BLANKS))


def value_text(text: str) -> str:
    """A value of a set as `cells` writes it."""
    return text.replace(VALUE_SEPARATOR, " ")


def checked_attribute_type(attribute_type: str, column: str) -> AttributeType:
    """A type by its name.

    Raises:
        ValueError: not one of those that exist.
    """
    if attribute_type not in get_args(AttributeType):
        raise ValueError(
            f"column {column!r}: type {attribute_type!r}; expected one of "
            f"{', '.join(get_args(AttributeType))}"
        )
    return attribute_type  # type: ignore[return-value]


def is_text(type_: pa.DataType) -> bool:
    """Whether a column holds texts."""
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return (
        pa.types.is_string(type_)
        or pa.types.is_large_string(type_)
        or pa.types.is_string_view(type_)
    )


def is_list(type_: pa.DataType) -> bool:
    """Whether a column holds lists."""
    types = pa.types
    return types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_)


def _numbers(column: pa.Array) -> pa.Array:
    if column.type in (pa.float16(), pa.float32()):
        column = column.cast(pa.float32()).cast(TEXT)
    if is_text(column.type):
        texts = pc.replace_substring_regex(pc.utf8_trim_whitespace(column), r"^\+", "")
        column = pc.if_else(pc.equal(texts, ""), None, texts)
    numbers = column.cast(pa.float64())
    return pc.if_else(pc.is_nan(numbers), None, numbers)


def _joined(lists: pa.Array, separator: str) -> pa.Array:
    """(B,) texts of lists of texts (large_list); missing and empty elements are left out."""
    rows = pc.list_parent_indices(lists)
    elements = lists.flatten()
    kept = pc.fill_null(pc.not_equal(elements, ""), False)
    rows = rows.filter(kept)
    elements = pc.replace_substring(elements.filter(kept), VALUE_SEPARATOR, " ")
    offsets = np.searchsorted(rows.to_numpy(), np.arange(len(lists) + 1))
    whole = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), elements)
    return pc.binary_join(whole, pa.scalar(separator, TEXT))
