"""What an update has to do, found out before anything is written.

What is new, changed, as it was, and to be taken out.

Products are matched by their ids, and content by its digest.
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
    """What is to be done to an index of N rows. Products given = added + replaced + unchanged.

    Attributes:
        gone: (N,) bool, rows that become empty.
        keep: (M,) bool, which of the embeddings given are to be added.
        added: products that are not there.
        replaced: products whose content has changed.
        unchanged: products that are there as they are.
        deleted: products to take out.
        unknown: ids to take out that are not there.
    """

    gone: NDArray[np.bool_]
    keep: NDArray[np.bool_]
    added: int
    replaced: int
    unchanged: int
    deleted: int
    unknown: Sequence[str]

    @property
    def new(self) -> int:
        """Rows to add."""
        return self.added + self.replaced

    @property
    def changes(self) -> bool:
        """Whether a product comes, changes or goes."""
        return self.new + self.deleted > 0


def make_plan(
    index: ProductIndex,
    upsert: EmbeddingReader | None,
    delete: Sequence[str],
    *,
    unchanged: pa.ChunkedArray | None = None,
    strict: bool = False,
) -> Plan:
    """Compare what is given with what an index holds.

    Args:
        index: what is updated.
        upsert: embeddings of products that are new or may have changed; all of them are read and
            checked.
        delete: ids to take out.
        unchanged: ids of products that were compared before and are there as they are.
        strict: refuse ids to take out that are not there.

    Raises:
        ValueError: an id twice, or both given and to be taken out; with `strict`, an unknown id;
            faulty vectors.
    """
    leaving = pa.array(delete, pa.large_string())
    counts = pc.value_counts(leaving)
    if len(counts) < len(leaving):
        twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        raise ValueError(f"ids to delete: {twice[0].as_py()!r} appears more than once")
    if unchanged is not None:
        _check_not_both(unchanged, leaving)
    gone = np.zeros(len(index.all_ids()), bool)
    rows = index.rows_of(leaving)
    unknown = leaving.filter(pa.array(rows < 0)).to_pylist()
    if strict and unknown:
        raise ValueError(
            f"{len(unknown)} ids to delete are not in {index.path} (strict): "
            f"{', '.join(unknown[:5])}"
        )
    gone[rows[rows >= 0]] = True
    before = 0 if unchanged is None else len(unchanged)
    if upsert is None:
        return Plan(gone, np.zeros(0, bool), 0, 0, before, len(leaving) - len(unknown), unknown)
    upsert.check_unique()
    given = pa.chunked_array(list(upsert.ids()), pa.large_string())
    _check_not_both(given, leaving)
    rows = index.rows_of(given)
    there = rows >= 0
    same = _same(index, upsert, rows)
    gone[rows[there & ~same]] = True
    return Plan(
        gone,
        ~same,
        added=int((~there).sum()),
        replaced=int((there & ~same).sum()),
        unchanged=before + int(same.sum()),
        deleted=len(leaving) - len(unknown),
        unknown=unknown,
    )


def known_digests(
    index: ProductIndex, rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(B,) int64 digests of what rows were embedded from, and (B,) bool whether that is known.

    -1 is no row.
    """
    contents = index.contents()
    digests = pc.fill_null(contents, 0).to_numpy()
    known = pc.is_valid(contents).to_numpy()
    return digests[rows], known[rows] & (rows >= 0)


def _same(
    index: ProductIndex, upsert: EmbeddingReader, rows: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """(M,) bool: embeddings of the very content that the index holds."""
    digests, known = known_digests(index, rows)
    parts = []
    first = 0
    for batch in upsert.batches(BLOCK):
        of = slice(first, first + len(batch.ids))
        parts.append(known[of] & (digests[of] == batch.digests()))
        first = of.stop
    return np.concatenate(parts)


def _check_not_both(given: pa.ChunkedArray, leaving: pa.Array) -> None:
    if both := given.filter(pc.is_in(given, value_set=leaving)).to_pylist():
        raise ValueError(
            f"{both[0]!r} is both to change and to delete; {len(both)} ids are like this"
        )
