"""The index benchmark: its arithmetic by hand, its vectors.

And a tiny run of arms that need no other environment.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from faiss.contrib.datasets import SyntheticDataset

from benchmarks import index
from benchmarks.compare import peers, tables, vectors
from benchmarks.compare.figures import at_recall, cheapest, exponent, ratio
from benchmarks.compare.peers import Arm, VectorFile, pareto, recall_of
from benchmarks.compare.vectors import VectorSource, prepare
from benchmarks.index import Run
from tritower.retrieval.vectors.embeddings import EmbeddingWriter

POINTS = [
    {"recall": 0.9, "qps": 1000.0},
    {"recall": 0.96, "qps": 100.0},
    {"recall": 0.98, "qps": 10.0},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run over 2,000 vectors."""
    source = VectorSource(2000, queries=100, dim=64)
    folder = source.folder(tmp_path_factory.mktemp("bench"))
    return Run(folder, prepare(source, folder), 1, 60.0, singles=30, budget_s=0.2)


@pytest.fixture(scope="module")
def report(tiny: Run) -> dict[str, Any]:
    """What a run of two arms says."""
    return index.measure(tiny, ["exact", "ours"])


def test_figures_between_points_are_log_linear():
    # Two thirds of the way from .9 to .96: 1000 ** (1 / 3) * 100 ** (2 / 3)
    assert at_recall(POINTS, 0.94, "qps") == pytest.approx(1000 ** (1 / 3) * 100 ** (2 / 3))
    assert at_recall(POINTS, 0.97, "qps") == pytest.approx(1000**0.5)
    assert at_recall(POINTS, 0.96, "qps") == pytest.approx(100)


def test_nothing_is_extrapolated():
    assert at_recall(POINTS, 0.5, "qps") == 1000
    assert at_recall(POINTS, 0.99, "qps") is None
    assert at_recall([{"recall": 1.0, "qps": 3.0}], 0.95, "p50_ms") is None


def test_cheapest_point_reaches_the_recall_itself():
    assert cheapest(POINTS, 0.95) is POINTS[1]
    assert cheapest(POINTS, 0.99) is None


def test_ratios_and_exponents():
    assert ratio(6.0, 3.0) == 2
    assert ratio(None, 3.0) is None
    assert ratio(6.0, None) is None
    assert exponent((1e5, 2.0), (1e7, 200.0)) == pytest.approx(1)
    assert exponent((1e6, 1.0), (1e7, 10**0.5)) == pytest.approx(0.5)


def test_points_that_others_beat_are_left_out():
    beaten = {"recall": 0.95, "qps": 50.0}
    assert pareto([POINTS[2], beaten, POINTS[0], POINTS[1]]) == POINTS


def test_recall_counts_true_neighbors_in_any_order():
    assert recall_of(np.array([[3, 1], [5, -1]]), np.array([[1, 2], [5, 6]])) == 0.5


def test_vectors_are_those_of_the_dataset_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vectors, "BLOCK", 700)
    dataset = SyntheticDataset(32, 0, 2000, 100, metric="IP", seed=vectors.SEED)
    blocks, queries, tuning = vectors.synthetic(VectorSource(2000, queries=100, dim=32))
    found = np.concatenate(list(blocks))
    np.testing.assert_allclose(found, vectors.unit(dataset.get_database().copy()), atol=1e-6)
    np.testing.assert_allclose(
        np.concatenate([queries, tuning]), vectors.unit(dataset.get_queries().copy()), atol=1e-6
    )


def test_neighbors_and_files_are_of_the_same_vectors(tiny: Run):
    stored, queries = np.load(tiny.data / "vectors.npy"), np.load(tiny.data / "queries.npy")
    np.testing.assert_allclose(np.linalg.norm(stored, axis=1), 1, atol=1e-5)
    truth = np.argsort(-(queries @ stored.T), axis=1)[:, :10]
    assert recall_of(np.load(tiny.data / "exact.npy")[:, :10], truth) > 0.999
    file = VectorFile(tiny.data / "vectors.npy")
    np.testing.assert_array_equal(np.concatenate([block for _, block in file.blocks()]), stored)
    np.testing.assert_array_equal(file.rows(1990, 3000), stored[1990:])
    sample = file.sample(50)
    assert sample.shape == (50, 64) and (faiss.knn(sample, stored, 1)[0] < 1e-6).all()


def test_copies_of_real_vectors_are_as_far_as_the_noise_says(tmp_path: Path):
    base = vectors.unit(np.random.default_rng(0).standard_normal((100, 64)))
    writer = EmbeddingWriter(tmp_path / "real", dim=64)
    writer.write("shard-00000", [str(row) for row in range(100)], base)
    writer.finish(["shard-00000"])
    blocks, queries, tuning = vectors.jittered(
        VectorSource(1000, tmp_path / "real", noise=0.3, queries=20)
    )
    found = np.concatenate(list(blocks))
    assert (found.shape, queries.shape, tuning.shape) == ((1000, 64), (10, 64), (10, 64))
    stored = base.astype(np.float16).astype(np.float32)
    nearest = (found @ stored.T).max(axis=1)
    np.testing.assert_allclose(nearest[:100], 1, atol=1e-3)
    assert nearest[100:].mean() == pytest.approx(1 / np.hypot(1, 0.3), abs=0.01)


