"""`index.py update`: keep an index in sync with a changing catalogue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tritower.commands.options import VectorFileOptions, one_side

if TYPE_CHECKING:
    from tritower.retrieval.index import ProductIndex
    from tritower.retrieval.updating.update import Catalogue
    from tritower.retrieval.vectors.embeddings import EmbeddingReader


@dataclass(frozen=True)
class ModelOptions:
    """How products of a catalogue are embedded.

    Attributes:
        model: model folder; the one that made the embeddings when not given.
        batch_size: products embedded at a time.
        num_workers: processes that read and decode.
        accelerator: auto, cpu or gpu.
        precision: 32-true, or bf16-mixed on a GPU.
    """

    model: Path | None = None
    batch_size: int = 256
    num_workers: int = 0
    accelerator: str = "auto"
    precision: str = "32-true"


@dataclass(frozen=True)
class UpdateOptions:
    """How the new version is written.

    Attributes:
        compact: close up the rows of deleted products even where they are few.
        strict: refuse ids to delete that are not in the index.
        json: print JSON.
    """

    compact: bool = False
    strict: bool = False
    json: bool = False


def update(
    index: Path,
    embedding: ModelOptions,
    files: VectorFileOptions,
    options: UpdateOptions,
    upsert: Path | None = None,
    delete: Path | None = None,
    attributes: Path | None = None,
) -> int:
    """Bring an index up to date.

    Add, change and delete products. Only changed products are embedded and encoded.

    The new version is published in one step and the old one kept. A killed run is continued by the
    same command.

    Args:
        index: index folder.
        embedding: how products of a catalogue are embedded
        files: vectors that were not made by embed
        options: how the new version is written
        upsert: a prepared catalogue, whose new and changed products are embedded; or embeddings,
            as build takes them.
        delete: text file of ids to delete, one per line.
        attributes: new attributes for filters, of some products or of all, as build takes them;
            those of the products' catalogue when not given.
    """
    from tritower.retrieval.index import ProductIndex
    from tritower.retrieval.showing.index_tables import describe_update
    from tritower.retrieval.updating.update import read_ids_to_delete, update_index
    from tritower.terminal.tables import show

    if upsert is None and delete is None and attributes is None and not options.compact:
        raise ValueError("nothing to do: give upsert, delete, attributes or compact")
    opened = ProductIndex.open(index, fall_back=False)
    products = None
    if upsert is not None:
        products = _open_products(opened, upsert, embedding, files, progress=not options.json)
    # An id to delete, new embeddings and attributes make one new version.
    report = update_index(
        index,
        upsert=products,
        delete=[] if delete is None else read_ids_to_delete(delete),
        attributes=attributes,
        compact=options.compact,
        strict=options.strict,
    )
    if options.json:
        print(report.to_json())
    else:
        show(describe_update(report))
    return 0


def _open_products(
    index: ProductIndex,
    path: Path,
    embedding: ModelOptions,
    files: VectorFileOptions,
    progress: bool,
) -> EmbeddingReader | Catalogue:
    """The products of an update: a catalogue to embed, or files of vectors."""
    from tritower.artefacts import storage
    from tritower.retrieval.index_origins import find_model

    has_manifest = (path / storage.MANIFEST).exists()
    if not has_manifest or storage.read_manifest(path).artefact_type != "catalogue":
        return files.open(one_side(path, "products"), index.metric)
    folder = find_model(index, embedding.model)

    from tritower.towers.changed_products import ChangedProducts
    from tritower.towers.embedding_shards import EmbedOptions

    options = EmbedOptions(
        embedding.batch_size,
        embedding.num_workers,
        embedding.accelerator,
        devices=1,
        precision=embedding.precision,
        progress=progress,
    )
    return ChangedProducts(folder, path, options)
