"""Open an index and search it.

index/
CURRENT         which version is in use
versions/000001/
index.faiss     FAISS index; the id of a vector in it is its row number
lists.bin, lists.npy, vectors.faiss   its lists and finer vectors, mapped (retrieval/ivf/ivf_pq.py)
ids.arrow       row number -> product id, memory-mapped
attributes.arrow   row number -> what filters ask for, memory-mapped; where the index was built with
attributes settings.json   how to search unless told otherwise manifest.json   model, metric,
dimension, count, factory string and reason, digests
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from tritower.artefacts import storage, versions
from tritower.artefacts.storage import ArtefactError, Manifest
from tritower.retrieval.filtering.filtered_search import NO_ROWS, Finder, Grouping
from tritower.retrieval.filtering.filters import Filter, parse
from tritower.retrieval.ivf.engine import Engine, Settings, is_whole
from tritower.retrieval.ivf.layout import IDS_FILE
from tritower.retrieval.ivf.operating_points import Tuning
from tritower.retrieval.products.attribute_table import ATTRIBUTES_FILE, AttributeTable
from tritower.retrieval.ranking.hits import Hits
from tritower.retrieval.vectors.checks import (
    Metric,
    checked_metric,
    checked_queries,
    checked_vectors,
)

KIND = "index"
FORMAT = 2
READABLE = (1, 2)
"""Formats that open: the first release's has no versions, and all of FAISS in one file."""

SETTINGS_FILE = "settings.json"


