"""The metric kl against divergences by hand in float64.

Vectors, indexes, training, products that ask.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.special import rel_entr

from tests.support.loss_batches import keys, make_batch
from tests.support.training import fit
from tritower.artefacts.storage import ArtefactError
from tritower.commands import index as program
from tritower.datamodules.batch import Item
from tritower.retrieval.building.build import build_index
from tritower.retrieval.building.options import BuildOptions
from tritower.retrieval.building.tuning.tuning_queries import without_own
from tritower.retrieval.index import ProductIndex
from tritower.retrieval.ivf.operating_points import Target
from tritower.retrieval.more_like_this import combined
from tritower.retrieval.updating.update import update_index
from tritower.retrieval.vectors.checks import as_queries, checked_queries
from tritower.retrieval.vectors.embeddings import EmbeddingReader, EmbeddingWriter
from tritower.towers.attribute import AttributeTower
from tritower.towers.encoder import Encoded, Encoder
from tritower.towers.loss_terms import LossTerm
from tritower.towers.losses.info_nce import InfoNCE
from tritower.towers.losses.pairs import CoSENT, PairLoss
from tritower.towers.metric import to_score_space
from tritower.towers.model_folder import load_model
from tritower.towers.two_tower import TwoTower

DIM = 32
KL = "--model.metric=kl"


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of unit length."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def probabilities(embedding: np.ndarray) -> np.ndarray:
    """(n, D) float64, by the definition."""
    exponential = np.exp(np.sqrt(embedding.shape[1]) * embedding.astype(np.float64))
    return exponential / exponential.sum(1, keepdims=True)


def divergences(query: np.ndarray, product: np.ndarray) -> np.ndarray:
    """(Q, P) KL(query || product) of unit embeddings."""
    return rel_entr(probabilities(query)[:, None], probabilities(product)[None]).sum(2)


def transformed(embedding: np.ndarray, side: str) -> np.ndarray:
    """What a model of this metric makes of unit embeddings."""
    return to_score_space(torch.from_numpy(embedding.astype(np.float32)), side, "kl").numpy()


def clusters(count: int, seed: int = 0) -> np.ndarray:
    """(count, DIM) unit embeddings around 40 kinds."""
    generator = np.random.default_rng(seed)
    kinds = np.random.default_rng(7).standard_normal((40, DIM))
    return unit(
        kinds[generator.integers(0, 40, count)] + 0.6 * generator.standard_normal((count, DIM))
    )


def embeddings(folder: Path, vectors: np.ndarray, prefix: str = "p") -> EmbeddingReader:
    """A folder of products of this metric."""
    writer = EmbeddingWriter(folder, dim=DIM, metric="kl")
    writer.write(
        "shard-00000",
        [f"{prefix}{row}" for row in range(len(vectors))],
        transformed(vectors, "product"),
    )
    writer.finish(["shard-00000"])
    return EmbeddingReader(folder)


# ---------------------------------------------------------------- vectors


def test_the_score_is_what_all_products_share_minus_the_divergence() -> None:
    asks, found = clusters(6), clusters(9, seed=1)
    score = transformed(asks, "query").astype(np.float64) @ transformed(found, "product").T
    p = probabilities(asks)
    shared = np.log(DIM) + (p * np.log(p)).sum(1, keepdims=True)
    assert np.allclose(score, shared - divergences(asks, found), atol=1e-5)
    assert np.allclose(transformed(asks, "query").sum(1), 1, atol=1e-6)
    same = torch.from_numpy(asks)
    assert (
        to_score_space(same, "query", "cosine") is same
        and to_score_space(same, "product", "cosine") is same
    )


def test_a_product_asks_with_the_vector_of_a_query_of_its_embedding() -> None:
    vectors = clusters(20)
    products = transformed(vectors, "product")
    assert np.allclose(as_queries(products, "kl"), transformed(vectors, "query"), atol=1e-6)
    assert as_queries(products, "kl").dtype == np.float32
    assert as_queries(products, "cosine") is products


def test_products_vectors_are_no_queries() -> None:
    products = transformed(clusters(5), "product")
    queries = as_queries(products, "kl")
    assert checked_queries(queries, "kl") is queries
    assert checked_queries(products, "cosine") is products
    mixed = np.concatenate([queries, products])
    with pytest.raises(
        ValueError, match=r"row 5 holds numbers from -.*as_queries makes it.*5 of 10 rows"
    ):
        checked_queries(mixed, "kl")
    with pytest.raises(ValueError, match=r"the sum 0\.5;"):
        checked_queries(queries / 2, "kl")


def test_several_parts_ask_as_the_sum_of_their_embeddings() -> None:
    vectors = clusters(3)
    vectors = unit(vectors - vectors.mean(1, keepdims=True))  # probabilities do not tell the mean
    weights = [1.0, 2.0, -0.5]
    asks = combined(list(transformed(vectors, "query")), weights, "kl")
    assert np.allclose(asks, probabilities(unit(np.array(weights) @ vectors)[None]), atol=1e-5)
    checked_queries(asks, "kl")


# ---------------------------------------------------------------- index


def nearest(query: np.ndarray, product: np.ndarray, k: int) -> np.ndarray:
    """(Q, k) rows of least divergence."""
    return divergences(query, product).argsort(1, kind="stable")[:, :k]


def overlap(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean share of each row of the truth that was found."""
    return float(
        np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, truth, strict=True)])
    )


