import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.faults import Failing, ShortWrites, Watched, using
from tritower.artefacts import files, storage
from tritower.artefacts.shards import ShardFolder
from tritower.artefacts.storage import ArtefactError


def make(path, content=b"content", artefact_type="thing", **options):
    with storage.new_folder(path, artefact_type=artefact_type, **options) as folder:
        storage.make_folder(folder / "sub" / "deep")
        with storage.create(folder / "sub" / "数据.bin") as file:
            file.write(content)
        (folder / "sub" / "deep" / "empty").touch()
    return path


def test_new_folder_is_complete_with_size_and_digest_of_every_file(tmp_path):
    meta = {"count": 0}
    with storage.new_folder(tmp_path / "a" / "b", artefact_type="thing", meta=meta) as folder:
        assert not (tmp_path / "a" / "b").exists()
        (folder / "x").write_bytes(b"abc")
        meta["count"] = 3  # facts may be filled in until the end
    manifest = storage.verify(tmp_path / "a" / "b", "thing")
    assert manifest.meta == {"count": 3}
    assert manifest.files["x"].bytes == 3
    assert os.listdir(tmp_path / "a") == ["b"]
    assert storage.fingerprint(tmp_path / "a" / "b") == manifest.fingerprint


def test_fingerprint_follows_the_content_and_not_the_meta(tmp_path):
    first, same, other = (
        make(tmp_path / "1", meta={"made": "monday"}),
        make(tmp_path / "2"),
        make(tmp_path / "3", b"Content"),
    )
    assert storage.fingerprint(first) == storage.fingerprint(same) != storage.fingerprint(other)


def test_an_exception_leaves_nothing(tmp_path):
    with (
        pytest.raises(RuntimeError, match="stop"),
        storage.new_folder(tmp_path / "a", artefact_type="thing") as folder,
    ):
        (folder / "x").touch()
        raise RuntimeError("stop")
    assert os.listdir(tmp_path) == []


def test_existing_folder_is_kept_unless_overwritten(tmp_path):
    path = make(tmp_path / "a", b"old")
    with pytest.raises(ArtefactError, match=r"a already exists"):
        make(path)
    with (
        pytest.raises(RuntimeError),
        storage.new_folder(path, artefact_type="thing", overwrite=True),
    ):
        raise RuntimeError
    assert (path / "sub" / "数据.bin").read_bytes() == b"old"
    make(path, b"new", overwrite=True)
    assert (path / "sub" / "数据.bin").read_bytes() == b"new"
    storage.verify(path)
    assert os.listdir(tmp_path) == ["a"]


