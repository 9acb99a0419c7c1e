"""Other libraries' losses run with what the benchmark says, and are what their papers say."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.ablation import ARMS as ABLATION
from benchmarks.catalogues import CLIP, SIGLIP, SPLITS, Bench, Catalogue, Results
from benchmarks.command import Folders
from benchmarks.ledger import Ledger
from benchmarks.peer_losses import OpenClipLoss, OpenClipSigmoid
from benchmarks.peers import ARMS, CHOSEN_BY, TRIAL_EPOCHS, TRIALS, Trials
from benchmarks.photos import ARMS as PHOTOS
from tests.support.training import ROOT
from tritower.towers.cli import TrainingCLI

PINNED = {
    "ours": ("tritower.towers.losses.info_nce.InfoNCE", 1.5e-3, 0.02, 0.07),
    "open_clip's ClipLoss": ("benchmarks.peer_losses.OpenClipLoss", 1.5e-3, 0.07, 0.02),
    "open_clip's SigLipLoss": ("benchmarks.peer_losses.OpenClipSigmoid", 1.5e-3, 0.1, 0.02),
    "sentence-transformers' loss": (
        "benchmarks.peer_losses.MultipleNegativesRanking",
        1.5e-3,
        0.05,
        0.02,
    ),
    "sentence-transformers' cached loss, batch 2,048": (
        "benchmarks.peer_losses.CachedMultipleNegativesRanking",
        1e-3,
        0.05,
        0.02,
    ),
    "text alone, ours": ("tritower.towers.losses.info_nce.InfoNCE", 1.5e-3, 0.02, 0.07),
    "text alone, sentence-transformers' loss": (
        "benchmarks.peer_losses.MultipleNegativesRanking",
        1.5e-3,
        0.05,
        0.02,
    ),
}
"""Arm -> loss, middle learning rate, its own temperature, the other one that is tried."""

QUERY = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]
PRODUCT = [[0.8, 0.6], [0.6, 0.8], [1.0, 0.0]]


class Parsed(TrainingCLI):
    """The command line as it is understood, and nothing made of it."""

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


def understood(tmp_path: Path, catalogue: str, arguments: list[str]) -> Any:
    """The configuration of a catalogue and these arguments, as the benchmark has them trained."""
    results = Results(tmp_path / "results.json", Ledger(tmp_path / "reads.json"))
    folders = Folders(tmp_path, tmp_path, tmp_path / "results.json", tmp_path)
    bench = Bench(Catalogue(catalogue, seeds=1), folders, "val", results)
    command = bench.fit_arguments(tmp_path / "run", arguments, seed=0)
    return Parsed.start([a.replace("configs/", f"{ROOT}/configs/") for a in command]).config.fit


def loss_of(config: Any) -> Any:
    """The loss that is trained with."""
    module, _, name = config.model.loss.class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)(**config.model.loss.init_args)


def with_sentence_transformers() -> bool:
    return importlib.util.find_spec("sentence_transformers") is not None


@pytest.mark.parametrize("name", ARMS)
def test_every_trial_runs_at_its_temperature_and_learning_rate(tmp_path: Path, name: str) -> None:
    loss, lr, temperature, other = PINNED[name]
    expected = [(lr / 3, temperature), (lr, temperature), (lr * 3, temperature), (lr, other)]
    trials = ARMS[name].trials()
    assert len(trials) == TRIALS == len(expected)
    for arguments, (rate, of_loss) in zip(trials, expected, strict=True):
        config = understood(tmp_path, "fashion", arguments)
        assert config.model.loss.class_path == loss
        assert config.model.loss.init_args.temperature == pytest.approx(of_loss)
        assert config.model.loss.init_args.min_temperature == 0.01
        assert config.model.optimizer.lr == pytest.approx(rate)
        if "Negatives" in loss and not with_sentence_transformers():
            continue
        made = loss_of(config)
        assert 1 / made.scale.item() == pytest.approx(of_loss, rel=1e-5)
        if "Negatives" in loss:
            assert made.peer.scale == pytest.approx(1 / of_loss)


@pytest.mark.parametrize("name", ARMS)
def test_arms_differ_by_their_losses_alone(tmp_path: Path, name: str) -> None:
    like = "text alone, ours" if name.startswith("text alone") else "ours"
    config = understood(tmp_path, "fashion", ARMS[name].trials()[0])
    ours = understood(tmp_path, "fashion", ARMS[like].trials()[0])
    assert config.model.product == ours.model.product
    assert [(pair.query, pair.product) for pair in config.model.loss_terms] == [("whole", "whole")]
    assert config.data.examples.types == ["catalogue"]
    assert config.trainer.max_epochs == ours.trainer.max_epochs == 15
    assert config.data.batch_size == (2048 if "batch 2,048" in name else 512)


def test_siglip_starts_at_its_own_bias_in_every_trial(tmp_path: Path) -> None:
    for arguments in ARMS["open_clip's SigLipLoss"].trials():
        assert loss_of(understood(tmp_path, "fashion", arguments)).bias.item() == -10


def test_ours_keeps_what_the_configuration_says_of_positives(tmp_path: Path) -> None:
    for name in ("ours", "text alone, ours"):
        made = loss_of(understood(tmp_path, "fashion", ARMS[name].trials()[0]))
        relations = "product", "group", "family", "picture", "query"
        assert made.rules.positives == dict.fromkeys(relations, 1)
        assert made.rules.ignored == ["title"]


@pytest.mark.parametrize("catalogue", ["fashion", "grocery"])
def test_other_tables_give_open_clip_its_own_defaults_too(tmp_path: Path, catalogue: str) -> None:
    clip = loss_of(understood(tmp_path, catalogue, CLIP))
    siglip = loss_of(understood(tmp_path, catalogue, SIGLIP))
    assert 1 / clip.scale.item() == pytest.approx(0.07)
    assert (1 / siglip.scale.item(), siglip.bias.item()) == (pytest.approx(0.1), -10)
    for table in (*ABLATION.values(), PHOTOS):
        for arguments in table.values():
            if any("peer_losses" in argument for argument in arguments):
                assert set(CLIP) <= set(arguments) or set(SIGLIP) <= set(arguments)


def test_the_kept_trials_are_those_of_the_arms() -> None:
    kept = Trials(ROOT / "benchmarks" / "peer_trials.json").data
    assert kept.keys() == {f"{name}/{number}" for name in ARMS for number in range(TRIALS)}
    for name, arm in ARMS.items():
        assert [kept[f"{name}/{number}"]["arguments"] for number in range(TRIALS)] == arm.trials()
    assert {trial["epochs"] for trial in kept.values()} == {TRIAL_EPOCHS}
    assert {trial["splits"] for trial in kept.values()} == {SPLITS["fashion"].salt}


def test_the_trial_of_the_highest_ndcg_of_product_queries_is_chosen(tmp_path: Path) -> None:
    figures = {0: 0.5, 1: 0.7, 2: 0.6, 3: 0.1}
    kept = {
        f"ours/{number}": {"arguments": [f"--n={number}"], "val": {CHOSEN_BY: value}}
        for number, value in figures.items()
    }
    (tmp_path / "trials.json").write_text(json.dumps(kept), encoding="utf-8")
    assert Trials(tmp_path / "trials.json").best("ours") == ["--n=1"]


# ---------------------------------------------------------------- formulas


def sides() -> tuple[Tensor, Tensor]:
    return torch.tensor(QUERY, requires_grad=True), torch.tensor(PRODUCT)


def by_hand(temperature: float) -> tuple[Tensor, Tensor]:
    """(3, 3) log-probabilities of products given queries, and of queries given products."""
    query, product = sides()
    logits = query @ product.T / temperature
    return logits.log_softmax(1), logits.log_softmax(0)


def test_clip_is_the_mean_of_both_directions() -> None:
    query, product = sides()
    of_products, of_queries = by_hand(0.07)
    expected = -(of_products.diag().mean() + of_queries.diag().mean()) / 2
    assert OpenClipLoss()(query, product, None).item() == pytest.approx(expected.item(), rel=1e-4)


def test_siglip_asks_of_every_pair_at_its_bias() -> None:
    query, product = sides()
    sign = 2 * torch.eye(3) - 1
    expected = torch.log1p(torch.exp(-sign * (query @ product.T / 0.1 - 10))).sum() / 3
    found = OpenClipSigmoid()(query, product, None)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    other = torch.log1p(torch.exp(-sign * (query @ product.T / 0.5 - 2))).sum() / 3
    loss = OpenClipSigmoid(temperature=0.5, bias=-2.0)
    assert loss(query, product, None).item() == pytest.approx(other.item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.05, 0.02])
def test_multiple_negatives_ranking_goes_from_queries_to_products(temperature: float) -> None:
    pytest.importorskip("sentence_transformers", reason='needs the extra "bench"')
    peers = importlib.import_module("benchmarks.peer_losses")
    query, product = sides()
    expected = -by_hand(temperature)[0].diag().mean().item()
    plain = peers.MultipleNegativesRanking(temperature)(query, product, None)
    assert plain.item() == pytest.approx(expected, rel=1e-4)
    [gradient] = torch.autograd.grad(plain, query)
    for rows in (1, 2, 512):
        loss = peers.CachedMultipleNegativesRanking(temperature, mini_batch_size=rows)
        cached = loss(query, product, None)
        assert cached.item() == pytest.approx(expected, rel=1e-4)
        torch.testing.assert_close(torch.autograd.grad(cached, query)[0], gradient)


def test_hard_negatives_are_no_answers_of_a_peer() -> None:
    query, product = sides()
    more = torch.cat([product, torch.tensor([[0.0, -1.0]])])
    for loss in (OpenClipLoss(), OpenClipSigmoid()):
        assert loss(query, more, None).item() == loss(query, product, None).item()
