"""Searches among some products: those that match a filter, without some, one of each group."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tritower.retrieval.filtering.filters import Filter
from tritower.retrieval.filtering.group_by import (
    mask_with_relatives,
    search_excluding,
    search_grouped,
)
from tritower.retrieval.filtering.selection import Mask, Rows, Selection, SelectiveSearch, Vectors
from tritower.retrieval.ivf.engine import Engine, Settings
from tritower.retrieval.products.attribute_table import AttributeTable
from tritower.retrieval.ranking.hits import Hits

Grouping = Literal["group", "family"]

FEW_EXCLUDED = 100
"""Up to so many excluded rows, as many hits more are searched; more rows are masked."""

NO_ROWS: Rows = np.empty(0, np.int64)


class Exclusion(NamedTuple):
    """Products that may not be found.

    Attributes:
        rows: (n,) int64 row numbers.
        groups: exclude the other products of their groups, too.
    """

    rows: Rows = NO_ROWS
    groups: bool = False


NOTHING_EXCLUDED = Exclusion()


class FilteredSearch:
    """Search among some rows of an opened index. Several threads may use it at once.

    Args:
        engine: that searches.
        table: attributes of its rows, or None.
        alive: (N,) bool, rows that hold a product; None where all do.
    """

    def __init__(self, engine: Engine, table: AttributeTable | None, alive: Mask | None) -> None:
        self._table = table
        self._search = SelectiveSearch(engine, alive)

    def count(self, filter: Filter | None) -> int:
        """The number of products that match a filter; all for None.

        Raises:
            ValueError: an index without attributes, or a filter that `Filter.check` refuses.
        """
        return self._selection(filter).count

    def search(
        self,
        queries: Vectors,
        k: int,
        settings: Settings,
        *,
        filter: Filter | None = None,
        exclude: Exclusion = NOTHING_EXCLUDED,
        group_by: Grouping | None = None,
    ) -> Hits:
        """The nearest rows among those that may be found.

        Args:
            queries: (Q, D) float32, checked.
            k: number of hits, at least 1.
            settings: checked; those of a search among all rows with the wanted recall.
            filter: only matching rows; None for all.
            exclude: rows that may not be found.
            group_by: at most one row of each group or family.

        Returns:
            (Q, k); fewer only where there are no more rows.

        Raises:
            ValueError: an index without the attributes that are needed, or a filter that
                `Filter.check` refuses.
        """
        # Rows that match the filter, and rows to leave out. A few are left out by searching for
        # more hits, many by another mask.
        selection = self._selection(filter)
        excluded = exclude.rows
        if exclude.groups and len(excluded):
            relatives = mask_with_relatives(excluded, self._codes("group"))
            excluded = np.flatnonzero(relatives)
        if len(excluded) > FEW_EXCLUDED:
            selection = self._excluding(selection, excluded)
            excluded = NO_ROWS

        # Three searches that grouping is built on: among the selection, without excluded rows, and
        # without the rows of groups that are already among the hits.
        def search_selection(queries: Vectors, k: int) -> Hits:
            return self._search.search(queries, k, settings, selection)

        def search_allowed(queries: Vectors, k: int) -> Hits:
            if not len(excluded):
                return search_selection(queries, k)
            return search_excluding(search_selection, queries, k, excluded)

        def search_unmasked(queries: Vectors, k: int, masked: Mask) -> Hits:
            rows = np.append(np.flatnonzero(masked), excluded)
            return self._search.search(queries, k, settings, self._excluding(selection, rows))

        if group_by is None:
            return search_allowed(queries, k)
        return search_grouped(search_allowed, search_unmasked, queries, k, self._codes(group_by))

    def _selection(self, filter: Filter | None) -> Selection:
        if filter is None:
            return self._search.remembered("", lambda: np.ones(self._search.engine.count, np.bool_))
        table = self._attributes()
        filter.check(table.attribute_types)
        return self._search.remembered(str(filter), lambda: filter.mask(table))

    def _excluding(self, selection: Selection, rows: Rows) -> Selection:
        mask = selection.mask
        mask[rows] = False
        return self._search.select(mask)

    def _codes(self, grouping: Grouping) -> NDArray[np.int32]:
        table = self._attributes()
        if grouping == "group":
            codes = table.group_codes()
        else:
            codes = table.family_codes()
        if codes is None:
            names = ", ".join(table.attribute_types)
            raise ValueError(
                f"no attribute {grouping!r} in {table.file}; there are {names}: build the index "
                "with it"
            )
        return codes

    def _attributes(self) -> AttributeTable:
        if self._table is None:
            raise ValueError(
                "this index holds no attributes of its products: build it with attributes"
            )
        return self._table
