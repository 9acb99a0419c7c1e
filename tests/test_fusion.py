"""Fusion of modalities: what is absent never matters, shares add up to one."""

from __future__ import annotations

import pytest
import torch

from tritower.towers.fusion import FUSIONS

DIM, NUM_MODALITIES = 16, 3

PRESENT = torch.tensor([[m & 1 > 0, m & 2 > 0, m & 4 > 0] for m in range(8)])
"""All subsets of three modalities; the first row has none."""


@pytest.fixture(params=list(FUSIONS))
def fusion(request: pytest.FixtureRequest) -> torch.nn.Module:
    fusion = FUSIONS[request.param](NUM_MODALITIES, DIM)
    for parameter in fusion.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return fusion


def test_every_subset_is_fused_to_finite_vectors(fusion: torch.nn.Module) -> None:
    fused, shares = fusion(torch.randn(8, NUM_MODALITIES, DIM), PRESENT)
    assert fused.shape == (8, DIM) and shares.shape == (8, NUM_MODALITIES)
    assert fused.isfinite().all() and shares.isfinite().all()
    assert (shares >= 0).all()


def test_shares_add_up_to_one(fusion: torch.nn.Module) -> None:
    _, shares = fusion(torch.randn(8, NUM_MODALITIES, DIM), PRESENT)
    torch.testing.assert_close(shares[1:].sum(1), torch.ones(7))


def test_neighbors_in_the_batch_do_not_matter(fusion: torch.nn.Module) -> None:
    z = torch.randn(8, NUM_MODALITIES, DIM)
    together, _ = fusion(z, PRESENT)
    alone = torch.cat([fusion(z[i : i + 1], PRESENT[i : i + 1])[0] for i in range(8)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_absent_modalities_have_no_share_of_the_gated_and_the_mean_fusion() -> None:
    for name in ("gated", "mean"):
        fusion = FUSIONS[name](NUM_MODALITIES, DIM)
        _, shares = fusion(torch.randn(8, NUM_MODALITIES, DIM), PRESENT)
        assert shares[1:][~PRESENT[1:]].abs().max() == 0


def test_gated_fusion_starts_as_the_mean_of_what_is_there() -> None:
    z = torch.randn(8, NUM_MODALITIES, DIM)
    fused, shares = FUSIONS["gated"](NUM_MODALITIES, DIM)(z, PRESENT)
    for row in range(1, 8):
        torch.testing.assert_close(fused[row], z[row][PRESENT[row]].mean(0))
        torch.testing.assert_close(
            shares[row][PRESENT[row]],
            torch.full((int(PRESENT[row].sum()),), 1 / PRESENT[row].sum()),
        )
    torch.testing.assert_close(fused[0], z[0].mean(0))  # absent tokens alone


def test_gates_see_the_mask() -> None:
    fusion = FUSIONS["gated"](NUM_MODALITIES, DIM)
    torch.nn.init.normal_(fusion.gate.weight)
    z = torch.randn(1, NUM_MODALITIES, DIM).expand(2, -1, -1)
    _, shares = fusion(z, torch.tensor([[True, True, True], [True, True, False]]))
    with_all, without_last = (shares[:, 0] / shares[:, 1]).tolist()
    assert with_all != pytest.approx(without_last, rel=1e-3)


def test_every_weight_learns(fusion: torch.nn.Module) -> None:
    fused, _ = fusion(torch.randn(8, NUM_MODALITIES, DIM, requires_grad=True), PRESENT)
    (fused * torch.randn_like(fused)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in fusion.parameters())


@pytest.mark.parametrize("dim", [6, 7, 10])
def test_a_transformer_takes_any_size(dim: int) -> None:
    fused, _ = FUSIONS["transformer"](2, dim)(
        torch.randn(3, 2, dim), torch.ones(3, 2, dtype=torch.bool)
    )
    assert fused.shape == (3, dim)
