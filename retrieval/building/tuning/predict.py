"""What an index of all vectors would find and cost, before there is one.

Told from uniform samples of them.

One sample trains what the index would be made with, another one tells what it does to vectors that
it has not seen (those that k-means has seen stand nearer to their centres). Of a query's k nearest
vectors a sample of S among N holds a uniform part, its nearest k S / N. An index loses such a
neighbour in two places, and both can be looked up:

* It stands in a list that is not visited. How many lists a search visits until it meets the
  neighbour is its depth.
* It is met, but so many codes score higher that it is not among the candidates for re-ranking. How
  many do so in the sample, N / S times, is its crowd. Only codes of the nearest few hundred vectors
  are compared: those that lie further hardly ever score higher.

What searches cost is measured on a stand-in of the full size.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from tritower.retrieval.building.tuning.measure import K_FACTORS, timed
from tritower.retrieval.building.tuning.mock_index import stand_in
from tritower.retrieval.building.tuning.tuning_queries import Probe, with_truth
from tritower.retrieval.ivf.clustering import Centroids, find_centroids
from tritower.retrieval.ivf.ivf_pq import Encoded, Trained, train
from tritower.retrieval.ivf.operating_points import Point, Target
from tritower.retrieval.ivf.spec import MIN_POINTS_PER_LIST, Mapped

CROWD = 40
"""Codes of so many times k vectors are compared for k hits; at least 80 in the sample."""

CEILING = 0.99
"""Where re-ranking by 8-bit vectors could not reach this recall, 16-bit ones are stored:

they cost only disk.
"""

Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Prediction:
    """What a design would be with all vectors.

    Attributes:
        trained: on the sample.
        points: kind of query -> the cheapest way to the recall asked for, one for each number of
            candidates re-ranked.
        best: kind of query -> the most recall that any number of lists and of candidates gives.
        seconds: to encode all vectors.
    """

    trained: Trained
    points: Mapping[str, list[Point]]
    best: Mapping[str, float]
    seconds: float


class Predictor:
    """Predicts designs.

    Args:
        sample: (S, D) float32, drawn uniformly, to train on.
        unseen: (U, D) float32, drawn uniformly from the others; the sample itself where there are
            too few.
        probes: queries; those that are products have their row in `unseen` as `own`.
        target: the recall asked for.
        count: N, number of all vectors.
        seed: of k-means.
        known: the lists of all vectors, by their number, where they are found already.

    Attributes:
        target, count: as given.
        dim: D.
        finer: how vectors for re-ranking are stored.
    """

    def __init__(
        self,
        sample: Vectors,
        unseen: Vectors,
        probes: Sequence[Probe],
        target: Target,
        count: int,
        seed: int,
        known: Mapping[int, Centroids],
    ) -> None:
        self._sample = sample
        self._unseen = unseen
        self._seed = seed
        self.target = target
        self.count = count
        self.dim = sample.shape[1]
        self._share = len(unseen) / count
        self._held = max(1, round(target.k * self._share))
        self._near = nearest_in(unseen, probes, target.k, count)
        self._rows, places = np.unique(
            np.concatenate([probe.truth for probe in self._near]), return_inverse=True
        )
        ends = np.cumsum([len(probe.truth) for probe in self._near])[:-1]
        self._places = np.split(places.reshape(-1, self._near[0].truth.shape[1]), ends)
        ceilings = ceiling_of_8_bits(unseen, self._near, self._held)
        self.finer = "SQ8" if min(ceilings) >= max(CEILING, (1 + target.recall) / 2) else "SQfp16"
        self._ceilings = ceilings if self.finer == "SQ8" else [1.0] * len(ceilings)
        self._centroids = dict(known)
        self._trained: dict[Mapped, Trained] = {}

    def predict(self, design: Mapped, spill: bool) -> Prediction:
        """What an index of this design would find and cost."""
        trained = replace(self._train(design), spill=spill)
        started = time.perf_counter()
        encoded = trained.encode(self._unseen[self._rows])
        seconds = (time.perf_counter() - started) * self.count / len(self._rows)
        seen = _as_scanned(trained, encoded)
        points: dict[str, list[Point]] = {}
        best: dict[str, float] = {}
        with tempfile.TemporaryDirectory(prefix="tritower-tune-") as name:
            costs = stand_in(Path(name), trained, encoded, self.count)
            for probe, places, ceiling in zip(
                self._near, self._places, self._ceilings, strict=True
            ):
                depth = depths(
                    probe.vectors, encoded.lists[places[:, : self._held]], trained.centroids
                )
                crowd = (
                    crowds(probe.vectors, [copy[places] for copy in seen], self._held) / self._share
                )
                ways, best[probe.kind] = self._ways(depth.ravel(), crowd.ravel(), ceiling, design)
                points[probe.kind] = timed(costs, probe, self.target.k, ways)
        return Prediction(trained, points, best, seconds)

    def _train(self, design: Mapped) -> Trained:
        if design not in self._trained:
            if design.lists not in self._centroids:
                some = self._sample[
                    :: max(1, len(self._sample) // (MIN_POINTS_PER_LIST * design.lists))
                ]
                self._centroids[design.lists] = find_centroids(some, design.lists, self._seed)
            centroids = self._centroids[design.lists]
            self._trained[design] = train(self._sample, design, self._seed, centroids=centroids)
        return self._trained[design]

    def _ways(
        self, depth: Rows, crowd: NDArray[np.float64], ceiling: float, design: Mapped
    ) -> tuple[list[Point], float]:
        """The fewest lists for each number of candidates, while more candidates save lists.

        And the best recall.
        """
        ways: list[Point] = []
        factors = K_FACTORS if design.finer is not None else (1.0,)
        for factor in factors:
            met = np.sort(depth[crowd < self.target.k * factor])
            if ceiling * len(met) / len(depth) < self.target.recall:
                continue
            nprobe = int(met[math.ceil(self.target.recall / ceiling * len(depth)) - 1])
            if ways and nprobe >= ways[-1].nprobe:
                break
            ways.append(
                Point(nprobe, factor, round(ceiling * float((met <= nprobe).sum()) / len(depth), 5))
            )
        return ways, ceiling * float((crowd < self.target.k * factors[-1]).mean())


def nearest_in(sample: Vectors, probes: Sequence[Probe], k: int, count: int) -> list[Probe]:
    """Tuning queries with the nearest rows of a sample that stand for their k nearest of all."""
    return with_truth(
        probes,
        iter([sample]),
        min(len(sample) - 1, max(80, round(CROWD * k * len(sample) / count))),
    )


def depths(queries: Vectors, lists: NDArray[np.int32], centroids: Centroids) -> Rows:
    """How many lists a search visits until it meets a vector: (Q, K) int64, at least 1.

    Args:
        queries: (Q, D) float32.
        lists: (Q, K, C), the lists that K vectors stand in; -1 for none.
        centroids: of the lists.
    """
    needed = np.empty(lists.shape, np.int64)
    for start in range(0, len(queries), 256):
        block = slice(start, start + 256)
        scores = queries[block] @ centroids.vectors.T
        for place in np.ndindex(lists.shape[1:]):
            mine = lists[block, *place][:, None]
            before = (scores > np.take_along_axis(scores, np.maximum(mine, 0), axis=1)).sum(axis=1)
            needed[block, *place] = np.where(mine[:, 0] < 0, len(centroids), before) + 1
    return needed.min(axis=-1)


def crowds(queries: Vectors, near: Sequence[Vectors], held: int) -> Rows:
    """How many of the near vectors score higher than each of the first ones: (Q, held) int64.

    Args:
        queries: (Q, D) float32.
        near: (Q, M, D) float32 as their codes tell them, for each list that they stand in: the
            highest score counts.
        held: number of the first ones.
    """
    scores = np.max([np.einsum("qd,qmd->qm", queries, vectors) for vectors in near], axis=0)
    return np.stack(
        [(scores > scores[:, place, None]).sum(axis=1) for place in range(held)], axis=1
    )


def precision_for(sample: Vectors, asked: Sequence[Probe], k: int, count: int) -> str:
    """How vectors for re-ranking are stored where no recall is asked for.

    "SQ8", or "SQfp16" where 8 bits lose results.

    Args:
        sample: (S, D) float32, drawn uniformly.
        asked: queries; those that are products have their row in `sample` as `own`.
        k: results of a search.
        count: number of all vectors.
    """
    near = nearest_in(sample, asked, k, count)
    held = max(1, round(k * len(sample) / count))
    if min(ceiling_of_8_bits(sample, near, held)) >= CEILING:
        return "SQ8"
    return "SQfp16"


def ceiling_of_8_bits(sample: Vectors, near: Sequence[Probe], held: int) -> list[float]:
    """The recall of exact search by 8-bit vectors, of each kind of query.

    No re-ranking by them is better.

    Args:
        sample: (S, D) float32.
        near: queries with their nearest rows of the sample.
        held: how many of them are the answer.
    """
    eight = faiss.IndexScalarQuantizer(
        sample.shape[1], faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    eight.train(sample)
    found = []
    for probe in near:
        rows, places = np.unique(probe.truth[:, : 8 * held], return_inverse=True)
        stored = eight.sa_decode(eight.sa_encode(sample[rows]))
        higher = crowds(probe.vectors, [stored[places.reshape(len(probe.truth), -1)]], held)
        found.append(float((higher < held).mean()))
    return found


def _as_scanned(trained: Trained, encoded: Encoded) -> list[Vectors]:
    """(B, D) vectors as their codes tell them, in each of the lists that they stand in."""
    decoded = [trained.index.pq.decode(np.ascontiguousarray(codes)) for codes in encoded.codes]
    if not trained.index.by_residual:
        return decoded
    result = []
    for part, lists in zip(decoded, encoded.lists.T, strict=True):
        result.append(part + trained.centroids.vectors[lists])
    return result
