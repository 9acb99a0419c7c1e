"""How long a training step takes: open_clip's own, ours, and ours with less to do.

    python -m benchmarks.steps --json FILE [--model ViT-B-32] [--batch 1024] [--chunk N]
        [--steps 10] [--arms ...]

Text queries and picture products, on random tokens and pixels that are on the device already: no
loading of data, all else (preprocessing on the device, forward, loss, backward, AdamW). On a GPU in
bfloat16, on a CPU in float32. Untrained weights: time does not depend on them. Arms run one after
another in this process.

Keys of FILE:

    machine   device, threads, versions
    rows      arm, model, batch, chunk, seconds (median of the steps), pairs_per_s,
              peak_bytes (of the GPU; 0 on a CPU), of_tuned (seconds over those of "tuned"),
              over_open_clip (pairs per second over open_clip's)
"""

from __future__ import annotations

import gc
import logging
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from rich import box
from rich.table import Table
from torch import Tensor

from benchmarks.command import ALL, chosen, run
from tritower.artefacts import storage
from tritower.datamodules.batch import MODALITIES, NO_KEY, RELATIONS, Batch, Items
from tritower.terminal import tables
from tritower.towers.encoder import Encoder
from tritower.towers.encoding import EncodingOptions
from tritower.towers.open_clip_models import OpenClipImage, OpenClipText
from tritower.towers.optimizer import parameter_groups
from tritower.towers.two_tower import TwoTower

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ARMS = ("open_clip", "tuned", "frozen lower half", "patch dropout .5", "both", "compiled")
LESS = {
    "frozen lower half": {"freeze_lower": 0.5},
    "patch dropout .5": {"patch_dropout": 0.5},
    "both": {"freeze_lower": 0.5, "patch_dropout": 0.5},
}


def steps(
    json: Path,
    model: str = "ViT-B-32",
    batch: int = 1024,
    chunk: int | None = None,
    steps: int = 10,
    arms: list[str] = ALL,
) -> None:
    """Time training steps.

    Args:
        json: file of the figures.
        model: name of a model of open_clip with a picture of patches.
        batch: pairs of a step.
        chunk: items encoded at once (ours); all where left out.
        steps: timed steps, after two that are not.
        arms: which arms run; all but the compiled one where none is named.
    """
    logging.disable(logging.WARNING)  # that the weights are random is meant
    rows = []
    for arm in chosen(arms, ARMS) if arms else ARMS[:-1]:
        rows.append(measure(arm, model, batch, chunk, steps))
        print(f"{arm}: {rows[-1]['seconds']:.3f} s a step", flush=True)
    seconds = {row["arm"]: row["seconds"] for row in rows}
    for row in rows:
        for name, base, other in (
            ("of_tuned", row["arm"], "tuned"),
            ("over_open_clip", "open_clip", row["arm"]),
        ):
            if {base, other} <= seconds.keys():
                row[name] = round(seconds[base] / seconds[other], 3)
            else:
                row[name] = None
    gpu = torch.cuda.get_device_name() if DEVICE == "cuda" else None
    versions = {"torch": torch.__version__, "open_clip": open_clip.__version__}
    machine = {
        "device": gpu or "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **versions,
    }
    storage.write_json(json, {"machine": machine, "rows": rows})
    show(rows)


def measure(arm: str, model: str, batch: int, chunk: int | None, steps: int) -> dict[str, Any]:
    """The median step of an arm."""
    torch.manual_seed(0)
    if arm == "open_clip":
        step = of_open_clip(model, batch)
    else:
        step = of_ours(arm, model, batch, chunk)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for number in range(2 + steps):
        started = time.perf_counter()
        value = step().item()  # waits for the device
        if number >= 2:
            seconds.append(time.perf_counter() - started)
        assert value == value, f"the loss of {arm} is not a number"
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    del step
    gc.collect()
    median = statistics.median(seconds)
    about = {"arm": arm, "model": model, "batch": batch, "chunk": chunk}
    return {
        **about,
        "seconds": round(median, 4),
        "pairs_per_s": round(batch / median, 1),
        "peak_bytes": peak,
    }