def test_a_sweep_ends_where_more_gains_nothing(tiny: Run):
    class Half(Arm):
        """Finds so many of ten neighbors."""

        asked: list[int] = []  # noqa: RUF012

        def grid(self):
            return [[{"found": n}] for n in (5, 8, 8, 10)]

        def threads(self, count):
            pass

        def search(self, queries, k, point):
            self.asked.append(point["found"])
            rows = np.load(tiny.data / "exact.npy")[: len(queries), :k].copy()
            rows[:, point["found"] :] = -1
            return rows

    exact = np.load(tiny.data / "exact.npy")[:, :10]
    task = peers.Task(
        "half", "search", tiny.data, tiny.data, tiny.data, 1, singles=20, budget_s=0.01
    )
    points = peers.sweep(Half(), np.load(tiny.data / "queries.npy"), exact, task)
    assert max(point["recall"] for point in points) == pytest.approx(0.8)
    assert 10 not in Half.asked


def test_report_has_every_figure(
    report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    exact, ours = report["arms"]["exact"], report["arms"]["ours"]
    assert (exact["status"], ours["status"]) == ("ok", "ok"), (exact, ours)
    assert exact["search"]["points"][0]["recall"] == 1
    assert exact["disk_per_vector"] == pytest.approx(4 * 64, abs=1)
    point = ours["at"]["0.95"]["point"]
    assert point["recall"] >= 0.95
    assert 0 < point["lists_share"] <= 1
    assert point["p50_ms"] > 0
    assert ours["at"]["0.95"]["cold_p50_ms"] > 0
    assert {"sample", "train", "encode", "lists", "publish"} <= ours["build"]["seconds"].keys()
    assert sum(ours["build"]["seconds"].values()) == pytest.approx(
        ours["build"]["total_s"], abs=0.5
    )
    touched = ours["build"]["predicted"]["resident"] / report["data"]["n"]
    assert ours["touched_per_vector"] == round(touched, 1)
    assert ours["touched_per_vector"] > 16 / 2  # codes of a 4-bit PQ of 8 sub-quantizers at least
    expected = ours["at"]["0.95"]["qps"] / exact["at"]["0.95"]["qps"]
    assert report["ratios"]["0.95"]["ours"]["exact"] == pytest.approx(expected, abs=0.001)
    tables.show(report)
    assert "nprobe" in capsys.readouterr().out
    assert tables.draw(report, tmp_path / "plot.png").stat().st_size > 1000


def test_arms_that_are_done_are_not_run_again(
    report: dict[str, Any], tiny: Run, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise AssertionError("it ran again")

    monkeypatch.setattr(index, "stage", fail)
    assert index.measure(tiny, ["exact", "ours"])["arms"] == report["arms"]
    monkeypatch.setattr(index, "source_digest", lambda: "another")
    with pytest.raises(AssertionError, match="ran again"):
        index.measure(tiny, ["ours"])


def test_missing_packages_are_a_row(
    tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setitem(index.ENVIRONMENTS, "hnswlib", str(tmp_path / "none"))
    report = index.measure(tiny, ["hnswlib"])
    assert report["arms"]["hnswlib"] == {
        "status": "not installed",
        "error": "not installed: make bench-setup",
    }
    tables.show(report)
    assert "make bench-setup" in capsys.readouterr().out


def test_failing_arm_is_reported_with_its_error(tiny: Run, monkeypatch: pytest.MonkeyPatch):
    broken = Run(tiny.data.parent / "nothing", tiny.about, 1, 60.0)
    broken.data.mkdir()
    (arm,) = index.measure(broken, ["exact"])["arms"].values()
    assert arm["status"] == "failed"
    assert "FileNotFoundError" in arm["error"] and "vectors.npy" in arm["error"]


def test_growth_is_from_one_size_to_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def of(n: int, seconds: float, p50: float) -> dict[str, Any]:
        build = {"total_s": seconds, "peak_rss_bytes": 1e6}
        at = {"0.95": {"p50_ms": p50}}
        return {
            "data": {"n": n},
            "arms": {
                "ours": {
                    "status": "ok",
                    "build": build,
                    "search": {"resident_bytes": 1e6},
                    "at": at,
                }
            },
        }

    reports = [of(10**6, 30.0, 0.1), of(10**5, 3.0, 0.05)]
    rows = tables.growth(reports)["build s"]["ours"]
    assert [row["n"] for row in rows] == [10**5, 10**6]
    assert rows[1]["exponent"] == pytest.approx(1)
    assert tables.growth(reports)["p50 ms at 0.95"]["ours"][1]["times"] == pytest.approx(2)
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, report in zip(files, reports, strict=True):
        file.write_text(json.dumps(report))
    assert index.main(["--growth", *map(str, files)]) == 0
    assert "1.00" in capsys.readouterr().out
    assert (tmp_path / "growth.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "x.json", "--arms", "ours,other"], "unknown arms other"),
        ([], "--json FILE is required"),
    ],
)
def test_command_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        index.main(arguments)
    assert message in capsys.readouterr().err
