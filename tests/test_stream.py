"""The order of examples: a pure function of seed, epoch and step."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from tritower.datamodules.stream import BatchStream, Draw, StreamPosition


def epoch_of(stream: BatchStream, epoch: int = 0) -> list[np.ndarray]:
    stream.set_epoch(epoch)
    return [draw.examples for draw in stream]


sizes = {
    "num_examples": st.integers(1, 400),
    "batch_size": st.integers(1, 90),
    "seed": st.integers(0, 5),
}


@given(**sizes, block_size=st.integers(1, 50), window_blocks=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_every_example_comes_once_per_epoch_plus_the_fill(
    num_examples: int, batch_size: int, seed: int, block_size: int, window_blocks: int
) -> None:
    stream = BatchStream(
        num_examples, batch_size, seed=seed, block_size=block_size, window_blocks=window_blocks
    )
    batches = epoch_of(stream, 1)
    assert len(batches) == len(stream) == -(-num_examples // batch_size)
    assert {len(batch) for batch in batches} == {batch_size}
    order = np.concatenate(batches)
    assert sorted(order[:num_examples]) == list(range(num_examples))
    following = np.concatenate(list(stream.order(2)))
    assert np.array_equal(
        order[num_examples:][: len(following)], following[: len(order) - num_examples]
    )


def test_the_order_follows_from_seed_and_epoch_alone() -> None:
    first, again = BatchStream(100, 8, seed=3), BatchStream(100, 8, seed=3)
    list(again)  # what was read before does not matter
    for epoch in (0, 1, 5):
        assert np.array_equal(epoch_of(first, epoch), epoch_of(again, epoch))
    assert not np.array_equal(epoch_of(first, 0), epoch_of(first, 1))
    assert not np.array_equal(epoch_of(first, 0), epoch_of(BatchStream(100, 8, seed=4), 0))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_take_disjoint_slices_of_the_same_batch(num_ranks: int) -> None:
    whole = epoch_of(BatchStream(65, 16), 2)
    ranks = [
        epoch_of(BatchStream(65, 16, position=StreamPosition(rank, num_ranks)), 2)
        for rank in range(num_ranks)
    ]
    assert {len(batches) for batches in ranks} == {5}  # every rank has the same number of steps
    for step, batch in enumerate(whole):
        assert np.array_equal(np.concatenate([batches[step] for batches in ranks]), batch)


@pytest.mark.parametrize("start", [0, 1, 7, 12])
def test_a_resumed_epoch_is_the_tail_of_the_whole_one_and_the_next_is_whole(start: int) -> None:
    whole = BatchStream(100, 8, seed=1)
    resumed = BatchStream(100, 8, seed=1, position=StreamPosition(epoch=3, start=start))
    assert np.array_equal([draw.examples for draw in resumed], epoch_of(whole, 3)[start:])
    assert np.array_equal(epoch_of(resumed, 4), epoch_of(whole, 4))
    assert len(resumed) == 13  # Lightning counts the steps that are done


def test_a_reader_of_one_window_reads_every_block_once() -> None:
    stream = BatchStream(1000, 10, block_size=10, window_blocks=5)
    blocks = np.concatenate(epoch_of(stream)) // 10
    for window in blocks.reshape(-1, 50):
        assert len(set(window)) == 5


def test_neighbors_of_the_catalogue_do_not_stay_neighbors() -> None:
    order = np.concatenate(epoch_of(BatchStream(1000, 10, block_size=100, window_blocks=10)))
    assert sum(abs(a - b) == 1 for a, b in pairwise(order)) < 20


def test_draws_carry_the_epoch() -> None:
    stream = BatchStream(10, 4)
    stream.set_epoch(7)
    assert {draw.epoch for draw in stream} == {7}


def test_fewer_examples_than_a_batch_fill_it_from_coming_epochs() -> None:
    [batch] = epoch_of(BatchStream(3, 8))
    assert len(batch) == 8
    assert np.bincount(batch).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 8), "num_examples=0"), ((10, 9), "batch_size=9 is not divisible by the 2")],
)
def test_impossible_streams_are_refused(arguments: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchStream(*arguments, position=StreamPosition(num_ranks=2))


class Echo(Dataset[Draw]):
    """Gives the draws back."""

    def __getitem__(self, draw: Draw) -> Draw:
        return draw


def test_loader_processes_do_not_change_the_batches() -> None:
    loader = DataLoader(
        Echo(),
        batch_size=None,
        sampler=BatchStream(33, 8, position=StreamPosition(epoch=1, start=1)),
        num_workers=2,
        collate_fn=list,
        multiprocessing_context="spawn",
    )
    assert np.array_equal(
        [examples for _, examples, _ in loader], epoch_of(BatchStream(33, 8), 1)[1:]
    )
