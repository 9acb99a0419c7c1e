"""The small world of the sample catalogue.

Which facts a product has, and where each of them can be seen.

A *product* is what somebody makes; a *listing* is one seller's offer of it, one row of the
catalogue. Every fact of a product is in one modality only, except its type, which all three
show::

    picture     shape, colorway (a hue with a pattern)
    text        material, size
    attributes  use (the last level of the category), brand (a long tail), price (noisy)

So one modality leaves hundreds of candidates, two leave dozens, and three leave a handful
(`oracle`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SPLITS = ("train",) * 7 + ("val",) + ("test",) * 2
"""The split of a family is `SPLITS[family % 10]`.

Things of val and test are combinations that training never saw.
"""


class Words(NamedTuple):
    """How a fact is called: one word or its synonym in English, one word in Chinese."""

    word: str
    synonym: str
    chinese: str


@dataclass(frozen=True)
class ProductType:
    """One type of product.

    Attributes:
        noun: what titles call it.
        path: upper levels of its category, root first; the use is the last level.
        shapes: names of silhouettes in `pictures.SILHOUETTES`.
        materials: keys of `MATERIALS`.
        uses: what the leaves of the category are called; their features are in `FEATURES`.
        price: the typical price in USD.
    """

    noun: Words
    path: tuple[str, str]
    shapes: tuple[str, str, str]
    materials: tuple[str, str, str]
    uses: tuple[Words, Words, Words]
    price: float


PRODUCT_TYPES = (
    ProductType(
        noun=Words("mug", "cup", "杯子"),
        path=("Kitchen", "Drinkware"),
        shapes=("handled", "bowl", "tumbler"),
        materials=("ceramic", "glass", "steel"),
        uses=(
            Words("coffee", "espresso", "咖啡"),
            Words("tea", "herbal", "茶"),
            Words("camping", "hiking", "露营"),
        ),
        price=18.0,
    ),
    ProductType(
        noun=Words("lamp", "light", "灯"),
        path=("Home", "Lighting"),
        shapes=("table", "pendant", "globe"),
        materials=("paper", "brass", "glass"),
        uses=(
            Words("reading", "study", "阅读"),
            Words("bedside", "night", "床头"),
            Words("outdoor", "terrace", "户外"),
        ),
        price=55.0,
    ),
    ProductType(
        noun=Words("bag", "carryall", "包"),
        path=("Fashion", "Luggage"),
        shapes=("tote", "backpack", "crescent"),
        materials=("leather", "canvas", "felt"),
        uses=(
            Words("work", "business", "通勤"),
            Words("beach", "summer", "海滩"),
            Words("school", "student", "上学"),
        ),
        price=70.0,
    ),
    ProductType(
        noun=Words("chair", "seat", "椅子"),
        path=("Home", "Seating"),
        shapes=("upright", "armchair", "swivel"),
        materials=("wood", "steel", "rattan"),
        uses=(
            Words("dining", "supper", "餐厅"),
            Words("office", "desk", "办公"),
            Words("garden", "patio", "花园"),
        ),
        price=120.0,
    ),
)

MATERIALS = {
    "ceramic": Words("ceramic", "stoneware", "陶瓷"),
    "glass": Words("glass", "crystal", "玻璃"),
    "steel": Words("steel", "metal", "不锈钢"),
    "paper": Words("paper", "washi", "纸艺"),
    "brass": Words("brass", "copper", "黄铜"),
    "leather": Words("leather", "cowhide", "皮革"),
    "canvas": Words("canvas", "cotton", "帆布"),
    "felt": Words("felt", "wool", "毛毡"),
    "wood": Words("wood", "oak", "实木"),
    "rattan": Words("rattan", "wicker", "藤编"),
}

SIZES = (
    Words("small", "compact", "小号"),
    Words("medium", "midsize", "中号"),
    Words("large", "oversized", "大号"),
)

HUES = (
    Words("red", "crimson", "红色"),
    Words("orange", "tangerine", "橙色"),
    Words("yellow", "lemon", "黄色"),
    Words("green", "emerald", "绿色"),
    Words("turquoise", "aqua", "青色"),
    Words("blue", "navy", "蓝色"),
    Words("purple", "violet", "紫色"),
    Words("pink", "rose", "粉色"),
    Words("brown", "chocolate", "棕色"),
    Words("black", "ebony", "黑色"),
)

PATTERNS = (
    Words("plain", "solid", "纯色"),
    Words("striped", "stripes", "条纹"),
    Words("dotted", "polka", "圆点"),
    Words("checked", "checkered", "格子"),
    Words("zigzag", "chevron", "锯齿"),
    Words("two-tone", "bicolour", "拼色"),
)

FEATURES = {
    "coffee": ("double wall", "fits machines", "dishwasher safe"),
    "tea": ("with strainer", "drip-free rim", "heat resistant"),
    "camping": ("unbreakable", "with carabiner", "stackable"),
    "reading": ("dimmable", "glare-free", "flexible arm"),
    "bedside": ("touch switch", "warm glow", "USB port"),
    "outdoor": ("rainproof", "solar powered", "motion sensor"),
    "work": ("laptop sleeve", "key clip", "trolley strap"),
    "beach": ("water repellent", "sand-free base", "towel loop"),
    "school": ("name tag", "reflective trim", "bottle pocket"),
    "dining": ("wipe clean", "non-slip feet", "set of four"),
    "office": ("lumbar support", "castors", "tilt lock"),
    "garden": ("UV resistant", "folds flat", "rust-proof"),
}

CHOICES = 3
"""Shapes, materials and uses of a type, colorways of a shape, sizes.

