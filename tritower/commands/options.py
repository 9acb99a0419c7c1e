"""Options that several commands of `index.py` share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tritower.retrieval.vectors.embeddings import EmbeddingReader


@dataclass(frozen=True)
class VectorFileOptions:
    """How files of vectors are read that were not made by `embed`.

    Attributes:
        ids: for .npy, the ids: .txt, .npy, .csv or .parquet, one file or a folder of them.
        id_column: column of ids in Parquet; guessed when not given.
        embedding_column: column of vectors in Parquet; guessed when not given.
        normalize: scale vectors of any length to length 1; without it they are refused.
    """

    ids: Path | None = None
    id_column: str | None = None
    embedding_column: str | None = None
    normalize: bool = False

    def open(
        self, path: Path, metric: Literal["cosine", "inner_product", "kl"] | None
    ) -> EmbeddingReader:
        """Open files of product vectors."""
        from tritower.retrieval.vectors.embeddings import EmbeddingReader

        return EmbeddingReader(
            path,
            ids=self.ids,
            id_column=self.id_column,
            embedding_column=self.embedding_column,
            metric=metric,
            normalize=self.normalize,
        )


@dataclass(frozen=True)
class EffortOptions:
    """How much a search looks at.

    Attributes:
        recall: recall against exact search to reach, of an index that was built for one; the
            cheapest operating point is taken. By default what the index was built for.
        nprobe: lists to visit; more find more and take longer. By default what the type of query
            needs.
    """

    recall: float | None = None
    nprobe: int | None = None


def one_side(embeddings: Path, side: str) -> Path:
    """EMBEDDINGS/products where `embed` made both sides, else the folder itself."""
    if (embeddings / side).is_dir():
        return embeddings / side
    return embeddings


def tuning_queries_beside(products: Path) -> Path | None:
    """The tuning queries that `embed` made beside the products; None where there are none."""
    tuning = products.parent / "tuning"
    if products.name == "products" and tuning.is_dir():
        return tuning
    return None
