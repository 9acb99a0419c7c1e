"""What a large batch costs in the loss alone: memory and seconds, beside open_clip's loss.

    python -m benchmarks.loss --json FILE [--sizes 1024 4096] [--dim 256]

Each size and arm runs in a process of its own: random unit vectors, loss and gradients once.
open_clip's ClipLoss holds all scores; it is left out where they would need more than half of the
free memory.

Keys of FILE:

    machine   cores, threads, torch
    rows      batch, arm ("tritower", "open_clip"), seconds, us_per_pair,
              loss_bytes (growth of peak memory over that with embeddings and their gradients)
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks.command import run
from tritower.artefacts import storage
from tritower.datamodules.batch import MODALITIES, NO_KEY, RELATIONS, Batch, Items
from tritower.terminal import tables
from tritower.towers.losses.info_nce import InfoNCE

SIZES = [1024, 4096, 16_384, 65_536]
STANDARD: list[int] = []
"""Default of the batch sizes: `SIZES`."""


def loss(json: Path, sizes: list[int] = STANDARD, dim: int = 256) -> None:
    """Measure the loss of large batches.

    Args:
        json: file of the figures.
        sizes: batch sizes.
        dim: size of an embedding.
    """
    rows = []
    for size in sizes or SIZES:
        for arm in ARMS:
            held = 4 * 8 * size**2  # two directions, their softmax and the gradients of both
            if (
                arm == "open_clip"
                and held > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 2
            ):
                print(f"{arm} at {size:,}: left out, its scores would need {held / 2**30:.0f} GiB")
                continue
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                rows.append(pool.submit(measure, arm, size, dim).result())
    machine = {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    storage.write_json(json, {"machine": machine, "rows": rows})
    show(rows)


def measure(arm: str, size: int, dim: int) -> dict[str, Any]:
    """Loss and gradients once, after a small warm-up."""
    torch.manual_seed(0)
    loss = ARMS[arm]()
    small = F.normalize(torch.randn(8, dim), dim=1).requires_grad_()
    loss(small, small).backward()
    query, product = (F.normalize(torch.randn(size, dim), dim=1).requires_grad_() for _ in range(2))
    (query.sum() + product.sum()).backward()  # gradients have their place
    before = peak()
    started = time.perf_counter()
    loss(query, product).backward()
    seconds = time.perf_counter() - started
    return {
        "batch": size,
        "arm": arm,
        "seconds": round(seconds, 3),
        "loss_bytes": peak() - before,
        "us_per_pair": round(1e6 * seconds / size, 2),
    }


def peak() -> int:
    """The most memory of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def tritower() -> Callable[[Tensor, Tensor], Tensor]:
    """InfoNCE with its defaults on products that are all different."""
    loss = InfoNCE()
    nothing = Items(None, None, None, None, torch.ones(0, len(MODALITIES), dtype=torch.bool))

    def of(query: Tensor, product: Tensor) -> Tensor:
        keys = torch.full((len(query), len(RELATIONS)), NO_KEY)
        keys[:, 0] = torch.arange(len(query))
        return loss(query, product, Batch(nothing, nothing, keys, keys, torch.ones(len(query))))

    return of


def open_clip() -> Callable[[Tensor, Tensor], Tensor]:
    """open_clip's ClipLoss."""
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return lambda query, product: loss(query, product, torch.tensor(1 / 0.07))


ARMS = {"tritower": tritower, "open_clip": open_clip}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the figures as one table."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("batch", "arm", "seconds", "MB of the loss", "us a pair"):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    for row in rows:
        figures = (
            f"{row['seconds']:,.2f}",
            f"{row['loss_bytes'] / 1e6:,.0f}",
            f"{row['us_per_pair']:,.1f}",
        )
        table.add_row(f"{row['batch']:,}", row["arm"], *figures)
    tables.show(table)


if __name__ == "__main__":
    run("benchmarks.loss", loss, "What a large batch costs in the loss.")
