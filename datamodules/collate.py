"""Examples become a batch of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from tritower.datamodules.batch import Batch, Example, Item
from tritower.datamodules.preprocess import Preprocess


class BatchProduct(NamedTuple):
    """A product of a batch.

    Attributes:
        item: its view.
        keys: R keys.
        frequency: how often it is drawn, 1 on average.
    """

    item: Item
    keys: Sequence[int]
    frequency: float


def collate(
    examples: Sequence[Example],
    preprocess: Preprocess,
    rngs: Sequence[np.random.Generator] | None = None,
    negatives: Sequence[BatchProduct] = (),
) -> Batch:
    """B examples as tensors.

    Args:
        examples: B examples.
        preprocess: of the model.
        rngs: B generators; pictures are augmented with them. None for no augmentation.
        negatives: further products, behind those of the examples.
    """
    query = preprocess.query([example.query for example in examples], rngs)
    products = [
        BatchProduct(example.product, example.product_keys, example.frequency)
        for example in examples
    ]
    products += negatives
    if rngs is not None:
        # A negative is augmented with the generator of the example it belongs to.
        owner = [number * len(examples) // len(negatives) for number in range(len(negatives))]
        rngs = [*rngs, *(rngs[number] for number in owner)]
    product = preprocess.product([product.item for product in products], rngs)

    # A pair of which one side has no modality has weight 0 and no label.
    query_present = query.present.any(1)
    product_present = product.present.any(1)
    both_present = query_present & product_present[: len(examples)]
    weight = torch.tensor([example.weight for example in examples]) * both_present
    labels = [math.nan if example.label is None else example.label for example in examples]
    label = None
    if not all(map(math.isnan, labels)):
        label = torch.tensor(labels).masked_fill(~both_present, math.nan)

    judged_products = None
    judgement_weights = None
    if examples[0].judged_products:
        judged_products = torch.tensor([example.judged_products for example in examples])
        judgement_weights = torch.tensor([example.judgement_weights for example in examples])
    return Batch(
        query=query,
        product=product,
        query_keys=torch.tensor([example.query_keys for example in examples]),
        product_keys=torch.tensor([product.keys for product in products]),
        weight=weight,
        label=label,
        frequency=torch.tensor([product.frequency for product in products]),
        judged_products=judged_products,
        judgement_weights=judgement_weights,
        query_present=query_present,
        product_present=product_present,
    )
