"""Lists of nearby vectors: k-means in one or two levels, and the lists each vector belongs to.

K-means over L centroids costs L x (vectors) x D, too much for many lists. In two levels it costs
about 2 x sqrt(L) x (vectors) x D: first sqrt(L) groups, then each group's share of the lists within
it, as in FAISS's baseline for a billion vectors (big-ann-benchmarks, NeurIPS'21). Vectors find
their lists through the same groups.

A vector may be stored in a second list, so that queries on either side of a border find it. The
second list is chosen by SOAR (arXiv:2404.00774): its residual should point elsewhere than the first
one, since a query that misses a vector in its first list does so along that residual.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from tritower.retrieval.ivf import gpu
from tritower.terminal.progress import show_progress

FLAT_LISTS = 1024
"""Up to so many lists, one level of k-means is affordable."""

ITERATIONS = 10
GROUPS_VISITED = 4
"""Groups whose centroids a vector is compared with:

98 % of a million vectors then find their very nearest list.
"""

SPILL_CANDIDATES = 6
SPILL_WEIGHT = 1.0
"""SOAR's lambda: how much the part of the second residual along the first one counts extra."""

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Centroids:
    """Centres of lists, of unit length, in groups that are close together.

    Attributes:
        vectors: (L, D) float32.
        groups: (G, D) float32 centers of groups; G = 0 where lists are few.
        group_of: (L,) int64, the group of each list.
    """

    vectors: Vectors
    groups: Vectors
    group_of: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of lists."""
        return len(self.vectors)

    def nearest(self, vectors: Vectors, count: int = 1) -> tuple[Vectors, NDArray[np.int64]]:
        """The lists with the highest inner products, best first.

        Args:
            vectors: (B, D) float32.
            count: lists per vector, C.

        Returns:
            (B, C) float32 inner products and (B, C) int64 list numbers, -inf and -1 where fewer
            were compared. With groups and without a GPU, the lists of the nearest groups are
            compared, not all.
        """
        if not len(self.groups) or gpu.in_use():
            found = gpu.nearest(vectors, self.vectors, min(count, len(self)))
            missing = ((0, 0), (0, count - found[0].shape[1]))
            return np.pad(found[0], missing, constant_values=-np.inf), np.pad(
                found[1], missing, constant_values=-1
            )
        if count == 1:
            return self._nearest_one(vectors)
        # Compare vectors with the lists of their nearest groups only.
        best = faiss.ResultHeap(len(vectors), count, keep_max=True)
        for rows, lists in self._meetings(vectors):
            best.add_result_subset(rows, vectors[rows] @ self.vectors[lists].T, lists)
        best.finalize()
        return best.D, best.I

    def _nearest_one(self, vectors: Vectors) -> tuple[Vectors, NDArray[np.int64]]:
        best = np.full(len(vectors), -np.inf, np.float32)
        nearest = np.full(len(vectors), -1, np.int64)
        for rows, lists in self._meetings(vectors):
            scores = vectors[rows] @ self.vectors[lists].T
            place = scores.argmax(axis=1)
            top = scores[np.arange(len(rows)), place]
            better = top > best[rows]
            best[rows[better]] = top[better]
            nearest[rows[better]] = lists[place[better]]
        return best[:, None], nearest[:, None]

    def _meetings(self, vectors: Vectors) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Group by group, the vectors to compare with the lists of that group."""
        visited = min(GROUPS_VISITED, len(self.groups))
        # Few groups: sorting a row of scores costs less than the heaps of a search.
        near = np.argpartition(-(vectors @ self.groups.T), visited - 1, axis=1)[:, :visited].ravel()
        order = np.argsort(near, kind="stable")
        bounds = np.searchsorted(near[order], np.arange(len(self.groups) + 1))
        for group in range(len(self.groups)):
            rows = order[bounds[group] : bounds[group + 1]] // visited
            lists = np.flatnonzero(self.group_of == group)
            if len(rows) and len(lists):
                yield rows, lists

    def lists_of(self, vectors: Vectors, spill: bool = False) -> NDArray[np.int64]:
        """The list of each vector, and its second one.

        Args:
            vectors: (B, D) float32.
            spill: choose a second list.

        Returns:
            (B, 1) int64, or (B, 2) with spill; -1 where there is no second list to choose.
        """
        if not spill or len(self) == 1:
            return self.nearest(vectors, 1)[1]
        scores, near = self.nearest(vectors, 1 + SPILL_CANDIDATES)
        # With centers of unit length, all products of the residuals x - c and x - c' follow from
        # x.c, x.c' and c.c'.
        square = np.einsum("bd,bd->b", vectors, vectors)[:, None]
        first = scores[:, :1]
        others = np.where(near[:, 1:] < 0, 0, scores[:, 1:])
        centers = self.vectors[near]  # (B, 1 + C, D); a missing list borrows the last one
        between = np.matmul(centers[:, 1:], centers[:, 0, :, None])[..., 0]
        length = square - 2 * first + 1
        along = np.where(
            length > 1e-6, (square - others - first + between) ** 2 / np.maximum(length, 1e-6), 0
        )
        loss = np.where(near[:, 1:] < 0, np.inf, square - 2 * others + 1 + SPILL_WEIGHT * along)
        second = np.take_along_axis(near[:, 1:], loss.argmin(axis=1, keepdims=True), axis=1)
        return np.concatenate([near[:, :1], second], axis=1)


