"""Blocks: a score is the weighted sum of the blocks' cosines, and a missing block is zero."""

from __future__ import annotations

import math

import lightning as L
import numpy as np
import pytest
import torch

from tests.support.catalogues import SCHEMA
from tests.support.encoders import ITEMS
from tests.support.tiny_models import TIMM, TIMM_ARGS
from tritower.datamodules.batch import AttributeTensors, Item
from tritower.datamodules.schema import Attribute, Schema
from tritower.towers.block_encoder import BlockEncoder, change_since_start
from tritower.towers.block_weights import KindFigures, best_share, set_weights
from tritower.towers.embedded import Embedded
from tritower.towers.image import PictureOptions, TimmImage
from tritower.towers.losses.cross_batch_memory import CrossBatchMemory
from tritower.towers.losses.info_nce import InfoNCE
from tritower.towers.mining import HardNegatives
from tritower.towers.model_folder import load_model, save_model
from tritower.towers.number_waves import NumberWaves
from tritower.towers.sparse_terms import SparseTerms
from tritower.towers.text import BiLSTM
from tritower.towers.two_tower import TwoTower
from tritower.towers.validation import exact_search

PRODUCTS = [*ITEMS[:4], Item({"title": "lamp"}, attributes={"price": 9.1})]


@pytest.fixture
def model() -> TwoTower:
    torch.manual_seed(0)
    encoder = BlockEncoder(
        16,
        BiLSTM("{title}", num_buckets=256, word_dim=8, hidden_dim=6),
        TimmImage(TIMM, model_args=TIMM_ARGS, pictures=PictureOptions(image_size=32)),
        NumberWaves(16),
        SparseTerms(hashed_dim=1 << 10),
    )
    model = TwoTower(encoder, metric="inner_product")
    model.set_schema(SCHEMA)
    encoder.named_towers["lexical"].count(PRODUCTS)  # type: ignore[operator]
    with torch.no_grad():
        encoder.log_weights += torch.randn(4)
    return model.eval()


def embed(model: TwoTower, items: list[Item], side: str) -> Embedded:
    encoder = model.product
    with torch.no_grad():
        return model.embed_batch(encoder.preprocess(side)(items), side)  # type: ignore[arg-type]


def block_cosines(model: TwoTower, query: Item, product: Item) -> dict[str, float]:
    """Block -> cosine of two items, 0 where one lacks it."""
    encoder = model.product
    assert isinstance(encoder, BlockEncoder)
    with torch.no_grad():
        one = encoder.blocks(encoder.preprocess("query")([query]), "query")
        other = encoder.blocks(encoder.preprocess("product")([product]), "product")
    cosines = {}
    for number, name in enumerate(encoder.dense):
        columns = slice(16 * number, 16 * (number + 1))
        cosines[name] = float(one.dense[0, columns] @ other.dense[0, columns])
    words = [Embedded.of(vectors._replace(dense=torch.zeros(1, 1))) for vectors in (one, other)]
    cosines["lexical"] = float(words[0].scores(words[1])[0, 0])
    return cosines


def test_a_score_is_the_weighted_sum_of_the_blocks_cosines(model: TwoTower) -> None:
    encoder = model.product
    assert isinstance(encoder, BlockEncoder)
    squares = dict(zip(encoder.towers, encoder.weights.square().tolist(), strict=True))
    assert sum(squares.values()) == pytest.approx(1)
    scores = embed(model, PRODUCTS, "query").scores(embed(model, PRODUCTS, "product"))
    for i, query in enumerate(PRODUCTS):
        for j, product in enumerate(PRODUCTS):
            cosines = block_cosines(model, query, product)
            expected = sum(squares[name] * cosine for name, cosine in cosines.items())
            assert scores[i, j] == pytest.approx(expected, abs=1e-5)


def test_an_item_scores_with_itself_the_share_of_the_blocks_that_it_has(model: TwoTower) -> None:
    encoder = model.product
    assert isinstance(encoder, BlockEncoder)
    squares = encoder.weights.square().detach()
    whole = embed(model, [ITEMS[0]], "query").scores(embed(model, [ITEMS[0]], "product"))
    assert whole[0, 0] == pytest.approx(1, abs=1e-5)
    picture = Item(images=ITEMS[0].images)
    alone = embed(model, [picture], "query").scores(embed(model, [ITEMS[0]], "product"))
    assert alone[0, 0] == pytest.approx(float(squares[1]), abs=1e-5)


def test_factors_weigh_the_blocks_of_their_kind_of_query_alone(model: TwoTower) -> None:
    encoder = model.product
    assert isinstance(encoder, BlockEncoder)
    kinds = encoder.query_factors.kinds(
        encoder.preprocess("query")([ITEMS[1], Item({"query": "lamp"})])
    )
    title, typed = kinds.tolist()
    assert (
        encoder.query_factors.blocks(title)
        == encoder.query_factors.blocks(typed)
        == ["text", "lexical"]
    )
    assert title != typed
    figures = {typed: KindFigures({"text": 0.25, "lexical": 1.0}, 0.5, 30)}
    before = embed(model, [ITEMS[1]], "query").scores(embed(model, PRODUCTS, "product"))
    set_weights(encoder, figures)
    after = embed(model, [ITEMS[1]], "query").scores(embed(model, PRODUCTS, "product"))
    np.testing.assert_array_equal(before, after)
    # Of the typed query, scores are the chosen sum up to a factor.
    query = Item({"query": "red lamp"})
    found = embed(model, [query], "query").scores(embed(model, PRODUCTS, "product"))[0]
    expected = []
    for product in PRODUCTS:
        cosines = block_cosines(model, query, product)
        expected.append(0.25 * cosines["text"] + cosines["lexical"])
    factor = found[1] / expected[1]
    np.testing.assert_allclose(found, factor * np.array(expected), atol=1e-5)


