"""Pretrained towers as they are before training.

Their features are part of the floor that training has to beat.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tritower.datamodules.batch import Items
from tritower.towers.encoder import Encoder, features_of, mean_by_row
from tritower.towers.image import ImageTower
from tritower.towers.text import TextTower
from tritower.towers.tower import Tower

UntrainedTowers = Mapping[str, Tower]
"""Name of a tower of an encoder -> the pretrained tower.

The encoder's own one where it is frozen.
"""


def untrained_towers(encoder: Encoder) -> dict[str, Tower]:
    """The pretrained towers of an encoder that was not trained yet.

    Copies of those that training would change.
    """
    result = {}
    for name, tower in encoder.towers.items():
        if tower.pretrained and isinstance(tower, TextTower | ImageTower):
            result[name] = tower if tower.frozen else copied(tower)
    return result


def copied(tower: Tower) -> Tower:
    """A frozen copy."""
    copy_of_tower = copy.deepcopy(tower)
    copy_of_tower.freeze()
    return copy_of_tower


def untrained_features(
    encoder: Encoder, towers: UntrainedTowers, items: Items
) -> tuple[Items, dict[str, Tensor]]:
    """Features of pretrained towers, and the items for the encoder.

    A frozen tower runs once: its features take the place of its inputs in the items.

    Args:
        encoder: encoder of the items' side.
        towers: of that encoder.
        items: B items.

    Returns:
        The items, and name of a tower -> (B, F) float32 unit vectors, zeros where an item lacks the
        modality.
    """
    found: dict[str, Tensor] = {}
    for name, tower in towers.items():
        inputs = getattr(items, name)
        if inputs is None:
            found[name] = items.present.new_zeros(
                len(items.present), tower.out_dim, dtype=encoder.absent.dtype
            )
            continue
        features = features_of(tower, inputs)
        # The encoder's own tower: its features are reused in its forward pass.
        if tower is encoder.towers[name]:
            replaced: dict[str, Any] = {name: features}
            items = items._replace(**replaced)
        if name == "image":
            assert items.image_row is not None
            features = mean_by_row(features, items.image_row, len(items.present))
        column = encoder.columns[list(encoder.towers).index(name)]
        there = items.present[:, column].unsqueeze(-1)
        found[name] = F.normalize(features.float(), dim=-1) * there
    return items, found


def as_modules(towers: UntrainedTowers, encoder: nn.Module) -> nn.ModuleDict:
    """The towers that are not the encoder's own, so that they move to its device."""
    own = set(encoder.modules())
    return nn.ModuleDict({name: tower for name, tower in towers.items() if tower not in own})
