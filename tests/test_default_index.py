"""The index that nobody chose: exact while that is quick, and measured per query type beyond."""

import logging

import numpy as np
import pytest

from tritower.artefacts.storage import ArtefactError
from tritower.commands import index as commands
from tritower.commands.query import type_of_query
from tritower.retrieval.building import choose_spec
from tritower.retrieval.building.build import DEFAULT_RECALL, build_index
from tritower.retrieval.building.tuning.tuning_queries import without_own
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.ranking import metrics
from tritower.retrieval.vectors.embeddings import EmbeddingReader, EmbeddingWriter

DIM = 32
COUNT = 6000
QUERY_TYPES = ("fused", "product:attribute", "text")


def unit(array):
    return (array / np.linalg.norm(array, axis=1, keepdims=True)).astype(np.float32)


def clustered(count, seed=0, dim=DIM):
    generator = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((60, dim))
    rows = centers[generator.integers(0, 60, count)]
    return unit(rows + 0.6 * generator.standard_normal((count, dim)))


def asked(query_type, count, seed):
    """Whole products lie where products do, typed texts anywhere, attributes in between."""
    near, far = (
        clustered(count, seed),
        unit(np.random.default_rng(seed).standard_normal((count, DIM))),
    )
    return {"fused": near, "text": far, "product:attribute": unit(near + 0.7 * far)}[query_type]


def embed(folder, rows, query_types=None, model="model-a"):
    column = "product_id" if query_types is None else "query_id"
    writer = EmbeddingWriter(folder, dim=rows.shape[1], model=model, id_column=column)
    writer.write("s", [f"p{i}" for i in range(len(rows))], rows, query_types)
    writer.finish(["s"])
    return EmbeddingReader(folder)


def write_tuning(folder, count=300, model="model-a"):
    rows = np.concatenate([asked(query_type, count, seed=1) for query_type in QUERY_TYPES])
    return embed(
        folder, rows, [query_type for query_type in QUERY_TYPES for _ in range(count)], model
    )


def recall_of(index, stored, vectors, **options):
    truth = np.argsort(-(vectors @ stored.T), axis=1)[:, :10]
    return metrics.recall_at_k(
        index.search(vectors, 10, settings=index.resolve(**options)).rows, truth, 10
    )


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    """What `embed` makes of a catalogue: products, judged queries of type image, and tuning."""
    folder = tmp_path_factory.mktemp("default") / "embeddings"
    embed(folder / "products", clustered(COUNT))
    embed(folder / "queries", clustered(50, seed=7), ["image"] * 50)
    write_tuning(folder / "tuning")
    return folder


@pytest.fixture(scope="module")
def stored(embeddings):
    return np.concatenate([b.vectors for b in EmbeddingReader(embeddings / "products").batches()])


@pytest.fixture
def low_limit(monkeypatch):
    """As if 1,000 products were too many to be searched exactly."""
    monkeypatch.setattr(choose_spec, "EXACT_NUMBERS", 1000 * DIM)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, embeddings):
    folder = tmp_path_factory.mktemp("tuned") / "i"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose_spec, "EXACT_NUMBERS", 1000 * DIM)
        assert build(embeddings, folder) == 0
    return ProductIndex.open(folder)


def build(embeddings, folder, *more):
    arguments = ["--embeddings", embeddings, "--output", folder, *more]
    return commands.main(["build", *map(str, arguments)])


def test_two_thousand_products_are_searched_exactly_by_every_kind_of_query(tmp_path):
    reader = embed(tmp_path / "e", clustered(2000))
    build_index(reader, tmp_path / "i", queries=write_tuning(tmp_path / "tuning"))
    index = ProductIndex.open(tmp_path / "i")
    assert index.manifest.meta["factory"] == "Flat" and index.manifest.meta["target"] is None
    (batch,) = reader.batches()
    for query_type in QUERY_TYPES:
        vectors = asked(query_type, 100, seed=2)
        truth = np.argsort(-(vectors @ batch.vectors.T), axis=1)[:, :10]
        rows = index.search(vectors, 10, settings=index.resolve(query_type=query_type)).rows
        assert np.array_equal(rows, truth), query_type


