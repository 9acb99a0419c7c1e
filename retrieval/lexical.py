"""Traditional search by words, for comparison: BM25, TF-IDF with cosine, and Jaccard, on the same texts.

Products without a word of the query are not found, so a row of results may end in -1.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence

import bm25s
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from retrieval.hits import Hits
from retrieval.metrics import NONE

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it asks for debugging

_HAN_AND_KANA = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"
_WORDS = re.compile(rf"[{_HAN_AND_KANA}]+|[^\W_{_HAN_AND_KANA}]+")
_UNSPACED = re.compile(f"[{_HAN_AND_KANA}]")


Ranking = Callable[[Sequence[str], int], Hits]
"""(Q texts, k) -> the k nearest of the texts it was made from; equal scores by row."""


def tokenize(text: str) -> list[str]:
    """Lower-case words; Chinese and Japanese, which have no spaces, as single characters and pairs of neighbours."""
    tokens: list[str] = []
    for word in _WORDS.findall(unicodedata.normalize("NFKC", text).lower()):
        if _UNSPACED.match(word):
            tokens.extend(word)
            tokens.extend(word[i : i + 2] for i in range(len(word) - 1))
        else:
            tokens.append(word)
    return tokens


def bm25(texts: Sequence[str]) -> Ranking:
    """Okapi BM25 in Lucene's form (k1 1.5, b 0.75), by the bm25s library."""
    tokens = [tokenize(text) for text in texts]
    if not any(tokens):
        return lambda queries, k: Hits.none(len(queries), k)
    model = bm25s.BM25(method="lucene")
    model.index(tokens, show_progress=False)
    known = set(model.vocab_dict)

    def scores(queries: Sequence[str]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        for query in queries:
            words = [token for token in tokenize(query) if token in known]
            all_scores = model.get_scores(words) if words else np.zeros(len(texts))
            rows = np.flatnonzero(all_scores > 0)
            yield rows, all_scores[rows]

    return lambda queries, k: _best(scores(queries), len(queries), k)


def tf_idf(texts: Sequence[str]) -> Ranking:
    """Cosine of vectors of (1 + log tf) x idf, idf = log((1 + N) / (1 + df)) + 1."""
    vocabulary: dict[str, int] = {}
    counts = _counts(texts, vocabulary, grow=True)
    document_frequency = np.bincount(counts.indices, minlength=counts.shape[1])
    idf = np.log((1 + counts.shape[0]) / (1 + document_frequency)) + 1

    def weighted(matrix: sp.csr_array) -> sp.csr_array:
        matrix = matrix.copy()
        matrix.data = (1 + np.log(matrix.data)) * idf[matrix.indices]
        length = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
        matrix.data /= np.repeat(np.maximum(length, 1e-12), np.diff(matrix.indptr))
        return matrix

    documents = weighted(counts).T.tocsr()  # (V, N)

    def scores(queries: Sequence[str]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        for block in _blocks(queries):
            yield from _rows(weighted(_counts(block, vocabulary)) @ documents)

    return lambda queries, k: _best(scores(queries), len(queries), k)


def jaccard(texts: Sequence[str]) -> Ranking:
    """Shared words over all words of both, as sets."""
    vocabulary: dict[str, int] = {}
    counts = _counts(texts, vocabulary, grow=True)
    counts.data[:] = 1
    sizes, documents = np.diff(counts.indptr), counts.T.tocsr()

    def scores(queries: Sequence[str]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        for block in _blocks(queries):
            words = _counts(block, vocabulary)
            words.data[:] = 1
            for query, (rows, shared) in zip(block, _rows(words @ documents), strict=True):
                yield rows, shared / (len(set(tokenize(query))) + sizes[rows] - shared)

    return lambda queries, k: _best(scores(queries), len(queries), k)


LEXICAL: dict[str, Callable[[Sequence[str]], Ranking]] = {"bm25": bm25, "tfidf": tf_idf, "jaccard": jaccard}
"""Name -> a function that takes the products' texts and gives the function that ranks them."""


def reciprocal_rank_fusion(
    rankings: Sequence[Hits], weights: Sequence[float] | None = None, constant: int = 60
) -> NDArray[np.int64]:
    """One ranking of several: what stands at rank r in one of them has 1 / (constant + r) points (SIGIR 2009, Cormack).

    Equal scores share the mean of their ranks, so where one ranking cannot tell products apart, as words cannot tell
    variants, the others do.

    Args:
        rankings: of Q queries each.
        weights: of the rankings' points; None for 1 each.
        constant: the larger it is, the less the first ranks stand out.

    Returns:
        (Q, K) rows, most points first, equal points by row; -1 padded.
    """
    width = max(ranking.rows.shape[1] for ranking in rankings)
    fused = np.full((len(rankings[0].rows), width), NONE)
    ranks = [ranking.ranks() for ranking in rankings]
    for query in range(len(fused)):
        points: dict[int, float] = {}
        for ranking, rank, weight in zip(rankings, ranks, weights or [1.0] * len(rankings), strict=True):
            for row, place in zip(ranking.rows[query].tolist(), rank[query].tolist(), strict=True):
                if row != NONE:
                    points[row] = points.get(row, 0.0) + weight / (constant + place)
        best = sorted(points, key=lambda row: (-points[row], row))[:width]
        fused[query, : len(best)] = best
    return fused


def _counts(texts: Sequence[str], vocabulary: dict[str, int], grow: bool = False) -> sp.csr_array:
    """(N, V) float64 numbers of occurrences; words outside the vocabulary are added or left out."""
    columns, starts = [], [0]
    for text in texts:
        for token in tokenize(text):
            if grow:
                columns.append(vocabulary.setdefault(token, len(vocabulary)))
            elif (column := vocabulary.get(token)) is not None:
                columns.append(column)
        starts.append(len(columns))
    shape = (len(texts), max(len(vocabulary), 1))
    matrix = sp.csr_array((np.ones(len(columns)), np.array(columns, np.int64), np.array(starts, np.int64)), shape=shape)
    matrix.sum_duplicates()
    return matrix


def _blocks(queries: Sequence[str], size: int = 256) -> Iterator[Sequence[str]]:
    return (queries[start : start + size] for start in range(0, len(queries), size))


def _rows(matrix: sp.csr_array) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    for start, stop in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True):
        yield matrix.indices[start:stop].astype(np.int64), matrix.data[start:stop]


def _best(found: Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]], num_queries: int, k: int) -> Hits:
    best = Hits.none(num_queries, k)
    for query, (rows, scores) in enumerate(found):
        order = np.lexsort((rows, -scores))[:k]
        best.scores[query, : len(order)], best.rows[query, : len(order)] = scores[order], rows[order]
    return best