def find_centroids(sample: Vectors, count: int, seed: int) -> Centroids:
    """Spherical k-means, in two levels where lists are many and there is no GPU to do it in one.

    Args:
        sample: (S, D) float32 training vectors, S >= count.
        count: number of lists.
        seed: of the choice of the first centroids.
    """
    if count <= FLAT_LISTS:
        return grouped(_kmeans(sample, count, seed), np.empty((0, sample.shape[1]), np.float32))
    num_groups = 2 ** round(math.log2(math.sqrt(count)))
    if gpu.in_use():
        vectors = _kmeans(sample, count, seed)
        return grouped(vectors, _kmeans(vectors, num_groups, seed))
    # A group needs far fewer training vectors than there are: 256 each.
    groups = _kmeans(sample[:: max(1, len(sample) // (256 * num_groups))], num_groups, seed)
    group_of_vector = _nearest_group(sample, groups)
    sizes = np.bincount(group_of_vector, minlength=num_groups)
    shares = _shares(sizes, count)
    members = np.split(np.argsort(group_of_vector, kind="stable"), np.cumsum(sizes)[:-1])
    found = []
    for rows, share in show_progress(
        zip(members, shares, strict=True),
        len(sample),
        lambda pair: len(pair[0]),
        "k-means",
        "vectors",
    ):
        if share:
            found.append(_kmeans(sample[rows], int(share), seed))
    return grouped(np.concatenate(found), groups)


def grouped(vectors: Vectors, groups: Vectors) -> Centroids:
    """Centroids, each in the nearest group; (L, D) and (G, D) float32.

    Groups without lists are left out: a vector whose nearest groups are all such ones would find no
    list.
    """
    if not len(groups):
        return Centroids(vectors, groups, np.zeros(len(vectors), np.int64))
    used, group_of = np.unique(_nearest_group(vectors, groups), return_inverse=True)
    return Centroids(vectors, groups[used], group_of)


def _nearest_group(vectors: Vectors, groups: Vectors) -> NDArray[np.int64]:
    return gpu.nearest(vectors, groups, 1)[1][:, 0]


def _shares(sizes: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Lists for each group, in proportion to its size, never more than it has vectors.

    They sum to `count`.
    """
    ideal = sizes * (count / sizes.sum())
    shares = np.minimum(np.floor(ideal).astype(np.int64), sizes)
    while (missing := count - shares.sum()) > 0:
        need = np.where(shares < sizes, ideal - shares, -np.inf)
        shares[np.argsort(-need, kind="stable")[: min(missing, int(np.isfinite(need).sum()))]] += 1
    return shares


def _kmeans(vectors: Vectors, count: int, seed: int) -> Vectors:
    """Centroids of unit length, on the GPUs where faiss sees any."""
    options: dict[str, Any] = {
        "niter": ITERATIONS,
        "spherical": True,
        "seed": seed % 2**31,
        "min_points_per_centroid": 1,  # too few are refused or warned of before
        "max_points_per_centroid": len(vectors),
    }
    # As many centroids as vectors: every vector is one.
    if count == len(vectors):
        themselves: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return themselves
    # Copying to a GPU costs more than a small k-means.
    if gpu.in_use() and count > FLAT_LISTS // 4:
        try:
            trained = faiss.Kmeans(vectors.shape[1], count, gpu=True, **options)
            trained.train(vectors)
        except RuntimeError as error:
            gpu.give_up(error)
            return _kmeans(vectors, count, seed)
    else:
        trained = faiss.Kmeans(vectors.shape[1], count, **options)
        trained.train(vectors)
    centroids: Vectors = trained.centroids.reshape(count, -1)
    return centroids
