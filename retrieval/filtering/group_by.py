"""Hits without some rows and their relatives, and at most one hit of each group.

Groups and families are codes: one number for each row, equal for rows that belong together, -1 for
a row without relatives. The functions here search for more hits than wanted and drop some.
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
"""(Q, D) queries and K -> (Q, K) nearest rows; fewer only where there are no more rows."""

FETCH_FACTORS = (3, 12)
"""Hits that are searched for each hit wanted, in one attempt after the other."""


def mask_with_relatives(rows: Rows, codes: Codes) -> Mask:
    """(N,) bool: the rows, and all rows with the same code as one of them.

    Args:
        rows: (n,) row numbers.
        codes: (N,) int32.
    """
    mask = np.zeros(len(codes), np.bool_)
    for code in np.unique(codes[rows]):
        if code >= 0:
            mask |= codes == code
    mask[rows] = True
    return mask


def search_excluding(search: Search, queries: Vectors, k: int, rows: Rows) -> Hits:
    """The first k hits that are none of a few rows: searches for as many hits more.

    Args:
        search: among all rows that may be found otherwise.
        queries: (Q, D) float32.
        k: number of hits.
        rows: (n,) row numbers to leave out.

    Returns:
        (Q, k); fewer only where there are no more rows.
    """
    hits = search(queries, k + len(rows))
    kept = ~np.isin(hits.rows, rows) & (hits.rows >= 0)
    return hits.keep_first(kept, k)


def search_grouped(
    search: Search,
    search_unmasked: Callable[[Vectors, int, Mask], Hits],
    queries: Vectors,
    k: int,
    codes: Codes,
) -> Hits:
    """The first k hits of which no two have the same code.

    Args:
        search: among all rows that may be found.
        search_unmasked: the same, without the rows of a (N,) mask.
        queries: (Q, D) float32.
        k: number of hits.
        codes: (N,) int32.

    Returns:
        (Q, k); fewer only where every other row belongs to a hit.
    """
    hits = Hits.empty(len(queries), k)

    # Search for some times k hits and keep the first of each group.
    open_queries = np.arange(len(queries))
    for factor in FETCH_FACTORS:
        found = search(queries[open_queries], factor * k)
        kept = found.keep_first(first_of_each_code(found.rows, codes), k)
        hits.scores[open_queries] = kept.scores
        hits.rows[open_queries] = kept.rows
        is_short = hits.rows[open_queries, -1] < 0
        has_more = found.rows[:, -1] >= 0
        open_queries = open_queries[is_short & has_more]
        if not len(open_queries):
            return hits

    # A few large groups fill the first hits: search on without the groups found so far.
    for query in open_queries:
        filled = int(np.count_nonzero(hits.rows[query] >= 0))
        while filled < k:
            seen = mask_with_relatives(hits.rows[query, :filled], codes)
            found = search_unmasked(queries[query : query + 1], k, seen)
            more = found.keep_first(first_of_each_code(found.rows, codes), k - filled)
            if more.rows[0, 0] < 0:
                break
            hits.scores[query, filled:] = more.scores[0]
            hits.rows[query, filled:] = more.rows[0]
            filled = int(np.count_nonzero(hits.rows[query] >= 0))
    return hits


def first_of_each_code(rows: Rows, codes: Codes) -> Mask:
    """(Q, K) rows -> (Q, K) bool: hits whose code is not that of an earlier hit."""
    code = np.where(rows >= 0, codes[rows], -1).astype(np.int64)
    # A row without a code gets one of its own, above all others.
    own = int(code.max(initial=-1)) + 2 + rows
    code = np.where(code >= 0, code, own)
    order = np.argsort(code, axis=1, kind="stable")
    ordered = np.take_along_axis(code, order, axis=1)
    is_first = np.ones(rows.shape, np.bool_)
    np.put_along_axis(is_first, order[:, 1:], ordered[:, 1:] != ordered[:, :-1], axis=1)
    return is_first & (rows >= 0)
