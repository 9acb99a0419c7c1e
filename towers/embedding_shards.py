"""Embed rows of a table on any number of devices, and write them shard by shard."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from tritower.datamodules.batch import NumberedItems, Side
from tritower.datamodules.catalogue import Table, product_digests
from tritower.retrieval.vectors.embeddings import EmbeddingWriter
from tritower.towers.block_encoder import served_vectors
from tritower.towers.embedding_tables import Rows, rows_and_types
from tritower.towers.quiet import quiet_lightning
from tritower.towers.two_tower import TwoTower
from tritower.towers.untrained import UntrainedTowers, as_modules, untrained_features

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbedOptions:
    """How the model runs.

    Attributes:
        batch_size: items at a time.
        num_workers: loader processes.
        accelerator: as Lightning's: `auto`, `cpu`, `gpu`.
        devices: as Lightning's; every device embeds shards of its own.
        precision: as Lightning's: `32-true`, `bf16-mixed`.
        feature_cache: folder of features of frozen towers that training made.
        progress: show a progress bar.
    """

    batch_size: int = 256
    num_workers: int = 0
    accelerator: str = "auto"
    devices: int | str = "auto"
    precision: Any = "32-true"
    feature_cache: Path | None = None
    progress: bool = True


@dataclass(frozen=True)
class UntrainedOutputs:
    """Pretrained towers before training whose features are written beside the embeddings.

    Attributes:
        towers: of the embedded side.
        writers: name of a tower -> writer of its features.
    """

    towers: UntrainedTowers = field(default_factory=dict)
    writers: Mapping[str, EmbeddingWriter] = field(default_factory=dict)


def rows_by_shard(table: Table, rows: Rows) -> dict[int, Rows]:
    """Shard -> its part of (N,) ascending rows; shards without rows are left out."""
    parts = np.split(rows, np.searchsorted(rows, table.shard_starts[1:-1]))
    return {shard: part for shard, part in enumerate(parts) if len(part)}


def embed_rows(
    data: Dataset[NumberedItems],
    model: TwoTower,
    table: Table,
    rows: Mapping[int, Rows],
    writer: EmbeddingWriter,
    hints: Mapping[str, str],
    options: EmbedOptions,
    untrained: UntrainedOutputs | None = None,
) -> None:
    """Embed some rows of a table and finish their folder; finished shards are left alone.

    Args:
        data: the items by row number.
        model: embeds them.
        table: the table of the rows.
        rows: shard -> (n,) int64 row numbers, ascending, at least one.
        writer: writes a shard at a time.
        hints: folders of the model and the catalogue.
        options: how the model runs.
        untrained: pretrained towers whose features are written, too.
    """
    quiet_lightning()
    untrained = untrained or UntrainedOutputs()
    writers = [writer, *untrained.writers.values()]
    names = {shard: table.shards[shard].stem for shard in rows}
    # Shards that any of the folders lacks are embedded again.
    missing = {}
    for shard, shard_rows in rows.items():
        if not all(own.done(names[shard]) for own in writers):
            missing[shard] = shard_rows
    if writer.id_column == "product_id":
        side: Side = "product"
    else:
        side = "query"
    logger.info("%s: %d of %d shards to embed", writer.path.name, len(missing), len(rows))
    # Lightning places the model on the devices; each process predicts shards of its own.
    trainer = L.Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        precision=options.precision,
        use_distributed_sampler=False,  # every process has shards of its own
        callbacks=[ShardWriter(writer, table, missing, untrained.writers)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=options.progress,
    )
    if missing:
        loaders = ShardLoaders(data, missing, options.batch_size, options.num_workers)
        encode = _Encode(model, side, untrained.towers)
        trainer.predict(encode, datamodule=loaders, return_predictions=False)
    trainer.strategy.barrier("embedded")  # every process has written its shards
    if trainer.is_global_zero:
        for own in writers:
            own.finish(list(names.values()), dict(hints))


class ShardBatches(Sampler[Rows]):
    """Row numbers in batches that never cross shards."""

    def __init__(self, rows: Iterable[Rows], batch_size: int) -> None:
        self.batches: list[Rows] = []
        for shard_rows in rows:
            for start in range(0, len(shard_rows), batch_size):
                self.batches.append(shard_rows[start : start + batch_size])

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Rows]:
        return iter(self.batches)


class ShardLoaders(L.LightningDataModule):
    """Each process embeds shards of its own."""

    def __init__(
        self,
        data: Dataset[NumberedItems],
        rows: Mapping[int, Rows],
        batch_size: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        # There may be fewer shards than processes.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.data = data
        self.rows = rows
        self.batch_size = batch_size
        self.num_workers = num_workers

    def predict_dataloader(self) -> DataLoader[NumberedItems]:
        """The rows of this process's shards, in order."""
        assert self.trainer is not None
        own = list(self.rows.values())[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(
            self.data,
            batch_size=None,
            sampler=ShardBatches(own, self.batch_size),
            num_workers=self.num_workers,
            multiprocessing_context="spawn" if self.num_workers else None,
        )


class Prediction(NamedTuple):
    """An encoded batch.

    Attributes:
        number: (B,) int64 row numbers; of queries, those of `query_number`.
        embedding: (B, D) float32.
        is_encoded: (B,) bool: the model encodes something of the item.
        untrained: name of a pretrained tower -> (B, F) float32 unit vectors, zeros where an item
            lacks the modality.
    """

    number: Rows
    embedding: NDArray[np.float32]
    is_encoded: NDArray[np.bool_]
    untrained: Mapping[str, NDArray[np.float32]]


class _Encode(L.LightningModule):
    def __init__(self, model: TwoTower, side: Side, towers: UntrainedTowers) -> None:
        super().__init__()
        self.encoder = model.query if side == "query" else model.product
        self.side = side
        self.metric = model.metric
        self.towers = dict(towers)
        self.copies = as_modules(towers, self.encoder)

    def predict_step(self, batch: NumberedItems, batch_idx: int) -> Prediction:
        is_encoded = batch.items.present[:, self.encoder.columns].any(1)
        items, untrained = untrained_features(self.encoder, self.towers, batch.items)
        embedding = served_vectors(self.encoder, items, self.side, self.metric)
        return Prediction(
            batch.row.cpu().numpy(),
            embedding.cpu().numpy(),
            is_encoded.cpu().numpy(),
            {name: vectors.cpu().numpy() for name, vectors in untrained.items()},
        )


class ShardWriter(L.Callback):
    """Writes a shard as soon as the last of its wanted rows is encoded."""

    def __init__(
        self,
        writer: EmbeddingWriter,
        table: Table,
        rows: Mapping[int, Rows],
        untrained: Mapping[str, EmbeddingWriter],
    ) -> None:
        self.writer = writer
        self.table = table
        self.rows = rows
        self.untrained = untrained
        self.pending: list[Prediction] = []
        self.not_encoded = 0

    @property
    def is_query(self) -> bool:
        """Whether queries are embedded."""
        return self.writer.id_column == "query_id"

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        _: int = 0,
    ) -> None:
        """Collect batches; write a shard when it is complete."""
        self.pending.append(outputs)
        last_row = int(self._rows_of(outputs.number)[-1])
        shard = int(np.searchsorted(self.table.shard_starts, last_row, side="right")) - 1
        if last_row == self.rows[shard][-1]:
            self.write(shard)

    def write(self, shard: int) -> None:
        """Write the collected batches as a shard; queries without content are left out."""
        # Join the batches of the shard.
        number = np.concatenate([part.number for part in self.pending])
        embedding = np.concatenate([part.embedding for part in self.pending])
        is_encoded = np.concatenate([part.is_encoded for part in self.pending])
        features = {}
        for tower in self.untrained:
            features[tower] = np.concatenate([part.untrained[tower] for part in self.pending])
        self.pending = []
        self.not_encoded += int((~is_encoded).sum())

        # A process that lost a batch must not publish a shard with a hole.
        rows = self._rows_of(number)
        wanted = len(self.rows[shard])
        encoded_rows = len(np.unique(rows))
        if encoded_rows != wanted:
            raise RuntimeError(
                f"{encoded_rows} of {wanted} rows of shard {shard} were encoded: nothing is "
                "written."
            )
        if self.is_query:
            # Queries without content are left out; products without content share one embedding.
            kept = is_encoded
        else:
            kept = np.ones(len(number), bool)
        self._write_rows(self.writer, shard, number[kept], embedding[kept])
        for tower, writer in self.untrained.items():
            has_feature = features[tower].any(axis=1)
            self._write_rows(writer, shard, number[has_feature], features[tower][has_feature])

    def _write_rows(
        self, writer: EmbeddingWriter, shard: int, number: Rows, vectors: NDArray[np.float32]
    ) -> None:
        """Write the (B, D) vectors of (B,) numbers, unless the shard is written already."""
        name = self.table.shards[shard].stem
        if writer.done(name):
            return
        start, stop = self.table.shard_starts[shard : shard + 2]
        # Products that are used as queries keep their ids.
        if "product_id" in self.table.names:
            id_column = "product_id"
        else:
            id_column = "query_id"
        ids = self.table.column(id_column)[start:stop].to_pylist()
        own_ids = [ids[row] for row in (self._rows_of(number) - start).tolist()]
        if self.is_query:
            query_types = rows_and_types(number)[1]
            writer.write(name, own_ids, vectors, query_types)
        else:
            digests = product_digests(self.table.shards[shard])[number - start]
            writer.write(name, own_ids, vectors, contents=digests.tolist())

    def _rows_of(self, number: Rows) -> Rows:
        if self.is_query:
            return rows_and_types(number)[0]
        return number

    def on_predict_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Report items that the model could not encode."""
        if self.not_encoded and self.is_query:
            logger.info(
                "%d queries show nothing that this model reads and were left out",
                self.not_encoded,
            )
        elif self.not_encoded:
            logger.warning(
                "%d products have nothing that this model reads; they share one embedding",
                self.not_encoded,
            )
