"""Our index beside exact search and its peers: same vectors, same threads, equal recall.

    python -m benchmarks.index --json FILE [--quick] [--n N] [--arms ours,hnsw,...] [--work DIR]
    python -m benchmarks.index --growth FILE FILE ...

Each arm builds in a process of its own and is searched in another one, one after the other. `make
bench-setup` installs the peers. The arms:

    exact          faiss IndexFlatIP
    ours           the default index
    ours-spill     the default with a second list per vector
    ours-target    built for recall 0.95
    ivfpq          faiss IVF{4 sqrt N},PQ{D/8}, no re-ranking
    floor          faiss IVF{4 sqrt N},PQ{D/2}x4fsr,Refine(SQ8)
    hnsw           faiss HNSW32
    hnswlib, usearch, scann, autofaiss    with their defaults, or what they choose or advise

Vectors are `faiss.contrib`'s SyntheticDataset (256 dimensions, inner product, unit length), or
those of an embeddings folder with noisy copies up to N (--real). Results of arms that are done are
kept in DIR and used again while data, settings, versions, and for our arms the source, are the
same. DIR needs about 4 KB a vector while HNSW is measured, and 2.5 KB without it; a run within 24
GiB of memory at 10 million vectors has the arms ours, ours-target, floor and exact.

Keys of FILE, and a plot of recall and queries a second beside it:

    data             n, dim, measured (queries), tuned_by (other queries), seed, real, noise, digest
    machine          cpu, cores, threads, memory_bytes, python, faiss
    arms             name -> status ("ok", "not installed", "failed"), error, and where it is ok:
      build          settings, seconds (by stage), total_s, train_add_s, peak_rss_bytes (with pages
                     of mapped files), peak_anon_bytes (without), disk_bytes, load before it; of
                     ours also reason, predicted, candidates
      search         open_s, resident_bytes (growth of RssAnon from before opening to after 2,000
                     searches), file_bytes (growth of RssFile over the same), resident_at (their
                     settings), lists, points, load before it
      points         recall (recall@10 against exact search), qps (a batch on all threads), p50_ms
                     and p99_ms (one query at a time on one thread), lists_share, settings; only
                     those that no other one beats
      resident_per_vector, disk_per_vector
      touched_per_vector
                     codes, rows and centroids that searches touch, mapped or not
      at             recall level -> qps, p50_ms, lists_share between the points around it
                     bound: even the cheapest setting finds more, so qps is less than could be
                     point: the cheapest measured one that reaches it
                     cold_p50_ms, cold_p99_ms, cold_first_ms, cold_faults: of ours, of that point
                     after the index's files were dropped from the page cache
    ratios           recall level -> our arm -> other arm -> qps of ours over other
    build_ratios     our arm -> other arm -> seconds of other (train and add) over ours
    filters, updates of our default index, where they are measured
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
from jsonargparse import ArgumentParser

from benchmarks.compare import ours, peers, tables
from benchmarks.compare.figures import at_recall, cheapest, ratio, train_add
from benchmarks.compare.peers import Task
from benchmarks.compare.vectors import VectorSource, prepare
from tritower.artefacts import storage

ROOT = Path(__file__).parent.parent
LEVELS = (0.95, 0.99)
QUICK = 50_000
FULL = 1_000_000
ARMS = ("exact", *ours.ARMS, *(name for name in peers.ARMS if name != "exact"))
ENVIRONMENTS = {
    "hnswlib": ".venv-peers",
    "usearch": ".venv-peers",
    "scann": ".venv-peers",
    "autofaiss": ".venv-autofaiss",
}
"""Where the packages of an arm are installed.

The others run with the Python of this process, ours and FAISS alike.
"""

MISSING = "not installed: make bench-setup"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What all arms share.

    Attributes:
        data: the folder of the vectors, and of indexes, results and logs.
        about: what its data.json says.
        threads: of builds and batches.
        limit_s: seconds that one build or one measurement may take.
        singles: timed queries of batch 1.
        budget_s: seconds that the timing of one point may take for batches, and again for single
            queries.
        keep: leave the peers' indexes on the disk too.
    """

    data: Path
    about: dict[str, Any]
    threads: int
    limit_s: float
    singles: int = 1000
    budget_s: float = 10.0
    keep: bool = False

    def interpreter(self, arm: str) -> Path:
        """The Python that has the packages of an arm; it may be missing."""
        if arm in ENVIRONMENTS:
            return ROOT / ENVIRONMENTS[arm] / "bin" / "python"
        return Path(sys.executable)

    def index(self, arm: str) -> Path:
        """The folder of an arm's index."""
        return self.data / "indexes" / arm


class StageFailed(Exception):
    """A process of an arm ended with an error; the message is its last line."""


