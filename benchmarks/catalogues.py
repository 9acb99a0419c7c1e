"""How good embeddings of real catalogues are.

Search without training, pretrained towers, trained towers, fused models.

    python -m benchmarks.catalogues --data DIR --weights DIR --json FILE [--quick]
        [--split val|test]

`DIR` holds the catalogues of docs/data.md. Every arm is stored in FILE as it finishes; a second run
makes the rest. The test split is read once: `benchmarks.ledger` keeps what was read, and refuses it
a second time.

Keys of FILE:

    arms      "CATALOGUE/ARM/SEED" -> split, splits, command, seconds, query_types
              splits: salt of `benchmarks.splits`, null for the catalogue's own
              query_types: query type -> metric -> [value, low, high]
              metrics: hit@1, hit@10, recall@10, best_recall@10, ndcg@10 by exact search;
              ann_vs_exact_recall@10 and ann_hit@10 of the default index
    missing   "CATALOGUE/ARM/SEED/SIDE without MODALITY" -> as in arms, for what is left of
              products or queries
    machine   cores, memory, versions
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.command import ALL, Folders, Reading, Split, chosen, run
from benchmarks.ledger import Ledger, commit
from benchmarks.splits import NewSplits
from tritower.artefacts.storage import write_json
from tritower.datamodules.batch import Item
from tritower.datamodules.schema import Schema
from tritower.retrieval.building.build import build_index
from tritower.retrieval.building.choose_spec import choose_lists
from tritower.retrieval.building.options import BuildOptions
from tritower.retrieval.evaluating.evaluate import Evaluation, evaluate
from tritower.retrieval.evaluating.evaluation_queries import EvaluationQueries
from tritower.retrieval.evaluating.metric_report import (
    SHOWN_METRICS,
    metrics_per_query,
    ranking_metrics,
)
from tritower.retrieval.evaluating.search_tasks import EvaluationOptions
from tritower.retrieval.evaluating.untrained_comparison import HYBRID
from tritower.retrieval.evaluating.untrained_readers import TowerReaders, open_tower_features
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.products.catalogue import PreparedCatalogue
from tritower.retrieval.ranking.metrics import bootstrap_interval
from tritower.retrieval.vectors.embeddings import EmbeddingReader
from tritower.towers.attribute import AttributeTower
from tritower.towers.embed import embed
from tritower.towers.embedding_shards import EmbedOptions
from tritower.towers.encoder import Encoder
from tritower.towers.hugging_face import HuggingFaceText
from tritower.towers.image import TimmImage
from tritower.towers.model_folder import save_model
from tritower.towers.two_tower import TwoTower

METRICS = ("hit@1", "hit@10", "recall@10", "best_recall@10", "ndcg@10")
MODALITIES = ("text", "image", "attribute")
UNTRAINED = ("bm25", "tfidf", "text", "image", "numbers", "words + image", "sum", "floor")
"""Rows of search without training.

Nothing but the last one's weights and the words' settings is chosen, on val.
"""

MISSING = {
    f"{sides} without {modality}": (side, modality)
    for modality in MODALITIES
    for sides, side in (("products", "product"), ("queries", "query"))
}
"""What is hidden, and of what."""
WHOLE = "--model.loss_terms=[{query: whole}]"
LOSS = "--model.loss.init_args"
CLIP = ["--model.loss=benchmarks.peer_losses.OpenClipLoss", f"{LOSS}.temperature=0.07"]
SIGLIP = [
    "--model.loss=benchmarks.peer_losses.OpenClipSigmoid",
    f"{LOSS}.temperature=0.1",
    f"{LOSS}.bias=-10",
]
"""Their own defaults; else the temperature of a configuration's loss would apply."""

TOWERS = (*MODALITIES, "lexical")
ALONE = {
    tower: [*(f"--model.product.{other}=null" for other in TOWERS if other != tower), WHOLE]
    for tower in TOWERS
}
TRAINED: dict[str, list[str]] = {"trained": []}
"""The configuration in use; what its parts are worth is the matter of `benchmarks.ablation`."""

BORROWED = {"as fashion is trained": "fashion", "as luma is trained": "luma"}
"""Arms of a catalogue without a configuration of its own, such as a new user's -> configuration."""


