"""Embed a prepared catalogue with a model folder.

Products, queries and queries to tune by; resumable per shard.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from tritower.artefacts import storage
from tritower.datamodules.batch import Item, NumberedItems, Side
from tritower.datamodules.catalogue import Table, product_digests, product_item, query_item
from tritower.datamodules.example_rows import index_in
from tritower.datamodules.preprocess import ItemPreprocess
from tritower.datamodules.tuning_queries import TuningQueries
from tritower.retrieval.vectors.embeddings import EmbeddingWriter
from tritower.towers.feature_cache import CacheOptions, cached
from tritower.towers.metric import to_score_space
from tritower.towers.model_folder import load_model, load_untrained
from tritower.towers.quiet import quiet_lightning
from tritower.towers.two_tower import TwoTower
from tritower.towers.untrained import UntrainedTowers, as_modules, untrained_features

logger = logging.getLogger(__name__)

QUERY_TYPES = ("text", "image", "fused", "product:text", "product:image", "product:attribute")
"""Query types: a typed text, a photo, several modalities at once or a whole product, and a
product of which only one modality is shown.
"""


ItemView = Callable[[Item], Item]


def as_it_is(item: Item) -> Item:
    """All of an item."""
    return item


@dataclass(frozen=True)
class Options:
    """How to embed; as of `embed`, and whether to show on stdout how far it is."""

    batch_size: int = 256
    num_workers: int = 0
    accelerator: str = "auto"
    devices: int | str = "auto"
    precision: Any = "32-true"
    progress: bool = True


def embed(
    model: Path,
    catalogue: Path,
    output: Path,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    accelerator: str = "auto",
    devices: int | str = "auto",
    precision: Any = "32-true",
    feature_cache: Path | None = None,
    untrained: bool = True,
    product_view: ItemView = as_it_is,
    query_view: ItemView = as_it_is,
) -> None:
    """Write `output/products`, `output/tuning`, and `output/queries` where there are queries.

    The last holds queries to tune an index by, made of some products
    (`tritower.datamodules.tuning_queries`). Where the catalogue has queries, features of the
    model's pretrained towers before training are written, too, as `output/untrained/TOWER/products`
    and `.../queries`: an evaluation shows what they find by themselves.

    Shards that are finished are skipped; folders that were begun with another model or catalogue
    are refused.

    Args:
        model: model folder.
        catalogue: prepared catalogue.
        output: folder of the embeddings folders.
        batch_size: items at a time.
        num_workers: loader processes.
        accelerator: as Lightning's: `auto`, `cpu`, `gpu`.
        devices: as Lightning's; every device takes shards of its own.
        precision: as Lightning's: `32-true`, `bf16-mixed`.
        feature_cache: folder of features of frozen towers that training made.
        untrained: write features of the pretrained towers, too.
        product_view: what of a product is shown, e.g. to measure what happens without its pictures.
        query_view: what of a query is shown; what a query type leaves out stays out.
    """
    options = Options(batch_size, num_workers, accelerator, devices, precision)
    two_tower = load_model(model)
    storage.read_manifest(catalogue, artefact_type="catalogue")
    tables = {}
    for side in ("products", "queries"):
        if (catalogue / side).is_dir():
            tables[side] = Table(catalogue / side)
    products = tables["products"]
    queries = tables.get("queries")
    tuning = TuningQueries(products, queries)
    if untrained and queries is not None:
        towers = load_untrained(model, two_tower)
    else:
        towers = {"product": {}, "query": {}}
    preprocess = two_tower.preprocess
    if feature_cache is not None:
        items = partial(all_items, tables, tuning)
        encoders = two_tower.encoders
        cache_options = CacheOptions(every_view=False, device=two_tower.device)
        preprocess = cached(preprocess, *encoders, items, feature_cache, cache_options)

    def write(name: str, data: Dataset[NumberedItems], table: Table, rows: np.ndarray) -> None:
        folder = output / name
        if (folder / storage.MANIFEST).is_file():
            storage.verify(folder, artefact_type="embeddings")
        id_column = "product_id" if name == "products" else "query_id"
        about = {"model": storage.fingerprint(model), "catalogue": storage.fingerprint(catalogue)}
        writer = EmbeddingWriter(
            folder, dim=two_tower.embed_dim, metric=two_tower.metric, id_column=id_column, **about
        )
        if name == "tuning":
            own_towers = {}
        else:
            own_towers = towers["product" if name == "products" else "query"]
        untrained_writers = {}
        for tower_name, tower in own_towers.items():
            untrained_writers[tower_name] = EmbeddingWriter(
                output / "untrained" / tower_name / name,
                dim=tower.out_dim,
                id_column=id_column,
                **about,
            )
        hints = {"model": str(model.resolve()), "catalogue": str(catalogue.resolve())}
        before = UntrainedInputs(own_towers, untrained_writers)
        embed_rows(
            data, two_tower, table, rows_by_shard(table, rows), writer, hints, options, before
        )

    write(
        "products",
        ProductTable(products, preprocess.product, product_view),
        products,
        np.arange(len(products)),
    )
    if queries is not None:
        asked = QueryTable(queries, products, preprocess.query, query_view)
        write("queries", asked, queries, np.arange(len(queries)))
    if len(tuning.rows):
        write(
            "tuning",
            TuningTable(tuning, products, preprocess.query, query_view),
            products,
            tuning.rows,
        )


def rows_by_shard(table: Table, rows: np.ndarray) -> dict[int, np.ndarray]:
    """Shard -> those of ascending rows that lie in it, without shards that have none."""
    parts = np.split(rows, np.searchsorted(rows, table.shard_starts[1:-1]))
    return {shard: part for shard, part in enumerate(parts) if len(part)}


@dataclass(frozen=True)
class UntrainedInputs:
    """Pretrained towers before training whose features are written beside the embeddings.

    Attributes:
        towers: of the side that is embedded.
        writers: name of a tower -> what takes its features.
    """

    towers: UntrainedTowers = field(default_factory=dict)
    writers: Mapping[str, EmbeddingWriter] = field(default_factory=dict)


def embed_rows(
    data: Dataset[NumberedItems],
    model: TwoTower,
    table: Table,
    rows: Mapping[int, np.ndarray],
    writer: EmbeddingWriter,
    hints: Mapping[str, str],
    options: Options,
    untrained: UntrainedInputs | None = None,
) -> None:
    """Embed some rows of a table and finish their folder.

    Shards that are written already are left alone.

    Args:
        data: the items of row numbers.
        model: what embeds them.
        table: what they are rows of.
        rows: shard -> row numbers, ascending, at least one.
        writer: takes a shard at a time.
        hints: where model and catalogue lie.
        options: how.
        untrained: pretrained towers whose features are written, too.
    """
    quiet_lightning()
    untrained = untrained or UntrainedInputs()
    writers = [writer, *untrained.writers.values()]
    names = {shard: table.shards[shard].stem for shard in rows}
    missing = {
        shard: some
        for shard, some in rows.items()
        if not all(w.done(names[shard]) for w in writers)
    }
    side: Side = "product" if writer.id_column == "product_id" else "query"
    logger.info("%s: %d of %d shards to embed", writer.path.name, len(missing), len(rows))
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


def all_items(tables: dict[str, Table], tuning: TuningQueries) -> Iterator[Item]:
    """Every product and every query of a catalogue, and what is typed to tune by."""
    for side, read in (("products", product_item), ("queries", query_item)):
        if (table := tables.get(side)) is not None:
            yield from (read(table.row(row)) for row in range(len(table)))
    for row in tuning.rows.tolist():
        typed = tuning.typed(row, product_item(tables["products"].row(row)))
        if typed is not None:
            yield typed


def asked_as(item: Item) -> Iterator[tuple[str, Item]]:
    """The query types that a product can be asked as, and what each shows of it."""
    yield "fused", item
    yield "product:text", Item(text=item.text)
    yield "product:image", Item(images=item.images)
    yield "product:attribute", Item(attributes=item.attributes)


class ProductTable(Dataset[NumberedItems]):
    """Products by row number."""

    def __init__(self, products: Table, preprocess: ItemPreprocess, view: ItemView) -> None:
        self.products = products
        self.preprocess = preprocess
        self.view = view

    def __getitem__(self, rows: np.ndarray) -> NumberedItems:
        items = [self.view(product_item(self.products.row(int(row)))) for row in rows]
        return NumberedItems(self.preprocess(items), torch.from_numpy(rows))


class QueryTable(Dataset[NumberedItems]):
    """Queries by row number, once for each query type that the row can be asked as.

    Numbered row * query types + query type.
    """

    def __init__(
        self, queries: Table, products: Table, preprocess: ItemPreprocess, view: ItemView
    ) -> None:
        self.queries = queries
        self.products = products
        self.preprocess = preprocess
        self.view = view
        self.source = index_in(queries.column("source_product_id"), products.column("product_id"))

    def __getitem__(self, rows: np.ndarray) -> NumberedItems:
        return numbered_by_query_type(rows, self.query_types, self.preprocess, self.view)

    def query_types(self, row: int) -> Iterator[tuple[str, Item]]:
        """The query types that a query can be asked as, and what each shows."""
        if self.source[row] < 0:
            item = query_item(self.queries.row(row))
            yield (
                ("fused" if item.text and item.images else "image" if item.images else "text"),
                item,
            )
            return
        yield from asked_as(product_item(self.products.row(int(self.source[row]))))


class TuningTable(Dataset[NumberedItems]):
    """Products by row number as queries to tune by; numbered as those of `QueryTable`."""

    def __init__(
        self, tuning: TuningQueries, products: Table, preprocess: ItemPreprocess, view: ItemView
    ) -> None:
        self.tuning = tuning
        self.products = products
        self.preprocess = preprocess
        self.view = view

    def __getitem__(self, rows: np.ndarray) -> NumberedItems:
        return numbered_by_query_type(rows, self.query_types, self.preprocess, self.view)

    def query_types(self, row: int) -> Iterator[tuple[str, Item]]:
        """The query types that a product asks as, and what each shows."""
        item = product_item(self.products.row(row))
        yield from asked_as(item)
        typed = self.tuning.typed(row, item)
        if typed is not None:
            yield "text", typed


def numbered_by_query_type(
    rows: np.ndarray,
    query_types: Callable[[int], Iterable[tuple[str, Item]]],
    preprocess: ItemPreprocess,
    view: ItemView,
) -> NumberedItems:
    """Rows once for each query type, numbered row * number of types + type."""
    asked = [
        (int(row) * len(QUERY_TYPES) + QUERY_TYPES.index(query_type), item)
        for row in rows
        for query_type, item in query_types(int(row))
    ]
    tensors = preprocess([view(item) for _, item in asked])
    return NumberedItems(tensors, torch.tensor([number for number, _ in asked], dtype=torch.int64))


class ShardBatches(Sampler[np.ndarray]):
    """Row numbers in batches that never cross shards."""

    def __init__(self, rows: Iterable[np.ndarray], batch_size: int) -> None:
        self.batches = [
            some[start : start + batch_size]
            for some in rows
            for start in range(0, len(some), batch_size)
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.batches)


class ShardLoaders(L.LightningDataModule):
    """Each process embeds shards of its own."""

    def __init__(
        self,
        data: Dataset[NumberedItems],
        rows: Mapping[int, np.ndarray],
        batch_size: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = (
            True  # fewer shards than processes
        )
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
    """What is known of a batch after encoding.

    Attributes:
        row: (B,) int64.
        embedding: (B, D) float32.
        known: (B,) bool: the model reads something of the item.
        untrained: name of a pretrained tower -> (B, F) float32 unit vectors, zeros where an item
            lacks the modality.
    """

    row: np.ndarray
    embedding: np.ndarray
    known: np.ndarray
    untrained: Mapping[str, np.ndarray]


class _Encode(L.LightningModule):
    def __init__(self, model: TwoTower, side: Side, towers: UntrainedTowers) -> None:
        super().__init__()
        self.encoder = model.query if side == "query" else model.product
        self.side = side
        self.metric = model.metric
        self.towers = dict(towers)
        self.copies = as_modules(towers, self.encoder)

    def predict_step(self, batch: NumberedItems, batch_idx: int) -> Prediction:
        present = batch.items.present
        known = present[:, self.encoder.columns].any(1)
        items, untrained = untrained_features(self.encoder, self.towers, batch.items)
        embedding = to_score_space(self.encoder(items).embedding.float(), self.side, self.metric)
        features = {name: vectors.cpu().numpy() for name, vectors in untrained.items()}
        return Prediction(
            batch.row.cpu().numpy(), embedding.cpu().numpy(), known.cpu().numpy(), features
        )


class ShardWriter(L.Callback):
    """Writes a shard as soon as the last of its rows that are wanted is encoded."""

    def __init__(
        self,
        writer: EmbeddingWriter,
        table: Table,
        rows: Mapping[int, np.ndarray],
        untrained: Mapping[str, EmbeddingWriter],
    ) -> None:
        self.writer = writer
        self.table = table
        self.rows = rows
        self.untrained = untrained
        self.pending: list[Prediction] = []
        self.unknown = 0

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        _: int = 0,
    ) -> None:
        """Collect; write what is complete."""
        self.pending.append(outputs)
        is_query = self.writer.id_column == "query_id"
        last_row = int(outputs.row[-1]) // (len(QUERY_TYPES) if is_query else 1)
        shard = int(np.searchsorted(self.table.shard_starts, last_row, side="right")) - 1
        if last_row == self.rows[shard][-1]:
            self.write(shard, is_query)

    def write(self, shard: int, is_query: bool) -> None:
        """Write what was collected as a shard.

        Queries of which the model reads nothing are left out.
        """
        row = np.concatenate([part.row for part in self.pending])
        embedding = np.concatenate([part.embedding for part in self.pending])
        known = np.concatenate([part.known for part in self.pending])
        features = {
            name: np.concatenate([part.untrained[name] for part in self.pending])
            for name in self.untrained
        }
        self.pending = []
        self.unknown += int((~known).sum())
        start, stop = self.table.shard_starts[shard : shard + 2]
        wanted = len(self.rows[shard])
        if len(seen := np.unique(row // (len(QUERY_TYPES) if is_query else 1))) != wanted:
            raise RuntimeError(
                f"{len(seen)} of {wanted} rows of shard {shard} were encoded: nothing is written."
            )
        id_column = (
            "product_id" if "product_id" in self.table.names else "query_id"
        )  # products that ask keep their ids
        ids = self.table.column(id_column)[start:stop].to_pylist()
        name = self.table.shards[shard].stem
        numbers = row // (len(QUERY_TYPES) if is_query else 1) - start
        own_ids = np.array([ids[number] for number in numbers], object)
        if is_query:
            query_types = np.array(
                [QUERY_TYPES[number % len(QUERY_TYPES)] for number in row], object
            )
        else:
            query_types = None
        contents = None if is_query else product_digests(self.table.shards[shard])[row - start]

        def write_rows(writer: EmbeddingWriter, vectors: np.ndarray, some: np.ndarray) -> None:
            if not writer.done(name):
                own_query_types = None if query_types is None else query_types[some].tolist()
                own_contents = None if contents is None else contents[some].tolist()
                writer.write(
                    name, own_ids[some].tolist(), vectors[some], own_query_types, own_contents
                )

        write_rows(self.writer, embedding, known if is_query else np.ones(len(row), bool))
        for tower, writer in self.untrained.items():
            write_rows(writer, features[tower], features[tower].any(axis=1))

    def on_predict_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Say what the model could not read."""
        if self.unknown and self.writer.id_column == "query_id":
            logger.info(
                "%d queries show nothing that this model reads and were left out", self.unknown
            )
        elif self.unknown:
            logger.warning(
                "%d products have nothing that this model reads; they share one embedding",
                self.unknown,
            )
