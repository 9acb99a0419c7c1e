"""Ask for products like some and unlike others: vectors with weights, and their sum.

query = unit( sum over parts of weight x unit(vector) )      unlike: the weight is negative

Under kl, where a vector is probabilities, the sum is of their logarithms' directions, and the query
the probabilities of what a unit embedding in that direction would have.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tritower.retrieval.filtering.terms import UNSIGNED_NUMBER
from tritower.retrieval.vectors.checks import Metric, probabilities

SHORTEST = 1e-6
"""A sum of unit vectors that is shorter is rounding, and points nowhere."""


class WeightedProduct(NamedTuple):
    """A product, and how much it counts.

    Attributes:
        product_id: a product of the index.
        weight: negative for what is not wanted.
    """

    product_id: str
    weight: float = 1.0


def parse_weighted_product(
    text: str, is_whole: Callable[[str], bool] = lambda _: False, *, sign: int = 1
) -> WeightedProduct:
    """A part of a query from `A` or `A=2`.

    Ids may hold "=": what follows the last one is a weight only where it is a number and the whole
    is no id.

    Args:
        text: as typed.
        is_whole: whether a whole text is an id.
        sign: -1 for what is not wanted.

    Raises:
        ValueError: nothing before the weight, or a weight that is not above 0 and finite.
    """
    match = re.fullmatch(rf"(.*)=({UNSIGNED_NUMBER})", text, re.DOTALL)
    if match is None or is_whole(text):
        return WeightedProduct(text, float(sign))
    weight = float(match[2])
    if not match[1] or not 0 < weight < math.inf:
        raise ValueError(f"{text!r}: expected ID=WEIGHT with a weight above 0, or an id alone")
    return WeightedProduct(match[1], sign * weight)


def combined(
    vectors: Sequence[NDArray[np.float32]],
    weights: Sequence[float] | None = None,
    metric: Metric = "cosine",
) -> NDArray[np.float32]:
    """The query that several vectors make together.

    Args:
        vectors: (D,) or (1, D) each; their lengths do not matter.
        weights: of each; all 1 when None.
        metric: what they are compared by.

    Returns:
        (1, D) float32 of unit length; probabilities under kl.

    Raises:
        ValueError: no vector, one without a direction, or vectors that cancel each other out.
    """
    if not vectors:
        raise ValueError(
            "nothing to search for: give text, image, attribute, like or vector, or queries"
        )
    weights = [1.0] * len(vectors) if weights is None else weights
    # Parts of different lengths count alike: each is scaled to length 1, then weighted and summed.
    parts = [np.asarray(vector, np.float64).ravel() for vector in vectors]
    if metric == "kl":
        parts = [centered(np.log(part.clip(min=np.finfo(np.float32).tiny))) for part in parts]
    lengths = [float(np.linalg.norm(part)) for part in parts]
    for place, length in enumerate(lengths):
        if not 0 < length < math.inf:
            raise ValueError(f"part {place} of the query has length {length}: it has no direction")
    # Opposite weights may leave nothing.
    total = np.sum([w * p / n for w, p, n in zip(weights, parts, lengths, strict=True)], axis=0)
    length = float(np.linalg.norm(total))
    if length < SHORTEST * max(abs(weight) for weight in weights):
        raise ValueError(
            "the parts of the query cancel each other out and leave nothing to search for"
        )
    if metric == "kl":
        return probabilities(math.sqrt(len(total)) * total / length)[None]
    return (total / length)[None].astype(np.float32)


def centered(part: NDArray[np.float64]) -> NDArray[np.float64]:
    """(D,) with the mean 0: logits are known from their probabilities up to a constant."""
    center: NDArray[np.float64] = part - part.mean()
    return center
