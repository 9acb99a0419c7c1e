"""The built-in sample catalogue: products drawn by code, brought as a shop would bring them.

    python -m datamodules.samples --output DIR

writes `products.csv`, `queries.csv`, `qrels.csv`, `images/` and `oracle.json`. What products are
made of stands in `facts`, how well they can be told apart in `oracle`, both in words in
docs/samples.md.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tritower.datamodules.samples.facts import HUES, PATTERNS, PRODUCT_TYPES, TrueProduct, colorway
from tritower.datamodules.samples.listings import Listing, draw_listings, evidence
from tritower.datamodules.samples.oracle import oracle
from tritower.datamodules.samples.pictures import photograph
from tritower.datamodules.samples.queries import Query, draw_queries
from tritower.datamodules.samples.text import STYLES
from tritower.terminal.commands import call, exit_code, make_command_parser

K = 10
"""The oracle computes recall@K."""


def write_samples(
    output: Path,
    *,
    products: int = 3000,
    seed: int = 0,
    image_size: int = 64,
    num_workers: int = 2,
    overwrite: bool = False,
) -> dict[str, float]:
    """Write a sample catalogue; the same for the same arguments, whatever the number of workers.

    Args:
        output: a new folder.
        products: how many listings; the facts are made for about 3000.
        seed: of everything random.
        image_size: side of the pictures in pixels.
        num_workers: processes that draw pictures.
        overwrite: replace an existing sample catalogue.

    Returns:
        Subset of modalities, e.g. `text+image` -> the oracle's recall@10 on the product queries of
        the test split.

    Raises:
        ValueError: `products` or `image_size` is too small.
        FileExistsError: `output` is there already and is not to be overwritten.
    """
    for name, value, least in (
        ("products", products, 100),
        ("seed", seed, 0),
        ("image_size", image_size, 16),
    ):
        if value < least:
            raise ValueError(f"{name}={value} is too small: at least {least}.")
    output = output.absolute()
    _refuse(output, overwrite)
    # Draw everything before anything is written.
    listings = draw_listings(products, seed)
    queries = draw_queries(listings, seed)
    report = oracle_report(
        listings, queries, {"products": products, "seed": seed, "image_size": image_size}
    )
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    # Write beside the output, then rename: the folder is complete or absent.
    try:
        _write(partial, listings, queries, report)
        draw_pictures(
            _pictures(listings, queries, partial / "images", image_size, seed), num_workers
        )
        shutil.rmtree(output, ignore_errors=True)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report[f"recall@{K}"]


def _write(
    folder: Path, listings: Sequence[Listing], queries: Sequence[Query], report: Mapping[str, Any]
) -> None:
    (folder / "images").mkdir(parents=True)
    _write_csv(folder / "products.csv", PRODUCT_COLUMNS, map(product_row, listings))
    _write_csv(
        folder / "queries.csv", QUERY_COLUMNS, (query_row(query, listings) for query in queries)
    )
    _write_csv(folder / "qrels.csv", QREL_COLUMNS, qrel_rows(queries, listings))
    (folder / "oracle.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def _refuse(output: Path, overwrite: bool) -> None:
    """Raise if `output` holds something that must stay."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(
            f"{output} is there already. Choose another --output, or add --overwrite."
        )
    if not (output / "oracle.json").is_file():
        raise FileExistsError(
            f"{output} is not a sample catalogue (it has no oracle.json): it is not overwritten."
        )


PRODUCT_COLUMNS = (
    "id",
    "title",
    "description",
    "category",
    "brand",
    "price",
    "currency",
    "attributes",
    "image",
    "extra_images",
    "group_id",
    "family_id",
    "split",
    "language",
)
QUERY_COLUMNS = ("query_id", "type", "text", "image", "source_product_id", "split")
QREL_COLUMNS = ("query_id", "product_id", "relevance")


def product_row(listing: Listing) -> Sequence[str]:
    """A listing in the order of `PRODUCT_COLUMNS`; what is missing is empty."""
    images = [f"images/{name}" for name in listing.pictures]
    return (
        listing.product_id,
        listing.text.title,
        listing.text.description,
        " > ".join(listing.category),
        listing.brand or "",
        "" if listing.price is None else f"{listing.price:.2f}",
        "" if listing.price is None else "USD",
        json.dumps({"features": "|".join(listing.features)}) if listing.features else "",
        "".join(images[:1]),
        "|".join(images[1:]),
        f"g{listing.group:05d}",
        f"f{listing.true_product.family:05d}",
        listing.true_product.split,
        STYLES[listing.seller].language,
    )


