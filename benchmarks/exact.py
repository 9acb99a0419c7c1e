"""What an exact search of one query costs on one core, by the number of products.

How many the default index compares.

    python -m benchmarks.exact [--dim 256] [--counts '[10000, 20000, 30000, 50000]']

Prints the median of 500 searches for 10 products. Others that compute at the same time share caches
and memory with them: choose a quiet machine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import faiss
import numpy as np

from benchmarks.command import run
from tritower.retrieval.building.choose_spec import EXACT_NUMBERS

SEARCHES = 500


COUNTS = [10_000, 20_000, 30_000, 50_000]
STANDARD: list[int] = []
"""Default of the numbers of products: `COUNTS`."""


def exact(dim: int = 256, counts: list[int] = STANDARD) -> None:
    """Print the milliseconds of an exact search.

    Args:
        dim: D.
        counts: numbers of products; 10,000 to 50,000 when not given.
    """
    print(f"the default index is exact up to {EXACT_NUMBERS // dim:,} products of {dim} dimensions")
    for count, milliseconds in measure(dim, counts or COUNTS):
        print(f"{count:>9,} products: {milliseconds:.3f} ms")


def measure(dim: int, counts: Sequence[int], searches: int = SEARCHES) -> list[tuple[int, float]]:
    """Median milliseconds of a search for 10 products on one thread, by number of products."""
    vectors = _drawn(max(counts), dim, 0)
    queries = _drawn(searches, dim, 1)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    found = []
    for count in counts:
        index = faiss.IndexFlatIP(dim)
        index.add(vectors[:count])
        seconds = []
        for query in queries:
            started = time.perf_counter()
            index.search(query[None], 10)
            seconds.append(time.perf_counter() - started)
        found.append((count, 1000 * float(np.median(seconds))))
    faiss.omp_set_num_threads(threads)
    return found


def _drawn(count: int, dim: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, dim), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


if __name__ == "__main__":
    run("benchmarks.exact", exact, "Milliseconds of an exact search.")