HYBRIDS = (*TRAINED, *BORROWED)
"""Arms that are fused with words, too."""


@dataclass(frozen=True)
class Catalogue:
    """One catalogue and how it is trained on.

    Attributes:
        name: folder under --data, and configuration under configs/.
        seeds: trainings per arm.
        trained: names of its trained arms.
        configs: configurations of the arms that have another one.
        splits: how it is divided anew; None takes its own splits.
    """

    name: str
    seeds: int
    trained: tuple[str, ...] = tuple(TRAINED)
    configs: dict[str, str] = field(default_factory=dict)
    splits: NewSplits | None = None

    @property
    def salt(self) -> int | None:
        """Of its new splits."""
        if self.splits is None:
            return None
        return self.splits.salt

    @property
    def folder(self) -> str:
        """Name of what is made of it."""
        if self.splits is None:
            return self.name
        return f"{self.name}-{self.splits.salt}"


SPLITS = {"fashion": NewSplits(1), "luma": NewSplits(1, val_share=0.1, test_share=0.3)}
"""Of the catalogues whose own test splits were read too often."""

CATALOGUES = (
    Catalogue("luma", seeds=1, splits=SPLITS["luma"]),
    Catalogue("fashion", seeds=1, splits=SPLITS["fashion"]),
    Catalogue("flipkart", seeds=1, trained=tuple(BORROWED), configs=BORROWED),
    Catalogue(
        "grocery",
        seeds=1,
    ),
)


class Results:
    """The JSON file: read at the start, written after every arm.

    Args:
        file: the JSON file.
        ledger: of the readings of test splits.
    """

    def __init__(self, file: Path, ledger: Ledger) -> None:
        self.file = file
        self.ledger = ledger
        if file.is_file():
            self.data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        else:
            self.data = {}
        for part in ("arms", "missing"):
            self.data.setdefault(part, {})
        self.data["machine"] = {
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }

    def done(self, part: str, key: str, split: Split, salt: int | None) -> bool:
        """Whether this arm was measured on this split."""
        kept = self.data[part].get(key, {})
        return (kept.get("split"), kept.get("splits")) == (split, salt)

    def store(self, part: str, key: str, value: dict[str, Any], salt: int | None) -> None:
        """Keep an arm; before, that the test split was read for it."""
        catalogue, arm = key.split("/", 1)
        if value["split"] == "test":
            self.ledger.add(catalogue, salt, arm)
        self.data[part][key] = {**value, "splits": salt}
        self.save()

    def save(self) -> None:
        """Write the file."""
        write_json(self.file, self.data)


@dataclass(frozen=True)
class BenchOptions:
    """What is measured beside the arms themselves.

    Attributes:
        quick: few epochs, one seed.
        arms: name -> command-line arguments of what is trained. None for the standard arms; with
            others, untrained search is not measured.
        robust: trained arms that are also measured with a modality missing.
        hybrid: trained arms that are also fused with lexical search.
    """

    quick: bool = False
    arms: Mapping[str, list[str]] | None = None
    robust: Sequence[str] = ()
    hybrid: Sequence[str] = ()


DEFAULT_BENCH = BenchOptions()


def untrained_model(weights: Path, schema: Schema) -> TwoTower:
    """A model of pretrained towers; it has all towers, so that queries of all types are made."""
    text = HuggingFaceText(
        str(weights / "all-minilm-l6-v2"), template="{title}", max_length=64, freeze=True
    )
    picture_weights = weights / "tf_efficientnet_lite0.safetensors"
    image = TimmImage("tf_efficientnet_lite0", pretrained=picture_weights, freeze=True)
    model = TwoTower(Encoder(64, text, image, AttributeTower()))
    model.set_schema(schema)
    return model


