"""InfoNCE with several positives: each query attracts its products and repels all others.

The loss of query i with scores s_ij and weights w_ij of its positives is

    -sum_j w_ij s_ij / sum_j w_ij + log sum_{j included} exp(s_ij)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tritower.datamodules.batch import Batch, Relation
from tritower.towers.losses.blocks import losses_in_blocks
from tritower.towers.losses.contrastive import ContrastiveLoss
from tritower.towers.losses.cross_batch_memory import CrossBatchMemory
from tritower.towers.losses.gather import rank_offset, weighted_mean
from tritower.towers.losses.rows import LossRows, make_rows
from tritower.towers.losses.sogclr import SogCLRNormalizer, log_mean_negatives
from tritower.towers.losses.targets import Targets, judgement_weights, make_targets


def info_nce(logits: Tensor, targets: Targets) -> Tensor:
    """(B, P) logits -> (B,) cross-entropy against each row's positives.

    L_out of supervised contrastive learning (Khosla et al. 2020, arXiv:2004.11362); with one
    positive it is InfoNCE (van den Oord et al. 2018, arXiv:1807.03748). For zero embeddings it is
    the logarithm of the number of products.
    """
    total_weight = targets.positive.sum(1)  # (B,)
    attraction = (logits * targets.positive).sum(1) / total_weight  # (B,)
    included = logits.masked_fill(~targets.included, float("-inf"))  # (B, P)
    return included.logsumexp(1) - attraction


class InfoNCE(ContrastiveLoss):
    """Multi-positive InfoNCE in both directions, or one.

    Rows are weighted by graded relevance (GCL, Zhu et al. 2024, arXiv:2404.08535).

    Args:
        temperature: at the start, in cosine; it is learned.
        min_temperature: lower bound of the learned temperature.
        positives: relation -> weight of pairs that are positives beside each query's own product;
            null takes `product`, `group` and `query` with weight 1.
        ignored: relations that leave a pair out; null takes `family`, `title` and `picture`.
        same_side: compare queries with queries and products with products too (SupCon,
            arXiv:2004.11362).
        log_q: 0 to 1, the share of log(frequency) that is subtracted from a negative product's
            score. Popular products are in more batches than others and would be pushed away more
            often. The positive's score is left as it is (arXiv:2507.09331).
        product_share: 0 to 1, the weight of the direction from products to queries; the rest is
            the weight of the direction from queries to products. 0 suits relations that hold in
            one direction, such as accessories.
        negatives: more than the batch has: embeddings of past batches (`CrossBatchMemory`), or
            remembered sums over negatives (`SogCLRNormalizer`); null for the batch's own.

    Raises:
        ValueError: a share outside 0 to 1.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        min_temperature: float = 0.01,
        positives: dict[Relation, float] | None = None,
        ignored: list[Relation] | None = None,
        same_side: bool = False,
        log_q: float = 0.0,
        product_share: float = 0.5,
        negatives: CrossBatchMemory | SogCLRNormalizer | None = None,
    ) -> None:
        super().__init__(temperature, min_temperature, positives, ignored)
        if not 0 <= log_q <= 1:
            raise ValueError(f"log_q={log_q}: choose 0 (none) to 1 (all of it).")
        if not 0 <= product_share <= 1:
            raise ValueError(
                f"product_share={product_share}: choose 0 (queries alone) to 1 (products alone)."
            )
        self.same_side = same_side
        self.log_q = log_q
        self.product_share = product_share
        self.memory = negatives if isinstance(negatives, CrossBatchMemory) else None
        self.normalizer = negatives if isinstance(negatives, SogCLRNormalizer) else None

    def set_dim(self, dim: int) -> None:
        """Allocate the memory for embeddings of size D."""
        if self.memory is not None:
            self.memory.allocate(dim)

    def forward(self, query: Tensor, product: Tensor, batch: Batch) -> Tensor:
        """The () loss of this process's (B, D) rows; see `Loss.forward`."""
        weight = batch.weight.float()  # (B,)
        queries, products = make_rows(query, product, batch, self._product_offset(batch))

        # Columns: the rows of all processes, and those of past batches.
        all_queries = queries.gather()
        all_products = products.gather()
        if self.memory is not None:
            all_queries, all_products = self.memory.extend(all_queries, all_products)

        # Row i of the batch is column i of this process's part, on both sides.
        row = torch.arange(len(query), device=query.device)
        query_column = rank_offset(len(query)) + row
        product_column = rank_offset(len(product)) + row

        # Rows without weight are compared with nothing.
        queries = queries._replace(present=weight > 0)
        products = products.head(len(query))._replace(present=weight > 0)

        losses = torch.zeros_like(weight)  # (B,)
        if self.product_share < 1:
            forward = self._row_losses(
                queries, query_column, all_products, product_column, all_queries
            )
            if self.normalizer is not None:
                forward = self.normalizer.normalize("query", forward, queries.keys)
            losses = losses + (1 - self.product_share) * forward
        if self.product_share > 0:
            backward = self._row_losses(
                products, product_column, all_queries, query_column, all_products
            )
            if self.normalizer is not None:
                backward = self.normalizer.normalize("product", backward, products.keys)
            losses = losses + self.product_share * backward
        return weighted_mean(losses, weight)

    def _product_offset(self, batch: Batch) -> Tensor | None:
        """(P,) correction of scores for the frequency of products; None for none."""
        if not self.log_q or batch.frequency is None:
            return None
        # Mined negatives have frequency 0: they were not drawn by frequency.
        frequency = torch.where(batch.frequency > 0, batch.frequency, 1.0)
        return -self.log_q * frequency.log()

    def _row_losses(
        self,
        rows: LossRows,
        self_column: Tensor,
        columns: LossRows,
        target_column: Tensor,
        same_side_rows: LossRows,
    ) -> Tensor:
        """(B,) losses of one direction.

        Args:
            rows: B rows of this process.
            self_column: (B,) int64, their positions in `same_side_rows`.
            columns: rows of the other side, of all processes.
            target_column: (B,) int64, the column that is each row's own positive.
            same_side_rows: rows of the same side, of all processes.
        """
        vectors = columns.vectors  # (P, D)
        keys = columns.keys  # (P, R)
        offset = columns.offset  # (P,)
        present = columns.present  # (P,)
        if self.same_side:
            vectors = torch.cat([vectors, same_side_rows.vectors])
            keys = torch.cat([keys, same_side_rows.keys])
            offset = torch.cat([offset, same_side_rows.offset])
            present = torch.cat([present, same_side_rows.present])

        def block_losses(scale: Tensor, vectors: Tensor, *block: Tensor) -> Tensor:
            """(b,) losses of a block of rows."""
            some_rows = LossRows(*block[:-2])
            target_column, self_column = block[-2:]
            judgement = judgement_weights(some_rows, columns)
            if judgement is not None:
                # Pairs of one side are not judged.
                judgement = F.pad(judgement, (0, len(vectors) - judgement.shape[1]))
            targets = make_targets(
                some_rows.keys,
                keys,
                target_column,
                self.rules,
                self_column=self_column if self.same_side else None,
                judgement=judgement,
                present=(some_rows.present, present),
            )
            logits = scale * (some_rows.vectors @ vectors.T)  # (b, P)
            if self.log_q:
                logits = logits + torch.where(targets.positive > 0, 0.0, offset)
            if self.normalizer is not None:
                return log_mean_negatives(logits, targets)
            return info_nce(logits, targets)

        float_rows = rows._replace(vectors=rows.vectors.float())
        shared = (self.scale.float(), vectors)
        own_column = self_column + len(columns.vectors)
        return losses_in_blocks(
            block_losses, len(keys), shared, *float_rows, target_column, own_column
        )
