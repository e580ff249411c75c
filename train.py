"""Train a feature network: `python train.py [group=option] [key=value]`, see `python train.py --help`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import hydra
import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, read_write
from torch import nn

from gnnet.data.datamodule import DataModule
from gnnet.evaluation.dataset import Results, evaluate_networks
from gnnet.models.weights import load_weights
from gnnet.scenes.formats.images import limit_images
from gnnet.training.checkpoints import check_resume, find_checkpoint
from gnnet.training.launch import MENDABLE, fit, message_only, one_job, quote_paths, silence_lightning
from gnnet.training.module import FeatureLearning
from gnnet.training.sweep import Job, job_folder, job_status

make = partial(instantiate, _convert_="all")
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
    limit_images(cfg.max_megapixels)
    config = OmegaConf.to_container(cfg, resolve=True)  # plain values, so that checkpoints load without code
    assert isinstance(config, dict)
    if cfg.checkpoint is not None:
        cfg.checkpoint = str(find_checkpoint(cfg.checkpoint, runs=cfg.paths.runs_dir))
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


def train(
    cfg: DictConfig, data: DataModule, module: FeatureLearning, trainer: pl.Trainer, about: dict[str, str] | None = None
) -> Results | None:
    """Fit what `prepare` made, and report on the first process; the tables have `about` among their settings."""
    output = Path(cfg.paths.output_dir)
    curves = output / "figures" / "losses.png"
    seconds = fit(trainer, module, data, checkpoint=cfg.checkpoint, curves=curves)
    if not trainer.is_global_zero:
        return None
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
        settings={**(about or {}), "seed": cfg.seed, "steps": trainer.global_step, "training seconds": seconds},
    )


def build_network(cfg: DictConfig) -> nn.Module:
    """The network as it is before training: the same for the same seed and weights."""
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    network = make(cfg.model)
    if cfg.weights is not None:
        print(load_weights(network, cfg.weights), flush=True)
    return network


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> float | None:
    """Hydra's entry point; returns the score (see `Results`), for sweepers that maximise."""
    silence_lightning()
    record = HydraConfig.get()
    job = Job.of(record)
    cfg.checkpoint = job.stopped_at() or cfg.checkpoint
    with read_write(record):  # type: ignore[arg-type]  # a DictConfig, though Hydra declares its schema's class
        record.run.dir = str(job.folder)  # for the other processes that Lightning starts
    with job_status(job.folder if job.in_sweep else None), one_job(job.arguments()):
        with message_only(*MENDABLE):
            prepared = prepare(cfg)
        with message_only(FloatingPointError):  # too many steps without a finite loss or gradient
            results = train(cfg, *prepared, about=job.options())
        return None if results is None else results.score()
    return None  # a job of a sweep that failed


if __name__ == "__main__":
    sys.argv[1:] = quote_paths(sys.argv[1:])
    main()
