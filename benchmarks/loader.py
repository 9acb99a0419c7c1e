"""How fast pictures become tensors, beside a plain torch DataLoader.

    python -m benchmarks.loader --json FILE [--pictures 5000] [--side 1000] [--work DIR]

Pictures are drawn by `tritower.datamodules.samples` and prepared by `datamodules.prepare`. Each arm
is one worker process of a DataLoader on one thread, so that its rate is that of a core: files as
they are ("originals"), and what a training reads ("prepared": our shards, and for the peer the same
JPEGs as files). The peer resizes to 224, crops the middle, and makes normalized float32; ours gives
uint8, which is normalized where the model is.

Keys of FILE:
    machine   cores, torch, torchvision, Pillow
    pictures  number, side; prepare_s, prepare_pictures_per_s (both cores)
    arms      "SIDE PICTURES" -> pictures per second, best of `--rounds`
    ratios    "originals", "prepared": ours over the peer
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler
from torchvision import transforms

from benchmarks.command import run
from tritower.artefacts import storage
from tritower.datamodules.catalogue import Table, product_item
from tritower.towers.image import PicturePreprocess

SIZE = 224
BATCH = 64


class Files(Dataset[Tensor]):
    """The peer: one picture at a time."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.transform = transforms.Compose(
            [
                transforms.Resize(SIZE),
                transforms.CenterCrop(SIZE),
                transforms.ToTensor(),
                transforms.Normalize([0.5] * 3, [0.5] * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Tensor:
        with Image.open(self.files[number]) as picture:
            pixels: Tensor = self.transform(picture.convert("RGB"))
        return pixels


class Pictures(Dataset[Tensor]):
    """Ours: a batch at a time."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self.read = read
        self.preprocess = PicturePreprocess(SIZE)

    def __getitem__(self, numbers: list[int]) -> Tensor:
        return self.preprocess([self.read(number) for number in numbers])


class Shards:
    """Pictures of a prepared catalogue by their number."""

    def __init__(self, folder: Path) -> None:
        self.table = Table(folder / "products")
        counts = [len(product_item(self.table.row(row)).images) for row in range(len(self.table))]
        self.row = np.repeat(np.arange(len(counts)), counts)
        self.place = np.concatenate([np.arange(count) for count in counts])

    def __len__(self) -> int:
        return len(self.row)

    def __call__(self, number: int) -> bytes:
        """The encoded picture."""
        return product_item(self.table.row(int(self.row[number]))).images[self.place[number]]


@dataclass(frozen=True)
class LoaderBenchOptions:
    """What is measured.

    Attributes:
        json: file of the figures.
        pictures: at least so many are drawn.
        side: pixels of a side.
        rounds: of which the best counts.
        work: folder of the pictures.
    """

    json: Path
    pictures: int = 5000
    side: int = 1000
    rounds: int = 3
    work: Path = Path("benchmarks/results/loader")


def main(options: LoaderBenchOptions) -> None:
    """Measure pictures per second.

    Args:
        options: what is measured
    """
    raw = options.work / "raw"
    prepared = options.work / "catalogue"
    if not raw.is_dir():
        # A catalogue has pictures of its queries, too, and second views of some products.
        products = max(100, round(options.pictures / 1.2))
        run_module(
            "datamodules.samples",
            f"--output={raw}",
            f"--products={products}",
            f"--image-size={options.side}",
        )
    files = sorted((raw / "images").glob("*.jpg"))
    started = time.perf_counter()
    if not prepared.is_dir():
        run_module("datamodules.prepare", str(raw / "products.csv"), f"--output={prepared}")
    seconds = time.perf_counter() - started
    shards = Shards(prepared)
    rates = measure_rates(files, shards, options)
    report = {
        "machine": {
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "pillow": PIL.__version__,
        },
        "pictures": {
            "number": len(files),
            "side": options.side,
            "prepare_s": round(seconds, 1),
            "prepare_pictures_per_s": round(len(shards) / seconds, 1),
        },
        "arms": {name: round(value, 1) for name, value in rates.items()},
        "ratios": {
            form: round(rates[f"ours {form}"] / rates[f"peer {form}"], 2)
            for form in ("originals", "prepared")
        },
    }
    storage.write_json(options.json, report)
    show(report, rates)


def measure_rates(
    files: list[Path], shards: Shards, options: LoaderBenchOptions
) -> dict[str, float]:
    """Arm -> pictures per second, the best of the rounds."""
    small = options.work / "small"
    small.mkdir(exist_ok=True)
    stored = [small / f"{number:06d}.jpg" for number in range(len(shards))]
    for number, file in enumerate(stored):
        file.write_bytes(shards(number))
    arms = {
        "peer originals": lambda: DataLoader(Files(files), BATCH, num_workers=1),
        "ours originals": lambda: ours(lambda number: files[number].read_bytes(), len(files)),
        "peer prepared": lambda: DataLoader(Files(stored), BATCH, num_workers=1),
        "ours prepared": lambda: ours(shards, len(shards)),
    }
    return {name: max(rate(make) for _ in range(options.rounds)) for name, make in arms.items()}


def show(report: dict[str, Any], rates: dict[str, float]) -> None:
    """Print a table of both arms."""
    pictures = report["pictures"]
    title = (
        f"pictures per second and core, {pictures['number']:,} pictures of {pictures['side']} "
        "pixels"
    )
    table = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("", "peer", "ours", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for form, ratio in report["ratios"].items():
        cells = [f"{rates[f'{side} {form}']:,.0f}" for side in ("peer", "ours")]
        table.add_row(form, *cells, f"{ratio:.2f}")
    Console().print(table)


def ours(read: Callable[[int], bytes], count: int) -> DataLoader[Tensor]:
    """A loader of our batches."""
    batches = BatchSampler(SequentialSampler(range(count)), BATCH, drop_last=False)
    return DataLoader(Pictures(read), batch_size=None, sampler=batches, num_workers=1)


def rate(make: Callable[[], DataLoader[Tensor]]) -> float:
    """Pictures per second from the second batch on: the first one waits for the process."""
    count = 0
    started = 0.0
    for number, batch in enumerate(make()):
        count += len(batch) if number else 0
        started = started or time.perf_counter()
    return count / (time.perf_counter() - started)


def run_module(module: str, *arguments: str) -> None:
    """One of the project's own commands."""
    subprocess.run(
        [sys.executable, "-m", module, *arguments], check=True, stdout=subprocess.DEVNULL
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    run("benchmarks.loader", main, "Pictures per second and core, beside torchvision.")
