"""Systems to put in place of `retrieval.files.system`: one whose k-th operation fails, one that loses power."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from retrieval import files

OPERATIONS = ("open", "write", "fsync", "close", "rename", "replace", "exchange", "link", "mkdir", "unlink", "rmtree")


@contextmanager
def using(system: files.System) -> Iterator[None]:
    """Let all operations of artefacts go through this one."""
    usual, files.system = files.system, system
    try:
        yield
    finally:
        files.system = usual


class Watched(files.System):
    """Calls `before(operation, path)` ahead of each operation; counts them in `calls`.

    Attributes:
        calls: (operation, path) of all so far.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, Path]] = []
        self.paths: dict[int, Path] = {}

    def before(self, operation: str, path: Path) -> None:
        self.calls.append((operation, path))

    def open(self, path, flags):
        self.before("open", Path(path))
        descriptor = super().open(path, flags)
        self.paths[descriptor] = Path(path)
        return descriptor

    def write(self, descriptor, data):
        self.before("write", self.paths[descriptor])
        return super().write(descriptor, data)

    def fsync(self, descriptor):
        self.before("fsync", self.paths[descriptor])
        super().fsync(descriptor)

    def close(self, descriptor):
        try:
            self.before("close", self.paths.get(descriptor, Path("?")))
        finally:
            super().close(descriptor)

    def rename(self, old, new):
        self.before("rename", Path(old))
        super().rename(old, new)

    def replace(self, old, new):
        self.before("replace", Path(old))
        super().replace(old, new)

    def exchange(self, one, other):
        self.before("exchange", Path(one))
        return super().exchange(one, other)

    def link(self, old, new):
        self.before("link", Path(old))
        super().link(old, new)

    def mkdir(self, path):
        self.before("mkdir", Path(path))
        super().mkdir(path)

    def unlink(self, path):
        self.before("unlink", Path(path))
        super().unlink(path)

    def rmtree(self, path):
        self.before("rmtree", Path(path))
        super().rmtree(path)


