"""`index.py build`: embeddings become an index."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tritower.commands.folders import one_side, tuning_queries_beside


def build(
    embeddings: Path,
    output: Path,
    ids: Path | None = None,
    id_column: str | None = None,
    embedding_column: str | None = None,
    metric: Literal["cosine", "inner_product", "kl"] | None = None,
    normalize: bool = False,
    factory: str = "auto",
    seed: int = 0,
    train_sample: int | None = None,
    strict: bool = False,
    nprobe: int | None = None,
    k_factor: float | None = None,
    spill: bool = False,
    recall: float | None = None,
    k: int = 10,
    memory: str | None = None,
    latency_ms: float | None = None,
    queries: Path | None = None,
    attributes: Path | None = None,
    build_memory: str | None = None,
    overwrite: bool = False,
) -> int:
    """Build an index from embeddings of ours or of anyone's, in bounded memory.

    Goes on where a killed run stopped.

    By default the index is exact while that is quick; larger ones are measured, and searched so
    that every kind of query that can be made of the catalogue reaches recall@10 .98. With a recall,
    candidates are compared, and what is built is published only if it reaches that recall for every
    kind of query.

    Args:
        embeddings: embeddings folder, folder of .parquet or .npy files, or one such file.
        output: the index folder to make.
        ids: for .npy, the ids: .txt, .npy, .csv or .parquet, one file or a folder of them.
        id_column: column of ids in Parquet; guessed when not given.
        embedding_column: column of vectors in Parquet; guessed when not given.
        metric: what vectors are compared by; what the embeddings say, else cosine.
        normalize: bring vectors of any length to length 1; without, they are refused.
        factory: FAISS factory string such as "IVF1024,PQ64x4fsr,Refine(SQ8)" or Flat; auto chooses
            by the number of vectors and says why.
        seed: of the training sample and of k-means.
        train_sample: number of training vectors; chosen by the number of lists when not given.
        strict: refuse to build an under-trained index.
        nprobe: lists a search visits unless told otherwise; measured when not given, or with a
            factory chosen by their number.
        k_factor: candidates re-ranked per result, where the index keeps finer vectors; measured
            when not given, or with a factory 8.
        spill: give every vector a second list: more recall from fewer lists, for twice the bytes of
            codes.
        recall: recall@k against exact search to reach, e.g. 0.95.
        k: of that recall.
        memory: what searches may touch again and again: 1GiB, 500MB. Vectors for re-ranking stay on
            disk.
        latency_ms: median time of one query on one thread to stay within.
        queries: embeddings of real queries to choose by, of all kinds; EMBEDDINGS/tuning when not
            given. Products as queries are always asked too.
        attributes: what filters ask for, by product id: a prepared catalogue, or Parquet or CSV
            files; those of the catalogue that was embedded when not given.
        build_memory: what the build may take; 80 % of what is free when not given.
        overwrite: publish a new version of an index that is there; the old one is kept.
    """
    from tritower.retrieval.building.build import Recipe, build_index
    from tritower.retrieval.building.resources import parse_bytes
    from tritower.retrieval.ivf.operating_points import Target
    from tritower.retrieval.showing.present import (
        describe_candidates,
        describe_index,
        describe_points,
        show,
    )
    from tritower.retrieval.vectors.embeddings import EmbeddingReader

    target = None
    if recall is not None:
        target = Target(recall, k, None if memory is None else parse_bytes(memory), latency_ms)
    elif memory is not None or latency_ms is not None:
        raise ValueError(
            "memory and latency_ms choose how to reach a recall: give recall, e.g. 0.95"
        )
    products = one_side(embeddings, "products")
    reader = EmbeddingReader(
        products,
        ids=ids,
        id_column=id_column,
        embedding_column=embedding_column,
        metric=metric,
        normalize=normalize,
    )
    limit = None if build_memory is None else parse_bytes(build_memory)
    recipe = Recipe(factory, seed, train_sample, strict, nprobe, k_factor, spill, limit)
    asking = None if queries is None else one_side(queries, "queries")
    if asking is None and (target is not None or recipe.is_default):
        asking = tuning_queries_beside(products)
    asked = (
        None
        if asking is None
        else EmbeddingReader(asking, metric=reader.metric, normalize=normalize, asks=True)
    )
    manifest = build_index(
        reader,
        output,
        recipe,
        target=target,
        queries=asked,
        attributes=attributes,
        overwrite=overwrite,
    )
    if "candidates" in manifest.meta:
        show(describe_candidates(manifest))
    if manifest.meta["target"] is not None:
        show(describe_points(output, manifest.meta["target"]["recall"]))
    show(describe_index(output, manifest))
    return 0
