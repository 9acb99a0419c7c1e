import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from retrieval import storage, versions
from retrieval.build import Recipe, build_index
from retrieval.drift import Drift, verdict
from retrieval.embeddings import EmbeddingReader, EmbeddingWriter
from retrieval.exact import exact_search
from retrieval.index import ProductIndex
from retrieval.storage import ArtefactError
from retrieval.update import read_ids_to_delete, update_index

DIM = 16
FACTORY = "IVF16,PQ8x4fsr,Refine(SQ8)"


def unit(array):
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


def vectors(count, seed=0):
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((20, DIM))
    return unit(centres[generator.integers(0, 20, count)] + 0.5 * generator.standard_normal((count, DIM)))


def embed(folder, rows, ids, contents=None, model="model-a"):
    writer = EmbeddingWriter(folder, dim=rows.shape[1], model=model)
    writer.write("shard-0", list(ids), rows, contents=contents)
    writer.finish(["shard-0"])
    return EmbeddingReader(folder)


def built(folder, count=800, factory=FACTORY):
    reader = embed(folder / "e", vectors(count), [f"p{i}" for i in range(count)])
    build_index(reader, folder / "i", Recipe(factory))
    return folder / "i", reader


def found(root, queries, k=10, **options):
    index = ProductIndex.open(root)
    hits = index.search(queries, k, **options)
    return index.ids(hits.rows), hits


WIDE = {"nprobe": 16, "k_factor": 1000.0}


def test_products_come_change_and_go(tmp_path):
    root, _ = built(tmp_path)
    new = vectors(50, seed=5)
    upsert = embed(tmp_path / "u", new, [f"p{i}" for i in range(20)] + [f"n{i}" for i in range(30)])
    report = update_index(root, upsert=upsert, delete=["p100", "p101", "nobody"])
    assert (report.added, report.replaced, report.unchanged, report.deleted) == (30, 20, 0, 2)
    assert (report.unknown, report.count, report.rows, report.version) == (["nobody"], 828, 850, "000002")
    index = ProductIndex.open(root)
    assert len(index) == 828 and index.engine.count == 850 and len(index.all_ids()) == 850
    ids, _ = found(root, new, 1, **WIDE)
    assert ids[:, 0].tolist() == [f"p{i}" for i in range(20)] + [f"n{i}" for i in range(30)]
    everything = set(found(root, new, 828, **WIDE)[0].ravel()) - {None}
    assert everything == {f"p{i}" for i in range(800) if i not in (100, 101)} | {f"n{i}" for i in range(30)}
    with pytest.raises(ValueError, match="no product 'p100'"):
        index.row_of("p100")


def test_deleting_one_product_changes_no_other_result(tmp_path):
    root, reader = built(tmp_path)
    queries = np.concatenate([batch.vectors for batch in reader.batches()])[:20]
    before, _ = found(root, queries, 11)
    update_index(root, delete=["p500"])
    after, _ = found(root, queries, 11)
    for query in range(20):
        kept = [product for product in before[query] if product != "p500"]
        assert after[query][: len(kept)].tolist() == kept
    rows = ProductIndex.open(root)
    assert all(rows.row_of(f"p{i}") == i for i in (0, 499, 501, 799))


def test_what_is_there_as_it_is_is_left_alone(tmp_path):
    root, reader = built(tmp_path)
    report = update_index(root, upsert=reader)
    assert (report.version, report.unchanged, report.verdict) == (None, 800, "nothing to do")
    assert versions.current(root).name == "000001"


def test_empty_rows_are_closed_up_when_they_are_many(tmp_path):
    root, reader = built(tmp_path)
    few = update_index(root, delete=[f"p{i}" for i in range(100)])
    assert not few.compacted and few.rows == 800
    many = update_index(root, delete=[f"p{i}" for i in range(100, 300)])
    assert many.compacted and (many.rows, many.count) == (500, 500)
    stored = np.concatenate([batch.vectors for batch in reader.batches()])
    ids, _ = found(root, stored[300:], 1, **WIDE)
    assert ids[:, 0].tolist() == [f"p{i}" for i in range(300, 800)]
    assert update_index(root, compact=True).version is None


