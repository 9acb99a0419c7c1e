"""The recipe that `fit` chooses by itself, on catalogues that nobody tuned it for.

    python -m benchmarks.any_catalogue --data DIR --weights DIR --json FILE
        [--split test] [--quick] [--only NAME ...]

Each catalogue is prepared and given to `train.py fit --data.catalogue DIR --run DIR`, with nothing
said about it. Its queries of all types are then compared, by exact search, with everything that
needs no training: words tuned on val, pretrained towers, their plain sum, and their sum with
weights from val. The floor is the best of these. The test split is read once
(`benchmarks.ledger`).

Keys of FILE:

    catalogues  name -> seed -> split, splits, command, seconds, queries, rows, worst
                rows: query type -> row ("BM25", ..., "trained") -> metric -> [value, low, high]
                differences: query type -> trained minus the best row without training, nDCG@10
    machine     cores, memory, versions
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.catalogues import CATALOGUES, Catalogue, Results, call, triple
from benchmarks.command import ALL, Folders, Reading, Split, chosen, run
from benchmarks.ledger import Ledger
from tritower.datamodules.products import ProductDataModule, all_items
from tritower.towers.feature_cache import CacheOptions, cached
from tritower.towers.floor import CompareOptions, floor_report
from tritower.towers.model_folder import load_model, load_untrained

ARM = "automatic"
METRICS = ("hit@1", "hit@10", "ndcg@10")
MIN_QUERIES = 50
"""Fewer queries of a type are shown and not judged."""

TOLERANCE = 0.005
"""How far below the floor counts as equal to it."""

OTHERS = (Catalogue("retaildemo", seeds=1), Catalogue("abtbuy", seeds=1))
"""Small, or without pictures; the others are those of `benchmarks.catalogues`."""

NAMES = ("luma", "fashion", "flipkart", "retaildemo", "abtbuy")


def measure(
    catalogue: Catalogue, folders: Folders, split: Split, seed: int, extra: list[str]
) -> dict[str, Any]:
    """Prepare, train and compare one catalogue.

    Args:
        catalogue: under `folders.data`.
        folders: what is read and written.
        split: whose queries are measured.
        seed: of the training.
        extra: further arguments of `fit`.

    Returns:
        The entry of `catalogues` in the JSON file.
    """
    prepared = folders.work / "automatic" / catalogue.folder
    if not prepared.is_dir():
        prepare(catalogue, folders, prepared)
    folder = folders.work / "runs" / catalogue.folder / ARM / str(seed)
    features = folders.work / "features"
    shutil.rmtree(folder, ignore_errors=True)
    command = [
        "train.py",
        "fit",
        f"--data.catalogue={prepared}",
        f"--run={folder}",
        f"--weights={folders.weights}",
        f"--model.encoding.feature_cache={features}",
        f"--seed_everything={seed}",
        f"--model.seed={seed}",
        f"--data.seed={seed}",
        "--floor=false",  # measured here
        "--trainer.enable_progress_bar=false",
        *extra,
    ]
    started = time.monotonic()
    call(*command)
    seconds = time.monotonic() - started
    report = compare(folder / "model", prepared, features, split)
    return {
        "split": split,
        "splits": catalogue.salt,
        "command": "python " + " ".join(command),
        "seconds": round(seconds, 1),
        **entry(report),
    }


def prepare(catalogue: Catalogue, folders: Folders, output: Path) -> None:
    """The prepared catalogue, with new splits where its own were read too often."""
    raw = folders.data / catalogue.name
    arguments = [f"--image-root={raw}", f"--qrels={raw / 'qrels.csv'}"]
    if catalogue.splits is not None:
        raw = folders.work / "raw" / catalogue.folder
        arguments += catalogue.splits.write(folders.data / catalogue.name, raw)
    call(
        "-m",
        "datamodules.prepare",
        str(raw / "products.csv"),
        f"--queries={raw / 'queries.csv'}",
        f"--output={output}",
        *dict.fromkeys(arguments),
    )


def compare(model_folder: Path, prepared: Path, features: Path, split: Split) -> dict[str, Any]:
    """A model beside untrained search, which is tuned on val where test is measured."""
    model = load_model(model_folder)
    towers = load_untrained(model_folder, model)
    data = ProductDataModule(prepared)
    data.setup("validate")
    if split == "test":
        data.setup("test")
    options = CacheOptions(every_view=False, device=torch.device("cpu"))
    items = partial(all_items, data)
    data.preprocess = cached(model.preprocess, *model.encoders, items, features, options)
    compared = CompareOptions(split, "val" if split == "test" else None)
    return floor_report(model, data, compared, towers)


def entry(report: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a report: rows by query type, and how far the model is above the best one."""
    rows: dict[str, Any] = {}
    differences = {}
    for query_type, trained in report["tasks"]["exact"].items():
        own = {}
        for name, by_type in report["baselines"].items():
            if name != "hybrid" and query_type in by_type:
                own[name] = {metric: triple(by_type[query_type][metric]) for metric in METRICS}
        best = max(own, key=lambda name: own[name]["ndcg@10"][0])
        own["trained"] = {metric: triple(trained[metric]) for metric in METRICS}
        rows[query_type] = own
        differences[query_type] = {
            "best": best,
            **{
                metric: round(own["trained"][metric][0] - own[best][metric][0], 4)
                for metric in METRICS
            },
        }
    counts = {query_type: own["count"] for query_type, own in report["queries"].items()}
    return {"queries": counts, "rows": rows, "differences": differences}