def test_overwrite_works_where_the_system_cannot_swap_names(tmp_path, monkeypatch):
    monkeypatch.setattr(files.system, "exchange", lambda one, other: False)
    path = make(make(tmp_path / "a", b"old"), b"new", overwrite=True)
    assert (path / "sub" / "数据.bin").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_overwrite_never_replaces_a_foreign_folder(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(ArtefactError, match=r"home has no manifest\.json"):
        make(tmp_path / "home", overwrite=True)
    make(tmp_path / "catalogue", artefact_type="catalogue")
    with pytest.raises(ArtefactError, match="not a folder of type 'thing'"):
        make(tmp_path / "catalogue", overwrite=True)


def test_of_two_writers_one_wins(tmp_path):
    with (
        pytest.raises(ArtefactError, match="already exists"),
        storage.new_folder(tmp_path / "a", artefact_type="t") as late,
    ):
        (late / "x").write_text("late")
        with storage.new_folder(tmp_path / "a", artefact_type="t") as early:
            (early / "x").write_text("early")
    assert (tmp_path / "a" / "x").read_text() == "early"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("prepare", ["nothing", "no_manifest", "other_kind"])
def test_reading_says_what_is_wrong_with_the_folder(tmp_path, prepare):
    path, message = tmp_path / "a", "no such folder; expected a finished index folder"
    if prepare == "no_manifest":
        path.mkdir()
        message = r"no manifest\.json, so it is not a finished index"
    elif prepare == "other_kind":
        make(path, artefact_type="model")
        message = "type 'model'; expected 'index'"
    with pytest.raises(ArtefactError, match=message):
        storage.read_manifest(path, "index")


def test_every_flipped_byte_of_every_file_is_noticed(tmp_path):
    path = make(tmp_path / "a", meta={"n": 1.5, "名": ["x"]})
    for name in ("sub/数据.bin", storage.MANIFEST):
        data = (path / name).read_bytes()
        for offset in range(len(data)):
            (path / name).write_bytes(
                data[:offset] + bytes([data[offset] ^ (1 << offset % 8)]) + data[offset + 1 :]
            )
            with pytest.raises(ArtefactError, match=r"damaged|missing|version"):
                storage.verify(path)
        (path / name).write_bytes(data)
    storage.verify(path)


@pytest.mark.parametrize("damage", ["cut", "longer", "missing", "zero", "swapped"])
def test_cut_longer_missing_and_swapped_files_are_named(tmp_path, damage):
    path, other = make(tmp_path / "a"), make(tmp_path / "b", b"Content")
    file = path / "sub" / "数据.bin"
    if damage == "missing":
        file.unlink()
    elif damage == "swapped":
        shutil.copy(other / "sub" / "数据.bin", file)
    else:
        file.write_bytes({"cut": b"conten", "longer": b"content!", "zero": b""}[damage])
    message = {
        "missing": "is missing",
        "swapped": r"is damaged: expected sha256 \w{64}, found \w{64}",
    }
    with pytest.raises(
        ArtefactError,
        match=r"数据\.bin " + message.get(damage, "is damaged: expected 7 bytes, found"),
    ):
        storage.verify(path)


def test_a_manifest_of_the_future_is_refused(tmp_path):
    path = make(tmp_path / "a")
    body = json.loads((path / storage.MANIFEST).read_text())
    (path / storage.MANIFEST).write_text(json.dumps({**body, "version": 3}))
    with pytest.raises(ArtefactError, match="version 3, this program reads up to 2"):
        storage.read_manifest(path)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path):
    from tritower.artefacts.manifest import FileEntry, Manifest, encode, fingerprint_of

    path = make(tmp_path / "a")
    files = {"../secret": FileEntry(0, "0" * 64)}
    (path / storage.MANIFEST).write_bytes(
        encode(Manifest("thing", {}, files, fingerprint_of(files)))
    )
    with pytest.raises(ArtefactError, match=r"outside its folder: '\.\./secret'"):
        storage.verify(path)


@given(st.binary(max_size=60))
def test_garbage_is_never_taken_for_a_manifest(data):
    from pathlib import Path

    from tritower.artefacts.manifest import decode

    with pytest.raises(ArtefactError):
        decode(data, Path("manifest.json"))