class Failing(Watched):
    """The operation number `fail_at`, counted from 1, fails; a failing write leaves half of its bytes.

    Args:
        fail_at: which one.
        error: errno.
        lasting: from then on everything that needs space fails too, as on a disk that stays full.
    """

    def __init__(self, fail_at: int, error: int, *, lasting: bool = False) -> None:
        super().__init__()
        self.fail_at, self.error, self.lasting = fail_at, error, lasting

    @property
    def failed(self) -> bool:
        return len(self.calls) >= self.fail_at

    def before(self, operation, path):
        super().before(operation, path)
        needs_space = operation in ("write", "mkdir", "link", "rename", "replace", "exchange")
        if len(self.calls) == self.fail_at or (self.lasting and self.failed and needs_space):
            named = () if operation in ("write", "fsync", "close") else (str(path),)  # as the system does
            raise OSError(self.error, os.strerror(self.error), *named)

    def write(self, descriptor, data):
        try:
            return super().write(descriptor, data)
        except OSError:
            files.System.write(self, descriptor, memoryview(data)[: len(data) // 2])
            raise

    def exchange(self, one, other):
        try:
            return super().exchange(one, other)
        except OSError:
            return False


class ShortWrites(Watched):
    """Every write takes at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def write(self, descriptor, data):
        return super().write(descriptor, memoryview(data)[: self.limit])


class PowerCut(BaseException):
    """The power is gone."""


class _File:
    """A file, under whatever names: what of it is on disk for certain, and what a running system reads."""

    def __init__(self, content: bytes) -> None:
        self.durable = self.volatile = content


Names = dict[str, _File | None]
"""Path -> file, None = a folder."""


class _Change:
    """A change of names, on disk for certain once one of its folders is flushed."""

    def __init__(self, apply: Callable[[Names], None], *folders: Path) -> None:
        self.apply, self.folders, self.durable = apply, {_inode(folder) for folder in folders}, False


class Disk(Watched):
    """A folder on a disk that loses power before the operation number `cut_at`: `PowerCut`.

    `crash` then leaves there what POSIX allows. Of content that was not flushed: all, none, a part or garbage. Of names
    that were changed in folders not flushed since: any of the changes.

    Args:
        root: the folder; all that is in it now is on disk.
        cut_at: the operation not done any more, counted from 1; None = none.
        forgotten: the fsync, counted from 1, that does nothing.
    """

    def __init__(self, root: Path, cut_at: int | None = None, forgotten: int | None = None) -> None:
        super().__init__()
        self.root, self.cut_at, self.forgotten = root, cut_at, forgotten
        self.fsyncs = 0
        self.changes: list[_Change] = []
        self.known: dict[tuple[int, int], _File | None] = {_inode(root): None}
        self.start: Names = {str(root): None}
        for path in sorted(root.rglob("*")):
            self.known[_inode(path)] = self.start[str(path)] = None if path.is_dir() else _File(path.read_bytes())

    def before(self, operation, path):
        super().before(operation, path)
        if self.cut_at is not None and len(self.calls) >= self.cut_at:
            raise PowerCut

    def close(self, descriptor):
        if self.cut_at is None or len(self.calls) < self.cut_at:
            super().close(descriptor)
        else:
            files.System.close(self, descriptor)  # nobody is there to be told

    def open(self, path, flags):
        descriptor = super().open(path, flags)
        self._learn(Path(path))
        return descriptor

    def mkdir(self, path):
        super().mkdir(path)
        self._learn(Path(path))

    def fsync(self, descriptor):
        super().fsync(descriptor)
        self.fsyncs += 1
        path = self.paths[descriptor]
        self._learn(path)
        if path.is_dir():
            for entry in path.iterdir():  # also what was made without this system
                self._learn(entry)
        if self.fsyncs == self.forgotten:
            return
        file = self.known[_inode(path)]
        if file is not None:
            file.durable = path.read_bytes()
        for change in self.changes:
            change.durable |= _inode(path) in change.folders

    def rename(self, old, new):
        self._learn(Path(old))
        super().rename(old, new)
        self._changed(lambda names: _rename(names, str(old), str(new)), new.parent)

    def replace(self, old, new):
        self._learn(Path(old))
        self._forget(Path(new))
        super().replace(old, new)
        self._changed(lambda names: _rename(names, str(old), str(new)), new.parent)

    def exchange(self, one, other):
        done = super().exchange(one, other)
        if done:
            self._changed(lambda names: _exchange(names, str(one), str(other)), one.parent, other.parent)
        return done

    def link(self, old, new):
        super().link(old, new)
        file = self.known[_inode(old)]
        self._changed(lambda names: _add(names, str(new), file), new.parent)

    def unlink(self, path):
        self._forget(Path(path))
        super().unlink(path)
        self._changed(lambda names: _drop(names, str(path)), path.parent)

    def rmtree(self, path):
        inside = [*path.rglob("*")]
        for each in sorted(inside, reverse=True):
            self._forget(each)
            self._changed(lambda names, each=each: _drop(names, str(each)), each.parent)
        self._changed(lambda names: _drop(names, str(path)), path.parent)
        super().rmtree(path)

    def crash(self, chance: random.Random) -> None:
        """Leave in the folder what a power loss now might leave."""
        for path in self.root.rglob("*"):
            self._see(path)
        names = dict(self.start)
        for change in self.changes:
            if change.durable or chance.random() < 0.5:
                change.apply(names)
        for path in self.root.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        left: dict[int, bytes] = {}
        for name, file in sorted(names.items()):
            if file is None:
                Path(name).mkdir(exist_ok=True)
            else:
                Path(name).write_bytes(left.setdefault(id(file), _after_crash(file, chance)))

    def _learn(self, path: Path) -> None:
        """Take note of a name made through this system or beside it."""
        if self.root not in path.parents or not path.exists() or _inode(path) in self.known:
            return
        self._learn(path.parent)
        file = None if path.is_dir() else _File(b"")
        self.known[_inode(path)] = file
        self._changed(lambda names: _add(names, str(path), file), path.parent)

    def _see(self, path: Path) -> None:
        if path.is_file() and (file := self.known.get(_inode(path))) is not None:
            file.volatile = path.read_bytes()

    def _forget(self, path: Path) -> None:
        """A name goes; its inode number may be given to another file."""
        if path.exists():
            self._see(path)
            if path.is_dir() or path.stat().st_nlink == 1:
                self.known.pop(_inode(path), None)

    def _changed(self, apply: Callable[[Names], None], *folders: Path) -> None:
        self.changes.append(_Change(apply, *folders))


def _inode(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _add(names: Names, path: str, file: _File | None) -> None:
    if os.path.dirname(path) in names:
        names[path] = file


def _drop(names: Names, path: str) -> None:
    if not any(name.startswith(path + os.sep) for name in names):
        names.pop(path, None)


def _rename(names: Names, old: str, new: str) -> None:
    if old in names and os.path.dirname(new) in names:
        moved = {new + name[len(old) :]: names.pop(name) for name in _within(names, old)}
        for name in _within(names, new):
            del names[name]
        names.update(moved)


def _exchange(names: Names, one: str, other: str) -> None:
    if one in names and other in names:
        mine = {other + name[len(one) :]: names.pop(name) for name in _within(names, one)}
        names.update({one + name[len(other) :]: names.pop(name) for name in _within(names, other)})
        names.update(mine)


def _within(names: Names, path: str) -> list[str]:
    return [name for name in names if name == path or name.startswith(path + os.sep)]


def _after_crash(file: _File, chance: random.Random) -> bytes:
    if file.durable == file.volatile:
        return file.durable
    size = len(file.volatile)
    garbage = bytearray(file.volatile)
    start = chance.randrange(size) if size else 0
    garbage[start : start + 512] = chance.randbytes(len(garbage[start : start + 512]))
    return chance.choice(
        [file.durable, file.volatile, file.volatile[:start], bytes(garbage), bytes(size), file.durable + bytes(size)]
    )