def make_parser() -> ArgumentParser:
    """The parser of the command."""
    parser = ArgumentParser(
        prog="python -m benchmarks.index",
        description=(__doc__ or "").splitlines()[0],
        allow_abbrev=False,
    )
    parser.add_argument("--json", type=Path, default=None, help="file of the figures")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK:,} vectors: a look, not a result"
    )
    parser.add_argument("--n", type=int, default=None, help=f"number of vectors ({FULL:,})")
    parser.add_argument("--arms", default=",".join(ARMS), help="arms to run, comma-separated")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(".cache/bench"),
        help="folder of vectors, indexes and results",
    )
    parser.add_argument(
        "--real", type=Path, default=None, help="embeddings folder to copy vectors from, with noise"
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=0.3,
        help="length of the noise of copies, relative to a vector",
    )
    parser.add_argument(
        "--threads", type=int, default=None, help="threads of builds and batches (all cores)"
    )
    parser.add_argument(
        "--limit", type=float, default=14_400, help="seconds that one build or measurement may take"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what is kept")
    parser.add_argument("--keep", action="store_true", help="leave the peers' indexes on the disk")
    parser.add_argument(
        "--growth",
        nargs="+",
        type=Path,
        default=None,
        help="files of several N: show how figures grow",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.growth is not None:
        return tables.show_growth(
            [json.loads(file.read_text(encoding="utf-8")) for file in options.growth],
            options.growth,
        )
    if options.json is None:
        parser.error("--json FILE is required")
    arms = options.arms.split(",")
    if unknown := sorted(set(arms) - set(ARMS)):
        parser.error(f"unknown arms {', '.join(unknown)}; there are {', '.join(ARMS)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    n = options.n or (QUICK if options.quick else FULL)
    source = VectorSource(n, options.real, options.noise)
    threads = options.threads or len(os.sched_getaffinity(0))
    folder = source.folder(options.work)
    about = prepare(source, folder)
    run = Run(
        folder,
        about,
        threads,
        options.limit,
        *((500, 2.0) if options.quick else (1000, 10.0)),
        options.keep,
    )
    report = measure(run, arms, fresh=options.fresh)
    storage.write_json(options.json, report)
    tables.show(report)
    plot = tables.draw(report, options.json.with_suffix(".png"))
    logger.info("figures: %s; plot: %s", options.json, plot)
    return 0


def measure(run: Run, arms: Sequence[str], *, fresh: bool = False) -> dict[str, Any]:
    """All figures of some arms."""
    results = {}
    for arm in arms:
        logger.info("%s ...", arm)
        started = time.perf_counter()
        results[arm] = one(run, arm, fresh=fresh)
        status = results[arm].get("error") or results[arm]["status"]
        logger.info("%s: %s, %.0f s", arm, status, time.perf_counter() - started)
    return assemble(run, results)


def one(run: Run, arm: str, *, fresh: bool) -> dict[str, Any]:
    """The result of one arm, kept as soon as it is there.

    What is kept is used again if it would be the same.
    """
    file = run.data / "results" / f"{arm}.json"
    identity = identity_of(run, arm)
    if identity is None:
        return {"status": "not installed", "error": MISSING}
    if file.exists() and not fresh:
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if kept["identity"] == identity:
            logger.info("%s: kept from an earlier run", arm)
            return kept
    try:
        result: dict[str, Any] = {"status": "ok", **_measured(run, arm)}
    except StageFailed as error:
        return {"status": "failed", "error": str(error)}
    result["identity"] = identity
    file.parent.mkdir(parents=True, exist_ok=True)
    storage.write_json(file, result)
    return result


def identity_of(run: Run, arm: str) -> dict[str, Any] | None:
    """What a result depends on; None where the arm's packages are missing."""
    python = run.interpreter(arm)
    packages = ["numpy", "faiss-gpu", "faiss-cpu"] + ([arm] if arm in ENVIRONMENTS else [])
    versions = _versions(python, packages) if python.exists() else {}
    if arm in ENVIRONMENTS and arm not in versions:
        return None
    return {
        "arm": arm,
        "data": run.about["digest"],
        "queries": run.about["measured"],
        "threads": run.threads,
        "singles": run.singles,
        "budget_s": run.budget_s,
        "measure": peers.VERSION,
        "packages": versions,
        "cpu": cpu(),
        "source": source_digest() if arm in ours.ARMS else None,
    }


def _versions(python: Path, packages: list[str]) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json, sys\n"
        "there = {d.metadata['Name'].lower(): d.version for d in m.distributions() if "
        "d.metadata['Name']}\n"
        "print(json.dumps({n: there[n] for n in sys.argv[1:] if n in there}))"
    )
    answer = subprocess.run(
        [python, "-I", "-c", code, *packages], capture_output=True, text=True, timeout=120
    )
    if answer.returncode == 0:
        found: dict[str, str] = json.loads(answer.stdout)
    else:
        found = {}
    return found


def source_digest() -> str:
    """Of the engine's source: other code is another arm."""
    digest = hashlib.sha256()
    for file in [*sorted((ROOT / "retrieval").rglob("*.py")), Path(ours.__file__)]:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _measured(run: Run, arm: str) -> dict[str, Any]:
    """Build and measure one arm."""
    folder = run.index(arm)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    build = stage(run, arm, "build")
    search = stage(run, arm, "search")
    result = {"build": build, "search": search}
    if arm in ours.ARMS:
        result["cold"] = {}
        for level in LEVELS:
            if point := cheapest(search["points"], level):
                result["cold"][str(level)] = stage(
                    run, arm, "cold", {"settings": point["settings"]}
                )
    if arm == "ours":
        try:
            result["extras"] = stage(run, arm, "extras")
        except StageFailed as error:  # the figures of the index stand all the same
            result["extras"] = {"filters": {"error": str(error)}}
    if not run.keep and arm not in ours.ARMS:
        shutil.rmtree(folder)
    return result


def stage(run: Run, arm: str, name: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run one process of an arm and read its answer.

    Raises:
        StageFailed: it ended with an error, or ran past the limit; the message is the last line of
            its log.
    """
    logs = run.data / "logs"
    logs.mkdir(exist_ok=True)
    answer, task_file, log = (logs / f"{arm}.{name}.{suffix}" for suffix in ("json", "task", "log"))
    answer.unlink(missing_ok=True)
    task = Task(
        arm,
        name,
        run.data,
        run.index(arm),
        answer,
        run.threads,
        singles=run.singles,
        budget_s=run.budget_s,
        options=options,
    )
    task_file.write_text(json.dumps(task.to_json()), encoding="utf-8")
    own = arm in ours.ARMS
    command = [
        str(run.interpreter(arm)),
        *(
            ["-m", "benchmarks.compare.ours"]
            if own
            else ["-I", str(Path(peers.__file__).resolve())]
        ),
        str(task_file.resolve()),
    ]
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    # No arm uses a GPU here: benchmarks.gpu compares building with and without one.
    environment = {
        **os.environ,
        **dict.fromkeys(names, str(run.threads)),
        "CUDA_VISIBLE_DEVICES": "",
    }
    with log.open("wb") as stream:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=run.limit_s,
            )
        except subprocess.TimeoutExpired:
            raise StageFailed(f"{name} took more than {run.limit_s:,.0f} s and was ended") from None
    if done.returncode or not answer.exists():
        lines = []
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.strip():
                lines.append(line)
        last = lines[-1] if lines else "no message"
        if done.returncode < 0:
            last = f"ended by signal {-done.returncode}, as when memory runs out; {last}"
        raise StageFailed(f"{name}: {last} (all of it: {log})")
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def assemble(run: Run, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The report of some results."""
    n = run.about["n"]
    arms = {name: figures_of(result, n) for name, result in results.items()}
    good = {name: arm for name, arm in arms.items() if arm["status"] == "ok"}
    our_arms = [name for name in good if name in ours.ARMS]
    others = [name for name in good if name not in ours.ARMS]
    extras = results.get("ours", {}).get("extras", {})
    return {
        "data": run.about,
        "machine": machine(run.threads),
        "arms": arms,
        "ratios": {
            str(level): {
                m: {o: qps_ratio(good[m], good[o], level) for o in others} for m in our_arms
            }
            for level in LEVELS
        },
        "build_ratios": {
            m: {
                o: ratio(train_add(good[o]), train_add(good[m]))
                for o in others
                if train_add(good[o])
            }
            for m in our_arms
        },
        **{name: found for name, found in extras.items() if found is not None},
    }


def figures_of(result: dict[str, Any], n: int) -> dict[str, Any]:
    """A result with what follows from it."""
    if result["status"] != "ok":
        return {name: value for name, value in result.items() if name != "identity"}
    build = result["build"]
    search = result["search"]
    points = result["search"]["points"]
    # Our builds predict the bytes that searches touch; peers are measured by memory growth.
    touched = search["resident_bytes"]
    if "predicted" in build:
        touched = build["predicted"]["resident"]
    at: dict[str, Any] = {}
    for level in LEVELS:
        figures = {
            name: at_recall(points, level, name) for name in ("qps", "p50_ms", "lists_share")
        }
        if figures["qps"] is not None:
            cold = result.get("cold", {}).get(str(level), {})
            bound = min(point["recall"] for point in points) > level
            at[str(level)] = {**figures, "bound": bound, "point": cheapest(points, level), **cold}
    return {
        "status": "ok",
        "build": build,
        "search": search,
        "resident_per_vector": round(search["resident_bytes"] / n, 1),
        "touched_per_vector": round(touched / n, 1),
        "disk_per_vector": round(build["disk_bytes"] / n, 1),
        "at": at,
    }


def qps_ratio(our_arm: dict[str, Any], other_arm: dict[str, Any], level: float) -> float | None:
    """Queries per second of our arm over another at a recall; None where one misses it."""
    value = ratio(*(arm["at"].get(str(level), {}).get("qps") for arm in (our_arm, other_arm)))
    if value is None:
        return None
    return round(value, 3)


def cpu() -> str:
    """The processor's name."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    found = re.search(r"model name\s*:\s*(.+)", text)
    if found:
        return found[1]
    return platform.machine()


def machine(threads: int) -> dict[str, Any]:
    """Where it was measured."""
    return {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "faiss": faiss.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
