"""Shop photos that ask for shelf products.

Ours, its variants, a softmax classifier, and products that are new.

    python -m benchmarks.photos --data DIR --weights DIR --json FILE [--quick true] [--split
    val|test] [--arms '[ours]']

All arms are configs/grocery.yaml: the same backbone, photos, batches, steps and learning rates.

Keys of FILE, beside those of `benchmarks.catalogues`:
    arms  "grocery/ARM/SEED" -> {"split", "seconds", "photos", "hit@1", "hit@5", "hit@10"}, the
    classifier's without
          photos and hit@5; of the arms with new products also "hit@1 seen", "hit@1 new" and "new",
          the ids of the products that it was never trained on
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.catalogues import CLIP, SIGLIP, WHOLE, Bench, BenchOptions, Catalogue, Results
from benchmarks.command import ALL, Folders, Reading, chosen, run
from benchmarks.ledger import Ledger
from tritower.datamodules.batch import RELATIONS, Batch, Items, NumberedItems
from tritower.datamodules.catalogue import query_item
from tritower.datamodules.preprocess import stable_hash
from tritower.retrieval.vectors.embeddings import EmbeddingReader
from tritower.towers.cli import TrainingCLI
from tritower.towers.embed import embed
from tritower.towers.embedded import Embedded
from tritower.towers.encoder import features_of, mean_by_row
from tritower.towers.quiet import quiet_lightning
from tritower.towers.two_tower import TwoTower

PICTURES_ALONE = ["--model.product.text=null", "--model.product.attribute=null", WHOLE]
"""Products without texts and attributes, by which a model would memorize a few products."""

FOR_NEW = [
    *PICTURES_ALONE,
    "--model.product.feature_dropout=0.5",
    "--model.loss=InfoNCE",
    "--model.loss.init_args.temperature=0.02",
]
"""What finds products best that a model was never trained on."""

SOME_NEW = ", some products new"
"""Arms of this ending are trained without `NEW` products, and test_options for them too."""

ARMS: dict[str, list[str]] = {
    "ours": [],
    "open_clip's ClipLoss": CLIP,
    "open_clip's SigLipLoss": SIGLIP,
    "every block tuned": ["--model.product.image.init_args.freeze_lower=0"],
    "softmax classifier": PICTURES_ALONE,
    "for new products": FOR_NEW,
    f"ours{SOME_NEW}": [],
    f"for new products{SOME_NEW}": FOR_NEW,
}
"""Arm -> command-line arguments."""

NEW = 16
"""Products, those with the smallest sha256 of their ids, that some arms are never trained on."""


class Classifier(TwoTower):
    """One class for each product on top of the image tower, trained with cross-entropy.

    Optimizer, schedule, batches and figures are those of `TwoTower`: a query's "embedding" are its
    logits, a product's is its class, so that their product is the logit of the class.
    """

    def setup(self, stage: str) -> None:
        """As `TwoTower.setup`; then there is a class for every product, and only photos ask."""
        super().setup(stage)
        data = self.trainer.datamodule
        for split, held_out in data.held_out.items():
            is_photo = []
            for number in held_out.query.tolist():
                is_photo.append(bool(query_item(data.queries.row(number)).images))
            data.held_out[split] = held_out.select(np.array(is_photo))
        ids = data.products.column("product_id").to_pylist()
        self.class_of = {stable_hash(product_id): row for row, product_id in enumerate(ids)}
        if not hasattr(self, "head"):
            self.head = nn.Linear(self.query.towers["image"].out_dim, len(ids))

    @property
    def embed_dim(self) -> int:
        """The number of classes."""
        if hasattr(self, "class_of"):
            return len(self.class_of)
        return super().embed_dim

    def logits(self, items: Items) -> Tensor:
        """(B, classes)."""
        features = features_of(self.query.towers["image"], items.image)
        return self.head(mean_by_row(features, items.image_row, len(items.present)))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of the photos."""
        keys = batch.product_keys[: len(batch.weight), RELATIONS.index("product")]
        loss = F.cross_entropy(
            self.logits(batch.query), torch.tensor([self.class_of[key] for key in keys.tolist()])
        )
        self.log("train/loss", loss, batch_size=len(keys))
        return loss

    def validation_step(
        self, batch: NumberedItems, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Logits of the held-out photos, classes of the products."""
        if dataloader_idx == 0:
            found = self.logits(batch.items)
        else:
            found = F.one_hot(
                batch.row, self.embed_dim
            )  # the gallery is the whole catalogue, in order
        self.held_out.add(dataloader_idx, batch.row.numpy(), Embedded(found.float().numpy()))


def classified(bench: Bench, arguments: list[str], run: Path, seed: int) -> dict[str, Any]:
    """Train the classifier and ask the split's photos."""
    test_options = [f"--data.validation.test_split={bench.split}", "--then_test=true"]
    TrainingCLI.start(bench.fit_arguments(run, [*test_options, *arguments], seed), model=Classifier)
    figures = json.loads((run / "test.json").read_text(encoding="utf-8"))
    return {name: round(figures[f"test/{name}"], 4) for name in ("hit@1", "hit@10")}


def ranks(model: Path, bench: Bench, folder: Path) -> dict[str, list[int]]:
    """Product -> for each of its photos of the split, how many products are nearer than it."""
    shutil.rmtree(folder, ignore_errors=True)
    embed(model, bench.prepared, folder)
    sides = []
    for side in ("queries", "products"):
        batches = list(EmbeddingReader(folder / side).batches())
        sides.append(
            (
                np.concatenate([b.ids.to_numpy(zero_copy_only=False) for b in batches]),
                np.concatenate([b.vectors for b in batches]),
            )
        )
    (query_ids, queries), (product_ids, products) = sides
    similarity = queries @ products.T
    query_row, column = (
        {name: row for row, name in enumerate(ids)} for ids in (query_ids, product_ids)
    )
    result: dict[str, list[int]] = {}
    for photo in rows(bench.raw / "photos.csv"):
        if photo["split"] == bench.split:
            near = similarity[query_row[photo["photo_id"]]]
            own = column[photo["product_id"]]
            result.setdefault(photo["product_id"], []).append(int((near > near[own]).sum()))
    return result


def without_new(raw: Path, folder: Path) -> list[str]:
    """A copy of the catalogue in which some products, and all photos of them, are of test."""
    folder.mkdir(parents=True, exist_ok=True)
    answers = {photo["photo_id"]: photo["product_id"] for photo in rows(raw / "photos.csv")}
    ids = [product["id"] for product in rows(raw / "products.csv")]
    new = sorted(ids, key=lambda product_id: hashlib.sha256(product_id.encode()).hexdigest())[:NEW]
    for name, key in (("products", "id"), ("queries", "query_id")):
        changed = []
        for row in rows(raw / f"{name}.csv"):
            changed.append(
                row | {"split": "test"} if answers.get(row[key], row[key]) in new else row
            )
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, changed[0])
            writer.writeheader()
            writer.writerows(changed)
    for name in ("qrels.csv", "photos.csv"):
        shutil.copyfile(raw / name, folder / name)
    shutil.copytree(
        raw / "images", folder / "images", dirs_exist_ok=True
    )  # links out of the folder would be refused
    return new


