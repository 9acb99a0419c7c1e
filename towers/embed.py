"""Embed a prepared catalogue with a model folder: products, queries and tuning queries."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from tritower.artefacts import storage
from tritower.datamodules.batch import NumberedItems
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
    tables = {}
    for side in ("products", "queries"):
        if (catalogue / side).is_dir():
            tables[side] = Table(catalogue / side)
    products = tables["products"]
    queries = tables.get("queries")
    tuning = TuningQueries(products, queries)
    preprocess = two_tower.preprocess
    if options.feature_cache is not None:
        items = partial(all_items, tables, tuning)
        cache_options = CacheOptions(every_view=False, device=two_tower.device)
        preprocess = cached(
            preprocess, *two_tower.encoders, items, options.feature_cache, cache_options
        )

    def write(
        name: str,
        data: Dataset[NumberedItems],
        table: Table,
        rows: Rows,
        towers: UntrainedTowers,
    ) -> None:
        """Write one embeddings folder, and the features of towers before training."""

        def writer(folder: Path, dim: int, metric: Metric = "cosine") -> EmbeddingWriter:
            return EmbeddingWriter(
                folder,
                dim=dim,
                id_column="product_id" if name == "products" else "query_id",
                model=storage.fingerprint(model),
                catalogue=storage.fingerprint(catalogue),
                metric=metric,
            )

        folder = output / name
        if (folder / storage.MANIFEST).is_file():
            storage.verify(folder, artefact_type="embeddings")
        own = writer(folder, two_tower.embed_dim, two_tower.metric)
        features = {}
        for tower_name, tower in towers.items():
            features[tower_name] = writer(output / "untrained" / tower_name / name, tower.out_dim)
        hints = {"model": str(model.resolve()), "catalogue": str(catalogue.resolve())}
        outputs = UntrainedOutputs(towers, features)
        shards = rows_by_shard(table, rows)
        embed_rows(data, two_tower, table, shards, own, hints, options, outputs)

    product_towers: UntrainedTowers = {}
    query_towers: UntrainedTowers = {}
    if untrained and queries is not None:
        towers = load_untrained(model, two_tower)
        product_towers = towers["product"]
        query_towers = towers["query"]
    product_data = ProductTable(products, preprocess.product, product_view)
    write("products", product_data, products, np.arange(len(products)), product_towers)
    if queries is not None:
        query_data = QueryTable(queries, products, preprocess.query, query_view)
        write("queries", query_data, queries, np.arange(len(queries)), query_towers)
    if len(tuning.rows):
        tuning_data = TuningTable(tuning, products, preprocess.query, query_view)
        write("tuning", tuning_data, products, tuning.rows, {})
