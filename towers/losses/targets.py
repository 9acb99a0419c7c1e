"""Which pairs of a batch are positives, negatives, or left out.

Equal keys decide (see `tritower.datamodules.batch.RELATIONS`): the same product twice in a batch
is never pushed apart. An explicit judgement of a pair overrides its keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tritower.datamodules.batch import NO_KEY, RELATIONS, Relation
from tritower.towers.losses.rows import LossRows


class Targets(NamedTuple):
    """The role of each pair of a row and a column.

    Attributes:
        positive: (B, P) float32, weight of a positive, 0 for all other pairs.
        included: (B, P) bool, False where the pair is left out of the loss.
    """

    positive: Tensor
    included: Tensor


@dataclass(frozen=True)
class PairRules:
    """The relations that make positives, and those that leave a pair out.

    Attributes:
        positives: weight of each relation that makes a positive.
        ignored: relations that leave out a pair that is no positive.
    """

    positives: dict[Relation, float]
    ignored: list[Relation]

    def __post_init__(self) -> None:
        for relation in (*self.positives, *self.ignored):
            if relation not in RELATIONS:
                choices = ", ".join(RELATIONS)
                raise ValueError(f"{relation!r} is no relation: choose from {choices}.")


def make_targets(
    row_keys: Tensor,
    column_keys: Tensor,
    target_column: Tensor,
    rules: PairRules,
    *,
    self_column: Tensor | None = None,
    judgement: Tensor | None = None,
    present: tuple[Tensor, Tensor] | None = None,
) -> Targets:
    """The role of each pair: positive, else left out, else negative.

    Args:
        row_keys: (B, R) int64.
        column_keys: (P, R) int64.
        target_column: (B,) int64, the column that is each row's own positive, always of weight 1.
        rules: relations that make positives, or leave pairs out. Of several relations that hold,
            the largest weight counts.
        self_column: (B,) int64, the column that is the row itself and is left out; None where
            rows and columns are of different sides.
        judgement: (B, P) float32, weight of each pair's judgement, 0 where there is none. Judged
            pairs have the relation `query`.
        present: (B,) and (P,) bool, rows and columns that have an embedding. Others are neither
            positives nor negatives; only a row's own positive stays, so that no row is without one.
    """
    shape = (len(row_keys), len(column_keys))
    row = torch.arange(len(target_column), device=target_column.device)
    positive = torch.zeros(shape, device=row_keys.device)  # (B, P)
    included = torch.ones(shape, dtype=torch.bool, device=row_keys.device)  # (B, P)

    # Equal keys. The largest weight is written last, so it wins.
    for relation in rules.ignored:
        included &= ~have_equal_keys(row_keys, column_keys, relation)
    by_weight = sorted(rules.positives.items(), key=lambda pair: pair[1])
    for relation, weight in by_weight:
        positive.masked_fill_(have_equal_keys(row_keys, column_keys, relation), weight)
    if present is not None:
        included &= present[1]
        included &= present[0][:, None]
    positive[row, target_column] = 1.0

    # Judgements override keys.
    if judgement is not None:
        judged_weight = judgement * rules.positives.get("query", 0.0)
        positive = torch.where(judged_weight > 0, judged_weight, positive)
        if "query" in rules.ignored:
            included &= judgement == 0

    # A row is not compared with itself, nor with what has no embedding.
    if self_column is not None:
        positive[row, self_column] = 0.0
        included[row, self_column] = False
    if present is not None:
        own = positive[row, target_column]
        positive.mul_(present[1])
        positive[row, target_column] = own
    return Targets(positive, included | (positive > 0))


def have_equal_keys(row_keys: Tensor, column_keys: Tensor, relation: Relation) -> Tensor:
    """(B, R) and (P, R) keys -> (B, P) bool: both have a key of this relation, and it is equal."""
    column = RELATIONS.index(relation)
    keys = row_keys[:, column]
    # Without a key a row equals no column, not even one without a key.
    keys = torch.where(keys == NO_KEY, NO_KEY - 1, keys)
    return keys.unsqueeze(1) == column_keys[:, column]


def judgement_weights(rows: LossRows, columns: LossRows) -> Tensor | None:
    """(n, m) float32 weight of the judgement of each pair, 0 where a pair is not judged.

    Either side may be the queries; None where no pair is judged.
    """
    if columns.judged_products.shape[1]:
        transposed = judgement_weights(columns, rows)
        if transposed is None:
            return None
        return transposed.T
    if not rows.judged_products.shape[1]:
        return None
    # Each judged product's place among the distinct products of the columns.
    column_products = columns.keys[:, RELATIONS.index("product")]
    products, product_of_column = column_products.unique(return_inverse=True)
    place = torch.searchsorted(products, rows.judged_products).clamp(max=len(products) - 1)
    is_there = (products[place] == rows.judged_products) & (rows.judged_products != NO_KEY)
    weight = torch.where(is_there, rows.judgement_weights, 0.0)  # (n, J)
    # Of several judgements of one pair the largest weight counts.
    table = weight.new_zeros(len(weight), len(products))
    table = table.scatter_reduce_(1, place, weight, "amax")
    return table[:, product_of_column]  # (n, m)
