"""The arms of the comparison that are this project's own.

As benchmarks/compare/peers.py, in a process of its own too.

python -m benchmarks.compare.ours TASK.json
"""

from __future__ import annotations

import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import faiss
import numpy as np

from benchmarks.compare.extras import measure_filters, measure_updates
from benchmarks.compare.peers import (
    K_FACTORS,
    NUM_QUERIES,
    Arm,
    OperatingPoint,
    Rows,
    Stages,
    Task,
    VectorFile,
    Vectors,
    installed,
    load_faiss,
    main,
)
from tritower.retrieval.building import faiss_index, ivf_pq_index, resources
from tritower.retrieval.building.build import build_index
from tritower.retrieval.building.choose_spec import choose_factory, default_nprobe, num_lists
from tritower.retrieval.building.options import BuildOptions
from tritower.retrieval.building.workspace import BLOCK_ROWS, Workspace
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.ivf.encoded import GROUPING_BYTES
from tritower.retrieval.ivf.operating_points import Target
from tritower.retrieval.ivf.spec import parse_ivf_pq
from tritower.retrieval.vectors.embeddings import EmbeddingReader

COLD = (0.95, 0.99)
"""Recall whose points are searched again with an empty page cache."""

TRAIN_ADD = ("sample", "train", "encode", "lists")
"""Stages that other libraries call train and add."""


class Ours(Arm):
    """An index of this project.

    Args:
        options: how it is built.
        target: what it is built for, chosen by the tuning queries; None for the recipe as it is.
    """

    def __init__(self, options: BuildOptions, target: Target | None = None) -> None:
        self._recipe = options
        self._target = target
        self.packages = tuple(name for name in ("faiss-gpu", "faiss-cpu") if installed(name))

    def load(self) -> None:
        """See `Arm`."""
        load_faiss()

    def build(self, vectors: VectorFile, folder: Path, task: Task) -> dict[str, Any]:
        """See `Arm`; the vectors come from the embeddings folder that holds the same ones."""
        faiss.omp_set_num_threads(task.threads)
        reader = EmbeddingReader(task.data / "embeddings")
        if self._target is None:
            queries = None
        else:
            queries = EmbeddingReader(task.data / "tuning")
        options = self._recipe
        if self._target is None and choose_factory(reader.count, reader.dim).factory == "Flat":
            options = replace(
                options, nprobe=default_nprobe(num_lists(reader.count))
            )  # exact search is an arm of its own
        started = time.perf_counter()
        with stages_of_build() as stages:
            manifest = build_index(
                reader, folder / "index", options, target=self._target, queries=queries
            )
        stages["publish"] = (
            time.perf_counter() - started - sum(stages.values())
        )  # files, digests, reading back
        spec = parse_ivf_pq(manifest.meta["factory"])
        told: dict[str, Any] = {}
        if spec is not None:
            spill = manifest.meta["spill"]
            need = resources.predict(
                reader.count,
                reader.dim,
                spec,
                spill=spill,
                block=BLOCK_ROWS,
                grouping=GROUPING_BYTES,
            )
            told = {"predicted": asdict(need)}
        return {
            "settings": f"{manifest.meta['factory']}{', spill' if manifest.meta['spill'] else ''}",
            "reason": manifest.meta["reason"],
            "candidates": manifest.meta.get("candidates"),
            "training": manifest.meta["training"],
            "train_add_s": round(sum(stages.get(name, 0.0) for name in TRAIN_ADD), 2),
            "seconds": stages,
            **told,
        }

    def open(self, folder: Path, task: Task) -> None:
        """See `Arm`."""
        self.index = ProductIndex.open(folder / "index")
        self.lists = self.index.engine.lists
        self.pinned = len(self._tuned())

    def _tuned(self) -> list[OperatingPoint]:
        """The points that the build measured, for the query type that it was asked to suit."""
        if self.index.tuning is None or self._target is None:
            return []
        points = self.index.tuning.points
        front = points.get("query") or next(iter(points.values()))
        return [{"nprobe": point.nprobe, "k_factor": point.k_factor} for point in front]

    def grid(self) -> Sequence[Sequence[OperatingPoint]]:
        """See `Arm`. Operating points of a tuned index, else nprobe times candidates."""
        if tuned := self._tuned():
            return [[point] for point in tuned]
        if self.lists is None:
            return [[{}]]
        tuning_queries = [p for p in NUM_QUERIES if p < self.lists] + [self.lists]
        if self.index.engine.refine is None:
            return [[{"nprobe": p}] for p in tuning_queries]
        return [[{"nprobe": p, "k_factor": f} for f in K_FACTORS] for p in tuning_queries]

    def usual(self) -> OperatingPoint:
        """See `Arm`."""
        result = {}
        for name, value in self.index.settings._asdict().items():
            if self.lists is not None:
                result[name] = value
        return result

    def threads(self, count: int) -> None:
        """See `Arm`."""
        faiss.omp_set_num_threads(count)

    def search(self, queries: Vectors, k: int, point: OperatingPoint) -> Rows:
        """See `Arm`."""
        settings = self.index.resolve(point.get("nprobe"), point.get("k_factor"))
        return self.index.search(queries, k, settings=settings).rows

    def extra(self) -> dict[str, Any]:
        """What the index is searched with by default, and how many queries that rests on."""
        if self.index.tuning is None:
            return {}
        return {
            "tuned_for": self.index.settings._asdict(),
            "tuned_by": dict(self.index.tuning.queries),
        }


