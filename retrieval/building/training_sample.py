"""The vectors that train an index: how many, which rows, and reading them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tritower.retrieval.building.choose_spec import train_size
from tritower.retrieval.building.options import BuildOptions
from tritower.retrieval.ivf.spec import MIN_POINTS_PER_LIST
from tritower.retrieval.vectors.embeddings import EmbeddingBatch, EmbeddingReader
from tritower.terminal.progress import show_progress

logger = logging.getLogger(__name__)


def sample_size(reader: EmbeddingReader, lists: int, options: BuildOptions) -> int:
    """Number of training vectors.

    Raises:
        ValueError: an option below 1.
    """
    size = options.train_sample
    if size is None:
        size = train_size(reader.count, lists)
    if size < 1:
        raise ValueError(f"train_sample={size}; expected at least 1")
    return min(size, reader.count)


def check_enough_for_lists(factory: str, lists: int, size: int, strict: bool) -> None:
    """Refuse fewer training vectors than lists, and warn about few.

    Raises:
        ValueError: fewer than lists; with `strict`, also fewer than `MIN_POINTS_PER_LIST` a list.
    """
    # Fewer vectors than lists cannot train; few for each list train badly.
    if lists > size:
        raise ValueError(
            f"factory {factory!r} needs at least {lists} training vectors and has {size}: at most "
            f"IVF{size}, well trained IVF{max(size // MIN_POINTS_PER_LIST, 1)}; or Flat"
        )
    if lists and size < MIN_POINTS_PER_LIST * lists:
        message = (
            f"{factory} is under-trained: {size:,} training vectors for {lists:,} lists, "
            f"{size / lists:.1f} each; {MIN_POINTS_PER_LIST} are wanted"
        )
        if strict:
            raise ValueError(f"{message} (strict)")
        logger.warning("%s", message)


def check_enough_for_codes(
    factory: str, centroids: int, bits: int, sub_quantizers: int, size: int
) -> None:
    """Refuse fewer training vectors than a code book has centroids.

    Raises:
        ValueError: too few.
    """
    if centroids > size:
        most_bits = int(np.log2(size))
        raise ValueError(
            f"factory {factory!r} needs at least {centroids} training vectors for its {bits}-bit "
            f"codes and has {size}: at most {most_bits} bits (PQ{sub_quantizers}x{most_bits}), or "
            "Flat"
        )


def sample_rows(count: int, size: int, seed: int) -> NDArray[np.int64]:
    """(size,) ascending rows, drawn uniformly without replacement."""
    return np.sort(np.random.default_rng(seed).choice(count, size, replace=False, shuffle=False))


def uniform_sample(reader: EmbeddingReader, size: int, seed: int) -> NDArray[np.float32]:
    """(size, D) vectors drawn from all shards, in the order of their rows (`sample_rows`)."""
    return read_rows(reader, sample_rows(reader.count, size, seed))


def read_rows(reader: EmbeddingReader, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """(S, D) vectors of (S,) distinct rows, in one pass over all shards."""
    vectors = np.empty((len(rows), reader.dim), np.float32)
    # Shards are read in order, so rows are looked up in order and put back to their places.
    order = np.argsort(rows, kind="stable")
    ascending = rows[order]
    first = 0
    filled = 0
    for batch in batches_with_progress(reader, "sample"):
        last = first + len(batch.ids)
        end = int(np.searchsorted(ascending, last))
        vectors[order[filled:end]] = batch.vectors[ascending[filled:end] - first]
        first = last
        filled = end
    return vectors


def batches_with_progress(reader: EmbeddingReader, task: str) -> Iterator[EmbeddingBatch]:
    """All embeddings, with a progress bar named after the task."""
    return show_progress(
        reader.batches(), reader.count, lambda batch: len(batch.ids), task, "vectors"
    )
