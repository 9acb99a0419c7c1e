"""The arithmetic of the index benchmark.

Figures at equal recall, ratios, growth. Knows no files and no libraries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

OperatingPoint = Mapping[str, Any]


def at_recall(points: Sequence[OperatingPoint], level: float, name: str) -> float | None:
    """A figure at a recall, between the two points around it.

    Its logarithm is linear in recall there.

    Args:
        points: each with `recall` and `name`, in the order of recall.
        level: the recall.
        name: "qps", "p50_ms", "lists_share", ...; above 0.

    Returns:
        Where all points have more recall than the level: the figure of the lowest one, nothing is
          extrapolated. Where
        none has as much: None.
    """
    there = [(point["recall"], point[name]) for point in points if point.get(name)]
    above = next((pair for pair in there if pair[0] >= level), None)
    if above is None:
        return None
    below = next((pair for pair in reversed(there) if pair[0] < level), None)
    if below is None:
        return float(above[1])
    share = (level - below[0]) / (above[0] - below[0])
    return math.exp((1 - share) * math.log(below[1]) + share * math.log(above[1]))


def cheapest(points: Sequence[OperatingPoint], level: float) -> OperatingPoint | None:
    """The measured point of the most queries a second that has at least this recall."""
    return max((p for p in points if p["recall"] >= level), key=lambda p: p["qps"], default=None)


def ratio(ours: float | None, other: float | None) -> float | None:
    """How many times other ours is; None where either is missing."""
    if ours is None or not other:
        return None
    return ours / other


def train_add(arm: Mapping[str, Any]) -> float | None:
    """Seconds of a build up to where it could be searched.

    Without writing, digests and publishing; None for none.
    """
    build = arm["build"]
    if "train_add_s" in build:
        return float(build["train_add_s"])
    seconds = sum(
        value
        for name, value in build["seconds"].items()
        if name in ("train", "add", "build", "read")
    )
    return seconds or None


def exponent(small: tuple[float, float], large: tuple[float, float]) -> float:
    """The e of y ~ n ** e through two points (n, y)."""
    return math.log(large[1] / small[1]) / math.log(large[0] / small[0])