@pytest.mark.parametrize("factory", ["Flat", "IVF32,PQ32x4fsr,Refine(SQ8)"])
def test_an_index_finds_products_of_least_divergence(tmp_path: Path, factory: str) -> None:
    vectors, asks = clusters(1500), clusters(60, seed=3)
    build_index(
        embeddings(tmp_path / "products", vectors),
        tmp_path / "index",
        BuildOptions(factory, nprobe=16 if factory != "Flat" else None),
    )
    index = ProductIndex.open(tmp_path / "index")
    assert index.metric == "kl"
    found = index.search(transformed(asks, "query"), 10).rows
    assert overlap(found, nearest(asks, vectors, 10)) > (0.98 if factory == "Flat" else 0.93)
    with pytest.raises(ValueError, match="under kl a query is probabilities"):
        index.search(transformed(asks, "product"), 10)
    asking = as_queries(index.vector_of("p3")[None], "kl")
    assert index.search(asking, 1).rows[0, 0] == 3


def test_a_target_is_measured_by_products_that_ask_as_queries(tmp_path: Path) -> None:
    vectors = clusters(3000)
    reader = embeddings(tmp_path / "products", vectors)
    build_index(reader, tmp_path / "index", target=Target(0.95))
    index = ProductIndex.open(tmp_path / "index")
    rows = np.arange(0, 3000, 15)
    found = index.search(transformed(vectors[rows], "query"), 11).rows
    truth = nearest(vectors[rows], vectors, 11)
    assert overlap(found, truth) > 0.93


def test_the_gauge_of_an_update_asks_as_queries(tmp_path: Path) -> None:
    vectors, new = clusters(800), clusters(40, seed=9)
    reader = embeddings(tmp_path / "products", vectors)
    build_index(reader, tmp_path / "index", BuildOptions("IVF32,PQ32x4fsr,Refine(SQ8)", nprobe=1))
    report = update_index(tmp_path / "index", upsert=embeddings(tmp_path / "new", new, "n"))
    index, everything = ProductIndex.open(tmp_path / "index"), np.concatenate([vectors, new])
    own = index.rows_of(
        pa.array([f"p{row}" for row in range(800)] + [f"n{row}" for row in range(40)])
    )
    truth = own[nearest(everything, everything, 11)[:, 1:]]
    found = without_own(index.search(transformed(everything, "query"), 11).rows, own)
    assert report.after.recall == pytest.approx(overlap(found, truth), abs=0.02)
    as_products = without_own(
        index.engine.search(transformed(everything, "product"), 11, index.settings)[1], own
    )
    assert overlap(as_products, truth) < report.after.recall - 0.03, (
        "asked with products' vectors the drift would differ"
    )


def test_products_of_another_metric_are_refused(tmp_path: Path) -> None:
    build_index(embeddings(tmp_path / "products", clusters(50)), tmp_path / "index")
    writer = EmbeddingWriter(tmp_path / "cosine", dim=DIM)
    writer.write("shard-00000", ["c"], clusters(1))
    writer.finish(["shard-00000"])
    with pytest.raises((ValueError, ArtefactError), match="metric"):
        update_index(tmp_path / "index", upsert=EmbeddingReader(tmp_path / "cosine"))


def test_products_are_compared_as_they_stand_and_ask_as_queries(tmp_path: Path) -> None:
    vectors = clusters(50)
    embeddings(tmp_path / "products", vectors)
    (as_product,) = EmbeddingReader(tmp_path / "products").batches()
    (asking,) = EmbeddingReader(tmp_path / "products", asks=True).batches()
    assert np.allclose(
        as_product.vectors, transformed(vectors, "product"), atol=3e-3
    )  # half floats
    assert np.allclose(asking.vectors, probabilities(vectors), atol=3e-3)
    with pytest.raises(ValueError, match="do not normalize"):
        list(EmbeddingReader(tmp_path / "products", normalize=True).batches())


# ---------------------------------------------------------------- model