def show(results: Results, split: Split) -> None:
    """All query types, the one that is farthest below its floor first."""
    table = RichTable(title=f"{split} split, worst difference first", title_justify="left")
    for column in ("catalogue", "queries", "count", "best without training"):
        table.add_column(column)
    for column in ("hit@1", "trained", "nDCG@10", "trained", "difference", ""):
        table.add_column(column, justify="right")
    lines = []
    for name, seeds in results.data["catalogues"].items():
        for seed, own in seeds.items():
            if own["split"] != split:
                continue
            for query_type, difference in own["differences"].items():
                rows = own["rows"][query_type]
                best = difference["best"]
                count = own["queries"][query_type]
                lines.append((difference["ndcg@10"], name, seed, query_type, count, best, rows))
    for value, name, _, query_type, count, best, rows in sorted(lines, key=lambda line: line[0]):
        if count < MIN_QUERIES:
            verdict = "few queries"
        else:
            verdict = "BELOW" if value < -TOLERANCE else ""
        table.add_row(
            name,
            query_type,
            str(count),
            best,
            f"{rows[best]['hit@1'][0]:.3f}",
            f"{rows['trained']['hit@1'][0]:.3f}",
            f"{rows[best]['ndcg@10'][0]:.3f}",
            f"{rows['trained']['ndcg@10'][0]:.3f}",
            f"{value:+.3f}",
            verdict,
        )
    Console(width=140).print(table)


def main(
    folders: Folders,
    reading: Reading,
    quick: bool = False,
    only: list[str] = ALL,
    seeds: int = 1,
    extra: list[str] = ALL,
) -> None:
    """Train on every catalogue by the recipe that fit chooses, and compare with the floor.

    Args:
        folders: what is read and written
        reading: which queries are measured
        quick: the smallest catalogue alone: does everything run?
        only: names of catalogues; all when not given.
        seeds: trainings of each catalogue.
        extra: further arguments of fit.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ledger = Ledger(again=reading.again)
    results = Results(folders.json, ledger)
    results.data.setdefault("catalogues", {})
    known = {own.name: own for own in (*CATALOGUES, *OTHERS) if own.name in NAMES}
    names = ["retaildemo"] if quick else chosen(only, NAMES)
    for name in names:
        catalogue = known[name]
        for seed in range(seeds):
            arm = f"{ARM}/{seed}"
            if reading.split == "test":
                ledger.check(name, catalogue.salt, [arm])
            own = measure(catalogue, folders, reading.split, seed, extra)
            if reading.split == "test":
                ledger.add(name, catalogue.salt, arm)
            results.data["catalogues"].setdefault(name, {})[str(seed)] = own
            results.save()
            print(f"{name}: {json.dumps(own['differences'])}", flush=True)
    show(results, reading.split)


if __name__ == "__main__":
    run("benchmarks.any_catalogue", main, "The recipe that fit chooses, on any catalogue.")
