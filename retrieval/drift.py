"""Does an index still suit the products that it holds? Three figures, before and after an update."""

from __future__ import annotations

from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

from retrieval import metrics
from retrieval.engine import Engine, Settings
from retrieval.mapped import centroids_of
from retrieval.probes import without_own

PROBES = 200
SAMPLE = 2000
K = 10

RECALL_LIMIT = 0.02
ERROR_LIMIT = 1.25
IMBALANCE_LIMIT = 1.5
GROWTH_LIMIT = 2.0


@dataclass(frozen=True)
class Drift:
    """The state of an index.

    Attributes:
        recall: recall@10 of products asked with the index's settings, against exact search over its finer vectors.
        imbalance: L x sum(size^2) / (sum of sizes)^2 of its lists: 1 where all are equal, and how many times longer
            than that a search takes.
        error: mean squared distance of products to the centre of their nearest list.
        new_error: the same of products that the last update has brought; None where there are none.
        dead: share of rows that are empty.
    """

    recall: float
    imbalance: float
    error: float
    new_error: float | None
    dead: float


def gauge(
    engine: Engine,
    settings: Settings,
    alive: NDArray[np.bool_],
    fresh: NDArray[np.bool_],
    sizes: NDArray[np.int64],
    seed: int = 0,
) -> Drift:
    """Measure an index whose lists are mapped.

    Args:
        engine: the index.
        settings: how it is searched.
        alive: (N,) bool, rows that hold a product.
        fresh: (N,) bool, rows that the last update has brought.
        sizes: (L,) sizes of the lists.
        seed: of the products that are asked.
    """
    generator = np.random.default_rng(seed)
    centroids = centroids_of(engine.ivf).vectors

    def error(rows: NDArray[np.int64]) -> float:
        vectors = _vectors(engine, generator.permutation(rows)[:SAMPLE])
        scores = faiss.knn(vectors, centroids, 1, metric=faiss.METRIC_INNER_PRODUCT)[0][:, 0]
        return round(float((np.einsum("ij,ij->i", vectors, vectors) + 1 - 2 * scores).mean()), 5)

    total = sizes.sum()
    return Drift(
        recall=round(_recall(engine, settings, alive, generator), 4),
        imbalance=round(float(len(sizes) * (sizes.astype(float) ** 2).sum() / max(total, 1) ** 2), 3),
        error=error(np.flatnonzero(alive)),
        new_error=error(np.flatnonzero(fresh & alive)) if (fresh & alive).any() else None,
        dead=round(float(1 - alive.mean()), 4),
    )


def _recall(engine: Engine, settings: Settings, alive: NDArray[np.bool_], generator: np.random.Generator) -> float:
    rows = generator.permutation(np.flatnonzero(alive))[:PROBES]
    k = min(K, int(alive.sum()) - 1)
    if k < 1:
        return 1.0
    queries = _vectors(engine, rows)
    bits = np.packbits(alive, bitorder="little")
    selector = faiss.IDSelectorBitmap(bits)
    parameters = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
    truth = without_own(engine.fine.search(queries, k + 1, params=parameters)[1], rows)
    found = without_own(engine.search(queries, k + 1, settings)[1], rows)
    return metrics.recall_at_k(found, truth, k)


def _vectors(engine: Engine, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """(B, D) finer vectors of rows, of unit length."""
    vectors = np.stack([engine.vector(int(row)) for row in rows])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def verdict(built: Drift, now: Drift, count: int, built_count: int) -> str:
    """Whether to build the index anew, and why, in words."""
    reasons = []
    if built.recall - now.recall > RECALL_LIMIT:
        fall = f"recall@{K} of products asked fell from {built.recall:.3f} to {now.recall:.3f}"
        reasons.append(f"{fall} (limit: {100 * RECALL_LIMIT:g} points)")
    if now.imbalance > IMBALANCE_LIMIT * built.imbalance:
        reasons.append(
            f"imbalance rose from {built.imbalance:.2f} to {now.imbalance:.2f} (limit: {IMBALANCE_LIMIT:g} times)"
        )
    if now.new_error is not None and now.new_error > ERROR_LIMIT * built.error:
        reasons.append(
            f"new products lie {now.new_error / built.error:.2f} times as far from their lists' centres as those it "
            f"was trained on (limit: {ERROR_LIMIT:g})"
        )
    if count > GROWTH_LIMIT * built_count:
        reasons.append(f"it was built for {built_count:,} products and holds {count:,}: more lists would be faster")
    return f"build anew: {'; '.join(reasons)}" if reasons else "no need to build anew"
