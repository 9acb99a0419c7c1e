import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tritower.artefacts.storage import ArtefactError
from tritower.retrieval.building import ivf_pq_index as build_module
from tritower.retrieval.building import workspace
from tritower.retrieval.building.build import build_index
from tritower.retrieval.building.options import BuildOptions
from tritower.retrieval.building.workspace import Workspace
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.ivf.ivf_pq import TrainedQuantizers
from tritower.retrieval.ivf.operating_points import Target
from tritower.retrieval.vectors.embeddings import EmbeddingReader, EmbeddingWriter

COUNT, DIM, BLOCK = 3000, 16, 300  # 12 blocks: three shards of 1,000 rows as 300 + 300 + 300 + 100
RECIPE = BuildOptions("IVF32,PQ4x4fsr,Refine(SQ8)")


def unit(count, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def embed(folder, seed=0):
    writer = EmbeddingWriter(folder, dim=DIM)
    for shard in range(3):
        writer.write(
            f"s{shard}", [f"p{shard}-{i}" for i in range(1000)], unit(1000, 10 * seed + shard)
        )
    writer.finish([f"s{shard}" for shard in range(3)])
    return EmbeddingReader(folder)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(workspace, "BLOCK_ROWS", BLOCK)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return embed(tmp_path_factory.mktemp("embeddings") / "e")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, reader):
    """The files of a build that nothing interrupted: name -> size and digest."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace, "BLOCK_ROWS", BLOCK)
        build_index(reader, folder / "i", RECIPE)
    assert os.listdir(folder) == ["i"]
    return dict(ProductIndex.open(folder / "i").manifest.files)


class Interrupted(Exception):
    """Stands for whatever ends a build."""


@pytest.fixture
def watch(monkeypatch):
    """Counts trainings and encoded blocks; `stop_at` raises before that many blocks are encoded."""

    class Watch:
        stop_at = None
        trainings = 0
        blocks = 0

    seen = Watch()
    encode, train = TrainedQuantizers.encode, build_module.train

    def counted_encode(self, vectors):
        if seen.blocks == seen.stop_at:
            raise Interrupted
        seen.blocks += 1
        return encode(self, vectors)

    def counted_train(*arguments, **options):
        seen.trainings += 1
        return train(*arguments, **options)

    monkeypatch.setattr(TrainedQuantizers, "encode", counted_encode)
    monkeypatch.setattr(build_module, "train", counted_train)
    return seen


def files_of(index):
    return dict(ProductIndex.open(index, fall_back=False).manifest.files)


def interrupt(watch, reader, place, blocks, options=RECIPE):
    """A build that ends by an exception after so many blocks."""
    watch.stop_at = blocks
    with pytest.raises(Interrupted):
        build_index(reader, place, options)
    watch.stop_at, watch.blocks, watch.trainings = None, 0, 0


def test_a_build_has_these_blocks(watch, reader, tmp_path):
    build_index(reader, tmp_path / "i", RECIPE)
    assert (watch.trainings, watch.blocks) == (1, 12)


@pytest.mark.parametrize("done", [0, 1, 5, 11])
def test_an_interrupted_build_goes_on_and_makes_the_same_index(
    tmp_path, reader, whole, watch, done
):
    interrupt(watch, reader, tmp_path / "i", done)
    assert sorted(os.listdir(tmp_path)) == ["i.building"]
    there = sorted(file.name for file in (tmp_path / "i.building").iterdir())
    assert [name for name in there if not name.endswith(".parquet")] == [
        "begun.json",
        "refine.faiss",
        "trained.faiss",
        "training.json",
    ]
    assert len(there) == 4 + done
    build_index(reader, tmp_path / "i", RECIPE)
    assert (watch.trainings, watch.blocks) == (0, 12 - done)
    assert files_of(tmp_path / "i") == whole
    assert os.listdir(tmp_path) == ["i"]


@pytest.mark.parametrize("kill_at", [0, 4])
def test_a_killed_build_goes_on_and_makes_the_same_index(tmp_path, reader, whole, watch, kill_at):
    program = f"""
        import os, signal
        from tritower.retrieval.building import workspace
        from tritower.retrieval.building.build import build_index
        from tritower.retrieval.building.options import BuildOptions
        from tritower.retrieval.vectors.embeddings import EmbeddingReader
        from tritower.retrieval.ivf.ivf_pq import TrainedQuantizers
        workspace.BLOCK_ROWS = {BLOCK}
        encode, done = TrainedQuantizers.encode, []
        def encode_or_die(self, vectors):
            if len(done) == {kill_at}:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(1)
            return encode(self, vectors)
        TrainedQuantizers.encode = encode_or_die
        reader = EmbeddingReader({str(reader.source)!r})
        build_index(reader, {str(tmp_path / "i")!r}, BuildOptions({RECIPE.factory!r}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert done.returncode == -9, done.stderr
    assert len(list((tmp_path / "i" / "versions").iterdir())) == 1  # a temporary name
    build_index(reader, tmp_path / "i", RECIPE)
    assert (watch.trainings, watch.blocks) == (0, 12 - kill_at)
    assert files_of(tmp_path / "i") == whole
    assert sorted(os.listdir(tmp_path)) == ["i"]
    assert sorted(os.listdir(tmp_path / "i")) == ["CURRENT", "versions"]
    assert os.listdir(tmp_path / "i" / "versions") == ["000001"]


def test_a_block_that_was_cut_off_is_made_again(tmp_path, reader, whole, watch, monkeypatch):
    """Killed while a block is being written: only its temporary name is there."""
    monkeypatch.setattr(
        pq, "write_table", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        build_index(reader, tmp_path / "i", RECIPE)
    monkeypatch.undo()
    monkeypatch.setattr(workspace, "BLOCK_ROWS", BLOCK)
    (tmp_path / "i.building" / ".000000-0000000000.parquet.12345678.tmp").write_bytes(b"half of it")
    build_index(reader, tmp_path / "i", RECIPE)
    assert files_of(tmp_path / "i") == whole
    assert os.listdir(tmp_path) == ["i"]


def test_an_interrupted_training_leaves_nothing(tmp_path, reader, monkeypatch):
    monkeypatch.setattr(build_module, "train", lambda *_, **__: (_ for _ in ()).throw(Interrupted))
    with pytest.raises(Interrupted):
        build_index(reader, tmp_path / "i", RECIPE)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "other",
    [
        BuildOptions(RECIPE.factory, seed=1),
        BuildOptions("IVF16,PQ4x4fsr,Refine(SQ8)"),
        BuildOptions(RECIPE.factory, spill=True),
        BuildOptions(RECIPE.factory, train_sample=2000),
        "embeddings",
    ],
)
def test_another_build_starts_anew(tmp_path, reader, watch, other, caplog):
    caplog.set_level("INFO")
    interrupt(watch, reader, tmp_path / "i", 5)
    options = RECIPE if other == "embeddings" else other
    source = embed(tmp_path / "e", seed=1) if other == "embeddings" else reader
    build_index(source, tmp_path / "i", options)
    assert (watch.trainings, watch.blocks) == (1, 12)
    assert "removed from an unfinished build of something else" in caplog.text
    build_index(source, tmp_path / "again", options)
    assert files_of(tmp_path / "i") == files_of(tmp_path / "again")


def test_how_to_search_does_not_make_another_build(tmp_path, reader, watch):
    interrupt(watch, reader, tmp_path / "i", 5)
    build_index(reader, tmp_path / "i", BuildOptions(RECIPE.factory, nprobe=3, k_factor=2))
    assert (watch.trainings, watch.blocks) == (0, 7)
    assert ProductIndex.open(tmp_path / "i").settings == (3, 2)


def test_files_of_unknown_origin_go_on_only_where_they_have_not_changed(tmp_path, watch):
    (tmp_path / "v").mkdir()
    for number in range(3):
        np.save(tmp_path / "v" / f"v{number}.npy", unit(1000, number))
        (tmp_path / f"ids{number}.txt").write_text("".join(f"{number}-{i}\n" for i in range(1000)))
    (tmp_path / "ids").mkdir()
    for number in range(3):
        (tmp_path / f"ids{number}.txt").rename(tmp_path / "ids" / f"v{number}.txt")

    def source():
        return EmbeddingReader(tmp_path / "v", ids=tmp_path / "ids")

    interrupt(watch, source(), tmp_path / "i", 5)
    interrupt(watch, source(), tmp_path / "i", 2)  # goes on: five and two
    assert len(list((tmp_path / "i.building").glob("*.parquet"))) == 7
    np.save(tmp_path / "v" / "v1.npy", unit(1000, 9))
    build_index(source(), tmp_path / "i", RECIPE)
    assert (watch.trainings, watch.blocks) == (1, 12)


def test_two_builders_of_one_place_are_told(tmp_path, reader, watch, whole):
    place, refused = tmp_path / "i", []
    encode = TrainedQuantizers.encode

    def meanwhile(self, vectors):
        if watch.blocks == 3:
            with pytest.raises(
                ArtefactError,
                match=r"another run is building .*/i \(in .*/i\.building\): wait for it",
            ):
                build_index(reader, place, RECIPE)
            refused.append(sorted(os.listdir(tmp_path)))
        return encode(self, vectors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainedQuantizers, "encode", meanwhile)
        build_index(reader, place, RECIPE)
    assert refused == [["i", "i.building"]]
    assert (watch.trainings, watch.blocks) == (1, 12)
    assert files_of(place) == whole


def test_a_finished_build_does_not_remove_the_work_of_one_that_began_meanwhile(tmp_path, reader):
    work = Workspace(tmp_path / "i", reader, "IVF1,PQ4x4fs", 0, 100, False)
    Workspace.remove(tmp_path / "i")
    assert (tmp_path / "i.building" / "begun.json").exists()
    with work:
        pass
    Workspace.remove(tmp_path / "i")
    Workspace.remove(tmp_path / "i")
    assert os.listdir(tmp_path) == []


def test_other_things_at_its_place_are_left_alone(tmp_path, reader):
    building = tmp_path / "i.building"
    building.mkdir()
    (building / "thesis.tex").write_text("mine")
    with pytest.raises(ArtefactError, match=r"i\.building .* holds other things \(thesis\.tex\)"):
        build_index(reader, tmp_path / "i", RECIPE)
    assert (building / "thesis.tex").read_text() == "mine"
    assert os.listdir(building) == ["thesis.tex"] and os.listdir(tmp_path) == ["i.building"]


def test_a_target_that_is_not_reached_leaves_the_old_version_and_no_workspace(tmp_path, reader):
    build_index(reader, tmp_path / "i", RECIPE)
    hopeless = BuildOptions("IVF32,PQ1x4fsr")
    with pytest.raises(ValueError, match=r"does not reach recall@10 of 0\.99 .* is not published"):
        build_index(reader, tmp_path / "i", hopeless, target=Target(0.99), overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["i"]
    assert os.listdir(tmp_path / "i" / "versions") == ["000001"]
    assert ProductIndex.open(tmp_path / "i").manifest.meta["factory"] == RECIPE.factory


def test_what_an_unfinished_build_says_of_itself(tmp_path, reader, watch):
    interrupt(watch, reader, tmp_path / "i", 1)
    begun = json.loads((tmp_path / "i.building" / "begun.json").read_text())
    assert begun["embeddings"] == reader.fingerprint
    assert (begun["factory"], begun["seed"], begun["sample"], begun["spill"]) == (
        RECIPE.factory,
        0,
        COUNT,
        False,
    )
    assert (begun["metric"], begun["normalize"]) == ("cosine", False)


def test_a_place_named_from_the_current_folder(tmp_path, reader, monkeypatch, watch):
    monkeypatch.chdir(tmp_path)
    interrupt(watch, reader, Path("i"), 2)
    assert os.listdir() == ["i.building"]
    build_index(reader, Path("i"), RECIPE)
    assert os.listdir() == ["i"] and watch.blocks == 10
