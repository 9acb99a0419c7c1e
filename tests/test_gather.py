"""Losses and gradients of two processes are those of one."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import distributed as dist

from tests.support.encoders import ITEMS, make_encoder
from tritower.datamodules.batch import NO_KEY, RELATIONS, Batch
from tritower.towers.encoder import Encoder
from tritower.towers.losses.contrastive import Loss
from tritower.towers.losses.gather import gather_rows, num_processes
from tritower.towers.losses.info_nce import InfoNCE
from tritower.towers.losses.pairs import CoSENT, PairLoss
from tritower.towers.losses.sigmoid import SigmoidLoss

QUERIES, EXTRA = 8, 4  # over all processes


def keys(rows: int, seed: int) -> torch.Tensor:
    """Keys of which some are equal; products are all different."""
    result = torch.from_numpy(
        np.random.default_rng(seed).integers(NO_KEY, 4, (rows, len(RELATIONS)))
    )
    result[:, 0] = torch.arange(rows)
    return result


def make_batch(encoder: Encoder, queries: list[int], products: list[int]) -> Batch:
    """Some rows of one global batch of queries and products."""
    items = [
        ITEMS[i % len(ITEMS)]._replace(text={"title": f"thing {i}"}) for i in range(QUERIES + EXTRA)
    ]
    weight = torch.linspace(0.2, 1.0, QUERIES)
    return Batch(
        query=encoder.preprocess("query")([items[i] for i in queries]),
        product=encoder.preprocess("product")([items[i] for i in products]),
        query_keys=keys(QUERIES, 0)[queries],
        product_keys=keys(QUERIES + EXTRA, 1)[products],
        weight=weight[queries],
        label=torch.tensor([1.0, torch.nan, 0.0, 0.5, 0.3, torch.nan, 1.0, 0.0])[queries],
        frequency=torch.linspace(0.5, 2.0, QUERIES + EXTRA)[products],
        judged_products=torch.tensor(
            [[i * 5 % 12, NO_KEY if i % 3 else i * 7 % 12] for i in range(QUERIES)]
        )[queries],
        judgement_weights=torch.linspace(0.1, 1.0, 2 * QUERIES).view(QUERIES, 2)[queries],
    )


def losses() -> dict[str, Loss]:
    return {
        "InfoNCE": InfoNCE(),
        "same side, log q": InfoNCE(same_side=True, log_q=0.5),
        "sigmoid": SigmoidLoss(bias=-1.0),
        "pairs": PairLoss(),
        "CoSENT": CoSENT(),
    }


def step(
    encoder: Encoder, loss: Loss, batch: Batch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and the gradients of everything that learns."""
    encoder.zero_grad()
    value = loss(encoder(batch.query).embedding, encoder(batch.product).embedding, batch)
    value.backward()
    named = [*encoder.named_parameters(), *loss.named_parameters()]
    return value.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def in_process(rank: int, folder: str) -> None:
    """One of two processes.

    Its half of the rows, gradients averaged as distributed training does.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        assert num_processes() == 2
        results = {}
        torch.manual_seed(0)
        encoder = make_encoder()
        half, extra = QUERIES // 2, EXTRA // 2
        queries = list(range(rank * half, (rank + 1) * half))
        products = queries + list(range(QUERIES + rank * extra, QUERIES + (rank + 1) * extra))
        batch = make_batch(encoder, queries, products)
        for name, loss in losses().items():
            value, gradients = step(encoder, loss, batch)
            for tensor in (value, *gradients.values()):
                dist.all_reduce(tensor)
                tensor /= 2
            results[name] = (value, gradients)
        rows = torch.full((3, 2), float(rank), requires_grad=True)
        gathered = gather_rows(rows)
        (gathered * torch.arange(12.0).view(6, 2) * (1 + rank)).sum().backward()
        results["gathered"] = gathered.detach()
        results["gradient"] = rows.grad
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = str(tmp_path_factory.mktemp("gloo"))
    torch.multiprocessing.start_processes(in_process, (folder,), nprocs=2, start_method="spawn")
    return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", list(losses()))
def test_loss_and_gradients_of_two_processes_are_those_of_one(
    two_processes: list[dict], name: str
) -> None:
    torch.manual_seed(0)
    encoder = make_encoder()
    batch = make_batch(encoder, list(range(QUERIES)), list(range(QUERIES + EXTRA)))
    value, gradients = step(encoder, losses()[name], batch)
    for found, found_gradients in (process[name] for process in two_processes):
        torch.testing.assert_close(found, value, atol=1e-6, rtol=1e-6)
        assert found_gradients.keys() == gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(found_gradients[key], gradient, atol=5e-6, rtol=1e-5)


def test_rows_are_gathered_in_the_order_of_the_ranks_with_gradient(
    two_processes: list[dict],
) -> None:
    for rank, process in enumerate(two_processes):
        assert process["gathered"].tolist() == [[0.0, 0.0]] * 3 + [[1.0, 1.0]] * 3
        own = torch.arange(12.0).view(6, 2)[rank * 3 : rank * 3 + 3]
        assert torch.equal(
            process["gradient"], 3 * own
        )  # once from the first process, twice from the second


def test_one_process_gathers_nothing() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert num_processes() == 1
    assert gather_rows(rows) is rows