def test_killed_writers_leave_nothing_after_the_next_run(tmp_path):
    program = (
        "import sys, time; from tritower.artefacts import storage\n"
        "with storage.new_folder(sys.argv[1], artefact_type='t') as f:\n"
        "    (f / 'x').write_text('half'); print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "a")], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    (left,) = os.listdir(tmp_path)
    with storage.new_folder(tmp_path / "b", artefact_type="t"):
        pass
    with pytest.raises(RuntimeError), storage.new_folder(tmp_path / "a", artefact_type="t"):
        raise RuntimeError
    assert left in os.listdir(tmp_path)  # its writer lives
    process.kill()
    process.wait()
    make(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_whichever_file_operation_fails_the_old_folder_stays_or_the_new_one_is_complete(
    tmp_path, error
):
    path = make(tmp_path / "a", b"old")
    with using(counted := Watched()):
        make(path, b"new", overwrite=True)
    assert len(counted.calls) > 20
    for step in range(1, len(counted.calls) + 1):
        shutil.rmtree(path)
        make(path, b"old")
        with using(Failing(step, error)):
            try:
                make(path, b"new", overwrite=True)
            except (ArtefactError, OSError) as failure:
                assert os.strerror(error) in str(failure) and str(tmp_path) in str(failure)
        storage.verify(path)
        assert (path / "sub" / "数据.bin").read_bytes() in (b"old", b"new")
    make(path, b"last", overwrite=True)
    assert os.listdir(tmp_path) == ["a"]


def test_write_file_replaces_in_one_step_and_an_exception_keeps_the_old(tmp_path):
    storage.write_text(tmp_path / "x", "é")
    with pytest.raises(RuntimeError), storage.write_file(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "x").read_bytes() == "é".encode()
    with pytest.raises(ValueError, match="JSON"):
        storage.write_json(tmp_path / "y", float("nan"))
    assert os.listdir(tmp_path) == ["x"]


def written_by_faiss(file):
    import faiss

    index = faiss.IndexFlatIP(4)
    index.add(np.ones((1000, 4), np.float32))
    faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def written_by_arrow(file):
    with pa.ipc.new_file(file, table(1).schema) as sink:
        sink.write_table(table(*range(1000)))


def written_by_parquet(file):
    pq.write_table(table(*range(1000)), file)


def written_by_numpy(file):
    np.save(file, np.arange(1000))


WRITERS = [written_by_faiss, written_by_arrow, written_by_parquet, written_by_numpy]


@pytest.mark.parametrize("write", WRITERS)
def test_every_library_writes_through_the_seam_and_short_writes_go_on(tmp_path, write):
    for name, system in (("whole", Watched()), ("pieces", ShortWrites(7))):
        with using(system), storage.create(tmp_path / name) as file:
            write(file)
            assert not file.readable()
        assert file.closed
        assert ("write", tmp_path / name) in system.calls and system.calls[-1] == (
            "close",
            tmp_path / name,
        )
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "pieces").read_bytes()
    assert len(system.calls) > 500


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("buffer", [1, 1 << 20])
def test_a_full_disk_is_named_with_the_file_whatever_library_writes(
    tmp_path, write, buffer, monkeypatch
):
    monkeypatch.setattr(files, "BUFFER_BYTES", buffer)
    with using(counted := Watched()), storage.create(tmp_path / "x.bin") as file:
        write(file)
    steps = len(counted.calls)
    for step in sorted({2, 3, steps // 2, steps - 1, steps} - {1}):
        with using(Failing(step, errno.ENOSPC)):
            with pytest.raises(
                ArtefactError, match=r"x\.bin could not be written: No space left on device$"
            ):
                with storage.create(tmp_path / "x.bin") as file:
                    write(file)
        assert file.closed


def test_after_a_failure_nothing_more_is_written(tmp_path):
    with (
        using(Failing(2, errno.EIO)),
        pytest.raises(ArtefactError, match=r"x could not be written: Input/output"),
    ):
        with storage.create(tmp_path / "x") as file:
            for _ in range(3):
                with suppress(ArtefactError):
                    file.write(b"1" * files.BUFFER_BYTES * 2)
    assert (tmp_path / "x").stat().st_size <= files.BUFFER_BYTES * 2


def test_another_exception_than_the_disks_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), storage.create(tmp_path / "x") as file:
        file.write(b"some")
        raise RuntimeError("stop")
    assert (tmp_path / "x").read_bytes() == b"some"
    with storage.create(tmp_path / "x"):
        pass
    assert (tmp_path / "x").read_bytes() == b""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        storage.create(tmp_path / "nowhere" / "x")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("write", WRITERS)
def test_the_device_that_is_always_full(write):
    with pytest.raises(
        ArtefactError, match="/dev/full could not be written: No space left on device"
    ):
        with storage.create("/dev/full") as file:
            write(file)


def test_a_limit_on_the_size_of_files_is_named_and_nothing_stays(tmp_path):
    program = (
        "import resource, sys; from tritower.artefacts import storage\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))\n"
        "with storage.new_folder(sys.argv[1], artefact_type='t') as folder, "
        "storage.create(folder / 'big') as file:\n"
        "    for _ in range(10): file.write(bytes(1_000_000))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a")], capture_output=True, text=True
    )
    assert done.returncode == 1 and re.search(
        r"ArtefactError: .*/big could not be written: File too large", done.stderr
    )
    assert os.listdir(tmp_path) == []


def test_folders_are_made_with_those_above_unless_a_file_is_in_the_way(tmp_path):
    storage.make_folder(tmp_path / "a" / "b" / "c")
    storage.make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ArtefactError, match=r"file is a file; expected a folder, or nothing"):
        storage.make_folder(tmp_path / "file")


@pytest.fixture
def large(tmp_path, monkeypatch):
    """Two files, one of which counts as large:

    200,000 bytes, of which 16 blocks of 1,024 are its sample.
    """
    monkeypatch.setattr(storage, "LARGE_BYTES", 100_000)
    monkeypatch.setattr(storage, "SAMPLE_BLOCKS", 16)
    monkeypatch.setattr(storage, "SAMPLE_BLOCK_BYTES", 1024)
    with storage.new_folder(tmp_path / "a", artefact_type="thing") as folder:
        for name, size in (("数据.bin", 200_000), ("small", 100_000)):
            with storage.create(folder / name) as file:
                file.write(np.random.default_rng(0).bytes(size))
    return tmp_path / "a"


def flip(file, offset):
    with file.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([byte[0] ^ 1]))


