"""Which examples are in which batch: a pure function of (seed, epoch, step).

The number of loader workers and of ranks never changes the global batch, and a resumed run
continues at its step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from tritower.datamodules.negatives import Negatives


class Draw(NamedTuple):
    """The examples of one step on one rank.

    Attributes:
        epoch: also seeds what is random about each example.
        examples: (B,) int64 example numbers.
        negatives: extra products of the batch; None for none.
    """

    epoch: int
    examples: np.ndarray
    negatives: Negatives | None = None


@dataclass(frozen=True)
class StreamPosition:
    """Where a process is in a distributed or resumed run.

    Attributes:
        rank: this process takes the `rank`-th slice of each global batch.
        num_ranks: processes.
        epoch: the first epoch that is iterated.
        start: its first step.
    """

    rank: int = 0
    num_ranks: int = 1
    epoch: int = 0
    start: int = 0


BEGIN = StreamPosition()


class BatchStream(Sampler[Draw]):
    """Shuffled batches in bounded memory.

    Blocks of neighboring examples are permuted, windows of blocks are shuffled.

    A reader that caches one window of rows reads every row once per epoch. The short last batch is
    filled from the start of the next epoch's order, so that all batches of all ranks have the same
    size.

    Args:
        num_examples: E > 0.
        batch_size: of the global batch; divisible by `num_ranks`.
        seed: of all orders.
        block_size: neighboring examples that move together.
        window_blocks: blocks that are shuffled together.
        position: of this process in the run.
        negatives: extra products of the batches; another value counts from the next epoch on.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        *,
        seed: int = 0,
        block_size: int = 256,
        window_blocks: int = 32,
        position: StreamPosition = BEGIN,
        negatives: Negatives | None = None,
    ) -> None:
        if num_examples < 1:
            raise ValueError("num_examples=0: there is nothing to train on.")
        # Each process takes an equal slice of the global batch.
        if batch_size % position.num_ranks:
            raise ValueError(
                f"batch_size={batch_size} is not divisible by the {position.num_ranks} processes "
                "of this run."
            )
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.seed = seed
        self.block_size = block_size
        self.window_blocks = window_blocks
        self.rank = position.rank
        self.num_ranks = position.num_ranks
        self.epoch = position.epoch
        self.start = position.start
        self.negatives = negatives

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_examples // self.batch_size)

    def order(self, epoch: int) -> Iterator[np.ndarray]:
        """All example numbers of an epoch, (n,) int64 window by window."""
        num_blocks = -(-self.num_examples // self.block_size)
        blocks = np.random.default_rng((self.seed, epoch)).permutation(num_blocks)
        for first in range(0, num_blocks, self.window_blocks):
            window = [self._block(block) for block in blocks[first : first + self.window_blocks]]
            rng = np.random.default_rng((self.seed, epoch, first + 1))
            yield rng.permutation(np.concatenate(window))

    def _block(self, number: int) -> np.ndarray:
        start = int(number) * self.block_size
        return np.arange(start, min(start + self.block_size, self.num_examples), dtype=np.int64)

    def _endless(self, epoch: int) -> Iterator[np.ndarray]:
        while True:
            yield from self.order(epoch)
            epoch += 1

    def __iter__(self) -> Iterator[Draw]:
        # The start of a resumed epoch counts once.
        start = self.start
        self.start = 0
        windows = self._endless(self.epoch)
        pending = np.empty(0, np.int64)
        share = self.batch_size // self.num_ranks
        own = slice(self.rank * share, (self.rank + 1) * share)
        for step in range(len(self)):
            while len(pending) < self.batch_size:
                pending = np.concatenate([pending, next(windows)])
            batch = pending[: self.batch_size]
            pending = pending[self.batch_size :]
            if step >= start:
                yield Draw(self.epoch, batch[own], self.negatives)
