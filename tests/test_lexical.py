"""Tokens, terms, records, and the scores of BM25 and TF-IDF."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import bm25s
import numpy as np
import pytest

from tritower.retrieval.lexical.analyzer import STOP_WORDS, Analyzer, detect_language
from tritower.retrieval.lexical.ranking import LexicalIndex, Scoring
from tritower.retrieval.lexical.records import (
    FIELDS,
    Record,
    record_of,
    typed_record,
    visible_record,
)
from tritower.retrieval.lexical.tokenizer import tokenize
from tritower.retrieval.lexical.tuning import (
    WEIGHTS,
    LexicalIndexes,
    LexicalSettings,
    choose_settings,
    climb,
    language_of,
)
from tritower.towers.lexical import ngram_hashes
from tritower.towers.text import split_words

PLAIN = Analyzer(None)
EVEN = dict.fromkeys(FIELDS, 1.0)


def titles(*texts: str) -> list[Record]:
    return [{"title": tokenize(text)} for text in texts]


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Tom & Jerry's MUG №5, 12oz", ["tom", "jerry", "mug", "no5", "12oz"]),
        ("a_b　Ｗｉｄｅ", ["a", "b", "wide"]),
        ("women’s T-Shirt", ["women", "t", "shirt"]),
        ("3.5 mm, 3,5 mm and 2.4GHz", ["3.5", "mm", "3.5", "mm", "and", "2.4ghz"]),
        ("WH-1000XM4 / i7-8700K", ["wh", "1000xm4", "wh1000xm4", "i7", "8700k", "i78700k"]),
        ("size 10.", ["size", "10"]),
        ("连衣裙 XL 한국 すし", ["连", "衣", "裙", "xl", "한", "국", "す", "し"]),
        ("…", []),
    ],
)
def test_tokens_keep_numbers_and_model_codes_whole(text, tokens):
    assert tokenize(text) == tokens


def test_training_and_lexical_search_share_the_tokenizer():
    text = "WH-1000XM4 headphones, 3.5 mm, women's 连衣裙"
    assert split_words(text) == tokenize(text)
    assert len(ngram_hashes(text, 1, 256)) == len(set(tokenize(text)))
    assert split_words("…") == ["…"]  # no text is without a word


# ---------------------------------------------------------------- terms


def test_stop_words_go_and_words_lose_their_endings_but_codes_stay():
    english = Analyzer("english")
    assert (
        english.term("for") is None and english.term("dresses") == english.term("dress") == "dress"
    )
    assert english.term("i78700ks") == "i78700ks" and english.term("36s") == "36s"
    assert Analyzer("english", stop_words=False).term("for") == "for"
    assert Analyzer("english", stem=False).term("dresses") == "dresses"
    assert Analyzer("german").term("für") is None and Analyzer("german").term("schuhe") == "schuh"
    assert PLAIN.term("for") == "for" and PLAIN.term("dresses") == "dresses"


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("english", "a shirt for men with the logo of the club and it is warm"),
        ("german", "ein Hemd für Herren mit dem Logo des Vereins, und es ist warm"),
        ("french", "une chemise pour homme avec le logo du club et elle est chaude"),
        ("spanish", "una camisa para hombre con el logo del club y es muy cálida"),
        (None, "连衣裙 夏季 新款"),
        (None, "AB-12 CD-34 XYZ"),
        (None, ""),
    ],
)
def test_the_language_is_that_whose_stop_words_cover_most(language, text):
    assert detect_language(Counter(tokenize(text))) == language
    assert language is None or language in STOP_WORDS


# ---------------------------------------------------------------- records


RECORD = record_of(
    {"title": "Red Shoe", "description": "For running.", "care": None},
    {"brand": "Acme Sport", "price": 59.9, "category": ["Shoes", "Running"], "size": None},
    "title",
)


def test_a_record_has_words_by_field_and_whole_values():
    assert RECORD == {
        "title": ["red", "shoe"],
        "texts": ["for", "running"],
        "attributes": ["acme", "sport", "shoes", "running"],
        "facts": ["brand=acme sport", "category=shoes", "category=running"],
        "numbers": ["price=59.9"],
    }


def test_a_kind_of_query_shows_its_part_of_the_record_alone():
    assert visible_record(RECORD, "fused") == RECORD
    assert set(visible_record(RECORD, "product:text")) == {"title", "texts"}
    assert set(visible_record(RECORD, "product:attribute")) == {"attributes", "facts", "numbers"}
    assert visible_record(RECORD, "product:image") == visible_record(RECORD, "image") == {}


def test_equal_numbers_match_and_near_ones_do_not():
    products = [record_of({}, {"price": price}, "title") for price in (59.9, 59.9, 60.0)]
    found = LexicalIndex(products, PLAIN).search([products[0]], 3, Scoring()).rows
    assert found.tolist() == [[0, 1, -1]]


# ---------------------------------------------------------------- scores


def random_texts(count: int, length: int, seed: int, words: int = 15) -> list[str]:
    generator = np.random.default_rng(seed)
    vocabulary = [f"w{i}" for i in range(words)]
    return [
        " ".join(generator.choice(vocabulary, generator.integers(0, length))) for _ in range(count)
    ]


def test_bm25_equals_the_bm25s_library():
    texts = random_texts(200, 12, 0)
    index = LexicalIndex(titles(*texts), PLAIN)
    library = bm25s.BM25(method="lucene", k1=1.3, b=0.6)
    library.index([tokenize(text) for text in texts], show_progress=False)
    for query in ("w1", "w2 w7", "w3 w4 w9 w14"):
        got = index.scores(titles(query), Scoring(k1=1.3, b=0.6))[0]
        assert np.allclose(got, library.get_scores(tokenize(query)), atol=1e-5)


def test_bm25f_by_hand():
    """Two products; "red" in the title of one (length 1 of mean 1.5) and twice in the texts of the
    other.
    """
    products = [
        {"title": ["red"], "texts": ["a"]},
        {"title": ["b", "c"], "texts": ["red", "red", "d"]},
    ]
    scoring = Scoring(k1=2.0, b=0.5, weights=EVEN | {"title": 3.0, "texts": 0.5})
    idf = math.log(1 + (2 - 2 + 0.5) / (2 + 0.5))
    first = 3.0 * 1 / (1 - 0.5 + 0.5 * 1 / 1.5)
    second = 0.5 * 2 / (1 - 0.5 + 0.5 * 3 / 2)
    got = LexicalIndex(products, PLAIN).scores([typed_record("red")], scoring)[0]
    assert got.tolist() == pytest.approx([idf * first / (2 + first), idf * second / (2 + second)])


def tf_idf_score(query: list[str], document: list[str], corpus: list[list[str]]) -> float:
    def vector(tokens: list[str]) -> dict[str, float]:
        return {
            t: (1 + math.log(n))
            * (math.log((1 + len(corpus)) / (1 + sum(t in d for d in corpus))) + 1)
            for t, n in Counter(tokens).items()
            if any(t in d for d in corpus)
        }

    a, b = vector(query), vector(document)
    norm = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
    return sum(v * b.get(t, 0) for t, v in a.items()) / norm if norm else 0.0


def test_tf_idf_equals_its_definition():
    texts = random_texts(40, 9, 0)
    queries = random_texts(60, 5, 1, words=17)  # some words are unknown
    corpus = [tokenize(text) for text in texts]
    wanted = [
        [tf_idf_score(tokenize(query), document, corpus) for document in corpus]
        for query in queries
    ]
    got = LexicalIndex(titles(*texts), PLAIN).scores(
        titles(*queries), Scoring("tfidf", weights=EVEN)
    )
    assert np.allclose(got, wanted, atol=1e-6)


def test_a_weight_of_half_a_count_counts_half():
    products = titles("red shoe", "red hat")
    even = LexicalIndex(products, PLAIN).scores(titles("red"), Scoring("tfidf", weights=EVEN))
    half = LexicalIndex(products, PLAIN).scores(
        titles("red"), Scoring("tfidf", weights=EVEN | {"title": 0.5})
    )
    assert np.allclose(even, half)  # a cosine: all counts of a product shrink alike


@pytest.mark.parametrize("model", ["bm25", "tfidf"])
def test_search_ranks_by_score_and_then_by_row(model, monkeypatch):
    monkeypatch.setattr("tritower.retrieval.lexical.ranking.MAX_CELLS", 7)  # a query at a time
    index = LexicalIndex(titles("b", "a", "a", "a", "a b c", "a b"), PLAIN)
    queries = titles("a", "b c", "z", "")
    found = index.search(queries, 5, Scoring(model))
    assert found.rows[0].tolist() == [1, 2, 3, 5, 4]
    assert found.mean_ranks()[0].tolist() == [2, 2, 2, 4, 5]
    assert (found.rows[2:] == -1).all() and np.isinf(found.scores[2:]).all()
    scores = index.scores(queries, Scoring(model))
    for query, rows in enumerate(found.rows):
        order = sorted(
            np.flatnonzero(scores[query] > 0), key=lambda row: (-scores[query, row], row)
        )
        assert rows[rows >= 0].tolist() == order[:5]


@pytest.mark.parametrize("model", ["bm25", "tfidf"])
def test_rows_without_a_product_change_no_score(model):
    """Deleted products leave empty rows in an index."""
    products = titles("red shoe", "red", "")
    holes = [products[0], {}, products[1], products[2], {}]
    plain = LexicalIndex(products, PLAIN).scores(titles("red shoe"), Scoring(model))[0]
    with_holes = LexicalIndex(holes, PLAIN).scores(titles("red shoe"), Scoring(model))[0]
    assert with_holes.tolist() == [plain[0], 0, plain[1], plain[2], 0]


@pytest.mark.parametrize("model", ["bm25", "tfidf"])
def test_no_words_at_all(model):
    assert (
        LexicalIndex(titles("", "!"), PLAIN).search(titles("a"), 2, Scoring(model)).rows == -1
    ).all()
    assert LexicalIndex([], PLAIN).search(titles("a"), 2, Scoring(model)).rows.tolist() == [
        [-1, -1]
    ]


def test_neighbors_are_terms_on_request_and_those_of_cjk_always():
    products = titles("red shoe blue", "shoe red", "连衣裙", "衣 连")
    plain = LexicalIndex(products, PLAIN)
    paired = LexicalIndex(products, PLAIN, neighbors=True)
    even = plain.scores(titles("shoe red"), Scoring(b=0))[0]
    assert even[0] == even[1]
    ordered = paired.scores(titles("shoe red"), Scoring(b=0))[0]
    assert ordered[1] > ordered[0] > 0
    assert plain.search(titles("连衣"), 2, Scoring(b=0)).rows.tolist() == [[2, 3]]


def test_a_field_of_weight_0_is_not_searched():
    products = [{"title": ["red"], "texts": ["shoe"]}, {"title": ["blue"], "texts": ["red"]}]
    scoring = Scoring(weights=EVEN | {"texts": 0.0})
    assert LexicalIndex(products, PLAIN).search(titles("red"), 2, scoring).rows.tolist() == [
        [0, -1]
    ]
    # So is a record that asks; a typed query has no such fields.
    assert LexicalIndex(products, PLAIN).search(
        [typed_record("red")], 2, scoring
    ).rows.tolist() == [[0, -1]]
    scoring = Scoring(weights=EVEN | {"texts": 0.0})
    asking = [{"title": [], "texts": ["red"]}]
    assert LexicalIndex(products, PLAIN).search(asking, 2, scoring).rows.tolist() == [[-1, -1]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k1": 0}, r"k1=0, .*choose k1 above 0"),
        ({"b": 1.5}, r"b=1.5, .*b from 0 to 1"),
        ({"weights": {"title": -1}}, r"weights=\{'title': -1\}: .*weights of at least 0"),
        ({"weights": {"tilte": 1}}, r"weights name the field 'tilte'; there are title, texts"),
    ],
)
def test_a_scoring_that_is_none_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Scoring(**changes)


# ---------------------------------------------------------------- tuning


def test_climbing_stops_at_the_first_top_and_tries_the_lowest_value():
    figures = {0.0: 0.9, 0.25: 0.1, 0.5: 0.6, 1.0: 0.5, 2.0: 0.4, 4.0: 0.95}
    asked: list[float] = []

    def measure(settings: LexicalSettings) -> float:
        asked.append(settings.scoring.k1)
        return figures[settings.scoring.k1 - 1]

    def make(value: float) -> LexicalSettings:
        return LexicalSettings(PLAIN, scoring=Scoring(k1=value + 1))

    best, figure = climb(make, WEIGHTS, 1.0, figures[1.0], measure)
    assert best.scoring.k1 - 1 == 0.0 and figure == 0.9
    assert [value - 1 for value in asked] == [2.0, 0.5, 0.25, 0.0]


def test_tuning_leaves_out_a_field_that_misleads():
    """Titles name the color that is wanted; texts name all others."""
    colors = ["red", "blue", "green", "black"]
    products = [
        {"title": [color], "texts": [other for other in colors if other != color] * 2}
        for color in colors
    ]
    indexes = LexicalIndexes(products)

    def hits_at_1(settings: LexicalSettings) -> float:
        found = indexes.get(settings).search(titles(*colors), 1, settings.scoring)
        return float((found.rows[:, 0] == np.arange(4)).mean())

    start = LexicalSettings(PLAIN, scoring=Scoring(weights=EVEN))
    assert hits_at_1(start) < 1
    chosen, figure = choose_settings(start, hits_at_1)
    assert figure == hits_at_1(chosen) == 1
    assert chosen.scoring.weights["texts"] < chosen.scoring.weights["title"]


def test_tuning_chooses_stop_words_where_they_mislead():
    """One product has the rare word "for", which outweighs the frequent "shirt" however it is
    counted.
    """
    products = titles("for kids", *(f"shirt {number}" for number in range(10)))
    indexes = LexicalIndexes(products)
    start = LexicalSettings(Analyzer("english", stop_words=False), scoring=Scoring(weights=EVEN))

    def finds_a_shirt(settings: LexicalSettings) -> float:
        rows = indexes.get(settings).search(titles("shirt for"), 1, settings.scoring).rows
        return float(rows[0, 0] > 0)

    assert finds_a_shirt(start) == 0
    chosen, figure = choose_settings(start, finds_a_shirt)
    assert figure == 1 and chosen.analyzer.stop_words


def test_an_index_is_made_once_for_each_analyzer():
    indexes = LexicalIndexes(titles("a"))
    settings = LexicalSettings(PLAIN)
    assert indexes.get(settings) is indexes.get(replace(settings, scoring=Scoring(k1=2)))
    assert indexes.get(settings) is not indexes.get(replace(settings, neighbors=True))
    assert language_of([RECORD | {"texts": tokenize("the best of it is for the men")}]) == "english"
