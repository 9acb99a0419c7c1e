"""Which lists of an index hold rows of a selection, and which of them a query has to visit.

A search among all rows that visits P lists sees rows of the P nearest ones. To find as much among
some rows takes more:

* Where the selection has nothing to do with the vectors, a list of which the share s may be found
  counts as s^0.35 of a list, and lists that sum up to P are visited. (P / s lists would hold as
  many such rows; fewer do, since the best of fewer rows are further apart. With this power, a tenth
  of the rows is found as well as all of them.)
* Where it has, a query may be far from all that may be found. It sees those rows at about the same
  distance, so that its neighbors spread over many lists. Lists are visited too, then, that are not
  much further away than those where the first rows were met. The further these are from where the
  query is, the further it goes; the unit is the distance that its own P nearest lists span.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from tritower.retrieval.ivf.engine import Engine
from tritower.retrieval.ivf.ivf_pq import quantizer_parameters

SHARE_EXPONENT = 0.35
"""What a list counts: its share of rows that may be found to this power."""

NEAR = 0.5
FAR = 1.5
"""How much further away lists are visited, in that unit.

For a query among the rows that may be found, and at most.
"""

ANCHOR = 2
"""Rows met per result wanted before that distance begins."""

UNRELATED = 0.1
"""Variance of the lists' shares beyond chance, relative to the squared mean share, up to which a
selection counts as unrelated to the vectors.
"""

COMPARED_LISTS = 6000
"""Lists that are all compared with a query sooner than looked up."""

STEP = 1.25
"""Numbers of lists are rounded up to powers of this.

