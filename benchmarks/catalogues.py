"""How good are embeddings of real catalogues: traditional search, pretrained towers, trained towers, fused models.

    python -m benchmarks.catalogues --data DIR --weights DIR --json FILE [--quick true] [--split val|test]

`DIR` holds the catalogues of docs/data.md. Every arm is stored in FILE as it finishes; a second run makes the rest.

Keys of FILE:
    arms        "CATALOGUE/ARM/SEED" -> {"split", "command", "seconds", "kinds": {KIND: {METRIC: [value, low, high]}}}
                METRIC: hit@1, hit@10, recall@10, best_recall@10, ndcg@10 by exact search; ann_vs_exact_recall@10 and
                ann_hit@10 of the default index
    missing     "CATALOGUE/ARM/SEED/SIDE without MODALITY" -> as in arms, for what is left of products or queries
    test_reads  one entry whenever an arm was measured on the test split: date, commit, arm
    machine     cores, memory, versions
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from jsonargparse import auto_cli
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as RichTable
from torch import nn

from datamodules.batch import Item
from datamodules.schema import Schema
from retrieval.build import Recipe, build_index
from retrieval.building.factory import choose_lists
from retrieval.catalogue import PreparedCatalogue
from retrieval.embeddings import EmbeddingReader
from retrieval.evaluate import Options, evaluate, measure
from retrieval.hits import Hits
from retrieval.index import ProductIndex
from retrieval.judgements import Questions
from retrieval.lexical import reciprocal_rank_fusion
from retrieval.storage import write_json
from towers.embed import embed
from towers.encoder import Encoder
from towers.hugging_face import HuggingFaceText
from towers.image import TimmImage
from towers.model_folder import save_model
from towers.tower import Tower
from towers.two_tower import TwoTower

Split = Literal["val", "test"]
METRICS = ("hit@1", "hit@10", "recall@10", "best_recall@10", "ndcg@10")
MODALITIES = ("text", "image", "attribute")
LEXICAL = ("bm25", "tfidf", "jaccard")
LEXICAL_WEIGHTS = (4, 16, 64)
"""Of BM25's ranks beside the model's, tried beside 1."""


WHOLE = "--model.compare=[{query: whole}]"
CLIP = "--model.loss=benchmarks.peer_losses.OpenClipLoss"
SIGLIP = "--model.loss=benchmarks.peer_losses.OpenClipSigmoid"
TOWERS = (*MODALITIES, "words")
ALONE = {tower: [*(f"--model.product.{other}=null" for other in TOWERS if other != tower), WHOLE] for tower in TOWERS}
TRAINED = {
    **{tower: ALONE[tower] for tower in MODALITIES},
    "fused gated": [],
    "fused mean": ["--model.product.fusion=mean"],
    "fused transformer": ["--model.product.fusion=transformer"],
    "fused gated, no modality dropout": ["--data.views.modality_dropout=0"],
}
ROBUSTNESS = ("fused gated", "fused gated, no modality dropout")


@dataclass(frozen=True)
class Catalogue:
    """One catalogue and how it is trained on.

    Attributes:
        name: folder under --data, and configuration under configs/.
        seeds: trainings per arm.
        trained: names of its trained arms.
        overrides: command-line arguments of single arms.
    """

    name: str
    seeds: int
    trained: tuple[str, ...] = tuple(TRAINED)
    overrides: dict[str, list[str]] = field(default_factory=dict)


CATALOGUES = (
    Catalogue("luma", seeds=3),
    Catalogue("fashion", seeds=3),
    Catalogue(
        "grocery",
        seeds=1,
        trained=("text", "image", "fused gated"),  # no query shows attributes
        overrides={"text": ["--data.sources=[catalogue]"]},  # no query of the train split is a text
    ),
)


class Results:
    """The JSON file: read at the start, written after every arm."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        for part in ("arms", "missing"):
            self.data.setdefault(part, {})
        self.data.setdefault("test_reads", [])
        self.data["machine"] = {
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }

    def done(self, part: str, key: str, split: Split) -> bool:
        """Whether this arm was measured on this split."""
        return self.data[part].get(key, {}).get("split") == split

    def store(self, part: str, key: str, value: dict[str, Any]) -> None:
        """Keep an arm, and that the test split was read for it."""
        self.data[part][key] = value
        if value["split"] == "test":
            git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            self.data["test_reads"].append({"date": now, "commit": git.stdout.strip(), "arm": key})
        self.save()

    def save(self) -> None:
        """Write the file."""
        write_json(self.file, self.data)


