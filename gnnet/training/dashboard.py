"""What wandb and TensorBoard show beside curves: the settings, pictures at each validation, the best checkpoint."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from tempfile import TemporaryDirectory

import pytorch_lightning as pl
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import nn

from gnnet.data.batches import collate
from gnnet.data.datamodule import Validation
from gnnet.data.images import read_image
from gnnet.data.matching_pairs import MatchingDataset
from gnnet.evaluation.dataset import draw_figures
from gnnet.evaluation.networks import Basin, compare_localization
from gnnet.evaluation.starts import InitialPoses
from gnnet.localization.refiner import Refiner
from gnnet.sampling import evenly
from gnnet.training.module import FeatureLearning
from gnnet.training.sweep import STATUS

_RUN_ID = "wandb_id.txt"  # in a run's folder


def wandb_logger(
    *, output_dir: str | Path, checkpoint: str | Path | None = None, id: str | None = None, **settings
) -> WandbLogger:
    """A logger to one run of wandb's a folder; training that goes on from a checkpoint goes on with its run.

    The run is named by its folder, and the runs of a sweep's jobs are a group.

    Args:
        output_dir: the folder, in which the run's id is kept.
        checkpoint: what training goes on from; None starts a run.
        id: another id than that of the folder or the checkpoint.
        settings: of Lightning's `WandbLogger`, which stand before those named here.
    """
    output = Path(output_dir)
    earlier = [] if checkpoint is None else [Path(checkpoint), *Path(checkpoint).absolute().parents[:2]]
    kept = (folder / _RUN_ID for folder in (output, *earlier))
    id = id or next((file.read_text().strip() for file in kept if file.is_file()), secrets.token_hex(4))
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]  # Lightning sets it from outside
        output.mkdir(parents=True, exist_ok=True)
        (output / _RUN_ID).write_text(f"{id}\n")
    in_sweep = (output / STATUS).exists()
    names = {"name": "/".join(output.parts[-2:]), "group": "/".join(output.parts[-3:-1]) if in_sweep else None}
    given = {key: value for key, value in settings.items() if value is not None}
    return WandbLogger(id=id, save_dir=os.fspath(output), **names | given)


class Dashboard(pl.Callback):
    """Sends settings, pictures and the best checkpoint's path to wandb and TensorBoard; nothing without one of them.

    Pictures are drawn at each validation, with the network as it is then: matches, features and refinement of one
    query of each condition, and the convergence basin. At the end of training, they are files without this.

    Args:
        refiner: refines poses.
        starts: the poses to refine.
        basin_queries: the convergence basin is measured on so many queries, spread evenly; 0 leaves it out.
    """

    def __init__(self, refiner: Refiner, starts: InitialPoses, basin_queries: int = 16) -> None:
        self.refiner = refiner
        self.starts = starts
        self.basin_queries = basin_queries

    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, pl_module: FeatureLearning) -> None:  # type: ignore[override]
        config = pl_module.config or {}
        for logger in _dashboards(trainer):
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams(config)
            else:  # whose table of settings needs a figure of the run's end
                logger.experiment.add_text("config", f"```\n{yaml.safe_dump(config, sort_keys=False)}\n```", 0)

    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, pl_module: FeatureLearning) -> None:  # type: ignore[override]
        loggers, network = _dashboards(trainer), pl_module.network
        if trainer.sanity_checking or not loggers:
            return
        with TemporaryDirectory() as folder:
            for validation in trainer.datamodule.validations:  # type: ignore[attr-defined]  # Lightning sets it
                basin = self._basin(network, validation)
                figures = Path(folder) / validation.name
                draw_figures(network, validation, basin, figures, refiner=self.refiner, starts=self.starts)
            for path in sorted(Path(folder).rglob("*.png")):
                name = path.relative_to(folder).with_suffix("").as_posix()
                for logger in loggers:
                    # Lightning counts logged steps from 0
                    _send_picture(logger, f"pictures/{name}", path, trainer.global_step - 1)

    @rank_zero_only
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        kept = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        best = next((c.best_model_path for c in kept if c.monitor is not None), "")
        for logger in _dashboards(trainer):
            if isinstance(logger, WandbLogger):
                logger.experiment.summary["best_checkpoint"] = best
            else:
                logger.experiment.add_text("best_checkpoint", best, trainer.global_step)

    def _basin(self, network: nn.Module, validation: Validation) -> Basin | None:
        if isinstance(validation, MatchingDataset) or not self.basin_queries:
            return None
        queries = [[collate([validation[0, i]])] for i in evenly(len(validation), self.basin_queries).tolist()]
        _, basin = compare_localization(
            {"trained": network}, queries, refiner=self.refiner, starts=self.starts,
            conditions=validation.conditions, device=next(network.parameters()).device, title="",
        )  # fmt: skip
        return basin


def _dashboards(trainer: pl.Trainer) -> list[WandbLogger | TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger | TensorBoardLogger)]


def _send_picture(logger: Logger, name: str, path: Path, step: int) -> None:
    if isinstance(logger, WandbLogger):
        logger.log_image(name, [str(path)], step=step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, read_image(path), step)
