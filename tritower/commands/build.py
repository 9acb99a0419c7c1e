"""`index.py build`: embeddings become an index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tritower.commands.options import VectorFileOptions, one_side, tuning_queries_beside

if TYPE_CHECKING:
    from tritower.retrieval.ivf.operating_points import Target


@dataclass(frozen=True)
class SpecOptions:
    """Which index is built.

    Attributes:
        factory: FAISS factory string such as "IVF1024,PQ64x4fsr,Refine(SQ8)" or Flat; auto chooses
            by the number of vectors and prints why.
        metric: measure that vectors are compared by; that of the embeddings, else cosine.
        spill: give every vector a second list: more recall from fewer lists, for twice the bytes
            of codes.
        nprobe: lists that a search visits by default; measured when not given, or chosen by their
            number with a factory.
        k_factor: candidates that are re-ranked per hit, where the index keeps refine vectors;
            measured when not given, or 8 with a factory.
        seed: of the training sample and of k-means.
        train_sample: number of training vectors; chosen by the number of lists when not given.
        strict: refuse to build an under-trained index.
        build_memory: memory that the build may use; 80 % of the free memory when not given.
        overwrite: publish a new version of an existing index; the old one is kept.
    """

    factory: str = "auto"
    metric: Literal["cosine", "inner_product", "kl"] | None = None
    spill: bool = False
    nprobe: int | None = None
    k_factor: float | None = None
    seed: int = 0
    train_sample: int | None = None
    strict: bool = False
    build_memory: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class TargetOptions:
    """What the index should reach; with a recall, candidates are compared.

    Attributes:
        recall: recall@k against exact search to reach for every type of query, e.g. 0.95.
        k: of that recall.
        memory: resident memory of searches: 1GiB, 500MB. Vectors for re-ranking stay on disk.
        latency_ms: median time of one query on one thread to stay within.
        queries: embeddings of real queries to choose by, of all types; EMBEDDINGS/tuning when not
            given. Products as queries are always included.
    """

    recall: float | None = None
    k: int = 10
    memory: str | None = None
    latency_ms: float | None = None
    queries: Path | None = None

    def target(self) -> Target | None:
        """The target; None where no recall is named."""
        from tritower.retrieval.building.resources import parse_bytes
        from tritower.retrieval.ivf.operating_points import Target

        if self.recall is None:
            if self.memory is not None or self.latency_ms is not None:
                raise ValueError(
                    "memory and latency_ms choose how to reach a recall: give recall, e.g. 0.95"
                )
            return None
        if self.memory is None:
            memory = None
        else:
            memory = parse_bytes(self.memory)
        return Target(self.recall, self.k, memory, self.latency_ms)


def build(
    embeddings: Path,
    output: Path,
    spec: SpecOptions,
    goal: TargetOptions,
    files: VectorFileOptions,
    attributes: Path | None = None,
) -> int:
    """Build an index from embeddings of ours or of anyone's, in bounded memory.

    A killed run is continued by the same command.

    By default the index is exact while that is quick; larger ones are measured, and searched so
    that every type of query that can be made of the catalogue reaches recall@10 .98. With a recall,
    candidates are compared, and the index is published only if it reaches that recall for every
    type of query.

    Args:
        embeddings: embeddings folder, folder of .parquet or .npy files, or one such file.
        output: the index folder to make.
        spec: which index is built
        goal: what the index should reach
        files: vectors that were not made by embed
        attributes: attributes for filters, by product id: a prepared catalogue, or Parquet or CSV
            files; those of the catalogue that was embedded when not given.
    """
    from tritower.retrieval.building.build import build_index
    from tritower.retrieval.building.options import BuildOptions
    from tritower.retrieval.building.resources import parse_bytes
    from tritower.retrieval.showing.index_tables import (
        describe_candidates,
        describe_index,
        describe_points,
    )
    from tritower.retrieval.vectors.embeddings import EmbeddingReader
    from tritower.terminal.tables import show

    target = goal.target()
    products = one_side(embeddings, "products")
    reader = files.open(products, spec.metric)
    if spec.build_memory is None:
        limit = None
    else:
        limit = parse_bytes(spec.build_memory)
    options = BuildOptions(
        spec.factory,
        spec.seed,
        spec.train_sample,
        spec.strict,
        spec.nprobe,
        spec.k_factor,
        spec.spill,
        limit,
    )

    # Tuning queries: those that are named, else those that `embed` made beside the products.
    folder = None
    if goal.queries is not None:
        folder = one_side(goal.queries, "queries")
    elif target is not None or options.is_default:
        folder = tuning_queries_beside(products)
    queries = None
    if folder is not None:
        queries = EmbeddingReader(
            folder, metric=reader.metric, normalize=files.normalize, asks=True
        )

    manifest = build_index(
        reader,
        output,
        options,
        target=target,
        queries=queries,
        attributes=attributes,
        overwrite=spec.overwrite,
    )
    if "candidates" in manifest.meta:
        show(describe_candidates(manifest))
    if manifest.meta["target"] is not None:
        show(describe_points(output, manifest.meta["target"]["recall"]))
    show(describe_index(output, manifest))
    return 0
