"""The numbers of a catalogue, as its schema describes them."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import numpy as np

from tritower.datamodules.prepare.columns import Column
from tritower.datamodules.schema import Attribute

SKEWED = 1.0
"""A number more skewed than this, and less so after a logarithm, is described by its log."""


class AttributeStatistics:
    """Counts what the products of the train split have.

    Where there are none, what all products have.

    Args:
        columns: of the attributes, in order.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = columns
        self.rows = {True: 0, False: 0}
        self.present = {(column.name, train): 0 for column in columns for train in (True, False)}
        self.values = {key: array("d") for key in self.present}

    def add(self, attributes: Mapping[str, object], train: bool) -> None:
        """Count one product."""
        self.rows[train] += 1
        for name, value in attributes.items():
            self.present[name, train] += 1
            if isinstance(value, float):
                self.values[name, train].append(value)

    def attributes(self) -> tuple[Attribute, ...]:
        """The attributes of the schema."""
        return tuple(map(self._attribute, self.columns))

    def _attribute(self, column: Column) -> Attribute:
        train = self.rows[True] > 0
        share = self.present[column.name, train] / max(self.rows[train], 1)
        attribute_type = "number" if column.role == "price" else column.role
        assert attribute_type in ("number", "category", "path", "set")
        # The scale of a number follows from the train split; skewed ones are described by their
        # log.
        described = np.array(self.values[column.name, train])
        if attribute_type != "number" or not len(described):
            return Attribute(column.name, attribute_type, present=share)
        others = self.values[column.name, not train]
        log = min(described.min(), min(others, default=0.0)) >= 0 and _is_skewed(described)
        scaled = np.log1p(described) if log else described
        return Attribute(
            column.name,
            attribute_type,
            log=bool(log),
            mean=float(scaled.mean()),
            std=float(scaled.std()) or 1.0,
            minimum=float(described.min()),
            maximum=float(described.max()),
            present=share,
        )


def _is_skewed(values: np.ndarray) -> bool:
    skewness = _skewness(values)
    return skewness > SKEWED and abs(_skewness(np.log1p(values))) < skewness


def _skewness(values: np.ndarray) -> float:
    """The third standardized moment; 0 where the values do not vary."""
    centered = values - values.mean()
    deviation = centered.std()
    if deviation > 0:
        return float((centered**3).mean() / deviation**3)
    return 0.0