class Bench:
    """Runs the arms of one catalogue.

    Args:
        catalogue: which.
        data: folder of raw catalogues.
        weights: folder of pretrained weights.
        work: folder of everything that is made; it may be kept between runs.
        split: whose queries are asked.
        results: where figures go.
        quick: few epochs.
        arms: name -> command-line arguments of what is trained; with other ones than these, nothing untrained is
            measured.
        robust: trained arms that are measured with a modality missing, too.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        data: Path,
        weights: Path,
        work: Path,
        split: Split,
        results: Results,
        quick: bool,
        arms: Mapping[str, list[str]] | None = None,
        robust: Sequence[str] = ROBUSTNESS,
    ) -> None:
        self.all, self.arms = arms is None, TRAINED if arms is None else arms
        self.catalogue, self.weights, self.work, self.split = catalogue, weights, work, split
        self.results, self.quick, self.robust = results, quick, robust
        self.raw = data / catalogue.name
        self.prepared = work / "catalogues" / catalogue.name
        self.cache = work / "features"

    def run(self) -> Iterator[str]:
        """Measure every arm that is missing; yields its name."""
        self.prepare()
        for name, encoder in self.pretrained().items() if self.all else ():
            yield from self.arm(f"pretrained {name}", 0, lambda e=encoder: self.untrained(e))
        for seed in range(1 if self.quick else self.catalogue.seeds):
            for name in self.catalogue.trained:
                yield from self.arm(name, seed, lambda n=name, s=seed: self.train(n, self.arms[n], s))
            for name in self.robust:
                if name in self.catalogue.trained and not self.quick:
                    yield from self.missing(name, seed)

    def prepare(self) -> None:
        """The prepared catalogue."""
        if not self.prepared.is_dir():
            raw = [f"--{name}={self.raw / name}.csv" for name in ("queries", "qrels")]
            call("-m", "datamodules.prepare", str(self.raw / "products.csv"), f"--output={self.prepared}", *raw)

    def arm(self, name: str, seed: int, make: Any) -> Iterator[str]:
        """Make a model, embed the catalogue, measure."""
        key = f"{self.catalogue.name}/{name}/{seed}"
        if self.results.done("arms", key, self.split):
            return
        started = time.monotonic()
        folder = self.work / "runs" / key
        model, command = make()
        self.results.store("arms", key, {**self.measure(model, folder), "command": command, "split": self.split})
        self.results.data["arms"][key]["seconds"] = round(time.monotonic() - started, 1)
        self.results.save()
        yield key

    def pretrained(self) -> dict[str, Encoder]:
        """Encoders as they come, without training: cosine of their features, and the sum of both cosines."""
        text = HuggingFaceText(str(self.weights / "all-minilm-l6-v2"), template="{title}", max_length=64, freeze=True)
        weights = self.weights / "tf_efficientnet_lite0.safetensors"
        image = TimmImage("tf_efficientnet_lite0", pretrained=weights, freeze=True)
        return {
            "text": side_by_side({"text": text}),
            "image": side_by_side({"image": image}),
            "sum": side_by_side({"text": text, "image": image}),
        }

    def untrained(self, encoder: Encoder) -> tuple[Path, str]:
        """A model folder of an encoder as it is."""
        model = TwoTower(encoder)
        model.set_schema(Schema.load(self.prepared / "schema.json"))
        folder = self.work / "untrained"
        save_model(model, folder, overwrite=True)
        return folder, ""

    def train(self, name: str, arguments: list[str], seed: int) -> tuple[Path, str]:
        """Train by the command line; returns the model folder and the command."""
        run = self.work / "runs" / self.catalogue.name / name / str(seed) / "train"
        command = ["train.py", *self.fit_arguments(run, [*arguments, *self.catalogue.overrides.get(name, [])], seed)]
        call(*command)
        return run / "model", "python " + " ".join(command)

    def fit_arguments(self, run: Path, arguments: list[str], seed: int) -> list[str]:
        """The arguments of `train.py` for the catalogue's configuration and these; what lies in `run` is removed."""
        shutil.rmtree(run, ignore_errors=True)
        text = "--model.product.text.init_args.pretrained=" + str(self.weights / "all-minilm-l6-v2")
        image = "--model.product.image.init_args.pretrained=" + str(self.weights / "tf_efficientnet_lite0.safetensors")
        removed = [a.removesuffix("=null") for a in arguments if a.endswith("=null")]
        places = [a for a in (text, image) if not a.startswith(tuple(removed))] if removed else [text, image]
        return [
            "fit",
            f"--config=configs/{self.catalogue.name}.yaml",
            f"--data.catalogue={self.prepared}",
            *places,
            *arguments,
            f"--model.feature_cache={self.cache}",
            *(["--trainer.max_epochs=2"] if self.quick else []),
            f"--seed_everything={seed}",
            f"--model.seed={seed}",
            f"--data.seed={seed}",
            f"--run={run}",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
        ]

    def measure(self, model: Path, folder: Path, product: Any = None, query: Any = None) -> dict[str, Any]:
        """Embed the catalogue, build an index with lists, ask the split's queries."""
        shutil.rmtree(folder / "embeddings", ignore_errors=True)
        views = {name: view for name, view in (("product_view", product), ("query_view", query)) if view is not None}
        embed(model, self.prepared, folder / "embeddings", feature_cache=self.cache, **views)
        products = EmbeddingReader(folder / "embeddings" / "products")
        lists = choose_lists(products.count, products.dim)  # the default index of so few products would be exact
        build_index(products, folder / "index", Recipe(lists.factory), overwrite=True)
        index = ProductIndex.open(folder / "index")
        catalogue = PreparedCatalogue(self.prepared)
        evaluation = evaluate(
            index,
            products,
            EmbeddingReader(folder / "embeddings" / "queries"),
            catalogue=catalogue,
            options=Options(split=self.split, latency_queries=0),
        )
        report, questions, found = evaluation.report, evaluation.questions, evaluation.found
        self.traditional(report["baselines"])
        kinds = {}
        for kind, exact in report["tasks"]["exact"].items():
            ann, against = report["tasks"]["ann"][kind], report["tasks"]["ann_vs_exact"][kind]
            kinds[kind] = {metric: triple(exact[metric]) for metric in METRICS}
            kinds[kind]["ann_hit@10"] = triple(ann["hit@10"])
            kinds[kind]["ann_vs_exact_recall@10"] = triple(against["recall@10"])
            kinds[kind]["queries"] = report["queries"][kind]["count"]
        for kind, fused in report["baselines"].get("hybrid", {}).items():
            kinds[f"{kind}, fused with BM25"] = {metric: triple(fused[metric]) for metric in METRICS}
            of = questions.of_kind(kind)
            rankings = evaluation.by_words.of(of), Hits.in_order(found["ann"][of])
            for weight in LEXICAL_WEIGHTS:
                both = reciprocal_rank_fusion(rankings, [weight, 1])
                kinds[f"{kind}, fused with BM25 of weight {weight}"] = figures_of(questions, of, both)
        if len(of := naming_a_colour(questions, catalogue)):
            kinds["text that names a colour"] = figures_of(questions, of, found["exact"][of])
        return {"kinds": kinds, "index": report["index"]["factory"]}

    def traditional(self, baselines: dict[str, Any]) -> None:
        """Keep what traditional search reached on the same queries; it is the same in every report."""
        for name in LEXICAL:
            key = f"{self.catalogue.name}/{name}/0"
            if name in baselines and not self.results.done("arms", key, self.split):
                kinds = baselines[name]
                figures = {kind: {metric: triple(of[metric]) for metric in METRICS} for kind, of in kinds.items()}
                self.results.store("arms", key, {"kinds": figures, "command": "", "split": self.split, "seconds": 0})

    def missing(self, name: str, seed: int) -> Iterator[str]:
        """A trained model when a modality is missing on one side."""
        model = self.work / "runs" / self.catalogue.name / name / str(seed) / "train" / "model"
        for modality in MODALITIES:
            hide = Without(modality)
            for side, views in (("products", {"product": hide}), ("queries", {"query": hide})):
                key = f"{self.catalogue.name}/{name}/{seed}/{side} without {modality}"
                if not self.results.done("missing", key, self.split):
                    figures = self.measure(model, self.work / "runs" / "missing", **views)
                    self.results.store("missing", key, {**figures, "split": self.split})
                    yield key


