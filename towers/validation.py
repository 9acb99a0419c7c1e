"""Held-out queries during training: exact search with the model's embeddings, and its figures."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray

from tritower.datamodules.batch import Items, NumberedItems, Side
from tritower.datamodules.held_out import HeldOut
from tritower.retrieval.ranking.metrics import hit_at_k, mrr, ndcg_at_k, recall_at_k
from tritower.towers.embedded import Embedded
from tritower.towers.losses.gather import num_processes

if TYPE_CHECKING:
    from tritower.datamodules.products import ProductDataModule

logger = logging.getLogger(__name__)

K = 10
"""Hits that are counted."""


Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]
Part = tuple[Rows, Embedded]
"""(B,) rows and their B vectors."""


class HeldOutEmbeddings:
    """Embeddings of held-out queries and of the products they are searched among.

    Filled batch by batch, in each process with its own rows.
    """

    def __init__(self) -> None:
        self.batches: tuple[list[Part], list[Part]] = ([], [])

    def add(self, side: int, rows: NDArray[np.int64], vectors: Embedded) -> None:
        """Add a batch.

        Args:
            side: 0 for queries, 1 for products.
            rows: (B,) positions among the held-out queries or products.
            vectors: of B items; zeros for an item without a modality that the model reads.
        """
        self.batches[side].append((rows, vectors))

    def gather(self, side: int) -> tuple[Rows, Embedded]:
        """(n,) ascending rows that any process encoded, and their vectors; at least one."""
        gathered: list[list[Part]] = [self.batches[side]]
        if num_processes() > 1:
            gathered = [[]] * num_processes()
            torch.distributed.all_gather_object(gathered, self.batches[side])
        parts = [part for batches in gathered for part in batches]
        rows, first = np.unique(np.concatenate([rows for rows, _ in parts]), return_index=True)
        return rows, Embedded.concatenate([vectors for _, vectors in parts]).select(first)


class HeldOutSearch(L.LightningModule, ABC):
    """A module that is validated by exact search of held-out queries.

    Loader 0 holds the queries of a split, loader 1 the products they are searched among.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held_out = HeldOutEmbeddings()
        self._warned_splits: set[str] = set()

    @abstractmethod
    def embed_batch(self, items: Items, side: Side) -> Embedded:
        """Vectors whose inner product is the score; zeros where nothing can be read."""

    @abstractmethod
    def query_towers(self) -> list[str]:
        """Names of the modalities that are read of a query."""

    @abstractmethod
    def not_finite(self, problem: str) -> FloatingPointError:
        """The error of embeddings that are not numbers."""

    @property
    @abstractmethod
    def embed_dim(self) -> int:
        """D."""

    @property
    def data(self) -> ProductDataModule:
        """The data module of the run."""
        return cast("ProductDataModule", self.trainer.datamodule)

    def on_validation_epoch_start(self) -> None:
        """Forget the embeddings of the last validation."""
        self.held_out = HeldOutEmbeddings()

    def validation_step(
        self, batch: NumberedItems, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Embed held-out queries or products."""
        vectors = self.embed_batch(batch.items, "query" if dataloader_idx == 0 else "product")
        self.held_out.add(dataloader_idx, batch.row.cpu().numpy(), vectors)

    def on_validation_epoch_end(self) -> None:
        """Log the figures of exact search."""
        for name, value in self._figures("val", self.data.val_split).items():
            self.log(name, value, prog_bar=name == "val/ndcg@10")

    def on_test_epoch_start(self) -> None:
        """As `on_validation_epoch_start`."""
        self.on_validation_epoch_start()

    def test_step(self, batch: NumberedItems, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As `validation_step`."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """As `on_validation_epoch_end`."""
        self.log_dict(self._figures("test", self.data.test_split))

    def _figures(self, prefix: str, split: str) -> dict[str, float]:
        queries = self.data.held_out[split]
        query_rows, query = self.held_out.gather(0)
        product_rows, product = self.held_out.gather(1)
        # A model that diverged must not be chosen.
        if not (np.isfinite(query.dense).all() and np.isfinite(product.dense).all()):
            raise self.not_finite("Embeddings of held-out queries or products are not numbers")
        is_encoded = np.zeros(len(queries), bool)
        is_encoded[query_rows] = True
        message = unreadable_queries(
            queries, split, self.query_towers(), query.is_empty, is_encoded
        )
        if message and self.trainer.is_global_zero and split not in self._warned_splits:
            self._warned_splits.add(split)
            logger.warning(message)
        own = queries.select(is_encoded)
        return held_out_figures(prefix, own, query, product_rows, product)


def held_out_figures(
    prefix: str, queries: HeldOut, query: Embedded, product_rows: Rows, product: Embedded
) -> dict[str, float]:
    """Figures of exact search, over all queries and by type where there are both.

    Args:
        prefix: of the figures' names, `val` or `test`.
        queries: Q queries that were encoded.
        query: their vectors.
        product_rows: (n,) ascending positions of the products that were encoded.
        product: their vectors.
    """
    # A query whose own product was not encoded needs to leave none out.
    place = np.searchsorted(product_rows, queries.own).clip(max=len(product_rows) - 1)
    own = np.where((queries.own >= 0) & (product_rows[place] == queries.own), place, -1)
    found = exact_search(query, product, own, k=K)  # (Q, K)
    hits = np.where(found >= 0, product_rows[found], -1)
    # A query that the model cannot read finds nothing.
    hits[query.is_empty] = -1
    is_product_query = queries.own >= 0
    # Products as queries and other queries are different tasks: each has its own figures.
    subsets = {prefix: np.full(len(hits), True)}
    if is_product_query.any() and not is_product_query.all():
        subsets[f"{prefix}/product_queries"] = is_product_query
        subsets[f"{prefix}/other_queries"] = ~is_product_query
    figures: dict[str, float] = {}
    for name, subset in subsets.items():
        figures |= ranking_figures(
            name,
            hits[subset],
            queries.relevant[subset],
            queries.judged[subset],
            queries.grade[subset],
        )
    return figures


def unreadable_queries(
    queries: HeldOut, split: str, towers: Sequence[str], unread: Mask, is_encoded: Mask
) -> str:
    """A warning of held-out queries of which the model reads nothing; empty where there are none.

    Args:
        queries: all queries of the split.
        split: its name.
        towers: names of the query encoder's towers.
        unread: (E,) bool of the encoded queries, the model reads nothing of the query.
        is_encoded: (Q,) bool; a sanity check encodes the first batches alone.

    Raises:
        ValueError: the model reads nothing of any query.
    """
    names = ", ".join(towers)
    # Nothing readable at all is an error, some unreadable queries a warning.
    if unread.all() and is_encoded.all():
        raise ValueError(
            f"None of the {len(queries)} {split} queries ({queries.origin}) has anything that this "
            f"model reads ({names}), so no model could be chosen by them: give it a tower for "
            "them, or the catalogue judged queries, groups or families."
        )
    if not unread.any():
        return ""
    return (
        f"{unread.sum()} of {len(unread)} {split} queries have nothing that this model reads "
        f"({names}) and find nothing."
    )


def ranking_figures(
    prefix: str, hits: Rows, relevant: Rows, judged: Rows, grade: NDArray[np.floating[Any]]
) -> dict[str, float]:
    """hit@1, hit@10, recall@10, MRR@10 and nDCG@10, by name.

    Args:
        prefix: of the names.
        hits: (Q, K) int64 positions of products, -1 for none.
        relevant: (Q, R) int64, -1 padded.
        judged: (Q, J) int64, -1 padded.
        grade: (Q, J) float32.
    """
    return {
        f"{prefix}/hit@1": hit_at_k(hits, relevant, 1),
        f"{prefix}/hit@10": hit_at_k(hits, relevant, K),
        f"{prefix}/recall@10": recall_at_k(hits, relevant, K),
        f"{prefix}/mrr@10": mrr(hits, relevant),
        f"{prefix}/ndcg@10": ndcg_at_k(hits, judged, grade, K),
    }


def exact_search(
    query: Embedded, product: Embedded, own: Rows, k: int, block: int = 1024
) -> NDArray[np.int64]:
    """The k products with the highest score, best first, without the query's own product.

    Training needs no FAISS for it.

    Args:
        query: Q queries.
        product: G products; empty ones are never found.
        own: (Q,) int64 position of the query's own product, -1 for none.
        k: number of hits.
        block: queries at a time.

    Returns:
        (Q, k) int64 positions, -1 where there are fewer products.
    """
    result = np.full((len(query), k), -1, np.int64)
    is_empty = torch.from_numpy(product.is_empty)  # (G,)
    for start in range(0, len(query), block):
        rows = np.arange(start, min(start + block, len(query)))
        scores = torch.from_numpy(query.select(rows).scores(product))  # (b, G)
        own_column = torch.from_numpy(own[start : start + block])
        row = (own_column >= 0).nonzero().flatten()
        # A product is never its own hit, and an empty item is never found.
        scores[row, own_column[row]] = float("-inf")
        scores[:, is_empty] = float("-inf")
        best = scores.topk(min(k, scores.shape[1]), 1)
        hits = torch.where(best.values > float("-inf"), best.indices, -1).numpy()
        result[start : start + block, : hits.shape[1]] = hits
    return result
