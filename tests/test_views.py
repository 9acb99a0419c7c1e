"""Views: what is left out of an item in training."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritower.datamodules.batch import Item
from tritower.datamodules.views import Views

chances = st.sampled_from([0.0, 0.3, 0.9, 1.0])
items = st.builds(
    Item,
    text=st.dictionaries(st.sampled_from(["title", "description", "brand"]), st.just("x")),
    images=st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=3).map(tuple),
    attributes=st.dictionaries(st.sampled_from(["price", "size", "color"]), st.just(1.0)),
)

FULL = Item(
    {"title": "t", "description": "d"},
    (b"1", b"2", b"3"),
    {"price": 1.0, "brand": "b", "size": "s"},
)


@given(item=items, modality=chances, field=chances, picture=chances, seed=st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_a_view_is_a_part_of_the_item_and_never_empty(
    item: Item, modality: float, field: float, picture: float, seed: int
) -> None:
    view = Views(modality, field, picture)(item, np.random.default_rng(seed))
    assert view.text.items() <= dict(item.text).items()
    assert view.attributes.items() <= dict(item.attributes).items()
    assert set(view.images) <= set(item.images)
    assert any(map(bool, view)) == any(map(bool, item))


def test_the_same_state_gives_the_same_view() -> None:
    views = Views(0.5, 0.5, 0.5)
    first, again = (
        [views(FULL, np.random.default_rng(seed)) for seed in range(50)] for _ in range(2)
    )
    assert first == again
    assert len({repr(view) for view in first}) > 20


def test_without_dropout_everything_stays() -> None:
    view = Views(0, 0, 0)(FULL, np.random.default_rng(0))
    assert view == FULL


def test_with_full_dropout_one_thing_stays() -> None:
    for seed in range(20):
        view = Views(1, 1, 1)(FULL, np.random.default_rng(seed))
        assert len(view.text) + len(view.images) + len(view.attributes) == 1


def test_rates_are_near_their_settings() -> None:
    views, rng, n = (
        Views(modality_dropout=0.2, field_dropout=0.1, picture_dropout=0.3),
        np.random.default_rng(0),
        4000,
    )
    seen = [views(FULL, rng) for _ in range(n)]
    for kept in (
        [view.text for view in seen],
        [view.images for view in seen],
        [view.attributes for view in seen],
    ):
        left_out = sum(not facts for facts in kept) / n
        assert left_out == pytest.approx(0.2, abs=0.02)  # all three at once (0.8 %) gives one back
    with_attributes = [view.attributes for view in seen if view.attributes]
    assert np.mean(["price" not in facts for facts in with_attributes]) == pytest.approx(
        0.1, abs=0.02
    )
    with_pictures = [view.images for view in seen if view.images]
    assert np.mean([b"2" not in images for images in with_pictures]) == pytest.approx(0.3, abs=0.03)


def test_order_is_kept() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        view = Views(0, 0.5, 0.5)(FULL, rng)
        assert list(view.images) == sorted(view.images)
        assert list(view.attributes) == [
            name for name in FULL.attributes if name in view.attributes
        ]


@pytest.mark.parametrize("name", ["modality_dropout", "field_dropout", "picture_dropout"])
def test_what_is_no_chance_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=1.5"):
        Views(**{name: 1.5})
