"""Find similar products by text, pictures and attributes.

Trained towers, one embedding, a vector index.

The folders of the checkout are packages of this one name: `towers/` is `tritower.towers`. What is
listed in `__all__` is the public interface; each name is imported when it is first used, so
`import tritower` loads neither torch nor FAISS.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tritower.datamodules.batch import Item
    from tritower.datamodules.prepare.command import prepare
    from tritower.retrieval.building.build import build_index
    from tritower.retrieval.evaluating.evaluate import Evaluation, evaluate
    from tritower.retrieval.index import ProductIndex
    from tritower.retrieval.ranking.hits import Hits
    from tritower.retrieval.vectors.embeddings import EmbeddingReader
    from tritower.towers.embed import embed
    from tritower.towers.model_folder import load_model
    from tritower.towers.two_tower import TwoTower

__version__ = "0.2.0"

_MODULES = {
    "EmbeddingReader": "tritower.retrieval.vectors.embeddings",
    "Evaluation": "tritower.retrieval.evaluating.evaluate",
    "Hits": "tritower.retrieval.ranking.hits",
    "Item": "tritower.datamodules.batch",
    "ProductIndex": "tritower.retrieval.index",
    "TwoTower": "tritower.towers.two_tower",
    "build_index": "tritower.retrieval.building.build",
    "embed": "tritower.towers.embed",
    "evaluate": "tritower.retrieval.evaluating.evaluate",
    "load_model": "tritower.towers.model_folder",
    "prepare": "tritower.datamodules.prepare.command",
}
"""The module of each public name."""

__all__ = [
    "EmbeddingReader",
    "Evaluation",
    "Hits",
    "Item",
    "ProductIndex",
    "TwoTower",
    "build_index",
    "embed",
    "evaluate",
    "load_model",
    "prepare",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted({*globals(), *__all__})
