"""Prepare any catalogue.

A table of products and a folder of pictures become Parquet shards with small pictures.

    python -m datamodules.prepare products.csv --output catalogue

Which column is what is guessed, printed, and overridden with --columns. Every row is accepted or
rejected, and every fact that could not be used is named with its row. docs/catalogue.md is the
guide.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import ImageColor

from tritower.artefacts.storage import ArtefactError, new_folder, write_json
from tritower.datamodules.images import LIMITS
from tritower.datamodules.prepare.catalogue import FieldReader
from tritower.datamodules.prepare.columns import Columns, Override
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
from tritower.terminal.commands import call, exit_code, make_command_parser

USER_ERRORS = (CatalogueError, ArtefactError, OSError)


@dataclass(frozen=True)
class JudgedFiles:
    """Queries and judgements.

    Attributes:
        pairs: table with a row for each judged pair: query text, picture or product; product_id;
            weight.
        queries: table of queries: query_id and text, image or source_product_id.
        qrels: table of judgements of these queries: query_id, product_id, relevance.
    """

    pairs: Path | None = None
    queries: Path | None = None
    qrels: Path | None = None


@dataclass(frozen=True)
class ColumnOptions:
    """The roles of columns.

    Attributes:
        columns: YAML file with the roles of columns; those it does not name are guessed.
        write_columns: write the guess as such a YAML file to edit, and stop.
    """

    columns: Path | None = None
    write_columns: Path | None = None


@dataclass(frozen=True)
class PictureOptions:
    """How pictures are read and stored.

    Attributes:
        image_root: folder that the names of picture files are relative to; nothing outside of it
            is read. By default the folder of the products.
        image_size: longer side of the stored pictures, in pixels.
        background: color behind transparent pixels, by name or as #rrggbb.
        max_pixels: larger pictures are refused before they are decoded.
        max_bytes: larger picture files are refused before they are read.
        join_pictures: products with the same picture are one family and stay in one split.
    """

    image_root: Path | None = None
    image_size: int = 256
    background: str = "white"
    max_pixels: int = LIMITS.max_pixels
    max_bytes: int = LIMITS.max_bytes
    join_pictures: bool = True


@dataclass(frozen=True)
class TextOptions:
    """How text files and their cells are read.

    Attributes:
        clean_html: remove HTML tags and entities from texts.
        decimal: decimal sign of numbers written as text: point (1,299.50), comma (1.299,50), or
            auto, which takes what can be read in one way only.
        encoding: of text files.
        delimiter: of CSV files; by default the one that separates their header.
        quote: character around cells that hold the delimiter; empty where cells are never quoted.
    """

    clean_html: bool = True
    decimal: Decimal = "auto"
    encoding: str = "utf-8"
    delimiter: str | None = None
    quote: str = '"'


@dataclass(frozen=True)
class SplitOptions:
    """How products without a split are divided.

    Attributes:
        val_share: of the products without a split, 0 to 1.
        test_share: of the products without a split, 0 to 1.
        seed: another number divides them in another way.
    """

    val_share: float = 0.1
    test_share: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class RunOptions:
    """Strictness, processes, and an existing catalogue.

    Attributes:
        on_bad_field: what to do with a row that has a bad picture or number: keep it without, or
            reject it.
        max_problems: fail, and publish nothing, when more rows of a file have a problem: 1% or 10.
            By default problems are recorded and never fail the run.
        num_workers: processes that read rows and pictures; by default as many as pay off.
        overwrite: replace an existing catalogue.
    """

    on_bad_field: Literal["keep", "reject"] = "keep"
    max_problems: str | None = None
    num_workers: int | None = None
    overwrite: bool = False


def prepare(
    products: Path,
    output: Path | None = None,
    judged: JudgedFiles = JudgedFiles(),
    columns: ColumnOptions = ColumnOptions(),
    pictures: PictureOptions = PictureOptions(),
    text: TextOptions = TextOptions(),
    splits: SplitOptions = SplitOptions(),
    run: RunOptions = RunOptions(),
) -> Report:
    """Prepare a catalogue and return the report that is also written as report.json.

    Args:
        products: table of products: .csv, .tsv, .jsonl or .parquet.
        output: folder to make.
        judged: queries and judgements
        columns: the roles of columns
        pictures: how pictures are read and stored
        text: how text files and their cells are read
        splits: how products without a split are divided
        run: strictness, processes, and an existing catalogue

    Raises:
        CatalogueError: the files cannot become a catalogue; nothing is published.
        ArtefactError: `output` is in the way.
    """
    start = time.monotonic()
    if run.max_problems is None:
        threshold = None
    else:
        threshold = Threshold.parse(run.max_problems)
    policy = SplitPolicy(splits.val_share, splits.test_share, splits.seed, pictures.join_pictures)
    policy.check()
    table, *judged_tables = _open_tables(products, judged, text)
    assert table is not None

    # The role of every column, given or guessed from a pass over the table.
    profiles, rows = profile(table)
    if columns.columns is None:
        override = None
    else:
        override = Override.load(columns.columns)
    roles = guess_columns(table, profiles, rows, override)
    _show(f"{table}: {rows:,} rows", columns_grid(roles, rows), "")
    if columns.write_columns is not None:
        yaml = roles.to_yaml(f"What the columns of {products.name} are.")
        columns.write_columns.write_text(yaml, encoding="utf-8")
        edited = columns.write_columns
        _show(f"Wrote {edited}. Edit it, then prepare with: --columns {edited}")
        return {}
    if output is None:
        raise CatalogueError("--output is missing: the folder to make")

    # Read, arrange and write: the folder appears complete or not at all.
    picture_reader = _picture_reader(products, pictures, roles)
    strict = run.on_bad_field == "reject"
    field_reader = FieldReader(picture_reader, text.decimal, text.clean_html, strict=strict)
    settings = {
        "image_size": pictures.image_size,
        "background": pictures.background,
        "clean_html": text.clean_html,
        "decimal": text.decimal,
        "on_bad_field": run.on_bad_field,
        **policy._asdict(),
    }
    meta: dict[str, Any] = {"settings": settings}
    with new_folder(
        output, artefact_type="catalogue", meta=meta, overwrite=run.overwrite
    ) as folder:
        with _problem_log(folder, output) as log:
            preparation = Preparation(folder, log, field_reader, policy, run.num_workers)
            split_plan = preparation.products(table, roles, rows)
            query_splits = preparation.judged_queries(split_plan.splits, *judged_tables)
            if threshold is not None:
                log.check(threshold)
        report = make_report(preparation, roles, split_plan, query_splits)
        report |= {"settings": settings}
        write_json(folder / "report.json", report)
        meta |= {name: report[name] for name in ("rows", "accepted", "rejected", "splits")}
        # In the manifest alone: equal input gives files with equal fingerprints.
        meta["seconds"] = round(time.monotonic() - start, 1)
    _show(summary_grid(summary(report, meta["seconds"], output)))
    return report


def _picture_reader(products: Path, options: PictureOptions, roles: Columns) -> PictureReader:
    limits = LIMITS._replace(max_pixels=options.max_pixels, max_bytes=options.max_bytes)
    if options.image_root is None:
        root = products.parent
    else:
        root = options.image_root
    background = _color(options.background)
    reader = PictureReader(root, options.image_size, roles.value_separator, background, limits)
    reader.check()
    return reader


def _open_tables(products: Path, judged: JudgedFiles, text: TextOptions) -> list[Table | None]:
    """The user's files: products, pairs, queries and judgements."""
    paths = [products, judged.pairs, judged.queries, judged.qrels]
    given = [path for path in paths if path is not None]
    # Problems are listed by file name, so names must differ.
    names = {path.name for path in given}
    if len(names) < len(given):
        files = [str(path) for path in given]
        raise CatalogueError(f"{files} need different names: problems are listed by file name")
    if judged.qrels is not None and judged.queries is None:
        raise CatalogueError("--qrels needs --queries: the queries that are judged")
    tables = []
    for path in paths:
        table = None
        if path is not None:
            table = Table(path, text.encoding, text.delimiter, text.quote)
        tables.append(table)
    return tables


