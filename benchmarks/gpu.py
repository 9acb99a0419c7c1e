"""Building an index with and without a GPU, in one run: seconds, and whether both find the same.

    python -m benchmarks.gpu --json FILE [--n 1000000] [--work DIR]

Both arms run in processes of their own on the same vectors (FAISS's synthetic ones, 256 dimensions,
unit length); the arm without a GPU hides it (CUDA_VISIBLE_DEVICES). The stored index is one for the
CPU in both, and is searched on it. On a machine without a GPU the command says so and ends with
exit code 1.

Keys of FILE:
    data            as of benchmarks.index
    machine         cores, version of FAISS, name of the GPU
    arms            "gpu" and "cpu", each: train_s, build_s, peak_rss_mb, gpu_mb (memory of the GPU
    in use right after
                    the build, None without one), points: nprobe, recall@10, qps
    ratios          build_s and train_s of cpu over gpu
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from rich import box
from rich.table import Table

from benchmarks.command import run
from benchmarks.compare.vectors import VectorSource, prepare
from tritower.artefacts import storage
from tritower.retrieval.building.build import build_index
from tritower.retrieval.evaluating.latency import measure_latency
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.ranking import metrics
from tritower.retrieval.vectors.embeddings import EmbeddingReader
from tritower.terminal import tables

NPROBES = (32, 64, 128, 256)


def gpu(json: Path, n: int = 1_000_000, queries: int = 2000, work: Path | None = None) -> None:
    """Measure builds on a GPU and without one.

    Args:
        json: file of the figures.
        n: number of vectors.
        queries: number of queries.
        work: folder for vectors and indexes (2 GB per million).
    """
    if faiss.get_num_gpus() == 0:
        raise SystemExit("error: faiss sees no GPU here; nothing was measured")
    folder = Path(tempfile.mkdtemp(prefix="gpu-", dir=work))
    try:
        report = measure(n, queries, folder)
    finally:
        shutil.rmtree(folder)
    storage.write_json(json, report)
    show(report)


def measure(n: int, num_queries: int, work: Path) -> dict[str, Any]:
    """Both arms on the same vectors."""
    source = VectorSource(n, queries=2 * num_queries)
    data = alone(prepare, source, work)
    arms = {name: alone(build_and_search, work, name == "gpu") for name in ("gpu", "cpu")}
    return {
        "data": data,
        "machine": {"cores": os.cpu_count(), "faiss": faiss.__version__, "gpu": gpu_says("name")},
        "arms": arms,
        "ratios": {
            name: round(arms["cpu"][name] / max(arms["gpu"][name], 1e-9), 2)
            for name in ("build_s", "train_s")
        },
    }


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def build_and_search(work: Path, gpu: bool) -> dict[str, Any]:
    """Build the default index in this process and search it on the CPU."""
    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before FAISS asks for its devices
    started = time.perf_counter()
    training = build_index(EmbeddingReader(work / "embeddings"), work / "index").meta["training"]
    seconds = time.perf_counter() - started
    if (training["device"] == "gpu") != gpu:
        raise RuntimeError(
            f"expected training on the {'GPU' if gpu else 'CPU'}, was {training['device']}"
        )
    memory = gpu_says("memory.used") if gpu else None
    queries = np.load(work / "queries.npy")
    exact = np.load(work / "exact.npy")
    index = ProductIndex.open(work / "index")
    points = []
    for nprobe in (p for p in NPROBES if p <= (index.engine.lists or 0)):
        rows = index.search(queries, 10, nprobe=nprobe).rows
        qps = measure_latency(index, queries, repeats=len(queries), settings=index.resolve(nprobe))[
            "qps"
        ]
        recall = round(metrics.recall_at_k(rows, exact[:, :10], 10), 4)
        points.append({"nprobe": nprobe, "recall@10": recall, "qps": qps})
    shutil.rmtree(work / "index")
    return {
        "train_s": training["seconds"],
        "build_s": round(seconds, 1),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "gpu_mb": memory,
        "points": points,
    }


def gpu_says(field: str) -> str:
    """What nvidia-smi knows of the first GPU."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    return (
        subprocess.run(command, capture_output=True, text=True, check=True)
        .stdout.splitlines()[0]
        .strip()
    )


def show(report: dict[str, Any]) -> None:
    """Print the figures as one table."""
    table = Table(
        title=f"{report['data']['n']:,} vectors, {report['machine']['gpu']}", box=box.SIMPLE_HEAD
    )
    for name in ("", "train s", "build s", "recall@10 at nprobe", "GPU memory"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for name, arm in report["arms"].items():
        recalls = ", ".join(
            f"{point['nprobe']}: {point['recall@10']:.3f}" for point in arm["points"]
        )
        table.add_row(
            name, f"{arm['train_s']:.1f}", f"{arm['build_s']:.1f}", recalls, arm["gpu_mb"] or ""
        )
    tables.show(table)


if __name__ == "__main__":
    run("benchmarks.gpu", gpu, "Builds on a GPU beside builds without.")
