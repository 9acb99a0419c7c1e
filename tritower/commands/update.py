"""`index.py update`: keep an index in sync with a changing catalogue."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tritower.commands.folders import one_side

if TYPE_CHECKING:
    from tritower.retrieval.updating.update import Catalogue
    from tritower.retrieval.vectors.embeddings import EmbeddingReader


def update(
    index: Path,
    upsert: Path | None = None,
    delete: Path | None = None,
    attributes: Path | None = None,
    model: Path | None = None,
    ids: Path | None = None,
    id_column: str | None = None,
    embedding_column: str | None = None,
    normalize: bool = False,
    batch_size: int = 256,
    num_workers: int = 0,
    accelerator: str = "auto",
    precision: str = "32-true",
    compact: bool = False,
    strict: bool = False,
    json: bool = False,
) -> int:
    """Bring an index up to date.

    Add, change and take out products. Only what has changed is embedded and encoded.

    The new version is published in one step and the old one kept. Goes on where a killed run
    stopped.

    Args:
        index: index folder.
        upsert: a prepared catalogue, of which products that are new or have changed are embedded;
            or embeddings, as build takes them.
        delete: text file of ids to take out, one per line.
        attributes: new attributes for filters, of some products or of all, as build takes them;
            those of the catalogue that the products are from when not given.
        model: for a catalogue, the model folder; the one that made the embeddings when not given.
        ids: for .npy, the ids, as in build.
        id_column: column of ids in Parquet; guessed when not given.
        embedding_column: column of vectors in Parquet; guessed when not given.
        normalize: bring vectors of any length to length 1.
        batch_size: products embedded at a time.
        num_workers: processes that read and decode.
        accelerator: auto, cpu or gpu, to embed on.
        precision: 32-true, or bf16-mixed on a GPU.
        compact: close up the rows of products that are gone even where they are few.
        strict: refuse ids to delete that are not there.
        json: print JSON.
    """
    from tritower.artefacts import storage
    from tritower.retrieval.index import ProductIndex
    from tritower.retrieval.showing.present import describe_update, find_model, show
    from tritower.retrieval.updating.update import read_ids_to_delete, update_index
    from tritower.retrieval.vectors.embeddings import EmbeddingReader

    if upsert is None and delete is None and attributes is None and not compact:
        raise ValueError("nothing to do: give upsert, delete, attributes or compact")
    source: EmbeddingReader | Catalogue | None = None
    opened = ProductIndex.open(index, fall_back=False)
    if (
        upsert is not None
        and (upsert / storage.MANIFEST).exists()
        and storage.read_manifest(upsert).kind == "catalogue"
    ):
        folder = find_model(opened, model)

        from tritower.towers.changed_products import ChangedProducts
        from tritower.towers.embed import Options

        options = Options(
            batch_size, num_workers, accelerator, devices=1, precision=precision, progress=not json
        )
        source = ChangedProducts(folder, upsert, options)
    elif upsert is not None:
        source = EmbeddingReader(
            one_side(upsert, "products"),
            ids=ids,
            id_column=id_column,
            embedding_column=embedding_column,
            metric=opened.metric,
            normalize=normalize,
        )
    gone = [] if delete is None else read_ids_to_delete(delete)
    report = update_index(
        index, upsert=source, delete=gone, attributes=attributes, compact=compact, strict=strict
    )
    if json:
        print(report.to_json())
    else:
        show(describe_update(report))
    return 0
