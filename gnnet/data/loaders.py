"""What the data modules' loaders have in common."""

from __future__ import annotations

import math
from typing import Protocol

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from gnnet.data.matching_pairs import MatchingDataset
from gnnet.data.queries import LocalizationDataset, collate_localization
from gnnet.data.sampler import ValidationSampler

Validation = LocalizationDataset | MatchingDataset


class Data(Protocol):
    """What a data module tells of its validation."""

    validations: list[Validation]
    validation_batch_size: int
    num_workers: int


def all_of(data: Data, validation: Validation) -> DataLoader:
    """Every sample of one of the data's validation sets in one process, as evaluation after training wants them."""
    order = [(0, index) for index in range(len(validation))]
    return _validation_loader(validation, order, data.validation_batch_size, num_workers=data.num_workers)


def validation_loaders(data: Data, trainer: pl.Trainer | None) -> list[DataLoader]:
    """A loader for each of the data's validation sets; each sample goes to one process."""
    settings = loader_settings(trainer, data.num_workers)
    return [
        _validation_loader(v, ValidationSampler(len(v)), data.validation_batch_size, **settings)
        for v in data.validations
    ]


def _validation_loader(validation: Validation, sampler, batch_size: int, **settings) -> DataLoader:
    """Batches of queries, or single pairs to match, as their images may be of any size."""
    if isinstance(validation, MatchingDataset):
        return DataLoader(validation, batch_size=None, sampler=sampler, **settings)
    return DataLoader(validation, batch_size=batch_size, sampler=sampler, collate_fn=collate_localization, **settings)


def loader_settings(trainer: pl.Trainer | None, num_workers: int) -> dict:
    """Workers that stay, and memory from which a GPU copies fast."""
    on_gpu = trainer is not None and trainer.accelerator.__class__.__name__ == "CUDAAccelerator"
    return {"num_workers": num_workers, "persistent_workers": num_workers > 0, "pin_memory": on_gpu}


def batches_per_process(length: int, batch_size: int, trainer: pl.Trainer) -> int:
    """Batches of an epoch of `length` pairs on each process.

    Raises:
        ValueError: if there is none.
    """
    batches = length // trainer.world_size // batch_size
    if batches == 0:
        raise ValueError(
            f"an epoch of {length} pairs holds no batch of {batch_size} on each of {trainer.world_size} processes; "
            "lower dataset.batch_size or raise dataset.pairs_per_epoch"
        )
    return batches


def current_epoch(trainer: pl.Trainer, batches: int) -> int:
    """Number of the epoch that begins, from the step: that is restored before a resumed run asks for data.

    Args:
        trainer: that knows the step.
        batches: of an epoch, on each process.
    """
    limit = trainer.limit_train_batches
    used = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return trainer.global_step // math.ceil(used / trainer.accumulate_grad_batches)
