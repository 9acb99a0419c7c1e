"""Batches of keys and embeddings for the losses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tritower.datamodules.batch import NO_KEY, RELATIONS, Batch, Items

NOTHING = Items(None, None, None, None, torch.ones(0, 4, dtype=torch.bool))


def keys(rows: int, **columns: list[int]) -> Tensor:
    """(rows, R) keys; those of relations that are not named are none."""
    result = torch.full((rows, len(RELATIONS)), NO_KEY)
    for name, values in columns.items():
        result[:, RELATIONS.index(name)] = torch.tensor(values)
    return result


def make_batch(
    query_keys: Tensor,
    product_keys: Tensor | None = None,
    weight: list[float] | None = None,
    judged: list[list[tuple[int, float]]] | None = None,
    absent: tuple[set[int], set[int]] = (set(), set()),
) -> Batch:
    """`judged`: for each query, product keys and weights; as many for each.

    `absent`: queries and products.
    """
    product_keys = query_keys if product_keys is None else product_keys
    weights = torch.ones(len(query_keys)) if weight is None else torch.tensor(weight)
    frequency = torch.arange(1, len(product_keys) + 1) / 2
    said = (
        None
        if judged is None
        else torch.tensor(judged, dtype=torch.float32).view(len(query_keys), -1, 2)
    )
    lists = (
        {}
        if said is None
        else {
            "judged_products": said[..., 0].long(),
            "judgement_weights": said[..., 1].contiguous(),
        }
    )
    asks = torch.tensor([i not in absent[0] for i in range(len(query_keys))])
    found = torch.tensor([i not in absent[1] for i in range(len(product_keys))])
    weights = weights * asks * found[: len(weights)]
    present = {"query_present": asks, "product_present": found}
    return Batch(
        NOTHING, NOTHING, query_keys, product_keys, weights, frequency=frequency, **lists, **present
    )


def unit(rows: int, dim: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(rows, dim, dtype=dtype), dim=1)
