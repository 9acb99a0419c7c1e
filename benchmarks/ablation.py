"""What each part of the training recipe is worth: one thing changed at a time.

    python -m benchmarks.ablation --data DIR --weights DIR --json FILE [--quick] [--split
    val|test] [--only NAMES]

Every arm is the catalogue's configuration with the arguments that the table names, trained on the
same batches with the same number of steps, and measured as `benchmarks.catalogues` measures. Arms
are stored in FILE as they finish; a second run makes the rest. The keys of FILE are those of
`benchmarks.catalogues`, and so is what guards the test split. Other libraries' losses have a
command of their own, `benchmarks.peers`, which tries settings for each.
"""

from __future__ import annotations

import json as json_format
import logging
from pathlib import Path
from typing import Any

import yaml

from benchmarks.catalogues import (
    ALONE,
    CLIP,
    LOSS,
    SPLITS,
    TOWERS,
    WHOLE,
    Bench,
    BenchOptions,
    Catalogue,
    Results,
    run_all,
)
from benchmarks.command import ALL, Folders, Reading, chosen, run
from benchmarks.ledger import Ledger

CATALOGUE = "--data.examples.types=[catalogue]"
SMALL_BATCH = [
    "--data.batch_size=64",
    "--model.optimizer.lr=7.5e-4",
]  # of 4e-4, 7.5e-4, 1.5e-3 the highest nDCG@10 on val
PRODUCTS = [CATALOGUE, "--model.product.lexical.init_args.typed=false"]
"""Products alone, for losses that know no weights.

Typed queries of facets would weigh as much as products.
"""


def compared(catalogue: str) -> list[dict[str, Any]]:
    """What the configuration in use compares."""
    configuration = yaml.safe_load(Path(f"configs/{catalogue}.yaml").read_text(encoding="utf-8"))
    return configuration["model"]["loss_terms"]


def compare(pairs: list[dict[str, Any]]) -> str:
    """The argument that compares these."""
    return f"--model.loss_terms={json_format.dumps(pairs)}"


def parts_weigh(weight: float) -> str:
    """The configuration of fashion with another weight of parts."""
    return compare(
        [
            pair | {"weight": weight} if "part" in pair.values() else pair
            for pair in compared("fashion")
        ]
    )


def without(catalogue: str, *towers: str) -> list[str]:
    """The configuration in use for items that never have what these towers read."""
    left = []
    for pair in compared(catalogue):
        if not {pair["query"], pair["product"]} & set(towers):
            left.append(pair)
    return [*(f"--model.product.{tower}=null" for tower in towers), compare(left)]


