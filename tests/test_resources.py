import subprocess
import sys
import textwrap
import time
from collections import namedtuple

import numpy as np
import pytest

from tritower.retrieval.building import resources
from tritower.retrieval.building.build import build_index
from tritower.retrieval.building.options import BuildOptions
from tritower.retrieval.building.resources import (
    Requirements,
    available_memory,
    check,
    parse_bytes,
    predict,
)
from tritower.retrieval.building.workspace import BLOCK_ROWS
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.ivf.encoded import GROUPING_BYTES
from tritower.retrieval.ivf.spec import IvfPqSpec, parse_ivf_pq
from tritower.retrieval.vectors.embeddings import EmbeddingReader, EmbeddingWriter

GIB = 1 << 30
Usage = namedtuple("Usage", "total used free")
FACTORY = "IVF1024,PQ16x4fsr,Refine(SQ8)"


def need_of(count, dim, factory, **options):
    return predict(
        count, dim, parse_ivf_pq(factory), block=BLOCK_ROWS, grouping=GROUPING_BYTES, **options
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """200,000 vectors of 64 dimensions."""
    folder = tmp_path_factory.mktemp("large") / "e"
    writer = EmbeddingWriter(folder, dim=64)
    generator = np.random.default_rng(0)
    for shard in range(4):
        vectors = generator.standard_normal((50_000, 64), np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        writer.write(f"s{shard}", [f"product-{shard}-{i}" for i in range(50_000)], vectors)
    writer.finish([f"s{shard}" for shard in range(4)])
    return EmbeddingReader(folder)


def test_more_memory_than_there_is_is_refused_at_once_with_the_numbers(tmp_path, monkeypatch):
    """A limit of 1 GiB and an index of about 3 GiB: 20 million vectors trained on 8.5 million."""
    need = need_of(20_000_000, 64, "IVF65536,PQ16x4fsr,Refine(SQ8)", sample=8_500_000)
    assert 2.5 * GIB < need.memory < 3.5 * GIB
    with pytest.raises(
        ValueError, match=r"needs about (\S+) GB of memory, 1\.1 GB is allowed: lower train_sample"
    ) as e:
        check(need, tmp_path, GIB)
    assert f"{need.memory / 1e9:.1f} GB" in str(e.value) and "--factory" in str(e.value)
    monkeypatch.setattr(resources, "available_memory", lambda: GIB)
    with pytest.raises(
        ValueError, match=r"of memory, 859\.0 MB is there \(80% of what is free\): lower"
    ):
        check(need, tmp_path)
    check(need, tmp_path, 4 * GIB)


def test_a_build_that_does_not_fit_is_refused_in_seconds_and_leaves_nothing(
    tmp_path, large, monkeypatch
):
    started = time.perf_counter()
    with pytest.raises(ValueError, match=r"needs about \S+ MB of memory, 104\.9 MB is allowed"):
        build_index(large, tmp_path / "i", BuildOptions(FACTORY, memory=100 << 20))
    monkeypatch.setattr(resources, "available_memory", lambda: 200 << 20)
    with pytest.raises(ValueError, match=r"of memory, 167\.8 MB"):
        build_index(large, tmp_path / "i", BuildOptions(FACTORY))
    assert time.perf_counter() - started < 5
    assert list(tmp_path.iterdir()) == []


def test_more_disk_than_there_is_is_refused_with_the_numbers(tmp_path, large, monkeypatch):
    need = need_of(200_000, 64, FACTORY)
    monkeypatch.setattr(
        resources.shutil, "disk_usage", lambda place: Usage(GIB, 0, int(need.disk / 0.75) - 1000)
    )
    with pytest.raises(
        ValueError, match=r"needs about (\S+) MB of disk at \S+, (\S+) MB is there \(75% of what is"
    ):
        build_index(large, tmp_path / "new" / "i", BuildOptions(FACTORY, memory=4 * GIB))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(
        resources.shutil, "disk_usage", lambda place: Usage(GIB, 0, int(need.disk / 0.75) + 1000)
    )
    check(need, tmp_path / "not" / "there" / "yet", 4 * GIB)


@pytest.mark.parametrize("spill", [False, True])
def test_a_build_takes_no_more_memory_and_disk_than_predicted(tmp_path, large, spill):
    program = f"""
        from pathlib import Path
        from tritower.artefacts import storage
        from tritower.retrieval.building import build
        from tritower.retrieval.building.build import build_index
        from tritower.retrieval.building.options import BuildOptions
        from tritower.retrieval.vectors.embeddings import EmbeddingReader
        place, most = Path({str(tmp_path / "i")!r}), []
        original = storage.seal
        def seal(folder, **options):  # the moment at which most is there
            places = [*place.rglob("*"), *place.with_name("i.building").rglob("*")]
            most.append(sum(file.stat().st_size for file in places if file.is_file()))
            return original(folder, **options)
        storage.seal = seal
        reader = EmbeddingReader({str(large.source)!r})
        build_index(reader, place, BuildOptions({FACTORY!r}, spill={spill}))
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        print(1024 * int(status["VmHWM"].split()[0]), max(most))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    memory, disk = map(int, done.stdout.split())
    files = ProductIndex.open(tmp_path / "i").manifest.files
    need = need_of(200_000, 64, FACTORY, spill=spill)
    resident = files["lists.bin"].bytes + files["index.faiss"].bytes
    assert memory < 1.2 * need.memory
    assert need.memory < 3 * memory
    assert disk < need.disk < 2 * disk
    assert resident < 1.1 * need.resident and need.resident < 1.3 * resident


def test_needs_grow_with_what_makes_them_grow():
    small = need_of(10**6, 128, "IVF4096,PQ32x4fsr,Refine(SQ8)")
    assert need_of(10**7, 128, "IVF4096,PQ32x4fsr,Refine(SQ8)").disk > 9 * small.disk
    assert need_of(10**6, 128, "IVF4096,PQ32x4fsr,Refine(SQfp16)").disk > small.disk + 128 * 10**6
    assert (
        need_of(10**6, 128, "IVF4096,PQ32x4fsr,Refine(SQ8)", spill=True).resident
        > 1.8 * small.resident
    )
    assert need_of(10**6, 128, "IVF4096,PQ32x4fsr,Refine(SQ8)", sample=10**6).memory > small.memory
    assert need_of(10, 128, "IVF4,PQ32x4fsr").memory < 600 << 20
    assert isinstance(small, Requirements) and IvfPqSpec(4096, 32, True, "SQ8") == parse_ivf_pq(
        "IVF4096,PQ32x4fsr,Refine(SQ8)"
    )


def cgroup(folder, limit, used, prefix="", active=0, inactive=0):
    names = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes")
        if prefix
        else ("memory.max", "memory.current")
    )
    folder.mkdir(exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    lines = (
        f"anon 1000\n{prefix}inactive_file {inactive}\n",
        f"{prefix}active_file {active}\nsock 0\n",
    )
    (folder / "memory.stat").write_text("".join(lines))


def test_memory_that_is_available(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "CGROUP", tmp_path)
    machine = available_memory()
    assert 0 < machine < 1 << 50
    cgroup(tmp_path, "max", 5000)
    assert available_memory() == pytest.approx(
        machine, rel=0.2
    )  # the container has no limit of its own
    cgroup(tmp_path, 10_000, 7000)
    assert available_memory() == 3000
    cgroup(tmp_path, 10_000, 9999, active=2000, inactive=4000)  # files that were read give way
    assert available_memory() == 6001
    cgroup(tmp_path, 1000, 2000)
    assert available_memory() == 0
    (tmp_path / "memory.max").unlink()
    cgroup(
        tmp_path / "memory", 10_000, 9000, "total_", active=500, inactive=700
    )  # as older systems tell it
    assert available_memory() == 2200


def test_the_limit_of_the_process_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "CGROUP", tmp_path)
    monkeypatch.setattr(resources.resource, "getrlimit", lambda _: (12_345, -1))
    assert available_memory() == 12_345
    monkeypatch.setattr(
        resources.resource, "getrlimit", lambda _: (resources.resource.RLIM_INFINITY, -1)
    )
    assert available_memory() > 12_345
    monkeypatch.setattr(resources, "_proc_available", lambda: None)
    assert available_memory() is None
    check(Requirements(10**15, 0, 0), tmp_path)  # where nothing is known, nothing is refused


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1GiB", 2**30),
        ("1.5g", 3 * 2**29),
        ("500 MB", 500 * 10**6),
        ("2 GB", 2 * 10**9),
        ("64k", 2**16),
        ("1TiB", 2**40),
        ("123", 123),
        (" 10 kb ", 10_000),
    ],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "GB", "1XB", "1e9", "one", "1 GB 2", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(
        ValueError, match=r"expected a number above 0 with a unit, such as 500MB or 1\.5GiB"
    ):
        parse_bytes(text)