@pytest.mark.parametrize(
    ("ids", "delete", "problem"),
    [
        (["a", "b", "a"], [], "ids appear more than once; 'a' 2 times"),
        (["a", "p1"], ["p1"], "'p1' is both to change and to delete"),
        ([], ["p1", "p1"], "'p1' appears twice"),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(tmp_path, ids, delete, problem):
    root, _ = built(tmp_path)
    upsert = embed(tmp_path / "u", vectors(len(ids), 3), ids) if ids else None
    with pytest.raises(ValueError, match=problem):
        update_index(root, upsert=upsert, delete=delete)
    assert versions.current(root).name == "000001"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "u") == ["e", "i"]


def test_other_models_dimensions_and_unknown_ids_are_refused(tmp_path):
    root, _ = built(tmp_path)
    with pytest.raises(ArtefactError, match="is of model model-b"):
        update_index(root, upsert=embed(tmp_path / "b", vectors(3), "xyz", model="model-b"))
    with pytest.raises(ValueError, match=r"has dimension 8, .* has 16"):
        update_index(root, upsert=embed(tmp_path / "d", unit(np.ones((3, 8))), "xyz"))
    with pytest.raises(ValueError, match=r"1 ids to delete are not in .* \(strict\): nobody"):
        update_index(root, delete=["nobody"], strict=True)
    with pytest.raises(ValueError, match="no product would be left"):
        update_index(root, delete=[f"p{i}" for i in range(800)])


def test_an_index_that_cannot_be_updated_says_so(tmp_path):
    root, _ = built(tmp_path, factory="IVF8,SQ8")
    with pytest.raises(ArtefactError, match=r"is IVF8,SQ8, which cannot be updated: build it anew"):
        update_index(root, delete=["p1"])
    first = Path(__file__).parent / "artefacts" / "first_ivf"
    with pytest.raises(ArtefactError, match="index of the first release: build it anew"):
        update_index(first, delete=["p1"])


def test_two_updates_at_once_do_not_mix(tmp_path, monkeypatch):
    root, _ = built(tmp_path)
    from retrieval import update as module

    def meanwhile(*arguments, **options):
        monkeypatch.undo()
        update_index(root, delete=["p1"])
        return module.write_mapped(*arguments, **options)

    monkeypatch.setattr(module, "write_mapped", meanwhile)
    with pytest.raises(ArtefactError, match="conflict"):
        update_index(root, delete=["p2"])
    index = ProductIndex.open(root)
    assert len(index) == 799 and index.row_of("p2") == 2


def test_a_killed_update_leaves_the_old_version_and_is_done_by_the_same_call(tmp_path):
    root, _ = built(tmp_path)
    embed(tmp_path / "u", vectors(40, 7), [f"n{i}" for i in range(40)])
    script = f"""
        import os, signal
        from retrieval import assemble, update
        from retrieval.embeddings import EmbeddingReader
        real = update.write_mapped
        def half(*arguments, **options):
            real(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)
        update.write_mapped = half
        update.update_index({str(root)!r}, upsert=EmbeddingReader({str(tmp_path / "u")!r}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=Path(__file__).parents[1])
    assert done.returncode == -9
    assert len(ProductIndex.open(root)) == 800
    report = update_index(root, upsert=EmbeddingReader(tmp_path / "u"))
    assert (report.added, report.count) == (40, 840)
    assert sorted(path.name for path in (root / "versions").iterdir()) == ["000001", "000002"]


def test_digests_tell_what_has_changed(tmp_path):
    rows = vectors(700)
    ids = [f"p{i}" for i in range(700)]
    build_index(embed(tmp_path / "e", rows, ids, contents=range(700)), tmp_path / "i", Recipe(FACTORY))
    digests = [-1 if i < 5 else i for i in range(700)]
    report = update_index(tmp_path / "i", upsert=embed(tmp_path / "u", rows, ids, contents=digests))
    assert (report.replaced, report.unchanged) == (5, 695)


def test_exact_search_never_sees_what_was_deleted(tmp_path):
    root, _ = built(tmp_path)
    update_index(root, delete=["p0", "p1"])
    live = embed(tmp_path / "live", vectors(800)[2:], [f"p{i}" for i in range(2, 800)])
    exact = exact_search(live, ProductIndex.open(root), vectors(800)[2:6], 1)
    assert ProductIndex.open(root).ids(exact.hits.rows)[:, 0].tolist() == ["p2", "p3", "p4", "p5"]


def test_the_gauge_tells_products_of_another_kind(tmp_path):
    root, _ = built(tmp_path)
    report = update_index(root, delete=["p1"])
    assert report.verdict == "no need to build anew"
    assert report.before is not None and report.before.recall > 0.8 and report.before.new_error is None
    strange = unit(np.random.default_rng(1).standard_normal((700, DIM)))
    report = update_index(root, upsert=embed(tmp_path / "u", strange, [f"n{i}" for i in range(700)]))
    assert report.verdict.startswith("build anew: ") and "as far from their lists' centres" in report.verdict
    meta = ProductIndex.open(root).manifest.meta
    assert meta["drift"]["verdict"] == report.verdict and meta["updates"] == 2


def test_verdicts_by_hand():
    good = Drift(recall=0.97, imbalance=1.1, error=0.4, new_error=0.41, dead=0.0)
    assert verdict(good, good, 100, 100) == "no need to build anew"
    worse = Drift(recall=0.91, imbalance=1.8, error=0.4, new_error=0.6, dead=0.1)
    said = verdict(good, worse, 250, 100)
    assert "fell from 0.970 to 0.910 (limit: 2 points)" in said
    assert "imbalance rose from 1.10 to 1.80" in said
    assert "1.50 times as far" in said and "built for 100 products and holds 250" in said


def test_ids_to_delete_are_verbatim(tmp_path):
    file = tmp_path / "ids.txt"
    file.write_bytes("007\r\n 8\n\nä,b\n".encode())
    assert read_ids_to_delete(file) == ["007", " 8", "ä,b"]


def test_flat_indexes_are_written_anew(tmp_path):
    reader = embed(tmp_path / "e", vectors(50), [f"p{i}" for i in range(50)])
    build_index(reader, tmp_path / "i")
    new = vectors(5, 9)
    report = update_index(tmp_path / "i", upsert=embed(tmp_path / "u", new, list("abcde")), delete=["p0"])
    assert (report.count, report.rows) == (54, 54)
    ids, _ = found(tmp_path / "i", new, 1)
    assert ids[:, 0].tolist() == list("abcde")


def edited(catalogue, folder, edit):
    """A copy of a prepared catalogue with `edit` applied to its rows of products."""
    with storage.new_folder(folder, kind="catalogue", meta=storage.read_manifest(catalogue).meta) as new:
        shutil.copytree(catalogue, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        for shard in sorted((new / "products").glob("*.parquet")):
            table = pq.read_table(shard)
            pq.write_table(pa.Table.from_pylist(edit(table.to_pylist()), schema=table.schema), shard)
    return folder


def test_of_a_catalogue_only_what_has_changed_is_embedded(tiny_run, tiny_catalogue, tmp_path, capsys, monkeypatch):
    import index as commands
    from towers import changes
    from towers.embed import embed as embed_catalogue

    model = tiny_run / "model"
    embed_catalogue(model, tiny_catalogue, tmp_path / "e")
    root = tmp_path / "i"
    build_index(EmbeddingReader(tmp_path / "e" / "products"), root)
    capsys.readouterr()  # the bars of embedding
    asked = []
    encode = changes._encode
    monkeypatch.setattr(changes, "_encode", lambda *a: asked.extend(a[1]) or encode(*a))

    def run(catalogue):
        code = commands.main(
            ["update", "--index", str(root), "--upsert", str(catalogue), "--model", str(model), "--json"]
        )
        return json.loads(capsys.readouterr().out) if code == 0 else code

    assert (run(tiny_catalogue)["unchanged"], run(tiny_catalogue)["version"], asked) == (120, None, [])

    def edit(rows):
        for row in rows:
            if row["product_id"] == "003-0":
                row["text"]["title"] = "a wholly new title"
            if row["product_id"] == "004-1":
                row["attributes"]["price"] = 1.5
        return [*rows, rows[0] | {"product_id": "new", "images": []}] if rows[0]["product_id"] == "000-0" else rows

    changed = edited(tiny_catalogue, tmp_path / "changed", edit)
    report = run(changed)
    assert (report["added"], report["replaced"], report["unchanged"], len(asked)) == (1, 2, 118, 3)
    embed_catalogue(model, changed, tmp_path / "all")
    index = ProductIndex.open(root)
    for batch in EmbeddingReader(tmp_path / "all" / "products").batches():
        for product, vector in zip(batch.ids.to_pylist(), batch.vectors, strict=True):
            assert np.allclose(index.vector_of(product), vector, atol=2e-3)
    assert index.manifest.meta["catalogue"] == storage.fingerprint(changed)
    assert [path.name for path in tmp_path.iterdir() if "updating" in path.name] == []


def test_the_command_updates_and_says_what_it_did(tmp_path, capsys):
    import index as commands

    root, _ = built(tmp_path)
    embed(tmp_path / "u", vectors(3, 5), ["x", "y", "z"])
    (tmp_path / "gone.txt").write_text("p5\n", encoding="utf-8")
    arguments = [
        "update",
        "--index",
        str(root),
        "--upsert",
        str(tmp_path / "u"),
        "--delete",
        str(tmp_path / "gone.txt"),
    ]
    assert commands.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["added"], report["deleted"], report["count"]) == (3, 1, 802)
    assert commands.main(["update", "--index", str(root)]) == 1
    assert "nothing to do: give upsert, delete or compact" in capsys.readouterr().err


class LivingIndex(RuleBasedStateMachine):
    """An index against a dict: whatever is done, it finds what the dict holds, and nothing else."""

    factory = FACTORY
    start = 640
    wide = WIDE

    @initialize()
    def build(self):
        import tempfile

        self.folder = Path(tempfile.mkdtemp())
        rows = vectors(self.start, seed=1)
        self.truth = {f"p{i}": row for i, row in enumerate(rows)}
        build_index(embed(self.folder / "e", rows, self.truth), self.folder / "i", Recipe(self.factory))
        self.turn = 0

    def change(self, upsert, delete, compact=False):
        self.turn += 1
        reader = None
        if upsert:
            reader = embed(self.folder / f"u{self.turn}", np.stack(list(upsert.values())), list(upsert))
        report = update_index(self.folder / "i", upsert=reader, delete=delete, compact=compact, measure=False)
        for product in delete:
            self.truth.pop(product, None)
        self.truth |= upsert
        assert report.count == len(self.truth)

    @rule(count=st.integers(1, 20), seed=st.integers(0, 10**6))
    def add(self, count, seed):
        self.change({f"n{seed}-{i}": row for i, row in enumerate(vectors(count, seed))}, [])

    @rule(seed=st.integers(0, 10**6), count=st.integers(1, 20))
    def upsert(self, seed, count):
        chosen = np.random.default_rng(seed).choice(sorted(self.truth), count)
        rows = vectors(count, seed + 1)
        self.change(dict(zip(chosen.tolist(), rows, strict=True)), [])

    @precondition(lambda self: len(self.truth) > 450)
    @rule(seed=st.integers(0, 10**6), count=st.integers(1, 60))
    def delete(self, seed, count):
        self.change({}, sorted(set(np.random.default_rng(seed).choice(sorted(self.truth), count).tolist())))

    @rule()
    def compact(self):
        self.change({}, [], compact=True)

    @invariant()
    def finds_what_the_dict_holds(self):
        if not hasattr(self, "truth"):
            return
        index = ProductIndex.open(self.folder / "i")
        assert len(index) == len(self.truth)
        everything = index.search(vectors(1, 3), len(index), **self.wide)
        assert set(index.ids(everything.rows).ravel().tolist()) == set(self.truth)
        some = sorted(self.truth)[:: max(1, len(self.truth) // 20)]
        own = index.ids(index.search(np.stack([self.truth[i] for i in some]), 1, **self.wide).rows)[:, 0]
        assert own.tolist() == some

    def teardown(self):
        import shutil

        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


class LivingFlatIndex(LivingIndex):
    factory = "Flat"
    start = 500
    wide: ClassVar[dict] = {}


few = settings(
    max_examples=6, stateful_step_count=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
LivingIndex.TestCase.settings = few
LivingFlatIndex.TestCase.settings = few
TestLivingIndex = LivingIndex.TestCase
TestLivingFlatIndex = LivingFlatIndex.TestCase
