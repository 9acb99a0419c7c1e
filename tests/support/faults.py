"""Systems to put in place of `tritower.artefacts.files.system`.

One whose k-th operation fails, one that loses power.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tritower.artefacts import files

OPERATIONS = (
    "open",
    "write",
    "fsync",
    "close",
    "rename",
    "replace",
    "exchange",
    "link",
    "mkdir",
    "unlink",
    "rmtree",
)


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

    Flushes nothing: it takes long.

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
    """The operation number `fail_at`, counted from 1, fails.

    A failing write leaves half of its bytes.

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
            named = (
                () if operation in ("write", "fsync", "close") else (str(path),)
            )  # as the system does
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
    """A file, under whatever names.

    What of it is on disk for certain, and what a running system reads.
    """

    def __init__(self, content: bytes) -> None:
        self.durable = self.volatile = content


class _Folder:
    """A folder, under whatever name: the names in it that are on disk."""

    def __init__(self) -> None:
        self.names: dict[str, _File | _Folder] = {}


class _Change:
    """A change of names, on disk for certain once one of its folders is flushed."""

    def __init__(self, apply: Callable[[], None], *folders: _File | _Folder) -> None:
        self.apply, self.folders, self.durable = apply, folders, False


class Disk(Watched):
    """A folder on a disk that loses power before the operation number `cut_at`: `PowerCut`.

    `crash` then leaves there what POSIX allows. Of content that was not flushed: all, none, a part
    or garbage. Of names that were changed in folders not flushed since: any of the changes.

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
        self.top = _Folder()
        self.known: dict[tuple[int, int], _File | _Folder] = {_inode(root): self.top}
        for path in sorted(root.rglob("*")):
            node = _Folder() if path.is_dir() else _File(path.read_bytes())
            self.known[_inode(path)] = self.known[_inode(path.parent)].names[path.name] = node

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
        self._train_ivf_pq(Path(path))
        return descriptor

    def mkdir(self, path):
        super().mkdir(path)
        self._train_ivf_pq(path)

    def fsync(self, descriptor):
        self.before("fsync", self.paths[descriptor])
        self.fsyncs += 1
        path = self.paths[descriptor]
        if path.is_dir():
            for entry in path.iterdir():  # also what was made without this system
                self._train_ivf_pq(entry)
        if self.fsyncs == self.forgotten:
            return
        node = self._train_ivf_pq(path)
        if isinstance(node, _File):
            node.durable = path.read_bytes()
        for change in self.changes:
            change.durable |= node in change.folders

    def rename(self, old, new):
        node = self._train_ivf_pq(old)
        super().rename(old, new)
        self._moved(node, old, new)

    def replace(self, old, new):
        node = self._train_ivf_pq(old)
        self._forget(new)
        super().replace(old, new)
        self._moved(node, old, new)

    def exchange(self, one, other):
        nodes = self._train_ivf_pq(one), self._train_ivf_pq(other)
        done = super().exchange(one, other)
        if done:
            folders = self._train_ivf_pq(one.parent), self._train_ivf_pq(other.parent)

            def swap() -> None:
                if (folders[0].names.get(one.name), folders[1].names.get(other.name)) == nodes:
                    folders[0].names[one.name], folders[1].names[other.name] = nodes[1], nodes[0]

            self.changes.append(_Change(swap, *folders))
        return done

    def link(self, old, new):
        node = self._train_ivf_pq(old)
        super().link(old, new)
        self._added(node, new)

    def unlink(self, path):
        self._removed(path)
        super().unlink(path)

    def rmtree(self, path):
        for each in [*sorted(path.rglob("*"), reverse=True), path]:
            self._removed(each)
        super().rmtree(path)

    def crash(self, chance: random.Random) -> None:
        """Leave in the folder what a power loss now might leave."""
        for path in self.root.rglob("*"):
            self._see(path)
        for change in self.changes:
            if change.durable or chance.random() < 0.5:
                change.apply()
        for path in self.root.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        _write(self.top, self.root, chance, {})

    def _train_ivf_pq(self, path: Path) -> _File | _Folder:
        """What has this name; whatever was made beside this system is noted now."""
        if self.root not in (path, *path.parents):
            return _File(b"")
        if _inode(path) not in self.known:
            self._train_ivf_pq(path.parent)
            self.known[_inode(path)] = node = _Folder() if path.is_dir() else _File(b"")
            self._added(node, path)
        return self.known[_inode(path)]

    def _see(self, path: Path) -> None:
        node = self.known.get(_inode(path))
        if isinstance(node, _File):
            node.volatile = path.read_bytes()

    def _forget(self, path: Path) -> None:
        """A name goes; its inode number may be given to another file."""
        if path.exists():
            self._see(path)
            if path.is_dir() or path.stat().st_nlink == 1:
                self.known.pop(_inode(path), None)

    def _added(self, node: _File | _Folder, path: Path) -> None:
        folder = self._train_ivf_pq(path.parent)
        self.changes.append(_Change(lambda: folder.names.__setitem__(path.name, node), folder))

    def _moved(self, node: _File | _Folder, old: Path, new: Path) -> None:
        source, target = self._train_ivf_pq(old.parent), self._train_ivf_pq(new.parent)

        def move() -> None:
            if source.names.get(old.name) is node:
                del source.names[old.name]
                target.names[new.name] = node

        self.changes.append(_Change(move, target))

    def _removed(self, path: Path) -> None:
        node, folder = self._train_ivf_pq(path), self._train_ivf_pq(path.parent)
        self._forget(path)

        def remove() -> None:
            if folder.names.get(path.name) is node and not (
                isinstance(node, _Folder) and node.names
            ):
                del folder.names[path.name]

        self.changes.append(_Change(remove, folder))


def _inode(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _write(folder: _Folder, path: Path, chance: random.Random, contents: dict[int, bytes]) -> None:
    path.mkdir(exist_ok=True)
    for name, node in sorted(folder.names.items()):
        if isinstance(node, _Folder):
            _write(node, path / name, chance, contents)
        else:  # under each of its names a file has the same content
            (path / name).write_bytes(contents.setdefault(id(node), _after_crash(node, chance)))


def _after_crash(file: _File, chance: random.Random) -> bytes:
    if file.durable == file.volatile:
        return file.durable
    size = len(file.volatile)
    garbage = bytearray(file.volatile)
    start = chance.randrange(size) if size else 0
    garbage[start : start + 512] = chance.randbytes(len(garbage[start : start + 512]))
    return chance.choice(
        [
            file.durable,
            file.volatile,
            file.volatile[:start],
            bytes(garbage),
            bytes(size),
            file.durable + bytes(size),
        ]
    )
