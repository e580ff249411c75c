"""Localization on the validation queries while training."""

from __future__ import annotations

import pytorch_lightning as pl

from gnnet.data.batches import LocalizationBatch
from gnnet.evaluation.metrics import LocalizationMetrics, LocalizationSummary
from gnnet.evaluation.protocol import localize_batch
from gnnet.localization.localizer import Localizer, StartPoses


class LocalizationValidation(pl.Callback):
    """Refines poses of the validation queries with the network as it is, and logs how well that works.

    Logged, for all queries as `val/NAME` and for each condition as `val/CONDITION/NAME`, so that
    `ModelCheckpoint` can monitor any of them: `converged` (share of starts that end within 5 cm
    and 0.5°), `position_m` and `rotation_deg` (medians), `recall_POSITIONm_ROTATIONdeg`; the same
    of the start poses with `_before`. Every query counts once on any number of processes.

    Args:
        localizer: how poses are refined.
        starts: where from.
    """

    def __init__(self, localizer: Localizer, starts: StartPoses) -> None:
        self.localizer = localizer
        self.starts = starts
        self.metrics: LocalizationMetrics | None = None

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        conditions = trainer.datamodule.queries.conditions
        self.metrics = LocalizationMetrics(conditions=conditions).to(pl_module.device)

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch: LocalizationBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        localized = localize_batch(pl_module.network, self.localizer, batch, self.starts)
        self.metrics.update(**localized._asdict())

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        summary = self.metrics.compute()  # gathered: the same on every process
        if not trainer.sanity_checking:
            pl_module.log_dict(logged_values(summary))


def logged_values(summary: LocalizationSummary) -> dict[str, float]:
    """What the callback logs of a summary, by name."""
    values = {}
    for condition in (summary.overall, *summary.conditions):
        prefix = "val" if condition is summary.overall else f"val/{condition.condition}"
        for errors, suffix in ((condition.final, ""), (condition.initial, "_before")):
            values[f"{prefix}/converged{suffix}"] = errors.converged
            values[f"{prefix}/position_m{suffix}"] = errors.median_position
            values[f"{prefix}/rotation_deg{suffix}"] = errors.median_rotation
            for (metres, degrees), recall in zip(summary.thresholds, errors.recall, strict=True):
                values[f"{prefix}/recall_{metres:g}m_{degrees:g}deg{suffix}"] = recall
    return values
