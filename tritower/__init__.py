"""Find similar products by text, pictures and attributes.

Trained towers, one embedding, a vector index.

The packages of the project are imported under this one name: `tritower.towers`,
  `tritower.retrieval`.
"""

from pathlib import Path

# In a checkout the packages are folders beside this one; in a wheel they lie inside of it.
_CHECKOUT = Path(__file__).parent.parent
if (_CHECKOUT / "pyproject.toml").is_file():
    __path__.append(str(_CHECKOUT))
