"""Fuse rankings of several searches by ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tritower.retrieval.ranking.hits import Hits
from tritower.retrieval.ranking.metrics import NO_ROW


def reciprocal_rank_fusion(
    rankings: Sequence[Hits], weights: Sequence[float] | None = None, constant: int = 60
) -> NDArray[np.int64]:
    """One ranking of several.

    A product at rank r of a ranking gets 1 / (constant + r) points (Cormack, SIGIR 2009).

    Equal scores share the mean of their ranks, so where one ranking cannot separate products, as
    words cannot separate variants, the others decide.

    Args:
        rankings: of Q queries each.
        weights: of the rankings' points; None for 1 each.
        constant: the larger it is, the less the first ranks count.

    Returns:
        (Q, K) rows, most points first, equal points by row; -1 padded.
    """
    width = max(ranking.rows.shape[1] for ranking in rankings)
    fused = np.full((len(rankings[0].rows), width), NO_ROW)
    ranks = [ranking.mean_ranks() for ranking in rankings]
    for query in range(len(fused)):
        # Sum the points of each product over the rankings.
        points: dict[int, float] = {}
        for ranking, rank, weight in zip(
            rankings, ranks, weights or [1.0] * len(rankings), strict=True
        ):
            for row, place in zip(ranking.rows[query].tolist(), rank[query].tolist(), strict=True):
                if row != NO_ROW:
                    points[row] = points.get(row, 0.0) + weight / (constant + place)
        best = sorted(points, key=lambda row: (-points[row], row))[:width]
        fused[query, : len(best)] = best
    return fused
