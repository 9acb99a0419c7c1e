"""How sellers and customers of the sample catalogue write.

Titles, descriptions and typed queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from tritower.datamodules.samples.facts import Words

SYNONYM_SHARE = 0.3
"""How often an English writer takes the second word for a fact."""

IN_TITLE = {"material": 0.8, "size": 0.7}
IN_DESCRIPTION = {"material": 0.85, "size": 0.85}
"""How often a seller mentions a fact."""


class Style(NamedTuple):
    """How one seller writes titles.

    Attributes:
        language: `en`, `zh`, or `zh-en` for a title in both.
        order: facts and `extra`, a few words without meaning.
        separator: between them.
        capitals: the seller shouts.
    """

    language: str
    order: str
    separator: str = " "
    capitals: bool = False


STYLES = (
    Style("en", "size material type"),
    Style("en", "type material size", ", "),
    Style("en", "extra size material type"),
    Style("en", "type material size extra extra"),
    Style("en", "extra size material type extra", capitals=True),
    Style("en", "material type size", " - "),
    Style("en", "extra material type size", " | "),
    Style("zh", "extra size material type", ""),
    Style("zh-en", "size material type", " "),
)
"""Sellers by number. They differ in nothing else."""

EXTRAS = {
    "en": (
        "gift idea",
        "new",
        "bestseller",
        "free shipping",
        "top quality",
        "limited offer",
        "handmade",
        "original",
    ),
    "zh": ("新款", "热卖", "包邮", "优质", "限时", "爆款", "精选", "原创"),
}
MENTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "material": ("Made of {}.", "Material: {}.", "We chose {} for it."),
        "size": ("Size: {}.", "This is the {} one.", "Comes in {}."),
    },
    "zh": {"material": ("材质：{}。", "选用{}制作。"), "size": ("尺寸：{}。", "规格为{}。")},
}
FILLERS = {
    "en": (
        "Ships within two days.",
        "Thirty days to return it.",
        "Loved by our customers.",
        "Packed with care.",
    ),
    "zh": ("两天内发货。", "支持三十天退货。", "深受顾客喜爱。", "包装仔细。"),
}


class Text(NamedTuple):
    """A listing's text and the facts that can be read in it."""

    title: str
    description: str
    shown: frozenset[str]


def write_text(
    facts: Mapping[str, Words], seller: int, described: bool, rng: np.random.Generator
) -> Text:
    """Title and description by one seller.

    Only facts of `IN_TITLE` are ever mentioned, and the type always.

    Args:
        facts: fact -> its words.
        seller: position in `STYLES`.
        described: whether there is a description.
        rng: decides words and order.
    """
    style = STYLES[seller]
    # Facts of the title, then sentences about some of the others.
    in_title = {"type"} | {fact for fact, share in IN_TITLE.items() if rng.random() < share}
    title = _title(style, {fact: facts[fact] for fact in in_title}, rng)
    if not described:
        return Text(title, "", frozenset(in_title))
    language = style.language[:2]
    mentioned = [fact for fact, share in IN_DESCRIPTION.items() if rng.random() < share]
    sentences = [
        str(rng.choice(MENTIONS[language][fact])).format(word_of(facts[fact], language, rng))
        for fact in mentioned
    ]
    sentences.append(str(rng.choice(FILLERS[language])))
    rng.shuffle(sentences)
    return Text(
        title,
        ("" if language == "zh" else " ").join(sentences),
        frozenset(in_title | set(mentioned)),
    )


def _title(style: Style, facts: Mapping[str, Words], rng: np.random.Generator) -> str:
    languages = style.language.split("-")
    parts = []
    for language in languages:
        words = _in_order(style.order.split(), facts, language, rng)
        parts.append(("" if language == "zh" else style.separator).join(words))
    title = " ".join(parts)
    if style.capitals:
        return title.upper()
    return title[:1].upper() + title[1:]


def _in_order(
    order: Iterable[str], facts: Mapping[str, Words], language: str, rng: np.random.Generator
) -> list[str]:
    words = []
    for name in order:
        if name == "extra":
            words.append(str(rng.choice(EXTRAS[language])))
        elif name in facts:
            words.append(word_of(facts[name], language, rng))
    return words


def word_of(words: Words, language: str, rng: np.random.Generator) -> str:
    """What a writer calls a fact."""
    if language == "zh":
        return words.chinese
    if rng.random() < SYNONYM_SHARE:
        return words.synonym
    return words.word


def write_query(facts: Mapping[str, Words], language: str, rng: np.random.Generator) -> str:
    """What somebody types who looks for something with these facts, e.g.

    `blue striped ceramic mug`.
    """
    order = ("size", "hue", "pattern", "material", "use", "type")
    if rng.random() < 0.25:
        order = ("type", "material", "size", "hue", "pattern", "use")
    return ("" if language == "zh" else " ").join(_in_order(order, facts, language, rng))
