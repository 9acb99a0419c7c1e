"""The data of a training run: batches of a prepared catalogue, and held-out queries."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow.parquet as pq
from torch.utils.data import DataLoader, Dataset, Sampler

from tritower.datamodules.batch import RELATIONS, Batch, Item, NumberedItems
from tritower.datamodules.catalogue import Table, product_item, query_item
from tritower.datamodules.examples import ExampleData, TrainingBatches
from tritower.datamodules.generated_queries import AllQueries, GeneratedQueries
from tritower.datamodules.held_out import HeldOut, HeldOutOptions, held_out_queries
from tritower.datamodules.held_out_rows import CandidateRows, QueryRows, RowBatches
from tritower.datamodules.negatives import Negatives
from tritower.datamodules.preprocess import Preprocess, stable_hash
from tritower.datamodules.schema import Schema
from tritower.datamodules.stream import BatchStream, StreamPosition
from tritower.datamodules.training_rows import ExampleOptions, TrainingRows
from tritower.datamodules.views import Views

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are loaded; they are the same.

    Attributes:
        num_workers: loader processes; 0 loads in the training process.
        window_groups: row groups that are shuffled together, and that a loader process keeps in
            memory.
    """

    num_workers: int = 0
    window_groups: int = 64


DEFAULT_EXAMPLES = ExampleOptions()
DEFAULT_VALIDATION = HeldOutOptions()
DEFAULT_LOADER = LoaderOptions()


