"""Which index for how many vectors.

The FAISS factory string, chosen from count and dimension, with the reason.

Few vectors are compared one by one (`Flat`). The default for more is
`IVF{lists},PQ{dim/4}x4fsr,Refine(SQ8)`: many small lists found by k-means in two levels, 4-bit
codes of four dimensions each that are scanned from registers, and 8-bit vectors to rank the best
candidates again. No learned rotation (OPQ): its training costs most of a build on a CPU, and
re-ranking makes its gain vanish.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

MIN_POINTS_PER_LIST = 39
"""FAISS calls k-means under-trained below so many training vectors per centroid."""

POINTS_PER_LIST = 61
"""Vectors in a list at least, on average:

codes come in blocks of 32, of which short lists would waste half.
"""

CODEBOOK = 16
"""Centroids of a 4-bit code."""

EXACT_NUMBERS = 30_000 * 256
"""Up to so many numbers, products times dimensions, the default index is exact search.

An exact search reads all of them once, so what it costs follows from their number: about 1 ms on
  one quiet core, where
an index with lists would save less than that and lose products. `python -m benchmarks.exact`
measures it.
"""


@dataclass(frozen=True)
class Choice:
    """A factory string and why it was chosen."""

    factory: str
    reason: str


@dataclass(frozen=True)
class Mapped:
    """An index whose codes and finer vectors are mapped from files.

    Lists of 4-bit codes, and vectors to re-rank by.

    Attributes:
        lists: L.
        pieces: sub-vectors of 4 bits each.
        residual: codes are of the difference to the list's centre.
        finer: how vectors for re-ranking are stored: "SQ8" or "SQfp16"; None for no re-ranking.
    """

    lists: int
    pieces: int
    residual: bool
    finer: str | None

    def __str__(self) -> str:
        """As a factory string."""
        finer = f",Refine({self.finer})" if self.finer else ""
        return f"IVF{self.lists},PQ{self.pieces}x4fs{'r' if self.residual else ''}{finer}"

    @property
    def code_size(self) -> int:
        """Bytes of a code."""
        return (self.pieces + 1) // 2

    def finer_size(self, dim: int) -> int:
        """Bytes of a vector for re-ranking."""
        return {None: 0, "SQ8": 1, "SQfp16": 2}[self.finer] * dim


def parse_mapped(factory: str) -> Mapped | None:
    """What a factory string says, where it is one whose lists are mapped; None for any other."""
    match = re.fullmatch(r"IVF(\d+),PQ(\d+)x4fs(r?)(?:,Refine\((SQ8|SQfp16)\))?", factory)
    if match is None or int(match[1]) < 1 or int(match[2]) < 1:
        return None
    return Mapped(int(match[1]), int(match[2]), bool(match[3]), match[4])


def choose_factory(count: int, dim: int) -> Choice:
    """The default index of a catalogue: exact search while that is quick, else lists.

    Args:
        count: number of vectors, at least 1.
        dim: D.
    """
    if count * dim > EXACT_NUMBERS:
        return choose_lists(count, dim)
    why = (
        f"{count:,} vectors of {dim} dimensions are few enough to compare a query with each of "
        "them: nothing is lost"
    )
    return Choice("Flat", f"{why} (up to {EXACT_NUMBERS // dim:,})")


def choose_lists(count: int, dim: int) -> Choice:
    """The index with lists for any size; exact search for too few vectors to train codes.

    Args:
        count: number of vectors, at least 1.
        dim: D.
    """
    smallest = CODEBOOK * MIN_POINTS_PER_LIST
    if count < smallest:
        return Choice(
            "Flat",
            f"{count:,} vectors are fewer than the {smallest} that train a 4-bit code: exact "
            "search instead",
        )
    lists = num_lists(count)
    why = f"{lists:,} lists of about {count / lists:,.0f} vectors"
    pieces = num_pieces(dim)
    if pieces is None:
        return Choice(
            f"IVF{lists},SQ8",
            f"{why}; {dim} dimensions cannot be cut into short pieces: 8 bits for each",
        )
    codes = f"{pieces} 4-bit codes ({(pieces + 1) // 2} bytes) a vector to scan"
    return Choice(f"IVF{lists},PQ{pieces}x4fsr,Refine(SQ8)", f"{why}; {codes}")


def num_lists(count: int) -> int:
    """The power of two nearest to 8 x sqrt(count), or to what leaves 61 vectors in a list."""
    return int(2 ** round(math.log2(max(1, min(8 * math.sqrt(count), count / POINTS_PER_LIST)))))


def num_pieces(dim: int) -> int | None:
    """The number of sub-vectors of 4 dimensions, or of the nearest size to 8 that divides D.

    None where none does.
    """
    return next((dim // size for size in (4, 3, 2, 5, 6, 7, 8) if dim % size == 0), None)


def default_nprobe(lists: int) -> int:
    """How many lists a search visits unless told otherwise: sqrt(lists), at least 16, at most all.

    Typed queries lie further from the products than products from each other, so this is generous.
    """
    return min(lists, max(16, math.ceil(math.sqrt(lists))))


def train_size(count: int, lists: int) -> int:
    """How many vectors train an index: 39 per list, and enough for any code book."""
    return min(count, max(MIN_POINTS_PER_LIST * lists, 65_536))
