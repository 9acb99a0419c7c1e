"""What a build will need, predicted before it starts, and what this machine has."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from tritower.retrieval.building.choose_spec import train_size
from tritower.retrieval.ivf.inverted_lists import BLOCK
from tritower.retrieval.ivf.ivf_pq import TRAINED_CODES
from tritower.retrieval.ivf.spec import IvfPqSpec

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

PROCESS_BYTES = 500 << 20
"""Python, NumPy, Arrow and FAISS with their buffers."""

MEMORY_SHARE = 0.8
DISK_SHARE = 0.75
"""What a build may take of the memory and of the disk that are free: others live there too."""

ID_BYTES = 40
"""Of a product id in files, assumed."""

CGROUP = Path("/sys/fs/cgroup")
"""Where a container sees its limits."""


@dataclass(frozen=True)
class Requirements:
    """What building and serving an index takes, in bytes.

    Attributes:
        memory: at the peak of the build.
        disk: while building: the finished version, and what a killed build continues from.
        resident: what searches touch, mapped or not: codes, rows and centers of lists; refine
            vectors are not counted.
    """

    memory: int
    disk: int
    resident: int


def predict(
    count: int,
    dim: int,
    spec: IvfPqSpec,
    *,
    sample: int | None = None,
    spill: bool = False,
    block: int,
    grouping: int,
) -> Requirements:
    """The need of an index whose lists are mapped.

    Args:
        count: number of vectors.
        dim: D.
        spec: the index.
        sample: training vectors; None for the usual number.
        spill: every vector is stored in two lists.
        block: vectors encoded at a time.
        grouping: bytes of codes regrouped at a time.
    """
    # Sizes in bytes: one vector, all centers with their codes, and one batch while it is read.
    copies = 1 + spill
    vector = 4 * dim
    sample = min(count, train_size(count, spec.lists) if sample is None else sample)
    centers = spec.lists * (vector + dim // 4 + 16)
    batch = min(count, block) * vector
    # Two batches at a time, each as stored, as float32 and normalized.
    reading = 6 * batch
    # Peaks of the three phases of a build: training, encoding, and grouping codes by list.
    training = int(1.1 * sample * vector) + max(
        reading, 3 * min(sample, TRAINED_CODES) * vector + 2 * centers
    )
    encoding = reading + int(2.5 * batch) + 2 * centers
    regrouping = 3 * min(grouping, count * copies * spec.code_size) + 32 * count * copies + centers
    # Sizes on disk: lists, padded to whole blocks of codes; refine vectors and ids; and the encoded
    # blocks that a killed build continues from.
    average = count * copies / spec.lists
    padded = (average + BLOCK / 2) / average  # half a block of every list is empty
    lists = int(count * copies * (padded * spec.code_size + 8))
    stored = count * (spec.refine_size(dim) + ID_BYTES)
    spooled = count * (copies * (spec.code_size + 4) + spec.refine_size(dim) + ID_BYTES)
    return Requirements(
        memory=PROCESS_BYTES + max(training, encoding, regrouping),
        disk=lists + stored + spooled + centers,
        resident=lists + centers,
    )


def check(need: Requirements, place: Path, limit: int | None = None) -> None:
    """Refuse a build that would not fit.

    Args:
        need: what it takes.
        place: where it will be written.
        limit: memory that may be used; None for a share of what is free.

    Raises:
        ValueError: with what is needed, what there is, and what to lower.
    """
    # Memory: a share of what is free, or what the caller allows.
    free = available_memory()
    if limit is not None:
        have = limit
    elif free is None:
        have = None
    else:
        have = int(MEMORY_SHARE * free)
    if have is not None and need.memory > have:
        if limit is not None:
            whose = "allowed"
        else:
            whose = f"there ({MEMORY_SHARE:.0%} of what is free)"
        raise ValueError(
            f"the build needs about {decimal(need.memory)} of memory, {decimal(have)} is {whose}: "
            "lower train_sample "
            "(--train-sample) or the number of lists (--factory), or allow more"
        )
    # Disk: a share of what is free on the volume of the output.
    existing = next(folder for folder in (place, *place.absolute().parents) if folder.is_dir())
    have = int(DISK_SHARE * shutil.disk_usage(existing).free)
    if need.disk > have:
        raise ValueError(
            f"the build needs about {decimal(need.disk)} of disk at {existing}, {decimal(have)} is "
            "there "
            f"({DISK_SHARE:.0%} of what is free): write elsewhere, remove old versions, or store "
            "smaller vectors for "
            "re-ranking (Refine(SQ8), or none, in --factory)"
        )


def parse_bytes(text: str) -> int:
    """A size such as "1GiB", "500 MB" or "1.5g" in bytes; "GiB" and "g" are 2**30, "GB" is 10**9.

    Raises:
        ValueError: not a size above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)\s*", text.lower())
    if match is None or not float(match[1]):
        raise ValueError(
            f"size {text!r}; expected a number above 0 with a unit, such as 500MB or 1.5GiB"
        )
    base = 1000 if match[3] == "b" else 1024
    return int(float(match[1]) * base ** " kmgt".index(match[2] or " "))


def available_memory() -> int | None:
    """Bytes that this process may still take.

    Of the machine, of its container and of its own limit; None = unknown.
    """
    # Several limits may apply at once, and the lowest one counts: of the machine, of the container
    # (cgroup version 2 or 1), and of the process.
    found = [
        _proc_available(),
        _cgroup_available(CGROUP, "memory.max", "memory.current", ""),
        _cgroup_available(
            CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        ),  # version 1
        None if resource is None else resource.getrlimit(resource.RLIMIT_AS)[0],
    ]
    # RLIM_INFINITY is negative.
    known = [number for number in found if number is not None and number >= 0]
    return min(known, default=None)


def _proc_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(
            int(line.split()[1]) for line in lines if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):
        return None


def _cgroup_available(folder: Path, limit: str, used: str, prefix: str) -> int | None:
    """What the limit of a container leaves.

    Pages of files count as used there, but give way when memory is needed.
    """
    try:
        most, now = (int((folder / name).read_text(encoding="ascii")) for name in (limit, used))
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):  # no such limit: "max"
        return None
    show_progress = dict(line.split(maxsplit=1) for line in lines)
    files = sum(
        int(show_progress.get(f"{prefix}{state}_file", 0)) for state in ("active", "inactive")
    )
    return max(0, most - now + files)
