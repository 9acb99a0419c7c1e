"""Where a command finds the parts of an embeddings folder."""

from __future__ import annotations

from pathlib import Path


def one_side(embeddings: Path, side: str) -> Path:
    """EMBEDDINGS/products where `embed` made both sides, else the folder itself."""
    return embeddings / side if (embeddings / side).is_dir() else embeddings


def tuning_queries_beside(products: Path) -> Path | None:
    """The queries to tune by that `embed` made beside the products, where it did."""
    tuning = products.parent / "tuning"
    return tuning if products.name == "products" and tuning.is_dir() else None
