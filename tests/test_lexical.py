import math
from collections import Counter

import numpy as np
import pytest

from retrieval.hits import Hits
from retrieval.lexical import LEXICAL, bm25, jaccard, reciprocal_rank_fusion, tf_idf, tokenize

TEXTS = ["Red shoe", "red red hat", "blue hat", "", "女士连衣裙 red", "連衣裙 blue"]


def test_tokens_of_english_and_chinese():
    assert tokenize("Tom & Jerry's MUG №5, 12oz") == ["tom", "jerry", "s", "mug", "no5", "12oz"]
    assert tokenize("连衣裙 XL") == ["连", "衣", "裙", "连衣", "衣裙", "xl"]
    assert tokenize("a_b　Ｗｉｄｅ") == ["a", "b", "wide"]
    assert tokenize("…") == []


@pytest.mark.parametrize("name", LEXICAL)
def test_products_without_a_word_of_the_query_are_not_found(name):
    rank = LEXICAL[name](TEXTS)
    scores, rows = rank(["hat", "連衣裙", "green", "", "RED red shoe"], 6)
    assert sorted(rows[0][rows[0] >= 0]) == [1, 2]
    assert rows[1][0] == 5 and 4 in rows[1]  # shared characters
    assert (rows[2] == -1).all() and (rows[3] == -1).all()
    assert rows[4][0] == 0
    assert rows.shape == scores.shape == (5, 6)
    assert np.array_equal(np.isinf(scores), rows == -1)


@pytest.mark.parametrize("name", LEXICAL)
def test_no_words_at_all(name):
    assert (LEXICAL[name](["", "!"])(["a"], 2).rows == -1).all()


def test_equal_scores_stand_in_the_order_of_rows_and_share_a_rank():
    for make in LEXICAL.values():
        found = make(["b", "a", "a", "a", "a b c", "a b"])(["a"], 5)
        assert found.rows.tolist() == [[1, 2, 3, 5, 4]]
        assert found.ranks().tolist() == [[2, 2, 2, 4, 5]]
        assert (np.diff(found.scores) <= 0).all()


def by_definition(texts, queries, score):
    tokens = [tokenize(text) for text in texts]
    rows = []
    for query in queries:
        scores = [score(tokenize(query), document, tokens) for document in tokens]
        order = sorted((i for i in range(len(texts)) if scores[i] > 1e-12), key=lambda i: (-round(scores[i], 9), i))
        rows.append((order + [-1] * len(texts))[: len(texts)])
    return np.array(rows)


def jaccard_score(query, document, _):
    union = set(query) | set(document)
    return len(set(query) & set(document)) / len(union) if union else 0.0


def tf_idf_score(query, document, corpus):
    def vector(tokens):
        return {
            t: (1 + math.log(n)) * (math.log((1 + len(corpus)) / (1 + sum(t in d for d in corpus))) + 1)
            for t, n in Counter(tokens).items()
            if any(t in d for d in corpus)
        }

    a, b = vector(query), vector(document)
    norm = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
    return sum(v * b.get(t, 0) for t, v in a.items()) / norm if norm else 0.0


def bm25_score(query, document, corpus):
    average = sum(map(len, corpus)) / len(corpus)
    total = 0.0
    for token in query:
        n, tf = sum(token in d for d in corpus), document.count(token)
        idf = math.log(1 + (len(corpus) - n + 0.5) / (n + 0.5))
        total += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(document) / average))
    return total


@pytest.mark.parametrize(
    ("make", "score"), [(jaccard, jaccard_score), (tf_idf, tf_idf_score), (bm25, bm25_score)], ids=lambda f: f.__name__
)
def test_rankings_equal_the_definitions(make, score):
    generator = np.random.default_rng(0)
    words = [f"w{i}" for i in range(15)]
    texts = [" ".join(generator.choice(words, generator.integers(0, 9))) for _ in range(40)]
    queries = [" ".join(generator.choice([*words, "unknown"], 4)) for _ in range(300)]  # more than a block
    got, want = make(texts)(queries, len(texts)).rows, by_definition(texts, queries, score)
    agree = (got == want).mean()
    assert agree > 0.97  # near-ties may swap
    assert np.array_equal(np.sort(got, axis=1), np.sort(want, axis=1))


def in_order(*rows):
    return Hits.in_order(np.array(rows))


def test_rank_fusion_by_hand():
    """Row 7: 1/61 + 1/62. Row 5: 1/61 + 1/63. Row 9, in one ranking alone: 1/62."""
    one, other = in_order([5, 7, -1], [-1, -1, -1]), in_order([7, 9, 5], [2, 1, -1])
    assert reciprocal_rank_fusion([one, other]).tolist() == [[7, 5, 9], [2, 1, -1]]


def test_a_ranking_of_little_weight_only_adds_what_the_other_lacks():
    """With a tenth of the weight, rank 1 has 1/610 points, and rank 3 of the other 1/63."""
    one, other = in_order([5, 7, 3, -1]), in_order([9, 7, 5, 1])
    assert reciprocal_rank_fusion([one, other], [1.0, 0.1]).tolist() == [[5, 7, 3, 9]]
    assert reciprocal_rank_fusion([one, other], [0.1, 1.0]).tolist() == [[7, 5, 9, 1]]


def test_where_words_cannot_tell_products_apart_the_other_ranking_does_whatever_its_weight():
    """Rows 4 and 6 share rank 2.5 of the words; the index puts 6 before 4, and 8, which words put last, first."""
    words = Hits(np.array([[3.0, 1.0, 1.0, 0.5]], np.float32), np.array([[2, 4, 6, 8]]))
    assert words.ranks().tolist() == [[1, 2.5, 2.5, 4]]
    assert reciprocal_rank_fusion([words, in_order([8, 6, 4, 2])], [1000.0, 1.0]).tolist() == [[2, 6, 4, 8]]
    assert reciprocal_rank_fusion([words, in_order([8, 6, 4, 2])], [0.001, 1.0]).tolist() == [[8, 6, 4, 2]]
