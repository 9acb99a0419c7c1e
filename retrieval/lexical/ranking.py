"""BM25 and TF-IDF over the fields of product records.

An index of words is built once. How fields are weighted and how counts become scores can then be
changed at little cost, so that both can be chosen on held-out queries
(`tritower.retrieval.lexical.tuning`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from tritower.retrieval.lexical.analyzer import Analyzer
from tritower.retrieval.lexical.records import FIELDS, QUERY, Record
from tritower.retrieval.lexical.terms import TermReader
from tritower.retrieval.ranking.hits import Hits

LexicalModel = Literal["bm25", "tfidf"]

MAX_CELLS = 20_000_000
"""Scores that are held at a time: queries are searched in blocks."""


@dataclass(frozen=True)
class Scoring:
    """How the counts of a product's terms become a score.

    Attributes:
        model: `bm25` is BM25F (Zaragoza et al., TREC 2004) with Lucene's idf: counts are weighted
            and normalized by length per field, added up over the fields, then saturated. `tfidf` is
            the cosine of (1 + log count) x idf.
        k1: of BM25: the larger, the more a repeated term counts.
        b: of BM25: how much long fields are discounted, 0 to 1.
        weights: field -> weight of its counts; 0 leaves the field out.
    """

    model: LexicalModel = "bm25"
    k1: float = 1.2
    b: float = 0.75
    weights: Mapping[str, float] = field(
        default_factory=lambda: {**dict.fromkeys(FIELDS, 1.0), "texts": 0.25}
    )

    def __post_init__(self) -> None:
        """Refuse what is no score.

        Raises:
            ValueError: a field that records do not have, or a number out of range.
        """
        if unknown := set(self.weights) - set(FIELDS):
            raise ValueError(
                f"weights name the field {min(unknown)!r}; there are {', '.join(FIELDS)}"
            )
        if not (self.k1 > 0 and 0 <= self.b <= 1 and min(self.weights.values(), default=0) >= 0):
            raise ValueError(
                f"k1={self.k1}, b={self.b}, weights={dict(self.weights)}: choose k1 above 0, b "
                "from 0 to 1 and weights "
                "of at least 0"
            )


class LexicalIndex:
    """An inverted index of product records.

    Args:
        records: of N products; an empty one is a row without a product and counts nowhere.
        analyzer: maps tokens to terms, of products and of queries.
        neighbors: pairs of neighboring words are terms, too.
    """

    def __init__(
        self, records: Sequence[Record], analyzer: Analyzer, neighbors: bool = False
    ) -> None:
        self._reader = TermReader(analyzer, neighbors)
        self.num_products = len(records)
        self._count = sum(map(bool, records))
        self._columns: dict[str, int] = {}  # term -> column
        self._last_queries: tuple[Sequence[Record], dict[str, sp.csr_array]] | None = None

        # Postings: each (term, product) that occurs in any field once, with its count in every
        # field.
        keys = [self._occurrences(records, name) for name in FIELDS]
        postings = np.sort(np.concatenate(keys))
        postings = postings[np.diff(postings, prepend=-1) > 0]  # (P,) ascending, so grouped by term
        self._counts = np.zeros((len(FIELDS), len(postings)), np.float32)
        for row, occurrences in enumerate(keys):
            found, counts = np.unique(occurrences, return_counts=True)
            self._counts[row, np.searchsorted(postings, found)] = counts
        columns, products = np.divmod(postings, max(1, self.num_products))
        self._products = products.astype(np.int32)  # (P,)
        self._starts = np.searchsorted(columns, np.arange(len(self._columns) + 1))  # (V + 1,)
        self._document_frequency = np.diff(self._starts)

        # Length of each field, relative to the mean over all products.
        lengths = np.array(
            [[len(record.get(name, ())) for record in records] for name in FIELDS], np.float32
        )
        mean = lengths.sum(axis=1, keepdims=True) / max(1, self._count)
        self._relative_length = lengths / mean.clip(1e-9)  # (F, N)

    def search(self, queries: Sequence[Record], k: int, scoring: Scoring) -> Hits:
        """The k products with the highest scores, equal scores by row.

        A product without a term of the query is not found.

        Returns:
            Hits of Q queries.
        """
        hits = Hits.empty(len(queries), k)
        for first, scores in self._score_blocks(queries, scoring):
            for number, (start, stop) in enumerate(pairwise(scores.indptr)):
                values = scores.data[start:stop]
                rows = scores.indices[start:stop]
                best = top_positions(values, rows, k)
                hits.scores[first + number, : len(best)] = values[best]
                hits.rows[first + number, : len(best)] = rows[best]
        return hits

    def scores(self, queries: Sequence[Record], scoring: Scoring) -> NDArray[np.float32]:
        """(Q, N) float32: the score of every product, 0 where it has no term of the query."""
        blocks = [block.toarray() for _, block in self._score_blocks(queries, scoring)]
        return np.concatenate([np.zeros((0, self.num_products), np.float32), *blocks])

    def _score_blocks(
        self, queries: Sequence[Record], scoring: Scoring
    ) -> Iterator[tuple[int, sp.csr_array]]:
        """The number of a block's first query, and its (B, N) scores above 0."""
        weights = self._product_weights(scoring)
        own_weights = self._query_weights(queries, scoring)
        size = max(1, MAX_CELLS // max(1, self.num_products))
        for first in range(0, len(queries), size):
            scores = own_weights[first : first + size] @ weights
            scores.eliminate_zeros()
            yield first, scores

    # ------------------------------------------------------------------ weights

    def _product_weights(self, scoring: Scoring) -> sp.csr_array:
        """(V, N) float32 weights of the products' terms."""
        counts = np.zeros(
            len(self._products), np.float32
        )  # (P,) weighted, added up over the fields
        # BM25F: counts are weighted, normalized by the length of their field, and summed over
        # fields.
        for row, name in enumerate(FIELDS):
            if weight := scoring.weights.get(name, 0.0):
                of_field = weight * self._counts[row]
                if scoring.model == "bm25":
                    of_field /= (1 - scoring.b + scoring.b * self._relative_length[row])[
                        self._products
                    ].clip(1e-6)
                counts += of_field
        # Then BM25 saturates them; TF-IDF dampens them and makes each product a unit vector.
        idf = np.repeat(self._idf(scoring), self._document_frequency)
        if scoring.model == "bm25":
            weights = idf * counts / (scoring.k1 + counts)
        else:
            weights = idf * damped(counts)
            length = np.sqrt(np.bincount(self._products, weights**2, minlength=self.num_products))
            weights = weights / length.clip(1e-12)[self._products]
        shape = (len(self._columns), self.num_products)
        return sp.csr_array((weights.astype(np.float32), self._products, self._starts), shape=shape)

    def _query_weights(self, queries: Sequence[Record], scoring: Scoring) -> sp.csr_array:
        """(Q, V) float32 weights of the queries' terms."""
        weights = sp.csr_array((len(queries), len(self._columns)), dtype=np.float32)
        for name, counts in self._query_counts(queries).items():
            weights += counts * (1.0 if name == QUERY else scoring.weights.get(name, 0.0))
        weights.eliminate_zeros()
        if scoring.model == "bm25":
            # The query's own counts saturate, too: 1 for a term that occurs once.
            # 1 for a term that occurs once.
            weights.data *= (scoring.k1 + 1) / (scoring.k1 + weights.data)
            return weights
        weights.data = damped(weights.data) * self._idf(scoring)[weights.indices]
        length = np.sqrt(weights.multiply(weights).sum(axis=1)).clip(1e-12)
        weights.data /= np.repeat(length, np.diff(weights.indptr))
        return weights

    def _query_counts(self, queries: Sequence[Record]) -> dict[str, sp.csr_array]:
        """Field -> (Q, V) float32 counts of known terms.

        Those of the last queries are kept, as tuning repeats them.
        """
        if self._last_queries is None or self._last_queries[0] is not queries:
            counts = {}
            for name in (*FIELDS, QUERY):
                # A sparse matrix of the known terms of each query.
                columns: list[int] = []
                starts = [0]
                for query in queries:
                    terms = self._reader.read(query.get(name, ()), name)
                    columns += [self._columns[term] for term in terms if term in self._columns]
                    starts.append(len(columns))
                if columns:
                    parts = (np.ones(len(columns), np.float32), np.array(columns), np.array(starts))
                    counts[name] = sp.csr_array(parts, shape=(len(queries), len(self._columns)))
                    counts[name].sum_duplicates()
            self._last_queries = (queries, counts)
        return self._last_queries[1]

    def _idf(self, scoring: Scoring) -> NDArray[np.float32]:
        """(V,) float32 inverse document frequencies."""
        count = self._count
        frequency = self._document_frequency
        if scoring.model == "bm25":
            return np.log1p((count - frequency + 0.5) / (frequency + 0.5)).astype(np.float32)
        return (np.log((1 + count) / (1 + frequency)) + 1).astype(np.float32)

    # ------------------------------------------------------------------ terms

    def _occurrences(self, records: Sequence[Record], name: str) -> NDArray[np.int64]:
        """(O,) one number for each occurrence of a term in a field.

        Column x N + product. Enters new terms.
        """
        columns = array("q")
        lengths = array("q")
        known = self._columns
        for record in records:
            terms = self._reader.read(record.get(name, ()), name)
            columns.extend([known.setdefault(term, len(known)) for term in terms])
            lengths.append(len(terms))
        products = np.repeat(np.arange(len(records)), np.array(lengths, np.int64))
        return np.array(columns, np.int64) * self.num_products + products


def top_positions(
    values: NDArray[np.float32], rows: NDArray[np.integer], k: int
) -> NDArray[np.int64]:
    """Positions of the k highest values, equal ones by row.

    Args:
        values: (P,).
        rows: (P,) distinct.
        k: may be more than there are.
    """
    candidates = np.arange(len(values))
    if len(values) > k:
        lowest = np.partition(values, len(values) - k)[len(values) - k]
        candidates = np.flatnonzero(values >= lowest)  # all that tie with the last one
    order = np.lexsort((rows[candidates], -values[candidates]))[:k]
    return candidates[order]


def damped(counts: NDArray[np.float32]) -> NDArray[np.float32]:
    """(P,) counts -> (P,) 1 + log(count), and the count itself below 1, as weights may make it."""
    return np.where(counts < 1, counts, 1 + np.log(counts.clip(1)))
