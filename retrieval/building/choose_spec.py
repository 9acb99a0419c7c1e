"""Choose the index spec, a FAISS factory string, by the number of vectors and their dimension.

Few vectors are compared one by one (`Flat`). The default for more is
`IVF{lists},PQ{dim/4}x4fsr,Refine(SQ8)`: many small lists found by k-means in two levels, 4-bit
codes of four dimensions each that are scanned from registers, and 8-bit vectors that re-rank the
best candidates. There is no learned rotation (OPQ): its training costs most of a build on a CPU,
and re-ranking makes its gain vanish.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tritower.retrieval.ivf.spec import CODEBOOK, MIN_POINTS_PER_LIST

POINTS_PER_LIST = 61
"""Fewest vectors in a list, on average.

Codes come in blocks of 32, of which short lists would waste half.
"""

EXACT_NUMBERS = 30_000 * 256
"""The default index is exact search up to this number of products times dimensions.

An exact search reads all of them once, so its cost follows from their number. On one core of a
2-core machine, 10,000 products of 256 dimensions take .9 ms and 30,000 take 5.4 ms; on the machine
of docs/choosing.md 30,000 take 1.1 ms. An index with lists would save little of that and lose
products. `python -m benchmarks.exact` measures it.
"""


@dataclass(frozen=True)
class IndexSpec:
    """A factory string, and why it was chosen."""

    factory: str
    reason: str


def choose_factory(count: int, dim: int) -> IndexSpec:
    """The default index of a catalogue: exact search while that is quick, else lists.

    Args:
        count: number of vectors, at least 1.
        dim: D.
    """
    if count * dim > EXACT_NUMBERS:
        return choose_lists(count, dim)
    reason = (
        f"{count:,} vectors of {dim} dimensions are few enough to compare a query with each of "
        f"them: nothing is lost (up to {EXACT_NUMBERS // dim:,})"
    )
    return IndexSpec("Flat", reason)


def choose_lists(count: int, dim: int) -> IndexSpec:
    """The index with lists for any size; exact search for too few vectors to train codes.

    Args:
        count: number of vectors, at least 1.
        dim: D.
    """
    if not can_train_codes(count):
        smallest = CODEBOOK * MIN_POINTS_PER_LIST
        reason = (
            f"{count:,} vectors are fewer than the {smallest} that train a 4-bit code: exact "
            "search instead"
        )
        return IndexSpec("Flat", reason)
    # Codes of 4 bits if the dimension can be cut into short pieces, else 8 bits per dimension.
    lists = num_lists(count)
    reason = f"{lists:,} lists of about {count / lists:,.0f} vectors"
    sub_quantizers = num_sub_quantizers(dim)
    if sub_quantizers is None:
        return IndexSpec(
            f"IVF{lists},SQ8",
            f"{reason}; {dim} dimensions cannot be cut into short pieces: 8 bits for each",
        )
    codes = f"{sub_quantizers} 4-bit codes ({(sub_quantizers + 1) // 2} bytes) a vector to scan"
    return IndexSpec(f"IVF{lists},PQ{sub_quantizers}x4fsr,Refine(SQ8)", f"{reason}; {codes}")


def can_train_codes(count: int) -> bool:
    """Whether there are enough vectors to train codes; with fewer, search is exact."""
    return count >= CODEBOOK * MIN_POINTS_PER_LIST


def num_lists(count: int) -> int:
    """The power of two nearest to 8 x sqrt(count), or to what leaves 61 vectors in a list."""
    ideal = max(1, min(8 * math.sqrt(count), count / POINTS_PER_LIST))
    return int(2 ** round(math.log2(ideal)))


def num_sub_quantizers(dim: int) -> int | None:
    """Number of sub-quantizers of 4 dimensions, or of the nearest size up to 8 that divides D.

    None if none does.
    """
    for size in (4, 3, 2, 5, 6, 7, 8):
        if dim % size == 0:
            return dim // size
    return None


def default_nprobe(lists: int) -> int:
    """Lists that a search scans by default: sqrt(lists), at least 16, at most all.

    Typed queries lie further from the products than products from each other, so this is generous.
    """
    return min(lists, max(16, math.ceil(math.sqrt(lists))))


def train_size(count: int, lists: int) -> int:
    """Number of training vectors: 39 per list, and enough for any code book."""
    return min(count, max(MIN_POINTS_PER_LIST * lists, 65_536))
