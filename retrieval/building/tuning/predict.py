"""Predict what an index of all vectors would find and cost, from uniform samples of them.

One sample trains the quantizers. Another one shows how they treat vectors that they were not
trained on, since k-means puts its centers nearer to those that it has seen. Of a query's k nearest
vectors, a sample of S among N contains a uniform part, its nearest k S / N. An index loses such a
neighbor in two places:

* Its list is not scanned. The neighbor's list rank is the nprobe that a search needs to meet it.
* Too many codes score higher, so it is not among the candidates for re-ranking. Its rank under the
  codes is N / S times the number of such vectors in the sample. Only codes of the nearest few
  hundred vectors are compared: those further away hardly ever score higher.

The cost of searches is measured on a mock index of the full size.
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
from tritower.retrieval.building.tuning.mock_index import mock_index
from tritower.retrieval.building.tuning.tuning_queries import TuningQueries, find_neighbors
from tritower.retrieval.ivf.clustering import Centroids, find_centroids
from tritower.retrieval.ivf.ivf_pq import EncodedVectors, TrainedQuantizers, train
from tritower.retrieval.ivf.operating_points import OperatingPoint, Target
from tritower.retrieval.ivf.spec import MIN_POINTS_PER_LIST, IvfPqSpec

COMPARED_CODES = 40
"""The codes of this many times k vectors are compared; at least 80 in the sample."""

MIN_8_BIT_RECALL = 0.99
"""Below this recall of re-ranking by 8-bit vectors, 16-bit ones are stored; they cost only disk."""

Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Prediction:
    """What an index of a spec would find and cost with all vectors.

    Attributes:
        trained: quantizers trained on the sample.
        points: query type -> the cheapest operating points that reach the requested recall, one for
            each number of candidates re-ranked.
        best: query type -> the highest recall with any number of lists and of candidates.
        seconds: predicted to encode all vectors.
    """

    trained: TrainedQuantizers
    points: Mapping[str, list[OperatingPoint]]
    best: Mapping[str, float]
    seconds: float


class Predictor:
    """Predicts recall and cost of index specs.

    Args:
        sample: (S, D) float32, drawn uniformly, to train on.
        held_out: (U, D) float32, drawn uniformly from the other vectors; the sample itself if there
            are too few.
        tuning_queries: queries; the `own` rows of products count in `held_out`.
        target: the recall to reach.
        count: N, number of all vectors.
        seed: of k-means.
        known: number of lists -> their centroids, as far as they are trained already.

    Attributes:
        target, count: as given.
        dim: D.
        refine: how refine vectors are stored, "SQ8" or "SQfp16".
    """

    def __init__(
        self,
        sample: Vectors,
        held_out: Vectors,
        tuning_queries: Sequence[TuningQueries],
        target: Target,
        count: int,
        seed: int,
        known: Mapping[int, Centroids],
    ) -> None:
        self._sample = sample
        self._held_out = held_out
        self._seed = seed
        self.target = target
        self.count = count
        self.dim = sample.shape[1]
        self._share = len(held_out) / count
        self._num_neighbors = max(1, round(target.k * self._share))
        self._queries = neighbors_in_sample(held_out, tuning_queries, target.k, count)

        # All vectors that any query compares, once each, and where those of each query are.
        truths = np.concatenate([queries.truth for queries in self._queries])
        self._rows, positions = np.unique(truths, return_inverse=True)
        ends = np.cumsum([len(queries.truth) for queries in self._queries])[:-1]
        self._positions = np.split(positions.reshape(-1, truths.shape[1]), ends)

        # 16-bit refine vectors where those of 8 bits could not reach the recall.
        recalls = recall_of_8_bits(held_out, self._queries, self._num_neighbors)
        if min(recalls) >= max(MIN_8_BIT_RECALL, (1 + target.recall) / 2):
            self.refine = "SQ8"
            self._refine_recalls = recalls
        else:
            self.refine = "SQfp16"
            self._refine_recalls = [1.0] * len(recalls)
        self._centroids = dict(known)
        self._trained: dict[IvfPqSpec, TrainedQuantizers] = {}

    def predict(self, spec: IvfPqSpec, spill: bool) -> Prediction:
        """What an index of this spec would find and cost."""
        trained = replace(self._train(spec), spill=spill)
        started = time.perf_counter()
        # Encode the vectors that queries are compared with; their time predicts that of all
        # vectors.
        encoded = trained.encode(self._held_out[self._rows])
        seconds = (time.perf_counter() - started) * self.count / len(self._rows)
        decoded = _decoded(trained, encoded)
        points: dict[str, list[OperatingPoint]] = {}
        best: dict[str, float] = {}
        with tempfile.TemporaryDirectory(prefix="tritower-tune-") as folder:
            timing_index = mock_index(Path(folder), trained, encoded, self.count)
            for queries, positions, refine_recall in zip(
                self._queries, self._positions, self._refine_recalls, strict=True
            ):
                # For each neighbor: the lists to scan until it is met, and the codes that score
                # higher.
                neighbors = encoded.lists[positions[:, : self._num_neighbors]]
                needed_lists = list_ranks(queries.vectors, neighbors, trained.centroids)
                copies = [copy[positions] for copy in decoded]
                higher_codes = code_ranks(queries.vectors, copies, self._num_neighbors)
                predicted, best[queries.query_type] = self._predicted_points(
                    needed_lists.ravel(), higher_codes.ravel() / self._share, refine_recall, spec
                )
                points[queries.query_type] = timed(timing_index, queries, self.target.k, predicted)
        return Prediction(trained, points, best, seconds)

    def _train(self, spec: IvfPqSpec) -> TrainedQuantizers:
        if spec not in self._trained:
            if spec.lists not in self._centroids:
                step = max(1, len(self._sample) // (MIN_POINTS_PER_LIST * spec.lists))
                subset = self._sample[::step]
                self._centroids[spec.lists] = find_centroids(subset, spec.lists, self._seed)
            centroids = self._centroids[spec.lists]
            self._trained[spec] = train(self._sample, spec, self._seed, centroids=centroids)
        return self._trained[spec]

    def _predicted_points(
        self,
        list_rank: Rows,
        code_rank: NDArray[np.float64],
        refine_recall: float,
        spec: IvfPqSpec,
    ) -> tuple[list[OperatingPoint], float]:
        """Operating points that reach the target, and the best recall of all.

        Args:
            list_rank: (M,) lists to scan until each neighbor is met.
            code_rank: (M,) number of vectors whose codes score higher than each neighbor.
            refine_recall: recall of exact search by refine vectors.
            spec: the index.
        """
        points: list[OperatingPoint] = []
        factors = K_FACTORS if spec.refine is not None else (1.0,)
        recall = self.target.recall
        for factor in factors:
            # Neighbors among the candidates for re-ranking, by the number of lists they need.
            met = np.sort(list_rank[code_rank < self.target.k * factor])
            if refine_recall * len(met) / len(list_rank) < recall:
                continue
            nprobe = int(met[math.ceil(recall / refine_recall * len(list_rank)) - 1])
            if points and nprobe >= points[-1].nprobe:
                break  # more candidates save no lists any more
            reached = refine_recall * float((met <= nprobe).sum()) / len(list_rank)
            points.append(OperatingPoint(nprobe, factor, round(reached, 5)))
        best = refine_recall * float((code_rank < self.target.k * factors[-1]).mean())
        return points, best


def neighbors_in_sample(
    sample: Vectors, tuning_queries: Sequence[TuningQueries], k: int, count: int
) -> list[TuningQueries]:
    """Tuning queries with their nearest rows of a sample, as many as the codes are compared of.

    Args:
        sample: (S, D) float32, drawn uniformly.
        tuning_queries: the queries.
        k: results of a search.
        count: number of all vectors.
    """
    compared = max(80, round(COMPARED_CODES * k * len(sample) / count))
    return find_neighbors(tuning_queries, iter([sample]), min(len(sample) - 1, compared))


def list_ranks(queries: Vectors, lists: NDArray[np.int32], centroids: Centroids) -> Rows:
    """How many lists a search scans until it meets a vector: (Q, K) int64, at least 1.

    Args:
        queries: (Q, D) float32.
        lists: (Q, K, C) the lists that each of K vectors is in; -1 for none.
        centroids: of the lists.
    """
    ranks = np.empty(lists.shape, np.int64)
    for start in range(0, len(queries), 256):
        block = slice(start, start + 256)
        scores = queries[block] @ centroids.vectors.T  # (B, L)
        for place in np.ndindex(lists.shape[1:]):
            # A list's rank is the number of lists whose centers are nearer to the query.
            own = lists[block, *place][:, None]  # (B, 1)
            own_score = np.take_along_axis(scores, np.maximum(own, 0), axis=1)
            nearer = (scores > own_score).sum(axis=1)
            ranks[block, *place] = np.where(own[:, 0] < 0, len(centroids), nearer) + 1
    return ranks.min(axis=-1)


def code_ranks(queries: Vectors, copies: Sequence[Vectors], num_neighbors: int) -> Rows:
    """How many compared vectors score higher than each neighbor: (Q, num_neighbors) int64.

    Args:
        queries: (Q, D) float32.
        copies: (Q, M, D) float32 compared vectors, decoded from their codes, once for each list
            that they are in; the higher score counts. The first ones are the neighbors.
        num_neighbors: number of neighbors.
    """
    scores = np.max([np.einsum("qd,qmd->qm", queries, vectors) for vectors in copies], axis=0)
    ranks = []
    for place in range(num_neighbors):
        ranks.append((scores > scores[:, place, None]).sum(axis=1))
    return np.stack(ranks, axis=1)


def choose_refine(
    sample: Vectors, tuning_queries: Sequence[TuningQueries], k: int, count: int
) -> str:
    """How refine vectors are stored if no recall is asked for.

    "SQ8", or "SQfp16" where 8 bits lose results.

    Args:
        sample: (S, D) float32, drawn uniformly.
        tuning_queries: queries; the `own` rows of products count in `sample`.
        k: results of a search.
        count: number of all vectors.
    """
    queries = neighbors_in_sample(sample, tuning_queries, k, count)
    num_neighbors = max(1, round(k * len(sample) / count))
    if min(recall_of_8_bits(sample, queries, num_neighbors)) >= MIN_8_BIT_RECALL:
        return "SQ8"
    return "SQfp16"


def recall_of_8_bits(
    sample: Vectors, tuning_queries: Sequence[TuningQueries], num_neighbors: int
) -> list[float]:
    """Recall of exact search by 8-bit vectors, for each query type: a bound for re-ranking by them.

    Args:
        sample: (S, D) float32.
        tuning_queries: queries with their nearest rows of the sample.
        num_neighbors: how many of these rows are the true result.
    """
    quantizer = faiss.IndexScalarQuantizer(
        sample.shape[1], faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    quantizer.train(sample)
    recalls = []
    for queries in tuning_queries:
        # Only the nearest vectors matter: a neighbor is lost if so many decoded ones score higher.
        rows, positions = np.unique(queries.truth[:, : 8 * num_neighbors], return_inverse=True)
        decoded = quantizer.sa_decode(quantizer.sa_encode(sample[rows]))
        near = decoded[positions.reshape(len(queries.truth), -1)]  # (Q, M, D)
        higher = code_ranks(queries.vectors, [near], num_neighbors)
        recalls.append(float((higher < num_neighbors).mean()))
    return recalls


def _decoded(trained: TrainedQuantizers, encoded: EncodedVectors) -> list[Vectors]:
    """(B, D) vectors decoded from their codes, once for each list that they are in."""
    decoded = []
    for codes, lists in zip(encoded.codes, encoded.lists.T, strict=True):
        vectors = trained.index.pq.decode(np.ascontiguousarray(codes))
        if trained.index.by_residual:
            vectors = vectors + trained.centroids.vectors[lists]
        decoded.append(vectors)
    return decoded
