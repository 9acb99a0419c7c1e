"""What a search will cost, before there is an index.

One of the full size, whose lists hold codes of other vectors.

A small index would mislead: its codes and vectors stay in the processor's caches, where
those of millions come from memory. A mock index has the very lists of the index that is to be
built, as long as they will be. All of them lie in the same 32 MiB, and all refine vectors in the
same 128 MiB: more than caches hold, and written in a moment whatever the size of the index.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np

from tritower.retrieval.ivf.engine import Engine
from tritower.retrieval.ivf.inverted_lists import BLOCK, extents, file_bytes, map_lists, pack
from tritower.retrieval.ivf.ivf_pq import (
    EncodedVectors,
    TrainedQuantizers,
    open_refine,
    write_refine_header,
)

SHARED_CODES = 32 << 20
SHARED_VECTORS = 128 << 20
"""Bytes of codes and rows that all lists share, and of refine vectors."""


def mock_index(
    folder: Path, trained: TrainedQuantizers, encoded: EncodedVectors, count: int
) -> Engine:
    """An engine that costs what an index of `count` vectors would; what it finds means nothing.

    Args:
        folder: for its files.
        trained: what the index would be made with.
        encoded: (n,) codes and refine vectors, which all lists are filled with.
        count: N.
    """
    index = faiss.clone_index(trained.index)
    if trained.refine is None:
        rows = count
    else:
        rows = min(count, max(1, SHARED_VECTORS // encoded.refine.shape[1]))
    # All lists have the length that they will have on average. They lie in a few distinct places of
    # one file, which is larger than caches and quick to write.
    sizes = np.full(index.nlist, max(1, round(count * (1 + trained.spill) / index.nlist)))
    distinct = max(1, min(index.nlist, SHARED_CODES // file_bytes(sizes[:1], index.code_size)))
    table = extents(sizes[:distinct], index.code_size)
    blocks = pack(index, encoded.codes[0])
    generator = np.random.default_rng(0)
    with (folder / "mock-index.bin").open("wb") as file:
        # Fill each place with random codes and rows.
        for size, room, start in table.astype(np.int64):
            file.seek(start)
            file.write(
                memoryview(blocks[generator.integers(len(blocks), size=room // BLOCK)]).cast("B")
            )
            file.write(memoryview(generator.integers(rows, size=size)).cast("B"))
        file.truncate(file_bytes(sizes[:distinct], index.code_size))
    # Every list points to one of these places.
    places = table[np.arange(index.nlist) % distinct]
    keep: tuple[Any, ...] = (index, map_lists(index, folder / "mock-index.bin", places))
    index.ntotal = rows
    if trained.refine is None:
        return Engine(index, rows, spill=trained.spill, keep=keep)
    # Refine vectors likewise: a few, repeated.
    with (folder / "mock-index.faiss").open("wb") as file:
        write_refine_header(file, trained.refine, rows)
        for start in range(0, rows, len(encoded.refine)):
            file.write(encoded.refine[: rows - start].data.cast("B"))
    refine = open_refine(folder / "mock-index.faiss", rows, index.d)
    return Engine(faiss.IndexRefine(index, refine), rows, spill=trained.spill, keep=(*keep, refine))
