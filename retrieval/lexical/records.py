"""A product as fields of tokens: what lexical search reads of its whole record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from tritower.retrieval.lexical.tokenizer import tokenize

Value = str | float | Sequence[str]

FIELDS = ("title", "texts", "attributes", "facts", "numbers")
"""The fields of a record.

    title        words of the first text field
    texts        words of all other text fields
    attributes   words of brand, category, color and the like
    facts        whole values, "brand=acme": equal or not
    numbers      whole numbers, "price=59.9": equal or not
"""

Record = Mapping[str, Sequence[str]]
"""Field -> tokens. Facts and numbers are terms as they are: never split, stemmed or joined."""

QUERY = "query"
"""The one field of a typed query. Its weight is always 1."""

EXACT_FIELDS = frozenset({"facts", "numbers"})


def record_of(
    text: Mapping[str, str | None], attributes: Mapping[str, Value | None], title: str
) -> Record:
    """The record of a product.

    Args:
        text: text field -> text.
        attributes: name -> value; numbers, texts, or lists of texts.
        title: the text field that names products.
    """
    words: list[str] = []
    facts: list[str] = []
    numbers: list[str] = []
    # Numbers are exact terms; other values give both words and one exact term.
    for name, value in attributes.items():
        if isinstance(value, float | int):
            numbers.append(f"{name}={value:g}")
            continue
        for one in [value] if isinstance(value, str) else value or ():
            own_words, plain = _of_value(one)
            words += own_words
            facts.append(f"{name}={plain}")
    others = [value for name, value in text.items() if name != title and value]
    return {
        "title": tokenize(text.get(title) or ""),
        "texts": [token for other in others for token in tokenize(other)],
        "attributes": words,
        "facts": facts,
        "numbers": numbers,
    }


@lru_cache(maxsize=1 << 16)
def _of_value(value: str) -> tuple[list[str], str]:
    """The words of an attribute's value, and the whole of it in lower case.

    Kept, because products share values.
    """
    return tokenize(value), " ".join(value.lower().split())


def typed_record(text: str | None) -> Record:
    """The record of a typed query."""
    return {QUERY: tokenize(text or "")}


def visible_record(record: Record, query_type: str) -> Record:
    """The part of a product's record that a query of this type contains; empty for a picture."""
    fields = {
        "fused": FIELDS,
        "product:text": ("title", "texts"),
        "product:attribute": ("attributes", "facts", "numbers"),
    }.get(query_type, ())
    return {field: record[field] for field in fields if field in record}
