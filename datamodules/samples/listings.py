"""Things, the listings that offer them, and what each listing shows of its product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tritower.datamodules.samples.facts import (
    BRAND_SHARES,
    BRANDS_PER_USE,
    CHOICES,
    FEATURES,
    PRICE_NOISE,
    PRICE_SPREAD,
    PRODUCT_TYPES,
    TrueProduct,
    brand_name,
)
from tritower.datamodules.samples.oracle import SHARES, UNKNOWN, Evidence
from tritower.datamodules.samples.text import STYLES, Text, write_text

SELLERS_PER_PRODUCT = {1: 0.08, 2: 0.42, 3: 0.33, 4: 0.17}
"""How many listings a product has, and how often."""

MISSING = {"picture": 0.04, "description": 0.12, "brand": 0.08, "price": 0.06, "features": 0.3}
"""How often a listing lacks a field."""

SECOND_VIEW = 0.25
"""How often a listing with a picture has another one."""


class Listing(NamedTuple):
    """One row of the catalogue: one seller's offer of a product.

    Attributes:
        product_id: opaque.
        group: number of the product; the listings of one product are the same product.
        true_product: what is offered.
        seller: position in `text.STYLES`.
        text: title and description.
        pictures: file names under `images/`, the main one first.
        brand: None where the seller gives none.
        price: USD; None where the seller gives none.
        features: what the product is praised for, chosen from those of its use.
    """

    product_id: str
    group: int
    true_product: TrueProduct
    seller: int
    text: Text
    pictures: tuple[str, ...]
    brand: str | None
    price: float | None
    features: tuple[str, ...]

    @property
    def category(self) -> tuple[str, str, str]:
        """Three levels, root first; the last one is the use."""
        product_type = PRODUCT_TYPES[self.true_product.product_type]
        use = product_type.uses[self.true_product.use].word.capitalize()
        return (*product_type.path, f"{use} {product_type.noun.word}s")


class Offer(NamedTuple):
    """Who sells which product."""

    group: int
    true_product: TrueProduct
    seller: int


def draw_listings(products: int, seed: int) -> list[Listing]:
    """That many listings in random order."""
    rng = np.random.default_rng((seed, 0))
    offers: list[Offer] = []
    family = group = 0
    # Families of products, each product sold by a few sellers.
    while len(offers) < products:
        for true_product in draw_family(family, rng):
            sellers = rng.choice(list(SELLERS_PER_PRODUCT), p=list(SELLERS_PER_PRODUCT.values()))
            offers += [
                Offer(group, true_product, int(seller))
                for seller in rng.permutation(len(STYLES))[:sellers]
            ]
            group += 1
        family += 1
    order = rng.permutation(products)
    return [_listing(f"p{number:05d}", offers[i], rng) for number, i in enumerate(order)]


def draw_family(family: int, rng: np.random.Generator) -> list[TrueProduct]:
    """One to three variants of one style: they differ in colorway, or in size, and in price."""
    product_type, shape, material, use = (
        int(rng.integers(count)) for count in (len(PRODUCT_TYPES), CHOICES, CHOICES, CHOICES)
    )
    # A family shares everything but color or size.
    brand = int(rng.choice(BRANDS_PER_USE, p=BRAND_SHARES))
    colorways = rng.permutation(CHOICES).tolist()
    sizes = rng.permutation(CHOICES).tolist()
    if rng.random() < 0.6:
        variants = [(colorway, sizes[0]) for colorway in colorways]
    else:
        variants = [(colorways[0], size) for size in sizes]
    return [
        TrueProduct(
            family,
            product_type,
            shape,
            colorway,
            material,
            size,
            use,
            brand,
            _log_price(product_type, rng),
        )
        for colorway, size in variants[: rng.integers(1, len(variants) + 1)]
    ]


def _log_price(product_type: int, rng: np.random.Generator) -> float:
    return float(np.log(PRODUCT_TYPES[product_type].price) + PRICE_SPREAD * rng.standard_normal())


def _listing(product_id: str, offer: Offer, rng: np.random.Generator) -> Listing:
    # Fields are missing at random, prices are noisy.
    true_product = offer.true_product
    # Each field is missing with its own probability.
    missing = {field for field, share in MISSING.items() if rng.random() < share}
    use = PRODUCT_TYPES[true_product.product_type].uses[true_product.use].word
    pictures = [
        f"{product_id}.jpg",
        *([f"{product_id}_2.jpg"] if rng.random() < SECOND_VIEW else []),
    ]
    # Sellers differ in price, and each lists a few of the features of the product's use.
    price = round(float(np.exp(true_product.log_price + PRICE_NOISE * rng.standard_normal())), 2)
    features = rng.permutation(FEATURES[use])[: rng.integers(1, 3)].tolist()
    return Listing(
        product_id=product_id,
        group=offer.group,
        true_product=true_product,
        seller=offer.seller,
        text=write_text(true_product.words(), offer.seller, "description" not in missing, rng),
        pictures=() if "picture" in missing else tuple(pictures),
        brand=None
        if "brand" in missing
        else brand_name(true_product.product_type, true_product.use, true_product.brand),
        price=None if "price" in missing else price,
        features=() if "features" in missing else tuple(features),
    )


def evidence(listings: Sequence[Listing]) -> dict[str, Evidence]:
    """Modality -> what each listing shows there, as the oracle reads it."""
    truth = {
        fact: np.array([getattr(listing.true_product, fact) for listing in listings], np.int64)
        for fact in SHARES
    }
    everywhere = np.ones(len(listings), bool)
    pictured = np.array([bool(listing.pictures) for listing in listings])
    branded = np.array([listing.brand is not None for listing in listings])
    written = {
        fact: np.array([fact in listing.text.shown for listing in listings])
        for fact in ("material", "size")
    }
    # Which facts each modality shows.
    shown = {
        "text": {"product_type": everywhere, **written},
        "image": {"product_type": pictured, "shape": pictured, "colorway": pictured},
        "attribute": {"product_type": everywhere, "use": everywhere, "brand": branded},
    }
    nothing = np.full(len(listings), np.nan)
    result = {}
    for modality, facts in shown.items():
        result[modality] = Evidence(
            {fact: np.where(facts.get(fact, ~everywhere), truth[fact], UNKNOWN) for fact in SHARES},
            _prices(listings) if modality == "attribute" else nothing,
        )
    return result


def _prices(listings: Sequence[Listing]) -> np.ndarray:
    spread = np.hypot(PRICE_SPREAD, PRICE_NOISE)
    return np.array(
        [
            np.nan
            if listing.price is None
            else np.log(listing.price / PRODUCT_TYPES[listing.true_product.product_type].price)
            / spread
            for listing in listings
        ]
    )