def test_beyond_the_limit_each_kind_reaches_the_recall_on_queries_that_did_not_tune(tuned, stored):
    assert tuned.manifest.meta["factory"].startswith("IVF128,PQ8x4fsr,Refine(")
    assert tuned.tuning.queries == {"product": 500, **dict.fromkeys(QUERY_TYPES, 300)}
    for query_type in QUERY_TYPES:
        vectors = asked(query_type, 400, seed=3)
        assert recall_of(tuned, stored, vectors, query_type=query_type) >= DEFAULT_RECALL - 0.01, (
            query_type
        )
        # A query type that was not measured, or none named, gets what is enough for all.
        assert recall_of(tuned, stored, vectors) >= DEFAULT_RECALL - 0.01, query_type


def test_each_kind_is_searched_with_the_cheapest_settings_that_reach_the_recall(tuned):
    target = tuned.manifest.meta["target"]
    assert (target["recall"], target["strict"]) == (DEFAULT_RECALL, False)
    of = {
        query_type: tuned.resolve(query_type=query_type) for query_type in ("product", *QUERY_TYPES)
    }
    assert of["fused"].nprobe < of["text"].nprobe
    assert tuned.settings.nprobe == max(settings.nprobe for settings in of.values())
    for query_type, settings in of.items():
        cheapest = next(p for p in tuned.tuning.points[query_type] if p.reaches(DEFAULT_RECALL))
        assert settings == cheapest.settings
    assert tuned.resolve(query_type="image") == tuned.settings


@pytest.mark.parametrize("inside", [False, True])
def test_the_command_tunes_by_the_folder_beside_the_products_and_never_by_judged_queries(
    tmp_path, embeddings, low_limit, capsys, inside
):
    assert build(embeddings / "products" if inside else embeddings, tmp_path / "i") == 0
    measured = ProductIndex.open(tmp_path / "i").tuning.queries
    assert set(measured) == {"product", *QUERY_TYPES}
    said = capsys.readouterr().out
    assert all(word in said for word in ("Operating points", "0.98 *", *QUERY_TYPES))


def test_queries_that_are_named_tune_instead(tmp_path, embeddings, low_limit):
    assert build(embeddings, tmp_path / "i", "--queries", embeddings) == 0
    measured = ProductIndex.open(tmp_path / "i").tuning.queries
    assert measured == {"product": 500, "image": 50}


def test_a_recall_is_checked_for_the_kinds_beside_the_products_too(tmp_path, embeddings):
    assert build(embeddings, tmp_path / "i", "--recall", "0.9") == 0
    index = ProductIndex.open(tmp_path / "i")
    assert set(index.tuning.queries) == {"product", *QUERY_TYPES}
    assert index.manifest.meta["target"]["strict"] and "candidates" in index.manifest.meta


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--nprobe", "5"], (5, 8.0)),
        (["--nprobe", "5", "--k-factor", "3"], (5, 3.0)),
        (["--factory", "IVF64,PQ8x4fsr,Refine(SQ8)"], (16, 8.0)),
        (["--factory", "Flat"], (None, 8.0)),
    ],
)
def test_what_is_named_is_not_measured(tmp_path, embeddings, options, settings):
    """Lists to visit need an index that has some, however few the products."""
    assert build(embeddings, tmp_path / "i", *options) == 0
    index = ProductIndex.open(tmp_path / "i")
    assert index.tuning is None and index.settings == settings
    assert index.manifest.meta["target"] is None


def test_anyones_vectors_are_tuned_by_the_products_alone(tmp_path, low_limit):
    vectors = clustered(3000)
    np.save(tmp_path / "v.npy", vectors)
    (tmp_path / "ids.txt").write_text("".join(f"{i}\n" for i in range(3000)))
    assert build(tmp_path / "v.npy", tmp_path / "i", "--ids", tmp_path / "ids.txt") == 0
    index = ProductIndex.open(tmp_path / "i")
    assert index.tuning.queries == {"product": 500}
    own = np.arange(0, 3000, 3)  # most of these have not tuned it
    truth = without_own(np.argsort(-(vectors[own] @ vectors.T), axis=1)[:, :11], own)
    found = without_own(index.search(vectors[own], 11).rows, own)
    assert metrics.recall_at_k(found, truth, 10) >= DEFAULT_RECALL - 0.01


