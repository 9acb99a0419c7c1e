"""Sparse vectors of records: TF-IDF and BM25 of the lexical index, and learned weights."""

from __future__ import annotations

import pickle
from dataclasses import asdict

import numpy as np
import pytest
import torch

from tritower.datamodules.batch import Item, Side
from tritower.datamodules.schema import Attribute, Schema
from tritower.retrieval.lexical.analyzer import Analyzer
from tritower.retrieval.lexical.ranking import LexicalIndex, Scoring
from tritower.retrieval.lexical.records import record_of, typed_record
from tritower.retrieval.lexical.tuning import LexicalSettings
from tritower.towers.block_encoder import HybridVectors
from tritower.towers.embedded import Embedded
from tritower.towers.sparse_terms import BUCKETS, SparseTerms, TermOptions

SCHEMA = Schema(
    ("title", "description"), False, (Attribute("price", "number"), Attribute("brand", "category"))
)
PRODUCTS = [
    Item({"title": "red mug", "description": "A red mug for tea."}, (), {"brand": "Acme"}),
    Item({"title": "blue mugs", "description": "Two mugs."}, (), {"brand": "Acme", "price": 9.5}),
    Item({"title": "desk lamp"}, (), {"brand": "Zeta Light", "price": 9.5}),
    Item({"title": "lamp", "description": "A lamp, a red lamp, a lamp for tea drinkers"}),
    Item(),
]
TYPED = ["red mugs", "lamp for tea tea", "acme"]
RECORD = LexicalSettings(
    Analyzer("english"),
    neighbors=True,
    scoring=Scoring("tfidf", weights={"title": 2, "texts": 0.25, "attributes": 1, "facts": 1}),
)
BM25 = LexicalSettings(
    Analyzer("english"),
    scoring=Scoring("bm25", 0.8, 0.5, {"title": 1, "texts": 0.5, "attributes": 2}),
)


@pytest.fixture
def tower() -> SparseTerms:
    tower = SparseTerms(TermOptions(RECORD, BM25), hashed_dim=1 << 12)
    tower.set_schema(SCHEMA)
    tower.count(PRODUCTS)
    return tower


def sparse(tower: SparseTerms, items: list[Item], side: Side) -> Embedded:
    terms, _ = tower.preprocess(items, side)
    assert terms is not None
    with torch.no_grad():
        weights = tower.weights(terms, side)
    return Embedded.of(HybridVectors(torch.zeros(len(items), 1), terms.term, weights))


def index(settings: LexicalSettings) -> LexicalIndex:
    records = [record_of(item.text, item.attributes, "title") for item in PRODUCTS]
    records[-1] = {}  # an empty product counts nowhere
    return LexicalIndex(records, settings.analyzer, settings.neighbors)


def test_a_record_scores_as_tfidf_of_the_lexical_index(tower: SparseTerms) -> None:
    records = [record_of(item.text, item.attributes, "title") for item in PRODUCTS]
    expected = index(RECORD).scores(records, RECORD.scoring)
    found = sparse(tower, PRODUCTS, "query").scores(sparse(tower, PRODUCTS, "product"))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_typed_text_scores_as_bm25_of_the_lexical_index_up_to_a_factor(
    tower: SparseTerms,
) -> None:
    expected = index(BM25).scores([typed_record(text) for text in TYPED], BM25.scoring)
    typed = [Item({"query": text}) for text in TYPED]
    found = sparse(tower, typed, "query").scores(sparse(tower, PRODUCTS, "product"))
    assert (found <= 1).all()
    for own, wanted in zip(found, expected, strict=True):
        factor = own.max() / wanted.max()
        np.testing.assert_allclose(own, factor * wanted, atol=1e-6)


def test_records_and_typed_texts_meet_in_dimensions_of_their_own(tower: SparseTerms) -> None:
    typed = sparse(tower, [Item({"query": "red mug"})], "query")
    product_query = sparse(tower, PRODUCTS[:1], "query")
    assert typed.sparse is not None and product_query.sparse is not None
    assert (typed.sparse.indices >= BUCKETS).all()
    assert (product_query.sparse.indices < BUCKETS).all()


