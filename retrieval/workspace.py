"""What a build has finished so far, beside the index: a killed build goes on where it stopped.

index.building/
begun.json                  what is built from what: another build starts anew
trained.faiss               index with empty lists
finer.faiss                 ranges of the finer vectors, where there are any
training.json               what the manifest will say of training, and digests of these two; written last of the three
000000-0000000000.parquet   encoded vectors, a block each
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import faiss

from retrieval import files, storage
from retrieval.embeddings import EmbeddingBatch, EmbeddingReader
from retrieval.encoded import to_table
from retrieval.mapped import Trained, centroids_of
from retrieval.progress import counted
from retrieval.shards import BEGUN, ShardFolder
from retrieval.storage import ArtefactError
from retrieval.temporaries import Lock, is_temporary, lock

logger = logging.getLogger(__name__)

BLOCK_ROWS = 65_536
TRAINED_FILE, FINER_FILE, TRAINING_FILE = "trained.faiss", "finer.faiss", "training.json"


class Workspace:
    """The unfinished build of one place. One process at a time works in it.

    Args:
        output: the place of the index.
        reader: what is built from.
        factory, seed, sample, spill: what is built; with other ones, or from other embeddings, the build starts anew.

    Raises:
        ArtefactError: another process is building there, or the folder holds other things.
    """

    def __init__(
        self, output: Path, reader: EmbeddingReader, factory: str, seed: int, sample: int, spill: bool
    ) -> None:
        self.path = _place(output)
        self._lock = self._take(output)
        identity = {
            "embeddings": reader.fingerprint or reader.stamp(),
            "factory": factory,
            "seed": seed,
            "sample": sample,
            "spill": spill,
            "metric": reader.metric,
            "normalize": reader.normalize,
            "faiss": faiss.__version__,
        }
        self._keep_only(identity)
        self._blocks = ShardFolder(self.path, kind="encoded", identity=identity)

    def __enter__(self) -> Workspace:
        """Nothing but itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let other processes work here. What is finished stays, unless that is nothing or the input was refused."""
        refused = kind is not None and issubclass(kind, ValueError)
        if refused or (kind is not None and not (self.path / TRAINING_FILE).exists()):
            files.remove(self.path)
        self._lock.close()

    @classmethod
    def remove(cls, output: Path) -> None:
        """Remove the workspace of a finished build, unless another run works there by now."""
        held = lock(_place(output))
        if held is None:
            return
        with held:
            if held.held is not False:
                files.remove(_place(output))

    def trained(self, train: Callable[[], tuple[Trained, dict[str, Any]]]) -> tuple[Trained, dict[str, Any]]:
        """What an earlier run has learned, else what `train` learns; and what the manifest says of the training."""
        if self._learned() is None:
            for block in self.path.glob("*.parquet"):  # of another training
                files.system.unlink(block)
            trained, about = train()
            digests = {}
            for name, index in ((TRAINED_FILE, trained.index), (FINER_FILE, trained.finer)):
                if index is not None:
                    data = faiss.serialize_index(index).tobytes()
                    storage.write_bytes(self.path / name, data)
                    digests[name] = hashlib.sha256(data).hexdigest()
            storage.write_json(self.path / TRAINING_FILE, {**about, "spill": trained.spill, "files": digests})
        # Read back even what has just been learned: a build that was killed and one that was not do the same.
        about = self._learned()
        if about is None:
            raise ArtefactError(f"what was written to {self.path} is not what is there: is its disk damaged?")
        finer = faiss.read_index(str(self.path / FINER_FILE)) if FINER_FILE in about.pop("files") else None
        index = faiss.read_index(str(self.path / TRAINED_FILE))
        return Trained(index, finer, centroids_of(index), about.pop("spill")), about

    def _learned(self) -> dict[str, Any] | None:
        """What training.json says; None where that or a file it names is missing or damaged.

        A folder that is being removed when its process is killed loses its files in any order.
        """
        try:
            about: dict[str, Any] = json.loads((self.path / TRAINING_FILE).read_text(encoding="utf-8"))
            digests = {name: hashlib.sha256((self.path / name).read_bytes()).hexdigest() for name in about["files"]}
        except (FileNotFoundError, ValueError, KeyError):
            return None
        return about if digests == about["files"] else None

    def encode(self, reader: EmbeddingReader, trained: Trained) -> list[Path]:
        """Encode what earlier runs have not; returns the files of all blocks in the order of their rows."""
        names = []
        for name, batch in counted(_named(reader), reader.count, lambda pair: len(pair[1].ids), "encode", "vectors"):
            names.append(name)
            if not self._blocks.done(name):
                self._blocks.write(name, to_table(batch.ids, trained.encode(batch.vectors), batch.digests()))
        return [self.path / f"{name}.parquet" for name in names]

    def _take(self, output: Path) -> Lock:
        """Make the folder and lock it."""
        while True:
            files.make_folder(self.path)
            held = lock(self.path)
            if held is not None and held.held is False:
                raise ArtefactError(f"another run is building {output} (in {self.path}): wait for it, or stop it")
            if held is not None and held.is_of(self.path):  # else a finishing run has removed it meanwhile
                return held

    def _keep_only(self, identity: dict[str, Any]) -> None:
        """Remove what an earlier build of something else has left, and nothing that no build has made."""
        if others := sorted(file.name for file in self.path.iterdir() if not _is_ours(file.name)):
            raise ArtefactError(
                f"{self.path} is where this build would work, but holds other things ({', '.join(others[:5])}): move "
                "them, or choose another place"
            )
        begun = self.path / BEGUN
        try:
            same = json.loads(begun.read_text(encoding="utf-8")) == json.loads(json.dumps(identity))
        except (FileNotFoundError, ValueError):
            same = False
        if same:
            return
        for file in list(self.path.iterdir()):
            logger.info("removed from an unfinished build of something else: %s", file)
            files.system.unlink(file)


def _place(output: Path) -> Path:
    return output.with_name(f"{output.name}.building")


def _is_ours(name: str) -> bool:
    """Whether a build makes files of this name."""
    own = (BEGUN, TRAINED_FILE, FINER_FILE, TRAINING_FILE)
    return name in own or is_temporary(name) or re.fullmatch(r"\d{6}-\d{10}\.parquet", name) is not None


def _named(reader: EmbeddingReader) -> Iterator[tuple[str, EmbeddingBatch]]:
    """Blocks with a name each, the same in every run."""
    for number, part in enumerate(reader.parts):
        row = 0
        for batch in reader.part_batches(part, BLOCK_ROWS):
            yield f"{number:06d}-{row:010d}", batch
            row += len(batch.ids)