Three of each, all equally frequent.
"""

BRANDS_PER_USE = 5
BRAND_SHARES = (
    np.arange(1, BRANDS_PER_USE + 1) ** -2.0 / (np.arange(1, BRANDS_PER_USE + 1) ** -2.0).sum()
)
"""(5,) float64: a few brands make most products and many make few (Zipf)."""

PRICE_SPREAD = 0.2
"""Standard deviation of log prices between products of one type."""

PRICE_NOISE = 0.2
"""Standard deviation of log prices between sellers of one product."""


def colorway(product_type: int, shape: int, code: int) -> tuple[int, int]:
    """Hue and pattern (positions in `HUES`, `PATTERNS`) of a shape's colorway.

    The first is plain, all hues differ.
    """
    silhouette = 3 * product_type + shape
    hue = (3 * silhouette + (0, 3, 5)[code]) % len(HUES)
    return hue, 0 if code == 0 else 1 + (silhouette + 2 * code) % (len(PATTERNS) - 1)


def brand_name(product_type: int, use: int, brand: int) -> str:
    """The name of a brand; every use of every type has brands of its own."""
    starts = ("Nor", "Vel", "Tam", "Ori", "Kes", "Lum", "Bra", "Sol", "Fen", "Hal")
    number = 12 * brand + 3 * product_type + use
    return starts[number % 10] + ("vik", "mora", "dale", "quist", "berg", "ando")[number // 10]


class TrueProduct(NamedTuple):
    """A product that is sold. All fields but `log_price` are codes or numbers of families."""

    family: int
    product_type: int
    shape: int
    colorway: int
    material: int
    size: int
    use: int
    brand: int
    log_price: float

    @property
    def split(self) -> str:
        """The split of the product's family."""
        return SPLITS[self.family % len(SPLITS)]

    def words(self) -> Mapping[str, Words]:
        """The words of the facts that queries may hold: fact -> words, the type first."""
        product_type = PRODUCT_TYPES[self.product_type]
        hue, pattern = colorway(self.product_type, self.shape, self.colorway)
        return {
            "type": product_type.noun,
            "hue": HUES[hue],
            "pattern": PATTERNS[pattern],
            "material": MATERIALS[product_type.materials[self.material]],
            "size": SIZES[self.size],
            "use": product_type.uses[self.use],
        }
