"""Hits with some rows left out, and with at most one of each group: on top of any search that can be told a mask.

More is fetched than wanted, and what is in the way dropped. Where that leaves too little, because one group fills all
that was fetched, the search is asked again for rows of other groups only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

FETCHED = 4
"""Rows fetched per hit wanted, where only one of each group is."""

Mask = NDArray[np.bool_]
Found = tuple[NDArray[np.float32], NDArray[np.int64]]


class Search(Protocol):
    """A search among some rows."""

    def __call__(self, queries: NDArray[np.float32], k: int, mask: Mask | None) -> Found:
        """(Q, k) scores, descending, and rows, -1 where fewer were found.

        Args:
            queries: (Q, D).
            k: results.
            mask: (N,) the only rows that may be found; None for all that are allowed.
        """


def limited(
    search: Search,
    allowed: Callable[[], Mask],
    queries: NDArray[np.float32],
    k: int,
    *,
    excluded: ArrayLike = (),
    codes: NDArray[np.int32] | None = None,
) -> Found:
    """The nearest rows, without some of them, and with at most one of each group.

    Args:
        search: finds rows.
        allowed: gives the (N,) rows that may be found at all; asked only where the first search leaves too few.
        queries: (Q, D) float32.
        k: results wanted.
        excluded: rows that are no hits.
        codes: (N,) group of each row, -1 for those of none, which are all shown; None for no limit.

    Returns:
        (Q, k) float32 scores, descending, and (Q, k) int64 rows; -inf and -1 where no more are left.
    """
    excluded = np.unique(np.asarray(excluded, np.int64))
    fetched = search(queries, k * (1 if codes is None else FETCHED) + len(excluded), None)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full((len(queries), k), -1, np.int64)
    for query, found in enumerate(zip(*fetched, strict=True)):
        scores[query], rows[query] = _picked(*found, k, excluded, codes)
    short = np.flatnonzero(rows[:, -1] < 0)
    if not len(short):
        return scores, rows
    left = allowed().copy()
    left[excluded] = False
    most = min(k, _distinct(left, codes))
    for query in short[(rows[short] >= 0).sum(axis=1) < most]:
        _fill(search, left, queries[query : query + 1], scores[query], rows[query], most, codes)
    return scores, rows


def _picked(
    scores: NDArray[np.float32],
    rows: NDArray[np.int64],
    k: int,
    excluded: NDArray[np.int64],
    codes: NDArray[np.int32] | None,
) -> Found:
    """The first k results of one query that may stay, filled up with -inf and -1."""
    keep = (rows >= 0) & ~np.isin(rows, excluded)
    scores, rows = scores[keep], rows[keep]
    if codes is not None:
        first = np.unique(_labels(rows, codes), return_index=True)[1]
        first.sort()
        scores, rows = scores[first], rows[first]
    missing = max(0, k - len(rows))
    return (
        np.pad(scores[:k], (0, missing), constant_values=-np.inf),
        np.pad(rows[:k], (0, missing), constant_values=-1),
    )


def _fill(
    search: Search,
    left: Mask,
    query: NDArray[np.float32],
    scores: NDArray[np.float32],
    rows: NDArray[np.int64],
    most: int,
    codes: NDArray[np.int32] | None,
) -> None:
    """Find more for one query, in place, until there are as many hits as there can be."""
    none = np.empty(0, np.int64)
    while (there := int((rows >= 0).sum())) < most:
        mask = left.copy()
        mask[rows[:there]] = False
        if codes is not None:
            seen = np.unique(codes[rows[:there]])
            mask &= ~np.isin(codes, seen[seen >= 0])
        found = search(query, (most - there) * (1 if codes is None else FETCHED), mask)
        more_scores, more_rows = _picked(found[0][0], found[1][0], most - there, none, codes)
        if more_rows[0] < 0:
            return  # the search does not find what is there
        scores[there:most], rows[there:most] = more_scores, more_rows
    order = np.argsort(-scores[:most], kind="stable")
    scores[:most], rows[:most] = scores[:most][order], rows[:most][order]


def _labels(rows: NDArray[np.int64], codes: NDArray[np.int32]) -> NDArray[np.int64]:
    """A number for the group of each row; rows of no group have one of their own, below 0."""
    groups = codes[rows].astype(np.int64)
    return np.where(groups >= 0, groups, -1 - rows)


def _distinct(mask: Mask, codes: NDArray[np.int32] | None) -> int:
    """How many hits some rows can give."""
    if codes is None:
        return int(np.count_nonzero(mask))
    groups = codes[mask]
    return int((groups < 0).sum()) + len(np.unique(groups[groups >= 0]))
