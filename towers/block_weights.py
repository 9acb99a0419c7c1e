"""Weights of blocks, chosen on held-out queries: where training begins, and what is exported.

The exported model lies between start and end of training (WiSE-FT, Wortsman et al.,
arXiv:2109.01903): on held-out queries no kind of query finds less than it did at the start.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tritower.datamodules.batch import Item, Items, Side
from tritower.datamodules.catalogue import product_item
from tritower.datamodules.held_out_rows import QueryRows
from tritower.datamodules.products import ProductDataModule
from tritower.retrieval.evaluating.evaluation_queries import EvaluationQueries
from tritower.retrieval.evaluating.untrained_search import (
    MIN_CHOOSING,
    choose_weights,
    top_hits,
    weighted_sum,
)
from tritower.retrieval.ranking.metrics import PreparedNdcg
from tritower.towers.block_encoder import BlockEncoder
from tritower.towers.embedded import Embedded
from tritower.towers.encoding import to_device
from tritower.towers.queries_by_type import evaluation_queries_of, queries_by_type

if TYPE_CHECKING:
    from tritower.towers.two_tower import TwoTower

logger = logging.getLogger(__name__)

MAX_QUERIES = 200
"""Queries of each type that weights are chosen on."""

MAX_PRODUCTS = 5_000
"""Products among which they are searched: all that are judged, and others."""

MIN_WEIGHT = 0.02
"""A block begins with at least this weight: from 0 no gradient would reach it."""

START_WEIGHTS = {"lexical": 1.0, "image": 0.5, "text": 0.25, "attribute": 0.05}
"""Of whole products, where there are too few queries to choose on."""

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Points between the start of training (0) and its end (1) that are compared."""

TOLERANCE = 0.002
"""How much less nDCG@10 than at the start counts as noise, for a kind of query."""

BATCH = 256
"""Items per forward pass."""


@dataclass(frozen=True)
class KindFigures:
    """A kind of query at one point of training.

    Attributes:
        weights: block -> weight of its cosine in the score.
        ndcg: nDCG@10 on the held-out queries; NaN where weights are defaults.
        count: number of queries that the weights were chosen on.
    """

    weights: Mapping[str, float]
    ndcg: float
    count: int


class HeldOutBlocks:
    """Held-out queries of all types and the products they are searched among, as tensors.

    Args:
        model: with one encoder of blocks for both sides.
        data: its held-out queries of the val split are set up.
    """

    def __init__(self, model: TwoTower, data: ProductDataModule, seed: int = 0) -> None:
        encoder = model.product
        assert isinstance(encoder, BlockEncoder)
        self.encoder = encoder
        self.device = next(encoder.parameters()).device
        held_out = data.held_out[data.val_split]
        generator = np.random.default_rng(seed)

        # Queries in every type; a sample of each.
        rows = QueryRows(data.products, data.queries, held_out, data.model_preprocess.query)
        queries = list(queries_by_type(rows))
        nothing = np.zeros((len(queries), 1), np.float32)
        judged = evaluation_queries_of(queries, nothing, held_out)
        drawn = []
        for query_type in judged.distinct_types:
            positions = judged.positions_of_type(query_type)
            drawn.append(generator.permutation(positions)[:MAX_QUERIES])
        chosen = np.sort(np.concatenate(drawn))
        judged = judged.select(chosen)

        # All judged products, and others at random.
        num_products = len(held_out.candidates)
        needed = np.unique(np.concatenate([judged.judged.ravel(), judged.source]))
        needed = needed[(needed >= 0) & (needed < num_products)]
        others = generator.permutation(np.setdiff1d(np.arange(num_products), needed))
        sample = np.sort(np.concatenate([needed, others[: max(0, MAX_PRODUCTS - len(needed))]]))

        self.queries: EvaluationQueries = judged.restricted_to(sample)
        self._query_items = self._tensors(
            data, "query", [queries[position].item for position in chosen.tolist()]
        )
        candidates = held_out.candidates[sample].tolist()
        self._product_items = self._tensors(
            data, "product", [product_item(data.products.row(row)) for row in candidates]
        )
        kinds = [encoder.query_factors.kinds(items).cpu().numpy() for items in self._query_items]
        self.kinds: NDArray[np.int64] = np.concatenate(kinds)  # (Q,)

    def _tensors(self, data: ProductDataModule, side: Side, items: Sequence[Item]) -> list[Items]:
        sides = data.model_preprocess
        preprocess = sides.query if side == "query" else sides.product
        starts = range(0, len(items), BATCH)
        return [preprocess(items[start : start + BATCH]) for start in starts]

    def choose(self) -> dict[int, KindFigures]:
        """For each kind of query the weights that find most, and how much."""
        queries = self._embed("query", self._query_items)
        products = self._embed("product", self._product_items)
        result = {}
        for kind in np.unique(self.kinds).tolist():
            positions = np.flatnonzero(self.kinds == kind)
            if kind == 0 or len(positions) < MIN_CHOOSING:
                continue
            own = self.queries.select(positions)
            names = self.encoder.query_factors.blocks(kind)
            scores = self._block_scores(names, queries.select(positions), products)

            ndcg_of = PreparedNdcg(own.judged, own.grades, len(products))
            measure = partial(_ndcg_of_sum, scores, own.source, ndcg_of)
            weights, ndcg = choose_weights(names, measure)
            result[kind] = KindFigures(weights, ndcg, len(positions))
        return result

    def _block_scores(
        self, names: list[str], queries: Embedded, products: Embedded
    ) -> dict[str, NDArray[np.float32]]:
        """Block -> (Q, N) float32 cosines."""
        dim = self.encoder.block_dim
        scores = {}
        for name in names:
            if name == "lexical":
                sparse = (Embedded(part.dense[:, :0], part.sparse) for part in (queries, products))
                query, product = sparse
                scores[name] = query.scores(product)
            else:
                start = self.encoder.dense.index(name) * dim
                columns = slice(start, start + dim)
                scores[name] = queries.dense[:, columns] @ products.dense[:, columns].T
        return scores

    @torch.inference_mode()
    def _embed(self, side: Side, batches: list[Items]) -> Embedded:
        self.encoder.eval()
        parts = []
        for items in batches:
            blocks = self.encoder.blocks(to_device(items, self.device), side)
            parts.append(Embedded.of(blocks))
        return Embedded.concatenate(parts)


