"""What a build has finished so far, beside the index: an interrupted build continues from it.

index.building/
  begun.json                     what is built from what: another build starts anew
  trained.faiss                  index with empty lists
  refine.faiss                   ranges of the refine vectors, where there are any
  training.json                  what the manifest will hold of training, and digests of these
                                 two; written last of the three
  000000-0000000000.parquet      encoded vectors, a block each
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss

from tritower.artefacts import files, storage
from tritower.artefacts.shards import ShardFolder
from tritower.artefacts.storage import ArtefactError
from tritower.artefacts.work_folder import WorkFolder, remove_work
from tritower.retrieval.ivf.encoded import to_table
from tritower.retrieval.ivf.ivf_pq import TrainedQuantizers, centroids_of
from tritower.retrieval.vectors.embeddings import EmbeddingBatch, EmbeddingReader
from tritower.terminal.progress import show_progress

BLOCK_ROWS = 65_536
TRAINED_FILE = "trained.faiss"
TRAINED_REFINE_FILE = "refine.faiss"
TRAINING_FILE = "training.json"


class Workspace(WorkFolder):
    """The unfinished build of one place.

    Args:
        output: the place of the index.
        reader: what is built from.
        factory, seed, sample, spill: what is built; with other ones, or from other embeddings, the
          build starts anew.

    Raises:
        ArtefactError: another process is building there, or the folder holds other things.
    """

    def __init__(
        self,
        output: Path,
        reader: EmbeddingReader,
        factory: str,
        seed: int,
        sample: int,
        spill: bool,
    ) -> None:
        # Whatever decides the encoded vectors: with another value, a build starts anew.
        # A build continues only where all of these are equal.
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
        ours = "|".join(
            [
                *map(re.escape, (TRAINED_FILE, TRAINED_REFINE_FILE, TRAINING_FILE)),
                r"\d{6}-\d{10}\.parquet",
            ]
        )
        super().__init__(output, "build", identity, ours)

    def _begin(self) -> None:
        super()._begin()
        self._blocks = ShardFolder(self.path, artefact_type="encoded", identity=self.identity)

    def worth_keeping(self) -> bool:
        """Whether the training is finished."""
        return (self.path / TRAINING_FILE).exists()

    @staticmethod
    def remove(output: Path) -> None:
        """Remove the workspace of a finished build, unless another run works there by now."""
        remove_work(output, "build")

    def trained(
        self, train: Callable[[], tuple[TrainedQuantizers, dict[str, Any]]]
    ) -> tuple[TrainedQuantizers, dict[str, Any]]:
        """What an earlier run has learned, else what `train` learns.

        And the manifest's entry for the training.
        """
        if self._read_training() is None:
            for block in self.path.glob("*.parquet"):  # of another training
                files.system.unlink(block)
            trained, about = train()
            digests = {}
            for name, index in (
                (TRAINED_FILE, trained.index),
                (TRAINED_REFINE_FILE, trained.refine),
            ):
                if index is not None:
                    data = faiss.serialize_index(index).tobytes()
                    storage.write_bytes(self.path / name, data)
                    digests[name] = hashlib.sha256(data).hexdigest()
            storage.write_json(
                self.path / TRAINING_FILE, {**about, "spill": trained.spill, "files": digests}
            )
        # Read back even what has just been learned: a build that was killed and one that was not do
        # the same.
        training = self._read_training()
        if training is None:
            raise ArtefactError(
                f"what was written to {self.path} is not what is there: is its disk damaged?"
            )
        refine = None
        if TRAINED_REFINE_FILE in training.pop("files"):
            refine = faiss.read_index(str(self.path / TRAINED_REFINE_FILE))
        index = faiss.read_index(str(self.path / TRAINED_FILE))
        spill = training.pop("spill")
        return TrainedQuantizers(index, refine, centroids_of(index), spill), training

    def _read_training(self) -> dict[str, Any] | None:
        """The content of training.json; None where it or a file it names is missing or damaged.

        A folder that is being removed when its process is killed loses its files in any order.
        """
        try:
            about: dict[str, Any] = json.loads(
                (self.path / TRAINING_FILE).read_text(encoding="utf-8")
            )
            # A file that does not match its digest was written by a run that was killed.
            digests = {}
            for name in about["files"]:
                digests[name] = hashlib.sha256((self.path / name).read_bytes()).hexdigest()
        except (FileNotFoundError, ValueError, KeyError):
            return None
        if digests == about["files"]:
            return about
        return None

    def encode(self, reader: EmbeddingReader, trained: TrainedQuantizers) -> list[Path]:
        """Encode what earlier runs have not.

        Returns the files of all blocks in the order of their rows.
        """
        names = []
        for name, batch in show_progress(
            _named(reader), reader.count, lambda pair: len(pair[1].ids), "encode", "vectors"
        ):
            names.append(name)
            if not self._blocks.done(name):
                self._blocks.write(
                    name, to_table(batch.ids, trained.encode(batch.vectors), batch.digests())
                )
        return [self.path / f"{name}.parquet" for name in names]


def _named(reader: EmbeddingReader) -> Iterator[tuple[str, EmbeddingBatch]]:
    """Blocks with a name each, the same in every run."""
    for number, part in enumerate(reader.parts):
        row = 0
        for batch in reader.part_batches(part, BLOCK_ROWS):
            yield f"{number:06d}-{row:010d}", batch
            row += len(batch.ids)
