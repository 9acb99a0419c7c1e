"""Checks in front of FAISS, which accepts wrong dimensions, NaN and unnormalized vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeGuard, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Metric = Literal["cosine", "inner_product", "kl"]
"""What vectors are compared by; the score is their inner product.

cosine: unit vectors. inner_product: vectors as they are; longer ones score higher. kl: a query's
probabilities and a product's log-probabilities plus log D, so products of the least
Kullback-Leibler divergence from the query come first. Sides differ: a product as a query takes the
vector of `as_queries`.
"""

NORM_TOLERANCE = 0.01
"""Lengths this close to 1 count as rounding (float16) and are made exact.

Others are refused, or normalized on request. The same holds for sums of probabilities.
"""

EXACT = 1e-6
"""Squares of lengths this close to 1 are float32's own rounding."""


def checked_metric(metric: str) -> Metric:
    """The metric by its name.

    Raises:
        ValueError: not one of those that exist.
    """
    if metric not in get_args(Metric):
        raise ValueError(f"metric {metric!r}; expected one of {', '.join(get_args(Metric))}")
    return metric  # type: ignore[return-value]


def checked_vectors(
    vectors: ArrayLike,
    *,
    dim: int | None = None,
    metric: Metric = "cosine",
    normalize: bool = False,
    names: Sequence[str] | None = None,
    where: str = "vectors",
    first_row: int = 0,
) -> NDArray[np.float32]:
    """Vectors as FAISS needs them.

    (B, D) float32, C-contiguous, finite, and of unit length for cosine.

    Args:
        vectors: (B, D) numbers: float16, float32, float64 or nested lists, in any memory order.
        dim: the D that is expected; None for any.
        metric: what the vectors are compared by.
        normalize: divide vectors of any length by it; without, lengths far from 1 are refused under
            cosine.
        names: (B,) ids, to name the faulty row.
        where: what the vectors are, for the messages.
        first_row: number of the first row there, for the messages.

    Raises:
        ValueError: wrong shape or dtype, NaN, infinity, a zero vector, or a vector that is not of
            unit length.
    """
    if metric == "kl" and normalize:
        raise ValueError(
            f"{where}: kl compares probabilities, which another length would spoil: do not "
            "normalize"
        )
    if metric == "cosine" and _is_fine_already(vectors, dim):
        return vectors
    given = _numbers(vectors, dim, where)
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(given, dtype=np.float32)

    # All messages name the row, its id, and how many rows are like it.
    def refuse(bad: NDArray[np.bool_], problem: str) -> None:
        if bad.any():
            row = int(bad.argmax())
            name = "" if names is None else f" (id {names[row]!r})"
            raise ValueError(
                f"{where}: row {first_row + row}{name} {problem}; {int(bad.sum())} of {len(bad)} "
                "rows are like this"
            )

    # Lengths show most faults at once: NaN, infinity, zero, and vectors that are not normalized.
    length = _lengths(array)
    # A long but finite vector has a finite length, too.
    if not np.isfinite(length).all():
        refuse(np.asarray(~np.isfinite(array).all(axis=1)), "holds NaN or infinity")
    refuse(length == 0, "is a zero vector, which is similar to nothing")
    if metric != "cosine" and not normalize:
        return array
    if not normalize:
        bad = np.asarray(np.abs(length - 1) > NORM_TOLERANCE)
        worst = length[bad.argmax()] if len(length) else 1.0
        refuse(
            bad,
            f"has length {worst:.4g}, cosine needs 1: normalize (--normalize) or name metric "
            "inner_product",
        )
    # Divide by the length, unless that is 1 up to float32's rounding.
    if ((length < 1e-30) | (length > 1e30)).any():  # outside float32's range
        return np.divide(array, length[:, None], out=np.empty_like(array), casting="same_kind")
    length[np.abs(np.square(length) - 1) <= EXACT] = 1  # unchanged, whatever is beside them
    # An array that was made here may be overwritten.
    into = None if np.shares_memory(array, given) else array
    return np.divide(array, length.astype(np.float32)[:, None], out=into)