@dataclass(frozen=True)
class Measuring:
    """Embeds a prepared catalogue with a model, and measures the queries of a split.

    Attributes:
        prepared: the catalogue.
        cache: folder of features of frozen towers.
        split: whose queries are measured.
    """

    prepared: Path
    cache: Path
    split: Split

    def measure(
        self,
        model: Path,
        folder: Path,
        product: Any = None,
        query: Any = None,
        untrained: bool = False,
    ) -> dict[str, Any]:
        """The figures of a model alone, and fused with words where the floor is measured."""
        evaluation = self.evaluate(model, folder, product, query, untrained)
        report = evaluation.report
        queries = evaluation.queries
        found = evaluation.rows
        rows = {
            query_type: found["exact"][queries.positions_of_type(query_type)]
            for query_type in queries.distinct_types
        }
        rows |= {
            f"{query_type}, hybrid": of[HYBRID]
            for query_type, of in evaluation.untrained.items()
            if HYBRID in of
        }
        figures, values = figures_of(queries, rows)
        for query_type in queries.distinct_types:
            figures[query_type]["ann_hit@10"] = triple(report["tasks"]["ann"][query_type]["hit@10"])
            figures[query_type]["ann_vs_exact_recall@10"] = triple(
                report["tasks"]["ann_vs_exact"][query_type]["recall@10"]
            )
            figures[query_type]["queries"] = report["queries"][query_type]["count"]
        return {"query_types": figures, "values": values, "index": report["index"]["factory"]}

    def evaluate(
        self,
        model: Path,
        folder: Path,
        product: Any = None,
        query: Any = None,
        untrained: bool = False,
    ) -> Evaluation:
        """Embed the catalogue, build an index with lists, ask the split's queries."""
        shutil.rmtree(folder / "embeddings", ignore_errors=True)
        views = {}
        for name, view in (("product_view", product), ("query_view", query)):
            if view is not None:
                views[name] = view
        embed(
            model,
            self.prepared,
            folder / "embeddings",
            options=EmbedOptions(feature_cache=self.cache),
            untrained=untrained,
            **views,
        )
        products = EmbeddingReader(folder / "embeddings" / "products")
        lists = choose_lists(
            products.count, products.dim
        )  # the default index of so few products would be exact
        build_index(products, folder / "index", BuildOptions(lists.factory), overwrite=True)
        return self.ask(
            folder, open_tower_features(folder / "embeddings" / "untrained") if untrained else None
        )

    def ask(self, folder: Path, towers: Mapping[str, TowerReaders] | None) -> Evaluation:
        """Ask the split's queries of the index in a folder.

        Beside search without training where there are towers.
        """
        return evaluate(
            ProductIndex.open(folder / "index"),
            EmbeddingReader(folder / "embeddings" / "products"),
            EmbeddingReader(folder / "embeddings" / "queries"),
            catalogue=PreparedCatalogue(self.prepared),
            untrained=towers,
            options=EvaluationOptions(
                split=self.split, latency_queries=0, untrained=towers is not None
            ),
        )


