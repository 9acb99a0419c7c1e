"""What an update has to do, found out before anything is written.

Products are matched by id, and their content by its digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tritower.retrieval.index import ProductIndex
from tritower.retrieval.vectors.embeddings import EmbeddingReader

BLOCK = 65_536
"""Embeddings read at a time."""


@dataclass(frozen=True)
class Plan:
    """Changes to an index of N rows. Given products = added + replaced + unchanged.

    Attributes:
        deleted_rows: (N,) bool, rows that become empty.
        keep: (M,) bool, which of the given embeddings are added.
        added: number of products that are new.
        replaced: number of products whose content has changed.
        unchanged: number of products that the index holds as they are.
        deleted: number of products to delete.
        unknown: ids to delete that the index does not hold.
    """

    deleted_rows: NDArray[np.bool_]
    keep: NDArray[np.bool_]
    added: int
    replaced: int
    unchanged: int
    deleted: int
    unknown: Sequence[str]

    @property
    def num_new_rows(self) -> int:
        """Rows to add."""
        return self.added + self.replaced

    @property
    def changes(self) -> bool:
        """Whether any product is added, replaced or deleted."""
        return self.num_new_rows + self.deleted > 0


def make_plan(
    index: ProductIndex,
    upsert: EmbeddingReader | None,
    delete: Sequence[str],
    *,
    unchanged: pa.ChunkedArray | None = None,
    strict: bool = False,
) -> Plan:
    """Compare the given products with those of an index.

    Args:
        index: the index to update.
        upsert: embeddings of products that are new or may have changed; all of them are read and
            checked.
        delete: ids to delete.
        unchanged: ids of products that were compared before and have not changed.
        strict: refuse ids to delete that the index does not hold.

    Raises:
        ValueError: an id twice, or both given and to be deleted; with `strict`, an unknown id;
            faulty vectors.
    """
    to_delete = pa.array(delete, pa.large_string())
    _check_unique(to_delete)
    if unchanged is not None:
        _check_not_both(unchanged, to_delete)
    deleted_rows = np.zeros(len(index.id_table), bool)
    rows = index.rows_of(to_delete)
    unknown = to_delete.filter(pa.array(rows < 0)).to_pylist()
    if strict and unknown:
        raise ValueError(
            f"{len(unknown)} ids to delete are not in {index.path} (strict): "
            f"{', '.join(unknown[:5])}"
        )
    deleted_rows[rows[rows >= 0]] = True
    num_deleted = len(to_delete) - len(unknown)
    num_unchanged = 0 if unchanged is None else len(unchanged)
    if upsert is None:
        nothing = np.zeros(0, bool)
        return Plan(deleted_rows, nothing, 0, 0, num_unchanged, num_deleted, unknown)

    # A replaced product leaves its row empty and gets a new one.
    upsert.check_unique()
    given = pa.chunked_array(list(upsert.ids()), pa.large_string())
    _check_not_both(given, to_delete)
    rows = index.rows_of(given)
    in_index = rows >= 0
    is_unchanged = _is_unchanged(index, upsert, rows)
    is_replaced = in_index & ~is_unchanged
    deleted_rows[rows[is_replaced]] = True
    return Plan(
        deleted_rows,
        ~is_unchanged,
        added=int((~in_index).sum()),
        replaced=int(is_replaced.sum()),
        unchanged=num_unchanged + int(is_unchanged.sum()),
        deleted=num_deleted,
        unknown=unknown,
    )


def known_digests(
    index: ProductIndex, rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Digests of the content that rows were embedded from.

    Args:
        index: the index.
        rows: (B,) rows, -1 for none.

    Returns:
        (B,) int64 digests, and (B,) bool: whether the digest is known.
    """
    contents = index.id_table.contents
    digests = pc.fill_null(contents, 0).to_numpy()
    is_known = pc.is_valid(contents).to_numpy()
    return digests[rows], is_known[rows] & (rows >= 0)


def _is_unchanged(
    index: ProductIndex, upsert: EmbeddingReader, rows: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """(M,) bool: embeddings of the very content that the index holds."""
    digests, is_known = known_digests(index, rows)
    parts = []
    first = 0
    for batch in upsert.batches(BLOCK):
        part = slice(first, first + len(batch.ids))
        parts.append(is_known[part] & (digests[part] == batch.digests()))
        first = part.stop
    return np.concatenate(parts)


def _check_unique(to_delete: pa.Array) -> None:
    counts = pc.value_counts(to_delete)
    if len(counts) < len(to_delete):
        repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        raise ValueError(f"ids to delete: {repeated[0].as_py()!r} appears more than once")


def _check_not_both(given: pa.ChunkedArray, to_delete: pa.Array) -> None:
    both = given.filter(pc.is_in(given, value_set=to_delete)).to_pylist()
    if both:
        raise ValueError(
            f"{both[0]!r} is both to change and to delete; {len(both)} ids are like this"
        )
