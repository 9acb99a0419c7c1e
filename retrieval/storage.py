"""Artefact folders that can be trusted: written once, complete or absent, with a digest per file.

A folder is built under a temporary name beside its place. When its files are complete they are flushed to disk, listed
with size and digest in `manifest.json` (written last), read back, and the folder is renamed to its place:

    .index.3f9a.tmp/            index/
      index.faiss      rename     index.faiss
      ids.parquet     ------->    ids.parquet
      manifest.json               manifest.json

Whoever is killed half-way leaves only a temporary name, which the next writer to the same place removes. The digests
detect damage, not an attacker who can rewrite the manifest too.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from retrieval.manifest import JSON, ArtefactError, FileEntry, Manifest, decode, encode, fingerprint_of

try:
    import fcntl
except ImportError:  # Windows: what a killed writer leaves behind stays
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
T = TypeVar("T")

__all__ = [
    "JSON",
    "MANIFEST",
    "ArtefactError",
    "FileEntry",
    "Manifest",
    "fingerprint",
    "new_folder",
    "read_manifest",
    "read_whole",
    "seal",
    "verify",
    "write_bytes",
    "write_file",
    "write_json",
    "write_text",
]


@contextmanager
def new_folder(
    path: Path | str, *, kind: str, meta: Mapping[str, JSON] = MappingProxyType({}), overwrite: bool = False
) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `path` when the block ends without an exception.

    Args:
        path: the folder to make; its parents are made when missing.
        kind: what the folder is; whoever opens it asks for this word.
        meta: facts to store in the manifest, read when the block ends: counts may be filled in until then.
        overwrite: replace a finished folder of the same kind, in one step; the old one is removed afterwards.

    Raises:
        ArtefactError: `path` exists and `overwrite` is False, or it is not a finished folder of this kind.
    """
    path = Path(path)
    _check_place(path, kind, overwrite)
    with _temporary(path, folder=True) as temporary:
        yield temporary
        seal(temporary, kind=kind, meta=meta)
        verify(temporary)
        _check_place(path, kind, overwrite)
        _move_folder(temporary, path)


def seal(folder: Path | str, *, kind: str, meta: Mapping[str, JSON] = MappingProxyType({})) -> Manifest:
    """Flush every file of a folder to disk, then write its manifest: from now on the folder is finished.

    For writers that fill a folder over several runs; others use `new_folder`.
    """
    folder = Path(folder)
    names = sorted(_names(folder))
    for name in names:
        _fsync(folder / name)
    for directory in {(folder / name).parent for name in names} | {folder}:
        _fsync(directory)
    files = {name: FileEntry((folder / name).stat().st_size, _sha256(folder / name)) for name in names}
    manifest = Manifest(kind, meta, files, fingerprint_of(files))
    write_bytes(folder / MANIFEST, encode(manifest))
    return manifest


