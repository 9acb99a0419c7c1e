"""One million vectors through the default index, beside exact search on the same vectors in the same run.

    python -m benchmarks.million --json FILE [--n 1000000] [--work DIR]

The vectors are FAISS's synthetic ones (`faiss.contrib.datasets.SyntheticDataset`, 256 dimensions), brought to unit
length; neighbours are nearly tied, which is harder than real products. Building and searching run in processes of their
own, so that memory is theirs alone.

Keys of FILE:
    data      n, dim, queries, seed
    machine   cores, threads, load before the build, versions
    build     factory, reason, seconds (read, train, add, write, verify, publish), cpu_s (the same in CPU time of all
              threads, which a busy machine stretches less), train_s, peak_rss_mb, disk_bytes_per_vector, training
    exact     p50_ms and p99_ms (one query, one thread), qps (a batch, all threads)
    hot_bytes_per_vector   growth of anonymous memory from before opening to after all searches, over n
    points    one per nprobe, the index's own setting marked: recall@1, recall@10, recall@100 against exact search,
              p50_ms, p99_ms, qps
"""

from __future__ import annotations

import logging
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from faiss.contrib.datasets import SyntheticDataset
from jsonargparse import ArgumentParser
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from retrieval import metrics, storage
from retrieval.build import build_index
from retrieval.embeddings import EmbeddingReader, EmbeddingWriter
from retrieval.index import ProductIndex
from retrieval.latency import measure_latency

DIM = 256
SHARD = 100_000
SEED = 1234
DEPTH = 100
TIMED = 2000

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = ArgumentParser(prog="python -m benchmarks.million", description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", type=Path, required=True, help="file of the figures")
    parser.add_argument("--n", type=int, default=1_000_000, help="number of vectors")
    parser.add_argument("--queries", type=int, default=2000, help="number of queries")
    parser.add_argument("--work", type=Path, default=None, help="folder for vectors and index (2 GB per million)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("retrieval", __name__):
        logging.getLogger(name).setLevel(logging.INFO)
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="million-", dir=options.work))
    try:
        report = measure(options.n, options.queries, work)
    finally:
        shutil.rmtree(work)
    storage.write_json(options.json, report)
    show(report)
    return 0


def measure(n: int, num_queries: int, work: Path) -> dict[str, Any]:
    """All figures; vectors and index go to `work`."""
    queries = alone(make_vectors, n, num_queries, work)
    exact = alone(search_exactly, n, queries, work)
    load = os.getloadavg()[0]
    build = alone(build_default, work)
    searched = alone(search_index, queries, exact.pop("rows"), work)
    return {
        "data": {"n": n, "dim": DIM, "queries": num_queries, "seed": SEED},
        "machine": {
            "cores": os.cpu_count(),
            "threads": faiss.omp_get_max_threads(),
            "load": round(load, 2),
            "faiss": faiss.__version__,
            "python": sys.version.split()[0],
        },
        "build": build,
        "exact": exact,
        **searched,
    }


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def make_vectors(n: int, num_queries: int, work: Path) -> NDArray[np.float32]:
    """Write n vectors as embeddings shards and as one float32 file; returns the queries."""
    dataset = SyntheticDataset(DIM, 0, n, num_queries, metric="IP", seed=SEED)
    vectors = dataset.get_database()
    faiss.normalize_L2(vectors)
    np.save(work / "vectors.npy", vectors)
    writer = EmbeddingWriter(work / "embeddings", dim=DIM)
    shards = []
    for start in range(0, n, SHARD):
        shards.append(f"shard-{start // SHARD:05d}")
        rows = vectors[start : start + SHARD]
        writer.write(shards[-1], [f"p{i}" for i in range(start, start + len(rows))], rows)
    writer.finish(shards)
    queries: NDArray[np.float32] = dataset.get_queries()
    faiss.normalize_L2(queries)
    return queries


