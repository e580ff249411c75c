"""What is logged beside losses: validation, which refines poses of queries or matches pairs, and speed."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from torch import nn

from gnnet.data.batches import LocalizationBatch, MatchingPair, PairBatch
from gnnet.data.datamodule import Validation
from gnnet.data.matching_pairs import MatchingDataset
from gnnet.evaluation.matching import THRESHOLDS, MatchingMetrics, MatchingSummary, match_pair
from gnnet.evaluation.metrics import LocalizationMetrics, LocalizationSummary
from gnnet.evaluation.starts import InitialPoses, localize_batch
from gnnet.localization.matching import Matcher
from gnnet.localization.refiner import Refiner

RIGHT = 3.0  # pixels within which a match counts in the score


class LocalizationValidation(pl.Callback):
    """Tries the network as it is on each of the data's validation sets, and logs how well that works.

    In a set of queries, poses are refined. Logged for all queries as `val/NAME` and for each condition as
    `val/CONDITION/NAME` are `converged` (share of initial poses that end within 5 cm and 0.5°), `position_m`
    and `rotation_deg` (medians), and `recall_POSITIONm_ROTATIONdeg`; with `_before` the same for the initial
    poses. In a set of pairs of fixed cameras, keypoints are matched. Logged are `matched_Npx`, the share of all
    keypoints within N pixels, and `kept_3px`, that of the matches that the mutual check keeps. In a mixture the
    source's name stands in between: `val/SOURCE/NAME`. `val/score` is the mean over the sets of `converged`
    and `matched_3px`. Everything counts once on any number of processes, and `ModelCheckpoint` can
    monitor any of it.

    Args:
        refiner: refines poses.
        starts: the poses to refine.
        matcher: matches keypoints.

    Raises:
        ValueError: if there is no refiner.
    """

    def __init__(self, refiner: Refiner | None, starts: InitialPoses, matcher: Matcher | None = None) -> None:
        if refiner is None:
            raise ValueError("validation while training refines poses, and there is no refiner; take localizer=refine")
        self.refiner = refiner
        self.starts = starts
        self.matcher = matcher or Matcher()
        self.metrics: list[LocalizationMetrics | MatchingMetrics] = []

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.metrics = [
            (MatchingMetrics if isinstance(v, MatchingDataset) else LocalizationMetrics)(conditions=v.conditions).to(
                pl_module.device
            )
            for v in _validations(trainer)
        ]

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: list[LocalizationBatch] | MatchingPair,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        metrics, network = self.metrics[dataloader_idx], pl_module.network
        assert isinstance(network, nn.Module)
        if isinstance(metrics, MatchingMetrics):
            assert isinstance(batch, MatchingPair)
            matches = match_pair(network, batch, self.matcher)
            metrics.update(matches, batch.keypoints_b, condition=batch.condition, index=batch.index)
        else:
            assert not isinstance(batch, MatchingPair)
            for of_one_size in batch:
                metrics.update(**localize_batch(network, self.refiner, of_one_size, self.starts)._asdict())

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        values: dict[str, float] = {}
        scores: list[float] = []
        for validation, metrics in zip(_validations(trainer), self.metrics, strict=True):
            prefix = f"val/{validation.name}" if validation.name else "val"
            if isinstance(metrics, MatchingMetrics):  # what it computes is gathered: the same on every process
                values |= matching_values(metrics.compute(), prefix)
                scores.append(values[f"{prefix}/matched_{RIGHT:g}px"])
            else:
                values |= localization_values(metrics.compute(), prefix)
                scores.append(values[f"{prefix}/converged"])
        if not trainer.sanity_checking and scores:
            pl_module.log_dict({**values, "val/score": statistics.fmean(scores)})


def _validations(trainer: pl.Trainer) -> list[Validation]:
    return trainer.datamodule.validations  # type: ignore[attr-defined]  # Lightning sets it from outside


def localization_values(summary: LocalizationSummary, prefix: str) -> dict[str, float]:
    """What the callback logs of refined poses, by name."""
    values = {}
    for condition in (summary.overall, *summary.conditions):
        start = prefix if condition is summary.overall else f"{prefix}/{condition.condition}"
        for errors, suffix in ((condition.final, ""), (condition.initial, "_before")):
            values[f"{start}/converged{suffix}"] = errors.converged
            values[f"{start}/position_m{suffix}"] = errors.median_position
            values[f"{start}/rotation_deg{suffix}"] = errors.median_rotation
            for (metres, degrees), recall in zip(summary.thresholds, errors.recall, strict=True):
                values[f"{start}/recall_{metres:g}m_{degrees:g}deg{suffix}"] = recall
    return values


def matching_values(summaries: tuple[MatchingSummary, ...], prefix: str) -> dict[str, float]:
    """What the callback logs of matched pairs, by name."""
    values = {}
    for summary in summaries:
        start = prefix if summary.condition == "all" else f"{prefix}/{summary.condition}"
        for pixels, share, kept in zip(THRESHOLDS, summary.within, summary.kept_within, strict=True):
            values[f"{start}/matched_{pixels:g}px"] = share
            if pixels == RIGHT:
                values[f"{start}/kept_{pixels:g}px"] = kept
    return values


class Speed(pl.Callback):
    """Logs how fast training goes, how long it waits for data, and the memory that it takes, when losses are logged.

    `speed/pairs_per_s` counts the pairs of all processes. `speed/waiting_for_data` is the share of the time in which
    the first process waits for its next batch. Both are means since they were logged before, without validation.
    `memory/gpu_gib` is the most that tensors took on the first GPU, `memory/host_gib` the most that the first process
    took of the host. All is measured on the host, so no step waits for it.
    """

    def __init__(self) -> None:
        self._pairs, self._waited = 0, 0.0
        self._since = self._ended = 0.0  # seconds: when counting began, and when the last batch ended
        self._logged = 0  # step

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Sequence[PairBatch], batch_idx: int
    ) -> None:
        self._waited += time.monotonic() - self._ended

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: Sequence[PairBatch],
        batch_idx: int,
    ) -> None:
        self._ended = time.monotonic()
        self._pairs += sum(len(part.index) for part in batch) * trainer.world_size
        step = trainer.global_step
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it from outside
        if step == self._logged or step % every != 0:
            return
        seconds = self._ended - self._since
        values = {"speed/pairs_per_s": self._pairs / seconds, "speed/waiting_for_data": self._waited / seconds}
        if pl_module.device.type == "cuda":
            values["memory/gpu_gib"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
        unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, else KiB
        values["memory/host_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        for logger in trainer.loggers:  # not `self.log`, which would copy each number to the GPU
            logger.log_metrics(values, step=step - 1)  # Lightning counts logged steps from 0
        self._logged = step
        self._restart()

    def _restart(self) -> None:
        self._pairs, self._waited = 0, 0.0
        self._since = self._ended = time.monotonic()