ARMS: dict[str, dict[str, list[str]]] = {
    "luma": {
        "in use": [],
        "products look for queries too": [f"{LOSS}.product_share=0.5"],
        "popular products are not corrected": [f"{LOSS}.log_q=0"],
        "no feature dropout": ["--model.product.feature_dropout=0"],
        "no generated queries": ["--data.examples.types={catalogue: 6, pairs: 1}"],
        "judged pairs alone": ["--data.examples.types=[pairs]"],
        "whole items alone": [WHOLE],
        "metric kl": ["--model.metric=kl"],
        "specialist without text": [
            *without("luma", "text"),
            "--data.examples.types={catalogue: 6, pairs: 1}",  # nothing would read typed queries
        ],
        "specialist without image": without("luma", "image"),
        "specialist without attribute": without("luma", "attribute"),
        "words": ["--model.product.lexical=HashedNgrams"],
        "exact prices": ["--model.product.attribute.init_args.exact_numbers=true"],
    },
    "fashion": {
        "in use": [],
        "fused by the mean": ["--model.product.fusion=mean"],
        "fused by a transformer": ["--model.product.fusion=transformer"],
        "whole items alone": [WHOLE],
        "parts weigh .25": [parts_weigh(0.25)],
        "modality dropout .15 in place of parts": [WHOLE, "--data.views.modality_dropout=0.15"],
        "products compared with products too": [f"{LOSS}.same_side=true"],
        "a memory of 8,192": ["--model.loss.init_args.negatives=CrossBatchMemory"],
        "batch 64": SMALL_BATCH,
        "batch 64, hard negatives": [
            *SMALL_BATCH,
            "--hard_negatives.every_n_epochs=3",
            "--hard_negatives.per_example=7",  # as many products as a batch of 512
        ],
        "batch 64, remembered sums": [
            *SMALL_BATCH,
            "--model.loss.init_args.negatives=SogCLRNormalizer",
        ],
        "batch 64, a memory of 8,192": [
            *SMALL_BATCH,
            "--model.loss.init_args.negatives=CrossBatchMemory",
        ],
        "hard negatives": ["--hard_negatives.every_n_epochs=2"],
        "families are no positives": [f"{LOSS}.positives={{product: 1, group: 1, query: 1}}"],
        "no generated queries": PRODUCTS,
        "no generated queries, whole items alone": [*PRODUCTS, WHOLE],
        "one product of each family": [*PRODUCTS, "--data.examples.one_per_group=true"],
        "one product of each family, whole items alone": [
            *PRODUCTS,
            "--data.examples.one_per_group=true",
            WHOLE,
        ],
        "one product of each family, open_clip's ClipLoss": [
            *PRODUCTS,
            "--data.examples.one_per_group=true",
            WHOLE,
            *CLIP,
        ],
        **{f"{tower} alone": [*ALONE[tower], CATALOGUE] for tower in TOWERS},
        **{
            f"text alone, {what}": [
                *ALONE["text"],
                CATALOGUE,
                "--model.product.text.init_args.freeze=false",
                f"--model.product.text.init_args.freeze_lower={share}",
                "--model.optimizer.pretrained_lr=1e-4",
                "--trainer.max_epochs=6",
            ]
            for what, share in (("tuned", 0), ("upper half tuned", 0.5))
        },
        "typed queries are not read word by word": [
            "--model.product.lexical.init_args.typed=false"
        ],
        **{
            f"generated queries weigh {w}": [f"--data.examples.generated_weight={w}"]
            for w in (0.005, 0.02, 0.1, 1)
        },
        "averaged weights": [
            "--trainer.callbacks+=EMAWeightAveraging",
            "--trainer.callbacks.decay=0.98",
        ],
        "descriptions in the text": [
            *without("fashion", "lexical"),
            "--model.product.text.init_args.template={title}. {description}",
            "--model.product.text.init_args.max_length=160",
        ],
        "specialist without text": without("fashion", "text", "lexical"),
        "specialist without image": without("fashion", "image"),
        "specialist without attribute": without("fashion", "attribute"),
        "no words": without("fashion", "lexical"),
        "prices are close or not, never the same": [
            "--model.product.attribute.init_args.exact_numbers=false"
        ],
    },
}


def main(
    folders: Folders,
    reading: Reading,
    quick: bool = False,
    only: list[str] = ALL,
    arms: list[str] = ALL,
) -> None:
    """Measure all arms.

    Args:
        folders: what is read and written
        reading: which queries are measured
        quick: one seed, two epochs: does everything run?
        only: names of catalogues; all when not given.
        arms: names of arms; all when not given.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = Results(folders.json, Ledger(again=reading.again))
    catalogues = chosen(only, ARMS)
    wanted = chosen(arms, dict.fromkeys(arm for name in catalogues for arm in ARMS[name]))
    benches = []
    for name in catalogues:
        table = {arm: arguments for arm, arguments in ARMS[name].items() if arm in wanted}
        catalogue = Catalogue(name, seeds=3, trained=tuple(table), splits=SPLITS.get(name))
        options = BenchOptions(quick, table, robust=("in use",))
        benches.append(Bench(catalogue, folders, reading.split, results, options))
    run_all(benches, results, reading.split)


if __name__ == "__main__":
    run("benchmarks.ablation", main, "What the parts of the recipes are worth.")
