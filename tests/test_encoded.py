import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritower.retrieval.building.assemble import write_ivf_pq
from tritower.retrieval.id_table import IdTable
from tritower.retrieval.ivf import encoded
from tritower.retrieval.ivf.encoded import Blocks, grouped_lists, to_table
from tritower.retrieval.ivf.engine import Engine, Settings
from tritower.retrieval.ivf.ivf_pq import EncodedVectors, train
from tritower.retrieval.ivf.spec import parse_ivf_pq

LISTS, CODE, FINE = 7, 3, 5


def made_up(count, seed, list_columns=1, refine=FINE):
    """Encoded vectors of random lists and codes; with a spread of 2, some have no second list."""
    generator = np.random.default_rng(seed)
    lists = np.stack([generator.permutation(LISTS)[:list_columns] for _ in range(count)]).reshape(
        count, list_columns
    )
    if list_columns > 1:
        lists[generator.random(count) < 0.2, 1] = -1
    codes = generator.integers(0, 256, (list_columns, count, CODE), np.uint8)
    return EncodedVectors(
        lists.astype(np.int32), codes, generator.integers(0, 256, (count, refine), np.uint8)
    )


def blocks(folder, parts, name="b"):
    files = []
    for number, part in enumerate(parts):
        files.append(folder / f"{name}-{number}.parquet")
        ids = pa.array([f"{name}{number}-{i}" for i in range(len(part.lists))], pa.large_string())
        pq.write_table(to_table(ids, part), files[-1])
    return Blocks(files)


def by_hand(sources):
    """List -> its (row, code) pairs in the order of rows, in plain Python."""
    lists = {number: [] for number in range(LISTS)}
    for parts, moved in sources:
        row = 0
        for part in parts:
            for i in range(len(part.lists)):
                new = row + moved if isinstance(moved, int) else moved[row]
                for number, code in zip(part.lists[i], part.codes[:, i], strict=True):
                    if number >= 0 and new >= 0:
                        lists[number].append((int(new), code.tolist()))
                row += 1
    return {number: sorted(pairs) for number, pairs in lists.items()}


def as_pairs(groups):
    return {
        number: [(row, code) for row, code in zip(rows.tolist(), codes.tolist(), strict=True)]
        for number, (codes, rows) in enumerate(groups)
    }


def sizes_of(wanted):
    return np.array([len(wanted[number]) for number in range(LISTS)])


@pytest.mark.parametrize("list_columns", [1, 2])
def test_what_is_encoded_comes_back_from_blocks(tmp_path, list_columns):
    parts = [
        made_up(20, 0, list_columns),
        made_up(1, 1, list_columns),
        made_up(13, 2, list_columns),
    ]
    source = blocks(tmp_path, parts)
    assert source.count == 34
    assert pa.concat_tables(source.products()).column("product_id").to_pylist() == [
        f"b{number}-{i}" for number, count in enumerate((20, 1, 13)) for i in range(count)
    ]
    assert np.array_equal(
        np.concatenate(list(source.refine())), np.concatenate([part.refine for part in parts])
    )
    wanted = by_hand([(parts, 0)])
    assert np.array_equal(source.sizes(LISTS), sizes_of(wanted))
    for first, end in ((0, LISTS), (2, 3), (3, 6)):
        found = {number: [] for number in range(LISTS)}
        for entries in source.entries(first, end):
            for number, row, code in zip(*(a.tolist() for a in entries), strict=True):
                found[number].append((row, code))
        for number in range(LISTS):
            assert sorted(found[number]) == (wanted[number] if first <= number < end else [])


