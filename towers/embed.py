"""Embed a prepared catalogue with a model folder: products, queries and tuning queries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from tritower.artefacts import storage
from tritower.datamodules.batch import NumberedItems, Side
from tritower.datamodules.catalogue import Table
from tritower.datamodules.tuning_queries import TuningQueries
from tritower.retrieval.vectors.checks import Metric
from tritower.retrieval.vectors.embeddings import EmbeddingWriter
from tritower.towers.embedding_shards import (
    EmbedOptions,
    UntrainedOutputs,
    embed_rows,
    rows_by_shard,
)
from tritower.towers.embedding_tables import (
    ItemView,
    ProductTable,
    QueryTable,
    Rows,
    TuningTable,
    all_items,
    whole_item,
)
from tritower.towers.feature_cache import CacheOptions, cached
from tritower.towers.model_folder import load_model, load_untrained
from tritower.towers.two_tower import TwoTower
from tritower.towers.untrained import UntrainedTowers


def embed(
    model: Path,
    catalogue: Path,
    output: Path,
    *,
    options: EmbedOptions | None = None,
    untrained: bool = True,
    product_view: ItemView = whole_item,
    query_view: ItemView = whole_item,
) -> None:
    """Write `output/products`, `output/tuning`, and `output/queries` if there are queries.

    `output/tuning` has queries to tune an index by, made of some products
    (`tritower.datamodules.tuning_queries`). If the catalogue has queries, features of the model's
    pretrained towers before training are written, too, as `output/untrained/TOWER/products` and
    `.../queries`: an evaluation compares the model with them.

    Finished shards are skipped. A folder begun with another model or catalogue is refused.

    Args:
        model: model folder.
        catalogue: prepared catalogue.
        output: folder of the embeddings folders.
        options: how the model runs.
        untrained: write features of the pretrained towers, too.
        product_view: the part of a product that is embedded, e.g. to measure the loss without its
            pictures.
        query_view: the part of a query that is embedded.

    Raises:
        ArtefactError: no model or catalogue, or a folder that was begun with others.
    """
    options = options or EmbedOptions()
    two_tower = load_model(model)
    storage.read_manifest(catalogue, artefact_type="catalogue")
    # The catalogue's tables, and the products that tune an index.
    tables = {}
    for side in ("products", "queries"):
        if (catalogue / side).is_dir():
            tables[side] = Table(catalogue / side)
    products = tables["products"]
    queries = tables.get("queries")
    tuning = TuningQueries(products, queries)
    preprocess = two_tower.preprocess
    # Frozen towers may have run in training: their features are looked up.
    if options.feature_cache is not None:
        items = partial(all_items, tables, tuning)
        cache_options = CacheOptions(every_view=False, device=two_tower.device)
        preprocess = cached(
            preprocess, *two_tower.encoders, items, options.feature_cache, cache_options
        )

    job = _EmbedJob(model, catalogue, output, two_tower, options)
    towers: Mapping[Side, UntrainedTowers] = {"product": {}, "query": {}}
    if untrained and queries is not None:
        towers = load_untrained(model, two_tower)
    # One folder for products, one for queries, one for tuning queries.
    product_data = ProductTable(products, preprocess.product, product_view)
    job.write("products", product_data, products, np.arange(len(products)), towers["product"])
    if queries is not None:
        query_data = QueryTable(queries, products, preprocess.query, query_view)
        job.write("queries", query_data, queries, np.arange(len(queries)), towers["query"])
    if len(tuning.rows):
        tuning_data = TuningTable(tuning, products, preprocess.query, query_view)
        job.write("tuning", tuning_data, products, tuning.rows, {})


@dataclass(frozen=True)
class _EmbedJob:
    """A model and a catalogue whose embeddings folders are written."""

    model: Path
    catalogue: Path
    output: Path
    two_tower: TwoTower
    options: EmbedOptions

    def write(
        self,
        name: str,
        data: Dataset[NumberedItems],
        table: Table,
        rows: Rows,
        towers: UntrainedTowers,
    ) -> None:
        """Write one embeddings folder, and the features of towers before training.

        Args:
            name: "products", "queries" or "tuning".
            data: the items by row number.
            table: the table of the rows.
            rows: (n,) ascending row numbers.
            towers: pretrained towers before training.
        """
        folder = self.output / name
        if (folder / storage.MANIFEST).is_file():
            storage.verify(folder, artefact_type="embeddings")
        writer = self._writer(folder, name, self.two_tower.embed_dim, self.two_tower.metric)
        # One folder for the features of each tower before training.
        features = {}
        for tower_name, tower in towers.items():
            tower_folder = self.output / "untrained" / tower_name / name
            features[tower_name] = self._writer(tower_folder, name, tower.out_dim, "cosine")
        hints = {"model": str(self.model.resolve()), "catalogue": str(self.catalogue.resolve())}
        outputs = UntrainedOutputs(towers, features)
        shards = rows_by_shard(table, rows)
        embed_rows(data, self.two_tower, table, shards, writer, hints, self.options, outputs)

    def _writer(self, folder: Path, name: str, dim: int, metric: Metric) -> EmbeddingWriter:
        return EmbeddingWriter(
            folder,
            dim=dim,
            metric=metric,
            id_column="product_id" if name == "products" else "query_id",
            model=storage.fingerprint(self.model),
            catalogue=storage.fingerprint(self.catalogue),
        )
