"""How good a ranking is: pure functions on integer ids.

hit@k and recall@k are two things: the share of queries with at least one relevant product in the
first k, and the mean share of a query's relevant products there. With the exact top k as
"relevant", recall@k is the recall of an approximate index.

Each metric is the mean of its `..._per_query` values; `bootstrap_interval` shows how certain it
is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

BOOTSTRAP_CELLS = 20_000_000
"""Numbers of a block of bootstrap resamples."""

NO_ROW = -1
"""Pads rows of ids: fewer products were found, or fewer are relevant."""


def hit_at_k(retrieved: ArrayLike, relevant: ArrayLike, k: int) -> float:
    """Share of queries with at least one relevant product in the first k of (Q, K) results.

    See `hit_at_k_per_query`.
    """
    return float(hit_at_k_per_query(retrieved, relevant, k).mean())


def recall_at_k(retrieved: ArrayLike, relevant: ArrayLike, k: int) -> float:
    """Mean over queries of the share of relevant products in the first k of (Q, K) results.

    See `recall_at_k_per_query`.
    """
    return float(recall_at_k_per_query(retrieved, relevant, k).mean())


def best_recall_at_k(relevant: ArrayLike, k: int) -> float:
    """The recall@k of a perfect ranking, of (Q, R) relevant products.

    Below 1 where a query has more than k relevant products.
    """
    return float(best_recall_at_k_per_query(relevant, k).mean())


def mrr(retrieved: ArrayLike, relevant: ArrayLike) -> float:
    """Mean reciprocal rank of the first relevant of (Q, K) results. See `mrr_per_query`."""
    return float(mrr_per_query(retrieved, relevant).mean())


def average_precision(retrieved: ArrayLike, relevant: ArrayLike) -> float:
    """Mean average precision (mAP) of (Q, K) results. See `average_precision_per_query`."""
    return float(average_precision_per_query(retrieved, relevant).mean())


def ndcg_at_k(retrieved: ArrayLike, relevant: ArrayLike, grades: ArrayLike, k: int) -> float:
    """Mean normalized discounted cumulative gain of the first k of (Q, K) results.

    See `ndcg_at_k_per_query`.
    """
    return float(ndcg_at_k_per_query(retrieved, relevant, grades, k).mean())


def hit_at_k_per_query(retrieved: ArrayLike, relevant: ArrayLike, k: int) -> NDArray[np.float64]:
    """1.0 for each query with at least one relevant product in its first k results, else 0.0.

    Args:
        retrieved: (Q, K) int ids, best first, -1 where fewer than K were found.
        relevant: (Q, R) int ids, -1 padded; every query has at least one.
        k: 1 <= k <= K.

    Returns:
        (Q,) float64.

    Raises:
        ValueError: k > K, a query without relevant products, an id twice in a row (the row number
            is in the message).
    """
    found = _found(retrieved, relevant)
    return np.asarray(found[:, : _checked_k(k, found.shape[1])].any(axis=1), np.float64)


def recall_at_k_per_query(retrieved: ArrayLike, relevant: ArrayLike, k: int) -> NDArray[np.float64]:
    """(Q,) float64, the share of each query's relevant products in its first k results.

    Arguments as `hit_at_k_per_query`.
    """
    found = _found(retrieved, relevant)
    count: NDArray[np.int64] = found[:, : _checked_k(k, found.shape[1])].sum(axis=1)
    return np.asarray(count / _num_relevant(relevant))


def best_recall_at_k_per_query(relevant: ArrayLike, k: int) -> NDArray[np.float64]:
    """(Q,) float64, the recall@k of a perfect ranking: min(k, relevant) / relevant."""
    count = _num_relevant(relevant)
    return np.asarray(np.minimum(_checked_k(k, None), count) / count)


def mrr_per_query(retrieved: ArrayLike, relevant: ArrayLike) -> NDArray[np.float64]:
    """(Q,) 1 / rank of the first relevant product, 0 where none of the K hits is relevant."""
    found = _found(retrieved, relevant)
    if found.shape[1]:
        first = found.argmax(axis=1)
    else:
        first = np.zeros(len(found), np.int64)
    return np.where(found.any(axis=1), 1.0 / (first + 1.0), 0.0)


def average_precision_per_query(retrieved: ArrayLike, relevant: ArrayLike) -> NDArray[np.float64]:
    """Mean precision at the ranks of a query's relevant products, 0 for those not retrieved.

    Returns (Q,) float64. Only K results are seen: with more than K relevant products even a perfect
    ranking stays below 1. Arguments as `hit_at_k_per_query`.
    """
    found = _found(retrieved, relevant)
    rank = np.arange(1, found.shape[1] + 1)
    precision = found.cumsum(axis=1) / rank  # (Q, K)
    return (precision * found).sum(axis=1) / _num_relevant(relevant)


def ndcg_at_k_per_query(
    retrieved: ArrayLike, relevant: ArrayLike, grades: ArrayLike, k: int
) -> NDArray[np.float64]:
    """Discounted gain of the first k results over that of the best order of all judged products.

    The gain is the grade, the discount log2(rank + 1) (Jarvelin and Kekalainen, 2002).

    Args:
        retrieved: (Q, K) int ids, best first, -1 padded.
        relevant: (Q, R) int ids of all judged products, -1 padded.
        grades: (Q, R) float, >= 0, aligned with `relevant`; at least one above 0 per query.
        k: 1 <= k <= K.

    Returns:
        (Q,) float64.

    Raises:
        ValueError: shapes differ, a grade is negative or not finite, a query has no grade above 0.
    """
    position = _position(retrieved, relevant)  # (Q, K)
    judged = _as_ids(relevant, "relevant")
    gain = _checked_grades(judged, np.asarray(grades, np.float64))  # (Q, R)
    k = _checked_k(k, position.shape[1])
    discount = 1.0 / np.log2(np.arange(2, k + 2))
    got = np.where(position >= 0, np.take_along_axis(gain, np.maximum(position, 0), axis=1), 0.0)[
        :, :k
    ]
    ideal = -np.sort(-gain, axis=1)[:, :k]
    return (got @ discount) / (ideal @ discount[: ideal.shape[1]])


class PreparedNdcg:
    """nDCG@k of the same queries for many rankings, such as those of settings that are compared.

    Equals `ndcg_at_k`; judgements are checked and sorted once.

    Args:
        relevant: (Q, R) int rows of all judged products, -1 padded.
        grades: (Q, R) float, aligned with `relevant`.
        num_products: N; judged rows from N on are never found.
        k: hits that count.
    """

    def __init__(
        self, relevant: ArrayLike, grades: ArrayLike, num_products: int, k: int = 10
    ) -> None:
        judged = _as_ids(relevant, "relevant")
        gain = _checked_grades(judged, np.asarray(grades, np.float64))  # (Q, R)
        self.k = k
        self.gain = np.zeros((len(judged), num_products + 1), np.float32)  # last column: no hit
        query, column = np.nonzero((judged >= 0) & (judged < num_products))
        self.gain[query, judged[query, column]] = gain[query, column]
        self.discount = 1.0 / np.log2(np.arange(2, k + 2))
        ideal = -np.sort(-gain, axis=1)[:, :k]
        self.ideal = ideal @ self.discount[: ideal.shape[1]]  # (Q,)

    def mean(self, rows: NDArray[np.int64]) -> float:
        """The mean over queries; `rows` are (Q, K) hits, best first, -1 padded."""
        found = np.take_along_axis(self.gain, rows[:, : self.k], axis=1)
        return float(((found @ self.discount[: found.shape[1]]) / self.ideal).mean())


def bootstrap_interval(
    values: ArrayLike, *, level: float = 0.95, samples: int = 1000, seed: int = 0
) -> NDArray[np.float64]:
    """The percentile bootstrap interval of a mean over queries.

    Args:
        values: (Q,) or (Q, F) per-query values; the F columns are resampled together.
        level: share of the bootstrap means inside the interval.
        samples: number of resamples of Q queries.
        seed: equal seeds give equal intervals.

    Returns:
        (2,) or (2, F) float64: lower and upper end.

    Raises:
        ValueError: no queries, or values that are not finite.
    """
    array = np.asarray(values, np.float64)
    if array.ndim not in (1, 2) or not len(array):
        raise ValueError(
            f"values has shape {array.shape}; expected (Q,) or (Q, F) with at least one query"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"values of query {np.argwhere(~np.isfinite(array))[0][0]} are not finite")
    generator = np.random.default_rng(seed)
    count = len(array)
    # How often each query is drawn into a resample is multinomial, and the resample's mean a
    # weighted mean.
    block = max(1, BOOTSTRAP_CELLS // count)
    drawn = [min(block, samples - first) for first in range(0, samples, block)]
    shares = np.full(count, 1 / count)
    means = np.concatenate(
        [generator.multinomial(count, shares, size) @ array / count for size in drawn]
    )
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)


def _found(retrieved: ArrayLike, relevant: ArrayLike) -> NDArray[np.bool_]:
    """(Q, K) bool: the hit is relevant. Refuses queries without relevant products."""
    _num_relevant(relevant)
    return _position(retrieved, relevant) >= 0


def _num_relevant(relevant: ArrayLike) -> NDArray[np.int64]:
    """(Q,) number of relevant products, at least 1 each."""
    count = (_as_ids(relevant, "relevant") != NO_ROW).sum(axis=1)
    if not len(count):
        raise ValueError("no queries to measure")
    if not count.all():
        row = int((count == 0).argmax())
        raise ValueError(
            f"query {row} has no relevant products: drop such queries and report their number"
        )
    return count


def _position(retrieved: ArrayLike, relevant: ArrayLike) -> NDArray[np.int64]:
    """(Q, K) column of `relevant` that holds the hit, -1 where it is not relevant."""
    got = _as_ids(retrieved, "retrieved")
    wanted = _as_ids(relevant, "relevant")
    if len(got) != len(wanted):
        raise ValueError(f"retrieved has {len(got)} queries, relevant has {len(wanted)}")
    if ((got[:, :-1] == NO_ROW) & (got[:, 1:] != NO_ROW)).any():
        row = int(((got[:, :-1] == NO_ROW) & (got[:, 1:] != NO_ROW)).any(axis=1).argmax())
        raise ValueError(
            f"retrieved: query {row} has -1 before a product; -1 may only fill the end of a row"
        )
    # Ids may be 64-bit hashes: number them densely, so that (query, id) fits into one integer.
    ids, dense = np.unique(np.concatenate([got.ravel(), wanted.ravel()]), return_inverse=True)
    query = np.arange(len(got))[:, None] * len(ids)
    got_keys = query + dense[: got.size].reshape(got.shape)
    wanted_keys = query + dense[got.size :].reshape(wanted.shape)
    _check_no_duplicates(got, got_keys, "retrieved")
    _check_no_duplicates(wanted, wanted_keys, "relevant")
    if not wanted.size:
        return np.full(got.shape, NO_ROW)
    order = np.argsort(wanted_keys, axis=None)
    where = np.searchsorted(wanted_keys.ravel(), got_keys, sorter=order).clip(max=wanted.size - 1)
    match = (wanted_keys.ravel()[order[where]] == got_keys) & (got != NO_ROW)
    return np.where(match, order[where] % wanted.shape[1], NO_ROW)


def _as_ids(array: ArrayLike, name: str) -> NDArray[np.int64]:
    ids = np.asarray(array)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"{name} has shape {ids.shape} and dtype {ids.dtype}; expected a (Q, K) array of "
            "integers"
        )
    return ids.astype(np.int64, copy=False)


def _check_no_duplicates(ids: NDArray[np.int64], keys: NDArray[np.int64], name: str) -> None:
    row, column = np.nonzero(ids != NO_ROW)
    values, first, count = np.unique(keys[row, column], return_index=True, return_counts=True)
    if len(values) < len(row):
        at = first[count > 1][0]
        raise ValueError(
            f"{name}: query {row[at]} has id {ids[row[at], column[at]]} more than once"
        )


def _checked_k(k: int, limit: int | None) -> int:
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"k={k!r}; expected an integer of at least 1")
    if limit is not None and k > limit:
        raise ValueError(
            f"k={k} but only {limit} results per query were retrieved: retrieve at least k"
        )
    return int(k)


def _checked_grades(judged: NDArray[np.int64], grades: NDArray[np.float64]) -> NDArray[np.float64]:
    """(Q, R) gains, 0 where padded."""
    if grades.shape != judged.shape:
        raise ValueError(f"grades has shape {grades.shape}, relevant has {judged.shape}")
    grades = np.where(judged == NO_ROW, 0.0, grades)
    # A grade that is not a number, and a query without a positive grade, have no gain.
    wrong = ~np.isfinite(grades) | (grades < 0)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"grades: query {row} has grade {grades[row, column]}; expected finite numbers >= 0"
        )
    if not len(grades):
        raise ValueError("no queries to measure")
    best = grades.max(axis=1, initial=0.0)
    if not best.all():
        raise ValueError(
            f"query {int((best == 0).argmax())} has no grade above 0: drop such queries"
        )
    return grades
