"""The spec of the index that is built by default: lists of 4-bit codes, and refine vectors."""

from __future__ import annotations

import re
from dataclasses import dataclass

CODEBOOK = 16
"""Centroids of a 4-bit code."""

MIN_POINTS_PER_LIST = 39
"""FAISS calls k-means under-trained below this number of training vectors per centroid."""


@dataclass(frozen=True)
class IvfPqSpec:
    """An index whose codes and refine vectors are mapped from files.

    Lists of 4-bit codes, and vectors to re-rank by.

    Attributes:
        lists: L.
        sub_quantizers: sub-vectors of 4 bits each.
        residual: codes are of the difference to the list's center.
        refine: how vectors for re-ranking are stored: "SQ8" or "SQfp16"; None for no re-ranking.
    """

    lists: int
    sub_quantizers: int
    residual: bool
    refine: str | None

    def __str__(self) -> str:
        """As a factory string."""
        refine = f",Refine({self.refine})" if self.refine else ""
        return f"IVF{self.lists},PQ{self.sub_quantizers}x4fs{'r' if self.residual else ''}{refine}"

    @property
    def code_size(self) -> int:
        """Bytes of a code."""
        return (self.sub_quantizers + 1) // 2

    def refine_size(self, dim: int) -> int:
        """Bytes of a vector for re-ranking."""
        return {None: 0, "SQ8": 1, "SQfp16": 2}[self.refine] * dim


def parse_ivf_pq(factory: str) -> IvfPqSpec | None:
    """The spec in a factory string of mapped lists; None for any other."""
    match = re.fullmatch(r"IVF(\d+),PQ(\d+)x4fs(r?)(?:,Refine\((SQ8|SQfp16)\))?", factory)
    if match is None or int(match[1]) < 1 or int(match[2]) < 1:
        return None
    return IvfPqSpec(int(match[1]), int(match[2]), bool(match[3]), match[4])