There are few different ones then, and parameters for each.
"""

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
        self._ivf = ivf
        self._quantizer = faiss.downcast_index(ivf.quantizer)
        self._total = int(ivf.nlist)
        sizes = _count(lists_of, self._total)
        self._rows = _count((lists[mask] for lists in lists_of), self._total)
        self._weights = ((self._rows / np.maximum(sizes, 1)) ** SHARE_EXPONENT).astype(np.float32)
        share = self._rows.sum() / sizes.sum()
        self._mean_weight = share**SHARE_EXPONENT
        self.unrelated = _is_unrelated(self._rows, sizes, share)
        self._held = np.flatnonzero(self._rows)
        self._parameters: dict[int, Any] = {}

    def to_visit(self, queries: Vectors, nprobe: int, k: int) -> Lists:
        """The lists that each query has to visit for k results.

        Args:
            queries: (Q, D) float32, as the lists take them.
            nprobe: lists that a search among all rows visits.
            k: results wanted.
        """
        # Rows drawn independently of their vectors: proportionally more lists hold as many of them.
        if self.unrelated:
            return _compact(*self._nearest(queries, stepped(nprobe / self._mean_weight)))
        few = len(self._held) <= COMPARED_LISTS
        found = self._nearest(
            queries, nprobe if few else max(nprobe, stepped(1.5 * nprobe / self._mean_weight))
        )
        # The scores of the first nprobe lists show how far an unfiltered search would reach.
        own = found[1][:, :nprobe]
        best = own[:, :1]
        span = own[:, :1] - np.where(own > NOTHING, own, np.inf).min(axis=1, keepdims=True)
        done = np.zeros(len(queries), np.bool_)
        if not few:
            needed, done = self._needed(*found, best, span, nprobe, k)
        if done.all():
            return _compact(*found, needed)
        # Queries whose reach is not covered yet look at all lists of the selection.
        left = ~done
        lists, scores = self._ranked(queries[left])
        further = _compact(
            lists, scores, self._needed(lists, scores, best[left], span[left], nprobe, k)[0]
        )
        if left.all():
            return further
        return _merged(done, _compact(found[0][done], found[1][done], needed[done]), further)

    def all(self, queries: Vectors) -> Lists:
        """All lists that hold rows of the selection, for each of the (Q, D) queries."""
        return self._ranked(queries)

    def _needed(
        self,
        lists: NDArray[np.int64],
        scores: Vectors,
        best: Vectors,
        span: Vectors,
        nprobe: int,
        k: int,
    ) -> tuple[Mask, Mask]:
        """Which lists to visit, and for which queries they are enough.

        Args:
            lists: (Q, W), nearest first, -1 where there are none.
            scores: (Q, W).
            best: (Q, 1) score of the nearest of all lists.
            span: (Q, 1) how much lower the `nprobe`-th of all lists scores.
            nprobe: lists that a search among all rows visits.
            k: results wanted.
        """
        rows = self._rows[lists] * (lists >= 0)
        enough = np.cumsum(self._weights[lists] * (rows > 0), axis=1) >= nprobe
        met = np.cumsum(rows, axis=1) >= ANCHOR * k
        anchor = np.take_along_axis(scores, met.argmax(axis=1)[:, None], axis=1)
        further = np.minimum(NEAR * span + np.maximum(best - anchor, 0), FAR * span)
        over = enough & met & (scores < anchor - further)
        needed = ~over
        # The list that makes it enough is scanned, too.
        needed[:, 1:] |= ~enough[:, :-1]
        return needed & (rows > 0), over[:, -1]

    def _nearest(self, queries: Vectors, count: int) -> Lists:
        """(Q, count) the nearest of all lists, -1 where fewer were found."""
        count = min(count, self._total)
        if count not in self._parameters:
            self._parameters[count] = quantizer_parameters(self._ivf, count)
        scores, lists = self._quantizer.search(queries, count, params=self._parameters[count])
        return lists, scores

    def _ranked(self, queries: Vectors) -> Lists:
        """(Q, H) all lists that hold rows, nearest first."""
        held = self._held
        dim = queries.shape[1]
        if len(queries) == 1:  # without a copy of their centers
            scores = np.empty((1, len(held)), np.float32)
            pointers = (
                faiss.swig_ptr(scores),
                faiss.swig_ptr(queries),
                self._centers.get_xb(),
                faiss.swig_ptr(held),
            )
            faiss.fvec_inner_products_by_idx(*pointers, dim, 1, len(held))
        else:
            centers = faiss.rev_swig_ptr(self._centers.get_xb(), self._total * dim).reshape(-1, dim)
            scores = np.ascontiguousarray(queries @ centers[held].T)
        # Nearest lists first.
        order = np.argsort(-scores, axis=1)
        return held[order], np.take_along_axis(scores, order, axis=1)

    @cached_property
    def _centers(self) -> Any:
        """FAISS index of the centers of all lists."""
        if isinstance(self._quantizer, faiss.IndexFlat):
            return self._quantizer
        if isinstance(self._quantizer, faiss.IndexRefine):
            return faiss.downcast_index(self._quantizer.refine_index)
        flat = faiss.IndexFlatIP(self._quantizer.d)
        flat.add(self._quantizer.reconstruct_n(0, self._total))
        return flat


def lists_of_rows(engine: Engine) -> NDArray[Any]:
    """(S, N) unsigned integers.

    The lists of each row; L, the number of lists, for none.

    Args:
        engine: has L lists; a row is in S of them at most.
    """
    total = int(engine.ivf.nlist)
    found = np.full((2 if engine.spill else 1, engine.count), total, np.min_scalar_type(total))
    lists = engine.ivf.invlists
    # Read the rows of each list; with spill, a row may be in a second list.
    for number in range(total):
        if size := lists.list_size(number):
            held = lists.get_ids(number)
            rows = faiss.rev_swig_ptr(held, size)
            if len(found) == 1:
                found[0, rows] = number
            else:
                taken = found[0, rows] < total
                found[0, rows[~taken]] = number
                found[1, rows[taken]] = number
            lists.release_ids(number, held)
    return found


def stepped(number: float) -> int:
    """The next power of `STEP`, as an integer."""
    return int(np.ceil(STEP ** np.ceil(np.log(max(number, 1)) / np.log(STEP) - 1e-9)))


def _count(lists_of: Iterable[NDArray[Any]], total: int) -> NDArray[np.int64]:
    """(L,) how often each list occurs."""
    counts = np.zeros(total, np.int64)
    for lists in lists_of:
        counts += np.bincount(lists, minlength=total + 1)[:total]
    return counts


def _is_unrelated(rows: NDArray[np.int64], sizes: NDArray[np.int64], share: float) -> bool:
    """Whether the lists' shares of rows differ hardly more than by chance."""
    filled = sizes > 0
    observed = np.average((rows[filled] / sizes[filled] - share) ** 2, weights=sizes[filled])
    by_chance = share * (1 - share) * np.count_nonzero(filled) / sizes.sum()
    return bool(observed - by_chance <= UNRELATED * share**2)


def _compact(lists: NDArray[np.int64], scores: Vectors, kept: Mask | None = None) -> Lists:
    """The lists that are kept, moved to the front.

    What is passed over must not have a score, or it spoils rounding.
    """
    kept = lists >= 0 if kept is None else kept
    if kept.all() and kept.size:
        return lists, scores
    # FAISS refuses more lists than the index has.
    width = min(lists.shape[1], stepped(int(kept.sum(axis=1).max(initial=1))))
    # Move the kept lists of each query to the front, in their order.
    front = np.full((len(lists), width), -1, np.int64)
    front_scores = np.zeros((len(lists), width), np.float32)
    query, place = np.nonzero(kept)
    to = (np.cumsum(kept, axis=1) - 1)[query, place]
    front[query, to] = lists[query, place]
    front_scores[query, to] = scores[query, place]
    return front, front_scores


def _merged(first: Mask, block_rows: Lists, others: Lists) -> Lists:
    """The lists of all queries, of which the first ones are those where (Q,) `first` is True."""
    width = max(block_rows[0].shape[1], others[0].shape[1])
    lists = np.full((len(first), width), -1, np.int64)
    scores = np.zeros((len(first), width), np.float32)
    for which, (numbers, closeness) in ((first, block_rows), (~first, others)):
        lists[which, : numbers.shape[1]] = numbers
        scores[which, : numbers.shape[1]] = closeness
    return lists, scores
