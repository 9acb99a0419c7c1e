"""Which products belong together, and which split they go to.

What belongs together stays together.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tritower.datamodules.prepare.tables import CatalogueError

SPLIT_NAMES = ("train", "val", "test")

EXAMPLES = 50
"""Leaks of each type that are listed; all are counted."""


@dataclass
class Members:
    """What decides on splits, one entry per product, in the order of the file.

    Pictures are digests.
    """

    ids: list[str] = field(default_factory=list)
    groups: list[str | None] = field(default_factory=list)
    families: list[str | None] = field(default_factory=list)
    splits: list[str | None] = field(default_factory=list)
    pictures: list[tuple[bytes, ...]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)


class SplitPolicy(NamedTuple):
    """How products without a split get one.

    Attributes:
        val_share: of the products, 0 to 1.
        test_share: of the products, 0 to 1.
        seed: another number gives another division.
        join_pictures: products with the same picture are one family and go to one split.
    """

    val_share: float = 0.1
    test_share: float = 0.1
    seed: int = 0
    join_pictures: bool = True

    def check(self) -> None:
        """Refuse shares that leave nothing to train on.

        Raises:
            CatalogueError: naming them.
        """
        if min(self.val_share, self.test_share) < 0 or self.val_share + self.test_share >= 1:
            raise CatalogueError(
                f"--val-share {self.val_share} and --test-share {self.test_share} must sum to less "
                "than 1"
            )

    def draw(self, key: str) -> str:
        """The split of a key: always the same for the same key and seed."""
        number = _hash(f"{self.seed}:{key}")
        if number < self.test_share:
            return "test"
        if number < self.test_share + self.val_share:
            return "val"
        return "train"


class SplitPlan(NamedTuple):
    """What `assign_splits` decides.

    Attributes:
        families: of each product; products with the same picture are in one family.
        splits: of each product.
        order: product numbers, those of one split and then of one family beside each other.
        placeholders: digest of a picture too common to mean anything -> products that have it.
        largest: products in the largest set that had to stay together.
    """

    families: list[str | None]
    splits: list[str]
    order: list[int]
    placeholders: dict[bytes, int]
    largest: int


class UnionFind:
    """Disjoint sets of the numbers 0 to n - 1; a set is known by its smallest number."""

    def __init__(self, n: int) -> None:
        self.parent = list(range(n))

    def find(self, number: int) -> int:
        """The smallest number of the set that the number is in."""
        parent = self.parent
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    def join_equal(self, keys: Iterable[tuple[int, Hashable]]) -> None:
        """Join numbers that have a key in common."""
        first: dict[Hashable, int] = {}
        for number, key in keys:
            one = self.find(first.setdefault(key, number))
            other = self.find(number)
            self.parent[max(one, other)] = min(one, other)

    def roots(self) -> list[int]:
        """The smallest number of each number's set, by number."""
        return [self.find(number) for number in range(len(self.parent))]


def assign_splits(members: Members, policy: SplitPolicy) -> SplitPlan:
    """Join products that belong together, give each set a split, and put sets in order.

    A product keeps the split that its row names. Others get that of their set where a row of it
    names one, else one drawn by the hash of the set's group, else family, else id.
    """
    # A picture that very many products share is a placeholder and joins nothing.
    counts = Counter(picture for pictures in members.pictures for picture in pictures)
    # A "no picture" sign, not variants of one product.
    common = max(20, len(members) // 100)
    placeholders = {picture: count for picture, count in counts.items() if count > common}
    pictures = [
        (number, picture)
        for number, own in enumerate(members.pictures)
        for picture in own
        if policy.join_pictures and counts[picture] > 1 and picture not in placeholders
    ]
    # Families: products of one family name, and products that share a picture.
    families = UnionFind(len(members))
    families.join_equal(
        (n, family) for n, family in enumerate(members.families) if family is not None
    )
    families.join_equal(pictures)
    family_names = _family_names(members, families.roots(), dict(pictures))
    # Groups and families stay in one split.
    together = UnionFind(len(members))
    together.join_equal((n, group) for n, group in enumerate(members.groups) if group is not None)
    together.join_equal((n, family) for n, family in enumerate(family_names) if family is not None)
    roots = together.roots()
    splits = _splits(members, roots, policy)
    family_roots = families.roots()
    # Split by split, group by group.
    order = sorted(
        range(len(members)),
        key=lambda n: (SPLIT_NAMES.index(splits[n]), roots[n], family_roots[n], n),
    )
    largest = max(Counter(roots).values(), default=0)
    return SplitPlan(family_names, splits, order, placeholders, largest)


def _family_names(
    members: Members, roots: Sequence[int], pictures: dict[int, bytes]
) -> list[str | None]:
    """One name for each set.

    The first family named in it, else one made from a picture that it shares.
    """
    names: dict[int, str] = {}
    for root, family in zip(roots, members.families, strict=True):
        if family is not None:
            names.setdefault(root, family)
    for number, picture in sorted(pictures.items()):
        names.setdefault(roots[number], f"picture-{picture.hex()}")
    return [names.get(root) for root in roots]


def _splits(members: Members, roots: Sequence[int], policy: SplitPolicy) -> list[str]:
    named: dict[int, str] = {}
    keys: dict[int, tuple[int, str]] = {}
    # A set of related products is drawn by one key: its smallest group, family or id.
    for number, root in enumerate(roots):
        split = members.splits[number]
        group = members.groups[number]
        family = members.families[number]
        if split is not None:
            named.setdefault(root, split)
        if group is not None:
            key = (0, group)
        elif family is not None:
            key = (1, family)
        else:
            key = (2, members.ids[number])
        keys[root] = min(keys.get(root, key), key)
    return [
        own or named.get(root) or policy.draw(f"{keys[root][0]}:{keys[root][1]}")
        for own, root in zip(members.splits, roots, strict=True)
    ]


def leaks(entries: Iterable[tuple[Hashable, str, str]]) -> dict[str, object]:
    """Keys in more than one split, as plain data for the report.

    Args:
        entries: key, split and id of every product or query.
    """
    found: dict[Hashable, dict[str, list[str]]] = defaultdict(dict)
    # Keep a few ids of each split, for the report.
    for key, split, id in entries:
        ids = found[key].setdefault(split, [])
        if len(ids) < 3:
            ids.append(id)
    crossing = [
        {
            "key": key.hex() if isinstance(key, bytes) else str(key),
            "ids": dict(sorted(splits.items())),
        }
        for key, splits in found.items()
        if len(splits) > 1
    ]
    return {"count": len(crossing), "examples": crossing[:EXAMPLES]}


def product_leaks(members: Members, split_plan: SplitPlan) -> dict[str, dict[str, object]]:
    """Groups, families and pictures in more than one split.

    Families are those that the rows name.
    """
    # A leak is a group, family or picture with products in more than one split.
    rows = list(zip(split_plan.splits, members.ids, strict=True))
    return {
        "group": leaks(
            (g, *row) for g, row in zip(members.groups, rows, strict=True) if g is not None
        ),
        "family": leaks(
            (f, *row) for f, row in zip(members.families, rows, strict=True) if f is not None
        ),
        "picture": leaks(
            (picture, *row)
            for own, row in zip(members.pictures, rows, strict=True)
            for picture in own
            if picture not in split_plan.placeholders
        ),
    }


def _hash(text: str) -> float:
    """A number from 0 to 1 that only depends on the text."""
    return (
        int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big") / 2**64
    )
