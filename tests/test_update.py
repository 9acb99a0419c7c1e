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

from tests.support.embedded import write_embeddings
from tests.support.faults import Failing, Watched, using
from tests.support.living import (
    Killed,
    Killing,
    LivingFlatIndex,
    LivingIndex,
    LivingSpilledIndex,
    embed,
    unit,
    vectors,
)
from tritower.artefacts import storage, versions
from tritower.artefacts.storage import ArtefactError
from tritower.retrieval.building.build import build_index
from tritower.retrieval.building.options import BuildOptions
from tritower.retrieval.bulk import bulk_search
from tritower.retrieval.evaluating.evaluate import evaluate
from tritower.retrieval.evaluating.exact import exact_search
from tritower.retrieval.evaluating.search_tasks import EvaluationOptions
from tritower.retrieval.filtering.filters import parse
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.products.attribute_table import ATTRIBUTES_FILE, AttributeTable
from tritower.retrieval.products.catalogue import PreparedCatalogue
from tritower.retrieval.updating.update import Embedded, read_ids_to_delete, update_index
from tritower.retrieval.vectors.embeddings import EmbeddingReader, EmbeddingWriter

DIM = 16
FACTORY = "IVF16,PQ8x4fsr,Refine(SQ8)"
WIDE = {"nprobe": 16, "k_factor": 1000.0}


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """An index of 800 products, built once."""
    folder = tmp_path_factory.mktemp("origin")
    reader = embed(folder / "e", vectors(800), [f"p{i}" for i in range(800)])
    build_index(reader, folder / "i", BuildOptions(FACTORY))
    return folder


@pytest.fixture
def built(origin, tmp_path):
    """A copy of that index and its embeddings."""
    shutil.copytree(origin / "i", tmp_path / "i")
    return tmp_path / "i", EmbeddingReader(origin / "e")


def found(root, queries, k=10, **options):
    index = ProductIndex.open(root)
    hits = index.search(queries, k, settings=index.resolve(**options))
    return index.ids(hits.rows), hits


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_products_come_change_and_go(built, tmp_path):
    root, _ = built
    new = vectors(50, seed=5)
    upsert = embed(tmp_path / "u", new, [f"p{i}" for i in range(20)] + [f"n{i}" for i in range(30)])
    report = update_index(root, upsert=upsert, delete=["p100", "p101", "nobody"])
    assert (report.given, report.added, report.replaced, report.unchanged, report.deleted) == (
        50,
        30,
        20,
        0,
        2,
    )
    assert (report.unknown, report.count, report.rows, report.version) == (
        ["nobody"],
        828,
        850,
        "000002",
    )
    index = ProductIndex.open(root)
    assert len(index) == 828 and index.engine.count == 850 and len(index.id_table.column) == 850
    ids, _ = found(root, new, 1, **WIDE)
    assert ids[:, 0].tolist() == [f"p{i}" for i in range(20)] + [f"n{i}" for i in range(30)]
    everything = found(root, new, 850, **WIDE)[0]
    assert everything.shape == (50, 828), "no more results than products"
    assert set(everything.ravel()) == {f"p{i}" for i in range(800) if i not in (100, 101)} | {
        f"n{i}" for i in range(30)
    }
    with pytest.raises(ValueError, match="no product 'p100' among the 828"):
        index.row_of("p100")
    about = index.manifest.meta["update"]
    assert about == {
        "generation": 1,
        "base": "000001",
        "added": 30,
        "replaced": 20,
        "unchanged": 0,
        "deleted": 2,
        "compacted": False,
    }


def test_deleting_one_product_changes_no_other_result(built):
    root, reader = built
    queries = np.concatenate([batch.vectors for batch in reader.batches()])[:20]
    before, hits_before = found(root, queries, 11)
    update_index(root, delete=["p500"])
    after, hits_after = found(root, queries, 11)
    for query in range(20):
        kept = before[query] != "p500"
        assert after[query][: kept.sum()].tolist() == before[query][kept].tolist()
        assert (
            hits_after.scores[query][: kept.sum()].tolist()
            == hits_before.scores[query][kept].tolist()
        )
    index = ProductIndex.open(root)
    assert all(index.row_of(f"p{i}") == i for i in range(800) if i != 500)


def test_what_is_there_as_it_is_is_left_alone(built, tmp_path):
    root, reader = built
    report = update_index(root, upsert=reader)
    assert (report.version, report.given, report.unchanged, report.recommendation) == (
        None,
        800,
        800,
        None,
    )
    assert update_index(root, delete=["nobody"]).version is None
    assert update_index(root).version is None
    assert names(root / "versions") == ["000001"] and names(tmp_path) == ["i"]


