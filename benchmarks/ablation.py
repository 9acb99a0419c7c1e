"""What each part of the training recipe is worth: one thing changed at a time, and other libraries' losses.

    python -m benchmarks.ablation --data DIR --weights DIR --json FILE [--quick] [--split val|test] [--only fashion]

Every arm is the catalogue's configuration with the arguments that the table names, trained on the same batches with the
same number of steps, and measured as `benchmarks.catalogues` measures. Arms are stored in FILE as they finish; a second
run makes the rest. The keys of FILE are those of `benchmarks.catalogues`.
"""

from __future__ import annotations

import logging
from pathlib import Path

from jsonargparse import auto_cli

from benchmarks.catalogues import Bench, Catalogue, Results, Split, note_read, show

LOSS = "--model.loss.init_args"

ARMS: dict[str, dict[str, list[str]]] = {
    "fashion": {
        "in use": [],
        "whole items alone": ["--model.compare=[{query: whole}]"],
        "modality dropout .15 in place of parts": [
            "--model.compare=[{query: whole}]",
            "--data.views.modality_dropout=0.15",
        ],
        "products compared with products too": [f"{LOSS}.same_side=true"],
        "a memory of 8,192": ["--model.loss=MemoryInfoNCE"],
        "batch 64": ["--data.batch_size=64"],
        "batch 64, remembered sums": ["--data.batch_size=64", "--model.loss=GlobalInfoNCE"],
        "batch 64, a memory of 8,192": ["--data.batch_size=64", "--model.loss=MemoryInfoNCE"],
        "hard negatives": ["--hard_negatives.every_n_epochs=2"],
        "families are no positives": [f"{LOSS}.positives={{product: 1, group: 1, query: 1}}"],
        "open_clip's ClipLoss": [
            "--model.compare=[{query: whole}]",
            "--model.loss=benchmarks.peer_losses.OpenClipLoss",
        ],
        "open_clip's SigLipLoss": [
            "--model.compare=[{query: whole}]",
            "--model.loss=benchmarks.peer_losses.OpenClipSigmoid",
        ],
        "text alone": [
            "--model.product.image=null",
            "--model.product.attribute=null",
            "--model.compare=[{query: whole}]",
        ],
        "image alone": [
            "--model.product.text=null",
            "--model.product.attribute=null",
            "--model.compare=[{query: whole}]",
        ],
        "attributes alone": [
            "--model.product.text=null",
            "--model.product.image=null",
            "--model.compare=[{query: whole}]",
        ],
    },
}


def main(
    data: Path,
    weights: Path,
    json: Path,
    quick: bool = False,
    split: Split = "val",
    only: list[str] | None = None,
    arms: list[str] | None = None,
    work: Path = Path("benchmarks/results/catalogues"),
) -> None:
    """Measure all arms.

    Args:
        data: folder of the raw catalogues of docs/data.md.
        weights: folder of all-minilm-l6-v2/ and tf_efficientnet_lite0.safetensors.
        json: where figures are stored, and resumed from.
        quick: one seed, two epochs: does everything run?
        split: whose queries are asked; test is for the final table.
        only: names of catalogues; null takes all.
        arms: names of arms; null takes all.
        work: folder of everything that is made.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results, measured = Results(json), []
    for name, table in ARMS.items():
        if only is not None and name not in only:
            continue
        chosen = {arm: arguments for arm, arguments in table.items() if arms is None or arm in arms}
        catalogue = Catalogue(name, seeds=3, trained=tuple(chosen))
        for key in Bench(catalogue, data, weights, work, split, results, quick, chosen).run():
            print(f"{key}: {results.data['arms'].get(key, {}).get('seconds', '')} s", flush=True)
            measured.append(key)
    note_read(results, split, measured)
    show(results, split)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