@pytest.fixture(scope="module")
def trained(tiny_catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with kl, its embeddings and its index, by the commands that users type."""
    folder = tmp_path_factory.mktemp("kl")
    terms = "{query: whole}, {query: part, weight: 0.25}, {query: text, product: text}"
    compare = f"--model.loss_terms=[{terms}]"
    assert fit(tiny_catalogue, folder / "run", KL, compare, "--then_test=true") == 0
    model, made = folder / "run" / "model", folder / "embeddings"
    assert (
        program.main(
            ["embed", f"--model={model}", f"--catalogue={tiny_catalogue}", f"--output={made}"]
        )
        == 0
    )
    assert program.main(["build", f"--embeddings={made}", f"--output={folder / 'index'}"]) == 0
    return folder


def stored(folder: Path) -> tuple[list[str], np.ndarray]:
    """Ids and vectors of what was embedded."""
    batches = list(EmbeddingReader(folder).batches())
    return [i for b in batches for i in b.ids.to_pylist()], np.concatenate(
        [b.vectors for b in batches]
    )


def test_training_counts_what_the_index_finds(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tested = json.loads((trained / "run" / "test.json").read_text(encoding="utf-8"))
    report = trained / "report"
    arguments = [
        f"--index={trained / 'index'}",
        f"--embeddings={trained / 'embeddings'}",
        f"--output={report}",
    ]
    assert program.main(["evaluate", *arguments]) == 0
    exact = json.loads((report / "report.json").read_text(encoding="utf-8"))["tasks"]["exact"][
        "fused"
    ]
    assert tested["test/product_queries/hit@10"] > 0.5
    for name in ("hit@1", "hit@10", "recall@10"):  # half floats on disk may swap near ties
        assert tested[f"test/product_queries/{name}"] == pytest.approx(
            exact[name]["value"], abs=0.05
        )


def test_a_model_folder_remembers_its_metric(trained: Path) -> None:
    model = load_model(trained / "run" / "model")
    assert model.metric == "kl"
    item = Item(text={"title": "mug from Acme no 3"})
    assert model.encode([item]).sum() == pytest.approx(1, abs=1e-5)
    assert np.allclose(
        as_queries(model.encode([item], "product"), "kl"), model.encode([item]), atol=1e-6
    )
    config = json.loads((trained / "run" / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["format"] == 2, "a release that knows cosine alone refuses it"


def test_products_ask_by_command_as_by_hand(
    trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ids, products = stored(trained / "embeddings" / "products")
    score = as_queries(products, "kl").astype(np.float64) @ products.T
    np.fill_diagonal(score, -np.inf)
    one = [f"--more-like={ids[5]}", "--include-groups", "--json", "--k=5"]
    assert program.main(["search", f"--index={trained / 'index'}", *one]) == 0
    hits = [hit["product_id"] for hit in json.loads(capsys.readouterr().out)["hits"]]
    assert hits == [ids[row] for row in np.argsort(-score[5])[:5]]
    output = tmp_path / "similar.parquet"
    many = [
        f"--queries={trained / 'embeddings' / 'products'}",
        f"--output={output}",
        "--exclude-self",
        "--k=5",
    ]
    assert program.main(["search", f"--index={trained / 'index'}", *many]) == 0
    found: dict[str, list[str]] = {}
    for hit in pq.read_table(output).to_pylist():
        found.setdefault(hit["query_id"], []).append(hit["product_id"])
    for row in (0, 5, 77):
        assert found[ids[row]] == [ids[place] for place in np.argsort(-score[row])[:5]]


def test_text_and_parts_by_command(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids, _ = stored(trained / "embeddings" / "products")
    for asked in (
        ["--text=red mug"],
        ["--text=red mug", f"--more-like={ids[3]}", f"--less-like={ids[8]}=0.5"],
    ):
        assert (
            program.main(["search", f"--index={trained / 'index'}", *asked, "--json", "--k=5"]) == 0
        )
        assert len(json.loads(capsys.readouterr().out)["hits"]) == 5


def test_a_products_vector_given_as_a_query_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, products = stored(trained / "embeddings" / "products")
    np.save(tmp_path / "vector.npy", products[0])
    given = f"--vector={tmp_path / 'vector.npy'}"
    assert program.main(["search", f"--index={trained / 'index'}", given]) == 1
    assert "under kl a query is probabilities" in capsys.readouterr().err


@pytest.mark.parametrize("loss", [CoSENT(), PairLoss(), InfoNCE(same_side=True)])
def test_losses_that_need_a_cosine_are_refused(loss: object) -> None:
    terms = [LossTerm(), LossTerm(loss=loss)]
    with pytest.raises(
        ValueError, match=rf"metric=kl compares queries with products; {type(loss).__name__}"
    ):
        TwoTower(Encoder(8, attribute=AttributeTower()), loss_terms=terms, metric="kl")


def test_the_loss_is_of_divergences() -> None:
    asks, found = clusters(4), clusters(4, seed=2)
    model = TwoTower(
        Encoder(DIM, attribute=AttributeTower()), loss=InfoNCE(product_share=0), metric="kl"
    )
    batch = make_batch(keys(4, product=[1, 2, 3, 4]))

    def encoded(vectors: np.ndarray) -> Encoded:
        whole = torch.from_numpy(vectors.astype(np.float32))
        return Encoded(whole, whole, whole, whole[:, None], torch.ones(4, 1, dtype=torch.bool))

    terms = model.loss_terms(model.encoders, encoded(asks), encoded(found), batch)
    value = terms[0].item()
    logits = -model.loss.scale.item() * divergences(asks, found)
    by_hand = np.mean(np.log(np.exp(logits).sum(1)) - np.diag(logits))
    assert value == pytest.approx(by_hand, rel=1e-4)
