"""Samplers: what each process sees in each epoch."""

from __future__ import annotations

import pytest

from gnnet.data import sampler
from gnnet.data.sampler import TrainingSampler, ValidationSampler


@pytest.fixture
def process(monkeypatch):
    def be(rank: int, world_size: int) -> None:
        monkeypatch.setattr(sampler, "_rank_and_world_size", lambda: (rank, world_size))

    return be


def epoch(length: int, epoch_length: int, number: int, seed: int = 0, done: int = 0) -> list[tuple[int, int]]:
    """An epoch in batches of two, of which some are done."""
    sampler = TrainingSampler(
        length, epoch_length=epoch_length, seed=seed, progress=lambda: (number, done), batch_size=2
    )
    return list(sampler)


@pytest.mark.parametrize(("length", "epoch_length"), [(10, 4), (10, 10), (3, 7)])
def test_each_pass_sees_every_sample_once(length, epoch_length):
    keys = [key for number in range(3 * length) for key in epoch(length, epoch_length, number)]
    for turn in range(3):
        assert sorted(index for t, index in keys if t == turn) == list(range(length))


def test_order_follows_from_seed_and_epoch_alone():
    assert epoch(100, 20, 3) == epoch(100, 20, 3)
    assert epoch(100, 20, 3) != epoch(100, 20, 3, seed=1)
    assert not set(epoch(100, 20, 3)) & set(epoch(100, 20, 2))


def test_processes_divide_an_epoch_among_them(process):
    whole = epoch(50, 20, 1)
    shares = []
    for rank in range(3):
        process(rank, 3)
        shares.append(epoch(50, 20, 1))
    assert [len(share) for share in shares] == [6, 6, 6]
    assert [key for group in zip(*shares, strict=True) for key in group] == whole[:18]
    assert epoch(50, 20, 1, done=2) == shares[2][4:]  # a resumed run passes over its own batches


@pytest.mark.parametrize(("length", "processes"), [(1, 2), (3, 4), (2, 5)])
def test_each_process_has_something_to_validate(process, length, processes):
    """Lightning ends the run of a process that has nothing, and the others would wait for it."""
    seen = []
    for rank in range(processes):
        process(rank, processes)
        share = list(ValidationSampler(length))
        assert len(share) == len(ValidationSampler(length)) == 1
        seen += share
    assert set(seen) == {(0, index) for index in range(length)}


def test_validation_repeats_nothing(process):
    seen = []
    for rank in range(2):
        process(rank, 2)
        validation = ValidationSampler(7)
        assert len(list(validation)) == len(validation)
        seen += [index for _, index in validation]
    assert sorted(seen) == list(range(7))