def query_row(query: Query, listings: Sequence[Listing]) -> Sequence[str]:
    """A query in the order of `QUERY_COLUMNS`."""
    if query.type == "image":
        image = f"images/{query.query_id}.jpg"
    else:
        image = ""
    if query.type == "product":
        source = listings[query.source].product_id
    else:
        source = ""
    return (query.query_id, query.type, query.text, image, source, query.split)


def qrel_rows(queries: Iterable[Query], listings: Sequence[Listing]) -> Iterator[Sequence[str]]:
    """The judgements in the order of `QREL_COLUMNS`, highest grades of a query first."""
    for query in queries:
        for position in np.argsort(-query.grades, kind="stable")[: np.count_nonzero(query.grades)]:
            yield query.query_id, listings[position].product_id, str(query.grades[position])


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


class Picture(NamedTuple):
    """One picture to be drawn; its own seed makes it independent of all others."""

    path: Path
    true_product: TrueProduct
    size: int
    seed: tuple[int, ...]
    second: bool = False


def _pictures(
    listings: Sequence[Listing], queries: Sequence[Query], folder: Path, size: int, seed: int
) -> list[Picture]:
    # One picture for each view of a listing; seeds make each the same in any order of drawing.
    pictures = [
        Picture(
            folder / name, listing.true_product, size, (seed, 2, number, view), second=view == 1
        )
        for number, listing in enumerate(listings)
        for view, name in enumerate(listing.pictures)
    ]
    photos = [query for query in queries if query.type == "image"]
    return pictures + [
        Picture(
            folder / f"{query.query_id}.jpg",
            listings[query.source].true_product,
            size,
            (seed, 3, number),
        )
        for number, query in enumerate(photos)
    ]


def draw_pictures(pictures: Sequence[Picture], num_workers: int) -> None:
    """Write every picture to its path; fewer than two workers are this process."""
    if num_workers < 2:
        return _watch(map(draw_picture, pictures), len(pictures))
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        _watch(pool.imap_unordered(draw_picture, pictures, chunksize=64), len(pictures))


def _watch(drawn: Iterable[None], total: int) -> None:
    for _ in track(
        drawn, "drawing pictures", total=total, console=Console(stderr=True), transient=True
    ):
        pass


def draw_picture(picture: Picture) -> None:
    """Write one picture."""
    true_product = picture.true_product
    hue, pattern = colorway(true_product.product_type, true_product.shape, true_product.colorway)
    data = photograph(
        PRODUCT_TYPES[true_product.product_type].shapes[true_product.shape],
        HUES[hue].word,
        PATTERNS[pattern].word,
        size=picture.size,
        rng=np.random.default_rng(picture.seed),
        second=picture.second,
    )
    picture.path.write_bytes(data)


def oracle_report(
    listings: Sequence[Listing], queries: Sequence[Query], settings: Mapping[str, int]
) -> dict[str, Any]:
    """What `oracle.json` holds: the oracle's recall on the product queries of the test split."""
    query_listings = np.array(
        [q.source for q in queries if q.type == "product" and q.split == "test"], np.int64
    )
    recall = oracle(
        evidence(listings), np.array([listing.group for listing in listings]), query_listings, K
    )
    return {
        "task": "the query is one listing of a product; relevant are its other listings (grade 3), "
        "among the whole catalogue",
        "split": "test",
        "queries": len(query_listings),
        f"recall@{K}": {"+".join(subset): value for subset, value in recall.items()},
        "settings": dict(settings),
    }


def make_samples(
    output: Path,
    products: int = 3000,
    seed: int = 0,
    image_size: int = 64,
    num_workers: int = 2,
    overwrite: bool = False,
) -> None:
    """Draw the sample catalogue and print what an oracle finds in it.

    Args:
        output: a new folder.
        products: number of listings.
        seed: another number draws another catalogue.
        image_size: side of the pictures in pixels.
        num_workers: processes that draw pictures.
        overwrite: replace an existing sample catalogue.
    """
    start = time.perf_counter()
    recall = write_samples(
        output,
        products=products,
        seed=seed,
        image_size=image_size,
        num_workers=num_workers,
        overwrite=overwrite,
    )
    title = "What an oracle finds: other listings of the same product"
    table = Table("modalities", f"recall@{K}", title=title)
    for subset, value in recall.items():
        table.add_row(subset, f"{value:.3f}")
    Console().print(table)
    seconds = time.perf_counter() - start
    print(f"wrote {products} products to {output} in {seconds:.1f} s")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = make_command_parser("python -m datamodules.samples", __doc__ or "", make_samples)
    options = parser.parse_args(arguments).as_dict()
    return exit_code(lambda: call(make_samples, options), (OSError, ValueError), "interrupted")
