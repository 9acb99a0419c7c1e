"""Which lists of an index hold rows of a selection, and which of them a query has to visit.

A search among all rows that visits P lists sees rows of the P nearest ones. To find as much among some rows takes more:

* Where the selection has nothing to do with the vectors, a list of which the share s may be found counts as sqrt(s) of
  a list, and lists that sum up to P are visited. (P / s lists would hold as many such rows; fewer do, since the best of
  fewer rows are further apart.)
* Where it has, a query may be far from all that may be found. It sees those rows at about the same distance, so that
  its neighbours spread over many lists. Lists are visited too, then, that are not much further away than those where
  the first rows were met. The further these are from where the query stands, the further it goes; the unit is the
  distance that its own P nearest lists span.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from retrieval.engine import Engine
from retrieval.mapped import quantizer_parameters

SHARE_EXPONENT = 0.5
"""What a list counts: its share of rows that may be found to this power."""

NEAR, FAR = 0.5, 1.5
"""How much further away lists are visited, in that unit: for a query among the rows that may be found, and at most."""

ANCHOR = 2
"""Rows met per result wanted before that distance begins."""

UNRELATED = 0.1
"""Variance of the lists' shares beyond chance, in parts of the mean share squared, up to which a selection counts as
one that has nothing to do with the vectors."""

MOST = 0.9
"""Share of lists that hold rows above which all are looked up: leaving some out costs more."""

STEP = 1.25
"""Numbers of lists are rounded up to powers of this: there are few different ones then, and parameters for each."""

NOTHING = -1e30
"""Scores below it mean that FAISS found no list."""

Vectors = NDArray[np.float32]
Mask = NDArray[np.bool_]
Lists = tuple[NDArray[np.int64], Vectors]
"""(Q, W) lists to visit and their scores; -1 and 0 where a query visits fewer than W."""


class SelectedLists:
    """The lists that hold rows of a selection.

    Args:
        ivf: FAISS index with L lists.
        lists_of: as of `lists_of_rows`.
        mask: (N,) bool, the rows that may be found.

    Attributes:
        unrelated: the selection has nothing to do with the vectors.
    """

    def __init__(self, ivf: Any, lists_of: NDArray[Any], mask: Mask) -> None:
        self._ivf, self._quantizer = ivf, faiss.downcast_index(ivf.quantizer)
        self._total = int(ivf.nlist)
        sizes = _count(lists_of, self._total)
        self._rows = _count((lists[mask] for lists in lists_of), self._total)
        self._weights = ((self._rows / np.maximum(sizes, 1)) ** SHARE_EXPONENT).astype(np.float32)
        share = self._rows.sum() / sizes.sum()
        self._mean_weight = share**SHARE_EXPONENT
        self.unrelated = _is_unrelated(self._rows, sizes, share)
        self._held = int(np.count_nonzero(self._rows))
        self._selector: Any = None
        if self._held < MOST * self._total and isinstance(self._quantizer, faiss.IndexFlat | faiss.IndexRefine):
            self._bits = np.packbits(self._rows > 0, bitorder="little")
            self._selector = faiss.IDSelectorBitmap(self._bits)
        self._parameters: dict[tuple[int, bool], Any] = {}

    def to_visit(self, queries: Vectors, nprobe: int, k: int) -> Lists:
        """The lists that each query has to visit for k results.

        Args:
            queries: (Q, D) float32, as the lists take them.
            nprobe: lists that a search among all rows visits.
            k: results wanted.
        """
        if self.unrelated:
            count = min(self._total, stepped(nprobe / self._mean_weight))
            return _compact(*self._nearest(queries, count, False))
        asked, selective = stepped(1.5 * nprobe / self._mean_weight), self._selector is not None
        most = self._held if selective else self._total
        first = self._nearest(queries, min(nprobe, self._total), False)[1] if selective else None
        while True:
            asked = min(most, asked)
            lists, scores = self._nearest(queries, asked, selective)
            own = scores[:, :nprobe] if first is None else first
            rows = self._rows[lists] * (lists >= 0)
            enough = np.cumsum(self._weights[lists] * (rows > 0), axis=1) >= nprobe
            met = np.cumsum(rows, axis=1) >= ANCHOR * k
            anchor = np.take_along_axis(scores, met.argmax(axis=1)[:, None], axis=1)
            span = own[:, :1] - np.where(own > NOTHING, own, np.inf).min(axis=1, keepdims=True)
            further = np.minimum(NEAR * span + np.maximum(own[:, :1] - anchor, 0), FAR * span)
            done = enough & met & (scores < anchor - further)
            if asked == most or done[:, -1].all():
                needed = ~done
                needed[:, 1:] |= ~enough[:, :-1]  # the list with which it is enough is needed too
                return _compact(lists, scores, needed & (rows > 0))
            asked *= 4

    def all(self, queries: Vectors) -> Lists:
        """All lists that hold rows of the selection, for each query."""
        held = np.flatnonzero(self._rows)
        centres = np.stack([self._quantizer.reconstruct(int(number)) for number in held])
        lists = np.tile(held, (len(queries), 1))
        return lists, np.ascontiguousarray(queries @ centres.T, np.float32)

    def _nearest(self, queries: Vectors, count: int, selective: bool) -> Lists:
        """(Q, count) the nearest lists, of all or of those that hold rows, -1 where fewer were found."""
        key = count, selective
        if key not in self._parameters:
            selector = self._selector if selective else None
            self._parameters[key] = quantizer_parameters(self._ivf, count, selector)
        scores, lists = self._quantizer.search(queries, count, params=self._parameters[key])
        return lists, scores


def lists_of_rows(engine: Engine) -> NDArray[Any]:
    """(S, N) unsigned integers: the lists that each row stands in; L, the number of lists, for none.

    Args:
        engine: has L lists; a row stands in S of them at most.
    """
    total = int(engine.ivf.nlist)
    found = np.full((2 if engine.spill else 1, engine.count), total, np.min_scalar_type(total))
    lists = engine.ivf.invlists
    for number in range(total):
        if size := lists.list_size(number):
            held = lists.get_ids(number)
            rows = faiss.rev_swig_ptr(held, size)
            if len(found) == 1:
                found[0, rows] = number
            else:
                taken = found[0, rows] < total
                found[0, rows[~taken]], found[1, rows[taken]] = number, number
            lists.release_ids(number, held)
    return found


def stepped(number: float) -> int:
    """The next power of `STEP`, as an integer."""
    return int(np.ceil(STEP ** np.ceil(np.log(max(number, 1)) / np.log(STEP) - 1e-9)))


def _count(lists_of: Iterable[NDArray[Any]], total: int) -> NDArray[np.int64]:
    """(L,) how often each list occurs."""
    counts: NDArray[np.int64] = sum(np.bincount(lists, minlength=total + 1)[:total] for lists in lists_of)
    return counts


def _is_unrelated(rows: NDArray[np.int64], sizes: NDArray[np.int64], share: float) -> bool:
    """Whether the lists' shares of rows differ hardly more than by chance."""
    filled = sizes > 0
    observed = np.average((rows[filled] / sizes[filled] - share) ** 2, weights=sizes[filled])
    by_chance = share * (1 - share) * np.count_nonzero(filled) / sizes.sum()
    return bool(observed - by_chance <= UNRELATED * share**2)


def _compact(lists: NDArray[np.int64], scores: Vectors, kept: Mask | None = None) -> Lists:
    """The lists that are kept, moved to the front; what is passed over must not have a score, or it spoils rounding."""
    kept = lists >= 0 if kept is None else kept
    if kept.all() and kept.size:
        return lists, scores
    width = min(lists.shape[1], stepped(int(kept.sum(axis=1).max(initial=1))))  # FAISS takes no more than there are
    front, front_scores = np.full((len(lists), width), -1, np.int64), np.zeros((len(lists), width), np.float32)
    query, place = np.nonzero(kept)
    to = (np.cumsum(kept, axis=1) - 1)[query, place]
    front[query, to], front_scores[query, to] = lists[query, place], scores[query, place]
    return front, front_scores
