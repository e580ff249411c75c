"""Train a feature network: `python train.py [group=option] [key=value]`, see `python train.py --help`."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import hydra
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, read_write
from torch import nn

from gnnet.data.datamodule import DataModule
from gnnet.evaluation.dataset import Results, evaluate_networks
from gnnet.evaluation.report.charts import loss_curves
from gnnet.models.weights import load_weights
from gnnet.training.checkpoints import check_resume
from gnnet.training.module import FeatureLearning


class Run(NamedTuple):
    """What a configuration makes."""

    data: DataModule
    module: FeatureLearning
    trainer: pl.Trainer


def run(cfg: DictConfig) -> Results | None:
    """Train as configured, then compare the trained network with its baselines on the validation sets.

    Writes checkpoints, logs, tables and figures into `cfg.paths.output_dir`. Returns the tables on the
    first process, None on the others.

    Raises:
        FileNotFoundError, ValueError: before any training, see `prepare`.
    """
    return train(cfg, prepare(cfg))


def prepare(cfg: DictConfig) -> Run:
    """Make data, module and trainer; nothing is trained yet.

    Raises:
        FileNotFoundError, ValueError: where data, weights or checkpoint are missing or do not fit.
    """
    config = OmegaConf.to_container(cfg, resolve=True)  # plain values, so that checkpoints load without code
    if cfg.checkpoint is not None:
        print(check_resume(cfg.checkpoint, config), flush=True)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    data = instantiate(cfg.dataset, _convert_="all")
    data.setup()
    module = FeatureLearning(
        network=build_network(cfg),
        loss=instantiate(cfg.loss, _convert_="all"),
        optimizer=instantiate(cfg.optimizer, _convert_="all"),
        scheduler=instantiate(cfg.scheduler, _convert_="all"),
        photometric=instantiate(cfg.photometric, _convert_="all"),
        seed=cfg.seed,
        config=config,
    )
    loggers = [instantiate(logger) for logger in cfg.logger.values() if logger is not None]
    callbacks = [instantiate(c, _convert_="all") for c in cfg.callbacks.values() if c is not None]
    return Run(data, module, instantiate(cfg.trainer, logger=loggers, callbacks=callbacks, _convert_="all"))


def train(cfg: DictConfig, prepared: Run) -> Results | None:
    """Fit, and report on the first process."""
    data, module, trainer = prepared
    started = time.monotonic()
    with close_loggers(trainer):
        trainer.fit(module, datamodule=data, ckpt_path=cfg.checkpoint, weights_only=True)
    if not trainer.is_global_zero:
        return None
    output = Path(cfg.paths.output_dir)
    draw_loss_curves(trainer, output / "figures" / "losses.png")
    if not data.validations:
        print(f"Nothing to validate on; checkpoints and logs are in {output}", flush=True)
        return Results(None, None)
    return evaluate_networks(
        {"trained": module.network, "untrained": build_network(cfg)},
        data,
        localizer=instantiate(cfg.localizer, _convert_="all"),
        starts=instantiate(cfg.starts, _convert_="all"),
        device=trainer.strategy.root_device,
        output=output,
        settings={
            **choices(),
            "seed": cfg.seed,
            "steps": trainer.global_step,
            "training seconds": round(time.monotonic() - started),
        },
    )


def build_network(cfg: DictConfig) -> nn.Module:
    """The network as it is before training: the same for the same seed and weights."""
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    network = instantiate(cfg.model, _convert_="all")
    if cfg.weights is not None:
        print(load_weights(network, cfg.weights), flush=True)
    return network


def choices() -> dict[str, str]:
    """Which option of each group is in use; nothing outside Hydra."""
    if not HydraConfig.initialized():
        return {}
    chosen = HydraConfig.get().runtime.choices
    groups = ("dataset", "model", "loss", "trainer", "experiment")
    return {group: chosen[group] for group in groups if chosen.get(group)}


def draw_loss_curves(trainer: pl.Trainer, path: Path) -> None:
    """Training curves from the CSV log, where one was kept and the run was long enough to log a step."""
    if trainer.global_step < trainer.log_every_n_steps:
        return
    for logger in trainer.loggers:
        if isinstance(logger, pl.loggers.CSVLogger):
            loss_curves(Path(logger.log_dir) / "metrics.csv", path=path)


@contextmanager
def close_loggers(trainer: pl.Trainer) -> Iterator[None]:
    """Finish every logger's run, also when training fails: wandb would go on with it in the next job of a sweep."""
    status = "failed"
    try:
        yield
        status = "success"
    finally:
        for logger in trainer.loggers:
            logger.finalize(status)
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish(exit_code=0 if status == "success" else 1)


@contextmanager
def one_job_per_process_group() -> Iterator[None]:
    """Let several processes train one job of a Hydra multirun.

    Lightning starts its other processes by running this script's command line again. In a multirun
    that would be the whole sweep, in folders of its own, so the command line is made that of this
    job, in this job's folder. Afterwards the traces that would make Lightning take the next job for
    such a child process are removed.
    """
    argv, environment = sys.argv, dict(os.environ)
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        sys.argv = [argv[0], *hydra_config.overrides.task]
        with read_write(hydra_config):
            hydra_config.run.dir = hydra_config.runtime.output_dir
    try:
        yield
    finally:
        sys.argv = argv
        for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
            if name in environment:
                os.environ[name] = environment[name]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> float | None:
    """Hydra's entry point; returns the score (see `Results`), for sweepers that maximise."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)  # tips and hardware
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own, about torch
    with one_job_per_process_group():
        try:
            prepared = prepare(cfg)
        except (FileNotFoundError, ConnectionError, ValueError) as error:  # what the user can mend
            raise SystemExit(f"\n{error}") from error
        results = train(cfg, prepared)
    return None if results is None else results.score()


if __name__ == "__main__":
    main()
