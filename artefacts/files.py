"""The file operations of artefacts, in one place.

Tests put a system there whose k-th operation fails.

Everything that changes an artefact goes through `system`, one method for each system call. A disk
that fails is an `ArtefactError` that names the file; where the system call itself names it, its
OSError is kept.
"""

from __future__ import annotations

import ctypes
import io
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from tritower.artefacts.manifest import ArtefactError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

BUFFER_BYTES = 1 << 20
"""Bytes that `create` collects before it writes them."""


class System:
    """The operations as the operating system does them."""

    def open(self, path: Path, flags: int) -> int:
        """Open a file or folder; returns its descriptor."""
        return os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)

    def write(self, descriptor: int, data: ReadableBuffer) -> int:
        """Write what fits; returns how many bytes that were."""
        return os.write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        """Wait until the content of a file, or the names in a folder, are on disk."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close; the descriptor is gone even where this fails."""
        os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """Rename to a name that is free."""
        os.rename(old, new)

    def replace(self, old: Path, new: Path) -> None:
        """Rename a file, in place of another one."""
        os.replace(old, new)

    def exchange(self, one: Path, other: Path) -> bool:
        """Swap two names in one step where the system can (Linux); returns whether it did."""
        if sys.platform != "linux":
            return False
        # renameat2(2) with RENAME_EXCHANGE swaps two names atomically. Python has no binding for
        # it, so libc is called directly; -100 is AT_FDCWD, "relative to the working directory".
        at_cwd = -100
        rename_exchange = 2
        try:
            renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
        except (AttributeError, OSError):
            return False
        result: int = renameat2(
            at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), rename_exchange
        )
        return result == 0

    def link(self, old: Path, new: Path) -> None:
        """Give a file a second name."""
        os.link(old, new)

    def mkdir(self, path: Path) -> None:
        """Make one folder."""
        os.mkdir(path)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        os.unlink(path)

    def rmtree(self, path: Path) -> None:
        """Remove a folder with all it holds."""
        shutil.rmtree(path)


system = System()


@contextmanager
def naming(path: Path, problem: str) -> Iterator[None]:
    """Turn an OSError without a file name into an ArtefactError that names the file."""
    try:
        yield
    except OSError as error:
        raise ArtefactError(f"{path} {problem}: {error.strerror or error}") from error


def create(path: Path | str) -> BinaryIO:
    """Open a new file for writing, through `system`; an existing one is emptied.

    FAISS writes to it by `faiss.PyCallbackIOWriter(file.write)`, Arrow and Parquet take it as it
    is. It is not flushed to disk: `storage.seal` and `storage.write_file` do that to all they
    finish.

    Raises:
        ArtefactError: what could not be written. At the end of a `with` block also where a library
            in between has made another error of it, or none.
    """
    return cast(BinaryIO, _Writer(_Descriptor(Path(path)), BUFFER_BYTES))


class _Descriptor(io.RawIOBase):
    """An open file descriptor. Its first failure is raised again by all that follows."""

    def __init__(self, path: Path) -> None:
        self.failure: ArtefactError | None = None
        self._path = path
        self._written = 0
        self._descriptor = system.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._written

    def write(self, data: ReadableBuffer) -> int:
        if self.failure is not None:
            raise self.failure
        with self._remembered():
            count = system.write(self._descriptor, data)
        self._written += count
        return count

    def close(self) -> None:
        if not self.closed:
            super().close()
            with self._remembered():
                system.close(self._descriptor)

    @contextmanager
    def _remembered(self) -> Iterator[None]:
        try:
            with naming(self._path, "could not be written"):
                yield
        except ArtefactError as error:
            self.failure = self.failure or error
            raise


class _Writer(io.BufferedWriter):
    """A buffer before a `_Descriptor`, which is closed whatever happens.

    Short writes continue where they stopped.
    """

    raw: _Descriptor

    def __exit__(self, *_: object) -> None:
        try:
            self.close()
        finally:
            if self.raw.failure is not None:
                raise self.raw.failure


def fsync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on disk."""
    if path.is_dir() and os.name == "nt":  # Windows has no handle of a directory
        return
    descriptor = system.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        with naming(path, "could not be flushed to disk"):
            system.fsync(descriptor)
    finally:
        with suppress(OSError):  # nothing was written through it
            system.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and the missing ones above it; their names are on disk when this returns."""
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    for folder in reversed(missing):
        # Another process was quicker; a file of that name fails below.
        with suppress(FileExistsError):
            system.mkdir(folder)
        fsync(folder.parent)
    if not path.is_dir():
        raise ArtefactError(f"{path} is a file; expected a folder, or nothing")


def remove(path: Path) -> None:
    """Remove a file or a folder as far as that goes.

    What stays is a temporary name that the next writer removes.
    """
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            system.rmtree(path)
        else:
            system.unlink(path)
