"""The LightningDataModule: a scene, split by place, as training pairs and localization queries."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from gnnet.data.datasets import LocalizationDataset, PairDataset, collate_localization, collate_pairs
from gnnet.data.sampler import TrainingSampler, ValidationSampler
from gnnet.scenes.scene import Scene


class CorrespondenceData(pl.LightningDataModule):
    """Training pairs and validation queries of one dataset.

    Args:
        scene: reads the dataset from a folder, `scene(root) -> Scene`.
        root: the dataset's folder.
        validation_root: another folder of the same layout for validation; None splits `root` by place.
        conditions: keep only these (references always stay); None keeps all.
        validation_fraction: share of the places that validate.
        split_seed: which places those are; the same on every machine.
        seed: of the draws of pairs, correspondences and crops.
        batch_size: pairs a training step and process.
        pairs_per_epoch: pairs between two validations, over all processes; None takes all once.
        correspondences: drawn from each pair, at most.
        largest_side: images are shrunk to it, in pixels; None keeps their size.
        crop: training images are cut to random squares of so many pixels; None keeps them whole.
        validation_batch_size: queries a validation step.
        validation_points: 3D points of each validation query, at most.
        validation_queries: at most so many; None takes all.
        num_workers: processes that load data.
    """

    def __init__(
        self,
        *,
        scene: Callable[[Path], Scene],
        root: str | Path,
        validation_root: str | Path | None = None,
        conditions: list[str] | None = None,
        validation_fraction: float = 0.25,
        split_seed: int = 0,
        seed: int = 0,
        batch_size: int = 4,
        pairs_per_epoch: int | None = None,
        correspondences: int = 512,
        largest_side: int | None = None,
        crop: int | None = None,
        validation_batch_size: int = 8,
        validation_points: int = 512,
        validation_queries: int | None = None,
        num_workers: int = 2,
    ) -> None:
        super().__init__()
        self.read_scene = scene
        self.root = Path(root)
        self.validation_root = None if validation_root is None else Path(validation_root)
        self.conditions = None if conditions is None else list(conditions)
        self.validation_fraction = validation_fraction
        self.split_seed = split_seed
        self.seed = seed
        self.batch_size = batch_size
        self.pairs_per_epoch = pairs_per_epoch
        self.correspondences = correspondences
        self.largest_side = largest_side
        self.crop = crop
        self.validation_batch_size = validation_batch_size
        self.validation_points = validation_points
        self.validation_queries = validation_queries
        self.num_workers = num_workers
        self.train_pairs: PairDataset | None = None
        self.queries: LocalizationDataset | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read and split the scene, once; what is missing or broken is said here, before training.

        Raises:
            FileNotFoundError, ValueError: from the scene's reader, or if it leaves no pair to train on.
        """
        if self.train_pairs is not None:
            return
        train, validation = self._scenes()
        if not train.pairs:
            raise ValueError(f"{train.name} holds no training pair; take other conditions or another split")
        self.queries = LocalizationDataset(
            validation,
            points=self.validation_points,
            largest_side=self.largest_side,
            max_queries=self.validation_queries,
            seed=self.split_seed,
        )
        self.train_pairs = PairDataset(
            train,
            correspondences=self.correspondences,
            largest_side=self.largest_side,
            crop=self.crop,
            seed=self.seed,
        )

    def _scenes(self) -> tuple[Scene, Scene]:
        scenes = [self.read_scene(root) for root in (self.root, self.validation_root) if root is not None]
        if self.conditions is not None:
            scenes = [scene.with_conditions(self.conditions) for scene in scenes]
        return tuple(scenes) if len(scenes) == 2 else scenes[0].split(self.validation_fraction, self.split_seed)

    def train_dataloader(self) -> DataLoader:
        """Batches of training pairs.

        Raises:
            ValueError: if an epoch holds no batch.
        """
        if self._batches() == 0:
            raise ValueError(
                f"an epoch of {self.pairs_per_epoch or len(self.train_pairs)} pairs holds no batch of "
                f"{self.batch_size} on each of {self.trainer.world_size} processes; lower dataset.batch_size "
                "or raise dataset.pairs_per_epoch"
            )
        return DataLoader(
            self.train_pairs,
            batch_size=self.batch_size,
            sampler=TrainingSampler(
                len(self.train_pairs),
                epoch_length=self.pairs_per_epoch or len(self.train_pairs),
                seed=self.seed,
                epoch=self._epoch,
            ),
            collate_fn=collate_pairs,
            drop_last=True,
            **self._loader_settings(),
        )

    def _batches(self) -> int:
        """Of an epoch, on each process."""
        return (self.pairs_per_epoch or len(self.train_pairs)) // self.trainer.world_size // self.batch_size

    def _epoch(self) -> int:
        """Number of the epoch that begins, from the step: that is restored before a resumed run asks for data."""
        limit = self.trainer.limit_train_batches
        batches = min(self._batches(), limit) if isinstance(limit, int) else int(self._batches() * limit)
        return self.trainer.global_step // math.ceil(batches / self.trainer.accumulate_grad_batches)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(
            self.queries,
            batch_size=self.validation_batch_size,
            sampler=ValidationSampler(len(self.queries)),
            collate_fn=collate_localization,
            **self._loader_settings(),
        )

    def all_queries(self) -> DataLoader:
        """Every validation query in one process, as evaluation after training wants them."""
        return DataLoader(
            self.queries,
            batch_size=self.validation_batch_size,
            sampler=[(0, index) for index in range(len(self.queries))],
            collate_fn=collate_localization,
            num_workers=self.num_workers,
        )

    def _loader_settings(self) -> dict:
        on_gpu = self.trainer is not None and self.trainer.accelerator.__class__.__name__ == "CUDAAccelerator"
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": on_gpu,
        }
