"""A recipe from the catalogue and the machine: `train.py fit` without a configuration.

    python train.py fit --data.catalogue DIR --run DIR [--weights DIR] [--budget 20m]

Everything is chosen by what the catalogue holds (products, relatives, judgements, pictures,
language, numbers) and by which pretrained weights are at hand. The choices are shown with their
reasons and written as `RUN/recipe.yaml`, an ordinary configuration.
"""

from __future__ import annotations

import logging
import os
import re
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import timm
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as RichTable

from tritower.datamodules.batch import Item
from tritower.datamodules.catalogue import product_item
from tritower.datamodules.example_rows import is_split
from tritower.datamodules.held_out_rows import QueryRows
from tritower.datamodules.positives import SameGroup
from tritower.datamodules.preprocess import ItemPreprocess
from tritower.datamodules.products import ProductDataModule
from tritower.retrieval.evaluating.evaluation_queries import EvaluationQueries
from tritower.retrieval.evaluating.untrained_search import MIN_CHOOSING, without_source
from tritower.retrieval.lexical.analyzer import Analyzer
from tritower.retrieval.lexical.ranking import Scoring
from tritower.retrieval.lexical.records import Record, record_of, typed_record, visible_record
from tritower.retrieval.lexical.tuning import (
    LexicalIndexes,
    LexicalSettings,
    choose_settings,
    language_of,
)
from tritower.retrieval.ranking.metrics import PreparedNdcg
from tritower.towers.queries_by_type import evaluation_queries_of, queries_by_type
from tritower.towers.sparse_terms import TermOptions

logger = logging.getLogger(__name__)

BATCH_SIZE = 384

MAX_EPOCHS = 15
"""More hardly help where pretrained features are kept."""

MAX_STEPS = 150
"""Steps of a training; large catalogues are shown fewer times."""

VALIDATIONS = 5
"""Validations of a training, of which the best one is kept."""

MAX_PRODUCTS = 5_000
"""Products on which words are tuned: all that are judged, and others."""

MAX_QUERIES = 200
"""Queries of each type on which words are tuned."""

TEXT_MODEL = "all-MiniLM-L6-v2"
"""A Hugging Face folder, for English; multilingual-e5-small for other languages."""

IMAGE_MODEL = "tf_efficientnet_lite0.safetensors"
"""Weights of a timm model, named by the model."""

SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


