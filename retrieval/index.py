"""Open an index and search it.

index/
    CURRENT                 names the version in use
    versions/000001/
        index.faiss         FAISS index; the id of a vector in it is its row number
        lists.bin, lists.npy, vectors.faiss   inverted lists and refine vectors, memory-mapped
        ids.arrow           row number -> product id, memory-mapped
        attributes.arrow    row number -> attributes for filters, memory-mapped; optional
        settings.json       how it is searched by default
        manifest.json       model, metric, dimension, count, index spec and reason, digests
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from tritower.artefacts import versions
from tritower.artefacts.storage import ArtefactError
from tritower.retrieval.filtering.filtered_search import (
    NOTHING_EXCLUDED,
    Exclusion,
    FilteredSearch,
    Grouping,
)
from tritower.retrieval.filtering.filters import Filter, parse
from tritower.retrieval.index_files import IndexFiles, open_files
from tritower.retrieval.ivf.engine import Settings, is_whole
from tritower.retrieval.ranking.hits import Hits
from tritower.retrieval.vectors.checks import (
    Metric,
    checked_metric,
    checked_queries,
    checked_vectors,
)


class ProductIndex:
    """An index opened by `ProductIndex.open`. Several threads may search it at once.

    Attributes:
        path: the opened folder.
        version: folder of the opened version.
        note: why this is not the version in use; empty if it is.
        manifest: facts about the version, and digests of its files.
        settings: default search settings.
        tuning: measured operating points, or None.
        engine: searches by FAISS.
        metric: measure that vectors are compared by.
        dim: D.
        attributes: attributes for filters, or None.
        id_table: product id and content digest of each row.
    """

    def __init__(self, path: Path, opened: versions.Opened[IndexFiles]) -> None:
        files = opened.result
        self.path = path
        self.version = opened.path
        self.note = opened.note
        self.manifest = files.manifest
        self.engine = files.engine
        self.settings = files.settings
        self.tuning = files.tuning
        self.attributes = files.attributes
        self.metric: Metric = checked_metric(files.manifest.meta["metric"])
        self.dim: int = files.manifest.meta["dim"]
        self.id_table = files.ids
        self._lock = opened.hold  # the version is not removed while it is open

    @classmethod
    def open(cls, path: Path | str, *, fall_back: bool = True) -> ProductIndex:
        """Verify the digests of an index and open it; lists and refine vectors are memory-mapped.

        Args:
            path: folder of an index with its versions, or of one version.
            fall_back: if the version in use is damaged, open an older one; `note` names the reason.

        Raises:
            ArtefactError: no index, a damaged one, or files that do not belong together.
        """
        return cls(Path(path), versions.open_version(path, open_files, fall_back))

    def __len__(self) -> int:
        """Number of products; an index that was updated may have more rows, deleted ones."""
        return int(self.manifest.meta["count"])

    @property
    def model(self) -> str | None:
        """Fingerprint of the model that made the embeddings, None where unknown."""
        return self.manifest.meta["model"]

    def check_model(self, model: str | None, source: str) -> None:
        """Refuse queries of another model: equal dimensions would let them pass and rank nonsense.

        Args:
            model: fingerprint of the model that made the queries, or None where unknown.
            source: of the queries, for the message.

        Raises:
            ArtefactError: the fingerprints differ, or that of this index is unknown.
        """
        if model is not None and model != self.model:
            own_model = self.model or "an unknown model"
            raise ArtefactError(
                f"{source} is of model {model}, but {self.path} was built from embeddings of "
                f"{own_model}: embed the catalogue with this model and build the index anew, or "
                "use the model it was built with"
            )

    def search(
        self,
        vectors: ArrayLike,
        k: int = 10,
        *,
        filter: Filter | str | None = None,
        exclude: Exclusion = NOTHING_EXCLUDED,
        group_by: Grouping | None = None,
        recall: float | None = None,
        nprobe: int | None = None,
        settings: Settings | None = None,
    ) -> Hits:
        """The nearest products of each query.

        With a filter, an exclusion or a grouping there are K hits wherever K products may be found.

        Args:
            vectors: (Q, D) query vectors, of unit length under cosine, probabilities under kl.
            k: number of hits; the result has K = min(k, number of products) columns.
            filter: only products that match it (`tritower.retrieval.filtering.filters`).
            exclude: products that may not be found.
            group_by: at most one product of each "group" or "family".
            recall: recall against exact search to reach; see `resolve`.
            nprobe: lists to visit; see `resolve`.
            settings: from `resolve`, in place of recall and nprobe.

        Raises:
            ValueError: vectors that `checked_vectors` refuses, k < 1, settings that do not suit
                this index, or a filter, groups or families that its attributes do not have.
        """
        # Vectors are checked before FAISS sees them: it accepts wrong ones without an error.
        k = min(checked_k(k), len(self))
        checked = checked_vectors(vectors, dim=self.dim, metric=self.metric, where="queries")
        queries = checked_queries(checked, self.metric)
        if settings is None:
            settings = self.resolve(nprobe, recall=recall)
        settings = settings.checked(self.engine.lists)
        # The plain search goes straight to the engine.
        if filter is None and group_by is None and not len(exclude.rows):
            return self.engine.search(queries, k, settings)
        parsed = parse(filter) if isinstance(filter, str) else filter
        return self._filtered_search.search(
            queries, k, settings, filter=parsed, exclude=exclude, group_by=group_by
        )

    def count(self, filter: Filter | str) -> int:
        """The number of products that match a filter.

        Raises:
            ValueError: a filter that does not suit the attributes of this index.
        """
        parsed = parse(filter) if isinstance(filter, str) else filter
        return self._filtered_search.count(parsed)

    @cached_property
    def _filtered_search(self) -> FilteredSearch:
        if len(self) == len(self.id_table):
            alive = None
        else:
            alive = self.id_table.alive()
        return FilteredSearch(self.engine, self.attributes, alive)

    def resolve(
        self,
        nprobe: int | None = None,
        k_factor: float | None = None,
        *,
        recall: float | None = None,
        query_type: str | None = None,
    ) -> Settings:
        """The settings of a search with these arguments.

        Args:
            nprobe: lists to visit; None for as many as the recall needs.
            k_factor: candidates to re-rank per hit; None for as many as the recall needs.
            recall: recall against exact search to reach; None for the one the index was built for,
                or comes nearest to.
            query_type: type of the queries: "text", "image", ...; None: enough for every type that
                was measured.

        Raises:
            ValueError: a recall that was not measured or not reached, or settings that do not suit
                this index.
        """
        settings = _tuned_settings(self, recall, query_type)
        if nprobe is not None:
            settings = settings._replace(nprobe=nprobe)
        if k_factor is not None:
            settings = settings._replace(k_factor=k_factor)
        return settings.checked(self.engine.lists)

    def ids(self, rows: NDArray[np.int64]) -> NDArray[np.object_]:
        """Product ids of (...) int64 rows, as (...) objects; None where the row is -1."""
        return self.id_table.ids_of(rows)

    def row_of(self, product_id: str) -> int:
        """The row number of a product.

        Raises:
            ValueError: no such product.
        """
        row = self.id_table.row_of(product_id)
        if row < 0:
            raise ValueError(f"no product {product_id!r} among the {len(self):,} of {self.path}")
        return row

    def rows_of(self, product_ids: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
        """(B,) row numbers of products, -1 where there is none.

        Reads all ids: pass many at once.
        """
        return self.id_table.rows_of(product_ids)

    def vector_of(self, product_id: str) -> NDArray[np.float32]:
        """(D,) float32 vector of a product as the index keeps it, of unit length under cosine.

        `tritower.retrieval.vectors.checks.as_queries` turns it into a query.

        Raises:
            ValueError: no such product, or the index keeps nothing to decode a vector from.
        """
        try:
            vector = self.engine.vector(self.row_of(product_id))
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        if self.metric == "cosine":
            return vector / np.linalg.norm(vector)
        return vector


def checked_k(k: Any) -> int:
    """The number of hits, as an int.

    Raises:
        ValueError: not an integer of at least 1.
    """
    if not is_whole(k) or k < 1:
        raise ValueError(f"k={k!r}; expected an integer of at least 1")
    return int(k)


def _tuned_settings(index: ProductIndex, recall: float | None, query_type: str | None) -> Settings:
    """The settings that reach a recall, or the recall that the index was built for."""
    tuning = index.tuning
    if recall is None:
        if tuning is None or query_type not in tuning.points:
            return index.settings
        return tuning.nearest_settings(index.manifest.meta["target"]["recall"], query_type)
    if tuning is not None:
        return tuning.settings_for(recall, query_type)
    if index.engine.lists is None:
        return index.settings
    raise ValueError(f"{index.path} was not built for a recall: build it with one, or name nprobe")
