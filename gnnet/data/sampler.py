"""Which samples each process sees: shuffled passes for training, each exactly once for validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Sampler


def _rank_and_world_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class TrainingSampler(Sampler[tuple[int, int]]):
    """Walks through shuffled passes over the data, `epoch_length` samples an epoch; yields (pass, index).

    So an epoch may be of any length, and checkpoints and validations at its end come at a steady pace. Each
    sample is seen once in each pass. What an epoch holds follows from (seed, epoch) alone, so a resumed run
    sees what it would have seen; what it had seen of the epoch is passed over and not loaded. The pass is part of
    the key, so that a data set can draw anew in each pass, in any worker. Each process gets the same number of samples.

    Args:
        length: number of samples in the data set.
        epoch_length: samples in an epoch, over all processes.
        seed: decides the order.
        progress: called when iteration begins, gives the epoch's number and how many of its batches this process
            has had. (Not `set_epoch`: after a resumption Lightning calls it after the first batches are asked for,
            and with the next epoch's number.)
        batch_size: samples in a batch.
    """

    def __init__(
        self, length: int, *, epoch_length: int, seed: int, progress: Callable[[], tuple[int, int]], batch_size: int
    ) -> None:
        self.length = length
        self.epoch_length = epoch_length
        self.seed = seed
        self.progress = progress
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rank, world_size = _rank_and_world_size()
        epoch, done = self.progress()
        start = epoch * self.epoch_length
        position, stop = start + done * self.batch_size * world_size + rank, start + len(self) * world_size
        current, order = -1, []
        while position < stop:
            turn, place = divmod(position, self.length)
            if turn != current:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
                current, order = turn, torch.randperm(self.length, generator=generator).tolist()
            yield turn, order[place]
            position += world_size

    def __len__(self) -> int:
        return self.epoch_length // _rank_and_world_size()[1]


class ValidationSampler(Sampler[tuple[int, int]]):
    """Yields (0, index), each index on one process; nothing is repeated to make the shares equal.

    A process for which nothing is left validates one that another has too, because Lightning ends the run of a
    process without any. The metrics know samples by their index, so it counts once.

    Args:
        length: number of samples, at least one.
    """

    def __init__(self, length: int) -> None:
        self.length = length

    def _share(self) -> range:
        rank, world_size = _rank_and_world_size()
        return range(rank % self.length, self.length, world_size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter([(0, index) for index in self._share()])

    def __len__(self) -> int:
        return len(self._share())


class MixtureSampler(Sampler[list[tuple[int, int]]]):
    """Batches drawn from several sources by weight; yields lists of (pass, index), sources laid end to end.

    Within an epoch each source is walked through in shuffled passes. What an epoch holds follows from
    (seed, epoch) alone; what a resumed run had seen of it is passed over and not loaded. Each process gets the
    same number of batches.

    Args:
        lengths: number of samples of each source.
        weights: how often each source is drawn, relative to the others; a source of weight 0 never is.
        batch_size: samples in a batch.
        batches: batches of an epoch on each process.
        mixed: draw the source of each sample on its own; otherwise a batch is of one source.
        seed: decides all draws.
        progress: gives the epoch's number and how many of its batches were had, see `TrainingSampler`.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        weights: Sequence[float],
        *,
        batch_size: int,
        batches: int,
        mixed: bool,
        seed: int,
        progress: Callable[[], tuple[int, int]],
    ) -> None:
        self.lengths = list(lengths)
        self.weights = list(weights)
        self.batch_size = batch_size
        self.batches = batches
        self.mixed = mixed
        self.seed = seed
        self.progress = progress

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rank, world_size = _rank_and_world_size()
        epoch, done = self.progress()
        generator = np.random.default_rng((self.seed, epoch))
        share = np.array(self.weights) / sum(self.weights)
        shape = (self.batches * world_size, self.batch_size if self.mixed else 1)
        sources = generator.choice(len(share), size=shape, p=share)
        sources = np.broadcast_to(sources, (shape[0], self.batch_size))
        turns, indices = np.zeros_like(sources), np.zeros_like(sources)
        for source, length in enumerate(self.lengths):
            of_source = sources == source
            count = int(of_source.sum())
            passes = -(-count // length) if count else 0
            walk = np.concatenate([generator.permutation(length) for _ in range(passes)] or [np.zeros(0, np.int64)])
            indices[of_source] = walk[:count] + sum(self.lengths[:source])
            turns[of_source] = np.arange(count) // length
        turns = epoch * 1009 + turns  # no draw of an epoch is one of another
        for batch in range(rank + done * world_size, len(sources), world_size):
            yield list(zip(turns[batch].tolist(), indices[batch].tolist(), strict=True))

    def __len__(self) -> int:
        return self.batches
