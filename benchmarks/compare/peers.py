"""One arm of the comparison: build an index over a file of vectors, or open one and measure it.

    python -I benchmarks/compare/peers.py TASK.json

This script stands alone: it needs NumPy and the library that it measures, nothing of this project,
so that each library runs in an environment of its own. TASK.json says what to do (`Task`); the
answer is written to the file named there. Building and searching are two runs, so that the memory
of one is not counted for the other. Linux only: memory is read from /proc.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

VERSION = 2
"""Of what is measured and how; results of another version are measured anew."""

MIN_RECALL_GAIN = 0.997
"""Recall after which nothing more demanding is tried."""

SLOW_ENOUGH = 0.85
"""Single queries are timed for points of at least this recall, or for the best one."""

FLAT = 0.0005
"""The next step of a parameter must gain this much recall, or no further one is tried."""

NUM_QUERIES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
EFS = (10, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
K_FACTORS = (2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
PER_CENTROID = 64
"""Training vectors per list, and per value of an 8-bit code, for FAISS's own arms.

Its default, 256, takes longer.
"""

BLOCK = 100_000
Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]
OperatingPoint = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What one run does.

    Attributes:
        arm: a name in `ARMS`.
        stage: "build" or "search".
        data: the folder with vectors.npy, queries.npy and exact.npy.
        folder: where the index is or will be.
        output: file of the answer.
        threads: of the build and of batches.
        k: results per query.
        singles: timed queries of batch 1.
        budget_s: seconds that the timing of one point may take for batches, and again for single
            queries.
        options: more, for an arm that knows what.
    """

    arm: str
    stage: str
    data: Path
    folder: Path
    output: Path
    threads: int
    k: int = 10
    singles: int = 1000
    budget_s: float = 10.0
    options: dict[str, Any] | None = None

    @classmethod
    def read(cls, file: Path) -> Task:
        """From a JSON file."""
        said = json.loads(file.read_text(encoding="utf-8"))
        return cls(**said | {name: Path(said[name]) for name in ("data", "folder", "output")})

    def to_json(self) -> dict[str, Any]:
        """What `read` reads."""
        return {name: str(v) if isinstance(v, Path) else v for name, v in vars(self).items()}


