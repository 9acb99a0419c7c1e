"""The best recall that is possible on the sample catalogue: that of a ranking by its true model.

For one listing, the oracle ranks all others by the likelihood ratio of "the same product" against
"two products drawn independently", given the facts that both listings show in some modalities. A
fact shown by only one of them adds nothing. One that both show adds `-log share` where they agree,
the share being how many products of that type have the value, and rules the pair out where they
differ. Two standardized log prices x, y of one type are jointly normal with correlation
r = spread² / (spread² + noise²) if the product is the same, and independent if not::

    log ratio = -log(1 - r²) / 2 - (r² x² - 2 r x y + r² y²) / (2 (1 - r²))

Listings with equal ratios are in random order, so recall is an expectation, and it is exact: of T
equal listings with A above them, each is among the first k with chance min(1, max(0, (k - A) / T)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from tritower.datamodules.samples.facts import (
    BRAND_SHARES,
    CHOICES,
    PRICE_NOISE,
    PRICE_SPREAD,
    PRODUCT_TYPES,
)

SUBSETS = tuple(
    subset for size in (1, 2, 3) for subset in combinations(("text", "image", "attribute"), size)
)
"""The seven ways to look at a listing."""

SHARES = {
    "product_type": np.full(len(PRODUCT_TYPES), 1 / len(PRODUCT_TYPES)),
    **{
        fact: np.full(CHOICES, 1 / CHOICES)
        for fact in ("shape", "colorway", "material", "size", "use")
    },
    "brand": BRAND_SHARES,
}
"""Fact -> (V,) float64 share of products of a type (of a use, for brands) that have each value."""

UNKNOWN = -1


@dataclass(frozen=True)
class Evidence:
    """What N listings show in one choice of modalities.

    Attributes:
        codes: fact -> (N,) int64 value, `UNKNOWN` where it is not shown.
        price: (N,) float64 log price, standardized among the listings of a type; NaN where it is
            not shown.
    """

    codes: dict[str, np.ndarray]
    price: np.ndarray

    @classmethod
    def seen(cls, parts: Sequence[Evidence]) -> Evidence:
        """What several modalities show together; they never contradict each other."""
        codes = {fact: np.max([part.codes[fact] for part in parts], axis=0) for fact in SHARES}
        return cls(codes, np.fmax.reduce([part.price for part in parts]))


def log_ratio(evidence: Evidence, query: np.ndarray) -> np.ndarray:
    """(Q, N) float64 scores of all listings for each query.

    -inf where they cannot be the same product.

    Args:
        evidence: of N listings.
        query: (Q,) int64 positions of the query listings.
    """
    score = price_log_ratio(evidence.price[query][:, None], evidence.price[None])
    for fact, shares in SHARES.items():
        query_codes = evidence.codes[fact][query][:, None]
        shown = evidence.codes[fact][None]
        score += np.where(
            (query_codes == UNKNOWN) | (shown == UNKNOWN),
            0.0,
            np.where(query_codes == shown, -np.log(shares[query_codes]), -np.inf),
        )
    return score


def price_log_ratio(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The module's formula for (N,) standardized log prices, 0 where one of them is NaN."""
    r = PRICE_SPREAD**2 / (PRICE_SPREAD**2 + PRICE_NOISE**2)
    ratio = -np.log(1 - r**2) / 2 - ((r * x) ** 2 - 2 * r * x * y + (r * y) ** 2) / (2 * (1 - r**2))
    return np.nan_to_num(ratio, nan=0.0)


def expected_recall(scores: np.ndarray, relevant: np.ndarray, k: int) -> np.ndarray:
    """(Q,) float64 expected recall@k where equal scores are in random order.

    Args:
        scores: (Q, N) float64; listings that are no hits at all (the query itself) have NaN.
        relevant: (Q, N) bool; every query has at least one.
        k: how many hits are shown.
    """
    recall = np.empty(len(scores))
    for row, (score, is_relevant) in enumerate(zip(scores.round(9), relevant, strict=True)):
        ranked = np.sort(score[~np.isnan(score)])
        found = score[is_relevant]
        not_above = np.searchsorted(ranked, found, "right")
        tied = not_above - np.searchsorted(ranked, found, "left")
        recall[row] = np.clip((k - (len(ranked) - not_above)) / tied, 0, 1).mean()
    return recall


def oracle(
    evidence: dict[str, Evidence], group: np.ndarray, query: np.ndarray, k: int = 10
) -> dict[tuple[str, ...], float]:
    """Expected recall@k of finding the other listings of a product, for every set of modalities.

    Query and catalogue are seen in the same modalities; the whole catalogue is searched but for the
    query itself.

    Args:
        evidence: modality -> what N listings show there.
        group: (N,) int64 the product of each listing.
        query: (Q,) int64 positions of the query listings; each product is offered more than once.
        k: how many hits are shown.

    Raises:
        ValueError: there are no queries, or the product of one has no other listing.
    """
    relevant = group[query][:, None] == group[None]
    rows = np.arange(len(query))
    relevant[rows, query] = False
    alone = np.flatnonzero(~relevant.any(axis=1))
    if not len(query) or len(alone):
        raise ValueError(
            f"{len(query)} queries, of which {len(alone)} have no other listing of the same "
            "product to find."
        )
    recall = {}
    # Rank by the evidence of each set of modalities.
    for subset in SUBSETS:
        scores = log_ratio(Evidence.seen([evidence[m] for m in subset]), query)
        scores[rows, query] = np.nan
        recall[subset] = float(expected_recall(scores, relevant, k).mean())
    return recall
