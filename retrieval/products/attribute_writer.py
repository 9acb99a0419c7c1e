"""Write the attributes of an index's rows, from catalogues and files.

Joined by id, never by order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tritower.artefacts.storage import JSON
from tritower.retrieval.products.attribute_cells import TEXT, AttributeType
from tritower.retrieval.products.attribute_providers import AttributeProvider
from tritower.retrieval.products.attribute_table import ROWS_KEY, TYPE_KEY


def write_attributes(
    file: BinaryIO,
    ids: Iterable[pa.Array],
    providers: Sequence[AttributeProvider],
    work: Path | None = None,
) -> dict[str, JSON]:
    """Write the attributes of an index's rows, joined by id.

    Columns are made one after another and wait in a temporary file: memory holds the ids of index
    and providers, and one column.

    Args:
        file: opened for writing, by `storage.create`.
        ids: the index's ids in the order of its rows; null for rows that are deleted: all they had
            is unknown.
        providers: where attributes come from. Where several know a product, the last of them
            describes it, as a whole.
        work: folder for the temporary file (8 bytes per row and column); the system's when None.

    Returns:
        What was written: `attribute_types` (attribute -> type), `rows`, `rows_without` (rows with
        an id that no provider knows), `unused` (products of the providers that are not in the
        index), `ignored` (columns that are no attributes -> why).

    Raises:
        ValueError: an id that a provider has twice, or an attribute that two providers have with
            different types.
    """
    # Each column waits in a temporary file, so memory holds one column of one batch at a time.
    attribute_types = _common_attribute_types(providers)
    places, report = _join(list(ids), providers)
    # Columns are written to disk one at a time, then read back mapped: memory holds one of them.
    with tempfile.TemporaryFile(dir=work) as waiting:
        columns = [
            _waiting(providers, name, attribute_type, places, waiting)
            for name, attribute_type in attribute_types.items()
        ]
        arrays = []
        start = 0
        for column in columns:
            arrays.append(column.array(waiting, start, len(places)))
            start += column.dtype.itemsize * len(places)
        fields = [
            pa.field(name, array.type, metadata={TYPE_KEY: attribute_type.encode()})
            for (name, attribute_type), array in zip(attribute_types.items(), arrays, strict=True)
        ]
        schema = pa.schema(fields, metadata={ROWS_KEY: str(len(places)).encode()})
        with pa.ipc.new_file(file, schema) as table:
            table.write_batch(pa.record_batch(arrays, schema=schema))
    ignored = {column: why for provider in providers for column, why in provider.ignored.items()}
    return {
        "attribute_types": cast(JSON, attribute_types),
        "rows": len(places),
        **report,
        "ignored": cast(JSON, ignored),
    }


def _common_attribute_types(providers: Sequence[AttributeProvider]) -> dict[str, AttributeType]:
    attribute_types: dict[str, AttributeType] = {}
    first: dict[str, str] = {}
    for provider in providers:
        for name, attribute_type in provider.attribute_types.items():
            if attribute_types.setdefault(name, attribute_type) != attribute_type:
                raise ValueError(
                    f"attribute {name!r} is a {attribute_types[name]} in {first[name]} and a "
                    f"{attribute_type} in {provider.name}: "
                    "name its type where it was guessed, or leave the column out"
                )
            first.setdefault(name, provider.name)
    return attribute_types


def _join(
    ids: list[pa.Array], providers: Sequence[AttributeProvider]
) -> tuple[NDArray[np.int64], dict[str, JSON]]:
    """(N,) place of each row among the products of all providers, one provider after another.

    -1 where there is none.
    """
    rows = pa.chunked_array([batch.cast(TEXT) for batch in ids], TEXT)
    places = np.full(len(rows), -1, np.int64)
    start = unused = 0
    # Of several providers with a product, the last one counts.
    for provider in providers:
        keys = pa.chunked_array(list(provider.ids()), TEXT).combine_chunks()
        _check_distinct(keys, provider.name)
        found = pc.fill_null(pc.index_in(rows, value_set=keys, skip_nulls=True), -1).to_numpy()
        places = np.where(found >= 0, start + found, places)
        unused += len(keys) - keys.null_count - int((found >= 0).sum())
        start += len(keys)
    without = int((places < 0).sum()) - rows.null_count
    return places, {"rows_without": without, "unused": unused}


def _check_distinct(keys: pa.Array, name: str) -> None:
    known = keys.drop_null()
    encoded = known.dictionary_encode()
    if len(encoded.dictionary) == len(known):
        return
    codes = encoded.indices.to_numpy()
    _, first = np.unique(codes, return_index=True)
    again = int(np.setdiff1d(np.arange(len(codes)), first, assume_unique=True)[0])
    raise ValueError(
        f"{name}: the id {known[again].as_py()!r} is there more than once, again in row {again}"
    )


@dataclass(frozen=True)
class _Column:
    """A column whose values wait in a temporary file.

    Attributes:
        dtype: of the values.
        valid: one bit a row: known.
        vocabulary: of a column of texts.
    """

    dtype: np.dtype[Any]
    valid: NDArray[np.uint8]
    vocabulary: pa.Array | None

    def array(self, file: BinaryIO, start: int, count: int) -> pa.Array:
        """The column as Arrow has it, its values mapped from where they wait."""
        values = np.empty(0, self.dtype)
        if count:
            values = np.memmap(file, self.dtype, "r", start, (count,))
        buffers = [pa.py_buffer(self.valid), pa.py_buffer(values)]
        array = pa.Array.from_buffers(pa.from_numpy_dtype(self.dtype), count, buffers)
        if self.vocabulary is None:
            return array
        return pa.DictionaryArray.from_arrays(array, self.vocabulary, safe=False)


def _waiting(
    providers: Sequence[AttributeProvider],
    name: str,
    attribute_type: AttributeType,
    places: NDArray[np.int64],
    file: BinaryIO,
) -> _Column:
    batches = _batches(providers, name, attribute_type)
    if attribute_type == "number":
        values = _numbers(batches, places)
        vocabulary = None
    else:
        values, vocabulary = _codes(batches, places)
    file.write(values.data)
    file.flush()
    known = ~np.isnan(values) if vocabulary is None else values >= 0
    return _Column(values.dtype, np.packbits(known, bitorder="little"), vocabulary)


def _numbers(batches: Iterator[pa.Array], places: NDArray[np.int64]) -> NDArray[Any]:
    chunks = [pc.fill_null(batch, np.nan).to_numpy(zero_copy_only=False) for batch in batches]
    # Place -1 is the last one.
    return np.concatenate([*chunks, [np.nan]])[places]


def _codes(batches: Iterator[pa.Array], places: NDArray[np.int64]) -> tuple[NDArray[Any], pa.Array]:
    """(N,) int32 codes, and their texts."""
    dictionaries = [batch.dictionary_encode() for batch in batches]
    encoded = pa.chunked_array(dictionaries, pa.dictionary(pa.int32(), TEXT)).unify_dictionaries()
    chunks = []
    for chunk in encoded.chunks:
        chunks.append(pc.fill_null(chunk.indices, -1).to_numpy(zero_copy_only=False))
    codes = np.concatenate([*chunks, np.array([-1], np.int32)])
    return codes[places], encoded.chunk(0).dictionary if encoded.num_chunks else pa.array([], TEXT)


def _batches(
    providers: Sequence[AttributeProvider], name: str, attribute_type: AttributeType
) -> Iterator[pa.Array]:
    for provider in providers:
        if name in provider.attribute_types:
            yield from provider.column(name)
        else:
            for ids in provider.ids():
                yield pa.nulls(len(ids), pa.float64() if attribute_type == "number" else TEXT)
