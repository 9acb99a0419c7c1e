"""Versions of an artefact in one place.

Each is written once, one is in use, and none is changed or removed while somebody reads it.

    index/
      CURRENT             "000002": the version in use, replaced in one step
      versions/
        000001/           an artefact folder as `storage` makes it
        000002/

Publishing makes a new version beside the others, flushes it, reads it back, gives it its number and
only then names it in `CURRENT`. Whoever is killed on the way leaves the old version in use and a
temporary name, which the next writer removes. Readers hold a shared lock on the version they have
open; one that is held is not removed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from tritower.artefacts import files, storage
from tritower.artefacts.storage import JSON, MANIFEST, ArtefactError
from tritower.artefacts.temporaries import (
    Lock,
    is_temporary,
    lock,
    sweep,
    temporary,
    temporary_name,
)

logger = logging.getLogger(__name__)

CURRENT = "CURRENT"
VERSIONS = "versions"
T = TypeVar("T")


class Opened(NamedTuple, Generic[T]):
    """What `open_version` opened.

    Attributes:
        result: what `read` returned.
        path: the version folder.
        note: why this is not the current version; empty where it is.
        hold: keep it for as long as files of the folder are in use: it keeps the folder from being
            removed.
    """

    result: T
    path: Path
    note: str
    hold: Lock | None


@contextmanager
def publish(
    root: Path | str,
    *,
    artefact_type: str,
    meta: Mapping[str, JSON],
    base: str | None = None,
    keep: int = 2,
) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes the version in use when the block ends.

    Nothing is published after an exception.

    Args:
        root: the place of all versions; made when missing.
        artefact_type: type of a version, required again when it is opened.
        meta: facts to store in the manifest, read when the block ends.
        base: name of the version that this work started from; None = the one in use when the block
            begins. If another one is in use when the block ends, nothing is published.
        keep: versions to keep, the new one among them; older ones go once nobody reads them.

    Raises:
        ArtefactError: `root` is something else, another publisher was quicker, or the version could
            not be written.
    """
    root = Path(root)
    if keep < 1:
        raise ValueError(f"keep={keep}; expected at least 1, the version in use")
    _check_place(root, artefact_type)
    if base is None:
        # Remember the version that this work starts from; another one at the end is a conflict.
        started_from = _pointer(root)
    else:
        started_from = f"{base}\n".encode()
    _check_base(root, started_from)
    with temporary(root / VERSIONS / "version", folder=True) as new:
        # Fill the folder, flush it, and read it back before anybody can see it.
        yield new.path
        storage.seal(new.path, artefact_type=artefact_type, meta=meta)
        storage.verify(new.path)
        new.lock.share()  # from CURRENT's change on it has readers
        # One publisher at a time compares CURRENT, switches it and removes old versions.
        with _alone(root):
            _check_base(root, started_from)
            overtaken = _newer_than_current(root)
            _switch_to(root, new.path)
            _tidy(root, overtaken, keep)


def current(root: Path | str) -> Path:
    """The folder of the version in use.

    Raises:
        ArtefactError: nothing there, or `CURRENT` is missing, damaged or names a version that is
            not there.
    """
    root = Path(root)
    # CURRENT may change between reading it and looking at the folder: then read it again.
    while True:
        pointer = _pointer(root)
        name = _name_in(pointer or b"")
        if name is not None and (root / VERSIONS / name / MANIFEST).is_file():
            return root / VERSIONS / name
        # The pointer has not changed, so the version is really missing.
        if pointer == _pointer(root):
            break
    if pointer is None:
        if root.is_dir():
            problem = f"{root} has no {CURRENT}"
        else:
            problem = f"{root}: no such folder"
    elif name is None:
        problem = (
            f"{root / CURRENT} is damaged: expected the name of a version such as 000001, found "
            f"{pointer[:40]!r}"
        )
    else:
        problem = f"{root / CURRENT} names version {name}, which "
        problem += f"has no {MANIFEST}" if (root / VERSIONS / name).is_dir() else "is not there"
    # Tell how to get a readable index back.
    there = [folder.name for folder in versions(root)]
    if there:
        remedy = f"write one of the versions there into it ({', '.join(there)}), or build anew"
    else:
        remedy = "build it"
    raise ArtefactError(f"{problem}: {remedy}")


