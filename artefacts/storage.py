"""Artefact folders that can be trusted: written once, complete or absent, with a digest per file.

A folder is built under a temporary name beside its place. When its files are complete they are
flushed to disk, listed with size and digest in `manifest.json` (written last), read back, and the
folder is renamed to its place:

    .index.3f9a.tmp/            index/
      index.faiss      rename     index.faiss
      ids.parquet     ------->    ids.parquet
      manifest.json               manifest.json

Whoever is killed half-way leaves only a temporary name, which the next writer to the same place
removes. The digests detect damage, not an attacker who can rewrite the manifest too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from tritower.artefacts import files
from tritower.artefacts.files import create, make_folder
from tritower.artefacts.manifest import (
    JSON,
    ArtefactError,
    FileEntry,
    Manifest,
    decode,
    encode,
    fingerprint_of,
)
from tritower.artefacts.temporaries import is_temporary, temporary

MANIFEST = "manifest.json"
LARGE_BYTES = 256 << 20
"""Of a file of more bytes, a fast `verify` compares blocks only."""
SAMPLE_BLOCKS = 256
SAMPLE_BLOCK_BYTES = 64 << 10
T = TypeVar("T")

__all__ = [
    "JSON",
    "MANIFEST",
    "ArtefactError",
    "FileEntry",
    "Manifest",
    "create",
    "fingerprint",
    "make_folder",
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
    path: Path | str,
    *,
    artefact_type: str,
    meta: Mapping[str, JSON] = MappingProxyType({}),
    overwrite: bool = False,
) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `path` when the block ends without an exception.

    Args:
        path: the folder to make; its parents are made when missing.
        artefact_type: type of the folder, required again when it is opened.
        meta: facts to store in the manifest, read when the block ends: counts may be filled in
            until then.
        overwrite: replace a finished folder of the same type, in one step; the old one is removed
            afterwards.

    Raises:
        ArtefactError: `path` exists and `overwrite` is False, or it is not a finished folder of
            this type.
    """
    path = Path(path)
    _check_place(path, artefact_type, overwrite)
    with temporary(path, folder=True) as new:
        yield new.path
        seal(new.path, artefact_type=artefact_type, meta=meta)
        verify(new.path)
        _check_place(path, artefact_type, overwrite)
        _move_folder(new.path, path)


def seal(
    folder: Path | str, *, artefact_type: str, meta: Mapping[str, JSON] = MappingProxyType({})
) -> Manifest:
    """Flush every file of a folder to disk, then write its manifest.

    From now on the folder is finished.

    For writers that fill a folder over several runs; others use `new_folder`.
    """
    folder = Path(folder)
    names = sorted(_names(folder))
    for name in names:
        files.fsync(folder / name)
    for directory in sorted({above for name in names for above in Path(name).parents} | {Path()}):
        files.fsync(folder / directory)
    entries = {name: _entry(folder / name) for name in names}
    manifest = Manifest(artefact_type, meta, entries, fingerprint_of(entries))
    write_bytes(folder / MANIFEST, encode(manifest))
    return manifest


@contextmanager
def write_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary file name to write to.

    When the block ends it is flushed to disk and becomes `path`.

    An existing `path` is replaced in one step; on an exception it stays as it was.
    """
    path = Path(path)
    with temporary(path, folder=False) as new:
        yield new.path
        files.fsync(new.path)
        files.system.replace(new.path, path)
        files.fsync(path.parent)


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write a small file: after a crash it is the old one or the new one, never a part."""
    with write_file(path) as new, create(new) as file:
        file.write(data)