def test_a_table_without_finer_vectors_has_no_such_column(tmp_path):
    table = to_table(pa.array(["a"]), made_up(1, 0, refine=0))
    assert table.column_names == ["product_id", "content", "list0", "code0"]
    assert blocks(tmp_path, [made_up(3, 0, refine=0)]).sizes(LISTS).sum() == 3


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=3), min_size=1, max_size=3),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 40, 500, 1 << 20]),
    st.integers(0, 99),
)
def test_lists_are_grouped_alike_in_any_number_of_passes(
    tmp_path_factory, counts, list_columns, budget, seed
):
    """Several sources of several blocks; rows of the first are moved and some of them dropped."""
    generator = np.random.default_rng(seed)
    contents = [
        [made_up(count, int(generator.integers(1 << 30)), list_columns) for count in source_counts]
        for source_counts in counts
    ]
    total = sum(counts[0])
    new_rows = generator.permutation(total)  # new numbers in any order
    moved = [np.where(generator.random(total) < 0.3, -1, new_rows)]
    for source_counts in counts[1:]:
        moved.append(total)
        total += sum(source_counts)
    folder = tmp_path_factory.mktemp("blocks")
    sources = [(blocks(folder, parts, f"s{i}"), moved[i]) for i, parts in enumerate(contents)]
    wanted = by_hand(list(zip(contents, moved, strict=True)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoded, "GROUPING_BYTES", budget)
        found = list(grouped_lists(sources, sizes_of(wanted), CODE))
    assert len(found) == LISTS
    assert as_pairs(found) == wanted


def test_passes_are_as_few_as_the_budget_allows(tmp_path, monkeypatch):
    """Lists of 10, 0, 20, 10, 5, 0, 40 entries of 19 bytes and a budget of 30 entries:

    10 + 0 + 20, 10 + 5 + 0, 40.
    """
    sizes = np.array([10, 0, 20, 10, 5, 0, 40])
    lists = np.repeat(np.arange(LISTS), sizes)[:, None].astype(np.int32)
    part = EncodedVectors(lists, np.zeros((1, 85, CODE), np.uint8), np.zeros((85, 0), np.uint8))
    source, asked = blocks(tmp_path, [part]), []
    original = source.entries
    monkeypatch.setattr(
        source, "entries", lambda first, end: asked.append((first, end)) or original(first, end)
    )
    monkeypatch.setattr(encoded, "GROUPING_BYTES", 30 * (CODE + 16))
    assert [len(rows) for _, rows in grouped_lists([(source, 0)], sizes, CODE)] == sizes.tolist()
    assert asked == [(0, 3), (3, 6), (6, 7)]


@pytest.mark.parametrize("spill", [False, True])
def test_an_index_from_two_sources_without_the_rows_that_were_dropped(tmp_path, spill):
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((900, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    trained = train(vectors, parse_ivf_pq("IVF8,PQ4x4fsr,Refine(SQ8)"), seed=0, spill=spill)
    parts = [
        trained.encode(vectors[:400]),
        trained.encode(vectors[400:600]),
        trained.encode(vectors[600:]),
    ]
    old, new = blocks(tmp_path, parts[:2], "old"), blocks(tmp_path, parts[2:], "new")
    kept = generator.random(600) < 0.7
    moved = np.where(kept, np.cumsum(kept) - 1, -1)
    folder = tmp_path / "index"
    folder.mkdir()
    write_ivf_pq(folder, trained, [(old, moved), (new, int(kept.sum()))], quiet=True)
    rest = np.concatenate([vectors[:600][kept], vectors[600:]])
    engine = Engine.open(folder, {"count": len(rest), "dim": 16, "spill": spill})
    scores, rows = engine.search(rest, 1, Settings(8, 100.0))
    assert np.array_equal(rows[:, 0], np.arange(len(rest)))
    assert np.allclose(scores, 1, atol=0.02)
    everything = engine.search(vectors[:3], len(rest), Settings(8, 1.0))[1]
    assert (np.sort(everything, axis=1) == np.arange(len(rest))).all()
    old_ids = [f"old{int(i >= 400)}-{i - 400 * int(i >= 400)}" for i in np.flatnonzero(kept)]
    assert IdTable(folder / "ids.arrow").column.to_pylist() == old_ids + [
        f"new0-{i}" for i in range(300)
    ]
