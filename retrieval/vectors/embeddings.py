"""Embeddings as shards of (id, vector): a resumable writer, and a reader for ours and anyone's.

The reader streams, so the number of vectors is bounded by the disk and not by memory, and it
refuses what would spoil an index without a word: NaN, zero vectors, lengths other than 1, ids that
are missing or appear twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from tritower.artefacts import storage
from tritower.artefacts.shards import BEGUN, ShardFolder
from tritower.artefacts.storage import JSON, Manifest
from tritower.retrieval.vectors.checks import (
    Metric,
    as_queries,
    checked_metric,
    checked_vectors,
    vector_hashes,
)
from tritower.retrieval.vectors.vector_files import Part, find_parts

ARTEFACT_TYPE = "embeddings"
BATCH = 16_384
"""Vectors read at a time.

Larger arrays would be memory that the system gives anew for each: twice the time.
"""


class EmbeddingWriter:
    """Writes the embeddings of products or queries, one shard per shard of the catalogue.

    A killed run is resumed by the same call: shards that are done are skipped (`done`), and a
    folder begun with another model or catalogue is refused.

    Args:
        folder: becomes an artefact folder of type "embeddings" by `finish`.
        dim: D.
        model: fingerprint of the model folder; None for vectors of unknown origin.
        catalogue: fingerprint of the prepared catalogue, or None.
        id_column: "product_id" or "query_id".
        metric: what the vectors are compared by.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        dim: int,
        model: str | None = None,
        catalogue: str | None = None,
        id_column: str = "product_id",
        metric: Metric = "cosine",
    ) -> None:
        self.path = Path(folder)
        self.dim = dim
        self.id_column = id_column
        self.metric = checked_metric(metric)
        identity = {
            "model": model,
            "catalogue": catalogue,
            "dim": dim,
            "metric": metric,
            "id_column": id_column,
        }
        self._folder = ShardFolder(folder, artefact_type=ARTEFACT_TYPE, identity=identity)

    def done(self, shard: str) -> bool:
        """Whether this shard has been written, in this run or an earlier one."""
        return self._folder.done(shard)

    def write(
        self,
        shard: str,
        ids: Sequence[str],
        vectors: ArrayLike,
        query_types: Sequence[str] | None = None,
        contents: Sequence[int] | None = None,
    ) -> None:
        """Write one shard.

        Args:
            shard: its name without suffix: "shard-00000".
            ids: B ids.
            vectors: (B, D) floating point; stored as float16.
            query_types: B query types ("text", "image", ...), or None for products.
            contents: B digests of what was embedded: an update embeds only rows whose digest has
                changed.

        Raises:
            ValueError: what `checked_vectors` refuses, or lengths that differ.
        """
        array = checked_vectors(
            vectors, dim=self.dim, metric=self.metric, names=ids, where=f"embeddings of {shard}"
        )
        if len(ids) != len(array) or (query_types is not None and len(query_types) != len(ids)):
            raise ValueError(
                f"{shard}: {len(ids)} ids, {len(array)} vectors, "
                f"{query_types and len(query_types)} query types"
            )
        # Vectors are stored as float16: half the size, and the rounding is far below that of an
        # index.
        columns: dict[str, pa.Array] = {self.id_column: pa.array(ids, pa.string())}
        if query_types is not None:
            columns["query_type"] = pa.array(query_types, pa.string())
        if contents is not None:
            columns["content"] = pa.array(contents, pa.int64())
        flat = pa.array(array.astype(np.float16).ravel())
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, self.dim)
        self._folder.write(shard, pa.table(columns))

    def finish(self, shards: Sequence[str], hints: Mapping[str, JSON] | None = None) -> Manifest:
        """Check that all shards are there and seal the folder.

        Args:
            shards: names of all shards of the catalogue.
            hints: paths of the model and the catalogue, so that later commands find them
                again.
        """
        return self._folder.finish(shards, {"hints": dict(hints or {})})


class EmbeddingBatch(NamedTuple):
    """B embeddings.

    Attributes:
        ids: B ids (large_string).
        vectors: (B, D) float32, checked.
        query_types: B query types (large_string), or None.
        contents: (B,) int64 digests of what was embedded, or None where unknown.
    """

    ids: pa.Array
    vectors: NDArray[np.float32]
    query_types: pa.Array | None
    contents: NDArray[np.int64] | None = None

    def type_names(self) -> list[str]:
        """B query types; "query" for queries without a type."""
        if self.query_types is None:
            return ["query"] * len(self.ids)
        return self.query_types.to_pylist()

    def digests(self) -> NDArray[np.int64]:
        """(B,) int64: equal where a row's content is.

        Of the vectors where nothing is known of what was embedded.
        """
        if self.contents is None:
            return vector_hashes(self.vectors)
        return self.contents


