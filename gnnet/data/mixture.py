"""The LightningDataModule of a mixture: several datasets drawn from by weight."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from functools import partial
from itertools import accumulate

from torch.utils.data import DataLoader, Dataset

from gnnet.data.batches import PairBatch, collate_by_size
from gnnet.data.datamodule import CorrespondenceData, DataModule
from gnnet.data.pairs import PairDataset
from gnnet.data.sampler import MixtureSampler


class MixtureData(DataModule):
    """Training pairs drawn from several datasets by weight; each dataset is validated on its own.

    Args:
        sources: the datasets by name; None in place of one leaves it out. The batch size, epoch and
            workers of the mixture count, not their own.
        weights: how often each is drawn, relative to the others; 1 where none is given.
        mixed: draw the source of every pair on its own; otherwise each batch is of one source.
        batch_size: pairs in a training step of each process.
        pairs_per_epoch: pairs between two validations, over all processes.
        seed: decides the order in which pairs are drawn.
        validation_batch_size: queries in a validation step.
        num_workers: processes that load data.

    Raises:
        ValueError: if a weight is negative or names no source.
    """

    def __init__(
        self,
        *,
        sources: Mapping[str, CorrespondenceData | None],
        weights: Mapping[str, float | None] | None = None,
        mixed: bool = False,
        batch_size: int = 4,
        pairs_per_epoch: int = 1000,
        seed: int = 0,
        validation_batch_size: int = 8,
        num_workers: int = 2,
    ) -> None:
        super().__init__(batch_size=batch_size, validation_batch_size=validation_batch_size, num_workers=num_workers)
        self.sources = {name: source for name, source in sources.items() if source is not None}
        given = {name: weight for name, weight in (weights or {}).items() if weight is not None}
        unknown = sorted(set(given) - set(sources))
        if unknown:
            raise ValueError(
                f"dataset.weights names {', '.join(unknown)}; the sources are {', '.join(sources) or 'none'}"
            )
        if any(weight < 0 for weight in given.values()):
            raise ValueError(f"dataset.weights are {given}; expected zero or more")
        self._weights = {name: given.get(name, 1.0) for name in self.sources}
        self._mixed = mixed
        self._pairs_per_epoch = pairs_per_epoch
        self._seed = seed
        self._drawn: dict[str, PairDataset] = {}

    def setup(self, stage: str | None = None, *, whole: bool = False) -> None:
        """Set up every source, see `CorrespondenceData.setup`.

        Raises:
            FileNotFoundError, ValueError: naming the source that is missing or broken, or if none can be drawn from.
        """
        for name, source in self.sources.items():
            try:
                source.setup(stage, name=name, whole=whole)
            except (FileNotFoundError, ValueError) as error:
                raise type(error)(
                    f"source {name} of the mixture: {error}\n(dataset.sources.{name}=null leaves it out)"
                ) from error
            if source.train_pairs is not None and self._weights[name] > 0:
                self._drawn[name] = source.train_pairs
        if not self._drawn and stage not in ("predict", "validate"):
            raise ValueError(
                "no source of the mixture has both pairs to train on and a weight above zero "
                f"(dataset.weights); its sources are {', '.join(self.sources) or 'none'}"
            )
        self._end_to_end = _EndToEnd(list(self._drawn.values()))
        self.validations = [validation for source in self.sources.values() for validation in source.validations]

    def pair_name(self, index: int) -> str:
        """The pair that `PairBatch.index` tells, for messages."""
        return self._end_to_end.pair_name(index)

    def train_dataloader(self) -> DataLoader:
        """Batches of training pairs.

        Raises:
            ValueError: if an epoch holds no batch.
        """
        for pairs in self._drawn.values():
            pairs.geometry = self.geometry
        batches = self._batches(self._pairs_per_epoch)
        sampler = MixtureSampler(
            [len(pairs) for pairs in self._drawn.values()],
            [self._weights[name] for name in self._drawn],
            batch_size=self.batch_size,
            batches=batches,
            mixed=self._mixed,
            seed=self._seed,
            progress=partial(self._progress, batches),
        )
        return DataLoader(self._end_to_end, batch_sampler=sampler, collate_fn=collate_by_size, **self._settings())


class _EndToEnd(Dataset):
    """Several sets of pairs laid end to end; items are asked for by (pass, index), and their `index` is that one."""

    def __init__(self, parts: list[PairDataset]) -> None:
        self.parts = parts
        self.ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, key: tuple[int, int]) -> PairBatch:
        part, index = self._place(key[1])
        item = self.parts[part][key[0], index]
        return item._replace(index=item.index + key[1] - index)

    def pair_name(self, index: int) -> str:
        """See `PairDataset.pair_name`."""
        part, index = self._place(index)
        return self.parts[part].pair_name(index)

    def _place(self, index: int) -> tuple[int, int]:
        """Which part a pair is in, and its index there."""
        part = bisect.bisect_right(self.ends, index)
        return part, index - (self.ends[part - 1] if part else 0)