@dataclass(frozen=True)
class Without:
    """An item of which one modality is hidden."""

    modality: str

    def __call__(self, item: Item) -> Item:
        """The rest of the item."""
        return item._replace(
            **{"text": {"text": {}}, "image": {"images": ()}, "attribute": {"attributes": {}}}[self.modality]
        )


def figures_of(questions: Questions, of: NDArray[np.int64], rows: NDArray[np.int64]) -> dict[str, list[float]]:
    """What (Q', DEPTH) rows are worth as answers to the questions at these positions."""
    measured = measure(rows, questions.relevant[of], questions.judged[of], questions.grades[of])
    return {metric: triple(measured[metric]) for metric in METRICS}


def naming_a_colour(questions: Questions, catalogue: PreparedCatalogue) -> NDArray[np.int64]:
    """Positions of the typed queries in which a value of the catalogue's colour attribute stands."""
    of = questions.of_kind("text")
    if not len(of):
        return of
    attributes = pq.read_table(catalogue.path / "products", columns=["attributes"]).column("attributes")
    attributes = attributes.combine_chunks()
    named = [field.name for field in attributes.type if field.name in ("color", "colour")]
    colours = {value.lower() for name in named for value in attributes.field(name).unique().to_pylist() if value}
    queries = catalogue.queries().to_pydict()
    texts = dict(zip(queries["query_id"], queries["text"], strict=True))
    padded = [f" {texts[questions.ids[position]].lower()} " for position in of]
    return of[[any(f" {colour} " in text for colour in colours) for text in padded]]


