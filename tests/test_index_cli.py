import io
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.support.catalogues import SCHEMA, picture, write_catalogue
from tests.support.embedded import DIM, vector_of, write_embeddings
from tritower.artefacts import storage
from tritower.commands import index as index_commands
from tritower.retrieval import bulk
from tritower.retrieval.building.build import build_index
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.vectors.embeddings import EmbeddingReader

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A catalogue, a model folder, embeddings of it and an index of 120 products."""
    root = tmp_path_factory.mktemp("cli")
    write_catalogue(root / "catalogue", num_groups=60)
    with storage.new_folder(root / "model", artefact_type="model") as folder:
        SCHEMA.save(folder / "schema.json")
    write_embeddings(
        root / "catalogue", root / "embeddings", model=storage.fingerprint(root / "model")
    )
    build_index(EmbeddingReader(root / "embeddings" / "products"), root / "index")
    return root


@pytest.fixture
def encoded(monkeypatch):
    """Replaces the model: what it was asked to encode, and the vector that it answers with."""
    asked = types.SimpleNamespace(items=[], vector=vector_of(7, "query", 0.1))

    class Model:
        def encode(self, items, side):
            assert side == "query"
            asked.items += items
            return asked.vector[None]

    fake = types.ModuleType("tritower.towers.model_folder")
    fake.load_model = lambda folder: Model()
    monkeypatch.setitem(sys.modules, "tritower.towers.model_folder", fake)
    return asked


@pytest.fixture
def run(folders, capsys, monkeypatch):
    """Runs a command inside the folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(folders)

    def call(*arguments):
        code = index_commands.main([str(a) for a in arguments])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def search_json(run, *arguments):
    code, out, _ = run("search", "--index", "index", "--json", *arguments)
    assert code == 0
    return json.loads(out)


def test_help_is_there_at_once_and_loads_nothing_heavy():
    program = (
        "import sys, index; "
        "print(sorted({'torch', 'faiss', 'pyarrow', 'lightning'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "index.py", "--help"], cwd=ROOT, capture_output=True, text=True
        )
        seconds.append(time.perf_counter() - started)
    assert done.returncode == 0 and "embed" in done.stdout
    assert min(seconds) <= 1.5