class ProductDataModule(L.LightningDataModule):
    """A prepared catalogue as training batches and held-out queries.

    Args:
        catalogue: folder made by `python -m datamodules.prepare`.
        batch_size: examples per step over all processes.
        examples: what training examples are made of.
        views: what is left out of queries and products in training.
        validation: the held-out queries that models are chosen by and tested on.
        loader: how batches are loaded.
        seed: of the order and of everything random about the examples.
    """

    def __init__(
        self,
        catalogue: Path,
        batch_size: int = 256,
        examples: ExampleOptions = DEFAULT_EXAMPLES,
        views: Views | None = None,
        validation: HeldOutOptions = DEFAULT_VALIDATION,
        loader: LoaderOptions = DEFAULT_LOADER,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # There may be fewer held-out queries than processes.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.catalogue = Path(catalogue)
        self.batch_size = batch_size
        self.examples = examples
        self.views = views if views is not None else Views()
        self.validation = validation
        self.loader = loader
        self.seed = seed
        self.preprocess: Preprocess | None = None  # the model hands it over at setup
        self.held_out: dict[str, HeldOut] = {}
        self.training: TrainingRows | None = None
        self.progress = {"epoch": 0, "step": 0, "batches": 0}
        self._negatives: Negatives | None = None
        self._stream: BatchStream | None = None

    @property
    def val_split(self) -> str:
        """The split that the best model is chosen by."""
        return self.validation.val_split

    @property
    def test_split(self) -> str:
        """The split of `train.py test`."""
        return self.validation.test_split

    def prepare_data(self) -> None:
        """Refuse a folder that is no prepared catalogue before any process starts."""
        if not (self.catalogue / "schema.json").is_file():
            raise FileNotFoundError(
                f"{self.catalogue} is not a prepared catalogue (it has no schema.json). Make it "
                f"with: python -m datamodules.prepare products.csv --output {self.catalogue}"
            )

    def setup(self, stage: str) -> None:
        """Open the catalogue, and choose the examples and the held-out queries."""
        self.schema = Schema.load(self.catalogue / "schema.json")
        self.products = Table(self.catalogue / "products", self.loader.window_groups)
        self.queries: Table | None = None
        if (self.catalogue / "queries").is_dir():
            self.queries = Table(self.catalogue / "queries", self.loader.window_groups)
        qrels = self.catalogue / "qrels.parquet"
        self.qrels = pq.read_table(qrels) if qrels.is_file() else None
        # Training examples, and the held-out queries of the split that is measured.
        if stage == "fit":
            self.training = TrainingRows(
                self.products, self.queries, self.qrels, self.schema, self.examples, self.seed
            )
            self.training.report(self.catalogue)
        split = self.test_split if stage == "test" else self.val_split
        held_out = held_out_queries(
            self.products,
            self.queries,
            self.qrels,
            self.examples.positives,
            split,
            self.validation,
            self.seed,
        )
        self.held_out[split] = held_out
        candidates = len(held_out.candidates)
        logger.info(
            "%s: %d %s, among %d products", split, len(held_out), held_out.origin, candidates
        )

    @property
    def negatives(self) -> Negatives | None:
        """Extra negatives of the batches; a new value counts from the next epoch on."""
        return self._negatives

    @negatives.setter
    def negatives(self, negatives: Negatives | None) -> None:
        self._negatives = negatives
        if self._stream is not None:
            self._stream.negatives = negatives

    def train_dataloader(self) -> DataLoader[Batch]:
        """Epochs of the train split; the first one begins where a resumed run stopped."""
        training = self.training
        assert training is not None
        # The stream draws rows of examples; the dataset reads and collates them.
        self._stream = BatchStream(
            len(training.rows),
            self.batch_size,
            seed=self.seed,
            window_blocks=max(1, self.loader.window_groups // 2),  # two windows overlap in a batch
            position=StreamPosition(
                self.trainer.global_rank,
                self.trainer.world_size,
                self.progress["epoch"],
                self.progress["step"],
            ),
            negatives=self._negatives,
        )
        data = ExampleData(
            self.products,
            training.queries,
            training.rows,
            training.same_group,
            self.examples.group_share,
            training.others,
            training.queries.first_generated,
        )
        batches = TrainingBatches(data, self.views, self.model_preprocess, self.seed)
        return self.make_loader(batches, self._stream)

    def state_dict(self) -> dict[str, Any]:
        """The position in the training, for its checkpoints.

        Epoch, its finished steps, all batches, mined negatives.
        """
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        position = advance(self.progress, self.trainer.num_training_batches, batches)
        mined = None
        if self._negatives is not None:
            mined = self._negatives._asdict() | {"file": self._negatives.file.name}
        return {**position, "negatives": mined}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the position; called before the loaders are made, which may read ahead."""
        self.progress = {name: state_dict[name] for name in ("epoch", "step", "batches")}
        mined = state_dict.get("negatives")
        if mined is not None:
            file = Path(self.trainer.default_root_dir) / "negatives" / mined["file"]
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file}: the hard negatives of this run are missing; start it afresh."
                )
            self._negatives = Negatives(**{**mined, "file": file})
        # It is resumable: by its stream.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")

    def val_dataloader(self) -> list[DataLoader[NumberedItems]]:
        """Held-out queries of the validation split, and the products they are searched among."""
        return self._held_out_loaders(self.val_split)

    def test_dataloader(self) -> list[DataLoader[NumberedItems]]:
        """Held-out queries of the test split, and the products they are searched among."""
        return self._held_out_loaders(self.test_split)

    def product_ids(self, batch: Batch) -> list[str]:
        """The ids of the products of a batch, for messages."""
        keys = set(batch.product_keys[:, RELATIONS.index("product")].tolist())
        ids = self.products.column("product_id").to_pylist()
        return [product_id for product_id in ids if stable_hash(product_id) in keys]

    @property
    def model_preprocess(self) -> Preprocess:
        """The model's preprocessing.

        Raises:
            RuntimeError: no model has handed it over.
        """
        if self.preprocess is None:
            raise RuntimeError(
                "The model has not handed over its preprocessing: run through a Trainer with a "
                "TwoTower."
            )
        return self.preprocess

    def _held_out_loaders(self, split: str) -> list[DataLoader[NumberedItems]]:
        held_out = self.held_out[split]
        sides = self.model_preprocess
        queries = QueryRows(self.products, self.queries, held_out, sides.query)
        products = CandidateRows(self.products, held_out.candidates, sides.product)
        loaders = []
        for rows, count in ((queries, len(held_out)), (products, len(held_out.candidates))):
            ranks = (self.trainer.global_rank, self.trainer.world_size)
            batches = RowBatches(count, self.batch_size, *ranks)
            loaders.append(self.make_loader(rows, batches))
        return loaders

    def make_loader(self, dataset: Dataset[Any], sampler: Sampler[Any]) -> DataLoader[Any]:
        """A loader of what a sampler draws from a dataset, with this run's processes."""
        on_gpu = self.trainer.accelerator.__class__.__name__ == "CUDAAccelerator"
        return make_loader(dataset, sampler, self.loader.num_workers, pin_memory=on_gpu)


def all_items(data: ProductDataModule) -> Iterator[Item]:
    """Every product and every query of a catalogue, in order: what frozen towers encode once."""
    for row in range(len(data.products)):
        yield product_item(data.products.row(row))
    queries = AllQueries(data.queries, GeneratedQueries([], []))
    if data.training is not None:
        queries = data.training.queries
    for number in range(len(queries)):
        yield query_item(queries.row(number))


def make_loader(
    dataset: Dataset[Any], sampler: Sampler[Any], num_workers: int, *, pin_memory: bool
) -> DataLoader[Any]:
    """A loader whose sampler draws whole batches."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        # Forked children of a process with threads may hang.
        multiprocessing_context="spawn" if num_workers else None,
    )


def advance(progress: dict[str, int], per_epoch: int, batches: int) -> dict[str, int]:
    """The position of a run after so many batches in all.

    Args:
        progress: position at its last start: epoch, step, batches.
        per_epoch: steps of an epoch.
        batches: in all.
    """
    # Epochs before the last start may have had another length, and the one it was in may have no
    # steps left.
    since = batches - progress["batches"]
    started = min(progress["step"], per_epoch)
    epoch, step = divmod(progress["epoch"] * per_epoch + started + since, per_epoch)
    return {"epoch": epoch, "step": step, "batches": batches}


def _unchanged(batch: object) -> object:
    return batch
