"""The rows that a contrastive loss compares: embeddings of one side, with their keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tritower.datamodules.batch import Batch
from tritower.towers.losses.gather import gather_rows, num_processes


class LossRows(NamedTuple):
    """Embeddings of one side, and what decides about their pairs.

    Attributes:
        vectors: (n, D) unit vectors.
        keys: (n, R) int64.
        offset: (n,) float32, added to scores with these rows.
        present: (n,) bool, False where a row has no embedding and is compared with nothing.
        judged_products: (n, J) int64, `product` keys of the judged products of a query; of
            products, J = 0.
        judgement_weights: (n, J) float32.
    """

    vectors: Tensor
    keys: Tensor
    offset: Tensor
    present: Tensor
    judged_products: Tensor
    judgement_weights: Tensor

    def gather(self) -> LossRows:
        """The rows of all processes, (B, D) -> (P x B, D) float32, with gradient."""
        judged = self.judged_products
        weights = self.judgement_weights
        # Products have no judgements: there is nothing to send.
        if judged.shape[1]:
            judged = gather_rows(judged)
            weights = gather_rows(weights)
        else:
            count = num_processes() * len(judged)
            judged = judged.new_empty(count, 0)
            weights = weights.new_empty(count, 0)
        return LossRows(
            gather_rows(self.vectors).float(),
            gather_rows(self.keys),
            gather_rows(self.offset),
            gather_rows(self.present),
            judged,
            weights,
        )

    def head(self, count: int) -> LossRows:
        """The first `count` rows, (count, D)."""
        return LossRows(*(tensor[:count] for tensor in self))


def make_rows(
    query: Tensor, product: Tensor, batch: Batch, offset: Tensor | None = None
) -> tuple[LossRows, LossRows]:
    """The queries and the products of this process.

    Args:
        query: (B, D) unit vectors.
        product: (P, D) unit vectors.
        batch: keys, judgements and presence.
        offset: (P,) float32, added to scores with the products; None for zero.
    """
    zeros = product.new_zeros(len(product), dtype=torch.float32)  # (P,)
    query_zeros = zeros[: len(query)]  # (B,)
    no_judgements = batch.query_keys[:, :0]  # (B, 0)

    # Whatever a batch leaves out is neutral: no judgements, everything present, no offset.
    judged = batch.judged_products
    weights = batch.judgement_weights
    if judged is None or weights is None:
        judged = no_judgements
        weights = query_zeros[:, None][:, :0]
    query_present = batch.query_present
    if query_present is None:
        query_present = query_zeros == 0
    product_present = batch.product_present
    if product_present is None:
        product_present = zeros == 0

    queries = LossRows(query, batch.query_keys, query_zeros, query_present, judged, weights)
    products = LossRows(
        product,
        batch.product_keys,
        zeros if offset is None else offset,
        product_present,
        batch.product_keys[:, :0],
        zeros[:, None][:, :0],
    )
    return queries, products
