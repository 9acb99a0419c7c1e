"""Words of the whole record as a sparse vector with learned weights.

A learned sparse representation: one dimension for each term, whose inner product is a lexical
score. Before training it is TF-IDF for products that are queries, and BM25 for typed queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tritower.datamodules.batch import Item, Side, TermTensors
from tritower.datamodules.preprocess import stable_hash
from tritower.datamodules.schema import Schema
from tritower.retrieval.lexical.analyzer import Analyzer
from tritower.retrieval.lexical.ranking import Scoring
from tritower.retrieval.lexical.records import FIELDS, QUERY, Record, record_of, typed_record
from tritower.retrieval.lexical.terms import TermReader
from tritower.retrieval.lexical.tuning import LexicalSettings
from tritower.towers.tower import Tower

BUCKETS = 1 << 20
"""Terms are numbered by their hash: 1 to BUCKETS - 1 of records, from BUCKETS on of typed texts."""

NUM_TERMS = 2 * BUCKETS
"""Dimensions of a sparse vector."""

LEARNING_RATE_FACTOR = 3.0
"""Term weights learn faster than projections: their gradients are rare."""

SCALE_ITEMS = 1_000
"""Products whose vectors decide how long typed parts are."""

KEPT_TERMS = 20_000_000
"""Terms of items that are kept, because a small catalogue is read every epoch; 8 bytes each."""


TermCounts = tuple[NDArray[np.int32], NDArray[np.float32]]
"""(G,) numbers of an item's terms, and their (G,) damped counts."""


@lru_cache(maxsize=1 << 20)
def term_number(term: str) -> int:
    """The number of a term, 0 to BUCKETS - 2."""
    return stable_hash(term) % (BUCKETS - 1)


@lru_cache(maxsize=8)
def _reader(analyzer: Analyzer, neighbors: bool) -> TermReader:
    return TermReader(analyzer, neighbors)


@dataclass(frozen=True)
class TermOptions:
    """How the terms of records and of typed texts are counted.

    Attributes:
        record: of products that are queries; scored by TF-IDF.
        typed: of typed queries; scored by BM25.
    """

    record: LexicalSettings = field(
        default_factory=lambda: LexicalSettings(Analyzer(), scoring=Scoring("tfidf"))
    )
    typed: LexicalSettings = field(
        default_factory=lambda: LexicalSettings(Analyzer(), scoring=Scoring("bm25"))
    )

    def __post_init__(self) -> None:
        """Refuse scorings that are not those of their side.

        Raises:
            ValueError: records need TF-IDF, typed texts BM25.
        """
        models = (self.record.scoring.model, self.typed.scoring.model)
        if models != ("tfidf", "bm25"):
            raise ValueError(
                f"record.scoring.model={models[0]!r}, typed.scoring.model={models[1]!r}: choose "
                "'tfidf' and 'bm25'"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TermOptions:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{name: _settings_from_dict(value) for name, value in data.items()})


def _settings_from_dict(data: Mapping[str, Any]) -> LexicalSettings:
    analyzer = Analyzer(**data["analyzer"])
    return LexicalSettings(analyzer, data["neighbors"], Scoring(**data["scoring"]))


