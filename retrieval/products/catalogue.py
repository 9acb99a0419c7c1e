"""Read a prepared catalogue for results and reports.

Titles, attributes and pictures by id, queries, judgements.

Needs neither torch nor the modules that made the catalogue: its folder is the contract.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tritower.artefacts import storage
from tritower.artefacts.storage import ArtefactError
from tritower.retrieval.lexical.records import Record, record_of

Value = str | float | Sequence[str]


@dataclass(frozen=True)
class Card:
    """What is shown of a product or a query.

    Attributes:
        text: field -> text, in the catalogue's order; the first is the title.
        attributes: name -> value.
        images: encoded pictures.
    """

    text: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, Value] = field(default_factory=dict)
    images: Sequence[bytes] = ()

    @property
    def title(self) -> str:
        """The first text field that is there."""
        return next(iter(self.text.values()), "")


class PreparedCatalogue:
    """A prepared catalogue folder.

    Args:
        path: as written by `python -m datamodules.prepare`.

    Raises:
        ArtefactError: no finished catalogue.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        manifest = storage.read_manifest(self.path, "catalogue")
        self.fingerprint = manifest.fingerprint
        self._files = manifest.files
        schema = json.loads((self.path / "schema.json").read_text(encoding="utf-8"))
        self.text_fields: list[str] = list(schema["text"])
        self.attributes: dict[str, str] = {
            a["name"]: a["attribute_type"] for a in schema["attributes"]
        }
        """Name -> type ("number", "category", "path", "set")."""

    def products(self, ids: Collection[str], *, images: bool = False) -> dict[str, Card]:
        """What is known of products; ids that are not in the catalogue are left out."""
        rows = self._rows(
            "products", "product_id", ids, ["text", "attributes", *(["images"] if images else [])]
        )
        return {row["product_id"]: _card(row, self.attributes) for row in rows}

    def query_cards(self, ids: Collection[str], *, images: bool = False) -> dict[str, Card]:
        """What queries show; a product asked as a query shows that product."""
        rows = self._rows(
            "queries",
            "query_id",
            ids,
            ["text", "source_product_id", *(["images"] if images else [])],
        )
        sources = self.products({row["source_product_id"] for row in rows} - {None}, images=images)
        return {
            row["query_id"]: sources.get(row["source_product_id"]) or _card(row, self.attributes)
            for row in rows
        }

    def queries(self) -> pa.Table:
        """All queries without pictures: query_id, split, text, source_product_id."""
        columns = ["query_id", "split", "text", "source_product_id"]
        tables = [pq.read_table(file, columns=columns) for file in self._shards("queries")]
        if tables:
            return pa.concat_tables(tables)
        return pa.table({name: pa.array([], pa.string()) for name in columns})

    def qrels(self) -> pa.Table:
        """All judgements: query_id, product_id, relevance.

        Raises:
            ArtefactError: the catalogue has none.
        """
        if "qrels.parquet" not in self._files:
            raise ArtefactError(
                f"{self.path} has no judgements (qrels.parquet): prepare it with queries and qrels"
            )
        return read_qrels(self.path / "qrels.parquet")

    @property
    def number_attributes(self) -> list[str]:
        """Names of the attributes that are numbers."""
        result = []
        for name, attribute_type in self.attributes.items():
            if attribute_type == "number":
                result.append(name)
        return result

    def records(self) -> Iterator[tuple[list[str], list[Record], NDArray[np.float64]]]:
        """Per shard: B product ids, their records, and (B, A) numbers, NaN where missing."""
        # One shard at a time, and only the columns that words and numbers come from.
        title = self.text_fields[0] if self.text_fields else ""
        for file in self._shards("products"):
            there = pq.read_schema(file).names
            columns = [name for name in ("product_id", "text", "attributes") if name in there]
            rows = pq.read_table(file, columns=columns).to_pylist()
            attributes = [row.get("attributes") or {} for row in rows]
            records = [
                record_of(row.get("text") or {}, facts, title)
                for row, facts in zip(rows, attributes, strict=True)
            ]
            numbers = [[facts.get(name) for name in self.number_attributes] for facts in attributes]
            yield (
                [row["product_id"] for row in rows],
                records,
                np.array(numbers, np.float64).reshape(len(rows), -1),
            )

    def product_files(self) -> list[Path]:
        """The Parquet shards of the products, in order."""
        return self._shards("products")

    def _shards(self, table: str) -> list[Path]:
        return [self.path / name for name in sorted(self._files) if name.startswith(f"{table}/")]

    def _rows(
        self, table: str, id_column: str, ids: Collection[str], columns: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Rows by id. Reads all ids, and the rest of row groups that hold one of them."""
        wanted = pa.array(list(ids), pa.string())
        found = []
        for file in self._shards(table) if len(ids) else ():
            parquet = pq.ParquetFile(file)
            there = [name for name in columns if name in parquet.schema_arrow.names]
            # Row groups without a wanted id are skipped after reading their ids alone.
            for group in range(parquet.num_row_groups):
                keys = parquet.read_row_group(group, [id_column]).column(0)
                mask = pc.is_in(keys, value_set=wanted)
                if pc.any(mask).as_py():
                    found += (
                        parquet.read_row_group(group, [id_column, *there]).filter(mask).to_pylist()
                    )
        return found


def read_qrels(file: Path) -> pa.Table:
    """Judgements from a .parquet or .csv file.

    Query_id, product_id, relevance (1 where there is no such column).

    Raises:
        ValueError: a column is missing, or a relevance is not a number of at least 0.
    """
    if file.suffix == ".csv":
        with file.open(encoding="utf-8-sig", newline="") as stream:
            records = list(csv.DictReader(stream))
        table = pa.table(
            {name: [record[name] for record in records] for name in (records[0] if records else ())}
        )
    else:
        table = pq.read_table(file)
    # Relevance may be left out: then every judgement counts 1.
    for name in ("query_id", "product_id"):
        if name not in table.column_names:
            raise ValueError(f"{file}: no column {name!r} among {', '.join(table.column_names)}")
    try:
        if "relevance" in table.column_names:
            relevance = table.column("relevance").cast(pa.float64())
        else:
            relevance = [1.0] * len(table)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: relevance is not a number: {error}") from None
    table = pa.table(
        {
            "query_id": table.column("query_id").cast(pa.string()),
            "product_id": table.column("product_id").cast(pa.string()),
            "relevance": relevance,
        }
    )
    is_valid = pc.and_kleene(
        pc.is_finite(table.column("relevance")), pc.greater_equal(table.column("relevance"), 0)
    )
    if not pc.all(pc.fill_null(is_valid, False)).as_py():
        row = pc.fill_null(is_valid, False).index(False).as_py()
        raise ValueError(
            f"{file}: row {row}: relevance {table.column('relevance')[row].as_py()}; expected a "
            "number >= 0"
        )
    return table


def _card(row: Mapping[str, Any], attribute_types: Mapping[str, str]) -> Card:
    text = row.get("text")
    fields = text if isinstance(text, dict) else {"query": text}
    facts = {
        name: value
        for name, value in (row.get("attributes") or {}).items()
        if value not in (None, [])
    }
    paths = {
        name: " > ".join(value)
        for name, value in facts.items()
        if attribute_types.get(name) == "path"
    }
    return Card(
        {name: value for name, value in fields.items() if value},
        facts | paths,
        row.get("images") or (),
    )
