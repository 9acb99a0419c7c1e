"""Prepare any catalogue.

A table of products and a folder of pictures become Parquet shards with small pictures.

    python -m datamodules.prepare products.csv --output catalogue

Which column is what is guessed, printed, and overridden with --columns. Every row is accepted or
rejected, and every fact that could not be used is named with its row. docs/catalogue.md is the
guide.
"""

from __future__ import annotations

import inspect
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser
from PIL import ImageColor

from tritower.artefacts.storage import ArtefactError, new_folder, write_json
from tritower.datamodules.images import LIMITS
from tritower.datamodules.prepare.catalogue import Reading
from tritower.datamodules.prepare.columns import Override
from tritower.datamodules.prepare.guess import guess_columns
from tritower.datamodules.prepare.pictures import PictureReader
from tritower.datamodules.prepare.preparation import Preparation
from tritower.datamodules.prepare.profile import profile
from tritower.datamodules.prepare.report import (
    ProblemLog,
    Threshold,
    columns_grid,
    console,
    files_grid,
    problems_grid,
    summary_grid,
)
from tritower.datamodules.prepare.splits import SplitPolicy
from tritower.datamodules.prepare.summary import Report, make_report, summary
from tritower.datamodules.prepare.tables import CatalogueError, Table
from tritower.datamodules.prepare.values import Decimal


def prepare(
    products: Path,
    output: Path | None = None,
    image_root: Path | None = None,
    columns: Path | None = None,
    write_columns: Path | None = None,
    pairs: Path | None = None,
    queries: Path | None = None,
    qrels: Path | None = None,
    image_size: int = 256,
    background: str = "white",
    max_pixels: int = LIMITS.max_pixels,
    max_bytes: int = LIMITS.max_bytes,
    clean_html: bool = True,
    decimal: Decimal = "auto",
    encoding: str = "utf-8",
    delimiter: str | None = None,
    quote: str = '"',
    on_bad_field: Literal["keep", "reject"] = "keep",
    max_problems: str | None = None,
    val_share: float = 0.1,
    test_share: float = 0.1,
    seed: int = 0,
    join_pictures: bool = True,
    num_workers: int | None = None,
    overwrite: bool = False,
) -> Report:
    """Prepare a catalogue and return the report that is also written as report.json.

    Args:
        products: table of products: .csv, .tsv, .jsonl or .parquet.
        output: folder to make.
        image_root: folder that the names of picture files start from; nothing outside of it is
            read. By default the folder of the products.
        columns: YAML file that says what columns are; those it does not name are guessed.
        write_columns: write the guess as such a YAML file to edit, and stop.
        pairs: table with a row for each judged pair: query text, picture or product; product_id;
            weight.
        queries: table of queries: query_id and text, image or source_product_id.
        qrels: table of judgements of these queries: query_id, product_id, relevance.
        image_size: longer side of the stored pictures, in pixels.
        background: colour that stands behind transparent pixels, by name or as #rrggbb.
        max_pixels: larger pictures are refused before they are decoded.
        max_bytes: larger picture files are refused before they are read.
        clean_html: remove HTML tags and entities from texts.
        decimal: decimal sign of numbers written as text: point (1,299.50), comma (1.299,50), or
            auto, which takes what can be read in one way only.
        encoding: of text files.
        delimiter: of CSV files; by default the one that separates their header.
        quote: character around cells that hold the delimiter; empty where cells are never quoted.
        on_bad_field: what to do with a row that has a bad picture or number: keep it without, or
            reject it.
        max_problems: fail, and publish nothing, when more rows of a file have a problem: 1% or 10.
            By default problems are recorded and never fail the run.
        val_share: of the products without a split, 0 to 1.
        test_share: of the products without a split, 0 to 1.
        seed: another number divides them in another way.
        join_pictures: products with the same picture are one family and stay in one split.
        num_workers: processes that read rows and pictures; by default as many as pay off.
        overwrite: replace an existing catalogue.

    Raises:
        CatalogueError: the files cannot become a catalogue; nothing is published.
        ArtefactError: `output` is in the way.
    """
    start = time.monotonic()
    threshold = None if max_problems is None else Threshold.parse(max_problems)
    policy = SplitPolicy(val_share, test_share, seed, join_pictures)
    policy.check()
    table, *asked = _tables([products, pairs, queries, qrels], encoding, delimiter, quote)
    assert table is not None
    profiles, rows = profile(table)
    roles = guess_columns(
        table, profiles, rows, None if columns is None else Override.load(columns)
    )
    _show(f"{table}: {rows:,} rows", columns_grid(roles, rows), "")
    if write_columns is not None:
        write_columns.write_text(
            roles.to_yaml(f"What the columns of {products.name} are."), encoding="utf-8"
        )
        _show(f"Wrote {write_columns}. Edit it, then prepare with: --columns {write_columns}")
        return {}
    if output is None:
        raise CatalogueError("--output is missing: the folder to make")
    limits = LIMITS._replace(max_pixels=max_pixels, max_bytes=max_bytes)
    root = products.parent if image_root is None else image_root
    pictures = PictureReader(root, image_size, roles.value_separator, _colour(background), limits)
    pictures.check()
    reading = Reading(pictures, decimal, clean_html, strict=on_bad_field == "reject")
    settings = {
        "image_size": image_size,
        "background": background,
        "clean_html": clean_html,
        "decimal": decimal,
    }
    settings |= {"on_bad_field": on_bad_field, **policy._asdict()}
    meta: dict[str, Any] = {"settings": settings}
    with new_folder(output, kind="catalogue", meta=meta, overwrite=overwrite) as folder:
        with _problem_log(folder, output) as log:
            run = Preparation(folder, log, reading, policy, num_workers)
            arrangement = run.products(table, roles, rows)
            splits = run.asked(arrangement.splits, *asked)
            if threshold is not None:
                log.check(threshold)
        report = make_report(run, roles, arrangement, splits) | {"settings": settings}
        write_json(folder / "report.json", report)
        meta |= {name: report[name] for name in ("rows", "accepted", "rejected", "splits")}
        meta["seconds"] = round(
            time.monotonic() - start, 1
        )  # not in a file: equal input gives an equal fingerprint
    _show(summary_grid(summary(report, meta["seconds"], output)))
    return report


