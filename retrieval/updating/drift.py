"""Does an index still suit the products that it holds? It was trained on those of another day.

Products are known as the index keeps them, by its refine vectors; where it keeps none, only the
only the sizes of lists and new products are measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from tritower.retrieval.building.tuning.tuning_queries import without_own
from tritower.retrieval.ivf.clustering import Centroids
from tritower.retrieval.ivf.engine import Engine, Settings
from tritower.retrieval.ivf.ivf_pq import centroids_of
from tritower.retrieval.ranking import metrics
from tritower.retrieval.updating.previous import refine_code_blocks
from tritower.retrieval.vectors.checks import Metric, as_queries
from tritower.terminal.progress import show_progress

SAMPLE = 2000
"""Products whose errors are averaged."""

NUM_QUERIES = 1000
"""Of these, those that are asked."""

MIXERS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)
"""Odd numbers without a pattern."""

K = 10

RECALL_LIMIT = 0.02
ERROR_LIMIT = 1.25
IMBALANCE_LIMIT = 1.5
REFINE_LIMIT = 0.001
GROWTH_LIMIT = 2.0


@dataclass(frozen=True)
class Drift:
    """The state of an index.

    Errors are mean squared distances in shares of the mean squared length of the vectors; None
    where not known.

    Attributes:
        count: products.
        recall: recall@10 of products as queries, with the index's own settings, against exact
            search.
        imbalance: L x sum(size^2) / (sum of sizes)^2 of its lists: 1 where all are equal, and how
            many times longer than that a search takes.
        list_error: distance of products to the center of the nearest list.
        code_error: distance of products to their decoded codes.
        new_list_error: `list_error` of the products that the last update has brought.
        new_code_error: `code_error` of these.
        new_refine_error: their distance to their refine vectors: ranges of these are those of
            products of another day.
        tombstone_share: share of rows that are empty.
    """

    count: int
    recall: float | None
    imbalance: float
    list_error: float | None
    code_error: float | None
    new_list_error: float | None
    new_code_error: float | None
    new_refine_error: float | None
    tombstone_share: float

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Drift:
        """Undo `to_json`."""
        return cls(**data)


def measure_drift(
    engine: Engine,
    settings: Settings,
    alive: NDArray[np.bool_],
    metric: Metric,
    new: NDArray[np.float32] | None = None,
) -> Drift:
    """Measure an index whose lists are mapped.

    Args:
        engine: the index.
        settings: how it is searched.
        alive: (N,) bool, rows that hold a product; at least one.
        metric: what vectors are compared by.
        new: (B, D) vectors of products that the last update has brought, as they were given; None
            for none.
    """
    centroids = centroids_of(engine.ivf)
    recall: float | None = None
    errors = new_errors = EncodingErrors(None, None, None)
    # Without refine vectors, products cannot be compared: only sizes of lists are known.
    if engine.refine is not None:
        rows = _draw_rows(engine, alive)
        recall = _recall(engine, settings, alive, rows[:NUM_QUERIES], metric)
        errors = _encoding_errors(engine, centroids, _vectors(engine, rows))
    if new is not None and len(new):
        new_errors = _encoding_errors(engine, centroids, new)
    return Drift(
        count=int(alive.sum()),
        recall=recall,
        imbalance=imbalance_of(
            np.array([engine.ivf.get_list_size(number) for number in range(engine.ivf.nlist)])
        ),
        list_error=errors.list_error,
        code_error=errors.code_error,
        new_list_error=new_errors.list_error,
        new_code_error=new_errors.code_error,
        new_refine_error=new_errors.refine_error,
        tombstone_share=round(float(1 - alive.mean()), 4),
    )


def imbalance_of(sizes: NDArray[np.int64]) -> float:
    """L x sum(size^2) / (sum of sizes)^2 of (L,) sizes of lists, as FAISS's imbalance factor."""
    shares = sizes / max(sizes.sum(), 1)
    return round(float(len(sizes) * (shares**2).sum()), 3)


