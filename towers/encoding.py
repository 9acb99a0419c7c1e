"""How a model runs its towers: in chunks, from cached features, compiled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.checkpoint import checkpoint

from tritower.datamodules.batch import Item, Items
from tritower.datamodules.preprocess import Preprocess
from tritower.datamodules.products import ProductDataModule, all_items
from tritower.towers import guards
from tritower.towers.encoder import Encoded, Encoder
from tritower.towers.feature_cache import CacheOptions, cached
from tritower.towers.tower import Tower

if TYPE_CHECKING:
    from tritower.towers.two_tower import TwoTower


@dataclass(frozen=True)
class EncodingOptions:
    """How items are encoded in training; the embeddings are the same.

    Attributes:
        chunk_size: items that are encoded at once; null encodes the whole batch. Smaller needs
            less memory and more time.
        feature_cache: folder where features of frozen towers are kept; null runs frozen towers
            every time.
        compile_backend: of torch.compile, for all towers that are trained, e.g. `inductor`; null
            does not compile them.
    """

    chunk_size: int | None = None
    feature_cache: Path | None = None
    compile_backend: str | None = None

    def __post_init__(self) -> None:
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(
                f"chunk_size={self.chunk_size}: choose at least 1, or null for the whole batch."
            )
        if self.compile_backend is None:
            return  # listing the backends would slow every start
        backends = torch.compiler.list_backends(exclude_tags=())
        if self.compile_backend not in backends:
            choices = ", ".join(backends)
            raise ValueError(f"compile_backend={self.compile_backend!r}: choose one of {choices}.")


def encode_in_chunks(encoder: Encoder, items: Items, chunk_size: int | None) -> Encoded:
    """`encoder(items)`, computed in chunks of `chunk_size` items; None encodes all at once.

    In training each chunk's forward pass runs again in the backward pass, as in GradCache (Gao et
    al. 2021, arXiv:2101.06983): memory is that of one chunk, and gradients are those of the batch.
    """
    count = len(items.present)
    if chunk_size is None or count <= chunk_size:
        encoded: Encoded = encoder(items)
        return encoded
    # The forward pass of a chunk runs again in its backward pass, so memory holds the activations
    # of one chunk at a time.
    chunks = []
    for start in range(0, count, chunk_size):
        chunks.append(items.rows(start, min(start + chunk_size, count)))
    if torch.is_grad_enabled():
        parts = [checkpoint(encoder, chunk, use_reentrant=False) for chunk in chunks]
    else:
        parts = [encoder(chunk) for chunk in chunks]
    joined: list[Any] = []
    for tensors in zip(*parts, strict=True):
        joined.append(None if tensors[0] is None else torch.cat(tensors))
    return Encoded(*joined)


def to_device(items: Items, device: torch.device) -> Items:
    """Move items as Lightning moves batches."""
    from lightning.fabric.utilities import move_data_to_device

    moved: Items = move_data_to_device(items, device)
    return moved


def all_towers(encoders: Iterable[Encoder]) -> list[Tower]:
    """The towers of all encoders, each once."""
    towers: list[Tower] = []
    for encoder in dict.fromkeys(encoders):
        towers += cast(list[Tower], encoder.towers.values())
    return towers


def compile_towers(towers: Iterable[Tower], backend: str | None) -> None:
    """Compile the towers that are trained; None for none. Weights keep their names."""
    if backend is None:
        return
    for tower in towers:
        if not tower.frozen:
            tower.compile(backend=backend)


def check_items(items: Sequence[Item], tensors: Items, encoder: Encoder) -> None:
    """Refuse items that have no modality of the encoder's.

    Raises:
        ValueError: with the first such item.
    """
    unreadable = (~tensors.present.any(1)).nonzero().flatten().tolist()
    if not unreadable:
        return
    item = items[unreadable[0]]
    towers = ", ".join(encoder.towers)
    raise ValueError(
        f"Item {unreadable[0]} of {len(items)} has nothing that this model reads ({towers}): text "
        f"{list(item.text)}, {len(item.images)} pictures, attributes {list(item.attributes)}."
    )


def exchange_with_data(model: TwoTower, data: ProductDataModule, *, check_texts: bool) -> None:
    """Compare the schemas, and hand the model's preprocessing to the data.

    Raises:
        ValueError: the model was made for another catalogue.
    """
    if model.schema != data.schema:
        raise ValueError(
            f"This model was made for another catalogue than {data.catalogue}: their schemas "
            "differ."
        )
    data.preprocess = model.preprocess
    if check_texts:
        guards.check_texts(model.product, all_items(data))
    if model.encoding.feature_cache is not None:
        data.preprocess = cached_preprocess(model, model.encoding.feature_cache)


def cached_preprocess(model: TwoTower, folder: Path) -> Preprocess:
    """Preprocessing that looks up the features of frozen towers, after adding what is missing."""
    trainer = model.trainer
    data = model.data
    options = CacheOptions(
        every_view=data.views.field_dropout > 0, device=trainer.strategy.root_device
    )

    def own_items() -> Iterator[Item]:
        return islice(all_items(data), trainer.global_rank, None, trainer.world_size)

    # Each process adds a part of the features, and reads all of them.
    arguments = (model.preprocess, model.query, model.product)
    cached(*arguments, own_items, folder, options)
    trainer.strategy.barrier()
    return cached(*arguments, partial(all_items, data), folder, replace(options, write=False))