def _ndcg_of_sum(
    scores: Mapping[str, NDArray[np.float32]],
    source: NDArray[np.int64],
    ndcg_of: PreparedNdcg,
    weights: Mapping[str, float],
) -> float:
    return ndcg_of.mean(top_hits(weighted_sum(scores, weights), source, 10).rows)


def choose_start_weights(model: TwoTower, data: ProductDataModule) -> None:
    """Begin with the weights that find most on val, for each kind of query."""
    held_out = HeldOutBlocks(model, data)
    figures = held_out.choose()
    set_weights(held_out.encoder, figures, start=True)
    for own in figures.values():
        blocks = " + ".join(f"{weight:g} {name}" for name, weight in own.weights.items() if weight)
        logger.info("%s: nDCG@10 %.3f before training", f"{blocks}, {own.count} queries", own.ndcg)


@torch.no_grad()
def set_weights(
    encoder: BlockEncoder, figures: Mapping[int, KindFigures], *, start: bool = False
) -> None:
    """Set the factors of all kinds of queries, and at the start the weights of the blocks, too.

    Args:
        encoder: whose weights are set.
        figures: kind -> chosen weights.
        start: set the weights of the blocks by the kind with the most blocks.
    """
    names = list(encoder.towers)
    if start:
        whole = _whole_weights(names, figures)
        values = [max(whole.get(name, 0.0), MIN_WEIGHT) for name in names]
        encoder.log_weights.copy_(torch.tensor(values).log() / 2)
    chosen = {kind: own.weights for kind, own in figures.items()}
    encoder.query_factors.set(chosen, encoder.weights)


def _whole_weights(names: list[str], figures: Mapping[int, KindFigures]) -> Mapping[str, float]:
    """Weights of the kind with the most blocks; of several the one with the most queries."""
    if not figures:
        return {name: START_WEIGHTS[name] for name in names}
    most = max(figures, key=lambda kind: (kind.bit_count(), figures[kind].count))
    return figures[most].weights


@torch.no_grad()
def choose_between_start_and_end(
    model: TwoTower, data: ProductDataModule, start: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Give the model the best parameters between its start and its end, and weights for them.

    Args:
        model: as it was trained; changed in place.
        data: its held-out queries of the val split are set up.
        start: name -> the trained parameter before training, of its own shape, such as (D, F) of
            a projection.

    Returns:
        Plain JSON: `share` of the way that was chosen, mean nDCG@10 over the kinds of query there
        (`ndcg`) and at the `start`, and all figures by share and kind.
    """
    held_out = HeldOutBlocks(model, data)
    parameters = {name: p for name, p in model.named_parameters() if name in start}
    end = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}

    def move_to(share: float) -> None:
        for name, parameter in parameters.items():
            parameter.copy_(torch.lerp(start[name], end[name], share))

    figures: dict[float, dict[int, KindFigures]] = {}
    for share in SHARES:
        move_to(share)
        figures[share] = held_out.choose()
    best = best_share(figures)
    move_to(best)
    set_weights(held_out.encoder, figures[best])
    logger.info("exporting the point at %d %% of the way from start to end", round(100 * best))
    label = held_out.encoder.query_factors.label
    by_share: dict[str, dict[str, Any]] = {}
    for share, kinds in figures.items():
        by_share[str(share)] = {label(kind): asdict(own) for kind, own in kinds.items()}
    return {
        "share": best,
        "start": _mean_ndcg(figures[0.0]),
        "ndcg": _mean_ndcg(figures[best]),
        "figures": by_share,
    }


def _mean_ndcg(figures: Mapping[int, KindFigures]) -> float:
    return float(np.mean([own.ndcg for own in figures.values()])) if figures else 0.0


def best_share(figures: Mapping[float, Mapping[int, KindFigures]]) -> float:
    """The point with the highest mean nDCG@10 over the kinds, none of which falls below the start.

    Args:
        figures: share of the way -> kind -> figures; share 0 is the start.
    """
    before = figures[0.0]

    def gain(share: float) -> float:
        gains = [figures[share][kind].ndcg - before[kind].ndcg for kind in before]
        if not gains or min(gains) < -TOLERANCE:
            return -1.0
        return float(np.mean(gains))

    return max(figures, key=lambda share: (gain(share), -share))