def side_by_side(towers: dict[str, Tower]) -> Encoder:
    """Untrained: each tower's unit features in places of their own, so that the cosine is the mean of their cosines."""
    encoder = Encoder(sum(tower.out_dim for tower in towers.values()), **towers, fusion="mean")
    start = 0
    for name, tower in towers.items():
        weight = torch.zeros(encoder.embed_dim, tower.out_dim)
        weight[start : start + tower.out_dim] = torch.eye(tower.out_dim)
        encoder.projections[name].weight = nn.Parameter(weight)
        start += tower.out_dim
    nn.init.zeros_(encoder.absent)
    return encoder


def triple(figure: dict[str, float]) -> list[float]:
    """Value and its 95 % interval."""
    return [round(figure.get(part, figure["value"]), 4) for part in ("value", "low", "high")]


def call(*arguments: str) -> None:
    """Run one of the project's own commands; what it says is shown where it fails."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def show(results: Results, split: Split) -> None:
    """One table per catalogue and kind of query: mean over seeds, lowest and highest."""
    rows: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for part in ("arms", "missing"):
        for key, arm in results.data[part].items():
            catalogue, name, _, *rest = key.split("/")
            if arm["split"] == split:
                for kind, figures in arm["kinds"].items():
                    label = ", ".join([name, *rest])
                    rows.setdefault((catalogue, kind), {}).setdefault(label, []).append(figures)
    console = Console(width=150)
    for (catalogue, kind), arms in sorted(rows.items()):
        table = RichTable(title=f"{catalogue}, {kind} queries of the {split} split", title_justify="left")
        columns = ("hit@1", "hit@10", "recall@10", "best_recall@10", "ndcg@10", "ann_vs_exact_recall@10")
        for column in ("arm", "seeds", *columns):
            table.add_column(column, justify="left" if column == "arm" else "right")
        for name, seeds in arms.items():
            table.add_row(name, str(len(seeds)), *(spread([s[c][0] for s in seeds if c in s]) for c in columns))
        console.print(table)


def spread(values: list[float]) -> str:
    """Mean, and the range where there are several."""
    if not values:
        return ""
    mean = sum(values) / len(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ({min(values):.3f}-{max(values):.3f})"


def main(
    data: Path,
    weights: Path,
    json: Path,
    quick: bool = False,
    split: Split = "val",
    only: list[str] | None = None,
    work: Path = Path("benchmarks/results/catalogues"),
) -> None:
    """Measure all arms on the real catalogues.

    Args:
        data: folder of the raw catalogues of docs/data.md.
        weights: folder of all-minilm-l6-v2/ and tf_efficientnet_lite0.safetensors.
        json: where figures are stored, and resumed from.
        quick: the smallest catalogue, one seed, two epochs: does everything run?
        split: whose queries are asked; test is for the final table.
        only: names of catalogues; null takes all.
        work: folder of everything that is made.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = Results(json)
    catalogues = {catalogue.name: catalogue for catalogue in (CATALOGUES[:1] if quick else CATALOGUES)}
    names = chosen(only, catalogues)
    run_all([Bench(catalogues[name], data, weights, work, split, results, quick) for name in names], results, split)


def chosen(asked: list[str] | None, names: Iterable[str]) -> list[str]:
    """What is asked for of these names; null is all of them.

    Raises:
        SystemExit: a name that is not there.
    """
    known = list(names)
    for name in asked or ():
        if name not in known:
            quoted = ", ".join(f'"{one}"' for one in known)
            raise SystemExit(f'there is no "{name}"; choose of {quoted} (a name with a comma needs its quotes).')
    return known if asked is None else asked


def run_all(benches: Sequence[Bench], results: Results, split: Split) -> None:
    """Measure what is missing and show everything."""
    for bench in benches:
        for key in bench.run():
            print(f"{key}: {results.data['arms'].get(key, {}).get('seconds', '')} s", flush=True)
    show(results, split)


if __name__ == "__main__":
    auto_cli(main, as_positional=False, parser_mode="yaml", allow_abbrev=False)
