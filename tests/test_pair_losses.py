"""Losses of labeled pairs against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support.loss_batches import keys, make_batch
from tritower.towers.losses.contrastive import Loss
from tritower.towers.losses.pairs import CoSENT, PairLoss

COSINES = [0.8, 0.1, 0.6]
QUERY = torch.tensor([[1.0, 0.0]] * 3)
PRODUCT = torch.tensor([[c, math.sqrt(1 - c * c)] for c in COSINES])


def loss_of(loss: Loss, labels: list[float] | None) -> Tensor:
    label = None if labels is None else torch.tensor(labels)
    return loss(QUERY, PRODUCT, make_batch(keys(3, product=[1, 2, 3]))._replace(label=label))


def test_pair_loss_by_hand() -> None:
    """Similar at .8: .2 squared; dissimilar at .1, below the margin.

    Nothing; half similar at .6: half of both.
    """
    expected = (0.2**2 + 0.0 + 0.5 * 0.4**2 + 0.5 * 0.3**2) / 3
    assert loss_of(PairLoss(margin=0.3), [1.0, 0.0, 0.5]).item() == pytest.approx(
        expected, abs=1e-6
    )


def test_cosent_by_hand() -> None:
    """Pair 2 has a lower label than pair 1 but a higher cosine, which is the only wrong order."""
    wrong, right, right_too = (
        math.exp((0.6 - 0.1) / 0.5),
        math.exp((0.1 - 0.8) / 0.5),
        math.exp((0.6 - 0.8) / 0.5),
    )
    expected = math.log(1 + wrong + right + right_too)
    assert loss_of(CoSENT(temperature=0.5), [1.0, 0.5, 0.0]).item() == pytest.approx(
        expected, abs=1e-5
    )


@pytest.mark.parametrize("loss", [PairLoss(), CoSENT()], ids=["pairs", "CoSENT"])
def test_pairs_without_a_label_have_no_part(loss: Loss) -> None:
    assert loss_of(loss, None).item() == loss_of(loss, [torch.nan] * 3).item() == 0.0
    alone = loss(
        QUERY[1:], PRODUCT[1:], make_batch(keys(2))._replace(label=torch.tensor([1.0, 0.0]))
    )
    torch.testing.assert_close(loss_of(loss, [torch.nan, 1.0, 0.0]), alone)


@pytest.mark.parametrize("loss", [PairLoss(), CoSENT()], ids=["pairs", "CoSENT"])
def test_a_step_draws_the_similar_together_and_the_dissimilar_apart(loss: Loss) -> None:
    product = PRODUCT.clone().requires_grad_()
    batch = make_batch(keys(3))._replace(label=torch.tensor([0.0, 1.0, torch.nan]))
    loss(QUERY, product, batch).backward()
    assert product.grad[0, 0] > 0 > product.grad[1, 0]
    assert not product.grad[2].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PairLoss(margin=1.0), "margin=1.0"),
        (lambda: CoSENT(temperature=0.0), "temperature=0.0"),
    ],
)
def test_impossible_settings_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
