"""The index that is built by default.

Small lists of 4-bit codes that are scanned, and refine vectors that re-rank.

Both are mapped from files, so memory holds little more than the centers of the lists. They are
FAISS's own parts, put together here: `IndexIVFPQFastScan` over lists of our layout
(`tritower.retrieval.ivf.inverted_lists`), an `IndexScalarQuantizer` for the refine vectors,
`IndexRefine` around both. Where lists are many, the quantizer that finds them is such an index
itself, over their centers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import faiss
import numpy as np
from numpy.typing import NDArray

from tritower.artefacts.storage import ArtefactError
from tritower.retrieval.ivf.clustering import FLAT_LISTS, Centroids, find_centroids, grouped
from tritower.retrieval.ivf.spec import IvfPqSpec

TRAINED_CODES = 65_536
"""Vectors that train the code books: they hold only 16 centroids each."""

CENTER_CODE_DIMENSIONS = 2
"""Dimensions of a piece in the codes of the lists' centers.

Finer than those of vectors, there are few of them.
"""

# Its parameter classes take fields as keywords, which its stubs do not know.
make: Any = faiss
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class EncodedVectors:
    """B vectors as an index keeps them.

    Attributes:
        lists: (B, S) int32, the lists of a vector; -1 for none.
        codes: (S, B, C) uint8, its code in each of them.
        refine: (B, F) uint8, the vector to re-rank by; F = 0 for none.
    """

    lists: NDArray[np.int32]
    codes: NDArray[np.uint8]
    refine: NDArray[np.uint8]


@dataclass(frozen=True)
class TrainedQuantizers:
    """Everything learned from the training vectors; holds no product yet.

    Attributes:
        index: IndexIVFPQFastScan with empty lists.
        refine: IndexScalarQuantizer without vectors, or None.
        centroids: of the lists.
        spill: whether a vector is in two lists.
    """

    index: Any
    refine: Any
    centroids: Centroids
    spill: bool

    def encode(self, vectors: Vectors) -> EncodedVectors:
        """Lists, codes and refine vectors of (B, D) float32 vectors."""
        lists = []
        codes = []
        # Choosing second lists compares many residuals at a time.
        block = 16_384 if self.spill else 65_536
        # Blocks bound the memory of residuals.
        for start in range(0, len(vectors), block):
            part = vectors[start : start + block]
            found = self.centroids.lists_of(part, self.spill)
            lists.append(found.astype(np.int32))
            codes.append(np.stack([self._codes(part, column) for column in found.T]))
        if self.refine is None:
            refine = np.empty((len(vectors), 0), np.uint8)
        else:
            refine = self.refine.sa_encode(vectors)
        return EncodedVectors(np.concatenate(lists), np.concatenate(codes, axis=1), refine)

    def _codes(self, vectors: Vectors, lists: NDArray[np.int64]) -> NDArray[np.uint8]:
        if self.index.by_residual:
            residuals = vectors - self.centroids.vectors[lists]
        else:
            residuals = vectors
        codes: NDArray[np.uint8] = self.index.pq.compute_codes(residuals)
        return codes


def train(
    sample: Vectors,
    spec: IvfPqSpec,
    seed: int,
    spill: bool = False,
    centroids: Centroids | None = None,
) -> TrainedQuantizers:
    """Learn lists, code books and ranges from a sample.

    Args:
        sample: (S, D) float32, at least as many as lists and as a code book has centroids.
        spec: what to make.
        seed: of k-means.
        spill: give every vector a second list.
        centroids: of the lists, where they are known already.
    """
    dim = sample.shape[1]
    if centroids is None:
        centroids = find_centroids(sample, spec.lists, seed)
    # Lists are trained already: only the code books are learned, from residuals to the centers.
    index = faiss.IndexIVFPQFastScan(
        coarse_quantizer(centroids),
        dim,
        spec.lists,
        spec.sub_quantizers,
        4,
        faiss.METRIC_INNER_PRODUCT,
    )
    index.by_residual = spec.residual
    some = sample[:: max(1, len(sample) // TRAINED_CODES)]
    if spec.residual:
        residuals = some - centroids.vectors[centroids.nearest(some)[1][:, 0]]
    else:
        residuals = some
    index.pq.cp.seed = seed % 2**31
    index.pq.cp.min_points_per_centroid = 1
    index.pq.train(np.ascontiguousarray(residuals))
    index.is_trained = True
    # Ranges of each dimension for 8-bit vectors; 16-bit ones need none.
    refine = None
    if spec.refine is not None:
        quantizer_type = {
            "SQ8": faiss.ScalarQuantizer.QT_8bit,
            "SQfp16": faiss.ScalarQuantizer.QT_fp16,
        }[spec.refine]
        refine = faiss.IndexScalarQuantizer(dim, quantizer_type, faiss.METRIC_INNER_PRODUCT)
        refine.train(some)
    return TrainedQuantizers(index, refine, centroids, spill)


def coarse_quantizer(centroids: Centroids) -> Any:
    """The index that finds lists.

    Exact where they are few, else an IVF over their centers, re-ranked exactly.
    """
    dim = centroids.vectors.shape[1]
    if len(centroids) <= FLAT_LISTS:
        flat = faiss.IndexFlatIP(dim)
        flat.add(centroids.vectors)
        return flat
    # Many centers are an IVF-PQ of their own, re-ranked exactly. FAISS owns its parts from then on.
    groups = faiss.IndexFlatIP(dim)
    groups.add(centroids.groups)
    sub_quantizers = next(
        (dim // size for size in range(CENTER_CODE_DIMENSIONS, 9) if dim % size == 0), dim
    )
    base = faiss.IndexIVFPQFastScan(
        groups, dim, len(centroids.groups), sub_quantizers, 4, faiss.METRIC_INNER_PRODUCT
    )
    base.by_residual = True
    base.train(centroids.vectors)
    both = faiss.IndexRefineFlat(base)
    both.add(centroids.vectors)
    for part in (groups, base):
        part.this.disown()
    base.own_fields = both.own_fields = True
    return both


def centroids_of(index: Any) -> Centroids:
    """The centroids that an index was trained with, read back from its quantizer."""
    quantizer = faiss.downcast_index(index.quantizer)
    if not isinstance(quantizer, faiss.IndexRefine):
        return grouped(_vectors_of(quantizer), np.empty((0, index.d), np.float32))
    groups = _vectors_of(faiss.downcast_index(faiss.downcast_index(quantizer.base_index).quantizer))
    return grouped(_vectors_of(faiss.downcast_index(quantizer.refine_index)), groups)


def _vectors_of(flat: Any) -> Vectors:
    vectors: Vectors = flat.reconstruct_n(0, flat.ntotal)
    return vectors


def search_parameters(index: Any, nprobe: int, selector: Any = None) -> Any:
    """How an IVF index visits `nprobe` lists.

    Args:
        index: an IVF index.
        nprobe: lists to visit.
        selector: FAISS IDSelector of the rows that may be found; None for all.
    """
    options: dict[str, Any] = {"nprobe": nprobe} | ({} if selector is None else {"sel": selector})
    if (quantizer := quantizer_parameters(index, nprobe)) is not None:
        options["quantizer_params"] = quantizer
    return make.SearchParametersIVF(**options)


def quantizer_parameters(index: Any, nprobe: int) -> Any:
    """How the quantizer of an IVF index finds `nprobe` lists.

    Where that is through groups, enough groups are visited.

    Args:
        index: an IVF index.
        nprobe: lists to find.
    """
    quantizer = faiss.downcast_index(index.quantizer)
    if not isinstance(quantizer, faiss.IndexRefine):
        return None
    groups = faiss.downcast_index(quantizer.base_index).nlist
    lists_per_group = index.nlist / groups
    visited = min(groups, math.ceil(groups / 8 + 8 * nprobe / lists_per_group))
    inner = make.SearchParametersIVF(nprobe=visited)
    # Codes cannot separate the nearest few.
    factor = min(1.5 + 8 / nprobe, index.nlist / nprobe)
    return make.IndexRefineSearchParameters(k_factor=factor, base_index_params=inner)


def write_refine_header(file: BinaryIO, refine: Any, count: int) -> None:
    """Begin a FAISS file of `count` refine vectors, whose codes follow one after another.

    FAISS writes such a file only from memory. An index without vectors ends with the size of its
    codes, and holds the number of vectors behind its name and dimension: both are filled in, so
    that codes can be streamed.
    """
    data = bytearray(faiss.serialize_index(refine).tobytes())
    data[8:16] = np.int64(count).tobytes()
    data[-8:] = np.uint64(count * refine.sa_code_size()).tobytes()
    file.write(bytes(data))


def open_refine(file: Path, count: int, dim: int) -> Any:
    """The refine vectors of a file, mapped.

    Raises:
        ArtefactError: not such a file, or of other vectors.
    """
    try:
        refine = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise ArtefactError(f"{file} cannot be opened: {error}") from None
    if (refine.ntotal, refine.d) != (count, dim):
        raise ArtefactError(
            f"{file} holds {refine.ntotal} vectors of {refine.d} dimensions, expected {count} of "
            f"{dim}"
        )
    return refine