def write_text(path: Path | str, text: str) -> None:
    """`write_bytes` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path | str, data: JSON) -> None:
    """`write_bytes` of readable JSON; NaN and infinity are refused, since JSON has none."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_manifest(path: Path | str, artefact_type: str | None = None) -> Manifest:
    """Read the manifest of a finished folder.

    Args:
        path: the folder.
        artefact_type: what the folder must be; None for any.

    Raises:
        ArtefactError: no such folder, not finished, manifest damaged, written by a newer version,
            or another type.
    """
    path = Path(path)
    if artefact_type is None:
        wanted = "a finished artefact"
    else:
        wanted = f"a finished {artefact_type} folder"
    if not path.is_dir():
        raise ArtefactError(f"{path}: no such folder; expected {wanted}")
    # The manifest is written last: a folder without one is unfinished.
    try:
        data = (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise ArtefactError(
            f"{path} has no {MANIFEST}, so it is not {wanted}: was a run stopped half-way? Run it "
            "again"
        ) from None
    manifest = decode(data, path / MANIFEST)
    if artefact_type is not None and manifest.artefact_type != artefact_type:
        raise ArtefactError(
            f"{path} is a folder of type {manifest.artefact_type!r}; expected {artefact_type!r}"
        )
    return manifest


def verify(path: Path | str, artefact_type: str | None = None, *, fast: bool = False) -> Manifest:
    """Compare size and digest of every file with the manifest, which is returned.

    Args:
        path: the folder.
        artefact_type: what the folder must be; None for any.
        fast: of files over 256 MiB read 256 blocks only, spread evenly: finds a file that is cut,
            exchanged or partly lost, not each flipped bit.

    Raises:
        ArtefactError: naming the file, its entry in the manifest and its actual state.
    """
    path = Path(path)
    manifest = read_manifest(path, artefact_type)
    for name, entry in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise ArtefactError(
                f"{file} is missing; the manifest lists it with {entry.bytes} bytes"
            )
        # The size is compared first: it is free, and finds most damage.
        size = file.stat().st_size
        if size != entry.bytes:
            raise ArtefactError(f"{file} is damaged: expected {entry.bytes} bytes, found {size}")
        if fast and entry.sample is not None:
            what = "sha256 of its sample"
            expected = entry.sample
            digest = _sample_sha256(file)
        else:
            what = "sha256"
            expected = entry.sha256
            digest = _sha256(file)
        if digest != expected:
            raise ArtefactError(f"{file} is damaged: expected {what} {expected}, found {digest}")
    return manifest


def read_whole(path: Path | str, read: Callable[[Path], T]) -> T:
    """`read(path)`, again if another folder took this place meanwhile.

    Never half of one and half of the other.

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
    """The fingerprint in a folder's manifest.

    Equal content, equal fingerprint. Needs no torch, reads no big file.
    """
    return read_manifest(path).fingerprint


def _names(folder: Path) -> Iterator[str]:
    for file in folder.rglob("*"):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name != MANIFEST and not is_temporary(file.name):
            yield name


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _entry(file: Path) -> FileEntry:
    """Size and digests of a file, which is dropped from the cache then.

    Whoever reads it back reads the disk.
    """
    size = file.stat().st_size
    entry = FileEntry(size, _sha256(file), _sample_sha256(file) if size > LARGE_BYTES else None)
    # Not every system has posix_fadvise (AttributeError).
    with (
        suppress(AttributeError, OSError),
        file.open("rb") as stream,
    ):
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return entry


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sample_sha256(file: Path) -> str:
    """The digest of blocks that are spread evenly, the first and the last byte among them."""
    digest = hashlib.sha256()
    last = max(file.stat().st_size - SAMPLE_BLOCK_BYTES, 0)
    with file.open("rb") as stream:
        for number in range(SAMPLE_BLOCKS):
            stream.seek(last * number // (SAMPLE_BLOCKS - 1))
            digest.update(stream.read(SAMPLE_BLOCK_BYTES))
    return digest.hexdigest()


def _check_place(path: Path, artefact_type: str, overwrite: bool) -> None:
    """Refuse to replace anything but a finished folder of the same type, when asked to."""
    if not (path.exists() or path.is_symlink()):
        return
    if not overwrite:
        raise ArtefactError(
            f"{path} already exists: choose another place, or replace it with overwrite"
        )
    if path.is_symlink():
        raise ArtefactError(f"{path} is a symbolic link: give the folder itself to overwrite it")
    if read_manifest(path).artefact_type != artefact_type:
        raise ArtefactError(
            f"{path} is not a folder of type {artefact_type!r} and is not overwritten"
        )


def _move_folder(new: Path, path: Path) -> None:
    # Its name is not swept: after a kill between two renames it would be the only copy.
    old = new.with_suffix(".old")
    # Three ways, the safest first: take a free name, swap both names in one step, or rename twice
    # and undo the first rename if the second fails.
    if not path.exists():
        # This fails if another writer has finished the folder meanwhile.
        files.system.rename(new, path)
    elif files.system.exchange(new, path):
        old = new
    else:
        files.system.rename(path, old)
        try:
            files.system.rename(new, path)
        except BaseException:
            files.system.rename(old, path)
            raise
    files.fsync(path.parent)
    files.remove(old)