def test_empty_rows_are_closed_up_when_they_are_many(built):
    root, reader = built
    few = update_index(root, delete=[f"p{i}" for i in range(100)])
    assert not few.compacted and few.rows == 800
    many = update_index(root, delete=[f"p{i}" for i in range(100, 300)])
    assert many.compacted and (many.rows, many.count) == (500, 500)
    stored = np.concatenate([batch.vectors for batch in reader.batches()])
    ids, _ = found(root, stored[300:], 1, **WIDE)
    assert ids[:, 0].tolist() == [f"p{i}" for i in range(300, 800)]
    assert update_index(root, compact=True).version is None, "there is no empty row"


def test_few_empty_rows_are_closed_up_when_asked_for(built):
    root, _ = built
    update_index(root, delete=["p0"])
    report = update_index(root, compact=True)
    assert report.compacted and (report.version, report.rows) == ("000003", 799)
    assert ProductIndex.open(root).row_of("p1") == 0
    assert update_index(root, delete=["p1"], compact=True).rows == 798


@pytest.mark.parametrize(
    ("ids", "delete", "problem"),
    [
        (["a", "b", "a"], [], "1 ids appear more than once; 'a' 2 times"),
        (["a", "p1"], ["p1"], "'p1' is both to change and to delete; 1 ids are like this"),
        ([], ["p1", "p1"], "ids to delete: 'p1' appears more than once"),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(
    built, tmp_path, ids, delete, problem
):
    root, _ = built
    upsert = embed(tmp_path / "u", vectors(len(ids), 3), ids) if ids else None
    with pytest.raises(ValueError, match=problem):
        update_index(root, upsert=upsert, delete=delete)
    assert names(root / "versions") == ["000001"]
    assert [name for name in names(tmp_path) if name != "u"] == ["i"]


@pytest.fixture
def of_unknown_model(tmp_path):
    """An index of embeddings that do not say who made them."""
    embed(tmp_path / "e", vectors(100), [f"p{i}" for i in range(100)], model=None)
    build_index(
        EmbeddingReader(tmp_path / "e"), tmp_path / "i", BuildOptions("IVF4,PQ8x4fsr,Refine(SQ8)")
    )
    return tmp_path / "i"


def test_faulty_vectors_refuse_the_whole_update(of_unknown_model, tmp_path):
    root = of_unknown_model
    rows = np.stack([*vectors(3), np.zeros(DIM)])
    pq.write_table(pa.table({"id": list("abcd"), "v": rows.tolist()}), tmp_path / "u.parquet")
    with pytest.raises(ValueError, match=r"u\.parquet: row 3 \(id 'd'\) is a zero vector"):
        update_index(root, upsert=EmbeddingReader(tmp_path / "u.parquet"))
    assert names(root / "versions") == ["000001"]


def test_other_models_metrics_and_dimensions_and_unknown_ids_are_refused(built, tmp_path):
    root, _ = built
    with pytest.raises(
        ArtefactError, match=r"is of model model-b, but .* was built from embeddings of model-a"
    ):
        update_index(root, upsert=embed(tmp_path / "b", vectors(3), "xyz", model="model-b"))
    unknown = embed(tmp_path / "unknown", vectors(3), "xyz", model=None)
    with pytest.raises(
        ArtefactError,
        match=r"unknown does not say which model made it, and .*/i is of model model-a",
    ):
        update_index(root, upsert=unknown)
    with pytest.raises(ValueError, match=r"has dimension 8, .* has 16"):
        update_index(root, upsert=embed(tmp_path / "d", unit(np.ones((3, 8))), "xyz"))
    writer = EmbeddingWriter(tmp_path / "m", dim=DIM, model="model-a", metric="inner_product")
    writer.write("s", list("xyz"), vectors(3))
    writer.finish(["s"])
    for metric in (None, "cosine"):
        with pytest.raises(ValueError, match=r"has metric inner_product, .* has cosine"):
            update_index(root, upsert=EmbeddingReader(tmp_path / "m", metric=metric))
    with pytest.raises(ValueError, match=r"1 ids to delete are not in .* \(strict\): nobody"):
        update_index(root, delete=["nobody"], strict=True)
    with pytest.raises(ValueError, match="no product would be left"):
        update_index(root, delete=[f"p{i}" for i in range(800)])
    assert names(root / "versions") == ["000001"] and "i.updating" not in names(tmp_path)


def test_an_index_that_cannot_be_updated_says_so(origin, tmp_path):
    build_index(EmbeddingReader(origin / "e"), tmp_path / "i", BuildOptions("IVF8,SQ8"))
    with pytest.raises(ArtefactError, match=r"is IVF8,SQ8, which cannot be updated: build it anew"):
        update_index(tmp_path / "i", delete=["p1"])
    with pytest.raises(ArtefactError, match="is one version"):
        update_index(versions.current(origin / "i"), delete=["p1"])


def test_too_little_memory_or_disk_is_told_before(built, tmp_path, monkeypatch):
    from tritower.retrieval.building import resources

    root, _ = built
    monkeypatch.setattr(resources, "available_memory", lambda: 1 << 20)
    with pytest.raises(ValueError, match="of memory"):
        update_index(root, delete=["p1"])
    assert names(root / "versions") == ["000001"] and "i.updating" not in names(tmp_path)


def test_two_updates_at_once_do_not_mix(built, tmp_path, monkeypatch):
    from tritower.retrieval.updating import next_version

    root, reader = built
    write = next_version.write_ivf_pq

    def meanwhile(*arguments, **options):
        monkeypatch.undo()
        with pytest.raises(
            ArtefactError, match=r"another run is updating .*/i \(in .*/i\.updating\)"
        ):
            update_index(root, delete=["p1"])
        build_index(reader, root, BuildOptions("IVF4,PQ8x4fs"), overwrite=True)
        return write(*arguments, **options)

    monkeypatch.setattr(next_version, "write_ivf_pq", meanwhile)
    with pytest.raises(
        ArtefactError, match=r"conflict at .*: this run started from 000001, but 000002 is in use"
    ):
        update_index(root, delete=["p2"])
    index = ProductIndex.open(root)
    assert (
        len(index) == 800
        and index.row_of("p2") == 2
        and index.manifest.meta["factory"] == "IVF4,PQ8x4fs"
    )


def test_what_was_compared_with_an_older_version_is_not_published(built):
    root, reader = built

    class Slow:
        """A catalogue that takes long to embed: another version is published meanwhile."""

        meta: ClassVar[dict] = {"model": "model-a", "catalogue": "c"}

        def embed(self, index, folder):
            build_index(reader, root, BuildOptions("IVF4,PQ8x4fs"), overwrite=True)
            return Embedded(None, pa.chunked_array([["p1"]]))

    with pytest.raises(
        ArtefactError, match=r"conflict at .*: this run started from 000001, but 000002 is in use"
    ):
        update_index(root, upsert=Slow(), delete=["p2"])
    assert ProductIndex.open(root).row_of("p2") == 2


def test_whoever_reads_the_old_version_keeps_it(built):
    root, _ = built
    index = ProductIndex.open(root)
    before = index.search(vectors(5, 2), 10).rows
    for i in range(4):
        update_index(root, delete=[f"p{i}"])
    assert index.version.is_dir() and np.array_equal(index.search(vectors(5, 2), 10).rows, before)
    assert index.ids(np.array([0])).tolist() == ["p0"]


def test_an_update_killed_for_real_is_done_by_the_same_call(built, tmp_path):
    root, _ = built
    embed(tmp_path / "u", vectors(40, 7), [f"n{i}" for i in range(40)])
    script = f"""
        import os, signal
        from tritower.retrieval.updating import update
        from tritower.retrieval.updating import next_version
        from tritower.retrieval.vectors.embeddings import EmbeddingReader
        real = next_version.write_ivf_pq
        def half(*arguments, **options):
            real(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)
        next_version.write_ivf_pq = half
        update.update_index({str(root)!r}, upsert=EmbeddingReader({str(tmp_path / "u")!r}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=Path(__file__).parents[1]
    )
    assert done.returncode == -9
    assert len(ProductIndex.open(root)) == 800 and names(tmp_path / "i.updating") == [
        "begun.json",
        "encoded",
    ]
    report = update_index(root, upsert=EmbeddingReader(tmp_path / "u"))
    assert (report.added, report.count) == (40, 840)
    assert names(root / "versions") == ["000001", "000002"] and names(tmp_path) == ["i", "u"]


def test_what_a_killed_update_has_encoded_is_not_encoded_again(built, tmp_path, monkeypatch):
    from tritower.retrieval.ivf.ivf_pq import TrainedQuantizers
    from tritower.retrieval.updating import next_version, plan

    root, _ = built
    for module in (next_version, plan):
        monkeypatch.setattr(module, "BLOCK", 10)
    upsert = embed(tmp_path / "u", vectors(40, 7), [f"n{i}" for i in range(40)])
    blocks, encode = [], TrainedQuantizers.encode

    def counted(self, some):
        if len(blocks) == 2:
            raise KeyboardInterrupt
        blocks.append(len(some))
        return encode(self, some)

    monkeypatch.setattr(TrainedQuantizers, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        update_index(root, upsert=upsert)
    monkeypatch.setattr(
        TrainedQuantizers,
        "encode",
        lambda self, some: blocks.append(len(some)) or encode(self, some),
    )
    assert update_index(root, upsert=upsert).added == 40
    assert blocks == [10, 10, 10, 10]
    ids, _ = found(root, vectors(40, 7), 1, **WIDE)
    assert ids[:, 0].tolist() == [f"n{i}" for i in range(40)]


def test_what_is_left_of_another_update_is_not_mixed_in(built, tmp_path):
    root, _ = built
    one = embed(tmp_path / "one", vectors(40, 7), [f"n{i}" for i in range(40)])
    other = embed(tmp_path / "other", vectors(40, 8), [f"n{i}" for i in range(40)])
    with pytest.raises(Killed), using(Killing(60)):
        update_index(root, upsert=one)
    assert (tmp_path / "i.updating" / "encoded").is_dir()
    update_index(root, upsert=other)
    ids, _ = found(root, vectors(40, 8), 1, **WIDE)
    assert ids[:, 0].tolist() == [f"n{i}" for i in range(40)]


def test_other_things_where_an_update_would_work_are_left_alone(built, tmp_path):
    root, _ = built
    (tmp_path / "i.updating").mkdir()
    (tmp_path / "i.updating" / "thesis.tex").write_text("mine")
    with pytest.raises(
        ArtefactError, match=r"i\.updating is where this update would work, but holds .*thesis\.tex"
    ):
        update_index(root, delete=["p1"])
    assert names(tmp_path / "i.updating") == ["thesis.tex"]


def test_whatever_fails_the_old_version_or_the_new_one_is_there(built, tmp_path):
    root, _ = built
    upsert = embed(
        tmp_path / "u", vectors(30, 7), [f"p{i}" for i in range(10)] + [f"n{i}" for i in range(20)]
    )
    shutil.copytree(root, tmp_path / "kept")
    seen = Watched()
    with using(seen):
        update_index(root, upsert=upsert, delete=["p100"], measure=False)
    for fail_at in range(1, len(seen.calls), 4):
        shutil.rmtree(root)
        shutil.copytree(tmp_path / "kept", root)
        try:
            with using(Failing(fail_at, 28)):
                update_index(root, upsert=upsert, delete=["p100"], measure=False)
        except (OSError, ArtefactError) as error:
            assert "space left" in str(error)
        assert len(ProductIndex.open(root, fall_back=False)) in (800, 819), fail_at
        report = update_index(root, upsert=upsert, delete=["p100"], measure=False)
        assert (report.count, ProductIndex.open(root).engine.count) == (819, 830), fail_at
        assert names(tmp_path) == ["i", "kept", "u"] and len(names(root / "versions")) == 2, fail_at


def test_digests_tell_what_has_changed(tmp_path):
    rows, ids = vectors(700), [f"p{i}" for i in range(700)]
    build_index(
        embed(tmp_path / "e", rows, ids, contents=range(700)), tmp_path / "i", BuildOptions(FACTORY)
    )
    digests = [-1 if i < 5 else i for i in range(700)]
    report = update_index(tmp_path / "i", upsert=embed(tmp_path / "u", rows, ids, contents=digests))
    assert (report.replaced, report.unchanged) == (5, 695)
    assert ProductIndex.open(tmp_path / "i").id_table.contents.to_pylist() == [
        *[None] * 5,
        *range(5, 700),
        *[-1] * 5,
    ]


def test_a_column_called_content_in_files_of_others_means_nothing(of_unknown_model, tmp_path):
    root = of_unknown_model
    for seed, expected in ((7, "added"), (8, "replaced")):
        columns = {"id": ["x", "y"], "v": vectors(2, seed).tolist(), "content": [1, 2]}
        pq.write_table(pa.table(columns), tmp_path / f"{seed}.parquet")
        report = update_index(root, upsert=EmbeddingReader(tmp_path / f"{seed}.parquet"))
        assert getattr(report, expected) == 2
    assert update_index(root, upsert=EmbeddingReader(tmp_path / "8.parquet")).unchanged == 2


def without_contents(root):
    """Rewrite an index as one that knows nothing of what was embedded."""
    folder = versions.current(root)
    ids = pa.array(ProductIndex.open(root).id_table.column.to_pylist(), pa.string())
    (folder / "ids.arrow").unlink()
    with pa.ipc.new_file(folder / "ids.arrow", pa.schema([("product_id", pa.string())])) as file:
        file.write_table(pa.table({"product_id": ids}))
    meta = storage.read_manifest(folder).meta
    (folder / storage.MANIFEST).unlink()
    storage.seal(folder, artefact_type="index", meta=meta)


def test_where_an_index_does_not_know_what_was_embedded_all_has_changed(built, tmp_path):
    root, _ = built
    without_contents(root)
    assert ProductIndex.open(root).id_table.contents.null_count == 800
    zeros = embed(
        tmp_path / "u", vectors(800)[:10], [f"p{i}" for i in range(10)], contents=[0] * 10
    )
    assert update_index(root, upsert=zeros).replaced == 10
    assert update_index(root, upsert=zeros).unchanged == 10
    assert ProductIndex.open(root).id_table.contents.null_count == 800, (
        "ten rows are empty, ten are new"
    )


def test_searches_of_every_kind_never_see_what_was_deleted(built, tmp_path):
    root, _ = built
    gone = [f"p{i}" for i in range(40)]
    update_index(root, delete=gone)
    index = ProductIndex.open(root)
    live = embed(tmp_path / "live", vectors(800)[40:], [f"p{i}" for i in range(40, 800)])
    exact = exact_search(live, index, vectors(800)[40:44], 1)
    assert index.ids(exact.hits.rows)[:, 0].tolist() == ["p40", "p41", "p42", "p43"]
    every = embed(tmp_path / "every", vectors(800)[:50], [f"p{i}" for i in range(50)])
    bulk_search(index, every, tmp_path / "hits.parquet", k=20)
    hits = pq.read_table(tmp_path / "hits.parquet")
    assert hits.column("product_id").null_count == 0
    assert not set(hits.column("product_id").to_pylist()) & set(gone)
    assert index.ids(np.array([0, 39, -1, 40])).tolist() == [None, None, None, "p40"]
    assert index.id_table.alive().sum() == 760 and not index.id_table.alive()[:40].any()


@pytest.mark.parametrize(
    "options",
    [
        BuildOptions("IVF16,PQ8x4fs"),
        BuildOptions("IVF16,PQ4x4fsr,Refine(SQfp16)", spill=True),
        BuildOptions("Flat"),
    ],
)
def test_every_kind_of_index_that_can_be_updated(origin, tmp_path, options):
    root = tmp_path / "i"
    build_index(EmbeddingReader(origin / "e"), root, options)
    new = vectors(5, 9)
    report = update_index(root, upsert=embed(tmp_path / "u", new, list("abcde")), delete=["p0"])
    wide = {} if options.factory == "Flat" else {"nprobe": 16}
    assert (report.count, report.rows) == (804, 804 if options.factory == "Flat" else 805)
    ids, _ = found(root, new, 804, **wide)
    assert {tuple(sorted(row)) for row in ids} == {
        tuple(sorted([*(f"p{i}" for i in range(1, 800)), *"abcde"]))
    }
    if options.factory != "IVF16,PQ8x4fs":
        assert found(root, new, 1, **wide)[0][:, 0].tolist() == list("abcde")
    assert update_index(root, compact=True).compacted is (options.factory != "Flat")
    assert {tuple(sorted(row)) for row in found(root, new, 804, **wide)[0]} == {
        tuple(sorted(ids[0]))
    }


def test_ids_to_delete_are_verbatim(tmp_path):
    file = tmp_path / "ids.txt"
    file.write_bytes("007\r\n 8\n\nä,b\n".encode())
    assert read_ids_to_delete(file) == ["007", " 8", "ä,b"]
    file.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match=r"ids\.txt is not text in UTF-8"):
        read_ids_to_delete(file)


def attributes_of(root):
    """Id -> price and brand."""
    index = ProductIndex.open(root)
    table = AttributeTable(index.version / ATTRIBUTES_FILE)
    assert table.count == index.engine.count
    rows = np.arange(table.count)
    values = zip(
        table.decoded("price", rows).to_pylist(),
        table.decoded("brand", rows).to_pylist(),
        strict=True,
    )
    return dict(zip(index.id_table.column.to_pylist(), values, strict=True))


def test_attributes_go_with_the_products(origin, tmp_path):
    root = tmp_path / "i"
    prices = {
        "product_id": [f"p{i}" for i in range(800)],
        "price": np.arange(800.0),
        "brand": ["a", "b"] * 400,
    }
    pq.write_table(pa.table(prices), tmp_path / "prices.parquet")
    build_index(
        EmbeddingReader(origin / "e"),
        root,
        BuildOptions(FACTORY),
        attributes=tmp_path / "prices.parquet",
    )
    upsert = embed(tmp_path / "u", vectors(2, 5), ["p1", "new"])
    update_index(root, upsert=upsert, delete=["p0"])
    expected = {f"p{i}": (float(i), "ab"[i % 2]) for i in range(1, 800)}
    assert attributes_of(root) == {None: (None, None), "new": (None, None), **expected}, (
        "p1 keeps what it had"
    )
    some = {"product_id": ["new", "p2"], "price": [5.0, 6.0], "brand": ["c", "c"]}
    pq.write_table(pa.table(some), tmp_path / "some.parquet")
    report = update_index(root, attributes=tmp_path / "some.parquet", compact=True)
    assert (report.version, report.rows) == ("000003", 800)
    assert attributes_of(root) == {**expected, "new": (5.0, "c"), "p2": (6.0, "c")}
    query_types = {"price": "number", "brand": "category"}
    assert ProductIndex.open(root).manifest.meta["attributes"] == {
        "attribute_types": query_types,
        "rows_without": 0,
    }


@pytest.mark.parametrize(
    "filter", ["price >= 0", "price is missing", "not (price < 790)", "brand != a"]
)
@pytest.mark.parametrize("factory", [FACTORY, "Flat"])
def test_filters_see_what_is_there_now_and_nothing_else(origin, tmp_path, filter, factory):
    root = tmp_path / "i"
    prices = {
        "product_id": [f"p{i}" for i in range(800)],
        "price": np.arange(800.0),
        "brand": ["a", "b"] * 400,
    }
    pq.write_table(pa.table(prices), tmp_path / "prices.parquet")
    build_index(
        EmbeddingReader(origin / "e"),
        root,
        BuildOptions(factory),
        attributes=tmp_path / "prices.parquet",
    )
    upsert = embed(
        tmp_path / "u", vectors(30, 5), [f"p{i}" for i in range(20)] + [f"n{i}" for i in range(10)]
    )
    update_index(root, upsert=upsert, delete=[f"p{i}" for i in range(780, 798)])
    price = {f"p{i}": i for i in range(800) if not 780 <= i < 798} | {
        f"n{i}": None for i in range(10)
    }
    matches = {
        "price >= 0": lambda i: price[i] is not None,
        "price is missing": lambda i: price[i] is None,
        "not (price < 790)": lambda i: price[i] is not None and price[i] >= 790,
        "brand != a": lambda i: price[i] is not None and price[i] % 2 == 1,
    }
    expected = {product for product in price if matches[filter](product)}
    index = ProductIndex.open(root)
    found = index.ids(index.search(vectors(3, 1), 1000, filter=parse(filter)).rows)
    for row in found.tolist():
        there = [product for product in row if product is not None]
        assert len(there) == len(set(there)) and set(there) == expected


def test_an_index_without_attributes_takes_those_it_is_given(built, tmp_path):
    root, _ = built
    pq.write_table(
        pa.table({"product_id": ["p1"], "price": [5.0], "brand": ["c"]}), tmp_path / "some.parquet"
    )
    update_index(root, attributes=tmp_path / "some.parquet")
    known = attributes_of(root)
    assert known.pop("p1") == (5.0, "c") and set(known.values()) == {(None, None)}


def edited(catalogue, folder, edit):
    """A copy of a prepared catalogue with `edit` applied to its rows of products."""
    with storage.new_folder(
        folder, artefact_type="catalogue", meta=storage.read_manifest(catalogue).meta
    ) as new:
        shutil.copytree(
            catalogue, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json")
        )
        for shard in sorted((new / "products").glob("*.parquet")):
            table = pq.read_table(shard)
            pq.write_table(
                pa.Table.from_pylist(edit(table.to_pylist()), schema=table.schema), shard
            )
    return folder


@pytest.fixture(scope="module")
def of_catalogue(tiny_run, tiny_catalogue, tmp_path_factory):
    """An index of the tiny catalogue as the tiny model sees it."""
    from tritower.towers.embed import EmbedOptions
    from tritower.towers.embed import embed as embed_catalogue

    folder = tmp_path_factory.mktemp("of-catalogue")
    embed_catalogue(
        tiny_run / "model", tiny_catalogue, folder / "e", options=EmbedOptions(accelerator="cpu")
    )
    build_index(
        EmbeddingReader(folder / "e" / "products"),
        folder / "i",
        BuildOptions("IVF4,PQ4x4fsr,Refine(SQfp16)"),
    )
    return folder / "i"


@pytest.fixture
def asked(monkeypatch):
    """The rows that are encoded, as the model is asked for them."""
    from tritower.towers.embed import ProductTable

    rows, original = [], ProductTable.__getitem__
    monkeypatch.setattr(
        ProductTable, "__getitem__", lambda self, some: rows.extend(some) or original(self, some)
    )
    return rows


def change_three(rows):
    """Another text, another price, and a new product at the end of the first shard."""
    for row in rows:
        if row["product_id"] == "003-0":
            row["text"]["title"] = "a wholly new title"
        if row["product_id"] == "044-1":
            row["attributes"]["price"] = 1.5
    return (
        [*rows, rows[0] | {"product_id": "new", "images": []}]
        if rows[0]["product_id"] == "000-0"
        else rows
    )


def test_of_a_catalogue_only_what_has_changed_is_embedded(
    of_catalogue, tiny_run, tiny_catalogue, tmp_path, capsys, asked
):
    from tritower.commands import index as commands
    from tritower.towers.embed import EmbedOptions
    from tritower.towers.embed import embed as embed_catalogue

    root = tmp_path / "i"
    shutil.copytree(of_catalogue, root)
    capsys.readouterr()

    def run(catalogue, *more):
        code = commands.main(
            ["update", "--index", str(root), "--upsert", str(catalogue), "--json", *more]
        )
        printed = capsys.readouterr()
        return json.loads(printed.out) if code == 0 else printed.err

    assert (run(tiny_catalogue)["unchanged"], run(tiny_catalogue)["version"], asked) == (
        120,
        None,
        [],
    )
    changed = edited(tiny_catalogue, tmp_path / "changed", change_three)
    (tmp_path / "gone.txt").write_text("005-0\n", encoding="utf-8")
    assert "'005-0' is both to change and to delete" in run(
        changed, "--delete", str(tmp_path / "gone.txt")
    )
    asked.clear()
    report = run(changed)
    assert (report["added"], report["replaced"], report["unchanged"], len(asked)) == (1, 2, 118, 3)
    embed_catalogue(
        tiny_run / "model", changed, tmp_path / "all", options=EmbedOptions(accelerator="cpu")
    )
    index = ProductIndex.open(root)
    for batch in EmbeddingReader(tmp_path / "all" / "products").batches():
        for product, vector in zip(batch.ids.to_pylist(), batch.vectors, strict=True):
            assert index.vector_of(product) @ vector > 0.9999
    assert index.manifest.meta["catalogue"] == storage.fingerprint(changed)
    assert index.manifest.meta["hints"]["catalogue"] == str(changed)
    assert (
        attributes_of(root)["044-1"][0] == 1.5
        and attributes_of(root)["new"] == attributes_of(root)["000-0"]
    )
    assert not [name for name in names(tmp_path) if "updating" in name]


def test_a_part_of_a_catalogue_does_not_take_the_place_of_the_whole(
    of_catalogue, tiny_run, tiny_catalogue, tmp_path
):
    from tritower.towers.changed_products import ChangedProducts

    root = tmp_path / "i"
    shutil.copytree(of_catalogue, root)
    part = edited(tiny_catalogue, tmp_path / "part", lambda rows: change_three(rows)[:8])
    report = update_index(root, upsert=ChangedProducts(tiny_run / "model", part))
    assert (report.given, report.added, report.replaced, report.count) == (16, 0, 1, 120)
    meta = ProductIndex.open(root).manifest.meta
    assert meta["catalogue"] == storage.fingerprint(tiny_catalogue)
    assert meta["hints"]["catalogue"] == str(tiny_catalogue)
    before, after = attributes_of(of_catalogue), attributes_of(root)
    assert after.pop(None) == (None, None) and after == before, (
        "whatever the part does not know stays"
    )


def test_a_killed_update_embeds_no_shard_twice(
    of_catalogue, tiny_run, tiny_catalogue, tmp_path, asked, monkeypatch
):
    from tritower.retrieval.vectors.embeddings import EmbeddingWriter
    from tritower.towers.changed_products import ChangedProducts

    root = tmp_path / "i"
    shutil.copytree(of_catalogue, root)
    changed = edited(tiny_catalogue, tmp_path / "changed", change_three)
    write, shards = EmbeddingWriter.write, []

    def second_fails(self, shard, *arguments, **options):
        if shards:
            raise RuntimeError("gone")
        shards.append(shard)
        write(self, shard, *arguments, **options)

    monkeypatch.setattr(EmbeddingWriter, "write", second_fails)
    with pytest.raises(RuntimeError, match="gone"):
        update_index(root, upsert=ChangedProducts(tiny_run / "model", changed))
    assert len(ProductIndex.open(root)) == 120 and (tmp_path / "i.updating" / "embedded").is_dir()
    monkeypatch.setattr(EmbeddingWriter, "write", write)
    asked.clear()
    report = update_index(root, upsert=ChangedProducts(tiny_run / "model", changed))
    assert (report.added, report.replaced, len(asked)) == (1, 2, 1), (
        "two rows of the first shard were done"
    )
    assert names(tmp_path) == ["changed", "i"]


def test_a_catalogue_needs_the_model_of_the_index(of_catalogue, tiny_catalogue, tiny_run, tmp_path):
    from tritower.towers.changed_products import ChangedProducts

    build_index(embed(tmp_path / "e", vectors(20), [f"p{i}" for i in range(20)]), tmp_path / "i")
    with pytest.raises(
        ArtefactError,
        match=r"the catalogue's model is of model .* built from embeddings of model-a",
    ):
        update_index(tmp_path / "i", upsert=ChangedProducts(tiny_run / "model", tiny_catalogue))


def test_an_updated_index_is_evaluated_as_one_built_anew(tiny_catalogue, tmp_path):
    write_embeddings(tiny_catalogue, tmp_path / "e")
    products = EmbeddingReader(tmp_path / "e" / "products")
    options = BuildOptions("IVF4,PQ4x4fsr,Refine(SQfp16)", nprobe=4, k_factor=100)
    build_index(products, tmp_path / "updated", options)
    rows = np.concatenate([batch.vectors for batch in products.batches()])
    ids = [product for batch in products.batches() for product in batch.ids.to_pylist()]
    gone = [product for product in ids if product.startswith("00")]
    kept = [row for row, product in enumerate(ids) if product not in gone]
    live = embed(tmp_path / "live", rows[kept], [ids[row] for row in kept])
    build_index(live, tmp_path / "anew", options)
    assert update_index(tmp_path / "updated", delete=gone, measure=False).rows == 120
    queries, catalogue = (
        EmbeddingReader(tmp_path / "e" / "queries"),
        PreparedCatalogue(tiny_catalogue),
    )
    options = EvaluationOptions(split=None, latency_queries=0)
    reports = [
        evaluate(
            ProductIndex.open(tmp_path / name), live, queries, catalogue=catalogue, options=options
        ).report
        for name in ("updated", "anew")
    ]
    assert (
        reports[0]["judged_products_not_in_index"] == reports[1]["judged_products_not_in_index"] > 0
    )
    assert reports[0]["tasks"]["exact"] == reports[1]["tasks"]["exact"]
    assert reports[0]["baselines"] == reports[1]["baselines"]


def test_the_command_updates_and_says_what_it_did(built, tmp_path, capsys):
    from tritower.commands import index as commands

    root, _ = built
    embed(tmp_path / "u", vectors(3, 5), ["x", "y", "z"])
    (tmp_path / "gone.txt").write_text("p5\nno[/]body\n", encoding="utf-8")
    given = ["--upsert", str(tmp_path / "u"), "--delete", str(tmp_path / "gone.txt")]
    assert commands.main(["update", "--index", str(root), *given, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["added"], report["deleted"], report["count"]) == (3, 1, 802)
    assert report["recommendation"] == "no need to build anew"
    assert (
        commands.main(["update", "--index", str(root), "--delete", str(tmp_path / "gone.txt")]) == 0
    )
    printed = capsys.readouterr().out
    assert "nothing to do" in printed and "to delete, but not there: p5, no[/]body" in printed
    (tmp_path / "gone.txt").write_text("p6\n", encoding="utf-8")
    assert (
        commands.main(["update", "--index", str(root), "--delete", str(tmp_path / "gone.txt")]) == 0
    )
    printed = capsys.readouterr().out
    assert "version 000003" in printed and "recall@10 of products" in printed
    assert "no need to build anew" in printed
    assert commands.main(["update", "--index", str(root)]) == 1
    assert "nothing to do: give upsert, delete, attributes or compact" in capsys.readouterr().err


few = settings(
    max_examples=5,
    stateful_step_count=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestLivingIndex = LivingIndex.TestCase
TestLivingSpilledIndex = LivingSpilledIndex.TestCase
TestLivingFlatIndex = LivingFlatIndex.TestCase
TestLivingIndex.settings = TestLivingSpilledIndex.settings = TestLivingFlatIndex.settings = few