class EmbeddingReader:
    """Streams ids and vectors from an embeddings folder, or from Parquet or NumPy files.

    Args:
        source: an embeddings folder, a folder of Parquet files or of .npy files, or one such file.
        ids: for .npy: a file of ids (.txt, .npy, .csv, .parquet), or a folder of them matched by
            name.
        id_column: for Parquet: the column of ids; guessed when None.
        embedding_column: for Parquet: the column of vectors; guessed when None.
        metric: what the vectors are compared by; the folder's when None, else cosine.
        normalize: bring vectors of any length to length 1.
        asks: the vectors are queries: those of a folder of products become what `as_queries` makes
            of them.

    Raises:
        ArtefactError: an embeddings folder that is unfinished or damaged.
        ValueError: nothing readable there, or the columns are ambiguous.
    """

    def __init__(
        self,
        source: Path | str,
        *,
        ids: Path | str | None = None,
        id_column: str | None = None,
        embedding_column: str | None = None,
        metric: Metric | None = None,
        normalize: bool = False,
        asks: bool = False,
    ) -> None:
        self.source = Path(source)
        self.meta: Mapping[str, Any] = {}
        self.fingerprint: str | None = None
        files: list[Path] | None = None
        # Our own folders have a manifest; other files are read as they are.
        if any((self.source / name).exists() for name in (storage.MANIFEST, BEGUN)):
            manifest = storage.verify(self.source, ARTEFACT_TYPE)
            self.meta = manifest.meta
            self.fingerprint = manifest.fingerprint
            files = [self.source / name for name in manifest.files if name.endswith(".parquet")]
        self.metric: Metric = checked_metric(metric or self.meta.get("metric", "cosine"))
        self.normalize = normalize
        self.of_products_asking = asks and self.meta.get("id_column") == "product_id"
        self.parts: Sequence[Part] = find_parts(
            self.source, files, None if ids is None else Path(ids), id_column, embedding_column
        )
        # All shards must have the same dimension.
        self.dim = self.parts[0].dim
        self.count = sum(part.count for part in self.parts)
        for part in self.parts:
            if part.dim != self.dim:
                raise ValueError(
                    f"{part.name} has {part.dim} dimensions, {self.parts[0].name} has {self.dim}"
                )

    def stamp(self) -> list[list[str | int]]:
        """Identifies vectors of unknown origin.

        What is read of which files, their sizes and times of change.
        """
        found = [(part.reads, file, file.stat()) for part in self.parts for file in part.files]
        return [
            [reads, file.name, status.st_size, status.st_mtime_ns] for reads, file, status in found
        ]

    def batches(self, batch_size: int = BATCH) -> Iterator[EmbeddingBatch]:
        """All embeddings, in the order of the shards' names (numbers in names count as numbers)."""
        for part in self.parts:
            yield from self.part_batches(part, batch_size)

    def part_batches(self, part: Part, batch_size: int = BATCH) -> Iterator[EmbeddingBatch]:
        """The embeddings of one shard.

        Raises:
            ValueError: a row without id, or what `checked_vectors` refuses; the message names
                shard, row and id.
        """
        # Checked as they are read, so an error names the shard and row.
        row = 0
        for raw in part.batches(batch_size):
            ids = _checked_ids(raw.ids, part.name, row)
            vectors = checked_vectors(
                raw.vectors,
                dim=self.dim,
                metric=self.metric,
                normalize=self.normalize,
                names=_Names(ids),
                where=part.name,
                first_row=row,
            )
            if self.of_products_asking:
                vectors = as_queries(vectors, self.metric)
            yield EmbeddingBatch(ids, vectors, raw.query_types, raw.contents)
            row += len(ids)

    def ids(self) -> Iterator[pa.Array]:
        """All ids without the vectors, batch by batch."""
        for part in self.parts:
            row = 0
            for ids in part.ids():
                yield _checked_ids(ids, part.name, row)
                row += len(ids)

    def check_unique(self) -> None:
        """Refuse ids that appear twice.

        Holds 8 bytes per id: ids whose hashes meet are compared as text in a second pass.

        Raises:
            ValueError: naming such an id and how often it appears.
        """
        # Sort the hashes, then compare only the ids whose hashes occur twice.
        # Hashes fit in memory where ids may not; only ids with equal hashes are compared.
        hashes = [np.fromiter(map(hash, ids.to_pylist()), np.int64, len(ids)) for ids in self.ids()]
        values, counts = np.unique(np.concatenate(hashes), return_counts=True)
        suspects = set(values[counts > 1].tolist())
        seen: dict[str, int] = {}
        for ids in self.ids() if suspects else ():
            for product_id in ids.to_pylist():
                if hash(product_id) in suspects:
                    seen[product_id] = seen.get(product_id, 0) + 1
        repeated = [product_id for product_id, count in seen.items() if count > 1]
        if repeated:
            raise ValueError(
                f"{self.source}: {len(repeated)} ids appear more than once; {repeated[0]!r} "
                f"{seen[repeated[0]]} times. "
                "Ids must be unique"
            )


class _Names(Sequence[str]):
    """Arrow ids as a sequence of str, looked up only when a message needs one."""

    def __init__(self, ids: pa.Array) -> None:
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, row: Any) -> Any:
        return self._ids[row].as_py()


def _checked_ids(ids: pa.Array, name: str, first_row: int) -> pa.Array:
    empty = pc.fill_null(pc.equal(ids, ""), True)
    if pc.any(empty).as_py():
        raise ValueError(f"{name}: row {first_row + empty.index(True).as_py()} has no id")
    return ids