class Bench:
    """Runs the arms of one catalogue.

    Args:
        catalogue: the catalogue.
        folders: what is read and written.
        split: whose queries are measured.
        results: stores the figures.
        options: what is measured.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        folders: Folders,
        split: Split,
        results: Results,
        options: BenchOptions = DEFAULT_BENCH,
    ) -> None:
        self.all = options.arms is None
        self.hybrid = options.hybrid
        self.arms: Mapping[str, list[str]]
        if options.arms is None:
            self.arms = TRAINED | {name: [] for name in BORROWED}
        else:
            self.arms = options.arms
        self.catalogue = catalogue
        self.weights = folders.weights
        self.work = folders.work
        self.split = split
        self.results = results
        self.quick = options.quick
        self.raw = folders.data / catalogue.name
        self.prepared = self.work / "catalogues" / catalogue.folder
        self.cache = self.work / "features"
        self.measuring = Measuring(self.prepared, self.cache, split)
        self.seeds = range(1 if self.quick else catalogue.seeds)
        self.robust = []
        if not self.quick:
            self.robust = [name for name in options.robust if name in catalogue.trained]

    def run(self) -> Iterator[str]:
        """Measure every arm that is missing; yields its name."""
        self.prepare()
        if self.all and not all(self.done("arms", f"{name}/0") for name in UNTRAINED):
            yield from self.without_training()
        for seed in self.seeds:
            for name in self.catalogue.trained:
                yield from self.arm(
                    name, seed, lambda n=name, s=seed: self.train(n, self.arms[n], s)
                )
            for name in self.robust:
                yield from self.missing(name, seed)

    def check(self) -> None:
        """Before anything is read.

        Raises:
            SystemExit: the test split would be read a second time.
        """
        if self.split != "test":
            return
        wanted = [("arms", f"{name}/0") for name in UNTRAINED if self.all]
        for seed in self.seeds:
            wanted += [("arms", f"{name}/{seed}") for name in self.catalogue.trained]
            for name in self.robust:
                wanted += [("missing", f"{name}/{seed}/{what}") for what in MISSING]
        left = [arm for part, arm in wanted if not self.done(part, arm)]
        self.results.ledger.check(self.catalogue.name, self.catalogue.salt, left)

    def key(self, arm: str) -> str:
        """Of the JSON file, of "ARM/SEED"."""
        return f"{self.catalogue.name}/{arm}"

    def done(self, part: str, arm: str) -> bool:
        """Whether "ARM/SEED" was measured on the split."""
        return self.results.done(part, self.key(arm), self.split, self.catalogue.salt)

    def store(self, part: str, arm: str, value: dict[str, Any]) -> None:
        """Keep the figures of "ARM/SEED"."""
        self.results.store(part, self.key(arm), {**value, "split": self.split}, self.catalogue.salt)

    def prepare(self) -> None:
        """The prepared catalogue."""
        if self.prepared.is_dir():
            return
        raw = self.raw
        arguments = []
        if self.catalogue.splits is not None:
            raw = self.work / "raw" / self.catalogue.folder
            arguments = self.catalogue.splits.write(self.raw, raw)
        tables = [f"--queries={raw / 'queries.csv'}", f"--qrels={self.raw / 'qrels.csv'}"]
        output = f"--output={self.prepared}"
        call("-m", "datamodules.prepare", str(raw / "products.csv"), output, *tables, *arguments)

    def arm(self, name: str, seed: int, make: Any) -> Iterator[str]:
        """Make a model, embed the catalogue, measure."""
        key = self.key(f"{name}/{seed}")
        if self.done("arms", f"{name}/{seed}"):
            return
        started = time.monotonic()
        folder = self.work / "runs" / self.catalogue.folder / name / str(seed)
        model, command = make()
        figures = self.measuring.measure(model, folder, untrained=name in self.hybrid)
        made = folder / "train" / "made.json"
        if made.is_file():
            trained_at = json.loads(made.read_text(encoding="utf-8"))["commit"]
        else:
            trained_at = None
        self.store(
            "arms", f"{name}/{seed}", {**figures, "command": command, "trained_at": trained_at}
        )
        self.results.data["arms"][key]["seconds"] = round(time.monotonic() - started, 1)
        self.results.save()
        yield key

    def without_training(self) -> Iterator[str]:
        """Words, pretrained towers, and their sums.

        All that a model of them is measured against.
        """
        model = untrained_model(self.weights, Schema.load(self.prepared / "schema.json"))
        folder = self.work / "runs" / self.catalogue.folder / "without training"
        save_model(model, folder / "model", overwrite=True)
        started = time.monotonic()
        evaluation = self.measuring.evaluate(folder / "model", folder, untrained=True)
        with_image = self.measuring.ask(
            folder, {"image": open_tower_features(folder / "embeddings" / "untrained")["image"]}
        )
        for name, query_types in untrained_rankings(evaluation, with_image).items():
            if not self.done("arms", f"{name}/0"):
                figures, values = figures_of(evaluation.queries, query_types)
                about = {"command": "", "seconds": round(time.monotonic() - started, 1)}
                chosen = evaluation.report["chosen"] if name == "floor" else {}
                self.store(
                    "arms",
                    f"{name}/0",
                    {"query_types": figures, "values": values, "chosen": chosen, **about},
                )
                yield self.key(f"{name}/0")

    def train(self, name: str, arguments: list[str], seed: int) -> tuple[Path, str]:
        """Train by the command line; returns the model folder and the command."""
        run = self.work / "runs" / self.catalogue.folder / name / str(seed) / "train"
        config = self.catalogue.configs.get(name, self.catalogue.name)
        command = ["train.py", *self.fit_arguments(run, arguments, seed, config)]
        made = "python " + " ".join(command)
        marker = run / "made.json"  # a model of the same command is not trained again
        if (
            not marker.is_file()
            or json.loads(marker.read_text(encoding="utf-8"))["command"] != made
        ):
            shutil.rmtree(run, ignore_errors=True)
            call(*command)
            run.mkdir(parents=True, exist_ok=True)
            write_json(marker, {"command": made, "commit": commit()})
        return run / "model", made

    def fit_arguments(
        self, run: Path, arguments: list[str], seed: int, config: str | None = None
    ) -> list[str]:
        """The arguments of `train.py` for a configuration and these.

        Args:
            run: folder of the run.
            arguments: further ones.
            seed: of weights and batches.
            config: name under configs/; None takes the catalogue's.
        """
        return [
            "fit",
            f"--config=configs/{config or self.catalogue.name}.yaml",
            f"--data.catalogue={self.prepared}",
            *weights_arguments(self.weights, arguments),
            *arguments,
            f"--model.encoding.feature_cache={self.cache}",
            *(["--trainer.max_epochs=2"] if self.quick else []),
            f"--seed_everything={seed}",
            f"--model.seed={seed}",
            f"--data.seed={seed}",
            f"--run={run}",
            "--floor=false",  # measured here
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
        ]

    def missing(self, name: str, seed: int) -> Iterator[str]:
        """A trained model when a modality is missing on one side."""
        model = self.work / "runs" / self.catalogue.folder / name / str(seed) / "train" / "model"
        for what, (side, modality) in MISSING.items():
            arm = f"{name}/{seed}/{what}"
            if not self.done("missing", arm):
                hidden = {side: Without(modality)}
                self.store(
                    "missing",
                    arm,
                    self.measuring.measure(model, self.work / "runs" / "missing", **hidden),
                )
                yield self.key(arm)


@dataclass(frozen=True)
class Without:
    """An item of which one modality is hidden."""

    modality: str

    def __call__(self, item: Item) -> Item:
        """The rest of the item."""
        return item._replace(
            **{"text": {"text": {}}, "image": {"images": ()}, "attribute": {"attributes": {}}}[
                self.modality
            ]
        )


def untrained_rankings(
    evaluation: Evaluation, with_image: Evaluation
) -> dict[str, dict[str, NDArray[np.int64]]]:
    """Name of an untrained row -> query type -> (Q', DEPTH) rows; rows that nothing has left out.

    Args:
        evaluation: with all towers.
        with_image: with the image tower alone, whose sum is "words + image".
    """
    found = {query_type: dict(rows) for query_type, rows in evaluation.untrained.items()}
    if "fused" in found:
        found["fused"]["words + image"] = with_image.untrained["fused"]["sum"]
    rankings: dict[str, dict[str, NDArray[np.int64]]] = {}
    for name in UNTRAINED:
        for query_type, rows in found.items():
            if name in rows:
                rankings.setdefault(name, {})[query_type] = rows[name]
    return rankings


def weights_arguments(weights: Path, arguments: list[str]) -> list[str]:
    """Where pretrained weights are, for the towers that the other arguments do not remove."""
    places = [
        f"--model.product.text.init_args.pretrained={weights / 'all-minilm-l6-v2'}",
        "--model.product.image.init_args.pretrained="
        f"{weights / 'tf_efficientnet_lite0.safetensors'}",
    ]
    removed = tuple(a.removesuffix("=null") for a in arguments if a.endswith("=null"))
    return [place for place in places if not place.startswith(removed or ("nothing",))]


def figures_of(
    queries: EvaluationQueries, found: Mapping[str, NDArray[np.int64]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What rankings are worth.

    Args:
        queries: the queries that were ranked for.
        found: query type, or "TYPE, hybrid" -> (Q', DEPTH) rows.

    Returns:
        Query type -> metric -> value with its interval; query type -> metric -> value of each
        query, for paired comparisons.
    """
    figures: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for query_type, rows in found.items():
        own = queries.select(queries.positions_of_type(query_type.removesuffix(", hybrid")))
        measured = ranking_metrics(rows, own)
        figures[query_type] = {metric: triple(measured[metric]) for metric in METRICS}
        each = metrics_per_query(rows, own)
        values[query_type] = {metric: each[metric].round(4).tolist() for metric in SHOWN_METRICS}
    return figures, values


def triple(figure: dict[str, float]) -> list[float]:
    """Value and its 95 % interval."""
    return [round(figure.get(part, figure["value"]), 4) for part in ("value", "low", "high")]


def call(*arguments: str) -> None:
    """Run one of the project's own commands; what it says is shown where it fails."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def show(results: Results, split: Split) -> None:
    """One table per catalogue and query type; figures of several seeds are their mean."""
    console = Console(width=150)
    for (catalogue, query_type), arms in sorted(arms_by_query_type(results, split).items()):
        table = RichTable(
            title=f"{catalogue}, {query_type} queries of the {split} split", title_justify="left"
        )
        for column in ("arm", "seeds", *SHOWN_METRICS, "nDCG@10 above the best without training"):
            table.add_column(column, justify="left" if column == "arm" else "right")
        for row in table_rows(arms):
            table.add_row(*row)
        console.print(table)


Arms = dict[str, list[dict[str, list[float]]]]
"""Arm -> for each seed, metric -> values of the queries."""


def arms_by_query_type(results: Results, split: Split) -> dict[tuple[str, str], Arms]:
    """(Catalogue, query type) -> arms; those of a query type and of its hybrid share a table."""
    found: dict[tuple[str, str], Arms] = {}
    for part in ("arms", "missing"):
        for key, arm in results.data[part].items():
            catalogue, name, _, *rest = key.split("/")
            for query_type, values in arm["values"].items() if arm["split"] == split else ():
                plain = query_type.removesuffix(", hybrid")
                label = ", ".join([name, *rest, *(["hybrid"] if plain != query_type else [])])
                found.setdefault((catalogue, plain), {}).setdefault(label, []).append(values)
    return found


def table_rows(arms: Arms) -> Iterator[list[str]]:
    """Cells of each arm: name, seeds, metrics with intervals, paired gain over the floor."""
    means = {
        name: {
            metric: np.mean([seed[metric] for seed in seeds], axis=0) for metric in SHOWN_METRICS
        }
        for name, seeds in arms.items()
    }
    untrained = [name for name in UNTRAINED if name in means]
    best = max(untrained, key=lambda name: means[name]["ndcg@10"].mean(), default=None)
    order = [*untrained, *(name for name in means if name not in untrained)]
    for name in order:
        cells = [with_interval(means[name][metric]) for metric in SHOWN_METRICS]
        own = means[name]["ndcg@10"]
        gain = ""
        if best is not None and name not in untrained and len(own) == len(means[best]["ndcg@10"]):
            gain = with_interval(own - means[best]["ndcg@10"], sign="+")
        yield [f"{name} *" if name == best else name, str(len(arms[name])), *cells, gain]


def with_interval(values: NDArray[np.float64], sign: str = "") -> str:
    """A mean over queries with the ends of its bootstrap interval."""
    low, high = bootstrap_interval(values)
    return f"{values.mean():{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def main(folders: Folders, reading: Reading, quick: bool = False, only: list[str] = ALL) -> None:
    """Measure all arms on the real catalogues.

    Args:
        folders: what is read and written
        reading: which queries are measured
        quick: the smallest catalogue, one seed, two epochs: does everything run?
        only: names of catalogues; all when not given.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = Results(folders.json, Ledger(again=reading.again))
    catalogues = {}
    for catalogue in CATALOGUES[:1] if quick else CATALOGUES:
        catalogues[catalogue.name] = catalogue
    options = BenchOptions(quick, hybrid=HYBRIDS)
    benches = []
    for name in chosen(only, catalogues):
        benches.append(Bench(catalogues[name], folders, reading.split, results, options))
    run_all(benches, results, reading.split)


def run_all(benches: Sequence[Bench], results: Results, split: Split) -> None:
    """Measure what is missing and show everything; a second reading of test is refused at first."""
    for bench in benches:
        bench.check()
    for bench in benches:
        for key in bench.run():
            print(f"{key}: {results.data['arms'].get(key, {}).get('seconds', '')} s", flush=True)
    show(results, split)


if __name__ == "__main__":
    run("benchmarks.catalogues", main, "How good are embeddings of real catalogues.")
