"""Queries of the sample catalogue, with the grades of all listings.

A query shows some facts, and its judgements cover the whole catalogue, also facts
that a listing has without showing them. Grade 3 is fully relevant:

* **text**: all facts of the query hold. With five or six facts, 2 = all but one, 1 = all but two;
  the type must hold.
* **image**, a new photo: same shape and colorway; 2 = the shape alone.
* **product**, one listing: the same product from another seller; 2 = another variant of its style.

A query belongs to the split of the product that it was made from, and no two text queries have the
same fully relevant listings: no query of test occurs in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tritower.datamodules.samples.listings import Listing
from tritower.datamodules.samples.text import write_query

ASKED = {"hue": 0.3, "pattern": 0.2, "material": 0.2, "size": 0.15, "use": 0.15}
"""Facts of text queries besides the type, and how often they occur."""

ASKED_COUNT = {2: 0.3, 3: 0.4, 4: 0.2, 5: 0.1}
"""How many of them a query names."""

MOST_ANSWERS = 40
"""A text query with more full matches is too vague to be judged by its first hits."""

CHINESE = 0.15
"""How often somebody types Chinese."""


class Query(NamedTuple):
    """One query and its judgements.

    Attributes:
        query_id: opaque.
        type: `text`, `image` or `product`.
        split: `train`, `val` or `test`.
        source: position of the listing whose product it was made from.
        text: what is typed, for text queries.
        grades: (N,) int64 relevance of every listing, 0 to 3.
    """

    query_id: str
    type: str
    split: str
    source: int
    text: str
    grades: np.ndarray


def draw_queries(listings: Sequence[Listing], seed: int) -> list[Query]:
    """Text queries for a sixth of the listings; photos and products for val and test products."""
    rng = np.random.default_rng((seed, 1))
    return [
        *text_queries(listings, len(listings) // 6, rng),
        *image_queries(listings, len(listings) // 30, rng),
        *product_queries(listings),
    ]


def text_queries(listings: Sequence[Listing], count: int, rng: np.random.Generator) -> list[Query]:
    """Up to `count` combinations of facts that some listing has, each with other matches."""
    words = [listing.true_product.words() for listing in listings]
    truth = {fact: np.array([w[fact].word for w in words]) for fact in ("type", *ASKED)}
    answered_before: set[bytes] = set()
    queries: list[Query] = []
    for _ in range(20 * count):  # small catalogues run out of combinations
        if len(queries) == count:
            break
        source = int(rng.integers(len(listings)))
        number = rng.choice(list(ASKED_COUNT), p=list(ASKED_COUNT.values()))
        # The type, and a few facts of one listing.
        facts = [
            "type",
            *rng.choice(list(ASKED), number, replace=False, p=list(ASKED.values())).tolist(),
        ]
        grades = text_grades({fact: truth[fact] == words[source][fact].word for fact in facts})
        # Queries with the same relevant listings, or too many, add nothing.
        answers = (grades == 3).tobytes()
        if answers in answered_before or (grades == 3).sum() > MOST_ANSWERS:
            continue
        answered_before.add(answers)
        language = "zh" if rng.random() < CHINESE else "en"
        text = write_query({fact: words[source][fact] for fact in facts}, language, rng)
        queries.append(
            Query(
                f"text-{len(queries):04d}",
                "text",
                listings[source].true_product.split,
                source,
                text,
                grades,
            )
        )
    return queries


def text_grades(holds: dict[str, np.ndarray]) -> np.ndarray:
    """(N,) grades from fact -> (N,) bool: whether the asked fact holds for each listing."""
    matched = np.sum(list(holds.values()), axis=0)
    grades = 3 - (len(holds) - matched)
    return np.where(holds["type"] & (matched >= min(len(holds), 4)), grades, 0).clip(0)


def image_queries(listings: Sequence[Listing], count: int, rng: np.random.Generator) -> list[Query]:
    """New photos of up to `count` products of val and test."""
    shape = np.array(
        [(listing.true_product.product_type, listing.true_product.shape) for listing in listings]
    )
    colorway = np.array([listing.true_product.colorway for listing in listings])
    sources = rng.permutation(_one_per_product(listings))[:count].tolist()
    queries: list[Query] = []
    for source in sources:
        same_shape = (shape == shape[source]).all(axis=1)
        grades = np.where(same_shape, np.where(colorway == colorway[source], 3, 2), 0)
        split = listings[source].true_product.split
        queries.append(Query(f"photo-{len(queries):04d}", "image", split, source, "", grades))
    return queries


def product_queries(listings: Sequence[Listing]) -> list[Query]:
    """One listing with a picture of every product of val and test that has several sellers."""
    group = np.array([listing.group for listing in listings])
    family = np.array([listing.true_product.family for listing in listings])
    queries = []
    for source in _one_per_product(listings):
        # Other offers of the product are grade 3, variants of it grade 2.
        grades = np.where(group == group[source], 3, np.where(family == family[source], 2, 0))
        grades[source] = 0
        if 3 in grades:
            listing = listings[source]
            queries.append(
                Query(
                    f"like-{listing.product_id}",
                    "product",
                    listing.true_product.split,
                    source,
                    "",
                    grades,
                )
            )
    return queries


def _one_per_product(listings: Sequence[Listing]) -> list[int]:
    """The first listing with a picture of every product of val and test."""
    first: dict[int, int] = {}
    for position, listing in enumerate(listings):
        if listing.pictures and listing.true_product.split != "train":
            first.setdefault(listing.group, position)
    return list(first.values())
