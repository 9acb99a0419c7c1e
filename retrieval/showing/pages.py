"""Self-contained HTML pages.

Hits as pictures, with everything inlined so that a page can be sent to somebody.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from tritower.artefacts import storage
from tritower.retrieval.products.catalogue import Card, Value

_SHOWN_FACTS = 4
_FIRST = ("brand", "price", "color", "colour", "category")
_SIGNATURES = {
    b"\xff\xd8": "jpeg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"RIFF": "webp",
    b"BM": "bmp",
}


class Hit(NamedTuple):
    """One result to show; `relevant` is None where nobody judged."""

    product_id: str
    score: float
    card: Card
    relevant: bool | None = None


class Section(NamedTuple):
    """A query with its hits; `query_id` and `heading` may be empty."""

    query: Card
    hits: Sequence[Hit]
    query_id: str = ""
    heading: str = ""


def write_sheet(file: Path, sections: Sequence[Section], note: str = "") -> None:
    """Write a contact sheet of searches.

    Args:
        file: the .html file.
        sections: queries with their hits.
        note: a line under the heading.
    """
    storage.write_text(
        file, render("sheet.html", sections=[_section(section) for section in sections], note=note)
    )


def render(template: str, **values: Any) -> str:
    """A page from a template of this package; every value is escaped."""
    environment = Environment(
        loader=PackageLoader("tritower.retrieval.showing"),
        autoescape=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(template).render(**values)


def sections_of(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """Sections as the templates take them."""
    return [_section(section) for section in sections]


def data_url(data: bytes, image_type: str | None = None) -> str:
    """Bytes of a picture as an address that needs no file."""
    found = next(
        (name for start, name in _SIGNATURES.items() if data.startswith(start)), "octet-stream"
    )
    return f"data:image/{image_type or found};base64,{base64.b64encode(data).decode('ascii')}"


def facts_of(attributes: Mapping[str, Value], limit: int = _SHOWN_FACTS) -> list[tuple[str, str]]:
    """Attributes as (name, text), the telling ones first."""
    rank = {name: position for position, name in enumerate(_FIRST)}
    names = sorted(attributes, key=lambda name: rank.get(name.lower(), len(rank)))
    return [(name, shown(attributes[name])) for name in names[:limit]]


def shown(value: Value) -> str:
    """A value as text: 59.9, 40, "Shoes > Boots", "red, wool"."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return ", ".join(value)


def _section(section: Section) -> dict[str, Any]:
    return {
        "heading": section.heading,
        "query": _shown_card(section.query, section.query_id),
        "hits": [
            {**_shown_card(hit.card, hit.product_id), "score": hit.score, "relevant": hit.relevant}
            for hit in section.hits
        ],
    }


def _shown_card(card: Card, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "title": card.title,
        "facts": [f"{name}: {text}" for name, text in facts_of(card.attributes)],
        "pictures": [data_url(picture) for picture in card.images],
    }
