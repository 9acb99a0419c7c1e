"""A query given on the command line: text, pictures, attributes, products or a vector."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from tritower.retrieval.index import ProductIndex
    from tritower.retrieval.more_like_this import Weighted
    from tritower.retrieval.products.catalogue import Card, PreparedCatalogue


def encode_query(
    index: ProductIndex, model: Path | None, text: str, image: list[Path], attribute: list[str]
) -> tuple[list[np.ndarray], Card]:
    """The vector of one query item, and what to show of it."""
    from tritower.retrieval.products.catalogue import Card
    from tritower.retrieval.showing.present import find_model

    folder = find_model(index, model)

    from tritower.datamodules.batch import Item
    from tritower.datamodules.prepare.catalogue import parse_attribute
    from tritower.datamodules.schema import Schema
    from tritower.towers.model_folder import load_model

    known = {a.name: a for a in Schema.load(folder / "schema.json").attributes}
    attributes = {}
    for fact in attribute:
        name, equals, value = fact.partition("=")
        if not equals or name not in known:
            raise ValueError(
                f"attribute {fact!r}; expected name=value with one of {', '.join(known) or 'none'}"
            )
        attributes[name] = parse_attribute(known[name], value)
    item = Item({"query": text} if text else {}, [read_picture(file) for file in image], attributes)
    return list(load_model(folder).encode([item], side="query")), Card(
        *item[:1], item.attributes, item.images
    )


def read_picture(file: Path) -> bytes:
    """A user's photo, made small as those of the catalogue were.

    Queries and products are seen alike.
    """
    from tritower.datamodules.images import ImageError, downsize

    try:
        return downsize(file.read_bytes())
    except ImageError as error:
        raise ValueError(f"{file}: {error}") from None


def parse_products(index: ProductIndex, texts: list[str], sign: int) -> list[Weighted]:
    """Products to be like, or unlike, with their weights."""
    import pyarrow as pa

    from tritower.retrieval.more_like_this import parse_weighted

    def is_id(text: str) -> bool:
        return bool((index.rows_of(pa.array([text])) >= 0).all())

    return [parse_weighted(text, is_id, sign=sign) for text in texts]


def query_card_of_product(catalogue: PreparedCatalogue | None, like: str) -> Card:
    """What a page shows as the query where products or a vector were given."""
    from tritower.retrieval.products.catalogue import Card

    known = catalogue.products([like], images=True) if catalogue and like else {}
    return known.get(like, Card({"query": f"like {like}"} if like else {"query": "a vector"}))


def read_vector(file: Path, index: ProductIndex, normalize: bool) -> np.ndarray:
    """(D,) float32 from a .npy file with one vector.

    Raises:
        ValueError: the file is no .npy file, or holds several vectors or another dimension.
    """
    import numpy as np

    from tritower.retrieval.vectors.checks import checked_vectors

    try:
        array = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is not a .npy file of numbers: {error}") from None
    array = array[None] if array.ndim == 1 else array
    if array.ndim == 2 and len(array) != 1:
        raise ValueError(
            f"{file} holds {len(array)} vectors: search for many with queries and output"
        )
    return checked_vectors(
        array, dim=index.dim, metric=index.metric, normalize=normalize, where=str(file)
    )[0]


def query_type(text: str, image: list[Path], attribute: list[str], more: bool) -> str | None:
    """The type of a query of one modality; None for a mix, which gets the settings of the hardest."""
    shown = {"text": text, "image": image, "product:attribute": attribute, "product": more}
    kinds = [kind for kind, what in shown.items() if what]
    return kinds[0] if len(kinds) == 1 else None
