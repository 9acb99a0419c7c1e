"""The training examples of a catalogue, by type."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from tritower.datamodules.catalogue import Table
from tritower.datamodules.example_rows import (
    ExampleRows,
    JudgementOptions,
    catalogue_examples,
    is_split,
    judgement_examples,
)
from tritower.datamodules.generated_queries import AllQueries, GeneratedQueries, generate_queries
from tritower.datamodules.positives import GroupRelation, SameGroup
from tritower.datamodules.schema import Schema

logger = logging.getLogger(__name__)

ExampleType = Literal["catalogue", "pairs", "labels", "generated"]
JUDGED_TYPES = {"pairs", "labels"}


@dataclass(frozen=True)
class ExampleOptions:
    """What training examples are made of.

    Attributes:
        types: `catalogue` (two views of a product, or of it and another one of its group), `pairs`
            (the judgements of the train split), `labels` (the same with their labels, and those of
            relevance 0, for losses such as CoSENT), `generated` (typed queries that name
            attributes of products). A mapping holds how often the examples of each type are shown
            in an epoch. Null takes catalogue and pairs.
        positives: whose views may be the query of a product: `group` (the same thing), `family`
            (variants too), or `none`.
        group_share: chance, 0 to 1, that a product's query is a view of another product of its
            group or family and not of itself.
        one_per_group: `catalogue` takes one product of each group or family alone, the first one;
            so no batch holds two that belong together.
        relatives_only: `catalogue` takes only products that have others of their group or family:
            a product and itself teach little where pretrained features are kept.
        generated_weight: 0 to 1, of a generated query, beside 1 of a product's view. Such queries
            draw together products with equal attributes: the more they weigh, the less sets one
            product apart.
        relevance_power: weight of a judgement: (relevance / highest relevance) to this power; 0
            weighs all alike.
        max_pairs_per_query: judged products of a query that are trained on, the most relevant
            first; null takes all. Others that are no less relevant are positives all the same, and
            less relevant ones are not.
    """

    types: list[ExampleType] | dict[ExampleType, int] | None = None
    positives: GroupRelation = "family"
    group_share: float = 0.5
    one_per_group: bool = False
    relatives_only: bool = False
    generated_weight: float = 0.02
    relevance_power: float = 1.0
    max_pairs_per_query: int | None = None

    def __post_init__(self) -> None:
        if any(number < 1 for number in self.times.values()):
            raise ValueError(
                f"types={self.times}: each is shown at least once an epoch; leave out those that "
                "are "
                "not."
            )
        if not 0 < self.generated_weight <= 1:
            raise ValueError(f"generated_weight={self.generated_weight}: choose above 0, up to 1.")

    @property
    def times(self) -> dict[ExampleType, int]:
        """How often the examples of each type are shown in an epoch."""
        if self.types is None:
            return {"catalogue": 1, "pairs": 1}
        if isinstance(self.types, dict):
            return dict(self.types)
        return dict.fromkeys(self.types, 1)


class TrainingRows:
    """The training examples of a catalogue.

    Args:
        products: the catalogue.
        queries: its queries, or None.
        qrels: its judgements, or None.
        schema: of the catalogue.
        options: what examples are made of.
        seed: of all draws.

    Attributes:
        split: int64 rows of the train split.
        rows: the examples.
        others: relevant pairs that are no examples.
        queries: those of the catalogue and the generated ones.
        same_group: the other products of each product's group, in the train split.

    Raises:
        ValueError: there are no examples.
    """

    def __init__(
        self,
        products: Table,
        queries: Table | None,
        qrels: pa.Table | None,
        schema: Schema,
        options: ExampleOptions,
        seed: int,
    ) -> None:
        self._products = products
        self._table = queries
        self._qrels = qrels
        self._options = options
        self._seed = seed
        self.split = np.flatnonzero(is_split(products, "train"))
        self.same_group = SameGroup(products, options.positives, self.split)
        # Generated queries are numbered after the catalogue's own.
        generated = GeneratedQueries([], [])
        if "generated" in options.times:
            weight = options.generated_weight
            generated = generate_queries(products, self.split, schema, seed, weight)
            logger.info("%d generated queries", len(generated))
        self.queries = AllQueries(queries, generated)
        self.rows = self._examples()
        self.others = self._other_pairs()

    def report(self, catalogue: Path) -> None:
        """Log the number of examples, and warn of judgements that no example type takes."""
        logger.info("%d training examples from %d products", len(self.rows), len(self._products))
        if JUDGED_TYPES & self._options.times.keys():
            return
        unused = len(self._judgements(labeled=True))
        if unused:
            logger.warning(
                "%s holds %d judgements of the train split, and none is trained on: "
                "data.examples.types=%s names neither pairs nor labels.",
                catalogue,
                unused,
                ", ".join(self._options.times),
            )

    def _examples(self) -> ExampleRows:
        parts = []
        # Examples of each type, as often as configured.
        for example_type, times in self._options.times.items():
            if example_type == "catalogue":
                rows = self.split
                if self._options.relatives_only:
                    rows = self.same_group.with_relatives(rows)
                if self._options.one_per_group:
                    rows = self.same_group.one_per_group(rows)
                parts += [catalogue_examples(rows)] * times
            elif example_type == "generated":
                first = self.queries.first_generated
                parts.append(self.queries.generated.examples(first, times, self._seed))
            else:
                parts += [self._judgements(labeled=example_type == "labels")] * times
        if not sum(map(len, parts)):
            raise ValueError(
                f"No training examples: the catalogue has {len(self.split)} "
                f"products of the train split, and data.examples.types={list(self._options.times)}."
            )
        return ExampleRows.join(parts)

    def _judgements(self, *, labeled: bool, keep_ties: bool = False) -> ExampleRows:
        if self._table is None or self._qrels is None:
            return catalogue_examples(np.empty(0, np.int64))
        options = JudgementOptions(
            self._options.max_pairs_per_query,
            self._seed,
            self._options.relevance_power,
            labeled,
            keep_ties,
        )
        return judgement_examples(self._qrels, self._products, self._table, "train", options)

    def _other_pairs(self) -> list[ExampleRows]:
        """Ties that `max_pairs_per_query` left out, and all products of generated queries."""
        parts = []
        is_cut = self._options.max_pairs_per_query is not None
        if is_cut and JUDGED_TYPES & self._options.times.keys():
            parts.append(self._judgements(labeled=False, keep_ties=True))
        if len(self.queries.generated):
            parts.append(self.queries.generated.pairs(self.queries.first_generated))
        return parts