def versions(root: Path | str) -> list[Path]:
    """The folders of all finished versions, oldest first, whether in use or not."""
    result = []
    for _, folder in sorted(_numbered(Path(root)).items()):
        if (folder / MANIFEST).is_file():
            result.append(folder)
    return result


def open_version(root: Path | str, read: Callable[[Path], T], fall_back: bool = True) -> Opened[T]:
    """`read(folder)` of the version in use, or of the newest older one that reads well.

    Args:
        root: the place of all versions, or one artefact folder such as a version.
        read: opens what it needs, and raises ArtefactError or OSError where that is damaged.
        fall_back: whether an older version is better than none; the note, also logged as a warning,
            names the reason.

    Raises:
        ArtefactError: as `read` and `current` do, where nothing else reads well.
    """
    root = Path(root)
    if not _has_versions(root):
        return _open_folder(root, read)
    try:
        return _open_current(root, read)
    except (ArtefactError, OSError) as error:
        if not fall_back:
            raise
        opened = _open_older(root, read, error)
    logger.warning("%s", opened.note)
    return opened


def occupied(root: Path | str) -> bool:
    """Whether a version is in use there, which a publish would replace."""
    return (Path(root) / CURRENT).exists()


def collect(root: Path | str, keep: int = 2) -> list[str]:
    """Remove versions older than the one in use that nobody reads, beyond `keep`.

    Returns their names.

    Args:
        root: the place of all versions.
        keep: versions to keep, the one in use among them.

    Raises:
        ArtefactError: as `current` does.
    """
    root = Path(root)
    if keep < 1:
        raise ValueError(f"keep={keep}; expected at least 1, the version in use")
    with _alone(root):
        sweep(root / VERSIONS / "version")
        return _collect(root, keep)


def _has_versions(root: Path) -> bool:
    return (root / CURRENT).exists() or (
        (root / VERSIONS).is_dir() and not (root / MANIFEST).exists()
    )


def _pointer(root: Path) -> bytes | None:
    """The bytes of `CURRENT`, None where there is none."""
    try:
        return (root / CURRENT).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _name_in(pointer: bytes) -> str | None:
    if re.fullmatch(rb"[0-9]{6,}\n", pointer):
        return pointer[:-1].decode()
    return None


