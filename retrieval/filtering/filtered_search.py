"""Searches that may not find everything.

What a filter matches, nothing of some rows' groups, one of each family.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tritower.retrieval.filtering.filters import Filter
from tritower.retrieval.filtering.group_by import one_each, with_relatives, without_rows
from tritower.retrieval.filtering.selection import Mask, Rows, Selection, SelectiveSearch, Vectors
from tritower.retrieval.ivf.engine import Engine, Settings
from tritower.retrieval.products.attribute_table import AttributeTable
from tritower.retrieval.ranking.hits import Hits

Grouping = Literal["group", "family"]

FEW_LEFT_OUT = 100
"""Rows up to which leaving out is asking for as many results more; more rows are kept from being found."""

NO_ROWS: Rows = np.empty(0, np.int64)


class Finder:
    """Finds among the rows of an opened index that may be found.

    Several threads may use it at once.

    Args:
        engine: what is searched.
        table: attributes of its rows, or None.
        alive: (N,) bool, rows that hold a product; None where all do.
    """

    def __init__(self, engine: Engine, table: AttributeTable | None, alive: Mask | None) -> None:
        self._table, self._search = table, SelectiveSearch(engine, alive)

    def count(self, filter: Filter | None) -> int:
        """How many products a filter matches; all for None.

        Raises:
            ValueError: an index without attributes, or what `Filter.check` refuses.
        """
        return self._selection(filter).count

    def search(
        self,
        queries: Vectors,
        k: int,
        settings: Settings,
        *,
        filter: Filter | None = None,
        without: Rows = NO_ROWS,
        without_groups: bool = False,
        one_per: Grouping | None = None,
    ) -> Hits:
        """The nearest rows of those that may be found.

        Args:
            queries: (Q, D) float32, checked.
            k: results wanted, at least 1.
            settings: checked; those of a search among all rows that has the recall wanted.
            filter: what may be found; None for all.
            without: rows that may not be found.
            without_groups: nor may other rows of their groups.
            one_per: find at most one row of each group or family.

        Returns:
            (Q, k); fewer were found only where there are no more.

        Raises:
            ValueError: an index without the attributes that this takes, or what `Filter.check`
                refuses.
        """
        selection = self._selection(filter)
        if without_groups and len(without):
            without = np.flatnonzero(with_relatives(without, self._codes("group")))
        if len(without) > FEW_LEFT_OUT:
            selection, without = self._without(selection, without), NO_ROWS

        def some(queries: Vectors, k: int, among: Selection = selection) -> Hits:
            return self._search.search(queries, k, settings, among)

        def others(queries: Vectors, k: int) -> Hits:
            return without_rows(some, queries, k, without) if len(without) else some(queries, k)

        if one_per is None:
            return others(queries, k)

        def unseen(queries: Vectors, k: int, seen: Mask) -> Hits:
            return some(
                queries, k, self._without(selection, np.append(np.flatnonzero(seen), without))
            )

        return one_each(others, unseen, queries, k, self._codes(one_per))

    def _selection(self, filter: Filter | None) -> Selection:
        if filter is None:
            return self._search.remembered("", lambda: np.ones(self._search.engine.count, np.bool_))
        table = self._attributes()
        filter.check(table.kinds)
        return self._search.remembered(str(filter), lambda: filter.mask(table))

    def _without(self, selection: Selection, rows: Rows) -> Selection:
        mask = selection.mask
        mask[rows] = False
        return self._search.select(mask)

    def _codes(self, grouping: Grouping) -> NDArray[np.int32]:
        table = self._attributes()
        codes = table.group_codes() if grouping == "group" else table.family_codes()
        if codes is None:
            known = ", ".join(table.kinds)
            raise ValueError(
                f"no attribute {grouping!r} in {table.file}; there are {known}: build the index with it"
            )
        return codes

    def _attributes(self) -> AttributeTable:
        if self._table is None:
            raise ValueError("this index knows no attributes of its products: build it with them")
        return self._table