class TermPreprocess:
    """Items to numbered terms and their damped counts.

    Args:
        options: how terms are counted.
        title: the text field that names products.
        mean_lengths: field of `FIELDS` -> mean number of tokens; BM25 discounts longer fields.
    """

    reads_attributes: ClassVar[bool] = True

    def __init__(self, options: TermOptions, title: str, mean_lengths: Mapping[str, float]) -> None:
        self.options = options
        self.title = title
        self.mean_lengths = dict(mean_lengths)
        self._kept: dict[Any, TermCounts] = {}
        self._num_kept = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_num_kept": 0}

    def record(self, item: Item) -> Record:
        """The record of an item; that of a typed query has the one field `QUERY`."""
        if "query" in item.text:
            return typed_record(item.text["query"])
        return record_of(item.text, item.attributes, self.title)

    def __call__(
        self, items: Sequence[Item], side: Side
    ) -> tuple[TermTensors | None, NDArray[np.bool_]]:
        """The terms of B items, None where no item has any; and (B,) bool, which have."""
        counted = [self._terms(item, side) for item in items]
        lengths = [len(numbers) for numbers, _ in counted]
        has_terms = np.array(lengths) > 0
        if not has_terms.any():
            return None, has_terms
        numbers = np.zeros((len(items), max(lengths)), np.int64)  # (B, G)
        values = np.zeros((len(items), max(lengths)), np.float32)  # (B, G)
        for row, (own_numbers, own_values) in enumerate(counted):
            numbers[row, : lengths[row]] = own_numbers
            values[row, : lengths[row]] = own_values
        return TermTensors(torch.from_numpy(numbers), torch.from_numpy(values)), has_terms

    def _terms(self, item: Item, side: Side) -> TermCounts:
        """The numbers of an item's terms, ascending, and their damped counts."""
        attributes = [
            (name, value if isinstance(value, str | float | int) else tuple(value))
            for name, value in item.attributes.items()
        ]
        key = (side, tuple(item.text.items()), tuple(attributes))
        if key not in self._kept:
            if self._num_kept >= KEPT_TERMS:
                self._kept.clear()
                self._num_kept = 0
            counts = dict(sorted(self._count(self.record(item), side).items()))
            numbers = np.fromiter(counts.keys(), np.int32, len(counts))
            values = np.fromiter(counts.values(), np.float32, len(counts))
            self._kept[key] = (numbers, values)
            self._num_kept += len(counts)
        return self._kept[key]

    def _count(self, record: Record, side: Side) -> dict[int, float]:
        if QUERY in record:
            return self._typed_query_counts(record[QUERY])
        counts = self._record_counts(record)
        # A product is found by records and by typed texts, each in dimensions of its own.
        if side == "product":
            counts |= self._typed_product_counts(record)
        return counts

    def _record_counts(self, record: Record) -> dict[int, float]:
        """1 + log of the counts, which are weighted and added up over the fields."""
        settings = self.options.record
        reader = _reader(settings.analyzer, settings.neighbors)
        counts: dict[int, float] = {}
        for name, weight in settings.scoring.weights.items():
            if weight:
                for term in reader.read(record.get(name, ()), name):
                    number = 1 + term_number(term)
                    counts[number] = counts.get(number, 0.0) + weight
        return {
            number: count if count < 1 else 1 + float(np.log(count))
            for number, count in counts.items()
        }

    def _typed_product_counts(self, record: Record) -> dict[int, float]:
        """BM25F: counts are normalized by the length of their field, added up, saturated."""
        settings = self.options.typed
        scoring = settings.scoring
        reader = _reader(settings.analyzer, settings.neighbors)
        counts: dict[int, float] = {}
        for name, weight in scoring.weights.items():
            tokens = record.get(name, ())
            if weight and tokens:
                length = len(tokens) / max(self.mean_lengths.get(name, 0.0), 1e-9)
                own = weight / max(1 - scoring.b + scoring.b * length, 1e-6)
                for term in reader.read(tokens, name):
                    number = BUCKETS + term_number(term)
                    counts[number] = counts.get(number, 0.0) + own
        return {number: count / (scoring.k1 + count) for number, count in counts.items()}

    def _typed_query_counts(self, tokens: Sequence[str]) -> dict[int, float]:
        """A typed text's own counts saturate, too: 1 for a term that occurs once."""
        settings = self.options.typed
        k1 = settings.scoring.k1
        counts: dict[int, float] = {}
        for term in _reader(settings.analyzer, settings.neighbors).read(tokens, QUERY):
            number = BUCKETS + term_number(term)
            counts[number] = counts.get(number, 0.0) + 1.0
        return {number: (k1 + 1) * count / (k1 + count) for number, count in counts.items()}


