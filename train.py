"""Train a feature network: `python train.py [group=option] [key=value]`, see `python train.py --help`."""

from __future__ import annotations

import logging
import math
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import hydra
import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, read_write
from torch import nn

from gnnet.data.datamodule import DataModule
from gnnet.evaluation.dataset import Results, evaluate_networks
from gnnet.models.weights import load_weights
from gnnet.training.checkpoints import check_resume
from gnnet.training.launch import Sweep, close_loggers, draw_loss_curves, job_folder, one_job, quote_paths, varied
from gnnet.training.module import FeatureLearning

make = partial(instantiate, _convert_="all")
sweep = Sweep()
OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)  # for conf/train.yaml


def run(cfg: DictConfig) -> Results | None:
    """Train as configured, then compare the trained network with its baselines on the validation sets.

    Writes checkpoints, logs, tables and figures into `cfg.paths.output_dir`. Returns the tables on the
    first process, None on the others. Raises what `prepare` raises, before any training.
    """
    return train(cfg, *prepare(cfg))


def prepare(cfg: DictConfig) -> tuple[DataModule, FeatureLearning, pl.Trainer]:
    """Make data, module and trainer; nothing is trained yet.

    Raises:
        FileNotFoundError, ValueError: where data, weights or checkpoint are missing or do not fit.
    """
    config = OmegaConf.to_container(cfg, resolve=True)  # plain values, so that checkpoints load without code
    assert isinstance(config, dict)
    if cfg.checkpoint is not None:
        print(check_resume(cfg.checkpoint, config), flush=True)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    data = make(cfg.dataset)
    data.setup()
    module = FeatureLearning(
        network=build_network(cfg),
        loss=make(cfg.loss),
        optimizer=make(cfg.optimizer),
        scheduler=make(cfg.scheduler),
        photometric=make(cfg.photometric),
        seed=cfg.seed,
        compile=cfg.compile,
        max_skipped_steps=cfg.max_skipped_steps,
        config=config,
    )
    loggers, callbacks = ([make(x) for x in group.values() if x is not None] for group in (cfg.logger, cfg.callbacks))
    return data, module, make(cfg.trainer, logger=loggers, callbacks=callbacks)


def train(cfg: DictConfig, data: DataModule, module: FeatureLearning, trainer: pl.Trainer) -> Results | None:
    """Fit what `prepare` made, and report on the first process."""
    started = time.monotonic()
    with close_loggers(trainer):
        trainer.fit(module, datamodule=data, ckpt_path=cfg.checkpoint, weights_only=True)
    if not trainer.is_global_zero:
        return None
    output, seconds = Path(cfg.paths.output_dir), round(time.monotonic() - started)
    draw_loss_curves(trainer, output / "figures" / "losses.png")
    if not data.validations:
        print(f"Nothing to validate on; checkpoints and logs are in {output}", flush=True)
        return Results(None, None)
    return evaluate_networks(
        {"trained": module.network, "untrained": build_network(cfg)},
        data,
        refiner=make(cfg.localizer.refiner),
        starts=make(cfg.starts),
        device=trainer.strategy.root_device,
        output=output,
        settings=choices() | {"seed": cfg.seed, "steps": trainer.global_step, "training seconds": seconds},
    )


def build_network(cfg: DictConfig) -> nn.Module:
    """The network as it is before training: the same for the same seed and weights."""
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    network = make(cfg.model)
    if cfg.weights is not None:
        print(load_weights(network, cfg.weights), flush=True)
    return network


def choices() -> dict[str, str]:
    """Which option of each group is in use, and in a sweep what varies; nothing outside Hydra."""
    if not HydraConfig.initialized():
        return {}
    hydra_config = HydraConfig.get()
    chosen, groups = hydra_config.runtime.choices, ("dataset", "model", "loss", "trainer", "experiment")
    run = " ".join(varied(hydra_config.overrides.task)) if hydra_config.mode == RunMode.MULTIRUN else ""
    return ({"run": run} if run else {}) | {group: chosen[group] for group in groups if chosen.get(group)}


def arguments() -> list[str]:
    """The command line of this job. Its folder is told to Hydra, for the other processes that Lightning starts."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode != RunMode.MULTIRUN:
        return sys.argv[1:]
    with read_write(hydra_config):  # type: ignore[arg-type]  # a DictConfig, though Hydra declares its schema's class
        hydra_config.run.dir = hydra_config.runtime.output_dir
    return list(hydra_config.overrides.task)


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> float | None:
    """Hydra's entry point; returns the score (see `Results`), for sweepers that maximise."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)  # tips and hardware
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own, about torch
    warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified.*")  # some losses need it
    warnings.filterwarnings("ignore", message=".*It is recommended to use `self.log.*")  # values are gathered before
    hydra_config = HydraConfig.get()
    with sweep.job(Path(hydra_config.runtime.output_dir) if hydra_config.mode == RunMode.MULTIRUN else None):
        with one_job(arguments()):
            try:
                prepared = prepare(cfg)
            except (FileNotFoundError, ConnectionError, ValueError) as error:  # what the user can mend
                raise SystemExit(f"\n{error}") from error
            try:
                results = train(cfg, *prepared)
            except FloatingPointError as error:  # too many steps without a finite loss or gradient
                raise SystemExit(f"\n{error}") from error
        return None if results is None else results.score()
    return math.nan  # a job of a sweep that failed


if __name__ == "__main__":
    sys.argv[1:] = quote_paths(sys.argv[1:])
    with sweep.summary():
        main()