def _numbered(root: Path) -> dict[int, Path]:
    """Number -> folder of everything that has the name of a version."""
    try:
        entries = list((root / VERSIONS).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    result = {}
    for entry in entries:
        if re.fullmatch("[0-9]{6,}", entry.name, re.ASCII):
            result[int(entry.name)] = entry
    return result


def _next(root: Path) -> Path:
    return root / VERSIONS / f"{max(_numbered(root), default=0) + 1:06d}"


def _newer_than_current(root: Path) -> list[Path]:
    """Versions that never came into use, or that somebody went back from.

    None where `CURRENT` is damaged.
    """
    name = _name_in(_pointer(root) or b"")
    if name is None:
        return []
    return [folder for number, folder in _numbered(root).items() if number > int(name)]


def _check_place(root: Path, artefact_type: str) -> None:
    """Refuse a place that holds something else."""
    if root.exists() and not root.is_dir():
        raise ArtefactError(f"{root} is a file; expected a folder, or nothing")
    # Versions of the same type, one artefact folder, or foreign files.
    if there := versions(root):
        with suppress(ArtefactError):
            there.append(current(root))
        _check_artefact_type(there[-1], artefact_type)
    elif (root / MANIFEST).exists():
        _check_artefact_type(root, artefact_type)
        if root.parent.name == VERSIONS:
            raise ArtefactError(
                f"{root} is one version, which never changes: name {root.parent.parent}"
            )
        raise ArtefactError(
            f"{root} is an artefact folder without versions ({artefact_type}): choose another place"
        )
    elif others := _other_things(root):
        raise ArtefactError(
            f"{root} holds other things ({', '.join(others[:5])}): choose a new or empty folder"
        )


def _check_artefact_type(folder: Path, artefact_type: str) -> None:
    try:
        there = storage.read_manifest(folder).artefact_type
    except ArtefactError:
        # A damaged version may be replaced by a good one.
        if folder.parent.name == VERSIONS:
            return
        raise
    if there != artefact_type:
        raise ArtefactError(
            f"{folder} is a folder of type {there!r}, not {artefact_type!r}, and is not replaced"
        )


def _other_things(root: Path) -> list[str]:
    """Names in a place without a version that no publish has put there."""
    if root.is_dir():
        entries = [entry.name for entry in root.iterdir()]
    else:
        entries = []
    if VERSIONS in entries:
        inside = [entry.name for entry in (root / VERSIONS).iterdir()]
    else:
        inside = []
    others = [name for name in entries if name != VERSIONS and not is_temporary(name)]
    return sorted(others + [f"{VERSIONS}/{name}" for name in inside if not is_temporary(name)])


def _check_base(root: Path, started_from: bytes | None) -> None:
    pointer = _pointer(root)
    if pointer != started_from:
        then, now = (_name_in(p or b"") or "no version" for p in (started_from, pointer))
        raise ArtefactError(
            f"conflict at {root}: this run started from {then}, but {now} is in use: another run "
            "has published "
            "meanwhile. Nothing was changed; run again"
        )


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One process at a time changes which versions there are."""
    held = lock(root / VERSIONS, wait=True)
    if held is None:
        raise ArtefactError(f"{root} has no {VERSIONS}: no such place")
    with held:
        yield


def _switch_to(root: Path, new: Path) -> None:
    """Give a finished folder the next number and name it in `CURRENT`."""
    folder = _next(root)
    files.system.rename(new, folder)
    try:
        files.fsync(folder.parent)
        storage.write_text(root / CURRENT, f"{folder.name}\n")
    except BaseException:
        if _pointer(root) != f"{folder.name}\n".encode():
            with suppress(OSError, ArtefactError):  # the next publisher removes it
                _discard(folder)
        raise


def _tidy(root: Path, overtaken: list[Path], keep: int) -> None:
    """Remove what a publish has made superfluous.

    It has succeeded by now: what stays is removed by the next one.
    """
    try:
        for folder in overtaken:
            _discard(folder)
        _collect(root, keep)
    except (OSError, ArtefactError) as error:
        logger.warning("old versions of %s could not all be removed: %s", root, error)


def _collect(root: Path, keep: int) -> list[str]:
    in_use = int(current(root).name)
    older = [folder for number, folder in sorted(_numbered(root).items()) if number < in_use]
    return [folder.name for folder in older[: max(len(older) - keep + 1, 0)] if _discard(folder)]


def _discard(folder: Path) -> bool:
    """Remove a version unless somebody reads it.

    Under a temporary name first, so that half of one is never seen.
    """
    held = lock(folder) if folder.is_dir() else None
    if held is None:
        return False
    with held:
        if not held.held or not held.is_of(folder):
            return False
        old = temporary_name(folder.with_name("version"))
        files.system.rename(folder, old)
        files.fsync(old.parent)
        files.remove(old)
    return True


def _hold(folder: Path, wait: bool = True) -> Lock | None:
    """A reader's lock on a folder; None where it is not there, or not any more."""
    held = lock(folder, shared=True, wait=wait)
    if held is not None and not held.is_of(folder):
        held.close()
        return None
    return held


def _open_folder(folder: Path, read: Callable[[Path], T]) -> Opened[T]:
    """One artefact folder: another one may take its place meanwhile."""
    while True:
        held = _hold(folder, wait=False)  # its writer may be asking
        result = storage.read_whole(folder, read)
        if held is None or held.is_of(folder):
            return Opened(result, folder, "", held)


def _open_current(root: Path, read: Callable[[Path], T]) -> Opened[T]:
    while True:
        folder = current(root)
        held = _hold(folder)
        # Without a lock, the folder was removed meanwhile: another version is in use.
        if held is not None:
            return Opened(read(folder), folder, "", held)


def _open_older(root: Path, read: Callable[[Path], T], error: Exception) -> Opened[T]:
    """The newest good version before the one in use; of all where that is unknown."""
    name = _name_in(_pointer(root) or b"")
    problems = [str(error)]
    # From the newest one down, the first that opens wins.
    for folder in reversed(versions(root)):
        if name is not None and int(folder.name) >= int(name):
            continue
        held = _hold(folder)
        try:
            result = read(folder)
        except (ArtefactError, OSError) as another:
            problems.append(str(another))
            continue
        return Opened(result, folder, f"{root}: version {folder.name} is used, since {error}", held)
    raise ArtefactError(
        "; ".join(problems) + ("; no older version is good" if name else "")
    ) from error
