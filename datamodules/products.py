"""The data of a training run.

Batches of a prepared catalogue, and held-out queries to choose the best model by.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import pyarrow.parquet as pq
from torch.utils.data import DataLoader, Dataset, Sampler

from tritower.datamodules.batch import RELATIONS, Batch, Item, NumberedItems
from tritower.datamodules.catalogue import Table, product_item, query_item
from tritower.datamodules.examples import (
    ExampleRows,
    MateRelation,
    Mates,
    TrainingBatches,
    catalogue_examples,
    is_split,
    pair_examples,
)
from tritower.datamodules.generated_queries import FacetQueries, Queries, facet_queries
from tritower.datamodules.held_out import HeldOut, ProductRows, QueryRows, RowBatches, held_out
from tritower.datamodules.negatives import Negatives
from tritower.datamodules.preprocess import Preprocess, stable_hash
from tritower.datamodules.schema import Schema
from tritower.datamodules.stream import BatchStream
from tritower.datamodules.views import Views

logger = logging.getLogger(__name__)


Source = Literal["catalogue", "pairs", "labels", "facets"]


class ProductDataModule(L.LightningDataModule):
    """A prepared catalogue as training batches and held-out queries.

    Args:
        catalogue: folder made by `python -m datamodules.prepare`.
        batch_size: examples per step over all processes.
        sources: what training examples are made of: `catalogue` (two views of a product, or of it
            and a mate), `pairs` (the judgements of the train split), `labels` (the same with their
            labels, and those of relevance 0, for losses such as CoSENT), `facets` (typed queries
            that name attributes of products, which answer them). A mapping says how often the
            examples of each are shown in an epoch.
        facet_weight: of a typed query that names facets, 0 to 1, beside 1 of a product's view. Such
            queries draw together what is alike by its attributes: the more they weigh, the less
            sets one product apart.
        relevance_power: weight of a judgement: (relevance / highest relevance) to this power; 0
            weighs all alike.
        max_pairs_per_query: judged products of a query that are trained on, the most relevant
            first; null takes all. Others that are no less relevant are answers all the same, and
            less relevant ones are not.
        mates: whose views may ask for a product: `group` (the same thing), `family` (variants too),
            or `none`.
        mate_share: chance, 0 to 1, that a product is asked for by a mate's view and not its own.
        one_per_mates: examples of `catalogue` ask for one product of each group or family alone,
            the first one; so no batch holds two that belong together.
        views: what is left out of queries and products in training.
        num_workers: loader processes; 0 loads in the training process.
        window_groups: row groups that are shuffled together, and that a loader process keeps in
            memory.
        max_val_queries: held-out queries that are asked at each validation.
        max_val_products: products they are searched among.
        val_split: split that the best model is chosen by.
        test_split: split of `train.py test`.
        threshold: relevance from which products of held-out queries are relevant; null takes the
            highest of all judgements. Queries without such a product are not asked.
        seed: of the order and of everything random about the examples.
    """

    def __init__(
        self,
        catalogue: Path,
        batch_size: int = 256,
        sources: list[Source] | dict[Source, int] | None = None,
        facet_weight: float = 0.02,
        relevance_power: float = 1.0,
        max_pairs_per_query: int | None = None,
        mates: MateRelation = "family",
        mate_share: float = 0.5,
        one_per_mates: bool = False,
        views: Views | None = None,
        num_workers: int = 0,
        window_groups: int = 64,
        max_val_queries: int = 2000,
        max_val_products: int = 20_000,
        val_split: str = "val",
        test_split: str = "test",
        threshold: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = (
            True  # fewer held-out queries than processes
        )
        self.catalogue, self.batch_size = Path(catalogue), batch_size
        given = sources if sources is not None else ["catalogue", "pairs"]
        self.sources = dict(given) if isinstance(given, dict) else dict.fromkeys(given, 1)
        if any(times < 1 for times in self.sources.values()):
            raise ValueError(
                f"sources={self.sources}: each is shown at least once an epoch; leave out what is not."
            )
        if not 0 < facet_weight <= 1:
            raise ValueError(f"facet_weight={facet_weight}: choose above 0, up to 1.")
        self.facet_weight, self.relevance_power = facet_weight, relevance_power
        self.max_pairs_per_query = max_pairs_per_query
        self.mates, self.mate_share, self.one_per_mates = mates, mate_share, one_per_mates
        self.views = views if views is not None else Views()
        self.num_workers, self.window_groups, self.seed = num_workers, window_groups, seed
        self.max_val_queries, self.max_val_products = max_val_queries, max_val_products
        if threshold is not None and not threshold > 0:
            raise ValueError(
                f"threshold={threshold}: products of relevance 0 are no answers; choose above 0."
            )
        self.val_split, self.test_split, self.threshold = val_split, test_split, threshold
        self.preprocess: Preprocess | None = None  # the model hands it over when a run is set up
        self.held_out: dict[str, HeldOut] = {}
        self.progress = {"epoch": 0, "step": 0, "batches": 0}
        self._negatives: Negatives | None = None
        self._stream: BatchStream | None = None

    def prepare_data(self) -> None:
        """Refuse a folder that is no prepared catalogue before any process starts."""
        if not (self.catalogue / "schema.json").is_file():
            raise FileNotFoundError(
                f"{self.catalogue} is not a prepared catalogue (it has no schema.json). "
                f"Make it with: python -m datamodules.prepare products.csv --output {self.catalogue}"
            )

    def setup(self, stage: str) -> None:
        """Open the catalogue and decide which examples and held-out queries there are."""
        self.schema = Schema.load(self.catalogue / "schema.json")
        self.products = Table(self.catalogue / "products", self.window_groups)
        has_queries = (self.catalogue / "queries").is_dir()
        self.queries = (
            Table(self.catalogue / "queries", self.window_groups) if has_queries else None
        )
        qrels = self.catalogue / "qrels.parquet"
        self.qrels = pq.read_table(qrels) if qrels.is_file() else None
        self.facets = FacetQueries([], [])
        if stage == "fit":
            self.rows = self._examples()
            logger.info("%d training examples from %d products", len(self.rows), len(self.products))
            if not {"pairs", "labels"} & self.sources.keys() and (
                left := len(self._pairs(labelled=True))
            ):
                logger.warning(
                    "%s holds %d judgements of the train split, and none is trained on: data.sources=%s names neither "
                    "pairs nor labels.",
                    self.catalogue,
                    left,
                    ", ".join(self.sources),
                )
        for split in {
            "fit": [self.val_split],
            "validate": [self.val_split],
            "test": [self.test_split],
        }[stage]:
            self.held_out[split] = held_out(
                self.products,
                self.queries,
                self.qrels,
                split=split,
                mates=self.mates,
                max_queries=self.max_val_queries,
                max_products=self.max_val_products,
                seed=self.seed,
                threshold=self.threshold,
            )
            asked = self.held_out[split]
            logger.info(
                "%s: %d %s, among %d products", split, len(asked), asked.asked, len(asked.gallery)
            )

    def _examples(self) -> ExampleRows:
        self.train_rows = np.flatnonzero(is_split(self.products, "train"))
        parts = []
        for source, times in self.sources.items():
            if source == "catalogue":
                rows = self.train_rows
                if self.one_per_mates:
                    rows = Mates(self.products, self.mates, rows).first_of_each(rows)
                parts += [catalogue_examples(rows)] * times
            elif source == "facets":
                self.facets = facet_queries(
                    self.products, self.train_rows, self.schema, self.seed, self.facet_weight
                )
                logger.info("%d typed queries of facets", len(self.facets))
                parts += [self.facets.examples(self._asked.first_facets, times, self.seed)]
            else:
                parts += [self._pairs(labelled=source == "labels")] * times
        if not sum(map(len, parts)):
            raise ValueError(
                f"No training examples: {self.catalogue} has {len(self.train_rows)} products of the train split, and "
                f"data.sources={list(self.sources)}."
            )
        return ExampleRows.join(parts)

    def _pairs(self, *, labelled: bool, equals: bool = False) -> ExampleRows:
        """The judgements of the train split, as `pair_examples` chooses them."""
        if self.queries is None or self.qrels is None:
            return catalogue_examples(np.empty(0, np.int64))
        return pair_examples(
            self.qrels,
            self.products,
            self.queries,
            "train",
            self.max_pairs_per_query,
            self.seed,
            power=self.relevance_power,
            labelled=labelled,
            equals=equals,
        )

    def _other_answers(self) -> list[ExampleRows]:
        """What answers queries beside the examples.

        What a cut of theirs left out, and all that have typed facets.
        """
        parts = []
        if self.max_pairs_per_query is not None and {"pairs", "labels"} & self.sources.keys():
            parts.append(self._pairs(labelled=False, equals=True))
        if len(self.facets):
            parts.append(self.facets.pairs(self._asked.first_facets))
        return parts

    @property
    def negatives(self) -> Negatives | None:
        """Extra products of the batches; set in the middle of an epoch, it counts from the next one on."""
        return self._negatives

    @negatives.setter
    def negatives(self, negatives: Negatives | None) -> None:
        self._negatives = negatives
        if self._stream is not None:
            self._stream.negatives = negatives

    def train_dataloader(self) -> DataLoader[Batch]:
        """Epochs of the train split; the first one begins where a resumed run stopped."""
        self._stream = BatchStream(
            len(self.rows),
            self.batch_size,
            seed=self.seed,
            window_blocks=max(1, self.window_groups // 2),  # two windows overlap in a batch
            rank=self.trainer.global_rank,
            num_ranks=self.trainer.world_size,
            epoch=self.progress["epoch"],
            start=self.progress["step"],
            negatives=self._negatives,
        )
        mates = Mates(self.products, self.mates, self.train_rows)
        asked = self._asked
        batches = TrainingBatches(
            self.products,
            asked,
            self.rows,
            mates,
            self.mate_share,
            self.views,
            self._preprocess,
            self.seed,
            others=self._other_answers(),
            first_facets=asked.first_facets,
        )
        return self.loader(batches, self._stream)

    def state_dict(self) -> dict[str, Any]:
        """Where training stands, for its checkpoints.

        Epoch, its steps that are done, all batches, mined negatives.
        """
        per_epoch = self.trainer.num_training_batches
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        since = (
            batches - self.progress["batches"]
        )  # epochs before the last start may have been of another length,
        started = min(
            self.progress["step"], per_epoch
        )  # and of the one it was in nothing may be left
        epoch, step = divmod(self.progress["epoch"] * per_epoch + started + since, per_epoch)
        mined = None if self._negatives is None else self._negatives._asdict()
        return {
            "epoch": epoch,
            "step": step,
            "batches": batches,
            "negatives": mined and mined | {"file": self._negatives.file.name},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called before the loaders are made, which may read ahead."""
        self.progress = {name: state_dict[name] for name in ("epoch", "step", "batches")}
        if (mined := state_dict.get("negatives")) is not None:
            file = Path(self.trainer.default_root_dir) / "negatives" / mined["file"]
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file}: the negatives that this run had mined are gone; start it afresh."
                )
            self._negatives = Negatives(**{**mined, "file": file})
        warnings.filterwarnings(
            "ignore", message=".*your dataloader is not resumable"
        )  # it is: by its stream

    def val_dataloader(self) -> list[DataLoader[NumberedItems]]:
        """Held-out queries of the validation split, and the products they are searched among."""
        return self._held_out_loaders(self.val_split)

    def test_dataloader(self) -> list[DataLoader[NumberedItems]]:
        """Held-out queries of the test split, and the products they are searched among."""
        return self._held_out_loaders(self.test_split)

    def all_items(self) -> Iterator[Item]:
        """Every product and every query of the catalogue, in order.

        What frozen towers encode once.
        """
        for row in range(len(self.products)):
            yield product_item(self.products.row(row))
        asked = self._asked
        for number in range(len(asked)):
            yield query_item(asked.row(number))

    @property
    def _asked(self) -> Queries:
        return Queries(self.queries, self.facets)

    def product_ids(self, batch: Batch) -> list[str]:
        """The ids of the products of a batch, for messages."""
        keys = set(batch.product_keys[:, RELATIONS.index("product")].tolist())
        ids = self.products.column("product_id").to_pylist()
        return [product_id for product_id in ids if stable_hash(product_id) in keys]

    @property
    def _preprocess(self) -> Preprocess:
        if self.preprocess is None:
            raise RuntimeError(
                "The model has not handed over its preprocessing: run through a Trainer with a TwoTower."
            )
        return self.preprocess

    def _held_out_loaders(self, split: str) -> list[DataLoader[NumberedItems]]:
        asked = self.held_out[split]
        ranks = (self.trainer.global_rank, self.trainer.world_size)
        queries = QueryRows(self.products, self.queries, asked, self._preprocess.query)
        products = ProductRows(self.products, asked.gallery, self._preprocess.product)
        return [
            self.loader(queries, RowBatches(len(asked), self.batch_size, *ranks)),
            self.loader(products, RowBatches(len(asked.gallery), self.batch_size, *ranks)),
        ]

    def loader(self, dataset: Dataset, sampler: Sampler) -> DataLoader:
        """What a sampler draws from a dataset, by this run's loader processes."""
        return DataLoader(
            dataset,
            batch_size=None,  # the sampler draws whole batches
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=_as_is,
            pin_memory=self.trainer.accelerator.__class__.__name__ == "CUDAAccelerator",
            persistent_workers=self.num_workers > 0,
            multiprocessing_context="spawn"
            if self.num_workers
            else None,  # forked children of threads may hang
        )


def _as_is(batch: object) -> object:
    return batch
