"""The lists of an index as one file that is memory-mapped, not read.

All lists one after another, each with its codes and then its rows.

    lists.bin    | codes of list 0, in blocks of 32 | rows of list 0 | padding | codes of list 1 ...
    lists.npy    (L,) sizes of the lists; where each begins follows from them

FAISS scans 4-bit codes in blocks of 32 and keeps them in memory of its own. Laid out this way, its
on-disk lists hand the same blocks to the same scan: opening takes no time, processes share one
copy, and memory is only what is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import faiss
import numpy as np
from numpy.typing import NDArray

BLOCK = 32
"""Vectors whose codes are scanned together."""

ALIGNMENT = 64
"""Bytes at whose multiples a list begins.

A cache line, and what the widest registers load at once.
"""

Codes = NDArray[np.uint8]


def pack(index: Any, codes: Codes) -> Codes:
    """Codes of one list in the order in which FAISS scans them.

    Args:
        index: the fast-scan index that made them.
        codes: (n, C) uint8.

    Returns:
        (ceil(n / 32), 32 x C) uint8; the end of the last block is zeros, and never counted as a
        vector.
    """
    packer = index.get_CodePacker()
    blocks = -(-len(codes) // BLOCK)
    padded = np.zeros((blocks, BLOCK * codes.shape[1]), np.uint8)
    padded.reshape(-1, codes.shape[1])[: len(codes)] = codes
    packed = np.empty_like(padded)
    for block in range(blocks):
        packer.pack_all(faiss.swig_ptr(padded[block]), faiss.swig_ptr(packed[block]))
    return packed


def write_list(file: BinaryIO, index: Any, codes: Codes, rows: NDArray[np.int64]) -> None:
    """Append one list: (n, C) uint8 codes and (n,) int64 rows; an empty one takes no bytes."""
    if not len(rows):
        return
    packed = pack(index, codes)
    file.write(packed.data.cast("B"))
    file.write(np.ascontiguousarray(rows, np.int64).data.cast("B"))
    file.write(bytes(-(packed.nbytes + 8 * len(rows)) % ALIGNMENT))


def extents(sizes: NDArray[np.int64], code_size: int) -> NDArray[np.uint64]:
    """(L, 3) uint64 size, room and first byte of each list, as FAISS's on-disk lists keep them."""
    room = _room(sizes)
    taken = _bytes_of(sizes, code_size)
    return np.stack([sizes, room, np.cumsum(taken) - taken], axis=1).astype(np.uint64)


def file_bytes(sizes: NDArray[np.int64], code_size: int) -> int:
    """Bytes of the file of L lists of these (L,) sizes."""
    return int(_bytes_of(sizes, code_size).sum())


def _room(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    return -(-sizes // BLOCK) * BLOCK


def _bytes_of(sizes: NDArray[np.int64], code_size: int) -> NDArray[np.int64]:
    return -(-(_room(sizes) * code_size + 8 * sizes) // ALIGNMENT) * ALIGNMENT


def attach(index: Any, file: Path, sizes: NDArray[np.int64]) -> Any:
    """Let a fast-scan index without lists scan those in a file, mapped and read-only.

    Args:
        index: FAISS index as stored, its lists empty.
        file: lists.bin.
        sizes: (L,) int64.

    Returns:
        The mapped lists; they must live as long as the index.

    Raises:
        ValueError: sizes, index and file do not belong together.
    """
    if sizes.ndim != 1 or sizes.dtype != np.int64:
        raise ValueError(
            f"sizes of lists are {sizes.dtype} of shape {sizes.shape}; expected int64, one for "
            "each list"
        )
    # Sizes, index and file must belong together, or a scan would read foreign memory.
    expected = file_bytes(sizes, index.code_size)
    if len(sizes) != index.nlist or (sizes < 0).any() or file.stat().st_size != expected:
        raise ValueError(
            f"{file.name} has {file.stat().st_size} bytes; {len(sizes)} lists of "
            f"{index.code_size}-byte codes for an "
            f"index of {index.nlist} lists need {expected}"
        )
    return map_lists(index, file, extents(sizes, index.code_size))


def map_lists(index: Any, file: Path, table: NDArray[np.uint64]) -> Any:
    """Let a fast-scan index scan lists in a file, wherever they lie in it.

    Args:
        index: FAISS index, its lists empty.
        file: lists.bin.
        table: (L, 3) uint64 (`extents`).

    Returns:
        The mapped lists; they must live as long as the index.
    """
    lists: Any = faiss.OnDiskInvertedLists()
    lists.nlist = index.nlist
    lists.code_size = index.code_size
    lists.filename = str(file)
    lists.totsize = file.stat().st_size
    lists.read_only = True
    lists.prefetch_nthread = 0  # its threads cost more than a page fault
    lists.lists.resize(index.nlist)
    # The table of extents is copied into FAISS's own vector of list descriptors.
    faiss.memcpy(lists.lists.data(), faiss.swig_ptr(table.view(np.uint8).ravel()), table.nbytes)
    if lists.totsize:
        lists.do_mmap()
    index.replace_invlists(lists, False)
    return lists


def _mapped_bytes(file: Path, sizes: NDArray[np.int64]) -> NDArray[np.uint8]:
    """All bytes of lists.bin, mapped; an empty file cannot be mapped."""
    if sizes.any():
        return np.memmap(file, np.uint8, "r")
    return np.empty(0, np.uint8)


def read_lists(
    file: Path, index: Any, sizes: NDArray[np.int64], first: int = 0, end: int | None = None
) -> Iterator[tuple[Codes, NDArray[np.int64]]]:
    """Lists first to end - 1 of a file one after another.

    (n, C) uint8 codes and (n,) int64 rows.
    """
    data = _mapped_bytes(file, sizes)
    packer = index.get_CodePacker()
    code_size = index.code_size
    for size, room, start in extents(sizes, code_size).astype(np.int64)[first:end]:
        stop = start + room * code_size
        packed = data[start:stop].reshape(-1, BLOCK * code_size)
        codes = np.empty((room, code_size), np.uint8)
        for block, flat in zip(packed, codes.reshape(-1, BLOCK * code_size), strict=True):
            packer.unpack_all(faiss.swig_ptr(np.ascontiguousarray(block)), faiss.swig_ptr(flat))
        yield codes[:size], data[stop : stop + 8 * size].view(np.int64)


def read_rows(
    file: Path, sizes: NDArray[np.int64], code_size: int, first: int = 0, end: int | None = None
) -> Iterator[NDArray[np.int64]]:
    """The (n,) int64 rows alone of lists first to end - 1."""
    data = _mapped_bytes(file, sizes)
    for size, room, start in extents(sizes, code_size).astype(np.int64)[first:end]:
        stop = start + room * code_size
        yield data[stop : stop + 8 * size].view(np.int64)
