"""Typed queries made of products' own attributes, "blue fleece jackets", for catalogues that nobody has searched."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tritower.datamodules.catalogue import Table
from tritower.datamodules.examples import ITSELF, ExampleRows
from tritower.datamodules.schema import Schema

MAX_QUERIES = 20_000
"""Larger catalogues ask as many products, drawn uniformly."""

MAX_ANSWERS = 64
"""A query that more products answer names a further facet, or is left out:

a batch knows no more answers of a query.
"""

SAYS_NOTHING = frozenset(
    {"yes", "no", "true", "false", "none", "na", "n/a", "other", "others", "0", "1"}
)
"""Values that are no words of a query without the name of their attribute."""

Rows = np.ndarray


@dataclass(frozen=True)
class FacetQueries:
    """Q different typed queries and the products that have all the facets that they name.

    Attributes:
        texts: what is typed.
        answers: of each, int64 rows of `products/`, ascending.
        weight: of an answer, 0 to 1.
    """

    texts: Sequence[str]
    answers: Sequence[Rows]
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.texts)

    def row(self, number: int) -> dict[str, Any]:
        """Query `number` as a row of `queries/`."""
        return {
            "query_id": f"facets\0{self.texts[number]}",
            "text": self.texts[number],
            "images": None,
        }

    def examples(self, first: int, times: int, seed: int) -> ExampleRows:
        """Each query `times` times, with an answer drawn at random; queries are numbered from `first`."""
        rng = np.random.default_rng((seed, 3))
        number = np.tile(np.arange(len(self)), times)
        product = np.array([rng.choice(self.answers[query]) for query in number], np.int64)
        return self._judged(product, number + first)

    def pairs(self, first: int) -> ExampleRows:
        """Each query with each of its answers."""
        number = np.repeat(np.arange(len(self)), [len(rows) for rows in self.answers])
        return self._judged(np.concatenate([np.empty(0, np.int64), *self.answers]), number + first)

    def _judged(self, product: Rows, query: Rows) -> ExampleRows:
        weight = np.full(len(product), self.weight, np.float32)
        itself = np.full(len(product), ITSELF, np.int64)
        return ExampleRows(product, query.astype(np.int64), itself, weight, weight * np.nan)


@dataclass(frozen=True)
class Queries:
    """Those of the catalogue, and after them those of facets.

    Attributes:
        table: `queries/`, or None.
        facets: typed queries of facets.
    """

    table: Table | None
    facets: FacetQueries

    @property
    def first_facets(self) -> int:
        """The number of the first query of facets."""
        return 0 if self.table is None else len(self.table)

    def __len__(self) -> int:
        return self.first_facets + len(self.facets)

    def row(self, number: int) -> Mapping[str, Any]:
        """Query `number` as a row of `queries/`."""
        if self.table is not None and number < len(self.table):
            return self.table.row(number)
        return self.facets.row(number - self.first_facets)


def facet_queries(
    products: Table, rows: Rows, schema: Schema, seed: int, weight: float = 1.0
) -> FacetQueries:
    """Queries of some products.

    What it is (the last level of its category) with one to three more of its facets.

    A facet is a value of a category or a set, or a level of a path, of whichever attribute: a typed
      word does not tell.
    Numbers are none.

    Args:
        products: the catalogue.
        rows: int64 rows that ask and answer, those of the train split.
        schema: of the catalogue.
        seed: of the draw.
        weight: of an answer, 0 to 1.
    """
    names = [attribute.name for attribute in schema.categories]
    kinds = [attribute.name for attribute in schema.categories if attribute.kind == "path"]
    known: dict[str, int] = {}
    owner, facet = array("q"), array("q")
    heads: list[int] = []  # what each product is
    for place, attributes in enumerate(_attributes(products, rows)):
        head = -1
        for name in names:
            for value in _values(attributes.get(name)):
                code = known.setdefault(value, len(known))
                owner.append(place)
                facet.append(code)
                head = code if name in kinds[:1] else head  # levels come root first
        heads.append(head)
    if not known:
        return FacetQueries([], [], weight)
    pairs = np.unique(np.stack([np.array(facet), np.array(owner)]), axis=1)
    having = np.split(pairs[1], np.searchsorted(pairs[0], np.arange(1, len(known))))
    pairs = pairs[:, np.argsort(pairs[1], kind="stable")]
    of = np.split(pairs[0], np.searchsorted(pairs[1], np.arange(1, len(rows))))
    words = list(known)
    rng = np.random.default_rng((seed, 4))
    found: dict[str, Rows] = {}
    for place in rng.permutation(len(rows))[:MAX_QUERIES]:
        head = [heads[place]] if heads[place] >= 0 else []
        others = rng.permutation(np.setdiff1d(of[place], head)).tolist()
        wanted = int(rng.integers(1, 4))
        named: list[int] = []
        answers = having[head[0]] if head else None
        for code in others:
            if len(named) >= wanted and answers is not None and len(answers) <= MAX_ANSWERS:
                break
            named.append(code)
            answers = having[code] if answers is None else _common(answers, having[code])
        if answers is not None and len(answers) <= MAX_ANSWERS:
            found.setdefault(" ".join(words[code] for code in [*named, *head]), rows[answers])
    return FacetQueries(list(found), list(found.values()), weight)


def _common(some: Rows, others: Rows) -> Rows:
    """Those of ascending rows that stand among other ascending rows, of which there may be many more."""
    place = np.minimum(np.searchsorted(others, some), len(others) - 1)
    return some[others[place] == some]


def _attributes(products: Table, rows: Rows) -> Iterator[Mapping[str, Any]]:
    """The attributes of ascending rows, without their texts and pictures."""
    if "attributes" not in products.names:
        return
    first = 0
    for chunk in products.column("attributes").chunks:
        own = rows[(rows >= first) & (rows < first + len(chunk))] - first
        yield from (attributes or {} for attributes in chunk.take(own).to_pylist())
        first += len(chunk)


def _values(value: str | Sequence[str] | None) -> Iterator[str]:
    """The words of an attribute, as somebody would type them."""
    for text in [value] if isinstance(value, str) else value or ():
        typed = " ".join(text.lower().split())
        if typed and typed not in SAYS_NOTHING:
            yield typed
