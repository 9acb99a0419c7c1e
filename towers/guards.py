"""Checks that stop a training run with a clear error instead of a wrong model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from tritower.datamodules.batch import Batch, Item
from tritower.datamodules.schema import Schema
from tritower.towers.block_encoder import BlockEncoder
from tritower.towers.encoder import Encoder
from tritower.towers.losses.contrastive import ContrastiveLoss, Loss
from tritower.towers.metric import Metric
from tritower.towers.text import TextTower

CHECKED_ITEMS = 1000
"""Products whose texts are checked before training."""


def check_same_dim(query: Encoder, product: Encoder) -> None:
    """Refuse encoders whose embeddings have different sizes."""
    if query.embed_dim != product.embed_dim:
        raise ValueError(
            f"The query encoder's embed_dim={query.embed_dim} differs from the product encoder's "
            f"embed_dim={product.embed_dim}: their embeddings could not be compared."
        )


def check_blocks(encoders: tuple[Encoder, Encoder], metric: Metric) -> None:
    """Refuse a metric that does not suit the encoders."""
    has_blocks = {isinstance(encoder, BlockEncoder) for encoder in encoders}
    if has_blocks != {metric == "inner_product"}:
        raise ValueError(
            f"metric={metric!r} with {type(encoders[1]).__name__}: BlockEncoder needs "
            "metric=inner_product, and other encoders cosine or kl."
        )


def check_texts(encoder: Encoder, items: Iterable[Item]) -> None:
    """Warn of texts that the text tower would cut or cannot read; looks at the first products."""
    if "text" not in encoder.towers:
        return
    tower = encoder.towers["text"]
    assert isinstance(tower, TextTower)
    texts = []
    for item in islice(items, CHECKED_ITEMS):
        text = tower.preprocess.render(item, "product")
        if text:
            texts.append(text)
    tower.preprocess.check(texts)


def check_monitors(trainer: Trainer, is_product_query: np.ndarray, split: str) -> None:
    """Refuse to monitor figures by type of query where all queries are of one type.

    Args:
        trainer: with its callbacks.
        is_product_query: (Q,) bool, of the held-out queries.
        split: name of their split.

    Raises:
        ValueError: a callback monitors a figure that will not exist.
    """
    if is_product_query.any() and not is_product_query.all():
        return
    for callback in (*trainer.early_stopping_callbacks, *trainer.checkpoint_callbacks):
        monitor = str(getattr(callback, "monitor", None))
        if "_queries/" in monitor:
            figure = monitor.rpartition("/")[2]
            raise ValueError(
                f"monitor={monitor}: all {split} queries are of one type here, and have no figures "
                f"beside those of all: monitor val/{figure}."
            )


def not_finite(
    problem: str, step: int, loss: Loss, product_ids: Iterable[str] = ()
) -> FloatingPointError:
    """The error of a loss, gradient or embedding that is not a number.

    Args:
        problem: "The loss is nan".
        step: number of the step.
        loss: whose temperature is named.
        product_ids: some products of the batch.
    """
    temperature = math.nan
    if isinstance(loss, ContrastiveLoss):
        temperature = (1 / loss.scale).item()
    products = ", ".join(islice(product_ids, 8))
    where = f"at step {step} (temperature {temperature:.4f}"
    if products:
        where += f", products {products}"
    return FloatingPointError(
        f"{problem} {where}). Lower model.optimizer.lr, or train with trainer.precision=bf16-mixed "
        "or 32. Checkpoints so far are untouched."
    )


def check_same_catalogue(own: Schema | None, stored: Schema) -> None:
    """Refuse a checkpoint of another catalogue's schema.

    Raises:
        ValueError: the schemas differ.
    """
    if own != stored:
        raise ValueError(
            "The checkpoint was trained on another catalogue: its schema differs from this one's."
        )


def other_model(error: RuntimeError) -> ValueError:
    """The error of a checkpoint whose weights do not fit the model.

    Args:
        error: of `load_state_dict`, with a line for each mismatch.
    """
    lines = [line.strip()[:120] for line in str(error).splitlines()[1:3]]
    return ValueError(
        f"The checkpoint is of another model than this configuration makes ({'; '.join(lines)}). "
        "A run keeps the configuration that it was trained with as logs/version_0/config.yaml: "
        "name that one with --config."
    )


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients together, as a () tensor."""
    return nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)


def zero_loss_of_unused_towers(encoders: tuple[Encoder, Encoder], batch: Batch) -> Tensor:
    """A () zero with a gradient for the weights that this batch does not use.

    Under several processes each waits for the gradients of all weights.

    Args:
        encoders: of queries and of products.
        batch: of this process.
    """
    total = torch.zeros((), device=batch.weight.device)
    for encoder, items in zip(encoders, (batch.query, batch.product), strict=True):
        for name in encoder.towers:
            if getattr(items, name) is not None:
                continue
            for module in (encoder.towers[name], encoder.projections[name]):
                for parameter in module.parameters():
                    if parameter.requires_grad:
                        total = total + 0.0 * parameter.sum()
    return total