@contextmanager
def write_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary file name to write to; when the block ends it is flushed to disk and becomes `path`.

    An existing `path` is replaced in one step; on an exception it stays as it was.
    """
    path = Path(path)
    with _temporary(path, folder=False) as temporary:
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write a small file: after a crash at any moment it is the old one or the new one, never a part."""
    with write_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path | str, text: str) -> None:
    """`write_bytes` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path | str, data: JSON) -> None:
    """`write_bytes` of readable JSON; NaN and infinity are refused, since JSON has none."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_manifest(path: Path | str, kind: str | None = None) -> Manifest:
    """Read the manifest of a finished folder.

    Args:
        path: the folder.
        kind: what the folder must be; None for any.

    Raises:
        ArtefactError: no such folder, not finished, manifest damaged, written by a newer version, or another kind.
    """
    path = Path(path)
    wanted = "a finished artefact" if kind is None else f"a finished {kind} folder"
    if not path.is_dir():
        raise ArtefactError(f"{path}: no such folder; expected {wanted}")
    try:
        data = (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise ArtefactError(
            f"{path} has no {MANIFEST}, so it is not {wanted}: was a run stopped half-way? Run it again"
        ) from None
    manifest = decode(data, path / MANIFEST)
    if kind is not None and manifest.kind != kind:
        raise ArtefactError(f"{path} is a folder of kind {manifest.kind!r}; expected {kind!r}")
    return manifest


def verify(path: Path | str, kind: str | None = None) -> Manifest:
    """Compare size and digest of every file with the manifest, which is returned.

    Raises:
        ArtefactError: naming the file, what the manifest says and what is there.
    """
    path = Path(path)
    manifest = read_manifest(path, kind)
    for name, entry in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise ArtefactError(f"{file} is missing; the manifest lists it with {entry.bytes} bytes")
        size = file.stat().st_size
        if size != entry.bytes:
            raise ArtefactError(f"{file} is damaged: expected {entry.bytes} bytes, found {size}")
        digest = _sha256(file)
        if digest != entry.sha256:
            raise ArtefactError(f"{file} is damaged: expected sha256 {entry.sha256}, found {digest}")
    return manifest


def read_whole(path: Path | str, read: Callable[[Path], T]) -> T:
    """`read(path)`, again if another folder took this place meanwhile: never half of one and half of the other.

    Args:
        path: an artefact folder.
        read: opens what it needs of it.

    Raises:
        ArtefactError: as `read` does on a folder that nobody replaced.
    """
    path = Path(path)
    while True:
        before = _identity(path)
        try:
            result = read(path)
        except (ArtefactError, OSError):
            if _identity(path) == before:
                raise
            continue
        if _identity(path) == before:
            return result


def fingerprint(path: Path | str) -> str:
    """The fingerprint in a folder's manifest: equal content, equal fingerprint. Needs no torch, reads no big file."""
    return read_manifest(path).fingerprint


def _names(folder: Path) -> Iterator[str]:
    for file in folder.rglob("*"):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name != MANIFEST and not (file.name.startswith(".") and file.name.endswith(".tmp")):
            yield name


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows has no handle of a directory
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_place(path: Path, kind: str, overwrite: bool) -> None:
    """Refuse to replace anything but a finished folder of the same kind, and that only when asked."""
    if not (path.exists() or path.is_symlink()):
        return
    if not overwrite:
        raise ArtefactError(f"{path} already exists: choose another place, or replace it with overwrite")
    if path.is_symlink():
        raise ArtefactError(f"{path} is a symbolic link: give the folder itself to overwrite it")
    if read_manifest(path).kind != kind:
        raise ArtefactError(f"{path} is not a folder of kind {kind!r} and is not overwritten")


def _move_folder(temporary: Path, path: Path) -> None:
    old = temporary.with_suffix(".old")  # not swept: killed between the two renames, this is the only copy
    if not path.exists():
        os.rename(temporary, path)  # a folder that another writer finished meanwhile makes this fail
    elif _exchange(temporary, path):
        old = temporary
    else:
        os.rename(path, old)
        try:
            os.rename(temporary, path)
        except BaseException:
            os.rename(old, path)
            raise
    _fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step where the system can (Linux); returns whether it did."""
    if sys.platform != "linux":
        return False
    at_cwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    result: int = renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), rename_exchange)
    return result == 0


@contextmanager
def _temporary(path: Path, folder: bool) -> Iterator[Path]:
    """A locked temporary name beside `path`, gone after the block; what killed writers left there is removed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        if folder:
            temporary.mkdir()
        else:
            temporary.touch(exist_ok=False)
        lock = _open_locked(temporary)
        if lock is not None:
            if lock.ours is not False and temporary.exists():
                break
            os.close(lock.descriptor)  # another writer's sweep came between
    try:
        yield temporary
    finally:
        _remove(temporary)
        os.close(lock.descriptor)


def _sweep(path: Path) -> None:
    """Remove temporaries of `path` whose writer is gone: the system drops a dead process's locks."""
    for stale in path.parent.iterdir():
        if not (stale.name.startswith(f".{path.name}.") and stale.name.endswith(".tmp")):
            continue
        lock = _open_locked(stale)
        if lock is not None:
            if lock.ours:
                _remove(stale)
            os.close(lock.descriptor)


class _Lock(NamedTuple):
    descriptor: int
    ours: bool | None  # False = another process holds it, None = this volume or system has no locks


def _open_locked(path: Path) -> _Lock | None:
    """Open a file or folder and try to lock it; None where it does not exist."""
    try:
        descriptor = os.open(os.devnull if fcntl is None else path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if fcntl is None:
        return _Lock(descriptor, None)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _Lock(descriptor, False)
    except OSError:
        return _Lock(descriptor, None)
    return _Lock(descriptor, True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
