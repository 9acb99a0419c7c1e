"""The contract of the project: what one product is, and what a batch of them is as tensors.

Raw rows are `Item` and `Example`; tensors are `Items` and `Batch`. A query is an `Item` that has
only some modalities: a typed text, a photo, a brand and a price, or all of them take one path
through data, model and index.

NamedTuples, because Lightning moves them to the device (`None` fields included) and torch pins
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

# Preparing a catalogue reads items too, and must start without torch.
if TYPE_CHECKING:
    from torch import Tensor

Side = Literal["query", "product"]
Relation = Literal[
    "product", "group", "family", "title", "picture", "model", "category", "branch", "query"
]

MODALITIES = ("text", "image", "attribute", "lexical")
"""The order of the modality axis M everywhere: features, `present`, gate shares.

`lexical` reads texts by their exact words.
"""

RELATIONS = (
    "product",
    "group",
    "family",
    "title",
    "picture",
    "model",
    "category",
    "branch",
    "query",
)
"""The order of the relation axis R of `Batch.query_keys` and `Batch.product_keys`.

Equal keys mean: the same product, the same thing (another seller's), variants of one style, the
same normalized title, the same picture bytes, the same brand and model number, the same category,
the category above it in the tree, relevance to the same query.
"""

NO_KEY = -1
"""In `Batch.query_keys` and `Batch.product_keys`: a row without such a key equals no other row."""


class Item(NamedTuple):
    """One product or one query, raw. Absent facts are left out: no None, no empty strings.

    Attributes:
        text: field -> text: `{"title": ..., "description": ...}`; a typed query is `{"query":
            ...}`.
        images: encoded pictures (JPEG, PNG, ...); those of one product are pooled.
        attributes: name -> number (float), category (str), category path or multi-valued set
            (sequence of str).
    """

    text: Mapping[str, str] = {}
    images: Sequence[bytes] = ()
    attributes: Mapping[str, str | float | Sequence[str]] = {}


class Example(NamedTuple):
    """One training example: a query and its product.

    Attributes:
        query: often a view of a product, with some of its fields left out.
        product: its positive.
        query_keys: R keys, one for each of `RELATIONS`; those of the whole product, whatever its
            view leaves out.
        product_keys: R keys.
        weight: graded relevance, 0 to 1 (click < cart < buy); 1 by default.
        label: for labeled pairs, how similar they are, 0 to 1; None elsewhere.
        frequency: how often this product is trained on, 1 = as often as the average.
        judged_products: J `product` keys of all products that are judged relevant to this query,
            padded with `NO_KEY`.
        judgement_weights: J weights of these judgements, 0 where padded.
    """

    query: Item
    product: Item
    query_keys: Sequence[int]
    product_keys: Sequence[int]
    weight: float = 1.0
    label: float | None = None
    frequency: float = 1.0
    judged_products: Sequence[int] = ()
    judgement_weights: Sequence[float] = ()


class AttributeTensors(NamedTuple):
    """The attributes of B items.

    Attributes:
        number: (B, A_number) float32 raw values, NaN where missing.
        category: (B, A_category, V) int64 hashes of values (of every level for a path), 0 where
            padded; a row of zeros is a missing attribute.
    """

    number: Tensor
    category: Tensor


class TermTensors(NamedTuple):
    """The index terms of B items, before they are weighted (`tritower.towers.sparse_terms`).

    Attributes:
        term: (B, G) int64 numbers of different terms, 0 = padding.
        value: (B, G) float32, how often an item has the term, damped; 0 where padded.
    """

    term: Tensor
    value: Tensor


class Items(NamedTuple):
    """B items as tensors. A modality that no item has is None, and its tower does not run.

    `text` and `image` may hold features in place of tokens and pixels: a float matrix is features
    already (see `tritower.towers.feature_cache`).

    Attributes:
        text: (B, L) int64 token ids, or (B, F) float32 features.
        image: (N, 3, H, W) uint8 pixels, or (N, F) float32 features; all pictures of the batch.
        image_row: (N,) int64, ascending: the item a picture belongs to.
        attribute: see `AttributeTensors`.
        present: (B, M) bool, True = there. A row without a True is an item of which this model
            knows no modality.
        part: (B, M) bool, some of those that are there, for a second embedding of each item in
            training; None elsewhere.
        lexical: (B, G) int64 hashes of different n-grams, 0 = padding; or weighted terms, see
            `TermTensors`.
    """

    text: Tensor | None
    image: Tensor | None
    image_row: Tensor | None
    attribute: AttributeTensors | None
    present: Tensor
    part: Tensor | None = None
    lexical: Tensor | TermTensors | None = None

    def rows(self, start: int, stop: int) -> Items:
        """Items `start` to `stop` (exclusive) as views of the same tensors."""
        image = self.image
        image_row = self.image_row
        # Pictures belong to items by `image_row`, which is ascending: cut the same part of them.
        if image is not None and image_row is not None:
            first = int((image_row < start).sum())
            last = int((image_row < stop).sum())
            image = image[first:last]
            image_row = image_row[first:last] - start
            if first == last:
                image = None
                image_row = None
        return Items(
            text=None if self.text is None else self.text[start:stop],
            image=image,
            image_row=image_row,
            attribute=None
            if self.attribute is None
            else AttributeTensors(*(t[start:stop] for t in self.attribute)),
            present=self.present[start:stop],
            part=None if self.part is None else self.part[start:stop],
            lexical=_rows_of_terms(self.lexical, start, stop),
        )


def _rows_of_terms(
    terms: Tensor | TermTensors | None, start: int, stop: int
) -> Tensor | TermTensors | None:
    if isinstance(terms, TermTensors):
        return TermTensors(terms.term[start:stop], terms.value[start:stop])
    return None if terms is None else terms[start:stop]


class Batch(NamedTuple):
    """B queries and P >= B products.

    Product row i < B is the positive of query i, the rest are extra negatives.

    Attributes:
        query: B items.
        product: P items.
        query_keys: (B, R) int64, one column per relation of `RELATIONS`; -1 = none.
        product_keys: (P, R) int64; the loss turns equal keys into positive, ignored or negative by
            its configuration.
        weight: (B,) float32 graded relevance.
        label: (B,) float32 how similar the two of a labeled pair are, 0 to 1; NaN where they have
            no label; None where no pair of the batch has one.
        frequency: (P,) float32 how often each product is trained on, 1 = as often as the average, 0
            = never as an answer; None = all alike.
        judged_products: (B, J) int64 `product` keys of the judged products of each query, padded
            with -1: so a product that is relevant to several queries is a negative of none of
            them. None = no judgements.
        judgement_weights: (B, J) float32, 0 where padded; None = no judgements.
        query_present: (B,) bool, the queries that have what is compared; None = all. Others are
            compared with nothing.
        product_present: (P,) bool, likewise.
    """

    query: Items
    product: Items
    query_keys: Tensor
    product_keys: Tensor
    weight: Tensor
    label: Tensor | None = None
    frequency: Tensor | None = None
    judged_products: Tensor | None = None
    judgement_weights: Tensor | None = None
    query_present: Tensor | None = None
    product_present: Tensor | None = None


class NumberedItems(NamedTuple):
    """Items on their way to embeddings: which row of their table each one is.

    Attributes:
        items: B items.
        row: (B,) int64 row numbers.
    """

    items: Items
    row: Tensor
