"""The steps of a run of prepare.

Products are read, arranged and written; then queries and their judgements.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tritower.datamodules.prepare.catalogue import FieldReader, ProductParser
from tritower.datamodules.prepare.columns import ATTRIBUTES, Columns
from tritower.datamodules.prepare.judgements import Judgements, query_splits
from tritower.datamodules.prepare.parallel import parse_records
from tritower.datamodules.prepare.pictures import digest
from tritower.datamodules.prepare.queries import ASKED, Part, QueryParser, QuerySet, find_parts
from tritower.datamodules.prepare.report import ProblemLog
from tritower.datamodules.prepare.rows import Row
from tritower.datamodules.prepare.shards import ShardWriter, Spool, product_columns, query_columns
from tritower.datamodules.prepare.splits import (
    SPLIT_NAMES,
    Members,
    SplitPlan,
    SplitPolicy,
    assign_splits,
)
from tritower.datamodules.prepare.statistics import AttributeStatistics
from tritower.datamodules.prepare.tables import CatalogueError, Table
from tritower.datamodules.schema import Schema
from tritower.terminal.progress import show_progress

T = TypeVar("T")

ALL_BAD = 10
"""So many pictures, and not one that can be read: the picture folder is wrong, not the pictures."""


@dataclass
class Preparation:
    """One run and what it keeps in memory: ids, keys and numbers, but no texts and no pictures.

    Args:
        folder: where the catalogue is built.
        log: of problems.
        reader: how cells are read.
        policy: of splits.
        num_workers: processes that read pictures; None for as many as pay off.

    Attributes:
        unread: file of queries or judgements -> its columns that mean nothing here.
    """

    folder: Path
    log: ProblemLog
    reader: FieldReader
    policy: SplitPolicy
    num_workers: int | None
    members: Members = field(default_factory=Members)
    numbers: dict[str, int] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    queries: QuerySet = field(default_factory=QuerySet)
    judgements: Judgements = field(default_factory=Judgements)
    unread: dict[str, list[str]] = field(default_factory=dict)

    def products(self, table: Table, columns: Columns, rows: int) -> SplitPlan:
        """Read all products and write them in order.

        Raises:
            CatalogueError: none was accepted, or none of many pictures can be read.
        """
        parser = ProductParser(table.path.name, columns, self.reader)
        image_columns = {column.name for column in columns.of("image")}
        with Spool(self.folder / "products.spool") as spool:
            workers = self.num_workers if image_columns else 0
            parsed = parse_records(parser, table.records(), workers)
            # First pass: parse every row, and put what is accepted into a spool on disk.
            for row in show_progress(parsed, rows, one_row, "reading products", "rows"):
                self._take_product(row, image_columns, spool)
            if sum(self.log.files[table.path.name].ended()) != rows:
                raise CatalogueError(f"{table.path} changed while it was read")
            # Nothing accepted is an error, not an empty catalogue.
            if not self.members.ids:
                raise CatalogueError(
                    f"none of the {rows:,} rows of {table} was accepted: {self.log.most_frequent()}"
                )
            if self.counts["bad pictures"] >= ALL_BAD and not self.counts["pictures"]:
                raise CatalogueError(
                    f"none of {self.counts['bad pictures']:,} pictures can be read: "
                    f"{self.log.most_frequent()}. "
                    f"Is --image-root {self.reader.pictures.root} right? Without pictures: "
                    "`image: null` in --columns"
                )
            # Second pass: write in the order of splits and groups.
            split_plan = assign_splits(self.members, self.policy)
            self._write_products(columns, split_plan, spool)
        return split_plan

    def _take_product(self, row: Row, image_columns: set[str], spool: Spool) -> None:
        self.counts["bad pictures"] += sum(
            problem.column in image_columns for problem in row.problems
        )
        # The first row of an id counts.
        if row.item is not None and row.id in self.numbers:
            row = row.rejected(
                "ID_DUPLICATE", "an earlier row has the same id; the first one counts"
            )
        self.log.add(row)
        if row.item is None:
            return
        # Memory holds ids and digests; contents go to the spool.
        self.numbers[row.id] = len(self.members)
        self.members.ids.append(row.id)
        self.members.groups.append(row.group)
        self.members.families.append(row.family)
        self.members.splits.append(row.split)
        self.members.pictures.append(tuple(map(digest, row.item.images)))
        self.counts["pictures"] += len(row.item.images)
        self.counts["with picture"] += bool(row.item.images)
        self.counts["with text"] += bool(row.item.text)
        self.counts["with attributes"] += bool(row.item.attributes)
        spool.append(row.item)

    def _write_products(self, columns: Columns, split_plan: SplitPlan, spool: Spool) -> None:
        text = tuple(column.name for column in columns.of("text"))
        statistics = AttributeStatistics(columns.of(*ATTRIBUTES))
        layout = product_columns(text, statistics.attributes())
        with ShardWriter(self.folder / "products", layout) as writer:
            for number in show_progress(
                split_plan.order, len(spool), one_row, "writing products", "rows"
            ):
                item = spool[number]
                split = split_plan.splits[number]
                # Statistics come from the train split alone.
                statistics.add(item.attributes, split == "train")
                writer.write(
                    {
                        "product_id": self.members.ids[number],
                        "group": self.members.groups[number],
                        "family": split_plan.families[number],
                        "split": split,
                        "text": item.text,
                        "images": item.images,
                        "attributes": item.attributes,
                    }
                )
        Schema(text, self.counts["pictures"] > 0, statistics.attributes()).save(
            self.folder / "schema.json"
        )

    def judged_queries(
        self, splits: list[str], pairs: Table | None, queries: Table | None, qrels: Table | None
    ) -> list[str]:
        """Read and write queries and judgements; returns the split of every query.

        Raises:
            CatalogueError: COLUMN_MISSING.
        """
        with Spool(self.folder / "queries.spool") as spool:
            # Queries, then judgements: those of pairs name queries by their text.
            if queries is not None:
                self._read_queries(queries, spool, pairs=False)
            if pairs is not None:
                self._read_queries(pairs, spool, pairs=True)
                self._read_judgements(pairs, pairs=True)
            if qrels is not None:
                self._read_judgements(qrels, pairs=False)
            judged = self.judgements.arrays()
            query_split = query_splits(self.queries, self.numbers, splits, judged)
            self._write_queries(query_split, spool)
        self._write_judgements(judged)
        return query_split

    def _read_queries(self, table: Table, spool: Spool, pairs: bool) -> None:
        # A query that occurs in several pairs is read once.
        if pairs:
            # Pairs name a query by its content, so a query_id is optional there.
            parts = find_parts(table, ASKED)
        else:
            parts = find_parts(table, ASKED, ["query_id"])
        self._note_unread(table, parts)
        if pairs:
            records = self.queries.new_queries(table.records(), parts)
        else:
            records = table.records()
        # Parsed by several processes where pictures have to be decoded.
        parser = QueryParser(table.path.name, parts, self.reader)
        workers = self.num_workers if "image" in parts else 0
        for row in show_progress(
            parse_records(parser, records, workers), None, one_row, "reading queries", "rows"
        ):
            row = self.queries.add(row, self.numbers)
            self.log.add(row, counted=not pairs)
            if row.item is not None:
                spool.append(row.item)

    def _note_unread(self, table: Table, parts: Mapping[Part, str]) -> None:
        known = self.unread.setdefault(table.path.name, [])
        known += [name for name in table.columns if name not in {*parts.values(), *known}]

    def _read_judgements(self, table: Table, pairs: bool) -> None:
        if pairs:
            parts = find_parts(table, ["product"])
        else:
            parts = find_parts(table, ["query_id"], ["product"])
        self._note_unread(table, parts)
        rows = self.judgements.read(table, parts, self.queries, self.numbers, pairs)
        for row in show_progress(rows, None, one_row, "reading judgements", "rows"):
            self.log.add(row)

    def _write_queries(self, splits: list[str], spool: Spool) -> None:
        # Queries of one split lie together.
        # By split, so that the queries of a split are in consecutive rows.
        order = sorted(
            range(len(splits)), key=lambda number: (SPLIT_NAMES.index(splits[number]), number)
        )
        with ShardWriter(self.folder / "queries", query_columns()) as writer:
            for number in order:
                item = spool[number]
                writer.write(
                    {
                        "query_id": self.queries.ids[number],
                        "split": splits[number],
                        "text": item.text.get("query"),
                        "images": item.images,
                        "source_product_id": self.queries.sources[number],
                    }
                )

    def _write_judgements(self, judged: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        query, product, weight = judged
        if not len(query):
            return
        columns = {
            "query_id": pa.array(self.queries.ids).take(pa.array(query)),
            "product_id": pa.array(self.members.ids).take(pa.array(product)),
            "relevance": pa.array(weight, pa.float32()),
        }
        pq.write_table(pa.table(columns), self.folder / "qrels.parquet", compression="zstd")


def one_row(_: object) -> int:
    """The size of a batch of one row."""
    return 1
