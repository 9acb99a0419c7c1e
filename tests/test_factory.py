import math

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritower.retrieval.building.choose_spec import (
    EXACT_NUMBERS,
    choose_factory,
    choose_lists,
    default_nprobe,
    num_lists,
    num_sub_quantizers,
    train_size,
)
from tritower.retrieval.building.faiss_index import make_index
from tritower.retrieval.ivf.engine import lists_of
from tritower.retrieval.ivf.spec import IvfPqSpec, parse_ivf_pq


@given(st.integers(1, 10**9), st.integers(1, 2048))
def test_the_default_is_exact_up_to_a_number_of_numbers(count, dim):
    index_spec = choose_factory(count, dim)
    if count * dim <= EXACT_NUMBERS:
        assert index_spec.factory == "Flat"
        assert f"{count:,} vectors of {dim} dimensions are few enough" in index_spec.reason
    else:
        assert index_spec == choose_lists(count, dim)


def test_thirty_thousand_products_of_256_dimensions_are_the_most_that_are_searched_exactly():
    assert choose_factory(30_000, 256).factory == choose_factory(10_000, 768).factory == "Flat"
    assert choose_factory(30_001, 256).factory == "IVF512,PQ64x4fsr,Refine(SQ8)"
    assert choose_factory(10_001, 768).factory == "IVF128,PQ192x4fsr,Refine(SQ8)"


@given(st.integers(1, 10**9), st.integers(1, 2048))
def test_the_factory_with_lists_is_always_legal(count, dim):
    index_spec = choose_lists(count, dim)
    if count < 624:
        assert index_spec.factory == "Flat" and "fewer than the 624" in index_spec.reason
        return
    lists = int(index_spec.factory.split(",")[0][3:])
    assert lists & (lists - 1) == 0 and lists * 39 <= count
    assert f"{lists:,} lists" in index_spec.reason
    assert 1 <= default_nprobe(lists) <= lists
    spec = parse_ivf_pq(index_spec.factory)
    assert (spec is None) == (num_sub_quantizers(dim) is None)
    assert spec is None or (
        spec.refine == "SQ8" and spec.residual and dim % spec.sub_quantizers == 0
    )
    if count < 10**5:
        index = make_index(index_spec.factory, dim)
        assert lists_of(index).nlist == lists and index.d == dim


@pytest.mark.parametrize(
    ("count", "lists"),
    [
        (624, 8),
        (3000, 64),
        (6000, 128),
        (10**4, 128),
        (10**5, 2048),
        (10**6, 8192),
        (10**7, 32768),
        (10**8, 65536),
    ],
)
def test_default_lists_by_size(count, lists):
    """The power of two nearest to the lesser of 8 sqrt(N) and N / 61.

    Of 10,000 that is 164, of 10 million 25,298.
    """
    assert choose_lists(count, 256).factory == f"IVF{lists},PQ64x4fsr,Refine(SQ8)"
    assert num_lists(count) == lists
    aim = min(8 * math.sqrt(count), count / 61)
    assert all(
        abs(math.log2(lists / aim)) <= abs(math.log2(other / aim))
        for other in (lists // 2, lists * 2)
    )


@given(st.integers(624, 10**9), st.integers(0, 10**6))
def test_more_vectors_never_have_fewer_lists(count, more):
    assert num_lists(count) <= num_lists(count + more)


@pytest.mark.parametrize(
    ("dim", "sub_quantizers"),
    [(256, 64), (64, 16), (30, 10), (50, 25), (35, 7), (49, 7), (127, None), (3, 1)],
)
def test_pieces_are_of_four_dimensions_or_what_comes_near(dim, sub_quantizers):
    assert num_sub_quantizers(dim) == sub_quantizers


def test_dimensions_that_cannot_be_cut_get_8_bits_each():
    index_spec = choose_lists(10**4, 127)
    assert (
        index_spec.factory == "IVF128,SQ8"
        and "127 dimensions cannot be cut into short pieces" in index_spec.reason
    )


@given(
    st.integers(1, 10**6),
    st.integers(1, 999),
    st.booleans(),
    st.sampled_from([None, "SQ8", "SQfp16"]),
)
def test_a_design_reads_back_from_its_factory_string(lists, sub_quantizers, residual, refine):
    spec = IvfPqSpec(lists, sub_quantizers, residual, refine)
    assert parse_ivf_pq(str(spec)) == spec


@pytest.mark.parametrize(
    "factory",
    [
        "Flat",
        "IVF64,Flat",
        "IVF64,SQ8",
        "IVF64,PQ8",
        "IVF64,PQ8x4",
        "IVF64,PQ8x8fsr",
        "IVF0,PQ8x4fsr",
        "IVF64,PQ0x4fsr",
        "IVF64,PQ8x4fsr,RFlat",
        "IVF64,PQ8x4fsr,Refine(Flat)",
        "IVF64,PQ8x4fsr,Refine(SQ4)",
        "OPQ8,IVF64,PQ8x4fsr",
        "IVF64_HNSW32,PQ8x4fsr",
        " IVF64,PQ8x4fsr",
        "IVF64,PQ8x4fsr,",
        "IVF-64,PQ8x4fsr",
    ],
)
def test_other_factory_strings_are_not_taken_for_such_a_design(factory):
    assert parse_ivf_pq(factory) is None


@pytest.mark.parametrize(
    "factory", ["IVF4,PQ8x4fsr", "IVF4,PQ8x4fs,Refine(SQ8)", "IVF4,PQ5x4fsr,Refine(SQfp16)"]
)
def test_sizes_are_those_of_faiss(factory):
    spec = parse_ivf_pq(factory)
    index = make_index(factory, 40)
    lists = lists_of(index)
    assert (lists.nlist, lists.pq.M, lists.code_size) == (4, spec.sub_quantizers, spec.code_size)
    assert lists.by_residual == spec.residual
    refine = (
        faiss.downcast_index(index.refine_index).sa_code_size()
        if isinstance(index, faiss.IndexRefine)
        else 0
    )
    assert spec.refine_size(40) == refine


def test_how_many_lists_are_visited_by_default():
    assert [default_nprobe(lists) for lists in (1, 10, 16, 100, 256, 257, 16384)] == [
        1,
        10,
        16,
        16,
        16,
        17,
        128,
    ]


def test_how_many_vectors_train():
    assert train_size(100, 4) == 100  # all there are
    assert train_size(10**6, 1024) == 65_536  # enough for any code book
    assert train_size(10**6, 16384) == 39 * 16384
    assert np.all([train_size(count, 4096) <= count for count in (1, 10**5, 10**9)])