class SparseTerms(Tower):
    """The words, facts and numbers of a record as a sparse vector.

    A record's vector is TF-IDF of unit length, each term with a learned weight (Lassance et al.,
    arXiv:2303.13416, learn such weights for BM25). A typed query and a product meet in dimensions
    of their own, by BM25F; those are not trained.

    Args:
        options: how terms are counted.
        hashed_dim: F, size of the dense features that a loss compares: sparse vectors with hashed
            dimensions and signs (Weinberger et al., ICML 2009), whose inner product is that of the
            sparse vectors, up to collisions.
    """

    def __init__(self, options: TermOptions | None = None, hashed_dim: int = 1 << 12) -> None:
        super().__init__()
        if hashed_dim < 1:
            raise ValueError(f"hashed_dim={hashed_dim}: choose at least 1.")
        self.options = options if options is not None else TermOptions()
        self.out_dim = hashed_dim
        self.log_weight = nn.Parameter(torch.zeros(BUCKETS))
        self.idf: Tensor
        self.mean_lengths: Tensor
        self.typed_scale: Tensor
        self.register_buffer("idf", torch.ones(NUM_TERMS))
        self.register_buffer("mean_lengths", torch.ones(len(FIELDS)))
        # Of typed parts, so that they are about as long as records: in an embedding of hashed words
        # the longer one would drown the other.
        self.register_buffer("typed_scale", torch.ones(()))
        self._title = ""

    @property
    def preprocess(self) -> TermPreprocess:
        """Items to numbered terms."""
        lengths = dict(zip(FIELDS, self.mean_lengths.tolist(), strict=True))
        return TermPreprocess(self.options, self._title, lengths)

    def set_schema(self, schema: Schema) -> None:
        """Take the name of the title."""
        self._title = schema.text[0] if schema.text else ""

    @torch.no_grad()
    def count(self, items: Iterable[Item]) -> None:
        """Take inverse document frequencies and lengths of fields from the products.

        The sums are exact in any order, so every process counts the same.
        """
        preprocess = TermPreprocess(self.options, self._title, {})
        frequency = np.zeros(NUM_TERMS, np.int64)
        lengths = np.zeros(len(FIELDS), np.int64)
        num_products = 0
        sample: list[Item] = []
        for item in items:
            record = preprocess.record(item)
            if not any(record.values()):
                continue
            num_products += 1
            if len(sample) < SCALE_ITEMS:
                sample.append(item)
            lengths += [len(record.get(field, ())) for field in FIELDS]
            frequency[list(preprocess._count(record, "product"))] += 1
        idf = np.empty(NUM_TERMS)
        record_frequency = frequency[:BUCKETS]
        typed_frequency = frequency[BUCKETS:]
        idf[:BUCKETS] = np.log((1 + num_products) / (1 + record_frequency)) + 1
        idf[BUCKETS:] = np.log1p((num_products - typed_frequency + 0.5) / (typed_frequency + 0.5))
        self.idf.copy_(torch.from_numpy(idf))
        self.mean_lengths.copy_(torch.from_numpy(lengths / max(1, num_products)))
        self.typed_scale.fill_(1.0)
        terms, _ = self.preprocess(sample, "product")
        if terms is not None:
            typed = self.weights(terms, "product") * (terms.term >= BUCKETS)
            self.typed_scale.copy_(1 / typed.norm(dim=1).mean().clamp(min=1e-6))

    def forward(self, terms: TermTensors) -> Tensor:
        """(B, G) terms -> (B, F) features of records, of unit length or zero."""
        return hashed(terms.term, self._record_weights(terms), self.out_dim)

    def weights(self, terms: TermTensors, side: Side) -> Tensor:
        """(B, G) float32 weights of the terms: the values of the sparse vectors.

        The score of a record is at most 1; a typed query's, too, by a product that has each of its
        terms many times.
        """
        is_typed = terms.term >= BUCKETS
        typed = terms.value * self.idf[terms.term] * is_typed
        if side == "query":
            # The idf counts once, on the side of products.
            best = typed.sum(1, keepdim=True).clamp(min=1e-6)
            typed = terms.value * is_typed / (best * self.typed_scale)
        else:
            typed = typed * self.typed_scale
        return self._record_weights(terms) + typed

    def _record_weights(self, terms: TermTensors) -> Tensor:
        """(B, G) float32 weights of the records' terms, 0 elsewhere; rows of unit length."""
        is_record = (terms.term > 0) & (terms.term < BUCKETS)
        number = terms.term * is_record
        learned = torch.exp(LEARNING_RATE_FACTOR * self.log_weight[number])
        weight = terms.value * self.idf[number] * learned * is_record
        return nn.functional.normalize(weight, dim=1)

    def architecture(self) -> dict[str, Any]:
        """See `Tower.architecture`."""
        return {"options": asdict(self.options), "hashed_dim": self.out_dim}

    @classmethod
    def rebuild(cls, architecture: dict[str, Any], assets: Any) -> SparseTerms:
        """See `Tower.rebuild`."""
        options = TermOptions.from_dict(architecture["options"])
        return cls(options, architecture["hashed_dim"])


def hashed(term: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Sparse vectors as dense ones of a fixed size.

    Inner products are kept up to collisions, whose signs make them noise around zero (Weinberger
    et al., ICML 2009).

    Args:
        term: (B, G) int64 dimensions of the sparse vectors.
        weight: (B, G) float32 values there.
        dim: F.

    Returns:
        (B, F) float32.
    """
    sign = 1 - 2 * (term // dim % 2)
    features = weight.new_zeros(len(weight), dim)
    return features.scatter_add(1, term % dim, sign * weight)
