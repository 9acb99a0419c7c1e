"""New splits of a catalogue whose own ones were read too often: another salt, families whole."""

from __future__ import annotations

import csv
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class NewSplits:
    """How a catalogue is divided anew.

    Attributes:
        salt: another number gives another division.
        val_share: of the products, 0 to 1.
        test_share: of the products, 0 to 1.
        typed_test_share: of the typed queries, 0 to 1; the others are of val. None is trained on.
    """

    salt: int
    val_share: float = 0.1
    test_share: float = 0.1
    typed_test_share: float = 0.7

    def write(self, raw: Path, folder: Path) -> list[str]:
        """Write `products.csv` and `queries.csv` without their splits into a folder.

        Typed queries get new ones.

        Args:
            raw: folder of a catalogue of docs/data.md.
            folder: to be made.

        Returns:
            Arguments of `datamodules.prepare`, which draws the splits of products. Queries that are
            products follow theirs.
        """
        folder.mkdir(parents=True, exist_ok=True)
        _rewrite(raw / "products.csv", folder / "products.csv", lambda row: "")
        _rewrite(raw / "queries.csv", folder / "queries.csv", self.split_of_query)
        shares = [f"--val-share={self.val_share}", f"--test-share={self.test_share}"]
        return [*shares, f"--seed={self.salt}", f"--image-root={raw}"]

    def split_of_query(self, row: dict[str, str]) -> str:
        """The split of a query by its text; empty for one that is a product."""
        if row["source_product_id"]:
            return ""
        digest = hashlib.blake2b(f"{self.salt}:{row['text']}".encode(), digest_size=8).digest()
        if int.from_bytes(digest, "big") / 2**64 < self.typed_test_share:
            return "test"
        return "val"


def _rewrite(source: Path, target: Path, split_of: Callable[[dict[str, str]], str]) -> None:
    csv.field_size_limit(sys.maxsize)
    with (
        source.open(encoding="utf-8", newline="") as read,
        target.open("w", encoding="utf-8", newline="") as write,
    ):
        rows = csv.DictReader(read)
        writer = csv.DictWriter(write, rows.fieldnames or ())
        writer.writeheader()
        writer.writerows({**row, "split": split_of(row)} for row in rows)
