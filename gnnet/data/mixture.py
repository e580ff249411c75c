"""A mixture of datasets as one LightningDataModule."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from functools import partial
from itertools import accumulate

import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset

from gnnet.data.datamodule import CorrespondenceData
from gnnet.data.loaders import (
    Validation,
    batches_per_process,
    current_epoch,
    loader_settings,
    validation_loaders,
)
from gnnet.data.pairs import PairDataset, collate_pairs
from gnnet.data.sampler import MixtureSampler


class MixtureData(pl.LightningDataModule):
    """Training pairs drawn from several datasets by weight; each is validated on its own.

    Args:
        sources: the datasets by name; None in place of one leaves it out. Their own batch sizes, epochs
            and workers do not count.
        weights: how often each is drawn, relative to the others; 1 where none is given.
        mixed: draw the source of every pair on its own; otherwise each batch is of one source.
        batch_size: pairs a training step and process.
        pairs_per_epoch: pairs between two validations, over all processes.
        seed: of the order.
        validation_batch_size: queries a validation step.
        num_workers: processes that load data.

    Raises:
        ValueError: if a weight is negative, or names no source, or there is nothing to draw from.
    """

    def __init__(
        self,
        *,
        sources: Mapping[str, CorrespondenceData | None],
        weights: Mapping[str, float] | None = None,
        mixed: bool = False,
        batch_size: int = 4,
        pairs_per_epoch: int = 1000,
        seed: int = 0,
        validation_batch_size: int = 8,
        num_workers: int = 2,
    ) -> None:
        super().__init__()
        self.sources = {name: source for name, source in sources.items() if source is not None}
        given = {name: weight for name, weight in (weights or {}).items() if weight is not None}
        unknown = sorted(set(given) - set(sources))
        if unknown:
            raise ValueError(
                f"dataset.weights names {', '.join(unknown)}; the sources are {', '.join(sources) or 'none'}"
            )
        if any(weight < 0 for weight in given.values()):
            raise ValueError(f"dataset.weights are {given}; expected zero or more")
        self.weights = {name: given.get(name, 1.0) for name in self.sources}
        self.mixed = mixed
        self.batch_size = batch_size
        self.pairs_per_epoch = pairs_per_epoch
        self.seed = seed
        self.validation_batch_size = validation_batch_size
        self.num_workers = num_workers

    def setup(self, stage: str | None = None) -> None:
        """Set up every source.

        Raises:
            FileNotFoundError, ValueError: naming the source that is missing or broken.
        """
        for name, source in self.sources.items():
            try:
                source.setup(name=name)
            except (FileNotFoundError, ValueError) as error:
                raise type(error)(
                    f"source {name} of the mixture: {error}\n(dataset.sources.{name}=null leaves it out)"
                ) from error
        if not self._drawn():
            raise ValueError(
                "no source of the mixture has both pairs to train on and a weight above zero "
                f"(dataset.weights); its sources are {', '.join(self.sources) or 'none'}"
            )

    def _drawn(self) -> dict[str, PairDataset]:
        return {
            name: source.train_pairs
            for name, source in self.sources.items()
            if source.train_pairs is not None and self.weights[name] > 0
        }

    @property
    def validations(self) -> list[Validation]:
        """Those of all sources, named after them."""
        return [validation for source in self.sources.values() for validation in source.validations]

    def train_dataloader(self) -> DataLoader:
        """Batches of training pairs; raises ValueError if an epoch holds none."""
        drawn = self._drawn()
        batches = batches_per_process(self.pairs_per_epoch, self.batch_size, self.trainer)
        return DataLoader(
            _EndToEnd(list(drawn.values())),
            batch_sampler=MixtureSampler(
                [len(pairs) for pairs in drawn.values()],
                [self.weights[name] for name in drawn],
                batch_size=self.batch_size,
                batches=batches,
                mixed=self.mixed,
                seed=self.seed,
                epoch=partial(current_epoch, self.trainer, batches),
            ),
            collate_fn=collate_pairs,
            **loader_settings(self.trainer, self.num_workers),
        )

    def val_dataloader(self) -> list[DataLoader]:
        """A loader for each of `validations`, in this order; each sample goes to one process."""
        return validation_loaders(self, self.trainer)


class _EndToEnd(Dataset):
    """Data sets asked for by (pass, index), one after the other."""

    def __init__(self, parts: list[PairDataset]) -> None:
        self.parts = parts
        self.ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, key: tuple[int, int]):
        turn, index = key
        part = bisect.bisect_right(self.ends, index)
        return self.parts[part][turn, index - (self.ends[part - 1] if part else 0)]
