"""What belongs together stays together.

Groups, families and equal pictures never cross splits by our doing.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritower.datamodules.prepare.splits import (
    Members,
    SplitPlan,
    SplitPolicy,
    assign_splits,
    product_leaks,
)
from tritower.datamodules.prepare.tables import CatalogueError

HALF = SplitPolicy(0.25, 0.25)


def members(*rows: tuple[str, str | None, str | None, str | None, str]) -> Members:
    """Id, group, family, split, and the pictures as letters."""
    found = Members()
    for id, group, family, split, pictures in rows:
        found.ids.append(id)
        found.groups.append(group)
        found.families.append(family)
        found.splits.append(split)
        found.pictures.append(tuple(letter.encode() for letter in pictures))
    return found


def keys() -> st.SearchStrategy[str | None]:
    return st.none() | st.sampled_from("abcdefgh")


ROWS = st.lists(
    st.tuples(
        keys(),
        keys(),
        st.sampled_from([None, None, "train", "test"]),
        st.sampled_from(["", "p", "q", "rs", "s"]),
    )
)


def numbered(rows: list[tuple[str | None, str | None, str | None, str]], splits: bool) -> Members:
    return members(
        *((f"id{n}", g, f, s if splits else None, p) for n, (g, f, s, p) in enumerate(rows))
    )


@given(ROWS)
def test_without_split_column_nothing_leaks(
    rows: list[tuple[str | None, str | None, str | None, str]],
) -> None:
    found = numbered(rows, splits=False)
    split_plan = assign_splits(found, HALF)
    assert all(leak["count"] == 0 for leak in product_leaks(found, split_plan).values())
    shared = defaultdict(set)
    for pictures, family in zip(found.pictures, split_plan.families, strict=True):
        for picture in pictures:
            shared[picture].add(family)
    assert all(len(families) == 1 for families in shared.values())


@given(ROWS)
def test_named_splits_are_kept_and_order_is_a_permutation(
    rows: list[tuple[str | None, str | None, str | None, str]],
) -> None:
    found = numbered(rows, splits=True)
    split_plan = assign_splits(found, HALF)
    assert all(
        own in (None, split) for own, split in zip(found.splits, split_plan.splits, strict=True)
    )
    assert sorted(split_plan.order) == list(range(len(found)))
    in_order = [split_plan.splits[number] for number in split_plan.order]
    assert in_order == sorted(in_order, key=("train", "val", "test").index)


def test_split_of_a_set_depends_on_its_group_only() -> None:
    one = assign_splits(
        members(("a", "g1", None, None, ""), ("b", "g1", None, None, "")), HALF
    ).splits
    for extra in ("c", "0", "zz"):
        more = members(
            (extra, None, None, None, ""), ("b", "g1", None, None, ""), ("q", "g1", None, None, "")
        )
        assert assign_splits(more, HALF).splits[1] == one[0]


def test_shares_and_seed() -> None:
    many = members(*((f"p{n}", None, None, None, "") for n in range(4000)))
    splits = assign_splits(many, SplitPolicy(0.1, 0.2)).splits
    assert splits.count("val") == pytest.approx(400, abs=80)
    assert splits.count("test") == pytest.approx(800, abs=100)
    assert assign_splits(many, SplitPolicy(0.1, 0.2)).splits == splits
    assert assign_splits(many, SplitPolicy(0.1, 0.2, seed=1)).splits != splits
    with pytest.raises(
        CatalogueError, match=r"--val-share 0.5 and --test-share 0.5 must sum to less than 1"
    ):
        SplitPolicy(0.5, 0.5).check()


def test_rows_without_a_split_follow_their_set() -> None:
    found = members(
        ("a", "g", None, "val", ""),
        ("b", "g", None, None, ""),
        ("c", None, "f", None, "p"),
        ("d", None, None, "test", "p"),
    )
    assert assign_splits(found, HALF).splits == ["val", "val", "test", "test"]


def test_equal_pictures_are_one_family() -> None:
    found = members(
        ("a", None, "f1", None, "p"),
        ("b", None, "f2", None, "pq"),
        ("c", None, None, None, "q"),
        ("d", None, "f2", None, ""),
        ("e", None, None, None, "x"),
    )
    assert assign_splits(found, HALF).families == ["f1", "f1", "f1", "f1", None]
    apart = assign_splits(found, HALF._replace(join_pictures=False))
    assert apart.families == ["f1", "f2", None, "f2", None]
    nameless = assign_splits(
        members(("a", None, None, None, "p"), ("b", None, None, None, "p")), HALF
    )
    assert nameless.families == [f"picture-{b'p'.hex()}"] * 2


def test_leaks_of_a_split_column_are_counted_and_named() -> None:
    found = members(
        ("a", "g", "f", "train", "p"),
        ("b", "g", "f", "test", "p"),
        ("c", None, "f", "val", ""),
        ("d", None, None, "val", "z"),
    )
    leaks = product_leaks(found, assign_splits(found, HALF))
    assert {kind: leak["count"] for kind, leak in leaks.items()} == {
        "group": 1,
        "family": 1,
        "picture": 1,
    }
    assert leaks["family"]["examples"] == [
        {"key": "f", "ids": {"test": ["b"], "train": ["a"], "val": ["c"]}}
    ]


def test_placeholder_pictures_join_nothing() -> None:
    found = members(*((f"p{n}", None, None, None, "x" + "ab"[n % 2] * (n < 2)) for n in range(100)))
    split_plan = assign_splits(found, HALF)
    assert split_plan.placeholders == {b"x": 100}
    assert set(split_plan.families) == {None}
    assert len(set(split_plan.splits)) == 3
    assert product_leaks(found, split_plan)["picture"]["count"] == 0
    few = members(*((f"p{n}", None, None, None, "x") for n in range(20)))
    assert assign_splits(few, HALF).placeholders == {}


def test_families_stand_beside_each_other_inside_their_split() -> None:
    found = members(*((f"p{n}", None, f"f{n % 5}", None, "") for n in range(50)))
    split_plan: SplitPlan = assign_splits(found, HALF)
    order = [(split_plan.splits[n], split_plan.families[n]) for n in split_plan.order]
    changes = sum(one != other for one, other in pairwise(order))
    assert changes == 4
    assert split_plan.largest == 10
