"""The LightningDataModule of one dataset, and what it shares with a mixture of several (`gnnet.data.mixture`).

Both give training pairs and validation sets, and share their loaders. They are two classes so that the
configuration of one dataset stays flat (`dataset.root=DIR`), and because they draw in two ways: one dataset is
walked through in passes that go on over the epochs, a mixture is drawn anew in each epoch.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.accelerators import CPUAccelerator
from torch.utils.data import DataLoader, Sampler

from gnnet.data.agreement import refuse_contradiction
from gnnet.data.batches import collate_by_size
from gnnet.data.matching_pairs import MatchingDataset
from gnnet.data.pairs import PairDataset
from gnnet.data.queries import LocalizationDataset
from gnnet.data.sampler import TrainingSampler, ValidationSampler
from gnnet.sampling import evenly
from gnnet.scenes.index import open_scene
from gnnet.scenes.problems import OnBad, describe_problems
from gnnet.scenes.scene import Scene

Validation = LocalizationDataset | MatchingDataset
_log = logging.getLogger(__name__)


class DataModule(pl.LightningDataModule):
    """What one dataset and a mixture share: validation sets, and the loaders of everything.

    `validations` holds the validation sets once `setup` has run. `geometry` says whether training pairs carry
    `PairBatch.geometry`; `FeatureLearning` switches it off if its loss has no use for it.
    """

    def __init__(self, *, batch_size: int, validation_batch_size: int, num_workers: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.validation_batch_size = validation_batch_size
        self.num_workers = num_workers
        self.validations: list[Validation] = []
        self.geometry = True

    def setup_evaluation(self, *, mapped: bool, whole: bool) -> None:
        """Set up the validation sets alone, to localize on maps of their scenes (`mapped`) or to refine poses.

        Raises:
            FileNotFoundError, ValueError: as `setup`, and if there is no validation set.
        """
        self.setup("predict" if mapped else "validate", whole=whole)  # type: ignore[call-arg]  # of both kinds
        if not self.validations:
            keys = "dataset.validation_root or dataset.validation_fraction"
            raise ValueError(f"the dataset leaves nothing to evaluate on; give {keys}")

    def val_dataloader(self) -> list[DataLoader]:
        """A loader for each of `validations`, in this order; see `ValidationSampler`."""
        return [self._validation_loader(v, ValidationSampler(len(v)), **self._settings()) for v in self.validations]

    def all_of(self, validation: Validation) -> DataLoader:
        """A loader of every sample of one of `validations` on this process, for evaluation outside of training.

        It yields what `val_dataloader` does: lists of batches (see `collate_by_size`), or pairs of fixed cameras.
        """
        order = [(0, index) for index in range(len(validation))]
        return self._validation_loader(validation, order, num_workers=self.num_workers)

    def _validation_loader(
        self, validation: Validation, order: Sampler | list[tuple[int, int]], **settings
    ) -> DataLoader:
        if isinstance(validation, MatchingDataset):  # pair by pair: the images of two pairs may differ in size
            settings |= {"batch_size": None}
        else:
            settings |= {"batch_size": self.validation_batch_size, "collate_fn": collate_by_size}
        return DataLoader(validation, sampler=order, **settings)

    def _settings(self) -> dict:
        """Keep the workers over the epochs; give a GPU, or another accelerator, memory that it copies fast."""
        on_cpu = self.trainer is None or isinstance(self.trainer.accelerator, CPUAccelerator)
        return {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0, "pin_memory": not on_cpu}

    def _batches(self, length: int) -> int:
        """Batches that each process draws from an epoch of `length` pairs; ValueError if there is none."""
        assert self.trainer is not None
        batches = length // self.trainer.world_size // self.batch_size
        if batches == 0:
            raise ValueError(
                f"an epoch of {length} pairs holds no batch of {self.batch_size} on each of {self.trainer.world_size} "
                "processes; lower dataset.batch_size or raise dataset.pairs_per_epoch"
            )
        return batches

    def _progress(self, batches: int) -> tuple[int, int]:
        """Number of the epoch that begins or goes on, and how many of its batches each process has had.

        Args:
            batches: of an epoch, on each process.
        """
        assert self.trainer is not None
        # Both follow from counts that are restored before a resumed run asks for data.
        limit = self.trainer.limit_train_batches
        used = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        epoch = self.trainer.global_step // math.ceil(used / self.trainer.accumulate_grad_batches)
        return epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready % used


class CorrespondenceData(DataModule):
    """One dataset, checked and split by place into training pairs and a validation set.

    Validation localizes queries. Where the camera is fixed, it matches keypoints of pairs instead.

    Args:
        scene: reads the dataset from a folder, `scene(root) -> Scene`.
        root: the dataset's folder; None trains on nothing.
        validation_root: another folder of the same layout, for validation; None splits `root` by place.
        conditions: conditions, or groups of them, to keep beside the references; None keeps all.
        validation_fraction: share of the places that validate; 0 takes none.
        validation_places: the places that validate; None lets the fraction decide.
        split_seed: decides which places validate; the same on every machine.
        seed: decides the draws of pairs, correspondences and crops.
        batch_size: pairs in a training step of each process.
        pairs_per_epoch: pairs between two validations, over all processes; None takes each pair once.
        correspondences: the most correspondences of a training pair.
        largest_side: images are shrunk to it, in pixels; None keeps their size.
        crop: side in pixels of the random squares that training images are cut to; None keeps them whole.
        warp: strength of the homographies under which the squares are cut, see `random_homography`.
        validation_batch_size: queries in a validation step.
        validation_points: the most 3D points of a validation query.
        validation_queries: the most queries, or pairs to match; None takes all.
        num_workers: processes that load data.
        on_bad: `raise` ends the program at broken input; `skip` leaves it out and counts it.
        index_dir: folder in which the dataset's index is kept, so that the next start is quick; None keeps none.
        check_images: match a few pairs of images before the start, and refuse data that contradict them, see
            `refuse_contradiction`.
        reader_settings: further settings, passed on to the reader (`slices`, `cameras`, …).

    Raises:
        ValueError: for a setting that the reader does not have.
    """

    def __init__(
        self,
        *,
        scene: Callable[..., Scene],
        root: str | Path | None,
        validation_root: str | Path | None = None,
        conditions: list[str] | None = None,
        validation_fraction: float = 0.25,
        validation_places: list[str] | None = None,
        split_seed: int = 0,
        seed: int = 0,
        batch_size: int = 4,
        pairs_per_epoch: int | None = None,
        correspondences: int = 512,
        largest_side: int | None = None,
        crop: int | None = None,
        warp: float = 0.0,
        validation_batch_size: int = 8,
        validation_points: int = 512,
        validation_queries: int | None = None,
        num_workers: int = 2,
        on_bad: OnBad = "raise",
        index_dir: str | Path | None = None,
        check_images: bool = False,
        **reader_settings,
    ) -> None:
        super().__init__(batch_size=batch_size, validation_batch_size=validation_batch_size, num_workers=num_workers)
        self._open = partial(open_scene, _with_settings(scene, reader_settings), index_dir=index_dir, on_bad=on_bad)
        self._check_images = check_images
        self._root = root
        self._validation_root = validation_root
        self._conditions = conditions
        self._validation_fraction = validation_fraction
        self._validation_places = None if validation_places is None else set(validation_places)
        self._split_seed = split_seed
        self._seed = seed
        self._pairs_per_epoch = pairs_per_epoch
        self._make_pairs = partial(
            PairDataset,
            correspondences=correspondences,
            largest_side=largest_side,
            crop=crop,
            warp=warp,
            seed=seed,
            on_bad=on_bad,
        )
        self._make_queries = partial(
            LocalizationDataset,
            points=validation_points,
            largest_side=largest_side,
            max_queries=validation_queries,
            seed=split_seed,
            on_bad=on_bad,
        )
        self._make_matching = partial(
            MatchingDataset, largest_side=largest_side, max_pairs=validation_queries, seed=split_seed
        )
        self.train_pairs: PairDataset | None = None
        self._on_bad = on_bad
        self._prepared = 0

    def setup(self, stage: str | None = None, *, name: str = "", whole: bool = False) -> None:
        """Read, check and split the scene, once, so that what is missing or broken is said before training.

        Args:
            stage: Lightning's. `predict` only reads scenes, to make maps of; `validate` also looks at what is
                validated; all others also prepare training pairs.
            name: the dataset's name in a mixture.
            whole: for `predict`, take the whole scene, also what `fit` trains on.

        Raises:
            FileNotFoundError, ValueError: from the scene's reader, or if no pair is left to train on.
        """
        needed = {"predict": 1, "validate": 2}.get(stage or "", 3)
        if needed <= self._prepared:
            return
        train, validation = self._scenes(fit=needed == 3, mapped=needed == 1, whole=whole)
        if train is not None and needed == 3:
            if not train.pairs:
                why = train.problems[0] if train.problems else "take other conditions or another split"
                raise ValueError(f"{train.name} holds no training pair; {why}")
            self.train_pairs = self._make_pairs(train)
            _try_samples(self.train_pairs, count=4)
        if validation is not None:
            fixed_camera = any(pair.static for pair in validation.pairs[:1])
            make: Callable[..., Validation] = self._make_matching if fixed_camera else self._make_queries
            self.validations = [make(validation, name=name)]
            if needed > 1 and self._on_bad == "skip":
                _leave_out_broken(self.validations[0])
            elif needed > 1:
                _try_samples(self.validations[0], count=1)
        self._prepared = needed

    def pair_name(self, index: int) -> str:
        """The pair that `PairBatch.index` tells, for messages."""
        assert self.train_pairs is not None
        return self.train_pairs.pair_name(index)

    def _scenes(self, *, fit: bool, mapped: bool, whole: bool) -> tuple[Scene | None, Scene | None]:
        """The scene to train on, and the scene to validate on, or to make a map of."""
        needed = self._root if fit or self._validation_root is None else None
        root = None if needed is None else self._read(needed)
        again = self._validation_root == needed  # which is checked once
        other = None if self._validation_root is None else root if again else self._read(self._validation_root)
        if other is not None or root is None:
            return root, other
        if mapped and (whole or len(root.places) < 2):  # one place cannot be split
            return None, root
        if self._validation_places is not None:
            unknown = sorted(self._validation_places - set(root.places))
            if unknown:
                raise ValueError(
                    f"dataset.validation_places names {', '.join(unknown)}, which {root.name} does not have; "
                    f"it has {', '.join(root.places)}"
                )
            others = set(root.places) - self._validation_places
            return root.with_places(others), root.with_places(self._validation_places)
        if self._validation_fraction == 0:
            return root, None
        return root.split(self._validation_fraction, self._split_seed)

    def _read(self, root: str | Path) -> Scene:
        scene = self._open(root)
        if scene.problems:
            _log.warning(
                "%s: what is broken or unsuited was left out (`python -m gnnet.scenes` lists it): %s",
                scene.name, describe_problems(scene.problems),
            )  # fmt: skip
        if self._check_images:
            refuse_contradiction(scene)
        return scene if self._conditions is None else scene.with_conditions(self._conditions)

    def train_dataloader(self) -> DataLoader:
        """Batches of training pairs.

        Raises:
            ValueError: if there is nothing to train on, or an epoch holds no batch.
        """
        if self.train_pairs is None:
            raise ValueError("there is nothing to train on; give dataset.root")
        self.train_pairs.geometry = self.geometry
        count = len(self.train_pairs)
        length = self._pairs_per_epoch or count
        progress = partial(self._progress, self._batches(length))
        sampler = TrainingSampler(
            count, epoch_length=length, seed=self._seed, progress=progress, batch_size=self.batch_size
        )
        return DataLoader(
            self.train_pairs,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=True,
            collate_fn=collate_by_size,
            **self._settings(),
        )


def _try_samples(dataset: PairDataset | Validation, count: int) -> None:
    """Read a few samples spread over a data set; ValueError says what is broken, before training."""
    for index in evenly(len(dataset), count).tolist():
        try:
            dataset[0, index]
        except RuntimeError as error:
            raise ValueError(str(error)) from error


def _leave_out_broken(validation: Validation) -> None:
    """Read what is validated once, and leave out what cannot be used; ValueError if nothing can.

    Every validation is of the same samples, so that a broken one is not replaced by another, as in training.
    """
    problems: dict[int, str] = {}
    for index in range(len(validation)):
        try:
            validation[0, index]
        except RuntimeError as error:
            if not isinstance(error.__cause__, OSError | ValueError):
                raise
            problems[index] = str(error)
    if len(problems) == len(validation):
        raise ValueError(f"nothing is left to validate on; {describe_problems([*problems.values()])}")
    if problems:
        _log.warning(
            "validation on %s leaves out %d of %d samples: %s", validation.scene.name, len(problems), len(validation),
            describe_problems([*problems.values()]),
        )  # fmt: skip
        validation.take([index for index in range(len(validation)) if index not in problems])


def _with_settings(scene: Callable[..., Scene], settings: dict) -> Callable[..., Scene]:
    """The reader with further settings; ValueError for one that it does not have: dataset.NAME was misspelt."""
    if not settings:
        return scene
    known = inspect.signature(scene).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
    unknown = [] if takes_all else sorted(set(settings) - set(known))
    if unknown:
        own = set(inspect.signature(CorrespondenceData.__init__).parameters) - {"self", "reader_settings"}
        raise ValueError(
            f"dataset.{unknown[0]} is not known; the dataset's settings are {', '.join(sorted(own | set(known)))}"
        )
    return partial(scene, **settings)
