"""The FAISS side of an opened index.

Rows and scores only: product ids and query types are not known here.

FAISS is given only what has been checked: it takes a wrong dimension, NaN or k without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from tritower.artefacts.storage import ArtefactError
from tritower.retrieval.ivf.inverted_lists import attach
from tritower.retrieval.ivf.ivf_pq import make, open_refine, search_parameters
from tritower.retrieval.ivf.layout import INDEX_FILE, LISTS_FILE, REFINE_FILE, SIZES_FILE
from tritower.retrieval.ranking.hits import Hits

MIN_RERANKED = 10
"""Results that searches for fewer re-rank as many candidates for."""

SPILL_FACTOR = 1.5
"""Candidates to fetch per candidate wanted, where a vector may be met in two lists."""


class Settings(NamedTuple):
    """How an index is searched.

    Attributes:
        nprobe: lists visited; None for an index without lists.
        k_factor: candidates re-ranked per result, where the index keeps refine vectors.
    """

    nprobe: int | None = None
    k_factor: float = 8.0

    def checked(self, lists: int | None) -> Settings:
        """These settings, provided that they suit an index with so many lists (None: without).

        Raises:
            ValueError: nprobe out of range or for an index without lists, k_factor below 1.
        """
        if lists is None and self.nprobe is not None:
            raise ValueError(f"nprobe={self.nprobe}, but this index has no lists to probe")
        if lists is not None and not (is_whole(self.nprobe) and 1 <= self.nprobe <= lists):  # type: ignore[operator]
            raise ValueError(
                f"nprobe={self.nprobe!r}; expected an integer from 1 to {lists}, the number of "
                "lists"
            )
        if not self.k_factor >= 1:
            raise ValueError(f"k_factor={self.k_factor}; expected a number of at least 1")
        return self


class Engine:
    """An index as FAISS searches it. Several threads may do so at once.

    Args:
        index: what is searched.
        count: number of rows.
        spill: rows are in two lists, so they may be found twice.
        keep: what must live as long as the index: FAISS holds only pointers to its parts.

    Attributes:
        ivf: the part with lists, or None.
        refine: the part with a vector for every row, for re-ranking and exact search, or None.
        lists: number of lists, or None.
    """

    def __init__(
        self, index: Any, count: int, *, spill: bool = False, keep: tuple[Any, ...] = ()
    ) -> None:
        self.index = index
        self.count = count
        self.spill = spill
        self._keep = keep
        self.ivf = lists_of(index)
        if self.ivf is None:
            self.lists: int | None = None
        else:
            self.lists = int(self.ivf.nlist)
        # Vectors of all rows: those behind an IndexRefine, or the flat index itself.
        self.refine: Any = None
        if isinstance(index, faiss.IndexRefine):
            self.refine = faiss.downcast_index(index.refine_index)
        elif isinstance(index, faiss.IndexFlat):
            self.refine = index
        self._parameters: dict[Settings, Any] = {}

    @classmethod
    def open(cls, folder: Path, meta: Mapping[str, Any]) -> Engine:
        """Open the FAISS files of an index folder with `meta` in its manifest.

        Lists and refine vectors are mapped.

        Raises:
            ArtefactError: files that cannot be opened or do not belong together.
        """
        rows = meta.get("rows", meta["count"])
        dim = meta["dim"]
        try:
            # One file, one flag. This one maps refine vectors, which IO_FLAG_MMAP does not; both
            # read fast-scan codes.
            stored = faiss.read_index(str(folder / INDEX_FILE), faiss.IO_FLAG_MMAP_IFC)
            if not (folder / LISTS_FILE).exists():
                engine = cls(stored, stored.ntotal)
            else:
                sizes = np.load(folder / SIZES_FILE, allow_pickle=False)
                lists = attach(stored, folder / LISTS_FILE, sizes)
                stored.ntotal = rows
                keep: tuple[Any, ...] = (stored, lists)
                index = stored
                if (folder / REFINE_FILE).exists():
                    refine = open_refine(folder / REFINE_FILE, rows, dim)
                    index = faiss.IndexRefine(stored, refine)
                    keep = (*keep, refine)
                engine = cls(index, rows, spill=bool(meta.get("spill")), keep=keep)
        except Exception as error:  # whatever a library makes of a file that is none of its own
            raise ArtefactError(f"{folder} cannot be opened as an index: {error}") from None
        if (engine.index.ntotal, engine.index.d) != (rows, dim):
            raise ArtefactError(
                f"{folder}: files do not belong together: manifest {rows} vectors of {dim} "
                "dimensions, index "
                f"{engine.index.ntotal} of {engine.index.d}"
            )
        return engine

    def search(
        self, queries: NDArray[np.float32], k: int, settings: Settings, selector: Any = None
    ) -> Hits:
        """The nearest rows.

        Args:
            queries: (Q, D) float32, checked.
            k: 1 <= k <= number of rows.
            settings: checked.
            selector: FAISS IDSelector of the rows that may be found; None for all.

        Returns:
            (Q, k).
        """
        if k < MIN_RERANKED:  # one result is no easier to find than ten
            settings = settings._replace(k_factor=settings.k_factor * MIN_RERANKED / k)
        if k * settings.k_factor > self.count:  # no more candidates than rows
            settings = settings._replace(k_factor=self.count / k)
        # Rows in two lists may be found twice: search for twice as many, and drop the repeated
        # ones.
        if not self.spill:
            hits = Hits(
                *self.index.search(queries, k, params=self._search_parameters(settings, selector))
            )
        else:
            twice = settings._replace(k_factor=max(1.0, settings.k_factor * SPILL_FACTOR / 2))
            found = Hits(
                *self.index.search(queries, 2 * k, params=self._search_parameters(twice, selector))
            )
            hits = drop_repeated_rows(found, k, adjacent=self.refine is not None)
        hits.scores[hits.rows < 0] = -np.inf
        return hits

    def vector(self, row: int) -> NDArray[np.float32]:
        """The vector of a row as the index keeps it, (D,) float32.

        Raises:
            ValueError: the index keeps nothing to make a vector from.
        """
        if self.refine is None and isinstance(self.ivf, faiss.IndexIVFFastScan):
            # Once read from a file, asking it kills the process.
            raise ValueError(
                "it keeps only fast-scan codes, which give no vectors back: build with "
                '",Refine(SQ8)"'
            )
        if self.refine is None and self.ivf is not None:
            self.ivf.make_direct_map()
        source = self.index if self.refine is None else self.refine
        vector: NDArray[np.float32] = source.reconstruct(row)
        return vector

    def _search_parameters(self, settings: Settings, selector: Any) -> Any:
        if selector is not None:
            return _parameters_of(self.index, settings, selector)
        if settings not in self._parameters:
            self._parameters[settings] = _parameters_of(self.index, settings, None)
        return self._parameters[settings]


def lists_of(index: Any) -> Any:
    """The part of a FAISS index that has lists, under whatever is wrapped around it.

    None for an index without.
    """
    lists = faiss.try_extract_index_ivf(index)
    if lists is None:
        return None
    return faiss.downcast_index(lists)


def is_whole(number: Any) -> bool:
    """Whether this is an integer, and no bool."""
    return isinstance(number, int | np.integer) and not isinstance(number, bool)


def _parameters_of(index: Any, settings: Settings, selector: Any) -> Any:
    """Search parameters for every layer of a FAISS index.

    Set on a wrapper, nprobe would be ignored without a word.
    """
    if isinstance(index, faiss.IndexRefine):
        inner = _parameters_of(faiss.downcast_index(index.base_index), settings, selector)
        return make.IndexRefineSearchParameters(k_factor=settings.k_factor, base_index_params=inner)
    if isinstance(index, faiss.IndexPreTransform):
        inner = _parameters_of(faiss.downcast_index(index.index), settings, selector)
        return make.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        return search_parameters(index, settings.nprobe or index.nprobe, selector)
    if selector is None:
        return None
    return make.SearchParameters(sel=selector)


def drop_repeated_rows(found: Hits, k: int, *, adjacent: bool) -> Hits:
    """The first k hits of each query, without rows that came before; (Q, K) to (Q, k).

    Args:
        found: (Q, K).
        k: at most K.
        adjacent: a row has the same score from both of its lists, so its two hits are neighbors.
            Scores of codes alone differ between lists.
    """
    scores, rows = found
    if len(rows) == 1:
        return _drop_repeated_of_one(found, k)
    hits = Hits.empty(len(rows), k)
    same_row = rows[:, 1:] == rows[:, :-1]
    same_score = scores[:, 1:] == scores[:, :-1]
    is_first = rows >= 0
    is_first[:, 1:] &= ~same_row

    # Comparing neighbors is enough, unless another row with the same score is between them.
    between = (same_score & ~same_row & (rows[:, 1:] >= 0)).any(axis=1)
    if adjacent:
        unsure = np.flatnonzero(between)
    else:
        unsure = np.arange(len(rows))
    for query in unsure:
        is_first[query] = False
        is_first[query, np.unique(rows[query], return_index=True)[1]] = True
        is_first[query] &= rows[query] >= 0

    # Move the kept hits up, in their order.
    position = is_first.cumsum(axis=1) - 1  # (Q, K)
    is_first &= position < k
    queries, columns = np.nonzero(is_first)
    positions = position[queries, columns]
    hits.scores[queries, positions] = scores[queries, columns]
    hits.rows[queries, positions] = rows[queries, columns]
    return hits


def _drop_repeated_of_one(found: Hits, k: int) -> Hits:
    """As `drop_repeated_rows` for one query.

    For a few dozen results, a loop takes a third of the time of a dozen calls of NumPy.
    """
    scores, rows = found
    columns: dict[int, int] = {}
    for column, row in enumerate(rows[0].tolist()):
        if row >= 0 and row not in columns:
            columns[row] = column
    kept = list(columns.values())[:k]
    hits = Hits.empty(1, k)
    hits.scores[0, : len(kept)] = scores[0, kept]
    hits.rows[0, : len(kept)] = rows[0, kept]
    return hits