def search_exactly(n: int, queries: NDArray[np.float32], work: Path) -> dict[str, Any]:
    """The true neighbours, and how long faiss takes to find them by comparing with every vector."""
    index = faiss.IndexFlatIP(DIM)
    index.add(np.load(work / "vectors.npy"))
    started = time.perf_counter()
    rows = index.search(queries, DEPTH)[1]
    seconds = time.perf_counter() - started
    faiss.omp_set_num_threads(1)
    single = []
    for query in queries[: max(20, 20_000_000 // n)][:200]:
        started = time.perf_counter()
        index.search(query[None], 10)
        single.append(time.perf_counter() - started)
    p50, p99 = np.quantile(single, [0.5, 0.99]) * 1000
    return {
        "rows": rows,
        "p50_ms": round(float(p50), 3),
        "p99_ms": round(float(p99), 3),
        "qps": round(len(queries) / seconds, 1),
    }


def build_default(work: Path) -> dict[str, Any]:
    """Build the default index as `index.py build` does."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    started = time.perf_counter()
    reader = EmbeddingReader(work / "embeddings")
    manifest = build_index(reader, work / "index")
    seconds = time.perf_counter() - started
    size = sum(entry.bytes for entry in manifest.files.values())
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "factory": manifest.meta["factory"],
        "reason": manifest.meta["reason"],
        "seconds": round(seconds, 1),
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
        "train_s": manifest.meta["training"].get("seconds", 0.0),
        "training": manifest.meta["training"],
        "peak_rss_mb": round(used.ru_maxrss / 1024),
        "disk_bytes_per_vector": round(size / manifest.meta["count"], 1),
    }


def search_index(queries: NDArray[np.float32], exact: NDArray[np.int64], work: Path) -> dict[str, Any]:
    """Recall, latency and memory of the index at several numbers of probed lists."""
    before = anonymous_bytes()
    index = ProductIndex.open(work / "index")
    own = index.settings.nprobe  # None for an index without lists, where nothing is probed
    for query in np.resize(queries, (TIMED, DIM)):
        index.search(query[None])
    hot = anonymous_bytes() - before
    points = []
    probes = sorted({own, *(p for p in (8, 16, 32, 64, 128, 256) if p <= (index.num_lists or 0))}) if own else [None]
    for nprobe in probes:
        rows = index.search(queries, DEPTH, nprobe=nprobe).rows
        recall = {f"recall@{k}": round(metrics.recall_at_k(rows, exact[:, :k], k), 4) for k in (1, 10, DEPTH)}
        rows = index.search(queries, 10, nprobe=nprobe).rows  # what is timed; re-ranking depends on k
        recall["recall@10"] = round(metrics.recall_at_k(rows, exact[:, :10], 10), 4)
        latency = measure_latency(index, queries, repeats=TIMED, settings=index.resolve(nprobe))
        points.append({"nprobe": nprobe, "default": nprobe == own, **recall, **latency})
    return {"hot_bytes_per_vector": round(hot / len(index), 1), "points": points}


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def show(report: dict[str, Any]) -> None:
    """Print the figures as one table."""
    build, exact = report["build"], report["exact"]
    title = f"{report['data']['n']:,} vectors of {DIM} dimensions, {build['factory']}"
    caption = (
        f"built in {build['seconds']:.0f} s (training {build['train_s']:.0f} s), peak {build['peak_rss_mb']:,} MB; "
        f"{build['disk_bytes_per_vector']:.0f} bytes a vector on disk, {report['hot_bytes_per_vector']:.0f} hot; "
        f"load {report['machine']['load']}"
    )
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD)
    for name in ("index", "recall@1", "recall@10", "recall@100", "p50 ms", "p99 ms", "queries/s"):
        table.add_column(name, justify="left" if name == "index" else "right", no_wrap=True)
    table.add_row("exact", "1", "1", "1", f"{exact['p50_ms']:.2f}", f"{exact['p99_ms']:.2f}", f"{exact['qps']:,.0f}")
    for point in report["points"]:
        recalls = [f"{point[f'recall@{k}']:.3f}" for k in (1, 10, DEPTH)]
        name = f"nprobe {point['nprobe'] or '-'}{' (default)' if point['default'] else ''}"
        table.add_row(name, *recalls, f"{point['p50_ms']:.2f}", f"{point['p99_ms']:.2f}", f"{point['qps']:,.0f}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)


if __name__ == "__main__":
    sys.exit(main())