@contextmanager
def _problem_log(folder: Path, output: Path) -> Iterator[ProblemLog]:
    """The log of problems. After a failed run its file is left beside the catalogue's place."""
    beside = output.with_name(f"{output.name}.problems.csv")
    log = ProblemLog(folder / "problems.csv")
    try:
        with log:
            yield log
    # The folder of a failed run is removed: its problems are copied beside it.
    except CatalogueError as error:
        if log.codes:
            _show(files_grid(log.files), "", problems_grid(log), "")
            shutil.copyfile(folder / "problems.csv", beside)
            raise CatalogueError(
                f"{error}. Nothing was published; the problems are listed in {beside}"
            ) from None
        raise
    beside.unlink(missing_ok=True)
    _show(files_grid(log.files), "")
    if log.codes:
        _show(problems_grid(log), f"All of them: {output / 'problems.csv'}", "")


def _show(*parts: object) -> None:
    console().print(*parts, sep="\n", markup=False)


def _color(name: str) -> tuple[int, int, int]:
    try:
        red, green, blue, *_ = ImageColor.getrgb(name)
    except ValueError:
        raise CatalogueError(f"--background {name!r} is no color; use a name or #rrggbb") from None
    return red, green, blue


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    about = (__doc__ or "").split("\n\n")[0]
    parser = make_command_parser("python -m datamodules.prepare", about, prepare, "products")
    options = parser.parse_args(arguments).as_dict()

    def program() -> None:
        call(prepare, options)

    return exit_code(program, USER_ERRORS, "interrupted; nothing was published")
