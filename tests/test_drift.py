"""The drift that says when to build an index anew."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.support.living import DIM, embed, unit, vectors
from tritower.retrieval.building.build import build_index
from tritower.retrieval.building.options import BuildOptions
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.updating import drift as module
from tritower.retrieval.updating.drift import Drift, imbalance_of, measure_drift, recommendation
from tritower.retrieval.updating.update import update_index

GOOD = Drift(
    count=100,
    recall=0.97,
    imbalance=1.1,
    list_error=0.4,
    code_error=0.1,
    new_list_error=0.41,
    new_code_error=0.1,
    new_refine_error=0.0001,
    tombstone_share=0.0,
)


@pytest.fixture
def root(tmp_path):
    ids = [f"p{i}" for i in range(800)]
    build_index(
        embed(tmp_path / "e", vectors(800), ids),
        tmp_path / "i",
        BuildOptions("IVF16,PQ8x4fsr,Refine(SQ8)"),
    )
    return tmp_path / "i"


def test_imbalance_by_hand():
    assert imbalance_of(np.array([5, 5, 5, 5])) == 1
    assert imbalance_of(np.array([10, 0])) == 2
    assert imbalance_of(np.array([3, 1])) == 1.25  # 2 x (9 + 1) / 16
    assert imbalance_of(np.array([0, 0])) == 0


def test_recall_is_that_of_comparing_with_every_living_product(root):
    update_index(root, delete=[f"p{i}" for i in range(0, 100, 2)], measure=False)
    index = ProductIndex.open(root)
    alive, engine = index.id_table.alive(), index.engine
    stored = engine.refine.reconstruct_n(0, 800)
    settings = index.settings._replace(nprobe=2)
    shares = []
    for row in np.flatnonzero(alive):
        scores = np.where(alive, stored @ stored[row], -np.inf)
        scores[row] = -np.inf
        true = set(np.argsort(-scores)[:10])
        found = [
            other
            for other in engine.search(stored[row : row + 1], 11, settings)[1][0]
            if other != row
        ]
        shares.append(len(true & set(found[:10])) / 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "NUM_QUERIES", 800)
        assert measure_drift(engine, settings, alive, "cosine").recall == pytest.approx(
            np.mean(shares), abs=2e-3
        )


def test_the_same_products_are_asked_wherever_their_rows_are(root):
    def asked():
        index = ProductIndex.open(root)
        return index.ids(module._draw_rows(index.engine, index.id_table.alive())).tolist()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SAMPLE", 50)
        before = asked()
        assert len(set(before)) == 50
        ranks = np.array([int(product[1:]) for product in before])
        assert 200 < ranks.mean() < 600 and ranks.max() > 600, "drawn from all"
        update_index(root, delete=["p700", before[0]], compact=True)
        assert asked()[:-1] == before[1:]


def test_errors_by_hand(root):
    index = ProductIndex.open(root)
    new = vectors(40, 3)
    state = measure_drift(index.engine, index.settings, index.id_table.alive(), index.metric, new)
    centers = index.engine.ivf.quantizer.reconstruct_n(0, 16)
    distances = np.square(new[:, None] - centers[None]).sum(axis=2).min(axis=1)
    assert state.new_list_error == pytest.approx(distances.mean(), rel=1e-4)
    refine = index.engine.refine.sa_decode(index.engine.refine.sa_encode(new))
    assert state.new_refine_error == pytest.approx(
        np.square(new - refine).sum(axis=1).mean(), rel=1e-2
    )
    assert 0 < state.new_refine_error < 0.01 < state.new_code_error < state.new_list_error
    assert state.tombstone_share == 0 and state.count == 800


def test_products_of_another_kind_are_told(root, tmp_path):
    report = update_index(root, delete=["p1"])
    assert report.recommendation == "no need to build anew"
    assert report.before.recall > 0.8 and report.before.new_list_error is None
    assert report.after.tombstone_share == 0.0012
    strange = unit(np.random.default_rng(1).standard_normal((700, DIM)))
    report = update_index(
        root, upsert=embed(tmp_path / "u", strange, [f"n{i}" for i in range(700)])
    )
    assert (
        report.recommendation.startswith("build anew: ")
        and "as far from their lists' centers" in report.recommendation
    )
    meta = ProductIndex.open(root).manifest.meta
    assert (
        meta["drift"]["recommendation"] == report.recommendation
        and meta["update"]["generation"] == 2
    )
    assert Drift.from_json(meta["drift"]["built"]).count == 800


def test_the_state_before_is_the_one_that_the_last_update_has_measured(root):
    first = update_index(root, delete=["p1"])
    assert update_index(root, delete=["p2"]).before == first.after


def test_products_outside_the_ranges_of_vectors_to_rank_by_are_told(root, tmp_path):
    far = np.zeros((50, DIM), np.float32)
    far[:, 0], far[:, 1] = 1, np.linspace(0, 0.1, 50)
    report = update_index(
        root, upsert=embed(tmp_path / "u", unit(far), [f"n{i}" for i in range(50)])
    )
    assert (
        "vectors to re-rank by lose" in report.recommendation
        and "ranges are too narrow" in report.recommendation
    )


def test_without_vectors_to_rank_by_lists_and_new_products_tell(tmp_path):
    ids = [f"p{i}" for i in range(800)]
    build_index(
        embed(tmp_path / "e", vectors(800), ids), tmp_path / "i", BuildOptions("IVF16,PQ8x4fs")
    )
    report = update_index(
        tmp_path / "i", upsert=embed(tmp_path / "u", vectors(50, 7), [f"n{i}" for i in range(50)])
    )
    assert report.after.recall is None and report.after.list_error is None
    assert report.after.new_list_error > 0 and report.after.imbalance >= 1
    assert report.recommendation == (
        "no need to build anew; without vectors to re-rank by, only the sizes of lists can tell"
    )


def test_an_index_of_one_product_has_nothing_to_miss(root):
    report = update_index(root, delete=[f"p{i}" for i in range(1, 800)])
    assert (report.after.recall, report.after.count, report.rows) == (1.0, 1, 1)


def test_verdicts_by_hand():
    assert recommendation(GOOD, GOOD) == "no need to build anew"
    assert recommendation(GOOD, replace(GOOD, recall=0.951)) == "no need to build anew"
    worse = replace(
        GOOD,
        count=250,
        recall=0.91,
        imbalance=1.8,
        new_list_error=0.6,
        new_code_error=0.2,
        new_refine_error=0.002,
    )
    said = recommendation(GOOD, worse)
    assert "recall@10 of products fell from 0.970 to 0.910 (limit: 2 points)" in said
    assert "imbalance of lists rose from 1.10 to 1.80 (limit: 1.5 times)" in said
    assert (
        "1.50 times as far from their lists' centers" in said
        and "2.00 times as far from what their codes" in said
    )
    assert "lose 0.20% of new products (limit: 0.10%)" in said
    assert "built for 100 products and holds 250 (limit: 2 times)" in said