def test_a_fast_verify_reads_blocks_of_large_files_and_all_of_others(large):
    file = large / "数据.bin"
    manifest = storage.verify(large, fast=True)
    assert manifest.files["数据.bin"].sample and not manifest.files["small"].sample
    assert json.loads((large / storage.MANIFEST).read_text())["version"] == 2
    for offset in (0, 1023, 199_999, 200_000 - 1024, (200_000 - 1024) // 15):
        flip(file, offset)
        with pytest.raises(
            ArtefactError,
            match=r"数据\.bin is damaged: expected sha256 of its sample \w{64}, found \w{64}",
        ):
            storage.verify(large, fast=True)
        flip(file, offset)
    flip(large / "small", 50_000)
    with pytest.raises(
        ArtefactError, match=r"small is damaged: expected sha256 \w{64}, found \w{64}"
    ):
        storage.verify(large, fast=True)
    flip(large / "small", 50_000)
    flip(file, 2000)  # between blocks
    storage.verify(large, fast=True)
    with pytest.raises(ArtefactError, match=r"数据\.bin is damaged: expected sha256 \w{64}, found"):
        storage.verify(large)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtefactError, match="expected 200000 bytes, found 199999"):
        storage.verify(large, fast=True)


def test_a_large_file_of_which_a_part_was_lost_is_noticed_by_a_fast_verify(large):
    file = large / "数据.bin"
    data = file.read_bytes()
    longest = (200_000 - 1024) // 15 + 1024  # a gap of this length or longer touches a block
    for start in range(0, 200_000 - longest, 9973):
        file.write_bytes(data[:start] + bytes(longest) + data[start + longest :])
        with pytest.raises(ArtefactError, match="sample"):
            storage.verify(large, fast=True)


def test_a_manifest_of_small_files_has_version_1(tmp_path):
    path = make(tmp_path / "a")
    assert json.loads((path / storage.MANIFEST).read_text())["version"] == 1


def table(*values):
    return pa.table({"x": list(values)})


def test_shards_go_on_where_a_run_stopped(tmp_path):
    folder = ShardFolder(tmp_path / "f", artefact_type="hits", identity={"model": "m"})
    folder.write("s-0", table(1, 2))
    with pytest.raises(ArtefactError, match=r"lacks 1 of 2 shards: s-1\.parquet"):
        folder.finish(["s-0", "s-1"])
    again = ShardFolder(tmp_path / "f", artefact_type="hits", identity={"model": "m"})
    assert (again.done("s-0"), again.done("s-1")) == (True, False)
    again.write("s-1", table(3))
    assert again.finish(["s-0", "s-1"], {"hints": {}}).meta == {
        "hints": {},
        "model": "m",
        "count": 3,
    }
    finished = ShardFolder(tmp_path / "f", artefact_type="hits", identity={"model": "m"})
    assert finished.finished
    finished.finish(["s-0", "s-1"])
    with pytest.raises(ArtefactError, match="is finished"):
        finished.write("s-2", table(4))


def test_shards_of_another_model_are_refused_with_both_shown(tmp_path):
    begun = ShardFolder(tmp_path / "f", artefact_type="hits", identity={"model": "one", "k": 3})
    with pytest.raises(ArtefactError, match="model: there 'one', now 'two'"):
        ShardFolder(tmp_path / "f", artefact_type="hits", identity={"model": "two", "k": 3})
    begun.finish([])
    with pytest.raises(ArtefactError, match="model: there 'one', now 'two'"):
        ShardFolder(tmp_path / "f", artefact_type="hits", identity={"model": "two", "k": 3})
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "mine.txt").touch()
    with pytest.raises(ArtefactError, match="was not begun by this program"):
        ShardFolder(tmp_path / "g", artefact_type="hits", identity={})


def test_shards_that_nobody_named_are_refused(tmp_path):
    folder = ShardFolder(tmp_path / "f", artefact_type="hits", identity={})
    folder.write("s-0", table(1))
    folder.write("s-9", table(1))
    with pytest.raises(ArtefactError, match=r"shards of something else: s-9\.parquet"):
        folder.finish(["s-0"])
    (tmp_path / "f" / "begun.json").write_text("{")
    with pytest.raises(ArtefactError, match=r"begun\.json is damaged"):
        ShardFolder(tmp_path / "f", artefact_type="hits", identity={})


def test_reading_a_fingerprint_needs_no_torch_and_is_quick():
    started = time.perf_counter()
    program = (
        "import sys, tritower.artefacts.storage, tritower.retrieval.ranking.metrics; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    assert time.perf_counter() - started < 10
