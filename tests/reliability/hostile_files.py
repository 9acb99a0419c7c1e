"""Open and search indexes whose files were changed on purpose, digests and all.

Prints what came of it as JSON.

python hostile_files.py INDEX FOLDER CASES MEMORY_MIB SECONDS

Each case is a child of its own, with limits on memory and time. It may refuse, answer, or be ended:
this process must go on, and a child that answers names only products of the index.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from forks import forked
from small import unit_vectors

from tritower.artefacts import storage
from tritower.artefacts.storage import ArtefactError
from tritower.retrieval.index import ProductIndex

NUMBERS = [
    0,
    1,
    2,
    31,
    32,
    255,
    2**15,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
NAMES = [
    b"IxFI",
    b"IxF2",
    b"IwPf",
    b"IwPQ",
    b"IwFl",
    b"IxSQ",
    b"IxRF",
    b"IxPT",
    b"IHNf",
    b"IxMp",
    b"IBxF",
    b"null",
]
TEXTS = ["NaN", "-1", "1e308", "0", "99999999999999999999", "null", '"x"', "[]", "{}", "true"]
REFUSED, ANSWERED, INVENTED = 0, 1, 2
"""What a child ends with."""


def changed(name: str, data: bytes, chance: random.Random) -> bytes:
    """The content of a file with one change of the type that its format is sensitive to."""
    new = bytearray(data)
    if name == "lists.npy" and chance.random() < 0.5:
        return changed_array(data, chance)
    if name == "settings.json":
        place = chance.choice([i for i, byte in enumerate(data) if chr(byte).isdigit()])
        return data[:place] + chance.choice(TEXTS).encode() + data[place + 1 :]
    head = min(len(data), 400)  # where the counts and sizes stand
    way = chance.randrange(7)
    if way <= 2:
        size = chance.choice([4, 8])
        place = (
            chance.randrange(0, head, 4) if chance.random() < 0.7 else chance.randrange(len(data))
        )
        new[place : place + size] = (chance.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(
            size, "little"
        )
    elif way == 3:
        known = [i for i in range(len(data) - 4) if data[i : i + 2] in (b"Ix", b"Iw")] or [0]
        place = chance.choice(known)
        new[place : place + 4] = chance.choice(NAMES)
    elif way == 4:
        new[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif way == 5:
        del new[chance.randrange(len(data)) :]
    else:
        place = chance.randrange(len(data))
        new[place:place] = data[place : place + chance.choice([1, 4, 8, 64])]
    return bytes(new)


def changed_array(data: bytes, chance: random.Random) -> bytes:
    """An array of another type, shape or content.

    Among them one that would run code if it were believed.
    """
    way, end = chance.randrange(4), data.index(b"\n")
    if way == 0:
        return data.replace(b"<i8", chance.choice([b"<f8", b"|O8", b">i8", b"<u8"]))
    if way == 1:
        return (
            data[:end].replace(b"(8,)", chance.choice([b"(9,)", b"(0,)", b"()  ", b"(-1,)"]))
            + data[end:]
        )
    sizes = np.frombuffer(data[end + 1 :], np.int64).copy()
    sizes[chance.randrange(len(sizes))] = chance.choice(NUMBERS) - 2**63
    if way == 3:
        sizes = np.roll(np.frombuffer(data[end + 1 :], np.int64), 1)
    return data[: end + 1] + sizes.tobytes()


def limited(memory: int, seconds: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def opened(root: Path, memory: int, seconds: int, known: set[str] | None) -> int:
    limited(memory, seconds)
    try:
        index = ProductIndex.open(root)
    except (ArtefactError, MemoryError):
        return REFUSED
    try:
        hits = index.search(unit_vectors(5, seed=99), 10)
        found = {
            product for product in index.ids(hits.rows).ravel().tolist() if product is not None
        }
    except Exception:  # FAISS checks some of what it meets
        return REFUSED
    return ANSWERED if known is None or found <= known else INVENTED


def main(source: Path, folder: Path, cases: int, memory: int, seconds: int) -> None:
    chance = random.Random(0)
    manifest, good = storage.read_manifest(source), ProductIndex.open(source)
    known = set(good.id_table.column.to_pylist())
    names = sorted(manifest.files)
    done, unexpected, most = Counter(refused=0, answered=0, ended=0), [], 0
    for number in range(cases):
        root, name = folder / "index", names[number % len(names)]
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(source, root)
        (root / storage.MANIFEST).unlink()
        data = changed(name, (source / name).read_bytes(), chance)
        (root / name).write_bytes(data)
        storage.seal(root, artefact_type=manifest.artefact_type, meta=manifest.meta)
        output = folder / "output.txt"
        own = (
            None if name == "ids.arrow" else known
        )  # a table of ids that was changed says what it says
        child = forked(lambda root=root, own=own: opened(root, memory, seconds, own), output)
        _, status, usage = os.wait4(child, 0)
        code, most = os.waitstatus_to_exitcode(status), max(most, usage.ru_maxrss * 1024)
        outcome = {REFUSED: "refused", ANSWERED: "answered"}.get(
            code, "ended" if code < 0 else "unexpected"
        )
        done[f"{outcome} {name}"] += 1
        done[outcome] += 1
        if outcome == "unexpected":
            unexpected.append([name, code, output.read_text(errors="replace")[-600:]])
    print(json.dumps({"done": done, "unexpected": unexpected, "most_bytes": most}))


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        int(sys.argv[3]),
        int(sys.argv[4]) << 20,
        int(sys.argv[5]),
    )
