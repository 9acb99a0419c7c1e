"""Rows come in the order of their records, and a worker that dies is an error that says where."""

from __future__ import annotations

import os

import pytest

from tritower.datamodules.prepare.parallel import CHUNK, parse_records
from tritower.datamodules.prepare.records import Record
from tritower.datamodules.prepare.rows import Row
from tritower.datamodules.prepare.tables import CatalogueError

RECORDS = [Record(row, row + 1, {"id": str(row)}) for row in range(1, 200)]


def parse(record: Record) -> Row:
    return Row("f", record.row, record.line, str(record.cells["id"]), None)


def die_at_100(record: Record) -> Row:
    if record.row == 100:
        os._exit(1)
    return parse(record)


@pytest.mark.parametrize("num_workers", [0, 2, None])
def test_rows_keep_the_order_of_their_records(num_workers: int | None) -> None:
    assert list(parse_records(parse, iter(RECORDS), num_workers)) == list(map(parse, RECORDS))


def test_dead_worker_is_an_error_that_names_the_rows() -> None:
    with pytest.raises(
        CatalogueError,
        match=r"a worker process died while reading rows \d+ to \d+ or a little later",
    ):
        list(parse_records(die_at_100, RECORDS, 1))


def test_few_records_wait_in_memory() -> None:
    taken = 0

    def counted() -> object:
        nonlocal taken
        for record in RECORDS * 20:
            taken += 1
            yield record

    rows = parse_records(parse, counted(), 1)
    next(rows)
    assert taken <= 6 * CHUNK
    rows.close()
