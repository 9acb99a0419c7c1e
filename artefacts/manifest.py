"""The manifest of an artefact folder: what it is, what it holds, and the digests that prove it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

VERSION = 2
"""Of the manifest's own layout; what a type of folder holds is versioned in its `meta`.

A manifest without samples is written as version 1, which knew none.
"""


class ArtefactError(Exception):
    """An artefact is missing, unfinished, damaged, of another type, or in the way."""


@dataclass(frozen=True)
class FileEntry:
    """One file in the manifest.

    Attributes:
        bytes: its size.
        sha256: hexadecimal digest of its bytes.
        sample: hexadecimal sha256 of some blocks of a large file; None for others.
    """

    bytes: int
    sha256: str
    sample: str | None = None


@dataclass(frozen=True)
class Manifest:
    """What a finished folder holds.

    Attributes:
        artefact_type: what the folder is: "catalogue", "embeddings", "model", "index".
        meta: facts about the content, plain JSON.
        files: name inside the folder ("products/shard-00000.parquet") -> size and digest.
        fingerprint: sha256 over names and digests of the files: equal content, equal fingerprint.
    """

    artefact_type: str
    meta: Mapping[str, Any]
    files: Mapping[str, FileEntry]
    fingerprint: str


def encode(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`: readable JSON that ends with a digest of all the rest."""
    body: dict[str, Any] = {
        "kind": manifest.artefact_type,
        "version": VERSION if any(entry.sample for entry in manifest.files.values()) else 1,
        "meta": dict(manifest.meta),
        "files": {name: _facts(entry) for name, entry in manifest.files.items()},
        "fingerprint": manifest.fingerprint,
    }
    body["digest"] = hashlib.sha256(_dump(body)).hexdigest()
    return _dump(body)


def _facts(entry: FileEntry) -> dict[str, JSON]:
    facts: dict[str, JSON] = {"bytes": entry.bytes, "sha256": entry.sha256}
    if entry.sample is None:
        return facts
    return {**facts, "sample": entry.sample}


def _dump(body: Mapping[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def decode(data: bytes, file: Path) -> Manifest:
    """Undo `encode`. Every byte counts: what does not encode to the same bytes again is damaged.

    Args:
        data: the bytes of a manifest.
        file: where they come from, for the messages.

    Raises:
        ArtefactError: damaged, written by a newer version, or listing a file outside its folder.
    """
    try:
        body = json.loads(data.decode("utf-8"))
        version = body["version"]
        if isinstance(version, int) and version > VERSION:
            raise ArtefactError(
                f"{file}: manifest version {version}, this program reads up to {VERSION}: upgrade "
                "it"
            )
        # The content is intact if encoding it again gives the same bytes, and if the fingerprint
        # follows from the digests of the files.
        files = {
            name: FileEntry(entry["bytes"], entry["sha256"], entry.get("sample"))
            for name, entry in body["files"].items()
        }
        manifest = Manifest(body["kind"], body["meta"], files, body["fingerprint"])
        intact = encode(manifest) == data and manifest.fingerprint == fingerprint_of(files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise ArtefactError(f"{file} is damaged: its content does not match its own digest")
    # A manifest must not make a reader open files elsewhere.
    for name in files:
        if not _inside(name):
            raise ArtefactError(f"{file} lists a file outside its folder: {name!r}")
    return manifest


def _inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return (
        bool(parts)
        and not name.startswith("/")
        and ".." not in parts
        and "\\" not in name
        and ":" not in name
    )


def fingerprint_of(files: Mapping[str, FileEntry]) -> str:
    """The sha256 over names and digests of all files, in the order of their names."""
    lines = json.dumps([[name, files[name].sha256] for name in sorted(files)])
    return hashlib.sha256(lines.encode("ascii")).hexdigest()