class ProductIndex:
    """An opened index. Several threads may search it at once.

    Open it with `ProductIndex.open`; build one with
    `tritower.retrieval.building.build.build_index`.

    Attributes:
        path: where it was opened.
        version: the folder of the version that was opened.
        note: why that is not the version in use; empty where it is.
        manifest: what its manifest says.
        settings: how it is searched unless told otherwise.
        tuning: which settings reach which recall, where that was measured.
        engine: the FAISS side.
        metric: what vectors are compared by.
        dim: D.
        attributes: what filters ask for, or None.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        engine: Engine,
        ids: IdTable,
        settings: Settings,
        tuning: Tuning | None = None,
        attributes: AttributeTable | None = None,
    ) -> None:
        self.path = self.version = path
        self.note, self.attributes = "", attributes
        self.manifest, self.settings, self.engine, self.tuning = manifest, settings, engine, tuning
        self.metric: Metric = checked_metric(manifest.meta["metric"])
        self.dim: int = manifest.meta["dim"]
        self._ids = ids
        self._hold: Any = None

    @classmethod
    def open(cls, path: Path | str, *, fall_back: bool = True) -> ProductIndex:
        """Verify the digests of an index and open it: lists and finer vectors are mapped.

        Args:
            path: the place of an index and its versions, one version, or an index of the first
                release.
            fall_back: open the newest older version where the one in use is damaged; `note` and a
                warning say so.

        Raises:
            ArtefactError: no index, damaged, or files that do not belong together.
        """
        opened = versions.open_version(path, cls._open, fall_back)
        index = opened.result
        index.path, index.version, index.note, index._hold = (
            Path(path),
            opened.path,
            opened.note,
            opened.hold,
        )
        return index

    @classmethod
    def _open(cls, path: Path) -> ProductIndex:
        manifest = storage.verify(path, KIND, fast=True)
        if manifest.meta.get("format") not in READABLE:
            raise ArtefactError(
                f"{path}: index format {manifest.meta.get('format')}, this program reads {READABLE}: build it anew, or "
                "upgrade the program"
            )
        engine = Engine.open(path, manifest.meta)
        try:
            ids = IdTable(path / IDS_FILE)
            attributes = (
                AttributeTable(path / ATTRIBUTES_FILE)
                if ATTRIBUTES_FILE in manifest.files
                else None
            )
            stored = json.loads((path / SETTINGS_FILE).read_text(encoding="utf-8"))
            tuning = Tuning.from_json(stored.pop("tuning")) if "tuning" in stored else None
            settings = Settings(**stored).checked(engine.lists)
        except (pa.ArrowInvalid, OSError, ValueError, TypeError, KeyError) as error:
            raise ArtefactError(f"{path} cannot be opened as an index: {error}") from None
        if len(ids) != engine.count:
            raise ArtefactError(
                f"{path}: files do not belong together: {engine.count} vectors, {len(ids)} ids"
            )
        if attributes is not None and len(attributes) != len(ids):
            raise ArtefactError(
                f"{path}: files do not belong together: {len(ids)} ids, attributes of {len(attributes)}"
            )
        return cls(path, manifest, engine, ids, settings, tuning, attributes)

    def __len__(self) -> int:
        """Number of products; an index that was updated may have more rows, empty ones."""
        count: int = self.manifest.meta["count"]
        return count

    @property
    def model(self) -> str | None:
        """Fingerprint of the model that made the embeddings, None where unknown."""
        model: str | None = self.manifest.meta["model"]
        return model

    @property
    def num_lists(self) -> int | None:
        """Number of lists, None for an index without."""
        return self.engine.lists

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
        self,
        vectors: ArrayLike,
        k: int = 10,
        *,
        recall: float | None = None,
        kind: str | None = None,
        nprobe: int | None = None,
        k_factor: float | None = None,
        settings: Settings | None = None,
        filter: Filter | str | None = None,
        without: NDArray[np.int64] = NO_ROWS,
        without_groups: bool = False,
        one_per: Grouping | None = None,
    ) -> Hits:
        """The nearest products of each query; with the last four arguments, of those that may be found.

        A search that may not find everything finds K products unless there are fewer: it goes as
          far as it takes.

        Args:
            vectors: (Q, D) query vectors, of unit length under cosine, probabilities under kl.
            k: results wanted; the result has K = min(k, number of products) columns.
            recall: see `resolve`, as the following.
            kind: of the queries.
            nprobe: lists to visit.
            k_factor: candidates to re-rank per result.
            settings: what `resolve` returned, in place of all these.
            filter: what may be found, as `tritower.retrieval.filtering.filters` writes it; None for
                all.
            without: rows that may not be found.
            without_groups: nor may other products of their groups.
            one_per: find at most one product of each "group" or "family".

        Raises:
            ValueError: what `checked_vectors` refuses, k < 1, settings that do not suit this index,
                a filter that is none or does not suit its attributes, or groups or families that
                the index does not know.
        """
        k = min(checked_k(k), len(self))
        queries = checked_queries(
            checked_vectors(vectors, dim=self.dim, metric=self.metric, where="queries"), self.metric
        )
        if settings is None:
            settings = self.resolve(nprobe, k_factor, recall=recall, kind=kind)
        settings = settings.checked(self.engine.lists)
        if filter is None and one_per is None and not len(without):
            return self.engine.search(queries, k, settings)
        chosen = parse(filter) if isinstance(filter, str) else filter
        return self._finder.search(
            queries,
            k,
            settings,
            filter=chosen,
            without=without,
            without_groups=without_groups,
            one_per=one_per,
        )

    def count(self, filter: Filter | str) -> int:
        """How many products a filter matches.

        Raises:
            ValueError: a filter that is none or does not suit the attributes of this index.
        """
        return self._finder.count(parse(filter) if isinstance(filter, str) else filter)

    @cached_property
    def _finder(self) -> Finder:
        return Finder(
            self.engine, self.attributes, None if len(self) == len(self._ids) else self.alive()
        )

    def resolve(
        self,
        nprobe: int | None = None,
        k_factor: float | None = None,
        *,
        recall: float | None = None,
        kind: str | None = None,
    ) -> Settings:
        """The settings a search with these arguments uses.

        Args:
            nprobe: lists to visit; None for what the recall needs.
            k_factor: candidates to re-rank per result; None for what the recall needs.
            recall: recall against exact search to reach; None for what the index was built for, or
                comes nearest to it.
            kind: of the queries: "text", "image", ...; None: enough for every kind that was
                measured.

        Raises:
            ValueError: a recall that was not measured or not reached, or settings that do not suit
                this index.
        """
        settings = self.settings
        if recall is not None:
            if self.tuning is None and self.engine.lists is not None:
                raise ValueError(
                    f"{self.path} was not built for a recall: build it with one, or name nprobe"
                )
            settings = settings if self.tuning is None else self.tuning.settings_for(recall, kind)
        elif kind is not None and self.tuning is not None and kind in self.tuning.points:
            settings = self.tuning.nearest_settings(self.manifest.meta["target"]["recall"], kind)
        changes: dict[str, Any] = {}
        if nprobe is not None:
            changes["nprobe"] = nprobe
        if k_factor is not None:
            changes["k_factor"] = k_factor
        return settings._replace(**changes).checked(self.engine.lists) if changes else settings

    def ids(self, rows: NDArray[np.int64]) -> NDArray[np.object_]:
        """Product ids of row numbers, in the same shape; None where the row is -1."""
        return self._ids.take(rows)

    def all_ids(self) -> pa.ChunkedArray:
        """Product ids of all rows, memory-mapped; null for an empty row."""
        return self._ids.column

    def contents(self) -> pa.ChunkedArray:
        """Digest of what each row was embedded from (int64); null where unknown, and for an empty row."""
        return self._ids.contents

    def alive(self) -> NDArray[np.bool_]:
        """(N,) bool: rows that hold a product."""
        alive: NDArray[np.bool_] = pc.is_valid(self.all_ids()).to_numpy()
        return alive

    def row_of(self, product_id: str) -> int:
        """The row number of a product.

        Raises:
            ValueError: no such product.
        """
        row = self._ids.find(product_id)
        if row < 0:
            raise ValueError(f"no product {product_id!r} among the {len(self):,} of {self.path}")
        return row

    def rows_of(self, product_ids: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
        """(B,) row numbers of products, -1 where there is no such one.

        Reads all ids: ask for many at once.
        """
        known = self.all_ids().cast(pa.large_string()).combine_chunks()
        found = pc.index_in(product_ids.cast(pa.large_string()), value_set=known, skip_nulls=True)
        return np.asarray(pc.fill_null(found, -1).to_numpy(), np.int64)

    def vector_of(self, product_id: str) -> NDArray[np.float32]:
        """The vector of a product as the index keeps it, (D,) float32, of unit length under cosine.

        It asks as `tritower.retrieval.vectors.checks.as_queries` makes it.

        Raises:
            ValueError: no such product, or the index keeps nothing to make a vector from.
        """
        try:
            vector = self.engine.vector(self.row_of(product_id))
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        return vector / np.linalg.norm(vector) if self.metric == "cosine" else vector


class IdTable:
    """Row number -> product id, as a memory-mapped Arrow file."""

    def __init__(self, file: Path) -> None:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        self.column: pa.ChunkedArray = table.column("product_id")
        unknown = pa.chunked_array([pa.nulls(len(table), pa.int64())])
        self.contents: pa.ChunkedArray = (
            table.column("content") if "content" in table.column_names else unknown
        )
        lengths = [len(chunk) for chunk in self.column.chunks]
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.column)

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.object_]:
        """Ids of rows, None for -1: in Python, -1 would be the last product."""
        flat = np.asarray(rows).ravel()
        if flat.size and (flat.max() >= len(self) or flat.min() < -1):
            raise ValueError(
                f"rows from {flat.min()} to {flat.max()}; expected -1 to {len(self) - 1}"
            )
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
    if not is_whole(k) or k < 1:
        raise ValueError(f"k={k!r}; expected an integer of at least 1")
    return int(k)
