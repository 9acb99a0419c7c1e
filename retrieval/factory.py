"""Which index for how many vectors: the FAISS factory string, chosen from count and dimension, with the reason.

The default is `IVF{lists},PQ{dim/2}x4fsr,Refine(SQ8)`: lists found by k-means, 4-bit codes of pairs of dimensions that
are scanned from registers, and 8-bit vectors to re-rank the best candidates. No learned rotation (OPQ): its training
costs most of a build on a CPU, and re-ranking makes its gain vanish.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MIN_POINTS_PER_LIST = 39
"""FAISS calls k-means under-trained below so many training vectors per centroid."""

CODEBOOK = 16
"""Centroids of a 4-bit code."""


@dataclass(frozen=True)
class Choice:
    """A factory string and why it was chosen."""

    factory: str
    reason: str


def choose_factory(count: int, dim: int) -> Choice:
    """The default index of a catalogue.

    Args:
        count: number of vectors, at least 1.
        dim: D.
    """
    smallest = CODEBOOK * MIN_POINTS_PER_LIST
    if count < smallest:
        return Choice(
            "Flat", f"{count:,} vectors are fewer than the {smallest} that train a 4-bit code: exact search instead"
        )
    lists = num_lists(count)
    wanted = 4 * math.sqrt(count)
    why = f"about 4 x sqrt({count:,}) = {wanted:,.0f} lists"
    if lists < wanted / math.sqrt(2):
        why += f", limited by {MIN_POINTS_PER_LIST} training vectors per list"
    pieces = num_pieces(dim)
    if pieces is None:
        return Choice(f"IVF{lists},SQ8", f"{why}; {dim} dimensions cannot be cut into short pieces: 8 bits for each")
    codes = f"{pieces} 4-bit codes ({pieces // 2} bytes) a vector to scan, {dim} bytes to re-rank"
    return Choice(f"IVF{lists},PQ{pieces}x4fsr,Refine(SQ8)", f"{why}; {codes}")


def num_lists(count: int) -> int:
    """The power of two nearest to 4 x sqrt(count) that leaves enough training vectors for each list."""
    lists = 2 ** round(math.log2(4 * math.sqrt(count)))
    while lists > 1 and lists * MIN_POINTS_PER_LIST > count:
        lists //= 2
    return lists


def num_pieces(dim: int) -> int | None:
    """The number of sub-vectors of 2 dimensions, or of the next size up to 8 that divides D; None where none does."""
    return next((dim // size for size in range(2, 9) if dim % size == 0), None)


def default_nprobe(lists: int) -> int:
    """How many lists a search visits unless told otherwise: 2 x sqrt(lists), at least 16, at most all.

    Typed queries lie further from the products than products from each other, so this is generous.
    """
    return min(lists, max(16, math.ceil(2 * math.sqrt(lists))))


def train_size(count: int, lists: int) -> int:
    """How many vectors train an index: 64 per list, and enough for any code book."""
    return min(count, max(64 * lists, 65_536))
