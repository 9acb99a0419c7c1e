"""What a prepared catalogue holds.

Its text fields, its attributes and the statistics of their numbers.

`prepare` writes it as `schema.json`; the model takes it at the start of training and carries it
from then on.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

AttributeType = Literal["number", "category", "path", "set"]


@dataclass(frozen=True)
class Attribute:
    """One attribute of the catalogue.

    Attributes:
        name: as in `Item.attributes`.
        attribute_type: `number` (float), `category` (str), `path` (category levels, root first) or
            `set` (several values).
        log: the number is skewed: its statistics are those of log1p(value).
        mean: of the train split, after the log.
        std: of the train split, after the log; 1 where the values do not vary.
        minimum: smallest value of the train split, before the log.
        maximum: largest value of the train split, before the log.
        present: share of train rows that have it, 0 to 1.
    """

    name: str
    attribute_type: AttributeType
    log: bool = False
    mean: float = 0.0
    std: float = 1.0
    minimum: float = 0.0
    maximum: float = 0.0
    present: float = 0.0


@dataclass(frozen=True)
class Schema:
    """The fields of a prepared catalogue.

    Attributes:
        text: names of the text fields, in order; the first one is the title.
        images: whether products have pictures.
        attributes: in a fixed order; the attribute tower has one slot for each.
    """

    text: tuple[str, ...]
    images: bool
    attributes: tuple[Attribute, ...]

    @property
    def numbers(self) -> tuple[Attribute, ...]:
        """Attributes of type `number`, in order: the columns of `AttributeTensors.number`."""
        return tuple(a for a in self.attributes if a.attribute_type == "number")

    @property
    def categories(self) -> tuple[Attribute, ...]:
        """All other attributes, in order: the columns of `AttributeTensors.category`."""
        return tuple(a for a in self.attributes if a.attribute_type != "number")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Schema:
        """The inverse of `to_dict`."""
        return cls(
            tuple(data["text"]), data["images"], tuple(Attribute(**a) for a in data["attributes"])
        )

    def save(self, path: Path) -> None:
        """Write `schema.json`."""
        path.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Schema:
        """Read `schema.json`."""
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