class VectorFile:
    """A .npy file of (N, D) float32, read in parts.

    Mapped pages would count as memory of the build.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        mapped = np.load(file, mmap_mode="r")
        self.count, self.dim = mapped.shape
        self._offset = mapped.offset
        if mapped.dtype != np.float32 or not mapped.flags.c_contiguous:
            raise ValueError(f"{file}: {mapped.dtype}, expected float32 in C order")

    def rows(self, start: int, stop: int) -> Vectors:
        """(stop - start, D) vectors."""
        count = (min(stop, self.count) - start) * self.dim
        read = np.fromfile(
            self._file, np.float32, count, offset=self._offset + start * self.dim * 4
        )
        return read.reshape(-1, self.dim)

    def all(self) -> Vectors:
        """All of them."""
        return self.rows(0, self.count)

    def mapped(self) -> Vectors:
        """All of them as a map of the file.

        Whoever adds block by block to a growing array needs twice its memory.
        """
        return np.load(self._file, mmap_mode="r")

    def blocks(self) -> Iterator[tuple[int, Vectors]]:
        """(first row, block) of all vectors."""
        for start in range(0, self.count, BLOCK):
            yield start, self.rows(start, start + BLOCK)

    def sample(self, size: int, seed: int = 0) -> Vectors:
        """A uniform sample of min(size, N) vectors."""
        if size >= self.count:
            return self.all()
        chosen = np.sort(np.random.default_rng(seed).permutation(self.count)[:size])
        parts = []
        for s, block in self.blocks():
            parts.append(block[chosen[(chosen >= s) & (chosen < s + len(block))] - s])
        return np.concatenate(parts)


class Arm:
    """An index library. Subclasses say how to build, open and search; `measure` does the rest.

    Attributes:
        packages: distributions whose versions matter.
        lists: number of lists where there are any, for the share of them that is probed.
        pinned: so many settings at the head of the grid are an arm's own choice: they do not end
            the sweep.
    """

    packages: tuple[str, ...] = ()
    lists: int | None = None
    pinned: int = 0

    def load(self) -> None:
        """Import the library and have it search a little: its own memory is not the index's."""
        importlib.import_module(self.packages[0])

    def build(self, vectors: VectorFile, folder: Path, task: Task) -> dict[str, Any]:
        """Build and write to the folder.

        Returns `settings` (how, in words) and `seconds` (stage -> seconds).
        """
        raise NotImplementedError

    def open(self, folder: Path, task: Task) -> None:
        """Open what was built, for searching."""
        raise NotImplementedError

    def grid(self) -> Sequence[Sequence[OperatingPoint]]:
        """Search settings to try.

        From cheap to expensive by the main parameter, and within that by the other one.
        """
        raise NotImplementedError

    def usual(self) -> OperatingPoint:
        """Search settings for the measurement of memory."""
        grid = self.grid()
        middle = grid[len(grid) // 2]
        return middle[len(middle) // 2]

    def threads(self, count: int) -> None:
        """Search with so many threads from now on."""
        raise NotImplementedError

    def search(self, queries: Vectors, k: int, point: OperatingPoint) -> Rows:
        """(Q, k) rows."""
        raise NotImplementedError

    def extra(self) -> dict[str, Any]:
        """More for the answer of a search."""
        return {}


class Stages(dict[str, float]):
    """Stage -> seconds: `with stages.timed("train"): ...`."""

    def timed(self, name: str) -> Any:
        """Add the time of a block."""
        return _Stage(self, name)


class _Stage:
    def __init__(self, stages: Stages, name: str) -> None:
        self._stages = stages
        self._name = name

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._stages[self._name] = (
            self._stages.get(self._name, 0.0) + time.perf_counter() - self._started
        )


class FaissArm(Arm):
    """An index of FAISS by factory string.

    Args:
        factory: (N, D) -> the string.
    """

    def __init__(self, factory: Callable[[int, int], str]) -> None:
        self._factory = factory
        self.packages = (
            next((name for name in ("faiss-gpu", "faiss-cpu") if installed(name)), "faiss-cpu"),
        )

    def load(self) -> None:
        """See `Arm`."""
        load_faiss()

    def build(self, vectors: VectorFile, folder: Path, task: Task) -> dict[str, Any]:
        """See `Arm`."""
        import faiss

        faiss.omp_set_num_threads(task.threads)
        factory = self._factory(vectors.count, vectors.dim)
        index = faiss.index_factory(vectors.dim, factory, faiss.METRIC_INNER_PRODUCT)
        stages = Stages()
        said = factory
        if not index.is_trained:
            size = min(
                vectors.count, max(65_536, PER_CENTROID * int(_number(factory, r"IVF(\d+)")))
            )
            said = f"{factory}, trained on {size:,}"
            if isinstance(index, faiss.IndexIVFPQ):
                index.pq.cp.max_points_per_centroid = PER_CENTROID
            with stages.timed("train"):
                index.train(vectors.sample(size))
        with stages.timed("add"):
            if factory.startswith("HNSW"):
                index.add(vectors.mapped())
            else:
                for _, block in vectors.blocks():
                    index.add(block)
        with stages.timed("write"):
            faiss.write_index(index, str(folder / "index.faiss"))
        return {"settings": said, "seconds": stages}

    def open(self, folder: Path, task: Task) -> None:
        """See `Arm`."""
        import faiss

        self._use(faiss.read_index(str(folder / "index.faiss")))

    def _use(self, index: Any) -> None:
        import faiss

        self._index = index
        self._refine = isinstance(index, faiss.IndexRefine)
        ivf = faiss.try_extract_index_ivf(index)
        self._ivf = None if ivf is None else faiss.downcast_index(ivf)
        self.lists = None if ivf is None else int(ivf.nlist)

    def grid(self) -> Sequence[Sequence[OperatingPoint]]:
        """See `Arm`."""
        if self.lists is not None:
            tuning_queries = [p for p in NUM_QUERIES if p < self.lists] + [self.lists]
            return [
                [{"nprobe": p, "k_factor": f} for f in K_FACTORS]
                if self._refine
                else [{"nprobe": p}]
                for p in tuning_queries
            ]
        if hasattr(self._index, "hnsw"):
            return [[{"efSearch": ef}] for ef in EFS]
        return [[{}]]

    def threads(self, count: int) -> None:
        """See `Arm`."""
        import faiss

        faiss.omp_set_num_threads(count)

    def search(self, queries: Vectors, k: int, point: OperatingPoint) -> Rows:
        """See `Arm`."""
        if "nprobe" in point:
            self._ivf.nprobe = point["nprobe"]
        if "k_factor" in point:
            self._index.k_factor = point["k_factor"]
        if "efSearch" in point:
            self._index.hnsw.efSearch = point["efSearch"]
        rows: Rows = self._index.search(queries, k)[1]
        return rows


class Exact(FaissArm):
    """Comparing with every vector; nothing is stored but the vectors themselves."""

    def __init__(self) -> None:
        super().__init__(lambda n, d: "Flat")

    def build(self, vectors: VectorFile, folder: Path, task: Task) -> dict[str, Any]:
        """See `Arm`."""
        return {
            "settings": "IndexFlatIP",
            "seconds": {},
            "disk_bytes": (task.data / "vectors.npy").stat().st_size,
        }

    def open(self, folder: Path, task: Task) -> None:
        """See `Arm`."""
        import faiss

        vectors = VectorFile(task.data / "vectors.npy")
        index = faiss.IndexFlatIP(vectors.dim)
        index.add(vectors.mapped())
        self._use(index)


class AutoFaiss(FaissArm):
    """What autofaiss chooses.

    It is told the metric, the memory of the machine and the threads, nothing else.
    """

    def __init__(self) -> None:
        super().__init__(lambda n, d: "")
        self.pinned = 1
        self.packages = ("autofaiss", "faiss-cpu", "numpy")

    def build(self, vectors: VectorFile, folder: Path, task: Task) -> dict[str, Any]:
        """See `Arm`."""
        autofaiss = importlib.import_module("autofaiss")
        source = folder / "input"
        source.mkdir()
        (source / "vectors.npy").symlink_to((task.data / "vectors.npy").resolve())
        free = f"{memory_available() >> 20}M"
        stages = Stages()
        with stages.timed("build"):
            autofaiss.build_index(
                str(source),
                index_path=str(folder / "index.faiss"),
                index_infos_path=str(folder / "infos.json"),
                metric_type="ip",
                current_memory_available=free,
                max_index_memory_usage=free if memory_available() < 16 << 30 else "16G",
                nb_cores=task.threads,
                verbose=30,
            )
        (source / "vectors.npy").unlink()
        infos = json.loads((folder / "infos.json").read_text(encoding="utf-8"))
        return {"settings": f"{infos['index_key']}; {infos['index_param']}", "seconds": stages}

    def open(self, folder: Path, task: Task) -> None:
        """See `Arm`."""
        super().open(folder, task)
        infos = json.loads((folder / "infos.json").read_text(encoding="utf-8"))
        self._chosen: str = infos["index_param"]

    def grid(self) -> Sequence[Sequence[OperatingPoint]]:
        """Its own choice first, then the same with other numbers of probes."""
        if "nprobe=" in self._chosen:
            name = "nprobe"
            values = NUM_QUERIES
        else:
            name = "efSearch"
            values = EFS
        others = [re.sub(rf"\b{name}=\d+", f"{name}={value}", self._chosen) for value in values]
        return [[{"parameters": text}] for text in dict.fromkeys([self._chosen, *others])]

    def usual(self) -> OperatingPoint:
        """See `Arm`."""
        return {"parameters": self._chosen}

    def search(self, queries: Vectors, k: int, point: OperatingPoint) -> Rows:
        """See `Arm`."""
        import faiss

        if point["parameters"] != getattr(self, "_set", None):
            faiss.ParameterSpace().set_index_parameters(self._index, point["parameters"])
            self._set = point["parameters"]
        rows: Rows = self._index.search(queries, k)[1]
        return rows


class HnswLib(Arm):
    """Defaults of hnswlib."""

    packages = ("hnswlib",)

    def build(self, vectors: VectorFile, folder: Path, task: Task) -> dict[str, Any]:
        """See `Arm`."""
        index = importlib.import_module("hnswlib").Index(space="ip", dim=vectors.dim)
        index.init_index(max_elements=vectors.count)
        stages = Stages()
        with stages.timed("add"):
            for first, block in vectors.blocks():
                index.add_items(
                    block, np.arange(first, first + len(block)), num_threads=task.threads
                )
        with stages.timed("write"):
            index.save_index(str(folder / "index.bin"))
        return {
            "settings": f"M {index.M}, ef_construction {index.ef_construction}",
            "seconds": stages,
        }

    def open(self, folder: Path, task: Task) -> None:
        """See `Arm`."""
        dim = VectorFile(task.data / "vectors.npy").dim
        self._index = importlib.import_module("hnswlib").Index(space="ip", dim=dim)
        self._index.load_index(str(folder / "index.bin"))

    def grid(self) -> Sequence[Sequence[OperatingPoint]]:
        """See `Arm`."""
        return [[{"ef": ef}] for ef in EFS]

    def threads(self, count: int) -> None:
        """See `Arm`."""
        self._threads = count

    def search(self, queries: Vectors, k: int, point: OperatingPoint) -> Rows:
        """See `Arm`."""
        self._index.set_ef(point["ef"])
        return self._index.knn_query(queries, k, num_threads=self._threads)[0].astype(np.int64)


class USearch(Arm):
    """Defaults of usearch, with float32 as the others."""

    packages = ("usearch",)

    def build(self, vectors: VectorFile, folder: Path, task: Task) -> dict[str, Any]:
        """See `Arm`."""
        index = importlib.import_module("usearch.index").Index(
            ndim=vectors.dim, metric="ip", dtype="f32"
        )
        stages = Stages()
        with stages.timed("add"):
            for first, block in vectors.blocks():
                index.add(np.arange(first, first + len(block)), block, threads=task.threads)
        with stages.timed("write"):
            index.save(str(folder / "index.usearch"))
        return {
            "settings": f"connectivity {index.connectivity}, "
            f"expansion_add {index.expansion_add}, f32",
            "seconds": stages,
        }

    def open(self, folder: Path, task: Task) -> None:
        """See `Arm`."""
        self._index = importlib.import_module("usearch.index").Index.restore(
            str(folder / "index.usearch")
        )

    def grid(self) -> Sequence[Sequence[OperatingPoint]]:
        """See `Arm`."""
        return [[{"expansion": ef}] for ef in EFS]

    def threads(self, count: int) -> None:
        """See `Arm`."""
        self._threads = count

    def search(self, queries: Vectors, k: int, point: OperatingPoint) -> Rows:
        """See `Arm`."""
        self._index.expansion_search = point["expansion"]
        keys = self._index.search(queries, k, threads=self._threads).keys
        return np.asarray(keys).astype(np.int64).reshape(len(queries), -1)


class ScaNN(Arm):
    """ScaNN as its documentation advises.

    A tree of about 2 sqrt(N) leaves, anisotropic codes, re-ranking.
    """

    packages = ("scann",)

    def build(self, vectors: VectorFile, folder: Path, task: Task) -> dict[str, Any]:
        """See `Arm`."""
        pybind = importlib.import_module("scann").scann_ops_pybind
        leaves = round(2 * math.sqrt(vectors.count))
        sample = min(vectors.count, 250_000)
        stages = Stages()
        with stages.timed("read"):
            array = vectors.all()
        with stages.timed("build"):
            builder = pybind.builder(array, task.k, "dot_product").set_n_training_threads(
                task.threads
            )
            builder = builder.tree(
                num_leaves=leaves, num_leaves_to_search=32, training_sample_size=sample
            )
            index = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(100).build()
        with stages.timed("write"):
            index.serialize(str(folder))
        (folder / "leaves.json").write_text(json.dumps(leaves), encoding="utf-8")
        return {
            "settings": f"{leaves} leaves, score_ah(2, anisotropic .2), reorder 100, "
            f"trained on {sample:,}",
            "seconds": stages,
        }

    def open(self, folder: Path, task: Task) -> None:
        """See `Arm`."""
        self._index = importlib.import_module("scann").scann_ops_pybind.load_searcher(str(folder))
        self.lists = int(json.loads((folder / "leaves.json").read_text(encoding="utf-8")))

    def grid(self) -> Sequence[Sequence[OperatingPoint]]:
        """See `Arm`."""
        tuning_queries = [p for p in NUM_QUERIES if p <= (self.lists or 0)]
        return [[{"nprobe": p, "reorder": r} for r in (20, 40, 80, 160)] for p in tuning_queries]

    def threads(self, count: int) -> None:
        """See `Arm`."""
        self._threads = count
        self._index.set_num_threads(count)

    def search(self, queries: Vectors, k: int, point: OperatingPoint) -> Rows:
        """See `Arm`. One query at a time takes the call for single queries, without threads."""
        leaves = point["nprobe"]
        reorder = point["reorder"]
        if len(queries) == 1:
            rows = self._index.search(queries[0], k, reorder, leaves)[0][None]
        elif self._threads == 1:
            rows = self._index.search_batched(queries, k, reorder, leaves)[0]
        else:
            rows = self._index.search_batched_parallel(queries, k, reorder, leaves)[0]
        return np.asarray(rows).astype(np.int64)


def load_faiss() -> None:
    """Import FAISS and search a few vectors, so that its threads and buffers are there."""
    import faiss

    random = np.random.default_rng(0).standard_normal((2000, 64), np.float32)
    index = faiss.index_factory(64, "IVF4,PQ16x4fs,Refine(SQ8)", faiss.METRIC_INNER_PRODUCT)
    index.train(random)
    index.add(random)
    index.search(random, 10)


def num_lists(count: int) -> int:
    """The power of two nearest to 4 sqrt(N), which FAISS's guide advises; 4,096 for a million."""
    return int(2 ** round(math.log2(4 * math.sqrt(count))))


ARMS: dict[str, Callable[[], Arm]] = {
    "exact": Exact,
    "ivfpq": lambda: FaissArm(lambda n, d: f"IVF{num_lists(n)},PQ{d // 8}"),
    "floor": lambda: FaissArm(lambda n, d: f"IVF{num_lists(n)},PQ{d // 2}x4fsr,Refine(SQ8)"),
    "hnsw": lambda: FaissArm(lambda n, d: "HNSW32"),
    "hnswlib": HnswLib,
    "usearch": USearch,
    "scann": ScaNN,
    "autofaiss": AutoFaiss,
}


def main(arguments: list[str], arms: dict[str, Callable[[], Arm]]) -> int:
    """The command; returns its exit code."""
    task = Task.read(Path(arguments[0]))
    arm = arms[task.arm]()
    if task.stage == "build":
        answer = build(arm, task)
    else:
        answer = measure(arm, task)
    answer["packages"] = {name: version(name) for name in arm.packages} | {"numpy": np.__version__}
    temporary = task.output.with_suffix(".tmp")
    temporary.write_text(json.dumps(answer), encoding="utf-8")
    temporary.replace(task.output)
    return 0


def build(arm: Arm, task: Task) -> dict[str, Any]:
    """Build, with times and the most memory it took."""
    vectors = VectorFile(task.data / "vectors.npy")
    arm.load()
    load = os.getloadavg()[0]
    with AnonymousPeak() as peak:
        started = time.perf_counter()
        built = arm.build(vectors, task.folder, task)
        seconds = time.perf_counter() - started
    stages = {name: round(value, 2) for name, value in built.pop("seconds").items()}
    disk = sum(file.stat().st_size for file in task.folder.rglob("*") if file.is_file())
    return {
        "disk_bytes": disk,
        **built,
        "seconds": stages,
        "total_s": round(seconds, 2),
        "peak_rss_bytes": memory("VmHWM"),
        "peak_anon_bytes": peak.bytes,
        "load": round(load, 2),
    }


def measure(arm: Arm, task: Task) -> dict[str, Any]:
    """Open, and measure memory and all search settings worth it."""
    queries = np.load(task.data / "queries.npy")
    exact = np.load(task.data / "exact.npy")[:, : task.k]
    arm.load()
    give_back()
    before = {name: memory(name) for name in ("RssAnon", "RssFile")}
    load = os.getloadavg()[0]
    started = time.perf_counter()
    arm.open(task.folder, task)
    opened = time.perf_counter() - started
    usual = arm.usual()
    arm.threads(1)
    _singles(arm, queries, task.k, usual, 2 * task.singles, 3 * task.budget_s)
    grown = {name: memory(name) - was for name, was in before.items()}
    points = sweep(arm, queries, exact, task)
    return {
        "open_s": round(opened, 3),
        "resident_bytes": grown["RssAnon"],
        "file_bytes": grown["RssFile"],
        "resident_at": usual,
        "lists": arm.lists,
        "points": points,
        "load": round(load, 2),
        **arm.extra(),
    }


def sweep(arm: Arm, queries: Vectors, exact: Rows, task: Task) -> list[OperatingPoint]:
    """All points that no other one beats in both recall and throughput, cheapest first."""
    tried: list[OperatingPoint] = []
    best = -1.0
    arm.threads(task.threads)
    for number, settings in enumerate(arm.grid()):
        inner: list[OperatingPoint] = []
        for point in settings:
            inner.append(_batch(arm, queries, exact, point, task))
            if len(inner) > 1 and inner[-1]["recall"] < inner[-2]["recall"] + FLAT:
                break
        tried += inner
        reached = max(point["recall"] for point in inner)
        if number >= arm.pinned and (reached >= MIN_RECALL_GAIN or reached < best + FLAT):
            break
        best = reached if number >= arm.pinned else best
    front = pareto(tried)
    arm.threads(1)
    worth = min(SLOW_ENOUGH, front[-1]["recall"])
    for point in front:
        if arm.lists and "nprobe" in point["settings"]:
            point["lists_share"] = round(point["settings"]["nprobe"] / arm.lists, 6)
        if point["recall"] < worth:
            continue
        seconds = _singles(arm, queries, task.k, point["settings"], task.singles, task.budget_s)
        p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1000
        point.update(p50_ms=round(float(p50), 4), p99_ms=round(float(p99), 4), singles=len(seconds))
    return front


def _batch(
    arm: Arm, queries: Vectors, exact: Rows, settings: OperatingPoint, task: Task
) -> OperatingPoint:
    """Recall, and the best throughput of at least three batches where the budget allows."""
    first, rows = _timed(partial(arm.search, queries, task.k, settings))
    spent = first
    best = first
    while spent + first < task.budget_s and spent < 4 * first + 0.2:
        seconds, _ = _timed(partial(arm.search, queries, task.k, settings))
        best = min(best, seconds)
        spent = spent + seconds
    return {
        "settings": settings,
        "recall": round(recall_of(rows, exact), 5),
        "qps": round(len(queries) / best, 1),
    }


def _singles(
    arm: Arm, queries: Vectors, k: int, settings: OperatingPoint, count: int, budget_s: float
) -> list[float]:
    """Seconds of one query at a time, after a tenth to warm up.

    At least 20, at most what the budget allows.
    """
    rows = np.resize(np.arange(len(queries)), count)
    end = time.perf_counter() + budget_s / 5
    for row in rows[: count // 10]:
        arm.search(queries[row : row + 1], k, settings)
        if time.perf_counter() > end:
            break
    end = time.perf_counter() + budget_s
    seconds = []
    for row in rows:
        seconds.append(_timed(partial(arm.search, queries[row : row + 1], k, settings))[0])
        if len(seconds) >= 20 and time.perf_counter() > end:
            break
    return seconds


def recall_of(rows: Rows, exact: Rows) -> float:
    """Mean share of the true neighbors that were found."""
    return float((rows[:, :, None] == exact[:, None, :]).any(axis=1).mean())


def pareto(points: Sequence[OperatingPoint]) -> list[OperatingPoint]:
    """The points that no other one beats in both recall and qps, in the order of recall."""
    front: list[OperatingPoint] = []
    for point in sorted(points, key=lambda p: (-p["recall"], -p["qps"])):
        if not front or point["qps"] > front[-1]["qps"]:
            front.append(point)
    return front[::-1]


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


class AnonymousPeak:
    """The most memory without a file behind it that this process holds while the block runs."""

    def __enter__(self) -> AnonymousPeak:
        self.bytes = memory("RssAnon")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.bytes = max(self.bytes, memory("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def memory(name: str) -> int:
    """Bytes of a line of /proc/self/status: RssAnon, RssFile, VmHWM."""
    return (
        int(_number(Path("/proc/self/status").read_text(encoding="ascii"), rf"{name}:\s+(\d+)"))
        * 1024
    )


def give_back() -> None:
    """Hand free memory back to the system.

    An index that was put there would not count as growth.
    """
    ctypes.CDLL(None).malloc_trim(0)


def memory_available() -> int:
    """Bytes of memory that are free or would be freed."""
    return (
        int(_number(Path("/proc/meminfo").read_text(encoding="ascii"), r"MemAvailable:\s+(\d+)"))
        * 1024
    )


def _number(text: str, pattern: str) -> str:
    found = re.search(pattern, text)
    if found:
        return found[1]
    return "0"


def installed(package: str) -> bool:
    """Whether a distribution is there."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], ARMS))
