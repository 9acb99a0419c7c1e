"""A query given on the command line: text, pictures, attributes, products or a vector."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from tritower.datamodules.batch import Item
    from tritower.retrieval.index import ProductIndex
    from tritower.retrieval.more_like_this import WeightedProduct
    from tritower.retrieval.products.catalogue import Card, PreparedCatalogue


@dataclass(frozen=True)
class QueryOptions:
    """A query: any mix of text, pictures, attributes, products and a vector.

    Attributes:
        model: model folder; the one that made the embeddings when not given.
        text: what a customer types.
        image: picture files, of one thing.
        attribute: attributes as name=value, e.g. brand=Acme price=59.9 "category=Shoes > Boots"
            "tags=red|wool".
        more_like: ids of products, each as ID or ID=WEIGHT; they and all of their groups are left
            out of the hits.
        less_like: ids of products to lead away from, in the same way.
        less_like_text: a text to lead away from.
        vector: .npy file with one vector.
        normalize: scale given vectors of any length to length 1.
    """

    model: Path | None = None
    text: str = ""
    image: list[Path] = field(default_factory=list)
    attribute: list[str] = field(default_factory=list)
    more_like: list[str] = field(default_factory=list)
    less_like: list[str] = field(default_factory=list)
    less_like_text: str = ""
    vector: Path | None = None
    normalize: bool = False

    @property
    def has_item(self) -> bool:
        """Whether there is something for the model to encode."""
        return bool(self.text or self.image or self.attribute)

    @property
    def is_empty(self) -> bool:
        """Whether there is no query at all."""
        products = self.more_like or self.less_like
        return not (self.has_item or products or self.less_like_text or self.vector)


class ParsedQuery(NamedTuple):
    """A query as it is searched.

    Attributes:
        vector: (1, D) float32.
        query_type: "text", "image", ...; None for a mix.
        products: ids of the products to be like or unlike.
        card: the query as it is shown.
    """

    vector: np.ndarray
    query_type: str | None
    products: list[str]
    card: Card


def parse_query(
    index: ProductIndex, options: QueryOptions, catalogue: PreparedCatalogue | None
) -> ParsedQuery:
    """The vector of a query: the weighted sum of its parts."""
    from tritower.datamodules.batch import Item
    from tritower.retrieval.more_like_this import combined
    from tritower.retrieval.vectors.checks import as_queries

    products = parse_products(index, options.more_like, 1) + parse_products(
        index, options.less_like, -1
    )
    card = None
    items: list[Item] = []
    weights: list[float] = []
    # Everything that is searched for is a vector with a weight: +1 or -1.
    if options.has_item:
        items.append(parse_item(index, options))
        weights.append(1.0)
        card = query_card_of_item(items[0])
    if options.less_like_text:
        items.append(Item({"query": options.less_like_text}, [], {}))
        weights.append(-1.0)
    vectors = encode(index, options.model, items) if items else []
    for product, weight in products:
        vectors.append(as_queries(index.vector_of(product), index.metric))
        weights.append(weight)
    if options.vector is not None:
        vectors.append(read_vector(options.vector, index, options.normalize))
        weights.append(1.0)
    # One part is searched as it is; several are combined.
    if weights == [1.0]:
        vector = vectors[0].reshape(1, -1)
    else:
        vector = combined(vectors, weights, index.metric)
    if card is None:
        card = query_card_of_product(catalogue, products[0].product_id if products else "")
    more = bool(products or options.less_like_text)
    query_type = type_of_query(options.text, options.image, options.attribute, more)
    return ParsedQuery(vector, query_type, [product for product, _ in products], card)


def parse_item(index: ProductIndex, options: QueryOptions) -> Item:
    """The query item that the model encodes.

    Raises:
        ValueError: an attribute that the model does not know, or a picture that cannot be read.
    """
    from tritower.datamodules.batch import Item
    from tritower.datamodules.prepare.catalogue import parse_attribute
    from tritower.datamodules.schema import Schema
    from tritower.retrieval.index_origins import find_model

    schema = Schema.load(find_model(index, options.model) / "schema.json")
    by_name = {attribute.name: attribute for attribute in schema.attributes}
    attributes = {}
    # Values are read as the catalogue's were.
    for text in options.attribute:
        name, equals, value = text.partition("=")
        if not equals or name not in by_name:
            choices = ", ".join(by_name) or "none"
            raise ValueError(f"attribute {text!r}; expected name=value with one of {choices}")
        attributes[name] = parse_attribute(by_name[name], value)
    pictures = [read_picture(file) for file in options.image]
    return Item({"query": options.text} if options.text else {}, pictures, attributes)


def encode(index: ProductIndex, model: Path | None, items: list[Item]) -> list[np.ndarray]:
    """The vectors of query items, each (D,) float32."""
    from tritower.retrieval.index_origins import find_model

    folder = find_model(index, model)

    from tritower.towers.model_folder import load_model

    return list(load_model(folder).encode(items, side="query"))


def read_picture(file: Path) -> bytes:
    """A user's photo, made small as those of the catalogue were.

    Queries and products are seen alike.
    """
    from tritower.datamodules.images import ImageError, downsize

    try:
        return downsize(file.read_bytes())
    except ImageError as error:
        raise ValueError(f"{file}: {error}") from None


def parse_products(index: ProductIndex, texts: list[str], sign: int) -> list[WeightedProduct]:
    """Products to be like, or unlike, with their weights."""
    import pyarrow as pa

    from tritower.retrieval.more_like_this import parse_weighted_product

    def is_id(text: str) -> bool:
        return bool((index.rows_of(pa.array([text])) >= 0).all())

    return [parse_weighted_product(text, is_id, sign=sign) for text in texts]


def query_card_of_item(item: Item) -> Card:
    """What a page shows as the query."""
    from tritower.retrieval.products.catalogue import Card

    return Card(item.text, item.attributes, item.images)


def query_card_of_product(catalogue: PreparedCatalogue | None, more_like: str) -> Card:
    """What a page shows as the query where products or a vector were given."""
    from tritower.retrieval.products.catalogue import Card

    if catalogue and more_like:
        known = catalogue.products([more_like], images=True)
    else:
        known = {}
    return known.get(
        more_like, Card({"query": f"like {more_like}"} if more_like else {"query": "a vector"})
    )


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


def type_of_query(text: str, image: list[Path], attribute: list[str], more: bool) -> str | None:
    """The type of a query of one modality; None for a mix of several."""
    shown = {"text": text, "image": image, "product:attribute": attribute, "product": more}
    query_types = [query_type for query_type, product_id in shown.items() if product_id]
    if len(query_types) == 1:
        return query_types[0]
    return None
