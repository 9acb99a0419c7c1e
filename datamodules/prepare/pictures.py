"""The picture files that a cell names: found inside one folder only, read, and made small once."""

from __future__ import annotations

import hashlib
import re
import stat
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tritower.datamodules.bad_value import BadValue, excerpt
from tritower.datamodules.images import LIMITS, WHITE, ImageError, Limits, downsize
from tritower.datamodules.prepare.tables import CatalogueError
from tritower.datamodules.prepare.values import Cell, parse_list

# Addresses such as http://, file:// and \\server.
_REMOTE = re.compile(r"[a-z][a-z0-9+.-]+://|data:|//|\\\\", re.IGNORECASE)


@dataclass(frozen=True)
class PictureReader:
    """Reads the pictures of a product or query.

    Args:
        root: the folder that picture files lie in; nothing outside of it is opened.
        max_side: of the stored pictures, in pixels.
        separator: between several pictures in one cell.
        background: RGB behind transparent pixels.
        limits: what is refused before decoding.
    """

    root: Path
    max_side: int = 256
    separator: str = "|"
    background: tuple[int, int, int] = WHITE
    limits: Limits = LIMITS

    def check(self) -> None:
        """Refuse settings with which no picture can be read.

        Raises:
            CatalogueError: naming the setting.
        """
        if not self.root.is_dir():
            raise CatalogueError(f"--image-root {self.root}: no such folder")
        if self.max_side < 16:
            raise CatalogueError(
                f"--image-size {self.max_side}: at least 16 pixels are needed to see anything"
            )

    def read(self, cell: Cell) -> tuple[list[bytes], list[BadValue]]:
        """The pictures of one cell, small and ready to decode, and the problems of the others."""
        pictures: list[bytes] = []
        problems: list[BadValue] = []
        try:
            # Each picture of a cell by itself: a bad one does not cost the others.
            for part in self._parts(cell):
                try:
                    if isinstance(part, bytes):
                        data = part
                    else:
                        data = self._file(part)
                    pictures.append(
                        downsize(
                            data, self.max_side, background=self.background, limits=self.limits
                        )
                    )
                except ImageError as error:
                    if isinstance(part, bytes):
                        named = ""
                    else:
                        named = f": {_named(part)}"
                    problems.append(BadValue(error.code, error.reason + named))
                except BadValue as error:
                    problems.append(error)
        except BadValue as error:
            problems.append(error)
        return pictures, problems

    def _parts(self, cell: Cell) -> Iterator[str | bytes]:
        """File names or encoded pictures: text, a list, bytes, or `{"bytes": ..., "path": ...}`."""
        if isinstance(cell, bytes):
            yield cell
        elif isinstance(cell, Mapping):
            yield from self._parts(cell.get("bytes") or cell.get("path"))
        elif isinstance(cell, list) and any(isinstance(part, (bytes, Mapping)) for part in cell):
            for part in cell:
                yield from self._parts(part)
        else:
            # A file named twice is one picture.
            yield from dict.fromkeys(parse_list(cell, self.separator))

    def _file(self, name: str) -> bytes:
        """The bytes of a file inside `root`.

        Raises:
            BadValue: REMOTE_NOT_ALLOWED, PATH_OUTSIDE_ROOT, FILE_MISSING, FILE_TOO_LARGE or
                FILE_UNREADABLE.
        """
        if _REMOTE.match(name):
            raise BadValue(
                "REMOTE_NOT_ALLOWED",
                f"{excerpt(name)} is an address; only files under --image-root are read",
            )
        try:
            # Only regular files under the picture folder are read.
            path = self._inside(name)
            if path is None or not stat.S_ISREG((found := path.stat()).st_mode):
                raise BadValue(
                    "FILE_MISSING", f"no such file under the picture folder: {_named(name)}"
                )
            if found.st_size > self.limits.max_bytes:
                limit = self.limits.max_bytes
                reason = f"{found.st_size:,} bytes; at most {limit:,} are read: {_named(name)}"
                raise BadValue("FILE_TOO_LARGE", reason)
            return path.read_bytes()
        except (
            OSError,
            ValueError,
            RuntimeError,
        ) as error:  # a NUL character; links that lead in a circle
            if isinstance(error, BadValue):
                raise
            raise BadValue("FILE_UNREADABLE", f"{excerpt(error)}: {_named(name)}") from None

    def _inside(self, name: str) -> Path | None:
        """The real path of a file, whichever way its accents are written.

        None where there is none.
        """
        root = self.root.resolve()
        # File systems differ in how they store accents: try both normal forms.
        for form in dict.fromkeys(
            (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))
        ):
            path = (root / form).resolve()
            if not path.is_relative_to(root):
                raise BadValue(
                    "PATH_OUTSIDE_ROOT", f"{_named(name)} leads out of the picture folder"
                )
            if path.exists():
                return path
        return None


def _named(name: str) -> str:
    return excerpt(name, 300)  # file names in full: they are to be found


def digest(picture: bytes) -> bytes:
    """What equal stored pictures have in common, 16 bytes."""
    return hashlib.blake2b(picture, digest_size=16).digest()
