"""A data module set up without a trainer."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.support.catalogues import SCHEMA
from tritower.datamodules.held_out import HeldOutOptions
from tritower.datamodules.preprocess import ItemPreprocess, Preprocess
from tritower.datamodules.products import LoaderOptions, ProductDataModule
from tritower.datamodules.training_rows import ExampleOptions
from tritower.towers.attribute import AttributePreprocess
from tritower.towers.image import PicturePreprocess
from tritower.towers.text import HashedWords, Template, TextPreprocess

GROUPS = {"examples": ExampleOptions, "validation": HeldOutOptions, "loader": LoaderOptions}


def data_module(
    catalogue: Path, rank: int = 0, num_ranks: int = 1, **settings: Any
) -> ProductDataModule:
    """A data module as a Trainer would set it up; options by their names."""
    groups = {}
    for name, kind in GROUPS.items():
        own = {f.name: settings.pop(f.name) for f in fields(kind) if f.name in settings}
        groups[name] = kind(**own)
    data = ProductDataModule(catalogue, **{"batch_size": 16, **settings, **groups})
    data.trainer = SimpleNamespace(global_rank=rank, world_size=num_ranks, accelerator=None)
    sides = [
        ItemPreprocess(
            side,
            TextPreprocess(HashedWords(), Template(None)),
            PicturePreprocess(8, augment=True),
            AttributePreprocess(SCHEMA),
        )
        for side in ("query", "product")
    ]
    data.preprocess = Preprocess(*sides)
    data.prepare_data()
    data.setup("fit")
    return data