def _numbers(vectors: ArrayLike, dim: int | None, where: str) -> NDArray[Any]:
    """(B, D) numbers; refuses other dtypes and shapes."""
    array = np.asarray(vectors)
    is_list_of_integers = isinstance(vectors, list | tuple) and array.dtype.kind in "iu"
    if array.dtype.kind != "f" and not is_list_of_integers:
        raise ValueError(f"{where}: dtype {array.dtype}; expected float16, float32 or float64")
    if array.ndim != 2 or (dim is not None and array.shape[1] != dim) or not array.shape[1]:
        expected = "(B, D)" if dim is None else f"(B, {dim})"
        raise ValueError(f"{where}: shape {array.shape}; expected {expected}, one vector per row")
    return array


def checked_queries(
    vectors: NDArray[np.float32], metric: Metric, where: str = "queries"
) -> NDArray[np.float32]:
    """(Q, D) vectors that passed `checked_vectors`, as they are, if they can be a query's.

    Raises:
        ValueError: rows that are no probabilities, under kl: most likely a product's vector, whose
            hits would be wrong.
    """
    if metric == "kl":
        bad = (vectors < 0).any(axis=1) | (np.abs(vectors.sum(axis=1) - 1) > NORM_TOLERANCE)
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(
                f"{where}: row {row} holds numbers from {vectors[row].min():.3g} to "
                f"{vectors[row].max():.3g} with the "
                f"sum {vectors[row].sum():.4g}; under kl a query is probabilities with the sum 1 "
                "(a product's vector "
                f"asks as tritower.retrieval.vectors.checks.as_queries makes it); {int(bad.sum())} "
                f"of {len(bad)} rows are like this"
            )
    return vectors


def as_queries(products: NDArray[np.float32], metric: Metric) -> NDArray[np.float32]:
    """Turn products' vectors into queries.

    Args:
        products: (..., D) float32, as an index or an embeddings folder holds them.
        metric: what they are compared by.

    Returns:
        (..., D) float32: the same, or under kl their probabilities.
    """
    if metric == "kl":
        return probabilities(products)
    return products


def probabilities(logits: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Softmax over the last axis: (..., D) -> (..., D) float32."""
    exponential = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: NDArray[np.float32] = (exponential / exponential.sum(axis=-1, keepdims=True)).astype(
        np.float32
    )
    return result


def _is_fine_already(vectors: ArrayLike, dim: int | None) -> TypeGuard[NDArray[np.float32]]:
    """Whether there is nothing to do.

    A single query would spend as long on all checks as on a tenth of its search.
    """
    if (
        not isinstance(vectors, np.ndarray)
        or vectors.dtype != np.float32
        or vectors.ndim != 2
        or not len(vectors)
    ):
        return False
    if not vectors.flags.c_contiguous or vectors.shape[1] != (dim or vectors.shape[1]):
        return False
    off = np.abs(np.einsum("ij,ij->i", vectors, vectors) - 1).max()
    return bool(off <= EXACT)  # NaN is not


def _lengths(array: NDArray[np.float32]) -> NDArray[np.float64]:
    """(B,) Euclidean lengths; squares outside float32's range are taken in float64."""
    square = np.einsum("ij,ij->i", array, array).astype(np.float64)
    extreme = ~((square > 1e-30) & (square < 1e30))
    if extreme.any():
        square[extreme] = np.square(array[extreme], dtype=np.float64).sum(axis=1)
    length: NDArray[np.float64] = np.sqrt(square)
    return length


def vector_hashes(array: NDArray[np.float32]) -> NDArray[np.int64]:
    """(B,) int64 hash of each vector's bytes.

    Equal vectors have equal values, others very likely not.
    """
    factors = np.random.default_rng(0).integers(
        0, 2**63, array.shape[1], dtype=np.uint64
    ) | np.uint64(1)
    words = np.ascontiguousarray(array).view(np.uint32).astype(np.uint64)
    return (words * factors).sum(axis=1, dtype=np.uint64).view(np.int64)
