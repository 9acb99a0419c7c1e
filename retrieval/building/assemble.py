"""Write the files of an index.

Of one whose lists are mapped from encoded vectors; ids and attributes of any.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tritower.artefacts import storage
from tritower.retrieval.ivf.encoded import EncodedSource, grouped_lists
from tritower.retrieval.ivf.inverted_lists import write_list
from tritower.retrieval.ivf.ivf_pq import TrainedQuantizers, write_refine_header
from tritower.retrieval.ivf.layout import IDS_FILE, INDEX_FILE, LISTS_FILE, REFINE_FILE, SIZES_FILE
from tritower.retrieval.products.attribute_providers import AttributeProvider
from tritower.retrieval.products.attribute_table import ATTRIBUTES_FILE
from tritower.retrieval.products.attribute_writer import write_attributes
from tritower.terminal.progress import show_progress

logger = logging.getLogger(__name__)

PlacedVectors = tuple[EncodedSource, NDArray[np.int64] | int]
"""Encoded vectors, and the new row of each (-1 leaves it out), or the first new row."""


def write_ivf_pq(
    folder: Path,
    trained: TrainedQuantizers,
    sources: Sequence[PlacedVectors],
    *,
    quiet: bool = False,
) -> None:
    """Write all files of the index but its settings.

    Args:
        folder: where to.
        trained: what encoded the vectors.
        sources: the vectors, (N, D) together, in the order of their rows.
        quiet: show no progress.
    """
    count = sum(
        source.count if isinstance(moved, int) else int((moved >= 0).sum())
        for source, moved in sources
    )
    # Ids, and refine vectors behind a FAISS header, in the order of rows.
    write_products(
        folder / IDS_FILE, (part for source, moved in sources for part in _kept(source, moved))
    )
    if trained.refine is not None:
        with storage.create(folder / REFINE_FILE) as file:
            write_refine_header(file, trained.refine, count)
            for source, moved in sources:
                for refine in _kept_refine(source, moved):
                    file.write(np.ascontiguousarray(refine).data.cast("B"))
    # Lists need the order of lists: count their entries, then write one list after another.
    nlist = trained.index.nlist
    sizes = np.zeros(nlist, np.int64)
    for source, moved in sources:
        sizes += source.sizes(nlist, None if isinstance(moved, int) else moved >= 0)
    with storage.create(folder / LISTS_FILE) as file:
        lists = grouped_lists(sources, sizes, trained.index.code_size)
        if not quiet:
            lists = show_progress(
                lists, int(sizes.sum()), lambda pair: len(pair[1]), "group by lists", "codes"
            )
        for codes, rows in lists:
            write_list(file, trained.index, codes, rows)
    with storage.create(folder / SIZES_FILE) as file:
        np.save(file, sizes)
    # The index itself: quantizers, without any list.
    with storage.create(folder / INDEX_FILE) as file:
        faiss.write_index(trained.index, faiss.PyCallbackIOWriter(file.write))


def write_products(file: Path, parts: Iterable[pa.Table]) -> None:
    """Write the table row -> product_id and content, nulls for a deleted row."""
    schema = pa.schema([("product_id", pa.string()), ("content", pa.int64())])
    with storage.create(file) as stream, pa.ipc.new_file(stream, schema) as table:
        for part in parts:
            table.write_table(part.cast(schema), max_chunksize=65_536)


def attach_attributes(folder: Path, providers: Sequence[AttributeProvider]) -> dict[str, Any]:
    """Write what is known of the products whose ids were written.

    Returns the manifest's entry for it.

    Args:
        folder: of the version.
        providers: where attributes come from; of several with a product, the last one counts.

    Raises:
        ValueError: see `write_attributes`.
    """
    with (
        pa.memory_map(str(folder / IDS_FILE)) as file,
        storage.create(folder / ATTRIBUTES_FILE) as stream,
    ):
        ids = pa.ipc.open_file(file).read_all().column("product_id")
        report = write_attributes(stream, ids.chunks, providers, folder)
    # Report products without attributes, and columns that are no attributes.
    if report["rows_without"]:
        names = " nor in ".join(provider.name for provider in providers)
        logger.warning(
            "%s of %s products are not in %s", f"{report['rows_without']:,}", f"{len(ids):,}", names
        )
    for provider in providers:
        for column, why in provider.ignored.items():
            logger.info("no attribute: %s: %s", column, why)
    return {"attribute_types": report["attribute_types"], "rows_without": report["rows_without"]}


def _kept(source: EncodedSource, moved: NDArray[np.int64] | int) -> Iterable[pa.Table]:
    row = 0
    for part in source.products():
        yield (
            part
            if isinstance(moved, int)
            else part.filter(pa.array(moved[row : row + len(part)] >= 0))
        )
        row += len(part)


def _kept_refine(
    source: EncodedSource, moved: NDArray[np.int64] | int
) -> Iterable[NDArray[np.uint8]]:
    row = 0
    for refine in source.refine():
        yield refine if isinstance(moved, int) else refine[moved[row : row + len(refine)] >= 0]
        row += len(refine)