def _tables(
    paths: list[Path | None], encoding: str, delimiter: str | None, quote: str
) -> list[Table | None]:
    """The user's files: products, pairs, queries and judgements."""
    given = [path for path in paths if path is not None]
    names = [path.name for path in given]
    if len(set(names)) < len(names):
        raise CatalogueError(
            f"{[str(path) for path in given]} need different names: problems are listed by file name"
        )
    if paths[3] is not None and paths[2] is None:
        raise CatalogueError("--qrels needs --queries: the queries that are judged")
    return [None if path is None else Table(path, encoding, delimiter, quote) for path in paths]


@contextmanager
def _problem_log(folder: Path, output: Path) -> Iterator[ProblemLog]:
    """The log of problems. Where a run fails, the file of problems is left beside the place of the catalogue."""
    beside = output.with_name(f"{output.name}.problems.csv")
    log = ProblemLog(folder / "problems.csv")
    try:
        with log:
            yield log
    except CatalogueError as error:
        if log.codes:
            _show(files_grid(log.files), "", problems_grid(log), "")
            shutil.copyfile(folder / "problems.csv", beside)
            raise CatalogueError(
                f"{error}. Nothing was published; the problems stand in {beside}"
            ) from None
        raise
    beside.unlink(missing_ok=True)
    _show(files_grid(log.files), "")
    if log.codes:
        _show(problems_grid(log), f"All of them: {output / 'problems.csv'}", "")


def _show(*parts: object) -> None:
    console().print(*parts, sep="\n", markup=False)


def _colour(name: str) -> tuple[int, int, int]:
    try:
        red, green, blue, *_ = ImageColor.getrgb(name)
    except ValueError:
        raise CatalogueError(f"--background {name!r} is no colour; use a name or #rrggbb") from None
    return red, green, blue


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(argv)
    try:
        prepare(**vars(options))
    except (CatalogueError, ArtefactError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was published", file=sys.stderr)
        return 130
    return 0


def _parser() -> ArgumentParser:
    """Options, types and help are those of `prepare`."""
    about = (__doc__ or "").split("\n\n")[0]
    parser = ArgumentParser(
        prog="python -m datamodules.prepare", description=about, allow_abbrev=False
    )
    types = get_type_hints(prepare)
    helps = {
        param.arg_name: param.description
        for param in docstring_parser.parse(prepare.__doc__ or "").params
    }
    for name, parameter in inspect.signature(prepare).parameters.items():
        option = f"--{name.replace('_', '-')}"
        if parameter.default is inspect.Parameter.empty:
            parser.add_argument(name, type=types[name], help=helps.get(name))
        elif parameter.default is False:
            parser.add_argument(option, action="store_true", help=helps.get(name))
        else:
            parser.add_argument(
                option, type=types[name], default=parameter.default, help=helps.get(name)
            )
    return parser
