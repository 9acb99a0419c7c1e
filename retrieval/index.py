"""Open an index folder and search it.

    index/
      index.faiss     FAISS index; the id of a vector in it is its row number
      ids.arrow       row number -> product id, memory-mapped
      settings.json   how to search unless told otherwise
      manifest.json   model, metric, dimension, count, factory string and reason, digests

FAISS is given only what has been checked: it takes a wrong dimension, NaN or k without a word.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from retrieval import storage
from retrieval.storage import ArtefactError, Manifest
from retrieval.vectors import Metric, checked_metric, checked_vectors

KIND = "index"
FORMAT = 1
INDEX_FILE, IDS_FILE, SETTINGS_FILE = "index.faiss", "ids.arrow", "settings.json"


class Hits(NamedTuple):
    """What a search found, best first.

    Attributes:
        scores: (Q, K) float32, descending; -inf where fewer than K were found.
        rows: (Q, K) int64 row numbers, -1 where fewer than K were found.
    """

    scores: NDArray[np.float32]
    rows: NDArray[np.int64]

    def without(self, row: int, k: int) -> Hits:
        """The first k hits other than one product."""
        order = np.argsort(self.rows == row, axis=1, kind="stable")[:, :k]
        rows = np.take_along_axis(self.rows, order, axis=1)
        scores = np.take_along_axis(self.scores, order, axis=1)
        return Hits(np.where(rows == row, np.float32(-np.inf), scores), np.where(rows == row, -1, rows))


class Settings(NamedTuple):
    """How an index is searched.

    Attributes:
        nprobe: lists visited; None for an index without lists.
        k_factor: candidates re-ranked per result, where the index keeps finer vectors.
    """

    nprobe: int | None = None
    k_factor: float = 8.0

    def checked(self, index: Any) -> Settings:
        """These settings, provided that they suit this FAISS index.

        Raises:
            ValueError: nprobe out of range or for an index without lists, k_factor below 1.
        """
        lists = lists_of(index)
        if lists is None and self.nprobe is not None:
            raise ValueError(f"nprobe={self.nprobe}, but this index has no lists to probe")
        if lists is not None and not (_is_whole(self.nprobe) and 1 <= self.nprobe <= lists.nlist):  # type: ignore[operator]
            raise ValueError(
                f"nprobe={self.nprobe!r}; expected an integer from 1 to {lists.nlist}, the number of lists"
            )
        if not self.k_factor >= 1:
            raise ValueError(f"k_factor={self.k_factor}; expected a number of at least 1")
        return self


class ProductIndex:
    """An opened index folder. Several threads may search it at once.

    Open it with `ProductIndex.open`; build one with `retrieval.build.build_index`.

    Attributes:
        path: the folder.
        manifest: what its manifest says.
        settings: how it is searched unless told otherwise.
        metric: what vectors are compared by.
        dim: D.
    """

    def __init__(self, path: Path, manifest: Manifest, index: Any, ids: IdTable, settings: Settings) -> None:
        self.path, self.manifest, self.settings = path, manifest, settings
        self.metric: Metric = checked_metric(manifest.meta["metric"])
        self.dim: int = manifest.meta["dim"]
        self._index, self._ids = index, ids
        self._parameters: dict[Settings, Any] = {}

    @classmethod
    def open(cls, path: Path | str) -> ProductIndex:
        """Verify the digests of an index folder and open it: codes are read, finer vectors are mapped.

        Raises:
            ArtefactError: no index folder, damaged, or files that do not belong together.
        """
        return storage.read_whole(path, cls._open)

    @classmethod
    def _open(cls, path: Path) -> ProductIndex:
        manifest = storage.verify(path, KIND)
        if manifest.meta.get("format") != FORMAT:
            raise ArtefactError(f"{path}: index format {manifest.meta.get('format')}, expected {FORMAT}: build it anew")
        try:
            # One file, one flag. This one maps finer vectors, which IO_FLAG_MMAP does not; both read fast-scan codes.
            index = faiss.read_index(str(path / INDEX_FILE), faiss.IO_FLAG_MMAP_IFC)
            ids = IdTable(path / IDS_FILE)
            settings = Settings(**json.loads((path / SETTINGS_FILE).read_text(encoding="utf-8"))).checked(index)
        except (RuntimeError, pa.ArrowInvalid, OSError, ValueError, TypeError) as error:
            raise ArtefactError(f"{path} cannot be opened as an index: {error}") from None
        counts = (manifest.meta["count"], index.ntotal, len(ids))
        if len(set(counts)) != 1 or index.d != manifest.meta["dim"]:
            raise ArtefactError(
                f"{path}: files do not belong together: manifest {counts[0]} vectors of {manifest.meta['dim']} "
                f"dimensions, index {counts[1]} of {index.d}, ids {counts[2]}"
            )
        return cls(path, manifest, index, ids, settings)

    def __len__(self) -> int:
        """Number of products."""
        return len(self._ids)

    @property
    def model(self) -> str | None:
        """Fingerprint of the model that made the embeddings, None where unknown."""
        model: str | None = self.manifest.meta["model"]
        return model

    @property
    def num_lists(self) -> int | None:
        """Number of lists, None for an index without."""
        lists = lists_of(self._index)
        return None if lists is None else int(lists.nlist)

    def check_model(self, model: str | None, source: str) -> None:
        """Refuse queries of another model: equal dimensions would let them pass and rank nonsense.

        Args:
            model: fingerprint of the model that made the queries, or None where unknown.
            source: where the queries come from, for the message.

        Raises:
            ArtefactError: the fingerprints differ, or this index does not know its model.
        """
        if model is not None and model != self.model:
            mine = self.model or "an unknown model"
            raise ArtefactError(
                f"{source} is of model {model}, but {self.path} was built from embeddings of {mine}: "
                "embed the catalogue with this model and build the index anew, or use the model it was built with"
            )

    def search(
        self, vectors: ArrayLike, k: int = 10, *, nprobe: int | None = None, k_factor: float | None = None
    ) -> Hits:
        """The nearest products of each query.

        Args:
            vectors: (Q, D) query vectors, of unit length under cosine.
            k: results wanted; the result has K = min(k, number of products) columns.
            nprobe: lists to visit; None for this index's setting.
            k_factor: candidates to re-rank per result; None for this index's setting.

        Raises:
            ValueError: what `checked_vectors` refuses, k < 1, or settings that do not suit this index.
        """
        k = min(checked_k(k), len(self))
        queries = checked_vectors(vectors, dim=self.dim, metric=self.metric, where="queries")
        settings = self.resolve(nprobe, k_factor)
        if k * settings.k_factor > len(self):  # no more candidates than products
            settings = settings._replace(k_factor=len(self) / k)
        scores, rows = self._index.search(queries, k, params=self._search_parameters(settings))
        scores[rows < 0] = -np.inf
        return Hits(scores, rows)

    def resolve(self, nprobe: int | None = None, k_factor: float | None = None) -> Settings:
        """The settings a search with these arguments uses."""
        changes: dict[str, Any] = {}
        if nprobe is not None:
            changes["nprobe"] = nprobe
        if k_factor is not None:
            changes["k_factor"] = k_factor
        return self.settings._replace(**changes).checked(self._index) if changes else self.settings

    def ids(self, rows: NDArray[np.int64]) -> NDArray[np.object_]:
        """Product ids of row numbers, in the same shape; None where the row is -1."""
        return self._ids.take(rows)

    def all_ids(self) -> pa.ChunkedArray:
        """Product ids of all rows, memory-mapped."""
        return self._ids.column

    def row_of(self, product_id: str) -> int:
        """The row number of a product.

        Raises:
            ValueError: no such product.
        """
        row = self._ids.find(product_id)
        if row < 0:
            raise ValueError(f"no product {product_id!r} among the {len(self):,} of {self.path}")
        return row

    def vector_of(self, product_id: str) -> NDArray[np.float32]:
        """The vector of a product as the index keeps it, (D,) float32, of unit length under cosine.

        Raises:
            ValueError: no such product, or the index keeps nothing to make a vector from.
        """
        row = self.row_of(product_id)
        vector: NDArray[np.float32] = self._with_vectors.reconstruct(row)
        return vector / np.linalg.norm(vector) if self.metric == "cosine" else vector

    @cached_property
    def _with_vectors(self) -> Any:
        """The FAISS index, able to give vectors back."""
        lists = lists_of(self._index)
        if isinstance(self._index, faiss.IndexRefine):
            return self._index
        if isinstance(lists, faiss.IndexIVFFastScan):  # once read from a file, asking it kills the process
            raise ValueError(
                f"{self.path} keeps only fast-scan codes ({self.manifest.meta['factory']}), which give no vectors "
                'back: build it with ",Refine(SQ8)" at the end of the factory string'
            )
        if lists is not None:
            lists.make_direct_map()
        return self._index

    def _search_parameters(self, settings: Settings) -> Any:
        if settings not in self._parameters:
            self._parameters[settings] = _parameters_of(self._index, settings)
        return self._parameters[settings]


class IdTable:
    """Row number -> product id, as a memory-mapped Arrow file."""

    def __init__(self, file: Path) -> None:
        self.column: pa.ChunkedArray = pa.ipc.open_file(pa.memory_map(str(file))).read_all().column("product_id")
        lengths = [len(chunk) for chunk in self.column.chunks]
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.column)

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.object_]:
        """Ids of rows, None for -1: in Python, -1 would be the last product."""
        flat = np.asarray(rows).ravel()
        if flat.size and (flat.max() >= len(self) or flat.min() < -1):
            raise ValueError(f"rows from {flat.min()} to {flat.max()}; expected -1 to {len(self) - 1}")
        ids = np.full(flat.shape, None, dtype=object)
        chunk_of = np.where(flat < 0, -1, np.searchsorted(self._starts, flat, side="right") - 1)
        for number in np.unique(chunk_of[chunk_of >= 0]):
            inside = chunk_of == number
            chunk = self.column.chunk(int(number))
            ids[inside] = chunk.take(pa.array(flat[inside] - self._starts[number])).to_pylist()
        return ids.reshape(np.shape(rows))

    def find(self, product_id: str) -> int:
        """The row of an id, -1 where there is none."""
        return int(pc.index(self.column, pa.scalar(product_id, pa.string())).as_py())


def checked_k(k: Any) -> int:
    """The number of results, as an int.

    Raises:
        ValueError: not an integer of at least 1.
    """
    if not _is_whole(k) or k < 1:
        raise ValueError(f"k={k!r}; expected an integer of at least 1")
    return int(k)


def lists_of(index: Any) -> Any:
    """The part of a FAISS index that has lists, under whatever is wrapped around it; None for an index without."""
    lists = faiss.try_extract_index_ivf(index)
    return None if lists is None else faiss.downcast_index(lists)


def _parameters_of(index: Any, settings: Settings) -> Any:
    """Search parameters for every layer of a FAISS index; set on a wrapper, nprobe would be ignored without a word."""
    make: Any = faiss  # its parameter classes take fields as keywords, which its stubs do not know
    if isinstance(index, faiss.IndexRefine):
        inner = _parameters_of(faiss.downcast_index(index.base_index), settings)
        return make.IndexRefineSearchParameters(k_factor=settings.k_factor, base_index_params=inner)
    if isinstance(index, faiss.IndexPreTransform):
        inner = _parameters_of(faiss.downcast_index(index.index), settings)
        return make.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        return make.SearchParametersIVF(nprobe=settings.nprobe)
    return None


def _is_whole(number: Any) -> bool:
    return isinstance(number, int | np.integer) and not isinstance(number, bool)
