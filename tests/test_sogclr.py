"""The loss that remembers: against InfoNCE's gradient and by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.support.loss_batches import keys, make_batch, unit
from tritower.towers.losses.info_nce import InfoNCE
from tritower.towers.losses.sogclr import SogCLRNormalizer


def make_loss(temperature: float = 0.07, **options: Any) -> InfoNCE:
    return InfoNCE(temperature, negatives=SogCLRNormalizer(**options))


def test_without_memory_its_gradient_is_that_of_the_logarithm_of_the_negatives() -> None:
    torch.manual_seed(0)
    query, product = unit(6).requires_grad_(), unit(6).requires_grad_()
    loss = make_loss(0.2, decay=0.0)
    mine = torch.autograd.grad(
        loss(query, product, make_batch(keys(6, product=list(range(6))))), [query, product]
    )
    logits = 5 * query @ product.T
    others = ~torch.eye(6, dtype=torch.bool)

    def direction(matrix: torch.Tensor) -> torch.Tensor:
        return (matrix.masked_fill(~others, -torch.inf).logsumexp(1) - matrix.diagonal()).mean()

    expected = torch.autograd.grad((direction(logits) + direction(logits.T)) / 2, [query, product])
    for one, other in zip(mine, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_what_is_remembered_is_a_moving_average_by_hand() -> None:
    """Two products; similarities with the other one first 0, then .5.

    Exp(0 - 1), then exp((.5 - 1) / 1).
    """
    loss = make_loss(1.0, decay=0.75)
    batch = make_batch(keys(2, product=[1, 2]))
    loss(torch.eye(2), torch.eye(2), batch)
    again = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]])
    value = loss(again, torch.eye(2), batch).item()
    seen = loss.normalizer.log_mean.isfinite()
    assert seen.sum() == 4
    first = math.exp(-1)
    now = {"query": [math.exp(0 - 1), math.exp(0.5 - math.sqrt(0.75))]}
    now["product"] = [math.exp(0.5 - 1), math.exp(0 - math.sqrt(0.75))]
    remembered = {
        side: [0.75 * first + 0.25 * value for value in values] for side, values in now.items()
    }
    assert sorted(loss.normalizer.log_mean[0][seen[0]].exp().tolist()) == pytest.approx(
        sorted(remembered["query"]), rel=1e-5
    )
    ratios = [n / r for side in now for n, r in zip(now[side], remembered[side], strict=True)]
    assert value == pytest.approx(sum(ratios) / 4, rel=1e-5)


def test_a_row_that_stands_for_nothing_is_not_remembered() -> None:
    loss, some = make_loss(), keys(3, product=[1, 2, 3])
    value = loss(unit(3), unit(3), make_batch(some, absent=({1}, set())))
    assert loss.normalizer.log_mean.isfinite().sum().item() == 4 and value.isfinite()


def test_small_batches_come_nearer_to_the_gradient_of_the_whole_with_memory() -> None:
    """Mean gradients of batches of 4 out of 64 at the same weights, once the memory is filled."""
    torch.manual_seed(0)
    query = unit(64, 8)
    product = F.normalize(query + 0.5 * unit(64, 8), dim=1)

    def gradient(memory: float, size: int, epochs: int = 1) -> torch.Tensor:
        loss, total = make_loss(0.1, decay=memory), torch.zeros_like(query)
        for epoch in range(epochs):
            for rows in torch.randperm(64, generator=torch.Generator().manual_seed(epoch)).split(
                size
            ):
                asked = query[rows].requires_grad_()
                value = loss(asked, product[rows], make_batch(keys(size, product=rows.tolist())))
                if epoch >= epochs // 3:
                    total[rows] += torch.autograd.grad(value, asked)[0]
        return F.normalize(total.flatten(), dim=0)

    whole = gradient(0.0, 64)
    assert float(whole @ gradient(0.8, 4, 60)) > float(whole @ gradient(0.0, 4, 60)) + 0.1


def test_a_row_without_negatives_loses_nothing() -> None:
    query = unit(2).requires_grad_()
    value = make_loss()(query, unit(2), make_batch(keys(2, product=[1, 1])))
    value.backward()
    assert value.item() == 0.0
    assert not query.grad.any()


def test_what_is_remembered_is_in_the_checkpoint() -> None:
    loss = make_loss(num_slots=16)
    loss(unit(3), unit(3), make_batch(keys(3, product=[1, 2, 3])))
    other = make_loss(num_slots=16)
    other.load_state_dict(loss.state_dict())
    torch.testing.assert_close(other.normalizer.log_mean, loss.normalizer.log_mean, equal_nan=True)
    assert other.normalizer.log_mean.isfinite().any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"decay": 1.0}, "decay=1.0"), ({"num_slots": 100}, "num_slots=100")],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SogCLRNormalizer(**settings)


def test_rows_that_share_a_place_weigh_no_more_than_one_that_was_never_seen_before() -> None:
    """One row with a small sum and one with a large one, under one key.

    Each is divided by its own share at least.
    """
    loss = make_loss(0.02, decay=0.8, num_slots=2)
    # Rows of high and low loss by turns, in two places: some high one is remembered as a low one.
    query = torch.tensor(
        [[-1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 1.0]]
    ).requires_grad_()
    product = torch.tensor(
        [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]]
    )
    value = loss(query, product, make_batch(keys(6, product=[1, 2, 3, 2, 5, 6])))
    value.backward()
    assert 0 < value.item() <= 1 / (1 - 0.8)
    assert query.grad.isfinite().all() and query.grad.abs().max() <= 5 / 0.02
