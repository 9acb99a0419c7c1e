"""Folders for unfinished artefacts: an interrupted run continues where it stopped."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from tritower.artefacts import files, storage
from tritower.artefacts.shards import BEGUN
from tritower.artefacts.storage import ArtefactError
from tritower.artefacts.temporaries import Lock, is_temporary, lock

logger = logging.getLogger(__name__)

Task = Literal["build", "update"]


class WorkFolder:
    """A folder beside an artefact for what is unfinished of it. One process at a time works there.

    Finished parts stay when a run is killed, and the next run continues with them, provided that it
    makes the same.

    Args:
        output: the place of the artefact; the folder is called as it is, with .building or
            .updating behind.
        task: of the work.
        identity: what is made from what; with another one, all is removed that an earlier run has
            left.
        ours: pattern of the names that runs make there; a folder with others is refused.

    Raises:
        ArtefactError: another process works there, or the folder holds other things.
    """

    def __init__(self, output: Path, task: Task, identity: Mapping[str, Any], ours: str) -> None:
        self.path = _place(output, task)
        self._output = output
        self._task = task
        self.identity = json.loads(json.dumps(identity))
        self._ours = ours
        self._lock = self._take()
        try:
            self._begin()
        except BaseException:  # nobody enters: the same process may try again
            self._lock.close()
            raise

    def __enter__(self) -> Self:
        """Nothing but itself."""
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let other processes work here.

        What is finished stays, unless that is nothing or the input was refused.
        """
        try:
            if error_type is not None and (
                issubclass(error_type, ValueError) or not self.worth_keeping()
            ):
                files.remove(self.path)
        finally:
            self._lock.close()

    def _begin(self) -> None:
        """Make the folder ready for this work."""
        self._keep_only_same()

    def worth_keeping(self) -> bool:
        """Whether there are finished parts to continue with."""
        return any(
            file.name != BEGUN and not is_temporary(file.name) for file in self.path.iterdir()
        )

    def _take(self) -> Lock:
        """Make the folder and lock it."""
        # A finishing run removes the folder: if that happened in between, make and lock it again.
        while True:
            files.make_folder(self.path)
            held = lock(self.path)
            if held is not None and held.held is False:
                doing = f"{_doing(self._task)} {self._output}"
                raise ArtefactError(
                    f"another run is {doing} (in {self.path}): wait for it, or stop it"
                )
            # A finishing run may have removed the folder meanwhile: then try again.
            if held is not None and held.is_of(self.path):
                return held

    def _keep_only_same(self) -> None:
        """Remove what earlier work on something else has left, and nothing that no run has made."""
        # Refuse to work among foreign files.
        own = re.compile(f"{self._ours}|{re.escape(BEGUN)}")
        names = sorted(file.name for file in self.path.iterdir())
        if others := [name for name in names if not (own.fullmatch(name) or is_temporary(name))]:
            raise ArtefactError(
                f"{self.path} is where this {self._task} would work, but holds other things "
                f"({', '.join(others[:5])}): "
                "move them, or choose another place"
            )
        # Work on the same inputs continues; anything else is removed first.
        begun = self.path / BEGUN
        try:
            same = json.loads(begun.read_text(encoding="utf-8")) == self.identity
        except (FileNotFoundError, ValueError):
            same = False
        if same:
            return
        for name in names:
            logger.info(
                "removed from an unfinished %s of something else: %s", self._task, self.path / name
            )
            if (self.path / name).is_dir():
                remove = files.system.rmtree
            else:
                remove = files.system.unlink
            remove(self.path / name)
        storage.write_json(begun, self.identity)


def remove_work(output: Path, task: Task) -> None:
    """Remove the folder of finished work, unless another run works there by now."""
    path = _place(output, task)
    held = lock(path)
    if held is None:
        return
    with held:
        if held.held is not False:
            files.remove(path)


def _doing(task: Task) -> str:
    return f"{task.removesuffix('e')}ing"


def _place(output: Path, task: Task) -> Path:
    output = output.absolute()  # a place such as "." has no name
    return output.with_name(f"{output.name}.{_doing(task)}")
