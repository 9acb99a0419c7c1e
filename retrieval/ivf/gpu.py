"""Nearest centroids on a GPU where FAISS sees one, in bounded memory of it.

Stored indexes do not depend on GPUs.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

WORKING_BYTES = 1 << 30
"""Of vectors, and of queries, on the GPU at a time."""

_state = threading.local()
_broken: list[str] = []


def in_use() -> bool:
    """Whether FAISS sees a GPU, and none has failed in this process."""
    return faiss.get_num_gpus() > 0 and not _broken


def give_up(problem: Exception) -> None:
    """Work on the CPU from now on, and log the reason."""
    if not _broken:
        logger.warning(
            "faiss cannot use the GPU it sees (%s): on the CPU from here on",
            str(problem).splitlines()[-1],
        )
    _broken.append(str(problem))


def nearest(
    vectors: NDArray[np.float32], centers: NDArray[np.float32], count: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The `count` centers with the highest inner products, on the GPU or else on the CPU.

    Exact on both.

    Args:
        vectors: (B, D) float32.
        centers: (L, D) float32.
        count: 1 <= count <= L.

    Returns:
        (B, count) float32 inner products, descending, and (B, count) int64 numbers of centers.
    """
    # A GPU that fails once is not used again in this process.
    # A GPU that fails is given up for the rest of the run; the CPU gives the same lists.
    if in_use():
        try:
            found: Any = faiss.knn_gpu(
                _resources(),
                vectors,
                centers,
                count,
                metric=faiss.METRIC_INNER_PRODUCT,
                vectorsMemoryLimit=WORKING_BYTES,
                queriesMemoryLimit=WORKING_BYTES,
            )
            return found[0], found[1]
        except RuntimeError as error:
            give_up(error)
    scores, numbers = faiss.knn(vectors, centers, count, metric=faiss.METRIC_INNER_PRODUCT)
    return scores, numbers


def _resources() -> Any:
    """Scratch memory and streams of one thread."""
    if not hasattr(_state, "resources"):
        _state.resources = faiss.StandardGpuResources()
    return _state.resources