def test_training_compares_the_same_scores_up_to_collisions_of_words(model: TwoTower) -> None:
    encoder = model.product
    with torch.no_grad():
        encoded = encoder(encoder.preprocess("product")(PRODUCTS))
        vectors, has_any = encoder.view(encoded, "whole")
    assert has_any.all()
    exact = embed(model, PRODUCTS, "query").scores(embed(model, PRODUCTS, "product"))
    np.testing.assert_allclose((vectors @ vectors.T).numpy(), exact, atol=0.1)


def test_a_start_is_an_isometry_whose_change_costs(model: TwoTower) -> None:
    encoder = model.product
    assert isinstance(encoder, BlockEncoder)
    encoder.set_start("text", torch.eye(16, encoder.named_towers["text"].out_dim))
    items = encoder.preprocess("product")(PRODUCTS)

    def price() -> float:
        encoded = encoder(items)
        return change_since_start((encoder, encoder), (encoded, encoded)).item()

    unchanged = {name: layer.weight.clone() for name, layer in encoder.projections.items()}
    assert price() == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        encoder.projections["text"].weight += 1.0  # type: ignore[operator]
    assert price() > 1e-4
    assert not torch.equal(unchanged["text"], encoder.projections["text"].weight)


def test_the_model_folder_keeps_every_score(model: TwoTower, tmp_path) -> None:
    encoder = model.product
    assert isinstance(encoder, BlockEncoder)
    set_weights(encoder, {3: KindFigures({"text": 0.5, "image": 1.0}, 0.5, 30)})
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    for side in ("query", "product"):
        before, after = embed(model, PRODUCTS, side), embed(loaded, PRODUCTS, side)
        np.testing.assert_allclose(before.dense, after.dense, atol=1e-6)
        assert abs(before.sparse - after.sparse).max() < 1e-6


def test_exact_search_adds_up_dense_and_sparse_scores(model: TwoTower) -> None:
    queries, products = embed(model, PRODUCTS, "query"), embed(model, PRODUCTS, "product")
    scores = queries.scores(products)
    np.fill_diagonal(scores, -np.inf)
    found = exact_search(queries, products, np.arange(5), k=4, block=2)
    best = np.take_along_axis(scores, found, 1)
    np.testing.assert_allclose(best, -np.sort(-scores, axis=1)[:, :4])


def test_other_metrics_and_encoders_are_refused(model: TwoTower) -> None:
    with pytest.raises(ValueError, match="BlockEncoder needs metric=inner_product"):
        TwoTower(model.product)
    with pytest.raises(ValueError, match="has no embedding"):
        BlockEncoder(terms=SparseTerms(), words_dim=0)
    with pytest.raises(ValueError, match=r"numbers\.out_dim=8 differs from block_dim=16"):
        BlockEncoder(16, numbers=NumberWaves(8))


def test_what_needs_embeddings_of_one_size_is_refused(model: TwoTower) -> None:
    loss = InfoNCE(negatives=CrossBatchMemory(8))
    with pytest.raises(ValueError, match="CrossBatchMemory keeps embeddings of one size"):
        TwoTower(model.product, loss=loss, metric="inner_product")
    with pytest.raises(ValueError, match="negatives cannot be mined for BlockEncoder"):
        HardNegatives(every_n_epochs=1).on_fit_start(L.Trainer(logger=False), model)


# ---------------------------------------------------------------- numbers


def waves(tower: NumberWaves, *prices: float) -> torch.Tensor:
    number = torch.tensor(prices).unsqueeze(1)
    return tower(AttributeTensors(number, torch.zeros(len(prices), 0, 1, dtype=torch.int64)))


def test_closer_prices_are_more_similar_and_a_missing_one_is_zero() -> None:
    features = waves(NumberWaves(16), 10.0, 10.1, 11.0, 500.0, math.nan)
    cosines = (features @ features.T)[0].tolist()
    assert cosines[0] == pytest.approx(1)
    assert cosines[1] > cosines[2] > abs(cosines[3])
    assert cosines[1] > 0.8  # a near value counts for more than a missing one
    assert cosines[4] == 0


def test_many_numbers_are_folded_into_the_size_of_a_block() -> None:
    attributes = tuple(Attribute(f"a{i}", "number") for i in range(20))
    tower = NumberWaves(64)
    tower.set_schema(Schema(("title",), False, attributes))
    generator = torch.Generator().manual_seed(0)
    number = torch.rand(50, 20, generator=generator) * 100 + 1
    folded = tower(AttributeTensors(number, torch.zeros(50, 0, 1, dtype=torch.int64)))
    whole = NumberWaves(14 * 20)(AttributeTensors(number, torch.zeros(50, 0, 1, dtype=torch.int64)))
    assert folded.shape == (50, 64)
    torch.testing.assert_close(folded.norm(dim=1), torch.ones(50))
    difference = folded @ folded.T - whole @ whole.T
    assert difference.abs().mean() < 0.15


# ---------------------------------------------------------------- between start and end


def point(*ndcg: float) -> dict[int, KindFigures]:
    return {kind: KindFigures({}, value, 50) for kind, value in enumerate(ndcg)}


def test_the_best_point_lets_no_kind_fall_below_the_start() -> None:
    figures = {0.0: point(0.5, 0.5), 0.5: point(0.6, 0.5), 1.0: point(0.9, 0.4)}
    assert best_share(figures) == 0.5


def test_where_training_gains_nothing_the_start_is_exported() -> None:
    assert best_share({0.0: point(0.5), 0.5: point(0.5), 1.0: point(0.49)}) == 0.0
    assert best_share({0.0: {}, 1.0: {}}) == 0.0
