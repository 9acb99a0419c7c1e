"""The files of an index folder."""

INDEX_FILE = "index.faiss"
"""The whole index of FAISS (`Flat`), or its centroids and code books, whose lists are mapped."""

LISTS_FILE = "lists.bin"
"""Inverted lists, one after the other: codes, then rows."""

SIZES_FILE = "lists.npy"
"""(nlist,) int64, number of entries of each list."""

REFINE_FILE = "vectors.faiss"
"""Vectors that re-rank candidates, one per row."""

IDS_FILE = "ids.arrow"
"""Product ids, one per row; null for a deleted row."""
