import io

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritower.retrieval.ivf.inverted_lists import (
    attach,
    extents,
    file_bytes,
    pack,
    read_lists,
    write_list,
)


def vectors_of(count, dim, seed=0):
    array = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def trained(dim, sub_quantizers, lists, residual=True):
    """A fast-scan index without vectors, trained by FAISS alone."""
    index = faiss.index_factory(
        dim, f"IVF{lists},PQ{sub_quantizers}x4fs{'r' * residual}", faiss.METRIC_INNER_PRODUCT
    )
    index.train(vectors_of(1000, dim, seed=7))
    return index


@pytest.fixture(scope="module")
def index():
    return trained(16, 4, 5)


def refine_codes(index, vectors):
    """Lists and codes by FAISS's own quantizers."""
    lists = index.quantizer.search(vectors, 1)[1][:, 0]
    centroids = index.quantizer.reconstruct_n(0, index.nlist)
    return lists, index.pq.compute_codes(
        vectors - centroids[lists] if index.by_residual else vectors
    )


def written(file, index, lists, codes):
    """Write all lists to a file; returns their sizes."""
    with file.open("wb") as stream:
        for number in range(index.nlist):
            rows = np.flatnonzero(lists == number)
            write_list(stream, index, codes[rows], rows)
    return np.bincount(lists, minlength=index.nlist).astype(np.int64)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(
    ("dim", "sub_quantizers", "lists"), [(16, 4, 12), (28, 7, 5), (32, 32, 40), (6, 1, 3)]
)
def test_mapped_lists_search_like_those_that_faiss_adds_itself(
    tmp_path, dim, sub_quantizers, lists, residual
):
    plain = trained(dim, sub_quantizers, lists, residual)
    mapped = faiss.clone_index(plain)
    vectors, queries = vectors_of(1500, dim, 1), vectors_of(50, dim, 2)
    plain.add(vectors)
    sizes = written(tmp_path / "lists.bin", mapped, *refine_codes(mapped, vectors))
    assert (sizes % 32 != 0).any()
    keep = attach(mapped, tmp_path / "lists.bin", sizes)
    mapped.ntotal = len(vectors)
    for nprobe in (1, 3, lists):
        for k in (1, 10, 700):
            parameters = faiss.SearchParametersIVF(nprobe=nprobe)
            wanted = plain.search(queries, k, params=parameters)
            found = mapped.search(queries, k, params=parameters)
            assert np.array_equal(found[0], wanted[0])
            assert np.array_equal(found[1], wanted[1])
    assert keep.list_size(0) == sizes[0]


def test_a_selector_reaches_mapped_lists(tmp_path, index):
    mapped = faiss.clone_index(index)
    vectors = vectors_of(300, 16, 1)
    keep = attach(
        mapped,
        tmp_path / "lists.bin",
        written(tmp_path / "lists.bin", mapped, *refine_codes(mapped, vectors)),
    )
    mapped.ntotal = 300
    wanted = np.arange(0, 300, 7)
    selector = faiss.IDSelectorBatch(wanted)
    rows = mapped.search(
        vectors[:5], 100, params=faiss.SearchParametersIVF(nprobe=5, sel=selector)
    )[1]
    for found in rows:
        assert np.array_equal(np.sort(found[found >= 0]), wanted)
    assert keep.nlist == 5


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 2, 31, 32, 33, 63, 64, 65, 100]), min_size=5, max_size=5),
    st.integers(0, 99),
)
def test_what_is_written_is_read_back(tmp_path_factory, index, sizes, seed):
    file = tmp_path_factory.mktemp("lists") / "lists.bin"
    generator = np.random.default_rng(seed)
    contents = [
        (
            generator.integers(0, 256, (size, 2), np.uint8),
            generator.integers(0, 2**62, size, np.int64),
        )
        for size in sizes
    ]
    with file.open("wb") as stream:
        for codes, rows in contents:
            write_list(stream, index, codes, rows)
    sizes = np.array(sizes, np.int64)
    assert (extents(sizes, 2)[:, 2] % 64 == 0).all()
    assert file.stat().st_size == file_bytes(sizes, 2)
    for (codes, rows), (read_codes, read_rows) in zip(
        contents, read_lists(file, index, sizes), strict=True
    ):
        assert np.array_equal(codes, read_codes)
        assert np.array_equal(rows, read_rows)


