"""The loss with a memory of past batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.loss_batches import keys, make_batch, unit
from tritower.datamodules.batch import NO_KEY, Batch
from tritower.towers.losses.cross_batch_memory import CrossBatchMemory
from tritower.towers.losses.info_nce import InfoNCE


def make_loss(size: int = 8, warmup: int = 0, dim: int = 5) -> InfoNCE:
    loss = InfoNCE(negatives=CrossBatchMemory(size, warmup))
    loss.set_dim(dim)
    return loss


def batch_of(first: int, rows: int = 3) -> Batch:
    return make_batch(keys(rows, product=list(range(first, first + rows))))._replace(frequency=None)


def forth(query: Tensor, columns: Tensor, scale: float) -> Tensor:
    """-log of the share of each row's answer among all columns; row i's answer is column i."""
    return -(scale * query @ columns.T).log_softmax(1).diagonal()


def test_past_products_and_queries_are_negatives_by_hand() -> None:
    torch.manual_seed(0)
    old, new = (unit(3), unit(3)), (unit(3).requires_grad_(), unit(3).requires_grad_())
    loss = make_loss()
    torch.testing.assert_close(loss(*old, batch_of(0)), InfoNCE()(*old, batch_of(0)))
    scale = float(loss.scale.detach())
    expected = forth(new[0], torch.cat([new[1], old[1]]), scale) + forth(
        new[1], torch.cat([new[0], old[0]]), scale
    )
    value = loss(*new, batch_of(3))
    torch.testing.assert_close(value, expected.mean() / 2)
    for mine, other in zip(
        torch.autograd.grad(value, new), torch.autograd.grad(expected.mean() / 2, new), strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_a_remembered_product_that_answers_a_query_is_no_negative() -> None:
    torch.manual_seed(0)
    loss, old, new = make_loss(), unit(2), unit(2)
    loss(old, old, batch_of(0, 2))
    columns, scale = torch.cat([new, old]), float(loss.scale.detach())
    judged = {
        "judged_products": torch.tensor([[0], [NO_KEY]]),
        "judgement_weights": torch.tensor([[1.0], [0.0]]),
    }
    share = (scale * new @ columns.T).log_softmax(1)
    expected = (
        -(share[0, 0] + share[0, 2]) / 2 - share[1, 1] - share.diagonal().sum()
    )  # forth, and back
    value = loss(new, new, batch_of(5, 2)._replace(**judged))
    torch.testing.assert_close(value, expected / 4)


def test_what_stood_for_nothing_is_not_compared_with_later_either() -> None:
    torch.manual_seed(0)
    vectors, new = (unit(3), unit(3)), (unit(2), unit(2))
    some = keys(3, product=[0, 1, 2])
    whole, fewer = make_loss(), make_loss()
    whole(*vectors, make_batch(some, absent=({1}, {1}))._replace(frequency=None))
    left = [0, 2]
    fewer(*(side[left] for side in vectors), make_batch(some[left])._replace(frequency=None))
    torch.testing.assert_close(whole(*new, batch_of(5, 2)), fewer(*new, batch_of(5, 2)))


def test_the_oldest_are_forgotten() -> None:
    loss = make_loss(size=4)
    vectors = [unit(3) for _ in range(3)]
    for number, rows in enumerate(vectors):
        loss(rows, rows, batch_of(3 * number))
    held = {tuple(row.tolist()) for row in loss.memory.product_vectors}
    assert held == {tuple(row.tolist()) for row in torch.cat(vectors)[-4:]}


def test_a_product_that_comes_again_is_not_pushed_away_from_its_past() -> None:
    """Its old embedding is a positive.

    With it at hand, the loss of a pair that agrees with it is low.
    """
    loss, rows = make_loss(), unit(2)
    loss(rows, rows, batch_of(0, 2))
    query = rows.clone().requires_grad_()
    loss(query, rows, batch_of(0, 2)).backward()
    again = query.grad
    pushed = make_loss()
    pushed(rows, rows, batch_of(5, 2))
    query = rows.clone().requires_grad_()
    pushed(query, rows, batch_of(0, 2)).backward()
    assert again.norm() < query.grad.norm()


def test_it_is_not_used_before_its_warmup_and_does_not_change_in_evaluation() -> None:
    loss, plain = make_loss(warmup=2), InfoNCE()
    for first in (0, 3):
        rows = unit(3), unit(3)
        torch.testing.assert_close(loss(*rows, batch_of(first)), plain(*rows, batch_of(first)))
    rows = unit(3), unit(3)
    assert loss(*rows, batch_of(6)).item() > plain(*rows, batch_of(6)).item()
    before = {name: tensor.clone() for name, tensor in loss.state_dict().items()}
    loss.eval()(*rows, batch_of(6))
    torch.testing.assert_close(loss.state_dict(), before)


def test_the_memory_and_its_place_are_in_the_checkpoint() -> None:
    loss, rows = make_loss(size=4), (unit(3), unit(3))
    loss(*rows, batch_of(0))
    other = make_loss(size=4)
    other.load_state_dict(loss.state_dict())
    new = unit(3), unit(3)
    torch.testing.assert_close(other(*new, batch_of(3)), loss(*new, batch_of(3)))
    torch.testing.assert_close(other.state_dict(), loss.state_dict())


@pytest.mark.parametrize("settings", [{"size": 0}, {"warmup": -1}])
def test_impossible_settings_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="choose a size of at least 1"):
        CrossBatchMemory(**settings)