def inputs(model: str, batch: int) -> tuple[Tensor, Tensor]:
    """Random tokens and uint8 pixels."""
    config = open_clip.get_model_config(model)
    size = config["vision_cfg"]["image_size"]
    length = config["text_cfg"].get("context_length", 77)
    tokens = torch.randint(1, 1000, (batch, length))
    tokens[:, -1] = config["text_cfg"].get("vocab_size", 49408) - 1  # the end of a text
    return tokens.to(DEVICE), torch.randint(
        0, 256, (batch, 3, size, size), dtype=torch.uint8, device=DEVICE
    )


def of_open_clip(model: str, batch: int) -> Callable[[], Tensor]:
    """open_clip's model, loss and optimizer, as its training runs them on one device."""
    clip = open_clip.create_model(model, load_weights=False).to(DEVICE).train()
    loss = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(clip.parameters(), lr=1e-6)
    tokens, pixels = inputs(model, batch)
    mean, std = (
        torch.tensor(v, device=DEVICE).view(1, 3, 1, 1)
        for v in (clip.visual.image_mean, clip.visual.image_std)
    )

    def step() -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            image, text, scale = clip((pixels.float() / 255 - mean) / std, tokens)[:3]
            value: Tensor = loss(image, text, scale)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return value

    return step


def of_ours(arm: str, model: str, batch: int, chunk: int | None) -> Callable[[], Tensor]:
    """Our towers on the two sides of the same model."""
    less: dict[str, Any] = dict(LESS.get(arm, {}))
    image = OpenClipImage(model, load_weights=False, **less)
    text = OpenClipText(model, load_weights=False, freeze_lower=less.get("freeze_lower", 0.0))
    two = TwoTower(
        Encoder(image.out_dim, image=image),
        Encoder(text.out_dim, text=text),
        encoding=EncodingOptions(chunk),
    )
    two = two.to(DEVICE).train()
    if arm == "compiled":
        for tower in (image, text):
            tower.compile()
    optimizer = torch.optim.AdamW(parameter_groups(two, two.encoders, two.optimizer_options))
    tokens, pixels = inputs(model, batch)
    present = torch.tensor(
        [[name == side for name in MODALITIES] for side in ("text", "image")], device=DEVICE
    )
    query = Items(tokens, None, None, None, present[:1].expand(batch, -1))
    product = Items(
        None, pixels, torch.arange(batch, device=DEVICE), None, present[1:].expand(batch, -1)
    )
    keys = torch.full((batch, len(RELATIONS)), NO_KEY, device=DEVICE)
    keys[:, 0] = torch.arange(batch, device=DEVICE)
    whole = Batch(query, product, keys, keys, torch.ones(batch, device=DEVICE))

    def step() -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            query_embedding = two.encode_batch(two.query, query).embedding
            found = two.encode_batch(two.product, product).embedding
        value: Tensor = two.loss(query_embedding, found, whole)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return value

    return step


def show(rows: list[dict[str, Any]]) -> None:
    """Print the figures as one table."""
    title = f"{rows[0]['model']}, {rows[0]['batch']:,} pairs a step"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("arm", "s a step", "pairs/s", "of tuned", "x open_clip", "peak GB"):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    for row in rows:
        ratios = (
            "" if row[name] is None else f"{row[name]:.2f}"
            for name in ("of_tuned", "over_open_clip")
        )
        if row["peak_bytes"]:
            peak = f"{row['peak_bytes'] / 1e9:.1f}"
        else:
            peak = ""
        table.add_row(
            row["arm"], f"{row['seconds']:.3f}", f"{row['pairs_per_s']:,.0f}", *ratios, peak
        )
    tables.show(table)


if __name__ == "__main__":
    run("benchmarks.steps", steps, "How long a training step takes.")
