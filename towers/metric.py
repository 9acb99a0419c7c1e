"""From embeddings to the vectors whose inner product is the score."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from tritower.datamodules.batch import Side

Metric = Literal["cosine", "inner_product", "kl"]
"""The measure that embeddings are compared by.

cosine: unit embeddings as they are. inner_product: embeddings as they are, those of `BlockEncoder`,
whose missing blocks are zeros. kl: logits are sqrt(D) times the embedding, so that they vary
by about 1, and a query lies next to the products whose softmax has the least Kullback-Leibler
divergence from its own. That is not symmetric: a product may be near to a query that is far from
it.
"""


def to_score_space(embedding: Tensor, side: Side, metric: Metric) -> Tensor:
    """The vectors whose inner product is the score.

    Args:
        embedding: (B, D) vectors, of unit length but under inner_product.
        side: of the embeddings.
        metric: of the model.

    Returns:
        (B, D): the same under cosine and inner_product. Under kl float32: probabilities p of
        queries, log q + log D of products; then the score p (log q + log D) is log D minus the
        entropy of p, which all products share, minus KL(p || q).
    """
    if metric != "kl":
        return embedding
    dim = embedding.shape[-1]
    logits = math.sqrt(dim) * embedding.float()
    if side == "query":
        return logits.softmax(-1)
    return logits.log_softmax(-1) + math.log(dim)