def test_packed_codes_are_those_of_faiss_and_the_rest_of_a_block_is_zeros(index):
    vectors = vectors_of(200, 16, 1)
    added = faiss.clone_index(index)
    added.add(vectors)
    lists, codes = refine_codes(index, vectors)
    blocks = faiss.downcast_InvertedLists(added.invlists)
    for number in range(5):
        packed = pack(index, codes[lists == number])
        size = int(-(-(lists == number).sum() // 32) * 64)  # two bytes a code
        assert packed.tobytes() == faiss.rev_swig_ptr(blocks.get_codes(number), size).tobytes()
    assert pack(index, np.empty((0, 2), np.uint8)).shape == (0, 64)


def test_places_of_lists_by_hand():
    """Each begins at a multiple of 64 bytes:

    64 x 4 + 33 x 8 = 520 become 576, 32 x 4 + 32 x 8 = 384 stay.
    """
    sizes = np.array([0, 33, 32, 0, 1])
    assert extents(sizes, 4).tolist() == [
        [0, 0, 0],
        [33, 64, 0],
        [32, 32, 576],
        [0, 0, 960],
        [1, 32, 960],
    ]
    assert file_bytes(sizes, 4) == 960 + 192  # 32 x 4 + 8 = 136
    assert extents(np.array([1, 1, 1]), 3)[:, 2].tolist() == [0, 128, 256]  # 32 x 3 + 8 = 104


def test_lists_may_all_be_empty(tmp_path, index):
    mapped = faiss.clone_index(index)
    (tmp_path / "lists.bin").touch()
    keep = attach(mapped, tmp_path / "lists.bin", np.zeros(5, np.int64))
    assert (
        mapped.search(vectors_of(3, 16), 4, params=faiss.SearchParametersIVF(nprobe=5))[1] == -1
    ).all()
    assert [
        len(rows) for _, rows in read_lists(tmp_path / "lists.bin", index, np.zeros(5, np.int64))
    ] == [0] * 5
    assert keep.list_size(0) == 0


@pytest.mark.parametrize(
    ("sizes", "cut"),
    [
        ([10, 0, 3, 40], 0),  # a list too few
        ([10, 0, 3, 40, 5, 0], 0),  # one too many
        ([10, 0, 3, 40, 0], 0),  # one list less
        ([42, 0, 3, 40, 5], 0),  # a block more
        ([-1, 0, 3, 40, 5], 0),
        ([10, 0, 3, 40, 5], 1),  # a byte less in the file
    ],
)
def test_lists_that_do_not_belong_to_the_index_are_refused(tmp_path, index, sizes, cut):
    stream = io.BytesIO()
    for size in (10, 0, 3, 40, 5):
        write_list(stream, index, np.zeros((size, 2), np.uint8), np.arange(size))
    (tmp_path / "lists.bin").write_bytes(stream.getvalue()[: len(stream.getvalue()) - cut])
    with pytest.raises(
        ValueError,
        match=r"lists\.bin has \d+ bytes; \d lists of 2-byte codes for an index of 5 lists",
    ):
        attach(faiss.clone_index(index), tmp_path / "lists.bin", np.array(sizes, np.int64))


@pytest.mark.parametrize(
    "sizes", [np.array(5), np.zeros(5), np.zeros((5, 1), np.int64), np.zeros(5, np.uint64)]
)
def test_sizes_of_another_type_or_shape_are_refused(tmp_path, index, sizes):
    (tmp_path / "lists.bin").touch()
    with pytest.raises(
        ValueError, match=r"sizes of lists are .* of shape .*; expected int64, one for each list"
    ):
        attach(faiss.clone_index(index), tmp_path / "lists.bin", sizes)
