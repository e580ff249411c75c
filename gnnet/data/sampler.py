"""Which samples each process sees: shuffled passes for training, each exactly once for validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch.utils.data import Sampler


def _rank_and_world_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class TrainingSampler(Sampler[tuple[int, int]]):
    """Walks through shuffled passes over the data, `epoch_length` samples an epoch; yields (pass, index).

    An epoch is thus as long as one likes, however few or many samples there are: checkpoints and
    validations at its end come at a steady pace, and every sample is seen once in each pass. What
    an epoch holds follows from (seed, epoch) alone, so a resumed run sees what it would have seen.
    The pass is part of the key so that a data set can draw anew in each, in any worker.
    Every process gets the same number of samples.

    Args:
        length: of the data.
        epoch_length: samples an epoch, over all processes.
        seed: of the order.
        epoch: tells which epoch begins when iteration begins. (Not `set_epoch`: on resuming,
            Lightning calls it after the first batches are asked for, and one too far.)
    """

    def __init__(self, length: int, *, epoch_length: int, seed: int, epoch: Callable[[], int]) -> None:
        self.length = length
        self.epoch_length = epoch_length
        self.seed = seed
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rank, world_size = _rank_and_world_size()
        start = self.epoch() * self.epoch_length
        position, stop = start + rank, start + len(self) * world_size
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
    """Yields (0, index) with each index on exactly one process: nothing is repeated to fill up."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rank, world_size = _rank_and_world_size()
        return iter([(0, index) for index in range(rank, self.length, world_size)])

    def __len__(self) -> int:
        rank, world_size = _rank_and_world_size()
        return len(range(rank, self.length, world_size))