@dataclass
class Recipe:
    """A configuration and why it is as it is.

    Attributes:
        model: of the configuration.
        data: of the configuration.
        trainer: of the configuration.
        reasons: (what, choice, why), in order.
    """

    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    reasons: list[tuple[str, str, str]] = field(default_factory=list)

    def explain(self, what: str, choice: str, why: str) -> None:
        """Keep a reason."""
        self.reasons.append((what, choice, why))

    def save(self, file: Path) -> None:
        """Write the configuration, with the reasons as comments."""
        lines = ["# Chosen by train.py fit for this catalogue; change what you like and run it by"]
        lines.append(f"# python train.py fit --config {file} --run ANOTHER_FOLDER")
        lines += [f"# {what}: {choice} ({why})" for what, choice, why in self.reasons]
        config = {"model": self.model, "data": self.data, "trainer": self.trainer}
        text = yaml.safe_dump(config, sort_keys=False, width=100, allow_unicode=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n" + text, encoding="utf-8")

    def show(self) -> None:
        """Print the choices."""
        table = RichTable("choice", "value", "why")
        for reason in self.reasons:
            table.add_row(*reason)
        Console().print(table)


def with_recipe(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments, with a chosen configuration where `fit` names none.

    Raises:
        ValueError: --budget or --weights beside a configuration, or a budget that is no time.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--budget")
    chosen, rest = parser.parse_known_args(arguments)
    own = {argument.partition("=")[0] for argument in rest}
    is_configured = bool(own & {"--config", "-c", "--help", "-h", "--print_config"})
    is_configured |= any(name.startswith("--model.product") for name in own)
    if not rest or rest[0] != "fit" or is_configured:
        if chosen.weights or chosen.budget:
            raise ValueError(
                "--weights and --budget belong to a fit without --config: a configuration names "
                "its weights and trainer.max_time itself."
            )
        return list(arguments)
    places = ArgumentParser(add_help=False, allow_abbrev=False)
    places.add_argument("--data.catalogue", dest="catalogue", type=Path)
    places.add_argument("--run", type=Path, default=Path("runs/default"))
    found, _ = places.parse_known_args(rest)
    if found.catalogue is None:
        raise ValueError("name a prepared catalogue (--data.catalogue) or a configuration")
    file = found.run / "recipe.yaml"
    # Processes of other devices and resumed runs take the recipe that was chosen.
    if not (file.is_file() and ("LOCAL_RANK" in os.environ or "--resume" in own)):
        recipe = choose_recipe(found.catalogue, weights_folder(chosen.weights), chosen.budget)
        recipe.show()
        recipe.save(file)
    return [rest[0], f"--config={file}", *rest[1:]]


def weights_folder(named: Path | None) -> Path | None:
    """The folder of pretrained weights: named, of TRITOWER_WEIGHTS, or ./weights; None for none.

    Raises:
        ValueError: the named folder does not exist.
    """
    if named is not None and not named.is_dir():
        raise ValueError(f"--weights {named}: there is no such folder")
    for folder in (named, os.environ.get("TRITOWER_WEIGHTS"), "weights"):
        if folder is not None and Path(folder).is_dir():
            return Path(folder)
    return None


def seconds_of(budget: str) -> int:
    """`90s`, `20m` or `2h` in seconds.

    Raises:
        ValueError: no such time.
    """
    match = re.fullmatch(r"(\d+)([smh]?)", budget)
    if match is None or not int(match[1]):
        raise ValueError(f"--budget {budget!r}: name a time such as 90s, 20m or 2h")
    return int(match[1]) * SECONDS[match[2]]


def choose_recipe(catalogue: Path, weights: Path | None, budget: str | None) -> Recipe:
    """A recipe for a prepared catalogue.

    Args:
        catalogue: the prepared catalogue.
        weights: folder of pretrained weights; None for none.
        budget: time of the training, such as `20m`; None for no limit.

    Raises:
        FileNotFoundError: no prepared catalogue.
        ValueError: there is nothing that a model could read.
    """
    started = time.monotonic()
    data = ProductDataModule(catalogue)
    data.prepare_data()
    data.setup("validate")
    recipe = Recipe()
    sample = _Sample(data)
    language = language_of(sample.records)
    _choose_words(recipe, sample, language)
    _choose_towers(recipe, data, weights, language)
    _choose_examples(recipe, data)
    _choose_training(recipe, budget)
    logger.info("chose a recipe in %.0f s", time.monotonic() - started)
    return recipe


class _Sample:
    """Held-out queries by type and the products they are searched among, as records."""

    def __init__(self, data: ProductDataModule, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        held_out = data.held_out[data.val_split]
        self.title = data.schema.text[0] if data.schema.text else ""
        rows = QueryRows(data.products, data.queries, held_out, ItemPreprocess("query"))
        queries = list(queries_by_type(rows))
        nothing = np.zeros((len(queries), 1), np.float32)
        judged = evaluation_queries_of(queries, nothing, held_out)
        needed = np.unique(np.concatenate([judged.judged.ravel(), judged.source]))
        needed = needed[needed >= 0]
        others = generator.permutation(np.setdiff1d(np.arange(len(held_out.candidates)), needed))
        sample = np.sort(np.concatenate([needed, others[: max(0, MAX_PRODUCTS - len(needed))]]))
        candidates = held_out.candidates[sample].tolist()
        products = [product_item(data.products.row(row)) for row in candidates]
        self.records = [self._record(item) for item in products]
        self.indexes = LexicalIndexes(self.records)
        judged = judged.restricted_to(sample)
        self.ndcg_of: dict[str, PreparedNdcg] = {}
        # Query type -> its judgements and the records of the queries.
        self.queries: dict[str, tuple[EvaluationQueries, list[Record]]] = {}
        for query_type in judged.distinct_types:
            positions = generator.permutation(judged.positions_of_type(query_type))[:MAX_QUERIES]
            own = judged.select(np.sort(positions))
            records = []
            for position, source in zip(np.sort(positions).tolist(), own.source, strict=True):
                if source >= 0:
                    records.append(visible_record(self.records[source], query_type))
                else:
                    text = next(iter(queries[position].item.text.values()), "")
                    records.append(typed_record(text))
            self.queries[query_type] = (own, records)
            self.ndcg_of[query_type] = PreparedNdcg(own.judged, own.grades, len(sample))

    def _record(self, item: Item) -> Record:
        return record_of(item.text, item.attributes, self.title)

    def mean_ndcg(self, query_types: Sequence[str], settings: LexicalSettings) -> float:
        """Mean nDCG@10 over types of queries, by words alone."""
        index = self.indexes.get(settings)
        figures = []
        for query_type in query_types:
            judged, records = self.queries[query_type]
            hits = index.search(records, 11, settings.scoring)
            rows: NDArray[np.int64] = without_source(hits, judged.source, 10).rows
            figures.append(self.ndcg_of[query_type].mean(rows))
        return float(np.mean(figures))

    def types(self, wanted: Sequence[str]) -> list[str]:
        """Those of the wanted types that have enough queries to choose on."""
        return [t for t in wanted if t in self.queries and len(self.queries[t][1]) >= MIN_CHOOSING]


def _choose_words(recipe: Recipe, sample: _Sample, language: str | None) -> None:
    """Fields, stems and neighbors: of records by product queries, of typed texts by typed ones."""
    chosen: dict[str, LexicalSettings] = {}
    wanted = {
        "record": ("fused", "product:text", "product:attribute"),
        "typed": ("text",),
    }
    models: dict[str, Any] = {"record": "tfidf", "typed": "bm25"}
    for name, query_types in wanted.items():
        start = LexicalSettings(Analyzer(language), scoring=Scoring(models[name]))
        own = sample.types(query_types)
        if own:
            measure: Callable[[LexicalSettings], float] = partial(sample.mean_ndcg, own)
            chosen[name], figure = choose_settings(start, measure)
            count = sum(len(sample.queries[query_type][1]) for query_type in own)
            why = f"nDCG@10 {figure:.3f} by words alone on {count} val queries"
        else:
            chosen[name] = start
            why = "too few val queries to choose on"
        weights = chosen[name].scoring.weights
        shown = ", ".join(f"{field} {weight:g}" for field, weight in weights.items())
        recipe.explain(f"words of {name}", shown, why)
    options = TermOptions(**chosen)
    recipe.model["terms"] = {
        "class_path": "tritower.towers.sparse_terms.SparseTerms",
        "init_args": {"options": _plain(asdict(options))},
    }
    recipe.explain("language", language or "unknown", "by stop words")


def _plain(value: Any) -> Any:
    """Nested mappings as plain dictionaries, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(own) for key, own in value.items()}
    return value


def _choose_towers(
    recipe: Recipe, data: ProductDataModule, weights: Path | None, language: str | None
) -> None:
    blocks: dict[str, Any] = {"block_dim": 256}
    text = _text_weights(weights, language)
    if text is not None and find_spec("transformers") is None:
        recipe.explain("text tower", "none", f"{text.name} needs: pip install 'tritower[hf]'")
    elif data.schema.text and text is not None:
        blocks["text"] = {
            "class_path": "tritower.towers.hugging_face.HuggingFaceText",
            "init_args": {
                "pretrained": str(text),
                "template": f"{{{data.schema.text[0]}}}",
                "max_length": 48,
                "freeze": True,
                **_prefixes(text),
            },
        }
        recipe.explain("text tower", text.name, "frozen: its features are cached")
    elif data.schema.text:
        recipe.explain("text tower", "none", f"{_missing(weights)} a folder such as {TEXT_MODEL}/")
    image = _image_weights(weights)
    if data.schema.images and image is not None:
        blocks["image"] = {
            "class_path": "tritower.towers.image.TimmImage",
            "init_args": {"model": image.stem, "pretrained": str(image), "freeze": True},
        }
        recipe.explain("image tower", image.stem, "frozen: its features are cached")
    elif data.schema.images:
        recipe.explain("image tower", "none", f"{_missing(weights)} a file such as {IMAGE_MODEL}")
    if data.schema.numbers:
        blocks["numbers"] = {
            "class_path": "tritower.towers.number_waves.NumberWaves",
            "init_args": {"out_dim": 256},
        }
        names = ", ".join(attribute.name for attribute in data.schema.numbers)
        recipe.explain("numbers", names, "close numbers are similar")
    blocks["terms"] = recipe.model.pop("terms")
    recipe.model = {
        "product": {
            "class_path": "tritower.towers.block_encoder.BlockEncoder",
            "init_args": blocks,
        },
        "metric": "inner_product",
    }


def _missing(weights: Path | None) -> str:
    if weights is None:
        return "there is no folder of weights: make weights/ (or name --weights) with"
    return f"{weights} has no weights for it: add"


def _text_weights(weights: Path | None, language: str | None) -> Path | None:
    """The Hugging Face folder that suits the language best."""
    if weights is None:
        return None
    folders = sorted(path.parent for path in weights.glob("*/config.json"))
    if not folders:
        return None

    def suits(folder: Path) -> bool:
        is_multilingual = "multilingual" in folder.name
        return is_multilingual == (language != "english")

    return next(filter(suits, folders), folders[0])


def _prefixes(folder: Path) -> dict[str, str]:
    """What models of the E5 family expect in front of texts (arXiv:2402.05672)."""
    if "e5" in re.split(r"[-_]", folder.name.lower()):
        return {"query_prefix": "query: ", "product_prefix": "passage: "}
    return {}


def _image_weights(weights: Path | None) -> Path | None:
    """The weights of a timm model: a file with the model's name."""
    if weights is None:
        return None
    return next((f for f in sorted(weights.glob("*.safetensors")) if timm.is_model(f.stem)), None)


def _choose_examples(recipe: Recipe, data: ProductDataModule) -> None:
    """What is learned from: relatives, judgements, or nothing."""
    train = np.flatnonzero(is_split(data.products, "train"))
    relatives = len(SameGroup(data.products, "family", train).with_relatives(train))
    judged = _judged_in_train(data)
    types = {}
    if relatives:
        types["catalogue"] = 1
    if judged:
        types["pairs"] = 1
    count = relatives + judged
    recipe.data["batch_size"] = int(np.clip(count, 8, BATCH_SIZE))
    recipe.data["views"] = {"modality_dropout": 0, "field_dropout": 0}
    examples: dict[str, Any] = {"positives": "family", "group_share": 1.0}
    if types:
        examples |= {"types": types, "relatives_only": True}
        steps = -(-count // recipe.data["batch_size"])
        epochs = int(np.clip(round(MAX_STEPS / steps), 1, MAX_EPOCHS))
        recipe.trainer["max_epochs"] = epochs
        recipe.trainer["check_val_every_n_epoch"] = max(1, epochs // VALIDATIONS)
        recipe.explain("training", f"{epochs} epochs of {steps} steps", f"about {MAX_STEPS} steps")
        recipe.explain(
            "learned from",
            ", ".join(types),
            f"{relatives:,} train products have relatives, {judged:,} train judgements",
        )
    else:
        recipe.trainer["max_epochs"] = 0
        recipe.explain(
            "learned from", "nothing", "no relatives and no judgements: weights alone are chosen"
        )
    recipe.data["examples"] = examples


def _judged_in_train(data: ProductDataModule) -> int:
    if data.qrels is None or data.queries is None:
        return 0
    ids = data.queries.column("query_id").to_pylist()
    in_train = is_split(data.queries, "train")
    train = {query_id for query_id, own in zip(ids, in_train, strict=True) if own}
    judged: list[str] = data.qrels.column("query_id").to_pylist()
    return sum(query_id in train for query_id in judged)


def _choose_training(recipe: Recipe, budget: str | None) -> None:
    recipe.model["loss"] = {
        "class_path": "InfoNCE",
        "init_args": {
            "temperature": 0.05,
            "positives": {"product": 1, "group": 1, "family": 1, "picture": 1, "query": 1},
            "ignored": ["title"],
        },
    }
    blocks = recipe.model["product"]["init_args"]
    terms: list[dict[str, Any]] = [{"query": "whole", "product": "whole"}]
    for block in ("text", "image"):
        if block in blocks:
            terms.append({"query": block, "product": block, "weight": 0.1})
    terms.append({"query": "lexical", "product": "lexical", "weight": 0.1})
    recipe.model["loss_terms"] = terms
    recipe.model["optimizer"] = {"lr": 3.0e-3, "weight_decay": 0.0}
    recipe.model["encoding"] = {"feature_cache": "data/cache"}
    if budget is not None:
        minutes, seconds = divmod(seconds_of(budget), 60)
        hours, minutes = divmod(minutes, 60)
        recipe.trainer["max_time"] = f"00:{hours:02}:{minutes:02}:{seconds:02}"
        recipe.explain("budget", budget, "training stops then, and the best model is kept")