@pytest.mark.parametrize("command", ["embed", "build", "search", "evaluate"])
def test_every_option_is_explained(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        index_commands.main([command, "--help"])
    assert stopped.value.code == 0
    assert "--output" in capsys.readouterr().out


def test_build_and_search_by_vector_import_no_torch(folders, tmp_path):
    np.save(tmp_path / "v.npy", vector_of(3, "x", 0.1))
    program = f"""
import sys, index
embeddings = {str(folders / "embeddings")!r}
place = {str(tmp_path / "i")!r}
vector = {str(tmp_path / "v.npy")!r}
report = {str(tmp_path / "r")!r}
assert index.main(["build", "--embeddings", embeddings, "--output", place]) == 0
assert index.main(["search", "--index", place, "--vector", vector]) == 0
assert index.main(["evaluate", "--index", place, "--embeddings", embeddings, "--output", report,
    "--latency-queries", "0"]) == 0
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "003-" in done.stdout and "120 vectors of 16 dimensions are few enough" in done.stdout


def test_an_installed_program_and_the_script_are_the_same(folders):
    arguments = [
        "search",
        "--index",
        str(folders / "index"),
        "--more-like",
        "003-0",
        "--include-groups",
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, ROOT / "index.py", *arguments], cwd=folders, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["hits"][0]["product_id"] == "003-1"


def test_text_pictures_and_attributes_are_one_item(run, folders, encoded):
    photos = [picture(color, np.random.default_rng(0)) for color in ((200, 30, 30), (30, 40, 200))]
    for name, photo in zip(("a.jpg", "b.jpg"), photos, strict=True):
        (folders / name).write_bytes(photo)
    facts = ["brand=Acme", "price=59.9", "category=home > mug", "tags=red|mug"]
    report = search_json(
        run, "--text", "red mug", "--image", "a.jpg", "b.jpg", "--attribute", *facts, "--k", "3"
    )
    (item,) = encoded.items
    assert item.text == {"query": "red mug"}
    assert item.images == photos
    assert item.attributes == {
        "brand": "Acme",
        "price": 59.9,
        "category": ["home", "mug"],
        "tags": ["red", "mug"],
    }
    assert [hit["product_id"][:3] for hit in report["hits"][:2]] == ["007", "007"]
    assert report["returned"] == report["wanted"] == 3
    assert report["hits"][0]["text"]["title"].endswith("no 7")
    assert report["index"] == ProductIndex.open(folders / "index").manifest.fingerprint


@pytest.mark.parametrize("text", ["null", "None", "1e5", "[1, 2]", "{a: b}", "-5%", "true"])
def test_what_is_typed_is_taken_as_it_is(run, encoded, text):
    search_json(run, f"--text={text}", "--attribute", f"brand={text}")
    assert encoded.items[0].text == {"query": text}
    assert encoded.items[0].attributes == {"brand": text}


def test_options_may_be_repeated(run, encoded):
    search_json(run, "--attribute", "brand=A=B", "--attribute", "price=3")
    assert encoded.items[0].attributes == {"brand": "A=B", "price": 3.0}


def test_like_leaves_the_product_itself_out_and_adds_to_others(run, folders, encoded):
    index = ProductIndex.open(folders / "index")
    alone = search_json(run, "--more-like", "005-0", "--include-groups", "--k", "4")
    assert len(alone["hits"]) == 4
    assert alone["hits"][0]["product_id"] == "005-1"
    assert "005-0" not in [hit["product_id"] for hit in alone["hits"]]
    mixed = search_json(
        run, "--more-like", "005-0", "--include-groups", "--text", "x", "--k", "120"
    )
    vector = index.vector_of("005-0") + encoded.vector
    wanted = index.search([vector / np.linalg.norm(vector)], 120)
    ids = [i for i in index.ids(wanted.rows[0]) if i != "005-0"]
    assert [hit["product_id"] for hit in mixed["hits"]] == ids
    np.save(folders / "v.npy", np.stack([encoded.vector]))
    both = search_json(
        run, "--more-like", "005-0", "--include-groups", "--vector", "v.npy", "--k", "120"
    )
    assert [hit["product_id"] for hit in both["hits"]] == ids


def test_the_table_shows_titles_and_says_when_there_are_fewer(run):
    code, out, err = run(
        "search", "--index", "index", "--more-like", "001-1", "--include-groups", "--k", "2"
    )
    assert code == 0 and "no 1" in out and "brand" in out and "001-0" in out
    assert "hits" not in err
    code, out, err = run(
        "search", "--index", "index", "--more-like", "001-1", "--include-groups", "--k", "1000000"
    )
    assert "119 hits: the index holds 120 products" in err
    assert out.count("no ") == 119


def test_a_photo_that_is_none_is_named(run, folders, encoded):
    (folders / "page.jpg").write_bytes(b"<html>404</html>")
    code, _, error = run("search", "--index", "index", "--image", "page.jpg")
    assert code == 1 and "page.jpg: NOT_AN_IMAGE" in error and "Traceback" not in error


def test_a_large_photo_is_seen_as_the_catalogue_sees_pictures(run, folders, encoded):
    (folders / "large.jpg").write_bytes(picture((200, 30, 30), np.random.default_rng(0), size=900))
    search_json(run, "--image", "large.jpg")
    (data,) = encoded.items[0].images
    assert max(Image.open(io.BytesIO(data)).size) == 256


def test_a_page_with_pictures(run, folders, encoded):
    (folders / "a.jpg").write_bytes(picture((200, 30, 30), np.random.default_rng(0)))
    code, out, _ = run(
        "search",
        "--index",
        "index",
        "--text",
        "<mug>",
        "--image",
        "a.jpg",
        "--html",
        "out/page.html",
    )
    page = (folders / "out" / "page.html").read_text(encoding="utf-8")
    assert code == 0 and "page: out/page.html" in out
    assert "&lt;mug&gt;" in page and page.count("data:image/jpeg") > 5


def test_an_index_whose_catalogue_is_gone_still_searches(run, folders, tmp_path, encoded):
    code, out, _ = run("search", "--index", "index", "--catalogue", "catalogue", "--text", "x")
    assert code == 0 and "title" in out
    (folders / "catalogue").rename(folders / "moved")
    try:
        code, out, _ = run("search", "--index", "index", "--model", "model", "--text", "x")
        assert code == 0 and "title" not in out and "007-" in out
    finally:
        (folders / "moved").rename(folders / "catalogue")


def test_the_query_model_must_be_the_one_of_the_index(run, folders, encoded):
    code, _, err = run("search", "--index", "index", "--text", "x")
    assert code == 1 and "(the index names nowhere): name it with --model" in err
    with storage.new_folder(folders / "other", artefact_type="model") as folder:
        (folder / "schema.json").write_text("{}")
    code, _, err = run("search", "--index", "index", "--model", "other", "--text", "x")
    assert code == 1
    assert (
        storage.fingerprint(folders / "other") in err
        and storage.fingerprint(folders / "model") in err
    )
    assert not encoded.items


@pytest.fixture(autouse=True)
def _model_by_default(request, monkeypatch, folders):
    """Most tests name no model: the index remembers one."""
    if "must_be_the_one" in request.node.name:
        return
    original = storage.read_manifest

    def read(path, query_type=None):
        manifest = original(path, query_type)
        if manifest.artefact_type == "index":
            manifest.meta["hints"]["model"] = str(folders / "model")
        return manifest

    monkeypatch.setattr(storage, "read_manifest", read)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["search", "--index", "nowhere"],
            "nowhere: no such folder; expected a finished index folder",
        ),
        (
            ["search", "--index", "catalogue"],
            "catalogue is a folder of type 'catalogue'; expected 'index'",
        ),
        (["search", "--index", "index"], "nothing to search for"),
        (
            ["search", "--index", "index", "--more-like", "zzz"],
            "no product 'zzz' among the 120 of index",
        ),
        (
            ["search", "--index", "index", "--more-like", "001-0", "--k", "0"],
            "k=0; expected an integer of at least 1",
        ),
        (
            ["search", "--index", "index", "--more-like", "001-0", "--k", "-1"],
            "k=-1; expected an integer of at least 1",
        ),
        (
            ["search", "--index", "index", "--more-like", "001-0", "--nprobe", "3"],
            "nprobe=3, but this index has no lists",
        ),
        (
            ["search", "--index", "index", "--image", "no.jpg"],
            "No such file or directory: 'no.jpg'",
        ),
        (
            ["search", "--index", "index", "--attribute", "brand"],
            "attribute 'brand'; expected name=value with one of",
        ),
        (
            ["search", "--index", "index", "--attribute", "color=x"],
            "with one of price, brand, category, tags",
        ),
        (["search", "--index", "index", "--attribute", "price=cheap"], "price='cheap'"),
        (
            ["search", "--index", "index", "--vector", "index/CURRENT"],
            "is not a .npy file of numbers",
        ),
        (
            ["search", "--index", "index", "--queries", "embeddings"],
            "queries and output go together",
        ),
        (
            ["search", "--index", "index", "--more-like", "001-0", "--exclude-self"],
            "exclude_self is for many queries",
        ),
        (["build", "--embeddings", "embeddings", "--output", "index"], "index already exists"),
        (["build", "--embeddings", "nowhere", "--output", "x"], "nowhere: no such file or folder"),
        (
            ["build", "--embeddings", "embeddings", "--output", "x", "--factory", "IVF"],
            "factory 'IVF' does not fit",
        ),
        (
            ["evaluate", "--index", "index", "--embeddings", "catalogue", "--output", "x"],
            "column of vectors: cannot be told",
        ),
    ],
)
def test_problems_are_one_line_and_exit_code_1(run, encoded, arguments, message):
    code, out, err = run(*arguments)
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert (code, out) == (1, "")
    assert message in line and "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["find"],
        ["search"],
        ["search", "--ind", "index"],
        ["search", "--index", "index", "--nprob", "8"],
        ["search", "--index", "index", "--k", "1.5"],
        ["search", "--index", "index", "--k", "ten"],
        ["build", "--embeddings", "e", "--output", "o", "--metric", "l2"],
        ["search", "--index", "index", "--image"],
    ],
)
def test_usage_errors_are_exit_code_2_and_nothing_is_abbreviated(run, arguments):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2


def test_vectors_of_the_wrong_size_or_length(run, folders):
    for vector, message in (
        (np.ones(5), "shape (1, 5); expected (B, 16)"),
        (np.ones(DIM), "has length 4, cosine needs 1"),
        (np.ones((2, DIM)), "holds 2 vectors: search for many with queries and output"),
    ):
        np.save(folders / "v.npy", vector)
        code, _, err = run("search", "--index", "index", "--vector", "v.npy")
        assert code == 1 and message in err
    np.save(folders / "v.npy", np.ones(DIM))
    assert run("search", "--index", "index", "--vector", "v.npy", "--normalize")[0] == 0


def test_anyones_vectors_from_npy(run, folders, tmp_path):
    vectors = np.random.default_rng(0).standard_normal((30, 8))
    np.save(tmp_path / "v.npy", vectors)
    (tmp_path / "ids.txt").write_text("".join(f"{i:03d}\n" for i in range(30)))
    build = [
        "build",
        "--embeddings",
        tmp_path / "v.npy",
        "--ids",
        tmp_path / "ids.txt",
        "--output",
        tmp_path / "i",
    ]
    code, _, err = run(*build)
    assert code == 1 and "--normalize" in err
    assert run(*build, "--normalize")[0] == 0
    np.save(tmp_path / "q.npy", vectors[7])
    code, out, _ = run(
        "search", "--index", tmp_path / "i", "--vector", tmp_path / "q.npy", "--normalize", "--json"
    )
    assert json.loads(out)["hits"][0] == {
        "rank": 1,
        "product_id": "007",
        "score": pytest.approx(1, abs=1e-5),
        "text": {},
        "attributes": {},
    }


def many(run, output, *arguments):
    code, out, err = run(
        "search",
        "--index",
        "index",
        "--queries",
        "embeddings/products",
        "--output",
        output,
        *arguments,
    )
    assert code == 0, err
    return out


def read_shards(folder):
    return pa.concat_tables([pq.read_table(file) for file in sorted(folder.glob("*.parquet"))])


def test_similar_items_of_the_whole_catalogue(run, folders, monkeypatch):
    monkeypatch.setattr(bulk, "BLOCK", 16)
    out = many(run, "similar", "--k", "5", "--exclude-self")
    assert "600 for 120 queries" in out
    table = EmbeddingReader(folders / "embeddings" / "products")
    index = ProductIndex.open(folders / "index")
    rows = read_shards(folders / "similar").to_pylist()
    by_query = {}
    for row in rows:
        by_query.setdefault(row["query_id"], []).append(row)
    for batch in table.batches():
        hits = index.search(batch.vectors, 6)
        for query_id, ids, scores in zip(
            batch.ids.to_pylist(), index.ids(hits.rows), hits.scores, strict=True
        ):
            wanted = [(i, s) for i, s in zip(ids, scores.tolist(), strict=True) if i != query_id][
                :5
            ]
            got = by_query[query_id]
            assert [row["rank"] for row in got] == [1, 2, 3, 4, 5]
            assert [row["product_id"] for row in got] == [i for i, _ in wanted]
            assert np.allclose([row["score"] for row in got], [s for _, s in wanted])


def test_a_bulk_search_goes_on_where_it_stopped(run, folders, monkeypatch):
    monkeypatch.setattr(bulk, "BLOCK", 16)
    many(run, "whole", "--k", "3")
    many(run, "stopped", "--k", "3")
    (folders / "stopped" / "manifest.json").unlink()
    lost = sorted((folders / "stopped").glob("*.parquet"))[1]
    lost.unlink()
    out = many(run, "stopped", "--k", "3")
    assert "104 of them in an earlier run" in out
    assert storage.fingerprint(folders / "stopped") == storage.fingerprint(folders / "whole")
    code, _, err = run(
        "search",
        "--index",
        "index",
        "--queries",
        "embeddings/products",
        "--output",
        "stopped",
        "--k",
        "4",
    )
    assert code == 1 and "k: there 3, now 4" in err


def test_one_file_of_hits_equals_the_folder(run, folders, monkeypatch):
    monkeypatch.setattr(bulk, "BLOCK", 16)
    many(run, "folder", "--k", "3")
    many(run, "hits.parquet", "--k", "3")
    assert pq.read_table(folders / "hits.parquet") == read_shards(folders / "folder")
    assert not (folders / "hits.parquet.parts").exists()
    code, _, err = run(
        "search", "--index", "index", "--queries", "embeddings/products", "--output", "hits.parquet"
    )
    assert code == 1 and "hits.parquet already exists" in err


def test_queries_keep_their_kind_and_k_may_exceed_the_index(run, folders):
    code, _, err = run(
        "search",
        "--index",
        "index",
        "--queries",
        "embeddings/queries",
        "--output",
        "q",
        "--k",
        "500",
    )
    assert code == 0 and "the index holds 120 products" in err
    table = read_shards(folders / "q")
    assert set(table.column_names) == {"query_id", "query_type", "product_id", "rank", "score"}
    assert table["rank"].to_pylist()[:120] == list(range(1, 121))
    assert "fused" in table["query_type"].to_pylist()


def test_bulk_queries_of_another_model_are_refused(run, folders, tmp_path):
    other = write_embeddings(folders / "catalogue", tmp_path / "other", model="another")
    code, _, err = run(
        "search",
        "--index",
        "index",
        "--queries",
        other / "queries",
        "--output",
        tmp_path / "x.parquet",
    )
    assert code == 1 and "is of model another" in err


def test_evaluate_writes_a_report_and_a_gate_decides_the_exit_code(run, folders):
    arguments = ["evaluate", "--index", "index", "--embeddings", "embeddings", "--output", "report"]
    (folders / "oracle.json").write_text(json.dumps({"recall@10": {"text+image+attribute": 0.97}}))
    code, out, err = run(
        *arguments, "--gate", "ann_vs_exact.*.recall@10>=1", "--oracle", "oracle.json"
    )
    assert code == 0, err
    report = json.loads((folders / "report" / "report.json").read_text())
    assert report["oracle"]["recall@10"]["text+image+attribute"] == 0.97
    assert (folders / "report" / "report.html").stat().st_size > 10_000
    for word in (
        "exact task",
        "ANN task",
        "ANN vs exact",
        "BM25",
        "TF-IDF",
        "floor",
        "oracle",
        "product:attribute",
    ):
        assert word in out
    code, _, err = run(
        *arguments, "--gate", "ann.fused.hit@10>=1.1", "--split", "val", "--latency-queries", "0"
    )
    assert code == 1 and "error: gate not reached: ann.fused.hit@10 is" in err


def test_evaluate_warns_of_an_index_that_loses_answers(run, folders, tmp_path):
    shared = [
        "--embeddings",
        "embeddings",
        "--split",
        "all",
        "--latency-queries",
        "0",
        "--examples",
        "0",
    ]
    code, _, err = run("evaluate", "--index", "index", *shared, "--output", tmp_path / "exact")
    assert code == 0 and "warning: queries of type" not in err
    factory = "IVF8,PQ8x4fsr,Refine(SQ8)"
    assert (
        run(
            "build", "--embeddings", "embeddings", "--output", tmp_path / "i", "--factory", factory
        )[0]
        == 0
    )
    code, _, err = run(
        "evaluate",
        "--index",
        tmp_path / "i",
        *shared,
        "--nprobe",
        "1",
        "--output",
        tmp_path / "lossy",
    )
    warnings = [line for line in err.splitlines() if line.startswith("warning: queries of type ")]
    stored = json.loads((tmp_path / "lossy" / "report.json").read_text())["warnings"]
    assert code == 0 and warnings == [f"warning: {line}" for line in stored] and warnings


def test_embed_hands_everything_to_the_model(run, monkeypatch):
    calls = []
    fake = types.ModuleType("tritower.towers.embed")
    fake.embed = lambda *paths, **options: calls.append((paths, options))
    monkeypatch.setitem(sys.modules, "tritower.towers.embed", fake)
    code, out, _ = run(
        "embed",
        "--model",
        "model",
        "--catalogue",
        "catalogue",
        "--output",
        "e",
        "--batch-size",
        "7",
    )
    assert code == 0 and "embeddings: e" in out
    ((paths, options),) = calls
    assert paths == (Path("model"), Path("catalogue"), Path("e"))
    how = options["options"]
    assert (how.batch_size, how.devices, how.precision) == (7, "auto", "32-true")