def test_typed_parts_of_products_are_as_long_as_their_records(tower: SparseTerms) -> None:
    vectors = sparse(tower, PRODUCTS[:4], "product").sparse
    assert vectors is not None
    squares = vectors.power(2)
    records = np.sqrt(squares[:, :BUCKETS].sum(axis=1))
    typed = np.sqrt(squares[:, BUCKETS:].sum(axis=1))
    np.testing.assert_allclose(records, 1, rtol=1e-5)
    assert typed.mean() == pytest.approx(1, rel=1e-5)


def test_hashed_features_have_nearly_the_inner_products_of_the_sparse_vectors(
    tower: SparseTerms,
) -> None:
    terms, has_terms = tower.preprocess(PRODUCTS, "product")
    assert terms is not None and has_terms.tolist() == [True, True, True, True, False]
    features = tower(terms)
    assert features.shape == (5, 1 << 12)
    queries = sparse(tower, PRODUCTS, "query")
    exact = queries.scores(sparse(tower, PRODUCTS, "product"))
    np.testing.assert_allclose((features @ features.T).detach().numpy(), exact, atol=0.1)


def test_a_learned_weight_makes_its_term_count_more(tower: SparseTerms) -> None:
    before = sparse(tower, PRODUCTS, "query").scores(sparse(tower, PRODUCTS, "product"))
    red, _ = tower.preprocess([Item({"title": "red"})], "query")
    assert red is not None
    with torch.no_grad():
        tower.log_weight[red.term[0]] += 0.5
    after = sparse(tower, PRODUCTS, "query").scores(sparse(tower, PRODUCTS, "product"))
    assert after[0, 3] > before[0, 3]  # both are red
    assert after[0, 1] < before[0, 1]  # two mugs, one of them red
    np.testing.assert_allclose(np.diag(after)[:4], 1, rtol=1e-6)


def test_numbers_move_a_score_by_their_term_alone(tower: SparseTerms) -> None:
    """A near number is another term: it counts as a missing one, never for less."""
    near = PRODUCTS[1]._replace(attributes={"brand": "Acme", "price": 9.6})
    missing = PRODUCTS[1]._replace(attributes={"brand": "Acme"})
    products = sparse(tower, PRODUCTS[2:3], "product")
    scores = sparse(tower, [near, missing], "query").scores(products)
    assert scores[0, 0] == pytest.approx(scores[1, 0])


def test_nothing_but_stop_words_is_no_query(tower: SparseTerms) -> None:
    terms, has_terms = tower.preprocess([Item({"query": "for the"}), Item()], "query")
    assert terms is None and has_terms.tolist() == [False, False]


def test_preprocessing_travels_to_loader_processes(tower: SparseTerms) -> None:
    preprocess = tower.preprocess
    expected, _ = preprocess(PRODUCTS, "product")
    copied, _ = pickle.loads(pickle.dumps(preprocess))(PRODUCTS, "product")
    assert expected is not None and copied is not None
    assert torch.equal(expected.term, copied.term) and torch.equal(expected.value, copied.value)


def test_it_is_rebuilt_from_its_architecture(tower: SparseTerms) -> None:
    copied = SparseTerms.rebuild(tower.architecture(), None)
    assert asdict(copied.options) == asdict(tower.options)
    copied.set_schema(SCHEMA)
    copied.load_state_dict(tower.state_dict())
    same = sparse(copied, PRODUCTS, "product").sparse
    assert same is not None and abs(same - sparse(tower, PRODUCTS, "product").sparse).max() == 0


@pytest.mark.parametrize("swapped", [{"record": BM25}, {"typed": RECORD}])
def test_records_take_tfidf_and_typed_texts_bm25(swapped: dict[str, LexicalSettings]) -> None:
    with pytest.raises(ValueError, match=r"choose 'tfidf' and 'bm25'"):
        TermOptions(**swapped)
