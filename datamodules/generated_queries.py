"""Typed queries generated from products' attributes, "blue fleece jackets".

For catalogues without judged queries.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tritower.datamodules.catalogue import Table
from tritower.datamodules.example_rows import NO_ROW, ExampleRows
from tritower.datamodules.schema import Schema

MAX_QUERIES = 20_000
"""In a larger catalogue, queries are generated from so many products, drawn uniformly."""

MAX_PRODUCTS = 64
"""A query that more products match names a further attribute, or is left out: a batch holds no
more judged products of a query.
"""

MEANINGLESS = frozenset(
    {"yes", "no", "true", "false", "none", "na", "n/a", "other", "others", "0", "1"}
)
"""Values that are no words of a query without the name of their attribute."""

Rows = np.ndarray


@dataclass(frozen=True)
class GeneratedQueries:
    """Q different typed queries, and the products that have all the attributes that they name.

    Attributes:
        texts: Q texts.
        products: Q arrays of int64 rows of `products/`, ascending.
        weight: 0 to 1, of a product.
    """

    texts: Sequence[str]
    products: Sequence[Rows]
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.texts)

    def row(self, number: int) -> dict[str, Any]:
        """Query `number` as a row of `queries/`."""
        text = self.texts[number]
        return {"query_id": f"facets\0{text}", "text": text, "images": None}

    def examples(self, first: int, times: int, seed: int) -> ExampleRows:
        """Each of Q queries `times` times with a product drawn at random: (Q x times,) examples.

        Queries are numbered from `first`.
        """
        rng = np.random.default_rng((seed, 3))
        number = np.tile(np.arange(len(self)), times)
        product = np.array([rng.choice(self.products[query]) for query in number], np.int64)
        return self._example_rows(product, number + first)

    def pairs(self, first: int) -> ExampleRows:
        """Each query with each of its products: (P,) examples."""
        number = np.repeat(np.arange(len(self)), [len(rows) for rows in self.products])
        product = np.concatenate([np.empty(0, np.int64), *self.products])
        return self._example_rows(product, number + first)

    def _example_rows(self, product: Rows, query: Rows) -> ExampleRows:
        weight = np.full(len(product), self.weight, np.float32)
        no_row = np.full(len(product), NO_ROW, np.int64)
        return ExampleRows(product, query.astype(np.int64), no_row, weight, weight * np.nan)


@dataclass(frozen=True)
class AllQueries:
    """The queries of the catalogue, and behind them the generated ones.

    Attributes:
        table: `queries/`, or None.
        generated: generated queries.
    """

    table: Table | None
    generated: GeneratedQueries

    @property
    def first_generated(self) -> int:
        """The number of the first generated query."""
        if self.table is None:
            return 0
        return len(self.table)

    def __len__(self) -> int:
        return self.first_generated + len(self.generated)

    def row(self, number: int) -> Mapping[str, Any]:
        """Query `number` as a row of `queries/`."""
        if self.table is not None and number < len(self.table):
            return self.table.row(number)
        return self.generated.row(number - self.first_generated)


@dataclass(frozen=True)
class _ValueTable:
    """The attribute values of n products, by codes.

    Attributes:
        words: text of each code.
        products_of: products (0 to n - 1) with each code, ascending.
        codes_of: codes of each product, ascending.
        heads: code of the last level of each product's category, -1 for none.
    """

    words: list[str]
    products_of: list[Rows]
    codes_of: list[Rows]
    heads: list[int]


def generate_queries(
    products: Table, rows: Rows, schema: Schema, seed: int, weight: float = 1.0
) -> GeneratedQueries:
    """Queries of some products: the last level of the category with one to three more attributes.

    An attribute value is a value of a category or a set, or a level of a path, of any attribute: a
    typed word does not name its attribute. Numbers are left out.

    Args:
        products: the catalogue.
        rows: (N,) int64 rows that queries are made from and that match them: the train split.
        schema: of the catalogue.
        seed: of the draw.
        weight: 0 to 1, of a product.
    """
    table = _read_values(products, rows, schema)
    if not table.words:
        return GeneratedQueries([], [], weight)
    rng = np.random.default_rng((seed, 4))
    matching: dict[str, Rows] = {}
    for place in rng.permutation(len(rows))[:MAX_QUERIES]:
        head = [table.heads[place]] if table.heads[place] >= 0 else []
        others = rng.permutation(np.setdiff1d(table.codes_of[place], head)).tolist()
        wanted = int(rng.integers(1, 4))
        # Name further attributes until few enough products match all of them.
        named: list[int] = []
        match = table.products_of[head[0]] if head else None
        for code in others:
            if len(named) >= wanted and match is not None and len(match) <= MAX_PRODUCTS:
                break
            named.append(code)
            having = table.products_of[code]
            if match is None:
                match = having
            else:
                match = _intersection(match, having)
        if match is not None and len(match) <= MAX_PRODUCTS:
            text = " ".join(table.words[code] for code in [*named, *head])
            matching.setdefault(text, rows[match])
    return GeneratedQueries(list(matching), list(matching.values()), weight)


def _read_values(products: Table, rows: Rows, schema: Schema) -> _ValueTable:
    names = [attribute.name for attribute in schema.categories]
    paths = [
        attribute.name for attribute in schema.categories if attribute.attribute_type == "path"
    ]
    code_of: dict[str, int] = {}
    owners = array("q")
    codes = array("q")
    heads: list[int] = []
    for place, attributes in enumerate(_read_attributes(products, rows)):
        head = -1
        for name in names:
            for value in _typed_values(attributes.get(name)):
                code = code_of.setdefault(value, len(code_of))
                owners.append(place)
                codes.append(code)
                # Levels come root first, so the last one stays.
                if name in paths[:1]:
                    head = code
        heads.append(head)
    if not code_of:
        return _ValueTable([], [], [], heads)
    pairs = np.unique(np.stack([np.array(codes), np.array(owners)]), axis=1)  # (2, n)
    products_of = np.split(pairs[1], np.searchsorted(pairs[0], np.arange(1, len(code_of))))
    pairs = pairs[:, np.argsort(pairs[1], kind="stable")]
    codes_of = np.split(pairs[0], np.searchsorted(pairs[1], np.arange(1, len(rows))))
    return _ValueTable(list(code_of), products_of, codes_of, heads)


def _intersection(few: Rows, many: Rows) -> Rows:
    """The members of a few ascending rows that are among many ascending rows."""
    place = np.minimum(np.searchsorted(many, few), len(many) - 1)
    return few[many[place] == few]


def _read_attributes(products: Table, rows: Rows) -> Iterator[Mapping[str, Any]]:
    """The attributes of ascending rows, without their texts and pictures."""
    if "attributes" not in products.names:
        return
    first = 0
    for chunk in products.column("attributes").chunks:
        own = rows[(rows >= first) & (rows < first + len(chunk))] - first
        yield from (attributes or {} for attributes in chunk.take(own).to_pylist())
        first += len(chunk)


def _typed_values(value: str | Sequence[str] | None) -> Iterator[str]:
    """The values of an attribute, as somebody would type them."""
    texts = [value] if isinstance(value, str) else value or ()
    for text in texts:
        typed = " ".join(text.lower().split())
        if typed and typed not in MEANINGLESS:
            yield typed
