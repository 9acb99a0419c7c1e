"""The positives of a batch: products of the same group or family, and judged products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tritower.datamodules.batch import NO_KEY
from tritower.datamodules.catalogue import Table
from tritower.datamodules.example_rows import NO_ROW, ExampleRows
from tritower.datamodules.preprocess import stable_hash

GroupRelation = Literal["none", "group", "family"]


class SameGroup:
    """The other products of one group or family.

    Args:
        products: the catalogue.
        relation: `group` (the same thing), `family` (variants of one style, or the same thing), or
            `none`.
        rows: (n,) int64 rows that count, e.g. those of the train split.
    """

    def __init__(self, products: Table, relation: GroupRelation, rows: np.ndarray) -> None:
        codes = _group_codes(products, relation, rows)
        # Members of a group are neighbors in the order of codes.
        order = np.argsort(codes, kind="stable")
        self.members = rows[order]
        self.first = np.full(len(products), 0, np.int64)
        self.last = np.full(len(products), 0, np.int64)
        self.first[rows] = np.searchsorted(codes[order], codes, "left")
        self.last[rows] = np.searchsorted(codes[order], codes, "right")
        # A product without a group is alone.
        alone = rows[codes < 0]
        self.last[alone] = self.first[alone]

    def one_per_group(self, rows: np.ndarray) -> np.ndarray:
        """Of (N,) rows, those that are alone or the first of their group."""
        is_alone = self.first[rows] == self.last[rows]
        start = np.minimum(self.first[rows], max(len(self.members) - 1, 0))
        return rows[is_alone | (self.members[start] == rows)]

    def with_relatives(self, rows: np.ndarray) -> np.ndarray:
        """Of (N,) rows, those whose group has another product."""
        return rows[self.last[rows] - self.first[rows] > 1]

    def others(self, row: int) -> np.ndarray:
        """(m,) int64 rows of the other products of a product's group."""
        members = self.members[self.first[row] : self.last[row]]
        return members[members != row]


def _group_codes(products: Table, relation: GroupRelation, rows: np.ndarray) -> np.ndarray:
    """(n,) int64 code of each row's group, -1 for none."""
    if relation == "none":
        keys = pa.nulls(len(products), pa.string())
    else:
        keys = products.column("group").combine_chunks()
        if relation == "family":
            # A family may have the name of another product's group.
            groups = pc.binary_join_element_wise(keys, "group", "\0")
            keys = pc.coalesce(products.column("family").combine_chunks(), groups)
    indices = keys.take(pa.array(rows)).dictionary_encode().indices
    codes: np.ndarray = indices.fill_null(-1).to_numpy().astype(np.int64)
    return codes


class Judgements:
    """The judged products of each query, and of each product that is a query.

    Args:
        products: the catalogue.
        rows: examples; those of weight 0 are no judgements of relevance.
        others: relevant pairs that are no examples.
        max_per_query: so many with the largest weights are kept, of ties those of `rows`: a batch
            stays small.
    """

    def __init__(
        self,
        products: Table,
        rows: ExampleRows,
        others: Sequence[ExampleRows] = (),
        max_per_query: int = 64,
    ) -> None:
        self.num_products = len(products)
        parts = (rows, *others)
        product = np.concatenate([part.product for part in parts])
        query = np.concatenate([part.query for part in parts])
        query_product = np.concatenate([part.query_product for part in parts])
        weight = np.concatenate([part.weight for part in parts])
        is_other = np.repeat([False, *[True] * len(others)], [len(part) for part in parts])

        # Queries and query products in one numbering.
        is_judged = (weight > 0) & ((query != NO_ROW) | (query_product != NO_ROW))
        number = np.where(query != NO_ROW, self.num_products + query, query_product)
        table = np.stack([number, product, is_other], 1)[is_judged].astype(np.int64)
        weight = weight[is_judged]

        # Each pair once, with its largest weight: one judgement may be shown several times.
        order = np.lexsort((table[:, 2], -weight, table[:, 1], table[:, 0]))
        table = table[order]
        weight = weight[order]
        is_first = np.ones(len(table), bool)
        is_first[1:] = (np.diff(table[:, 0]) != 0) | (np.diff(table[:, 1]) != 0)
        table = table[is_first]
        weight = weight[is_first]

        # The largest weights of each query.
        order = np.lexsort((table[:, 2], -weight, table[:, 0]))
        ordered = table[order, 0]
        rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
        order = order[rank < max_per_query]
        self.number = table[order, 0]
        self.weight = weight[order]
        distinct, place = np.unique(table[order, 1], return_inverse=True)
        ids = products.column("product_id").take(pa.array(distinct)).to_pylist()
        self.key = np.array([stable_hash(product_id) for product_id in ids], np.int64)[place]
        counts = np.unique(self.number, return_counts=True)[1]
        self.width = int(counts.max(initial=0))

    def of_query(self, query: int, query_product: int) -> tuple[list[int], list[float]]:
        """(J,) `product` keys and (J,) weights of a query's judged products.

        J is the same for all queries; `NO_KEY` and 0 where one has fewer.

        Args:
            query: row of `queries/`, or `NO_ROW`.
            query_product: row of `products/`, where `query` is `NO_ROW`.
        """
        if query == NO_ROW:
            number = query_product
        else:
            number = self.num_products + query
        own = slice(*np.searchsorted(self.number, (number, number + 1)))
        missing = self.width - (own.stop - own.start)
        keys = [*self.key[own].tolist(), *[NO_KEY] * missing]
        weights = [*self.weight[own].tolist(), *[0.0] * missing]
        return keys, weights