def test_dimensions_that_cannot_be_cut_are_measured_too(tmp_path, low_limit):
    reader = embed(tmp_path / "e", clustered(3000, dim=31))
    build_index(reader, tmp_path / "i")
    index = ProductIndex.open(tmp_path / "i")
    assert index.manifest.meta["factory"] == "IVF64,SQ8" and index.tuning is not None
    (batch,) = reader.batches()
    assert recall_of(index, batch.vectors, clustered(300, seed=4, dim=31)) >= DEFAULT_RECALL - 0.03


def test_a_kind_that_cannot_reach_the_recall_is_published_and_named(
    tmp_path, low_limit, caplog, capsys
):
    """Vectors that differ by less than half floats tell: nothing finds their true order."""
    generator = np.random.default_rng(0)
    centers = generator.standard_normal((60, DIM))[generator.integers(0, 60, 3000)]
    np.save(tmp_path / "v.npy", unit(centers + 1e-4 * generator.standard_normal((3000, DIM))))
    (tmp_path / "ids.txt").write_text("".join(f"{i}\n" for i in range(3000)))
    with caplog.at_level(logging.WARNING, "tritower"):
        assert build(tmp_path / "v.npy", tmp_path / "i", "--ids", tmp_path / "ids.txt") == 0
    (record,) = [r for r in caplog.records if "does not reach recall@10 of 0.98" in r.message]
    assert "queries of type product: recall@10 0." in record.message
    assert "--factory Flat" in record.message
    assert "below 0.98 *" in capsys.readouterr().out
    index = ProductIndex.open(tmp_path / "i")
    best = max(index.tuning.points["product"], key=lambda point: point.proven_recall)
    assert best.proven_recall < DEFAULT_RECALL and index.settings == index.resolve(
        query_type="product"
    )
    assert index.settings == best.settings
    with pytest.raises(
        ValueError, match=r"recall@10 of 0\.98 is not reached for queries of type 'p"
    ):
        index.resolve(recall=0.98)


def test_tuning_of_another_model_is_refused(tmp_path, low_limit):
    embed(tmp_path / "e" / "products", clustered(3000))
    write_tuning(tmp_path / "e" / "tuning", 20, model="model-b")
    reader = EmbeddingReader(tmp_path / "e" / "products")
    with pytest.raises(ValueError, match="has model model-b, the products model-a"):
        build_index(reader, tmp_path / "i", queries=EmbeddingReader(tmp_path / "e" / "tuning"))
    assert build(tmp_path / "e", tmp_path / "i") == 1


def test_tuning_that_is_unfinished_is_refused(tmp_path, low_limit, capsys):
    embed(tmp_path / "e" / "products", clustered(3000))
    EmbeddingWriter(tmp_path / "e" / "tuning", dim=DIM, model="model-a", id_column="query_id")
    assert build(tmp_path / "e", tmp_path / "i") == 1
    assert "tuning" in capsys.readouterr().err
    with pytest.raises(ArtefactError):
        EmbeddingReader(tmp_path / "e" / "tuning")


@pytest.mark.parametrize(
    ("shown", "query_type"),
    [
        ({"text": "red shoe"}, "text"),
        ({"image": ["a.jpg"]}, "image"),
        ({"attribute": ["brand=Acme"]}, "product:attribute"),
        ({"more": True}, "product"),
        ({"text": "red shoe", "attribute": ["brand=Acme"]}, None),
        ({"text": "red shoe", "more": True}, None),
        ({}, None),
    ],
)
def test_a_query_of_one_modality_is_of_its_kind_and_a_mix_is_searched_for_all(shown, query_type):
    everything = {"text": "", "image": [], "attribute": [], "more": False}
    assert type_of_query(**{**everything, **shown}) == query_type