@contextmanager
def stages_of_build() -> Iterator[Stages]:
    """The seconds of the stages of `build_index` while the block runs.

    A stage within a stage is part of that one.
    """
    stages = Stages()
    within: list[str] = []

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            if within:
                return function(*arguments, **named)
            within.append(stage)
            try:
                with stages.timed(stage):
                    return function(*arguments, **named)
            finally:
                within.pop()

        return call

    places: list[tuple[Any, str, str]] = [
        (faiss_index, "uniform_sample", "sample"),
        (ivf_pq_index, "read_rows", "sample"),
        (ivf_pq_index, "find_centroids", "train"),
        (ivf_pq_index, "Predictor", "choose"),
        (ivf_pq_index, "choose", "choose"),
        (ivf_pq_index, "train", "train"),
        (faiss_index, "_train", "train"),
        (faiss_index, "tuned_settings", "measure"),
        (ivf_pq_index, "tuned_settings", "measure"),
        (ivf_pq_index, "write_ivf_pq", "lists"),
        (Workspace, "encode", "encode"),
        (EmbeddingReader, "check_unique", "ids"),
    ]
    with ExitStack() as patches:
        for owner, name, stage in places:
            patches.enter_context(
                mock.patch.object(owner, name, timed(stage, getattr(owner, name)))
            )
        yield stages


def search_cold(task: Task) -> dict[str, Any]:
    """Latency of single queries that start with none of the index's files in the page cache.

    Pages are dropped after opening, which reads files to verify them, and before anything of the
    mapped parts is touched: pages that a process has touched would stay.
    """
    assert task.options is not None
    queries = np.load(task.data / "queries.npy")
    arm = ARMS[task.arm]()
    arm.open(task.folder, task)
    arm.threads(1)
    for file in (task.folder / "index").rglob("*"):
        if file.is_file():
            drop(file)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    seconds = []
    for row in np.resize(np.arange(len(queries)), task.singles):
        started = time.perf_counter()
        arm.search(queries[row : row + 1], task.k, task.options["settings"])
        seconds.append(time.perf_counter() - started)
    first, p50, p99 = seconds[0] * 1000, *(np.quantile(seconds, [0.5, 0.99]) * 1000)
    return {
        "cold_first_ms": round(first, 4),
        "cold_p50_ms": round(float(p50), 4),
        "cold_p99_ms": round(float(p99), 4),
        "cold_faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults,
    }


def drop(file: Path) -> None:
    """Take a file out of the page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def extras(task: Task) -> dict[str, Any]:
    """Filters and updates on the index of the default recipe."""
    index = ProductIndex.open(task.folder / "index")
    faiss.omp_set_num_threads(1)
    return {
        "filters": measure_filters(index, task.data, task.k),
        "updates": measure_updates(index, task.data, task.folder.parent),
    }


ARMS: dict[str, Callable[[], Arm]] = {
    "ours": lambda: Ours(BuildOptions()),
    "ours-spill": lambda: Ours(BuildOptions(spill=True)),
    "ours-target": lambda: Ours(BuildOptions(), Target(0.95)),
}
STAGES = {"cold": search_cold, "extras": extras}


def run(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    task = Task.read(Path(arguments[0]))
    if task.stage in STAGES:
        task.output.write_text(json.dumps(STAGES[task.stage](task)), encoding="utf-8")
        return 0
    return main(arguments, ARMS)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