def rows(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def hit(ranks: Iterable[list[int]], k: int) -> float:
    """Share of all photos whose product is among the k nearest."""
    return round(float(np.mean(np.concatenate(list(ranks)) < k)), 4)


def main(
    folders: Folders,
    reading: Reading,
    quick: bool = False,
    seeds: int = 1,
    arms: list[str] = ALL,
    arguments: list[str] = ALL,
) -> None:
    """Train and measure all arms.

    Args:
        folders: what is read and written
        reading: which photos are the queries
        quick: two epochs: does everything run?
        seeds: trainings per arm.
        arms: `ours`, `open_clip's ClipLoss`, `open_clip's SigLipLoss`, `every block tuned`,
            `softmax classifier`, `for new products`, and `ours, some products new`, `for new
            products, some products new`; all when not given.
        arguments: further command-line arguments of train.py, for all arms.
    """
    quiet_lightning()
    split = reading.split
    results = Results(folders.json, Ledger(again=reading.again))
    missing = []
    for seed, arm in itertools.product(range(seeds), chosen(arms, ARMS)):
        if not results.done("arms", f"grocery/{arm}/{seed}", split, salt=None):
            missing.append((seed, arm))
    if split == "test":
        results.ledger.check("grocery", None, [f"{arm}/{seed}" for seed, arm in missing])
    for seed, arm in missing:
        L.seed_everything(seed, verbose=False)
        started = time.monotonic()
        options = BenchOptions(quick)
        bench = Bench(Catalogue("grocery", seeds=seeds), folders, split, results, options)
        figures = measure_arm(bench, folders, arm, seed, arguments)
        seconds = round(time.monotonic() - started, 1)
        key = f"grocery/{arm}/{seed}"
        results.store("arms", key, {**figures, "split": split, "seconds": seconds}, salt=None)
        shown = {name: v for name, v in figures.items() if name not in ("command", "new")}
        print(key, shown, flush=True)


def measure_arm(
    bench: Bench, folders: Folders, arm: str, seed: int, arguments: list[str]
) -> dict[str, Any]:
    """Train an arm and measure it."""
    run_folder = folders.work / "runs" / f"grocery/{arm}/{seed}"
    new: list[str] = []
    if arm.endswith(SOME_NEW):
        bench.raw = folders.work / "raw" / "grocery_new"
        bench.prepared = folders.work / "catalogues" / "grocery_new"
        new = without_new(folders.data / "grocery", bench.raw)
    bench.prepare()
    own_arguments = [*ARMS[arm], *arguments]
    if arm == "softmax classifier":
        return classified(bench, own_arguments, run_folder, seed)
    model, command = bench.train(arm, own_arguments, seed)
    found = ranks(model, bench, run_folder / "embeddings")
    figures: dict[str, Any] = {f"hit@{k}": hit(found.values(), k) for k in (1, 5, 10)}
    figures |= {"photos": sum(map(len, found.values())), "command": command}
    if new:
        of_new = [own for product, own in found.items() if product in new]
        of_seen = [own for product, own in found.items() if product not in new]
        figures["new"] = new
        figures["hit@1 new"] = hit(of_new, 1)
        figures["hit@1 seen"] = hit(of_seen, 1)
    return figures


if __name__ == "__main__":
    run("benchmarks.photos", main, "Photos of customers against pictures of a shop.")
