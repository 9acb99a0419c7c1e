"""Hits of which no two belong together, and hits without some rows and all that belongs to them.

Groups and families come as codes: one number for each row, equal for rows that belong together, -1
  for a row that
belongs to nothing. The functions here ask a search for more results than wanted and drop some; what
a search is, they are told.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tritower.retrieval.ranking.hits import Hits

Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]
Codes = NDArray[np.int32]
Mask = NDArray[np.bool_]
Search = Callable[[Vectors, int], Hits]
"""(Q, D) queries and K -> the K nearest; fewer only where there are no more rows."""

FETCHED = (3, 12)
"""Results to ask for per result wanted, one after the other."""


def with_relatives(rows: Rows, codes: Codes) -> Mask:
    """(N,) bool: some rows, and all rows that belong to the same as one of them.

    Args:
        rows: row numbers.
        codes: (N,) int32.
    """
    mask = np.zeros(len(codes), np.bool_)
    for code in np.unique(codes[rows]):
        if code >= 0:
            mask |= codes == code
    mask[rows] = True
    return mask


def without_rows(search: Search, queries: Vectors, k: int, rows: Rows) -> Hits:
    """The first k results that are none of some rows; for few rows, since as many results more are asked for.

    Args:
        search: among all rows that may be found otherwise.
        queries: (Q, D) float32.
        k: results wanted.
        rows: what to leave out.

    Returns:
        (Q, k); fewer were found only where there are no more rows.
    """
    found = search(queries, k + len(rows))
    return found.first(~np.isin(found.rows, rows) & (found.rows >= 0), k)


def one_each(
    search: Search,
    without: Callable[[Vectors, int, Mask], Hits],
    queries: Vectors,
    k: int,
    codes: Codes,
) -> Hits:
    """The first k results of which no two belong together.

    Args:
        search: among all rows that may be found.
        without: the same, among those of them that a (N,) mask is False for.
        queries: (Q, D) float32.
        k: results wanted.
        codes: (N,) int32.

    Returns:
        (Q, k); fewer were found only where there is nothing more that does not belong to a result.
    """
    hits = Hits.none(len(queries), k)
    left = np.arange(len(queries))
    for factor in FETCHED:
        found = search(queries[left], factor * k)
        hits.scores[left], hits.rows[left] = found.first(_new(found.rows, codes), k)
        left = left[(hits.rows[left, -1] < 0) & (found.rows[:, -1] >= 0)]
        if not len(left):
            return hits
    for query in left:  # few groups fill the first results: go on without them
        while (filled := int(np.count_nonzero(hits.rows[query] >= 0))) < k:
            seen = with_relatives(hits.rows[query, :filled], codes)
            found = without(queries[query : query + 1], k, seen)
            more = found.first(_new(found.rows, codes), k - filled)
            if more.rows[0, 0] < 0:
                break
            hits.scores[query, filled:], hits.rows[query, filled:] = more.scores[0], more.rows[0]
    return hits


def _new(rows: Rows, codes: Codes) -> Mask:
    """(Q, K) bool: results that do not belong to one before them."""
    belongs = np.where(rows >= 0, codes[rows], -1).astype(np.int64)
    belongs = np.where(
        belongs >= 0, belongs, len(codes) + 1 + rows
    )  # a row that belongs to nothing is its own
    order = np.argsort(belongs, axis=1, kind="stable")
    ordered = np.take_along_axis(belongs, order, axis=1)
    new = np.ones(rows.shape, np.bool_)
    np.put_along_axis(new, order[:, 1:], ordered[:, 1:] != ordered[:, :-1], axis=1)
    return new & (rows >= 0)
