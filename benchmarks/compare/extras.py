"""What else our index does.

Searches among some rows, and updates; on the index of the default recipe.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from tritower.retrieval.filtering.selection import SelectiveSearch
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.ranking import metrics
from tritower.retrieval.updating.update import update_index
from tritower.retrieval.vectors.embeddings import EmbeddingReader, EmbeddingWriter

SELECTIVITIES = (0.0001, 0.001, 0.01, 0.1, 0.5)
ASKED = 500
CHANGED = 0.01
"""Share of the products that an update adds, changes and takes out, each."""

Vectors = NDArray[np.float32]


def measure_filters(index: ProductIndex, data: Path, k: int) -> list[dict[str, Any]]:
    """Recall@k and latency of searches among some rows, beside searches among all.

    One thread, batch of one.

    Rows are drawn at random ("random"), or are those nearest to a direction ("near one direction":
    a filter that has to do with the vectors; most queries are far from all of them). The truth is
    exact search over the rows that pass. The selection is made once and then kept, as a repeated
    filter is; `first_ms` is what making it takes.

    Returns:
        For each filter and selectivity: rows, recall, p50_ms, p99_ms, first_ms, and ratio to the
          unfiltered p50.
    """
    vectors = np.load(data / "vectors.npy", mmap_mode="r")
    queries = np.load(data / "queries.npy")[:ASKED]
    settings = index.settings
    unfiltered = _latency(lambda query: index.engine.search(query, k, settings), queries)
    selective = SelectiveSearch(index.engine)
    generator = np.random.default_rng(0)
    direction = np.asarray(vectors[generator.integers(len(vectors))])
    closeness = np.concatenate(
        [part @ direction for part in np.array_split(vectors, max(1, len(vectors) // 100_000))]
    )
    report = []
    for filter_name, order in (
        ("random", generator.permutation(len(vectors))),
        ("near one direction", np.argsort(-closeness)),
    ):
        for share in SELECTIVITIES:
            mask = np.zeros(len(vectors), bool)
            mask[order[: max(k, round(share * len(vectors)))]] = True
            started = time.perf_counter()
            selection = selective.select(mask)
            selective.search(queries[:1], k, settings, selection)
            first = time.perf_counter() - started
            p50, p99 = _latency(
                lambda query, of=selection: selective.search(query, k, settings, of), queries
            )
            rows = np.flatnonzero(mask)
            found = selective.search(queries, k, settings, selection)[1]
            report.append(
                {
                    "filter": filter_name,
                    "share": share,
                    "rows": len(rows),
                    "recall": round(
                        metrics.recall_at_k(found, _truth(vectors, rows, queries, k), k), 4
                    ),
                    "p50_ms": round(p50, 4),
                    "p99_ms": round(p99, 4),
                    "first_ms": round(first * 1000, 1),
                    "ratio": round(p50 / unfiltered[0], 2),
                }
            )
    return report


def measure_updates(index: ProductIndex, data: Path, work: Path) -> dict[str, Any]:
    """Seconds of an update that adds, changes and deletes 1 % of the products, and of its drift."""
    root = work / "updated"
    count = max(1, round(CHANGED * len(index)))
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(index.path, root)
    vectors = np.load(data / "vectors.npy", mmap_mode="r")
    ids = index.ids(np.arange(2 * count)).tolist()
    fresh = np.array(vectors[-2 * count :]) + 0.05 * np.random.default_rng(0).standard_normal(
        (2 * count, index.dim)
    )
    rows = (fresh / np.linalg.norm(fresh, axis=1, keepdims=True)).astype(np.float32)
    shutil.rmtree(work / "upsert", ignore_errors=True)
    writer = EmbeddingWriter(work / "upsert", dim=index.dim)
    writer.write("shard-0", [*ids[:count], *(f"new {i}" for i in range(count))], rows)
    writer.finish(["shard-0"])
    started = time.perf_counter()
    report = update_index(root, upsert=EmbeddingReader(work / "upsert"), delete=ids[count:])
    seconds = time.perf_counter() - started
    shutil.rmtree(root)
    shutil.rmtree(work / "upsert")
    return {
        "seconds": round(seconds, 1),
        "added": report.added,
        "changed": report.replaced,
        "deleted": report.deleted,
        "recall_before": report.before and report.before.recall,
        "recall_after": report.after and report.after.recall,
        "recommendation": report.recommendation,
    }


def _latency(search: Any, queries: Vectors) -> tuple[float, float]:
    """p50 and p99 in ms of single queries."""
    seconds = []
    for query in (*queries[:50], *queries):
        started = time.perf_counter()
        search(query[None])
        seconds.append(time.perf_counter() - started)
    p50, p99 = np.quantile(seconds[50:], [0.5, 0.99]) * 1000
    return float(p50), float(p99)


def _truth(
    vectors: Vectors, rows: NDArray[np.int64], queries: Vectors, k: int
) -> NDArray[np.int64]:
    """(Q, k) nearest of some rows, by comparing with each."""
    best = faiss.ResultHeap(len(queries), k, keep_max=True)
    for part in np.array_split(rows, max(1, len(rows) // 100_000)):
        scores, places = faiss.knn(
            queries, np.asarray(vectors[part]), min(k, len(part)), metric=faiss.METRIC_INNER_PRODUCT
        )
        best.add_result(scores, part[places])
    best.finalize()
    truth: NDArray[np.int64] = best.I
    return truth
