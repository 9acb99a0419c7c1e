"""Search for many queries at once, such as every product of a catalogue.

Streamed, and resumed where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tritower.artefacts import files, storage
from tritower.artefacts.shards import ShardFolder
from tritower.artefacts.storage import ArtefactError
from tritower.retrieval.filtering.filtered_search import Grouping
from tritower.retrieval.filtering.filters import Filter, parse
from tritower.retrieval.index import ProductIndex, checked_k
from tritower.retrieval.ivf.engine import Settings
from tritower.retrieval.vectors.embeddings import EmbeddingBatch, EmbeddingReader
from tritower.terminal.progress import show_progress

ARTEFACT_TYPE = "hits"
BLOCK = 16_384


class BulkResult(NamedTuple):
    """How a bulk search ended.

    Attributes:
        queries: number of queries.
        hits: number of rows written.
        searched: queries searched in this run; an earlier run did the others.
    """

    queries: int
    hits: int
    searched: int


def bulk_search(
    index: ProductIndex,
    queries: EmbeddingReader,
    output: Path | str,
    *,
    k: int = 100,
    settings: Settings | None = None,
    exclude_self: bool = False,
    filter: Filter | str | None = None,
    group_by: Grouping | None = None,
) -> BulkResult:
    """Write the nearest products of every query.

    Query_id, product_id, rank (from 1), score, and query type if queries have.

    Each block of queries is written as a shard of its own; after an interruption the same call
    continues.

    Args:
        index: what is searched.
        queries: the query embeddings; the products' own for "similar items".
        output: a folder of shards, or a single file when its name ends with .parquet.
        k: results per query; fewer where the index holds or finds fewer.
        settings: how to search; None for the index's own.
        exclude_self: leave out the product with the query's own id.
        filter: what may be found; None for all.
        group_by: find at most one product of each "group" or "family".

    Raises:
        ValueError: k < 1, or settings or vectors that do not suit the index.
        ArtefactError: queries of another model, or `output` holds something else.
    """
    output = Path(output)
    index.check_model(queries.meta.get("model"), str(queries.source))
    k = checked_k(k)
    single = output.suffix == ".parquet"
    if single and output.exists():
        raise ArtefactError(f"{output} already exists: choose another place")
    settings = settings or index.settings
    chosen = parse(filter) if isinstance(filter, str) else filter
    if chosen is not None:
        # Refuses a filter that does not suit before anything is written.
        index.count(chosen)
    # The same call continues a killed run: its blocks are found by this identity.
    identity = {
        "index": index.manifest.fingerprint,
        "queries": queries.fingerprint or queries.stamp(),
        "k": k,
        "nprobe": settings.nprobe,
        "k_factor": settings.k_factor,
        "exclude_self": exclude_self,
        "filter": None if chosen is None else str(chosen),
        "group_by": group_by,
    }
    folder = ShardFolder(
        output.with_name(f"{output.name}.parts") if single else output,
        artefact_type=ARTEFACT_TYPE,
        identity=identity,
    )
    names = []
    searched = 0
    blocks = show_progress(
        _blocks(queries), queries.count, lambda block: len(block[1].ids), "search", "queries"
    )
    # Search block by block; finished blocks are skipped.
    for name, batch in blocks:
        names.append(name)
        if not folder.done(name):
            table = _search(index, batch, k, settings, exclude_self, chosen, group_by)
            folder.write(name, table, row_group_size=131_072)
            searched += len(batch.ids)
    hits = folder.finish(names).meta["count"]
    if single:
        _join(folder.path, output)
    return BulkResult(queries.count, hits, searched)


def _blocks(queries: EmbeddingReader) -> Iterator[tuple[str, EmbeddingBatch]]:
    """Batches with a name each, the same in every run."""
    for part in queries.parts:
        row = 0
        for batch in queries.part_batches(part, BLOCK):
            yield f"{Path(part.name).stem}-{row:010d}", batch
            row += len(batch.ids)


def _search(
    index: ProductIndex,
    batch: EmbeddingBatch,
    k: int,
    settings: Settings,
    exclude_self: bool,
    filter: Filter | None,
    group_by: Grouping | None,
) -> pa.Table:
    hits = index.search(
        batch.vectors, k + exclude_self, settings=settings, filter=filter, group_by=group_by
    )
    # One row for each hit.
    query, place = np.nonzero(hits.rows >= 0)  # -1 never reaches the table of ids
    product_ids = index.id_table.column.take(pa.array(hits.rows[query, place]))
    query_ids = batch.ids.take(pa.array(query)).cast(pa.string())
    # Without the query's own product, the ranks of later hits move up.
    keep = np.ones(len(query), bool)
    if exclude_self:
        keep = ~pc.equal(product_ids, query_ids).to_numpy()
    first_of_query = np.searchsorted(query, query)
    kept_before = np.concatenate([[0], np.cumsum(keep)])
    rank = kept_before[1:] - kept_before[first_of_query]
    keep &= rank <= k
    columns = {"query_id": query_ids}
    if batch.query_types is not None:
        columns["query_type"] = batch.query_types.take(pa.array(query)).cast(pa.string())
    columns |= {
        "product_id": product_ids,
        "rank": pa.array(rank.astype(np.int32)),
        "score": pa.array(hits.scores[query, place]),
    }
    return pa.table(columns).filter(pa.array(keep))


def _join(parts: Path, output: Path) -> None:
    """All shards as one file; the shards are deleted when it is complete."""
    shards = sorted(parts.glob("*.parquet"))
    with (
        storage.write_file(output) as temporary,
        storage.create(temporary) as file,
        pq.ParquetWriter(file, pq.read_schema(shards[0])) as writer,
    ):
        for shard in shards:
            for batch in pq.ParquetFile(shard).iter_batches(131_072):
                writer.write_batch(batch)
    files.system.rmtree(parts)
