"""Where blocks begin: what needs no training, taken from the catalogue itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from tritower.datamodules.batch import Item
from tritower.datamodules.catalogue import product_item
from tritower.datamodules.products import ProductDataModule
from tritower.towers.block_encoder import BlockEncoder
from tritower.towers.block_weights import choose_start_weights
from tritower.towers.encoder import Encoder, features_of
from tritower.towers.encoding import to_device
from tritower.towers.sparse_terms import SparseTerms

if TYPE_CHECKING:
    from tritower.towers.two_tower import TwoTower

logger = logging.getLogger(__name__)

COMPONENT_ITEMS = 8_192
"""Products whose features decide about principal components."""

BATCH = 256
"""Items per forward pass."""


def block_encoders(encoders: tuple[Encoder, Encoder]) -> list[BlockEncoder]:
    """The encoders of blocks, each once."""
    return [e for e in dict.fromkeys(encoders) if isinstance(e, BlockEncoder)]


def count_terms(encoders: tuple[Encoder, Encoder], data: ProductDataModule) -> None:
    """Take the frequencies of terms from all products; equal in every process."""
    for encoder in block_encoders(encoders):
        tower = encoder.named_towers.get("lexical")
        if isinstance(tower, SparseTerms):
            tower.count(_products(data))


def start_blocks(model: TwoTower, data: ProductDataModule) -> dict[str, Tensor]:
    """Begin projections as isometries, and weights as what finds most on val without training.

    Returns:
        Name -> trained parameter at the start, of its own shape, such as (D, F) of a projection,
        on the CPU; empty without `BlockEncoder`.
    """
    encoders = block_encoders(model.encoders)
    for encoder in encoders:
        for name in encoder.projections:
            encoder.set_start(name, _components(encoder, name, data))
    if encoders:
        choose_start_weights(model, data)
    state = {}
    for name, parameter in model.named_parameters():
        if encoders and parameter.requires_grad:
            state[name] = parameter.detach().cpu().clone()
    return state


@torch.no_grad()
def _components(encoder: BlockEncoder, name: str, data: ProductDataModule) -> Tensor:
    """(D, F) orthonormal rows: the identity where it fits, else the principal components.

    Not centered, so that inner products, not variances, are kept as well as can be.
    """
    tower = encoder.named_towers[name]
    width = tower.out_dim
    if width <= encoder.block_dim:
        return torch.eye(encoder.block_dim, width)
    device = next(encoder.parameters()).device
    tower.eval()
    moment = torch.zeros(width, width, dtype=torch.float64)
    step = max(1, len(data.products) // COMPONENT_ITEMS)
    items = islice(_products(data), 0, None, step)
    preprocess = data.model_preprocess.product
    while batch := list(islice(items, BATCH)):
        inputs = getattr(to_device(preprocess(batch), device), name)
        if inputs is not None:
            features = F.normalize(features_of(tower, inputs).float(), dim=1).cpu().double()
            moment += features.T @ features
    # Eigenvalues come in ascending order.
    _, vectors = torch.linalg.eigh(moment)
    return vectors[:, -encoder.block_dim :].flip(1).T.float()


def _products(data: ProductDataModule) -> Iterator[Item]:
    for row in range(len(data.products)):
        yield product_item(data.products.row(row))
