"""Temporary names and locks: who writes, and who reads.

A writer locks its temporary name, a reader the folder that it reads. The system drops the locks of
a process that dies, so a name that can be locked belongs to nobody and may be removed.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from tritower.artefacts import files

try:
    import fcntl
except ImportError:  # Windows: what a killed writer leaves behind stays
    fcntl = None  # type: ignore[assignment]


class Lock:
    """An open file or folder with a lock on it, until it is closed or its process dies.

    Attributes:
        held: whether the lock is ours; False = another process has it, None = this volume or system
            has no locks.
    """

    def __init__(self, descriptor: int, held: bool | None) -> None:
        self.held = held
        self._descriptor: int | None = descriptor

    def is_of(self, path: Path) -> bool:
        """Whether the locked folder still has this name: it may have been renamed or removed."""
        if fcntl is None:
            return path.exists()
        try:
            return self._descriptor is not None and os.path.samestat(
                os.fstat(self._descriptor), path.stat()
            )
        except FileNotFoundError:
            return False

    def share(self) -> None:
        """Let others share it; nobody may have it alone."""
        if self.held:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)  # type: ignore[arg-type]

    def close(self) -> None:
        """Give the lock back."""
        descriptor = self._descriptor
        self._descriptor = None
        if descriptor is not None:
            with suppress(OSError):  # nothing was written through it
                files.system.close(descriptor)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def lock(path: Path, *, shared: bool = False, wait: bool = False) -> Lock | None:
    """Lock a file or folder; None where it does not exist.

    Args:
        path: what to lock.
        shared: with others who share it; else alone.
        wait: until its holder releases it; else see `held`.
    """
    # Windows has no flock: the lock is then unknown (None), and stale temporaries stay.
    # Without fcntl (Windows) or on file systems without locks, nothing is known about other users.
    try:
        descriptor = files.system.open(Path(os.devnull) if fcntl is None else path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if fcntl is None:
        return Lock(descriptor, None)
    try:
        fcntl.flock(
            descriptor,
            (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB),
        )
    except BlockingIOError:
        return Lock(descriptor, False)
    except OSError:
        return Lock(descriptor, None)
    return Lock(descriptor, True)


class Temporary(NamedTuple):
    """A temporary name and the lock on it."""

    path: Path
    lock: Lock


@contextmanager
def temporary(path: Path, *, folder: bool) -> Iterator[Temporary]:
    """A locked temporary name beside `path`, gone after the block.

    What killed writers left there is removed first.
    """
    # Make a name and lock it. Between the two, a sweep of another writer may remove it: then again.
    taken = None
    while taken is None:
        files.make_folder(path.parent)
        # Another run that fails may have just removed the parent folder that it had made.
        with suppress(FileNotFoundError):
            sweep(path)
            name = temporary_name(path)
            if folder:
                files.system.mkdir(name)
            else:
                files.create(name).close()
            taken = lock(name)
        if taken is not None and (taken.held is False or not taken.is_of(name)):
            taken.close()  # another writer's sweep came between
            taken = None
    try:
        yield Temporary(name, taken)
    finally:
        files.remove(name)
        taken.close()


def temporary_name(path: Path) -> Path:
    """A new name beside `path` that `sweep` recognizes."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def is_temporary(name: str) -> bool:
    """Whether a name is one of ours."""
    return name.startswith(".") and name.endswith(".tmp")


def sweep(path: Path) -> None:
    """Remove temporaries of `path` whose writer is gone."""
    for stale in path.parent.iterdir():
        if not (stale.name.startswith(f".{path.name}.") and is_temporary(stale.name)):
            continue
        taken = lock(stale)
        if taken is not None:
            if taken.held:
                files.remove(stale)
            taken.close()
