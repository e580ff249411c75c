"""The LightningDataModule: one dataset, checked and split by place, as training pairs and validation samples."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset

from gnnet.data.loaders import (
    Validation,
    batches_per_process,
    current_epoch,
    loader_settings,
    validation_loaders,
)
from gnnet.data.matching_pairs import MatchingDataset
from gnnet.data.pairs import PairDataset, collate_pairs
from gnnet.data.queries import LocalizationDataset
from gnnet.data.sampler import TrainingSampler
from gnnet.scenes.index import open_scene
from gnnet.scenes.problems import OnBad
from gnnet.scenes.scene import Scene

_log = logging.getLogger(__name__)


class CorrespondenceData(pl.LightningDataModule):
    """Training pairs and validation samples of one dataset.

    Validation is localization, or, where the camera stands still, matching.

    Args:
        scene: reads the dataset from a folder, `scene(root) -> Scene`.
        root: the dataset's folder; None: nothing to train on.
        validation_root: another folder of the same layout for validation; None splits `root` by place.
        conditions: keep only these conditions or groups of them (references always stay); None keeps all.
        validation_fraction: share of the places that validate; 0 takes none.
        validation_places: these validate, whatever the fraction.
        split_seed: which places validate; the same on every machine.
        seed: of the draws of pairs, correspondences and crops.
        batch_size: pairs a training step and process.
        pairs_per_epoch: pairs between two validations, over all processes; None takes all once.
        correspondences: drawn from each pair, at most.
        largest_side: images are shrunk to it, in pixels; None keeps their size.
        crop: training images are cut to random squares of so many pixels; None keeps them whole.
        warp: strength of the homographies under which they are cut, see `random_homography`.
        validation_batch_size: queries a validation step.
        validation_points: 3D points of each validation query, at most.
        validation_queries: so many queries, or pairs to match, at most; None takes all.
        num_workers: processes that load data.
        on_bad: broken input ends the program (`raise`), or is left out and counted (`skip`).
        index_dir: where the index of the dataset is kept, so that the next start is quick; None keeps none.
        reader_settings: further settings, which the reader takes (`slices`, `cameras`, …).

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
        **reader_settings,
    ) -> None:
        super().__init__()
        self.read_scene = _with_settings(scene, reader_settings)
        self.root = None if root is None else Path(root)
        self.validation_root = None if validation_root is None else Path(validation_root)
        self.conditions = None if conditions is None else list(conditions)
        self.validation_fraction = validation_fraction
        self.validation_places = None if validation_places is None else set(validation_places)
        self.split_seed = split_seed
        self.seed = seed
        self.batch_size = batch_size
        self.pairs_per_epoch = pairs_per_epoch
        self.correspondences = correspondences
        self.largest_side = largest_side
        self.crop = crop
        self.warp = warp
        self.validation_batch_size = validation_batch_size
        self.validation_points = validation_points
        self.validation_queries = validation_queries
        self.num_workers = num_workers
        self.on_bad = on_bad
        self.index_dir = None if index_dir is None else Path(index_dir)
        self.train_pairs: PairDataset | None = None
        self.validations: list[Validation] = []
        self._is_set_up = False

    def setup(self, stage: str | None = None, *, name: str = "") -> None:
        """Read, check and split the scene, once; what is missing or broken is said here, before training.

        Args:
            stage: of Lightning; all are prepared.
            name: of the source in a mixture.

        Raises:
            FileNotFoundError, ValueError: from the scene's reader, or if it leaves no pair to train on.
        """
        if self._is_set_up:
            return
        train, validation = self._scenes()
        if train is not None:
            if not train.pairs:
                raise ValueError(f"{train.name} holds no training pair; take other conditions or another split")
            self.train_pairs = PairDataset(
                train,
                correspondences=self.correspondences,
                largest_side=self.largest_side,
                crop=self.crop,
                warp=self.warp,
                seed=self.seed,
                on_bad=self.on_bad,
            )
            _try_samples(self.train_pairs, count=4)
        if validation is not None:
            self.validations = [self._validation_set(validation, name)]
            _try_samples(self.validations[0], count=1)
        self._is_set_up = True

    @property
    def queries(self) -> LocalizationDataset | None:
        """The queries to localize, where the dataset has them."""
        return next((v for v in self.validations if isinstance(v, LocalizationDataset)), None)

    def _scenes(self) -> tuple[Scene | None, Scene | None]:
        """To train on, and to validate on."""
        root, other = (None if r is None else self._open(r) for r in (self.root, self.validation_root))
        if other is not None or root is None:
            return root, other
        if self.validation_places is not None:
            unknown = sorted(self.validation_places - set(root.places))
            if unknown:
                raise ValueError(
                    f"dataset.validation_places names {', '.join(unknown)}, which {root.name} does not have; "
                    f"it has {', '.join(root.places)}"
                )
            return root.with_places(set(root.places) - self.validation_places), root.with_places(self.validation_places)
        if self.validation_fraction == 0:
            return root, None
        return root.split(self.validation_fraction, self.split_seed)

    def _open(self, root: Path) -> Scene:
        scene = open_scene(self.read_scene, root, index_dir=self.index_dir, on_bad=self.on_bad)
        if scene.problems:
            _log.warning(
                "%s: %d broken or unsuited files were left out (`python -m gnnet.scenes` lists them), the first: %s",
                scene.name, len(scene.problems), scene.problems[0],
            )  # fmt: skip
        return scene if self.conditions is None else scene.with_conditions(self.conditions)

    def _validation_set(self, scene: Scene, name: str) -> Validation:
        settings = {"largest_side": self.largest_side, "seed": self.split_seed, "name": name}
        if any(pair.static for pair in scene.pairs[:1]):
            return MatchingDataset(scene, max_pairs=self.validation_queries, **settings)
        return LocalizationDataset(
            scene, points=self.validation_points, max_queries=self.validation_queries, **settings
        )

    def train_dataloader(self) -> DataLoader:
        """Batches of training pairs.

        Raises:
            ValueError: if there is nothing to train on, or an epoch holds no batch.
        """
        if self.train_pairs is None:
            raise ValueError("there is nothing to train on; give dataset.root")
        length = self.pairs_per_epoch or len(self.train_pairs)
        batches = batches_per_process(length, self.batch_size, self.trainer)
        return DataLoader(
            self.train_pairs,
            batch_size=self.batch_size,
            sampler=TrainingSampler(
                len(self.train_pairs),
                epoch_length=length,
                seed=self.seed,
                epoch=partial(current_epoch, self.trainer, batches),
            ),
            collate_fn=collate_pairs,
            drop_last=True,
            **loader_settings(self.trainer, self.num_workers),
        )

    def val_dataloader(self) -> list[DataLoader]:
        """A loader for each of `validations`, in this order; each sample goes to one process."""
        return validation_loaders(self, self.trainer)


def _try_samples(dataset: Dataset, count: int) -> None:
    """Read a few samples spread over a data set, so that what is broken is said before training.

    Raises:
        ValueError: what the data set says of a sample.
    """
    for index in sorted({round(i * (len(dataset) - 1) / max(1, count - 1)) for i in range(count)}):
        try:
            dataset[0, index]
        except RuntimeError as error:
            raise ValueError(str(error)) from error


def _with_settings(scene: Callable[..., Scene], settings: dict) -> Callable[..., Scene]:
    """The reader with further settings, those that it has.

    Raises:
        ValueError: for any other: dataset.NAME was misspelt.
    """
    if not settings:
        return scene
    known = inspect.signature(scene).parameters
    unknown = sorted(set(settings) - set(known))
    if unknown:
        own = set(inspect.signature(CorrespondenceData.__init__).parameters) - {"self", "reader_settings"}
        raise ValueError(
            f"dataset.{unknown[0]} is not known; the dataset's settings are {', '.join(sorted(own | set(known)))}"
        )
    return partial(scene, **settings)
