"""Queries of the demo with their first hits, as one picture.

    python -m benchmarks.contact_sheet --demo demo --output docs/pictures/search.png

Each row is a query (a typed text, a photo, a product) and its first hits, best first.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.command import run
from tritower import Item, ProductIndex, load_model
from tritower.retrieval.products.catalogue import Card, PreparedCatalogue

NUM_HITS = 6
TEXT = "brown striped mug"


def main(*, demo: Path = Path("demo"), output: Path = Path("docs/pictures/search.png")) -> None:
    """Draw three queries of the demo, each with its first hits.

    Args:
        demo: the folder that `make demo` has written.
        output: the picture, PNG.
    """
    catalogue = PreparedCatalogue(demo / "catalogue")
    index = ProductIndex.open(demo / "index")
    model = load_model(demo / "fused" / "model")

    # The second and third query are hits of the first: a photo alone, and the whole product.
    first = _hits(index, model, catalogue, Item({"query": TEXT}))
    photo = Item(images=first[0].images[:1])
    product = Item(first[1].text, first[1].images, first[1].attributes)
    rows = [
        (f'text "{TEXT}"', None, first),
        ("a photo alone", first[0], _hits(index, model, catalogue, photo)),
        ("a whole product", first[1], _hits(index, model, catalogue, product)),
    ]
    _draw(rows, output)
    print(f"Wrote {output}")


def _hits(index: ProductIndex, model: Any, catalogue: PreparedCatalogue, item: Item) -> list[Card]:
    """The first hits of one query, best first."""
    hits = index.search(model.encode([item]), k=NUM_HITS)
    ids = [product_id for product_id in index.ids(hits.rows[0]) if product_id is not None]
    cards = catalogue.products(ids, images=True)
    return [cards[product_id] for product_id in ids]


def _draw(rows: list[tuple[str, Card | None, list[Card]]], output: Path) -> None:
    """One line of pictures for each query."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(rows), NUM_HITS + 1, figsize=(1.5 * (NUM_HITS + 1), 1.75 * len(rows))
    )
    for axis in axes.flat:
        axis.axis("off")
    for line, (caption, query, hits) in zip(axes, rows, strict=True):
        # The query on the left, its caption in place of a picture where it has none.
        if query is None:
            line[0].text(0.5, 0.5, caption.replace(" ", "\n", 1), ha="center", va="center")
        else:
            line[0].imshow(_picture(query))
            line[0].set_title(caption, fontsize=9)
        for axis, hit in zip(line[1:], hits, strict=False):
            axis.imshow(_picture(hit))
            axis.set_title(next(iter(hit.text.values()))[:24], fontsize=7)
    figure.tight_layout()
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


def _picture(card: Card) -> Image.Image:
    """The first picture of a product; blank where it has none."""
    if card.images:
        return Image.open(io.BytesIO(card.images[0])).convert("RGB")
    return Image.new("RGB", (8, 8), "white")


if __name__ == "__main__":
    run("benchmarks.contact_sheet", main, __doc__ or "")
