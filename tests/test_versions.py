import errno
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.faults import Disk, Failing, PowerCut, Watched, using
from tritower.artefacts import files, storage, temporaries, versions
from tritower.artefacts.storage import ArtefactError

ARTEFACTS = Path(__file__).parent / "artefacts"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Thousands of folders are written here.

    And what a flush is worth is told by `Disk`, not by the machine's own.
    """
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk():
    with using(Watched()):
        yield


def put(root, content, **options):
    with versions.publish(root, artefact_type="thing", meta={}, **options) as folder:
        with storage.create(folder / "x") as file:
            file.write(content)
    return root


def read(folder):
    storage.verify(folder, "thing")
    return (folder / "x").read_bytes()


def served(root, fall_back=False):
    return versions.open_version(root, read, fall_back).result


def names(root):
    return [folder.name for folder in versions.versions(root)]


def everything(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))


def test_a_published_version_is_in_use_and_the_one_before_is_kept(tmp_path):
    root = tmp_path / "deep" / "i"
    for content in (b"1", b"2", b"3"):
        put(root, content)
        assert served(root) == content
    assert versions.current(root) == root / "versions" / "000003"
    assert everything(root) == sorted(
        ["CURRENT", "versions"]
        + [f"versions/{n}{f}" for n in ("000002", "000003") for f in ("", "/x", "/manifest.json")]
    )
    assert put(root, b"4", keep=3) and names(root) == ["000002", "000003", "000004"]
    assert put(root, b"5", keep=1) and names(root) == ["000005"]
    with pytest.raises(ValueError, match="keep=0; expected at least 1"):
        put(root, b"6", keep=0)


def test_an_exception_leaves_the_old_version_in_use_and_no_temporary(tmp_path):
    root = put(tmp_path / "i", b"1")
    before = everything(root)
    with (
        pytest.raises(RuntimeError, match="stop"),
        versions.publish(root, artefact_type="thing", meta={}) as folder,
    ):
        (folder / "x").touch()
        raise RuntimeError("stop")
    assert everything(root) == before and served(root) == b"1"


def test_of_two_publishers_one_wins_and_the_other_is_told(tmp_path):
    root = put(tmp_path / "i", b"1")
    with pytest.raises(
        ArtefactError, match=r"conflict at .*i: this run started from 000001, but 000002 is in use"
    ):
        with versions.publish(root, artefact_type="thing", meta={}) as late:
            (late / "x").write_bytes(b"late")
            put(root, b"early")
    assert served(root) == b"early" and names(root) == ["000001", "000002"]
    assert not [name for name in everything(root) if name.endswith(".tmp")]


def test_work_that_started_from_an_older_version_is_not_published(tmp_path):
    root = put(put(tmp_path / "i", b"1"), b"2")
    with pytest.raises(ArtefactError, match="this run started from 000001, but 000002 is in use"):
        put(root, b"3", base="000001")
    put(root, b"3", base="000002")
    with pytest.raises(
        ArtefactError, match="this run started from 000001, but no version is in use"
    ):
        put(tmp_path / "new", b"1", base="000001")


def test_two_first_publishers_end_with_one_version(tmp_path):
    with pytest.raises(
        ArtefactError, match="this run started from no version, but 000001 is in use"
    ):
        with versions.publish(tmp_path / "i", artefact_type="thing", meta={}) as late:
            (late / "x").touch()
            put(tmp_path / "i", b"early")
    assert served(tmp_path / "i") == b"early" and names(tmp_path / "i") == ["000001"]


def test_many_publishers_at_once_never_mix(tmp_path):
    outcomes = []

    def work(number):
        content = bytes([number]) * 1000
        try:
            with versions.publish(
                tmp_path / "i", artefact_type="thing", meta={"n": number}
            ) as folder:
                barrier.wait()
                for name in ("x", "y"):
                    storage.write_bytes(folder / name, content)
            outcomes.append("published")
        except ArtefactError as error:
            outcomes.append(str(error)[:8])

    for _ in range(5):
        barrier = threading.Barrier(4)
        outcomes.clear()
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["conflict"] * 3 + ["published"]
        folder = versions.current(tmp_path / "i")
        assert (folder / "x").read_bytes() == (folder / "y").read_bytes()
        assert (folder / "x").read_bytes()[0] == storage.verify(folder).meta["n"]
    assert len(names(tmp_path / "i")) == 2


def test_a_version_that_somebody_reads_stays_until_it_is_let_go(tmp_path):
    root = put(tmp_path / "i", b"1")
    opened = versions.open_version(root, read)
    put(put(put(root, b"2"), b"3"), b"4")
    assert names(root) == ["000001", "000003", "000004"] and read(opened.path) == b"1"
    assert versions.collect(root) == []
    opened.hold.close()
    assert versions.collect(root) == ["000001"]
    assert versions.collect(root, keep=1) == ["000003"]
    assert names(root) == ["000004"]


def test_the_lock_of_a_killed_reader_is_gone(tmp_path):
    root = put(tmp_path / "i", b"1")
    program = (
        "import sys, time; from pathlib import Path; from tritower.artefacts import versions\n"
        "opened = versions.open_version(sys.argv[1], lambda folder: None); print('open', "
        "flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(root)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"open\n"
    put(put(root, b"2"), b"3")
    assert names(root) == ["000001", "000002", "000003"]
    process.kill()
    process.wait()
    assert versions.collect(root) == ["000001"]


def test_readers_never_miss_while_versions_come_and_go(tmp_path):
    root = put(tmp_path / "i", b"0")
    seen, failures, stop = [], [], threading.Event()

    def ask():
        while not stop.is_set():
            try:
                seen.append(int(served(root)))
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(1, 60):
        put(root, str(number).encode(), keep=1)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == [] and len(set(seen)) > 5 and served(root) == b"59"


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_what_was_never_in_use_or_was_gone_back_from_goes_first(tmp_path, keep):
    root = put(put(put(tmp_path / "i", b"1", keep=9), b"2", keep=9), b"bad", keep=9)
    storage.write_text(root / "CURRENT", "000002\n")  # somebody goes back
    assert served(root) == b"2" and versions.collect(root, keep=9) == []
    put(root, b"4", keep=keep)
    assert names(root) == ["000001", "000002", "000004"][-keep:] and served(root) == b"4"


def damaged_pointer(root, damage):
    pointer = root / "CURRENT"
    if damage == "missing":
        pointer.unlink()
    elif damage == "nowhere":
        pointer.write_text("000009\n")
    else:
        pointer.write_bytes(damage)


POINTERS = {
    "missing": r"i has no CURRENT: write one of the versions there into it \(000001, 000002\), "
    r"or build anew",
    "nowhere": r"CURRENT names version 000009, which is not there: write one",
    b"": r"CURRENT is damaged: expected the name of a version such as 000001, found b''",
    b"000002": "CURRENT is damaged",
    b"../../x\n": "CURRENT is damaged",
    b"\x00" * 7: "CURRENT is damaged",
    "٠٠٠٠٠١\n".encode(): "CURRENT is damaged",
}


@pytest.mark.parametrize("damage", POINTERS, ids=repr)
def test_a_damaged_pointer_says_what_to_do_and_falls_back_to_the_newest_version(
    tmp_path, damage, caplog
):
    root = put(put(tmp_path / "i", b"1"), b"2")
    damaged_pointer(root, damage)
    with pytest.raises(ArtefactError, match=POINTERS[damage]):
        versions.current(root)
    with pytest.raises(ArtefactError, match=POINTERS[damage]):
        served(root)
    with caplog.at_level(logging.WARNING):
        opened = versions.open_version(root, read)
    assert (opened.result, opened.path.name) == (b"2", "000002")
    assert caplog.messages == [opened.note] and "version 000002 is used, since" in opened.note
    put(root, b"3")
    assert served(root) == b"3" and "000002" in names(root)


def test_a_damaged_version_falls_back_to_the_newest_older_one_that_reads_well(tmp_path, caplog):
    root = put(put(put(tmp_path / "i", b"1"), b"2", keep=3), b"3", keep=3)
    (root / "versions" / "000003" / "x").write_bytes(b"!")
    opened = versions.open_version(root, read)
    assert (opened.result, opened.path.name) == (b"2", "000002")
    assert "version 000002 is used, since" in opened.note and "000003/x is damaged" in opened.note
    with pytest.raises(ArtefactError, match=r"000003/x is damaged"):
        served(root)
    (root / "versions" / "000002" / "x").unlink()
    assert served(root, fall_back=True) == b"1"
    (root / "versions" / "000001" / "manifest.json").write_bytes(b"")
    with pytest.raises(
        ArtefactError, match=r"000003/x is damaged.*000002/x is missing.*no older version is good"
    ):
        served(root, fall_back=True)


def test_a_version_newer_than_the_one_in_use_is_no_fall_back(tmp_path):
    root = put(put(tmp_path / "i", b"1"), b"2")
    storage.write_text(root / "CURRENT", "000001\n")
    (root / "versions" / "000001" / "x").write_bytes(b"!")
    with pytest.raises(ArtefactError, match=r"000001/x is damaged.*no older version is good"):
        served(root, fall_back=True)


@pytest.mark.parametrize("prepare", ["nothing", "empty", "other"])
def test_a_place_without_versions_says_so(tmp_path, prepare):
    root, message = tmp_path / "i", "i: no such folder; expected a finished thing"
    if prepare != "nothing":
        root.mkdir()
        message = r"i has no manifest\.json, so it is not a finished thing"
    if prepare == "other":
        (root / "thesis.tex").touch()
    with pytest.raises(ArtefactError, match=message):
        served(root, fall_back=True)
    with pytest.raises(
        ArtefactError, match=r"i: no such folder: build it|i has no CURRENT: build it"
    ):
        versions.current(root)


@pytest.mark.parametrize(
    "other", ["thesis.tex", "CURRENT", "versions/beta/x", "versions/000001/x", "versions/000001"]
)
def test_a_place_with_other_things_is_refused_and_left_as_it_is(tmp_path, other):
    root = tmp_path / "i"
    (root / other).parent.mkdir(parents=True)
    (root / other).write_text("MANIFEST-000001\n")  # such a CURRENT is LevelDB's
    before = everything(root)
    with pytest.raises(
        ArtefactError, match=rf"i holds other things \({'/'.join(other.split('/')[:2])}\)"
    ):
        put(root, b"1")
    assert everything(root) == before


def test_other_things_beside_versions_stay(tmp_path):
    root = put(tmp_path / "i", b"1")
    (root / "notes.txt").touch()
    (root / "versions" / "backup").mkdir()
    (root / "versions" / "000007").touch()
    put(put(root, b"2"), b"3")
    assert served(root) == b"3" and versions.current(root).name == "000009"
    assert {"notes.txt", "versions/backup", "versions/000007"} < set(everything(root))


def test_a_file_and_another_kind_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ArtefactError, match="file is a file; expected a folder, or nothing"):
        put(tmp_path / "file", b"1")
    with versions.publish(tmp_path / "i", artefact_type="model", meta={}) as folder:
        (folder / "x").touch()
    with pytest.raises(ArtefactError, match="of type 'model', not 'thing'"):
        put(tmp_path / "i", b"1")
    with pytest.raises(
        ArtefactError, match=r"000001 is one version, which never changes: name .*i$"
    ):
        with versions.publish(
            tmp_path / "i" / "versions" / "000001", artefact_type="model", meta={}
        ):
            pass


def test_one_version_or_a_folder_without_versions_opens_by_itself(tmp_path):
    root = put(tmp_path / "i", b"1")
    opened = versions.open_version(versions.current(root), read)
    assert (opened.result, opened.note) == (b"1", "")
    put(put(put(root, b"2"), b"3"), b"4")
    assert names(root) == ["000001", "000003", "000004"]  # opened by its own name, it is held too
    with storage.new_folder(tmp_path / "single", artefact_type="thing") as folder:
        (folder / "x").write_bytes(b"single")
    assert served(tmp_path / "single") == b"single"


def plain_folder(root):
    """An artefact folder without versions."""
    with storage.new_folder(root, artefact_type="thing") as folder:
        storage.write_bytes(folder / "x", b"first")
        storage.make_folder(folder / "sub")
        storage.write_bytes(folder / "sub" / "y", b"deep")
    return root


def test_a_folder_without_versions_is_no_place_to_publish(tmp_path):
    root = plain_folder(tmp_path / "i")
    before = everything(root)
    with pytest.raises(
        ArtefactError, match=r"i is an artefact folder without versions \(thing\): choose another"
    ):
        put(root, b"new")
    assert everything(root) == before and not versions.occupied(root)


def test_publishing_needs_no_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(temporaries, "fcntl", None)
    root = tmp_path / "i"
    for content in (b"1", b"2", b"3"):
        assert served(put(root, content)) == content
    assert names(root) == [
        "000001",
        "000002",
        "000003",
    ]  # nobody knows who reads: nothing is removed


START = {
    "nothing": lambda root: None,
    "version": lambda root: put(root, b"old"),
}


def allowed(start):
    return {
        "nothing": (None, b"new"),
        "version": (b"old", b"new"),
    }[start]


def now(root):
    try:
        return served(root)
    except ArtefactError:
        return None


def publish_new(root):
    put(root, b"new", keep=1)


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("start", START)
def test_whichever_file_operation_fails_the_old_version_or_the_new_one_is_served(
    tmp_path, start, lasting, caplog
):
    with using(counted := Watched()):
        START[start](tmp_path / "0" / "i")
        counted.calls.clear()
        publish_new(tmp_path / "0" / "i")
    for step in range(1, len(counted.calls) + 1):
        root = tmp_path / str(step) / "i"
        START[start](root)
        with using(
            Failing(
                step, (errno.EIO, errno.ENOSPC)[step % 2 if not lasting else 1], lasting=lasting
            )
        ):
            try:
                publish_new(root)
            except (ArtefactError, OSError) as error:
                assert str(tmp_path) in str(error), "the message names no file"
                assert "Input/output error" in str(error) or "No space left" in str(error)
        assert now(root) in allowed(start)
        put(root, b"last", keep=1)
        assert served(root) == b"last"
        assert {name for name in everything(root) if name != "sub"} == {
            "CURRENT",
            "versions",
            versions.current(root).relative_to(root).as_posix(),
            *(
                f"{versions.current(root).relative_to(root).as_posix()}/{name}"
                for name in ("x", "manifest.json")
            ),
        }


def survives(tmp_path, start, act, check, cut_at, chance, forgotten=None):
    """Whether `check` holds after a loss of power at one moment of `act`."""
    disk_root = tmp_path / "disk"
    shutil.rmtree(disk_root, ignore_errors=True)
    disk_root.mkdir()
    start(disk_root / "i")
    disk = Disk(disk_root, cut_at, forgotten)
    finished = False
    with using(disk), suppress(PowerCut):
        act(disk_root / "i")
        finished = True
    disk.crash(chance)
    return check(disk_root / "i", finished)


def operations(tmp_path, start, act):
    disk_root = tmp_path / "disk"
    shutil.rmtree(disk_root, ignore_errors=True)
    disk_root.mkdir()
    start(disk_root / "i")
    with using(disk := Disk(disk_root)):
        act(disk_root / "i")
    return disk


@pytest.mark.parametrize("start", START)
def test_a_loss_of_power_leaves_the_old_version_or_the_new_one(tmp_path, start, caplog):
    def check(root, finished):
        good = now(root) in (allowed(start)[1:] if finished else allowed(start))
        put(root, b"last", keep=1)
        return good and served(root) == b"last" and names(root) == [versions.current(root).name]

    steps = len(operations(tmp_path, START[start], publish_new).calls)
    for cut_at in [*range(1, steps + 1), None]:
        for seed in range(2):
            chance = random.Random(f"{cut_at} {seed}")
            assert survives(tmp_path, START[start], publish_new, check, cut_at, chance), (
                cut_at,
                seed,
            )


def new_folder(path):
    with storage.new_folder(path, artefact_type="thing", overwrite=True) as folder:
        (folder / "x").write_bytes(b"new")
        (folder / "sub" / "deep").mkdir(parents=True)
        (folder / "sub" / "deep" / "y").write_bytes(b"new")


def seal_in_place(path):
    path.mkdir()
    (path / "x").write_bytes(b"new")
    (path / "sub" / "deep").mkdir(parents=True)
    (path / "sub" / "deep" / "y").write_bytes(b"new")
    storage.seal(path, artefact_type="thing")


def whole(path, finished):
    if not path.exists():
        return not finished
    if not (path / "manifest.json").exists():
        return not finished and path.is_dir()
    return read(path) in ((b"new",) if finished else (b"first", b"new"))


def good(*contents):
    def check(root, finished):
        there = {read(folder) for folder in versions.versions(root)}
        in_use = now(root)
        if in_use is None and not (root / "CURRENT").exists() and not finished:
            return contents[0] is None
        return there <= {*contents} and in_use in (contents[-1:] if finished else contents)

    return check


# What is done from what to what, how the result is judged, and the flushes (name, how many-th of
# it) that only another case needs: of a folder that is sealed in place ("seal"), or of names that
# are flushed once more later.
TEMPORARY = "i/versions/.version.tmp"
FLUSHES = {
    "publish": (START["version"], publish_new, good(b"old", b"new"), {(TEMPORARY, 1)}),
    "first publish": (
        START["nothing"],
        publish_new,
        good(None, b"new"),
        {("i", 1), (TEMPORARY, 1)},
    ),
    "new folder": (START["nothing"], new_folder, whole, {(".i.tmp", 1)}),
    "overwrite": (plain_folder, new_folder, whole, {(".i.tmp", 1)}),
    "seal": (START["nothing"], seal_in_place, whole, set()),
}


@pytest.mark.parametrize("what", FLUSHES)
def test_without_any_one_fsync_a_loss_of_power_is_noticed(tmp_path, what, caplog):
    """The check of the checks.

    Each fsync forgotten, some loss of power loses or breaks something.
    """
    start, act, check, spare = FLUSHES[what]
    disk = operations(tmp_path, start, act)
    flushed = [
        plain(path.relative_to(disk.root)) for operation, path in disk.calls if operation == "fsync"
    ]

    def noticed(forgotten):
        for seed in range(30):
            for cut_at in [None, *range(len(disk.calls), 0, -1)]:
                chance = random.Random(f"{cut_at} {seed}")
                try:
                    if not survives(tmp_path, start, act, check, cut_at, chance, forgotten):
                        return True
                except (ArtefactError, OSError):
                    return True
        return False

    nth = [(name, flushed[:number].count(name) + 1) for number, name in enumerate(flushed)]
    assert len(nth) >= 4 and spare <= {*nth}
    assert [
        each for number, each in enumerate(nth, 1) if each not in spare and not noticed(number)
    ] == []


def plain(path):
    return re.sub(r"\.[0-9a-f]{8}\.tmp", ".tmp", path.as_posix())


def test_a_version_loses_its_name_on_disk_before_its_files_go(tmp_path):
    """Else a loss of power might leave a version without some of its files."""
    root = put(put(tmp_path / "i", b"1"), b"2")
    with using(watched := Watched()):
        assert versions.collect(root, keep=1) == ["000001"]
    calls = [(operation, plain(path.relative_to(root))) for operation, path in watched.calls]
    renamed = calls.index(("rename", "versions/000001"))
    flushed = calls.index(("fsync", "versions"), renamed)
    assert calls.index(("rmtree", TEMPORARY.removeprefix("i/"))) > flushed


@pytest.mark.parametrize("make", [publish_new, new_folder])
def test_what_a_disk_gives_back_otherwise_than_it_was_given_is_not_published(
    tmp_path, make, monkeypatch
):
    def lossy_seal(folder, **options):
        seal(folder, **options)
        (folder / "x").write_bytes(b"???")

    root, seal = (
        (put if make is publish_new else lambda path, _: plain_folder(path))(
            tmp_path / "i", b"old"
        ),
        storage.seal,
    )
    before = everything(root)
    monkeypatch.setattr(storage, "seal", lossy_seal)
    with pytest.raises(ArtefactError, match=r"x is damaged: expected sha256 \w{64}, found \w{64}"):
        make(root)
    assert everything(root) == before and now(root) in (b"old", b"first")


def test_publishers_killed_at_any_moment_leave_a_version_in_use_and_nothing_else(tmp_path):
    root = put(tmp_path / "i", b"1")
    program = (
        "import sys; from tritower.artefacts import storage, versions\n"
        "print('start', flush=True)\n"
        "while True:\n"
        "    with versions.publish(sys.argv[1], type='thing', meta={}) as folder:\n"
        "        storage.write_bytes(folder / 'x', b'1')"
    )
    chance = random.Random(0)
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(root)], stdout=subprocess.PIPE
        )
        assert process.stdout.readline() == b"start\n"
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        process.wait()
        assert served(root) == b"1"
    put(root, b"1")
    assert len(names(root)) == 2
    assert not [name for name in everything(root) if name.endswith(".tmp")]


def test_a_failing_run_that_removes_the_folders_it_made_does_not_disturb_another(
    tmp_path, monkeypatch
):
    removed = []

    def made_and_removed(path):
        make_folder(path)
        if path.name == "versions" and not removed:
            removed.append(path)
            path.rmdir()
            path.parent.rmdir()

    make_folder = files.make_folder
    monkeypatch.setattr(files, "make_folder", made_and_removed)
    assert served(put(tmp_path / "i", b"1")) == b"1" and removed