def _draw_rows(engine: Engine, alive: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Up to SAMPLE rows that hold a product, drawn by what the vectors are.

    So the same products are queries before and after, wherever their rows are: chance does not look
    like a change.
    """
    rows = np.flatnonzero(alive)
    keys = np.concatenate([_keys(codes) for codes in refine_code_blocks(engine.refine)])[rows]
    drawn: NDArray[np.int64] = rows[np.argsort(keys, kind="stable")[:SAMPLE]]
    return drawn


def _keys(codes: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """(B,) a number without a pattern for each of (B, F) codes; equal ones have equal numbers."""
    words = np.zeros((len(codes), 16), np.uint8)
    words[:, : codes.shape[1]] = codes[:, :16]
    mixed: NDArray[np.uint64] = (words.view(np.uint64) * MIXERS).sum(axis=1, dtype=np.uint64)
    return (mixed ^ (mixed >> np.uint64(29))) * MIXERS[0]


def _recall(
    engine: Engine,
    settings: Settings,
    alive: NDArray[np.bool_],
    rows: NDArray[np.int64],
    metric: Metric,
) -> float:
    """Recall@10 of products by their rows; each is left out of its own results."""
    k = min(K, int(alive.sum()) - 1)
    if k < 1:
        return 1.0
    queries = as_queries(_vectors(engine, rows), metric)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    truth = without_own(_nearest(engine, alive, queries, k + 1), rows)
    found = without_own(engine.search(queries, k + 1, settings)[1], rows)
    return round(metrics.recall_at_k(found, truth, k), 4)


def _nearest(
    engine: Engine, alive: NDArray[np.bool_], queries: NDArray[np.float32], k: int
) -> NDArray[np.int64]:
    """(Q, k) nearest rows that hold a product, by comparing with all of them."""
    best = faiss.ResultHeap(len(queries), k, keep_max=True)
    for rows, vectors in _present_vectors(engine, alive):
        scores, found = faiss.knn(
            queries, vectors, min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT
        )
        best.add_result(scores, rows[found])
    best.finalize()
    nearest: NDArray[np.int64] = best.I
    return nearest


def _present_vectors(
    engine: Engine, alive: NDArray[np.bool_]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """(B,) rows that hold a product and their (B, D) vectors, block by block."""
    first = 0
    for codes in show_progress(
        refine_code_blocks(engine.refine),
        len(alive),
        len,
        "compare products to measure by",
        "vectors",
    ):
        is_present = np.flatnonzero(alive[first : first + len(codes)])
        if len(is_present):
            yield first + is_present, engine.refine.sa_decode(codes[is_present])
        first += len(codes)


class EncodingErrors(NamedTuple):
    """What is lost of products, as of `Drift`."""

    list_error: float | None
    code_error: float | None
    refine_error: float | None


def _encoding_errors(
    engine: Engine, centroids: Centroids, vectors: NDArray[np.float32]
) -> EncodingErrors:
    """What is lost of (B, D) vectors."""
    nearest = faiss.knn(vectors, centroids.vectors, 1, metric=faiss.METRIC_INNER_PRODUCT)[1][:, 0]
    # A vector is approximated by its list's center, by its code, and by its refine vector.
    centers = centroids.vectors[nearest]
    pq = engine.ivf.pq
    origin = centers if engine.ivf.by_residual else np.float32(0)
    coded = pq.decode(pq.compute_codes(vectors - origin)) + origin
    if engine.refine is None:
        refine = None
    else:
        refine = engine.refine.sa_decode(engine.refine.sa_encode(vectors))
    square = float(np.square(vectors).sum(axis=1).mean())

    def error(kept: NDArray[np.float32] | None) -> float | None:
        if kept is None:
            return None
        return round(float(np.square(vectors - kept).sum(axis=1).mean()) / square, 6)

    return EncodingErrors(error(centers), error(coded), error(refine))


def _vectors(engine: Engine, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """(B, D) refine vectors of rows."""
    return np.stack([engine.vector(int(row)) for row in rows])


def recommendation(built: Drift, now: Drift) -> str:
    """Whether to build an index anew, and why, in words.

    Args:
        built: its state when it was built.
        now: its state now.
    """
    # One reason for each limit that is passed.
    # Each limit that is exceeded is a reason; they are in the order of what users notice.
    reasons = []
    if (
        built.recall is not None
        and now.recall is not None
        and built.recall - now.recall > RECALL_LIMIT
    ):
        fall = f"recall@{K} of products fell from {built.recall:.3f} to {now.recall:.3f}"
        reasons.append(f"{fall} (limit: {100 * RECALL_LIMIT:g} points)")
    if now.imbalance > IMBALANCE_LIMIT * built.imbalance:
        rise = f"the imbalance of lists rose from {built.imbalance:.2f} to {now.imbalance:.2f}"
        reasons.append(f"{rise} (limit: {IMBALANCE_LIMIT:g} times)")
    for what, new, usual in (
        ("their lists' centers", now.new_list_error, built.list_error),
        ("what their codes say", now.new_code_error, built.code_error),
    ):
        if new is not None and usual is not None and new > ERROR_LIMIT * max(usual, 1e-4):
            ratio = new / max(usual, 1e-4)
            far = f"new products lie {ratio:.2f} times as far from {what} as those it was built for"
            reasons.append(f"{far} (limit: {ERROR_LIMIT:g})")
    if now.new_refine_error is not None and now.new_refine_error > REFINE_LIMIT:
        limit = f"(limit: {REFINE_LIMIT:.2%})"
        lost = f"vectors to re-rank by lose {now.new_refine_error:.2%} of new products {limit}"
        reasons.append(f"{lost}: their ranges are too narrow for them")
    if now.count > GROWTH_LIMIT * built.count:
        grown = f"it was built for {built.count:,} products and holds {now.count:,}"
        reasons.append(f"{grown} (limit: {GROWTH_LIMIT:g} times): more lists would be faster")
    if reasons:
        return f"build anew: {'; '.join(reasons)}"
    if now.recall is None:
        unknown = "; without vectors to re-rank by, only the sizes of lists can tell"
    else:
        unknown = ""
    return f"no need to build anew{unknown}"
