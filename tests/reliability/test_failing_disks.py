"""A disk that fails, that is full, or that loses power, at each operation of a build."""

import errno
import os
import random
import resource
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from small import FACTORY, ROOT, answers, build, describe, embed, leftovers, served, some

from tests.support.faults import Disk, Failing, PowerCut, Watched, using
from tritower.artefacts import files
from tritower.artefacts.storage import ArtefactError

ROWS = 200
FACTORIES = [FACTORY, "Flat"]


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """An index of other products, which is in use meanwhile."""
    folder = tmp_path_factory.mktemp("old")
    return build(embed(folder / "e", ROWS, seed=5), folder / "index")


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    folder = embed(tmp_path_factory.mktemp("new") / "e", ROWS, shards=2)
    describe(folder)
    return folder


def build_new(embeddings, root, factory=FACTORY):
    return build(embeddings, root, factory, attributes=embeddings.with_name("e.attributes.parquet"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory, embeddings):
    """Factory -> the digests of its undisturbed build."""
    folder = tmp_path_factory.mktemp("expected")
    return {
        factory: served(build_new(embeddings, folder / factory, factory)) for factory in FACTORIES
    }


def fresh(folder, old):
    """A place with the old index, or with nothing where that is None."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if old is not None:
        shutil.copytree(old, folder / "index")
    return folder / "index"


def operations(tmp_path, old, embeddings, factory):
    root = fresh(tmp_path / "counted", old)
    with using(counted := Watched()):
        build_new(embeddings, root, factory)
    return len(counted.calls)


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("first", [False, True], ids=["new version", "first version"])
def test_whichever_operation_fails_the_old_index_is_served_or_the_new_one(
    tmp_path, old, embeddings, expected, factory, error, first, figures
):
    start = None if first else old
    before, after = None if first else served(old), expected[factory]
    steps = range(1, operations(tmp_path, start, embeddings, factory) + 1)
    for step in some(steps, 12):
        root = fresh(tmp_path / "place", start)
        with using(Failing(step, error, lasting=error == errno.ENOSPC)):
            try:
                build_new(embeddings, root, factory)
            except (ArtefactError, OSError) as problem:
                assert str(tmp_path / "place") in str(problem), (
                    f"operation {step}: the message names no file"
                )
                assert os.strerror(error) in str(problem)
        assert served(root) in (before, after), f"operation {step}"
        assert served(build_new(embeddings, root, factory)) == after
        assert leftovers(root) == []
        figures["T2 failing operations survived"] += 1


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("first", [False, True], ids=["new version", "first version"])
def test_a_loss_of_power_leaves_the_old_index_or_the_new_one(
    tmp_path, old, embeddings, expected, factory, first, figures
):
    start = None if first else old
    before, after = None if first else served(old), expected[factory]
    steps = range(1, operations(tmp_path, start, embeddings, factory) + 1)
    for cut_at in [*some(steps, 12), None]:
        root = fresh(tmp_path / "disk", start)
        finished = False
        with using(disk := Disk(tmp_path / "disk", cut_at)), suppress(PowerCut):
            build_new(embeddings, root, factory)
            finished = True
        disk.crash(random.Random(cut_at))
        assert served(root) in ((after,) if finished else (before, after)), f"operation {cut_at}"
        assert served(build_new(embeddings, root, factory)) == after, f"operation {cut_at}"
        assert leftovers(root) == []
        figures["T3 losses of power survived"] += 1


class Full(files.System):
    """Files of this name are on a device without space."""

    def __init__(self, name):
        self.name = name

    def open(self, path, flags):
        descriptor = super().open(path, flags)
        if self.name in path.name and flags & os.O_WRONLY:
            os.close(descriptor)
            return super().open(Path("/dev/full"), os.O_WRONLY)
        return descriptor


NAMES = [
    "attributes.arrow",
    "index.faiss",
    "lists.bin",
    "lists.npy",
    "vectors.faiss",
    "ids.arrow",
    "settings.json",
    "manifest.json",
]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("name", [*NAMES, "CURRENT", "000000-0000000000.parquet", "trained.faiss"])
def test_a_file_without_space_stops_the_build_by_name(tmp_path, old, embeddings, name, figures):
    root = fresh(tmp_path / "place", old)
    with (
        using(Full(name)),
        pytest.raises(ArtefactError, match=f"{name}.* could not be written: No space left"),
    ):
        build_new(embeddings, root)
    assert served(root) == served(old)
    build_new(embeddings, root)
    assert leftovers(root) == []
    figures["T5 full disks survived"] += 1


@pytest.mark.parametrize("limit", [100, 1_000, 2_000, 3_000, 1 << 20])
def test_a_limit_on_the_size_of_files_leaves_the_old_index(
    tmp_path, old, embeddings, expected, limit, figures
):
    root = fresh(tmp_path / "place", old)
    command = [
        "index.py",
        "build",
        "--embeddings",
        embeddings,
        "--output",
        root,
        "--factory",
        FACTORY,
        "--overwrite",
    ]
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    if limit < 1 << 20:
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert (
            f"error: {tmp_path}" in done.stderr
            and "could not be written: File too large" in done.stderr
        )
        assert served(root) == served(old) and answers(root) == answers(old)
    else:
        assert done.returncode == 0, done.stderr
    assert served(build_new(embeddings, root)) == expected[FACTORY]
    assert leftovers(root) == []
    figures["T5 full disks survived"] += 1
