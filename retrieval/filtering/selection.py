"""Search among some rows only, however few or many they are and wherever they lie.

    few rows     their vectors are gathered once and all compared: exact
    many rows    lists are visited, as many as it takes (selected_lists.py), and scanned with a
    bitmap of the rows;
                 where that finds fewer than there are, all lists, and at last all rows

So a selection of k rows or more always gives k results.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any

import faiss
import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from tritower.retrieval.filtering.selected_lists import Lists, SelectedLists, lists_of_rows
from tritower.retrieval.ivf.engine import (
    MIN_RERANKED,
    SPILL_FACTOR,
    Engine,
    Settings,
    drop_repeated_rows,
)
from tritower.retrieval.ivf.ivf_pq import make
from tritower.retrieval.ranking.hits import Hits

FEW_BYTES = 3 << 20
"""Vectors for re-ranking up to which all are compared.

A quarter of a millisecond's work. They are copied and kept.
"""

BLOCK_BYTES = 32 << 20
"""What is held at a time of vectors that are decoded, and of lists to visit."""

WIDER = 4
"""Times as many candidates where a selection has to do with the vectors.

Codes hardly distinguish rows that are all far away.
"""

CACHED = 8
"""Selections that are remembered."""

Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Selection:
    """The rows that may be found, and what speeds up a search among them.

    Made by `SelectiveSearch`.

    Args:
        engine: what is searched.
        lists_of: gives what `lists_of_rows` gives.
        mask: (N,) bool, the rows.

    Attributes:
        count: number of rows.
        selector: FAISS IDSelector of the rows.
    """

    def __init__(self, engine: Engine, lists_of: Callable[[], NDArray[Any]], mask: Mask) -> None:
        self.count = int(np.count_nonzero(mask))
        self._engine = engine
        self._lists_of = lists_of
        self._bits = np.packbits(mask, bitorder="little")
        self.selector: Any = faiss.IDSelectorBitmap(self._bits)
        self._parameters: dict[int, Any] = {}

    @property
    def mask(self) -> Mask:
        """(N,) the rows."""
        return np.unpackbits(self._bits, count=self._engine.count, bitorder="little").view(np.bool_)

    @cached_property
    def compared_rows(self) -> tuple[Any, Rows]:
        """A FAISS index of these rows alone, and (M,) the row of each of its vectors."""
        rows = np.flatnonzero(self.mask)
        return sub_index(self._engine, rows), rows

    @cached_property
    def lists(self) -> SelectedLists:
        """The lists that hold these rows."""
        return SelectedLists(self._engine.ivf, self._lists_of(), self.mask)

    def parameters(self, lists: int) -> Any:
        """Search parameters of a scan of so many lists.

        Making them anew for each search would cost too much.
        """
        if lists not in self._parameters:
            self._parameters[lists] = make.SearchParametersIVF(nprobe=lists, sel=self.selector)
        return self._parameters[lists]


class SelectiveSearch:
    """Searches among selected rows. Several threads may do so at once.

    Args:
        engine: what is searched.
        alive: (N,) bool, rows that hold a product; None where all do.
    """

    def __init__(self, engine: Engine, alive: Mask | None = None) -> None:
        self.engine = engine
        self._alive = alive
        self._lock = threading.Lock()
        self._kept: LRUCache[str, Selection] = LRUCache(CACHED)

    def select(self, mask: Mask | None = None) -> Selection:
        """The selection of a (N,) mask, without empty rows; None for all rows."""
        if mask is None:
            mask = np.ones(self.engine.count, np.bool_)
        else:
            mask = mask
        if mask.shape != (self.engine.count,):
            raise ValueError(
                f"mask of shape {mask.shape}; expected ({self.engine.count},), one for each row"
            )
        return Selection(
            self.engine, lambda: self._lists_of, mask if self._alive is None else mask & self._alive
        )

    def remembered(self, key: str, mask: Callable[[], Mask]) -> Selection:
        """The selection of a mask that has a name; the last few are kept.

        Args:
            key: of the mask: the text of a filter.
            mask: gives the (N,) mask.
        """
        with self._lock:
            if key in self._kept:
                return self._kept[key]
        # Several threads may make it; one of them is kept.
        selection = self.select(mask())
        with self._lock:
            return self._kept.setdefault(key, selection)

    def search(self, queries: Vectors, k: int, settings: Settings, selection: Selection) -> Hits:
        """The nearest of the selected rows: min(k, selected) for every query.

        Args:
            queries: (Q, D) float32, checked.
            k: at least 1.
            settings: of a search among all rows with the recall wanted; a selective one goes
                further where it has to.
            selection: the rows that may be found.

        Returns:
            (Q, k); fewer were found only where fewer are selected.

        Raises:
            ValueError: the index keeps neither lists nor vectors to compare.
        """
        hits = Hits.empty(len(queries), k)
        wanted = min(k, selection.count)
        if not wanted or not len(queries):
            return hits
        # Queries are searched in blocks that bound the memory of candidates.
        width = self._width(wanted, settings, selection)
        # Bytes held for one query: candidate vectors, or scores of lists.
        held = max(4 * self.engine.index.d * width, 16 * (self.engine.lists or 0))
        block = max(1, BLOCK_BYTES // held)
        for start in range(0, len(queries), block):
            part = slice(start, start + block)
            found = self._search(queries[part], wanted, width, settings, selection)
            hits.scores[part, :wanted], hits.rows[part, :wanted] = found
        return hits

    def _search(
        self, queries: Vectors, k: int, width: int, settings: Settings, selection: Selection
    ) -> Hits:
        """(Q, k) of a block of queries, k at most the number of selected rows."""
        engine = self.engine
        if self._is_small(selection):
            # Few rows are compared one by one.
            part, among = selection.compared_rows
            scores, places = part.search(queries, k)
            return Hits(scores, among[places])
        if engine.ivf is None:
            return self._compare_all(queries, k, selection)
        # Else the lists that hold most of them are scanned.
        transformed = _transformed(engine.index, queries)
        lists = selection.lists.to_visit(transformed, settings.nprobe or engine.ivf.nprobe, k)
        scores, rows = self._scan(queries, transformed, k, width, selection, lists)
        # Queries that found too few rows scan all lists, and compare all rows if that is not
        # enough.
        if (lacking := rows[:, -1] < 0).any():
            everywhere = selection.lists.all(transformed[lacking])
            scores[lacking], rows[lacking] = self._scan(
                queries[lacking], transformed[lacking], k, width, selection, everywhere
            )
        if (lacking := rows[:, -1] < 0).any() and engine.refine is not None:
            scores[lacking], rows[lacking] = self._compare_all(queries[lacking], k, selection)
        return Hits(scores, rows)

    def _is_small(self, selection: Selection) -> bool:
        """Whether all rows are compared; without refine vectors there is no quick way to them."""
        return (
            self.engine.refine is not None
            and selection.count * self.engine.refine.sa_code_size() <= FEW_BYTES
        )

    def _width(self, k: int, settings: Settings, selection: Selection) -> int:
        """Candidates of each query."""
        engine = self.engine
        # Candidates for re-ranking: more of them if the selection is related to the vectors, and if
        # rows are in two lists.
        width = float(k)
        if engine.refine is not None and engine.ivf is not None and not self._is_small(selection):
            width = (
                max(k, MIN_RERANKED)
                * settings.k_factor
                * (1 if selection.lists.unrelated else WIDER)
            )
            width = max(k, min(width, selection.count))
        if engine.spill:
            width *= 2 if engine.refine is None else SPILL_FACTOR
        return int(np.ceil(width))

    def _scan(
        self,
        queries: Vectors,
        transformed: Vectors,
        k: int,
        width: int,
        selection: Selection,
        lists: Lists,
    ) -> Hits:
        """The best of the rows in some lists.

        Candidates by their codes, then ranked by refine vectors.

        Args:
            queries: (Q, D).
            transformed: the same, as the lists take them.
            k: results.
            width: candidates.
            selection: the rows.
            lists: to scan.
        """
        engine = self.engine
        (numbers, closeness) = lists
        scores = np.empty((len(queries), width), np.float32)
        rows = np.empty((len(queries), width), np.int64)
        # FAISS scans the given lists of each query, with an IDSelector of the rows.
        pointers = [
            faiss.swig_ptr(array) for array in (transformed, numbers, closeness, scores, rows)
        ]
        parameters = selection.parameters(numbers.shape[1])
        engine.ivf.search_preassigned_c(
            len(transformed), pointers[0], width, *pointers[1:], False, parameters
        )
        if engine.refine is not None:
            # Re-rank the candidates by their refine vectors.
            vectors = engine.refine.sa_decode(refine_codes(engine.refine)[rows.ravel()]).reshape(
                *rows.shape, -1
            )
            scores = (vectors @ queries[:, :, None])[:, :, 0]
            scores[rows < 0] = -np.inf
            order = np.argsort(-scores, axis=1, kind="stable")
            scores = np.take_along_axis(scores, order, axis=1)
            rows = np.take_along_axis(rows, order, axis=1)
        scores[rows < 0] = -np.inf
        if engine.spill:
            return drop_repeated_rows(Hits(scores, rows), k, adjacent=engine.refine is not None)
        return Hits(scores[:, :k], rows[:, :k])

    def _compare_all(self, queries: Vectors, k: int, selection: Selection) -> Hits:
        """Compare with every selected row, in blocks."""
        best = faiss.ResultHeap(len(queries), k, keep_max=True)
        rows = np.flatnonzero(selection.mask)
        block = max(1, BLOCK_BYTES // (4 * self.engine.index.d))
        for start in range(0, len(rows), block):
            block_rows = rows[start : start + block]
            scores, places = sub_index(self.engine, block_rows).search(
                queries, min(k, len(block_rows))
            )
            best.add_result(scores, block_rows[places])
        best.finalize()
        return Hits(best.D, best.I)

    @cached_property
    def _lists_of(self) -> NDArray[Any]:
        return lists_of_rows(self.engine)


def refine_codes(refine: Any) -> NDArray[np.uint8]:
    """(N, C) codes of the vectors for re-ranking, where they lie."""
    codes: NDArray[np.uint8] = faiss.rev_swig_ptr(
        refine.codes.data(), refine.ntotal * refine.code_size
    )
    return codes.reshape(refine.ntotal, refine.code_size)


def sub_index(engine: Engine, rows: Rows) -> Any:
    """A FAISS index of some rows alone, numbered from 0.

    Args:
        engine: holds all rows.
        rows: (n,) int64, ascending.

    Raises:
        ValueError: the index does not keep vectors.
    """
    refine = engine.refine
    part = None
    # Refine codes are copied as they are: nothing is decoded.
    if isinstance(refine, faiss.IndexScalarQuantizer):
        part = faiss.IndexScalarQuantizer(refine.d, refine.sq.qtype, faiss.METRIC_INNER_PRODUCT)
        part.sq = refine.sq
        part.is_trained = True
    elif isinstance(refine, faiss.IndexFlat):
        part = faiss.IndexFlatIP(refine.d)
    if part is not None:
        part.add_sa_codes(refine_codes(refine)[rows])
        return part
    # Any other index has to decode its vectors.
    try:
        vectors = (engine.index if refine is None else refine).reconstruct_batch(rows)
    except RuntimeError as error:
        raise ValueError(
            "this type of index cannot search among some rows only, since it has neither lists nor "
            "vectors to give "
            f"back: build it with lists (IVF...) or as Flat ({error})"
        ) from None
    part = faiss.IndexFlatIP(engine.index.d)
    part.add(vectors)
    return part


def _transformed(index: Any, queries: Vectors) -> Vectors:
    """Queries as the lists take them."""
    if isinstance(index, faiss.IndexRefine):
        return _transformed(faiss.downcast_index(index.base_index), queries)
    if isinstance(index, faiss.IndexPreTransform):
        for number in range(index.chain.size()):
            queries = faiss.downcast_VectorTransform(index.chain.at(number)).apply(queries)
        return _transformed(faiss.downcast_index(index.index), queries)
    return np.ascontiguousarray(queries, np.float32)
