"""From files to hits by the commands a user types, and the README run as it stands."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tritower.commands import index
from tritower.datamodules import samples
from tritower.datamodules.prepare import command as prepare
from tritower.towers import cli as train

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `demo` of the README, made by the tiny configuration from 240 sample products."""
    folder = tmp_path_factory.mktemp("walk") / "demo"
    raw, catalogue = folder / "raw", folder / "catalogue"
    assert (
        samples.main([f"--output={raw}", "--products=240", "--image-size=32", "--num-workers=0"])
        == 0
    )
    judged = [f"--queries={raw / 'queries.csv'}", f"--qrels={raw / 'qrels.csv'}"]
    assert (
        prepare.main(
            [str(raw / "products.csv"), f"--output={catalogue}", "--num-workers=0", *judged]
        )
        == 0
    )
    config = ["--config", str(ROOT / "configs" / "tiny.yaml"), f"--data.catalogue={catalogue}"]
    fast = ["--trainer.max_epochs=6", "--data.examples.max_pairs_per_query=1"]
    assert train.main(["fit", *config, f"--run={folder / 'fused'}", "--then_test=true", *fast]) == 0
    embeddings = folder / "embeddings"
    model = folder / "fused" / "model"
    assert (
        index.main(
            ["embed", f"--model={model}", f"--catalogue={catalogue}", f"--output={embeddings}"]
        )
        == 0
    )
    assert (
        index.main(
            ["build", f"--embeddings={embeddings / 'products'}", f"--output={folder / 'index'}"]
        )
        == 0
    )
    return folder


def test_trained_model_finds_the_same_thing_far_above_chance(
    walk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = walk / "report"
    arguments = [
        f"--index={walk / 'index'}",
        f"--embeddings={walk / 'embeddings'}",
        f"--output={report}",
    ]
    assert index.main(["evaluate", *arguments, f"--oracle={walk / 'raw' / 'oracle.json'}"]) == 0
    figures = json.loads((report / "report.json").read_text(encoding="utf-8"))
    recall = figures["tasks"]["exact"]["fused"]["recall@10"]["value"]
    assert recall > 5 * 10 / 240
    assert (report / "report.html").stat().st_size > 10_000
    assert "exact" in capsys.readouterr().out


def test_evaluation_agrees_with_the_training_run(walk: Path) -> None:
    tested = json.loads((walk / "fused" / "test.json").read_text(encoding="utf-8"))
    report = json.loads((walk / "report" / "report.json").read_text(encoding="utf-8"))
    exact = report["tasks"]["exact"]["fused"]
    for name in ("hit@1", "hit@10", "recall@10"):  # half floats on disk may swap near ties
        assert tested[f"test/product_queries/{name}"] == pytest.approx(
            exact[name]["value"], abs=0.03
        )


def test_search_by_text_picture_and_attributes_shows_pictures(
    walk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = walk / "hits.html"
    photo = next((walk / "raw" / "images").iterdir())
    mix = ["--text=red mug", f"--image={photo}", "--attribute=price=12.5"]
    assert index.main(["search", f"--index={walk / 'index'}", *mix, "--k=5", "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)
    assert len(hits["hits"]) == 5
    assert index.main(["search", f"--index={walk / 'index'}", *mix, "--k=5", f"--html={page}"]) == 0
    assert page.read_text(encoding="utf-8").count("data:image/jpeg;base64") >= 5


def test_python_of_the_readme_runs(
    walk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    script = tmp_path / "readme.py"
    script.write_text(code, encoding="utf-8")
    monkeypatch.chdir(walk.parent)
    names = runpy.run_path(str(script))
    assert names["index"].ids(names["hits"].rows).shape == (2, 10)
    assert np.isfinite(names["hits"].scores).all()
    assert capsys.readouterr().out


def test_installed_wheel_runs_the_python_of_the_readme(walk: Path, installed: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    command = [installed / "python", "-c", code]
    done = subprocess.run(command, cwd=walk.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_installed_program_searches(walk: Path, installed: Path) -> None:
    command = [installed / "tritower-index", "search", f"--index={walk / 'index'}"]
    command += ["--text=red mug", "--json", "--k=5"]
    done = subprocess.run(command, cwd=walk, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["hits"]) == 5


def test_the_demo_runs_what_the_readme_shows() -> None:
    def commands(text: str) -> set[str]:
        joined = re.sub(r"\\\n\s*", "", text)
        return {
            " ".join(line.split())
            for line in joined.splitlines()
            if line.strip().startswith("python ")
        }

    options = (ROOT / "Makefile").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    by_hand = readme[readme.index("## The demo by hand") : readme.index("## On a GPU")]
    assert len(commands(by_hand)) == 7
    assert commands(by_hand) <= commands(options)


def test_moved_model_and_index_still_search(
    walk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("index", "fused/model"):
        shutil.copytree(walk / name, tmp_path / name)
    arguments = [
        f"--index={tmp_path / 'index'}",
        f"--model={tmp_path / 'fused' / 'model'}",
        "--text=blue lamp",
    ]
    assert index.main(["search", *arguments, "--json"]) == 0
    moved = json.loads(capsys.readouterr().out)
    assert index.main(["search", f"--index={walk / 'index'}", "--text=blue lamp", "--json"]) == 0
    assert [h["product_id"] for h in moved["hits"]] == [
        h["product_id"] for h in json.loads(capsys.readouterr().out)["hits"]
    ]
