"""Localize queries with a trained network: `python evaluate.py weights=NAME`, see `python evaluate.py --help`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from gnnet.data.datamodule import DataModule
from gnnet.evaluation.dataset import Results, evaluate_networks
from gnnet.evaluation.given import Given, read_given
from gnnet.evaluation.localize import LocalizedQueries, localize_validations
from gnnet.evaluation.maps import MapSettings
from gnnet.evaluation.metrics import THRESHOLDS
from gnnet.localization.localizer import Localizer
from gnnet.models.checkpoint import read_checkpoint
from gnnet.models.pyramid import FeatureNetwork
from gnnet.models.weights import PACKAGED
from gnnet.processes import Devices, devices_of
from gnnet.scenes.formats.images import limit_images
from gnnet.training.checkpoints import find_checkpoint, networks_of
from gnnet.training.launch import MENDABLE, message_only, quote_paths, refuse_several_processes
from gnnet.training.sweep import Job, job_folder, job_status

OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)  # for conf/evaluate.yaml


class Prepared(NamedTuple):
    """The networks by name, the data, how many steps the checkpoint was trained for, and where and how to localize."""

    networks: dict[str, FeatureNetwork]
    data: DataModule
    steps: int
    devices: Devices
    localizer: Localizer


def run(cfg: DictConfig, name: str = "") -> Results | list[LocalizedQueries]:
    """Evaluate a checkpoint on the validation sets of a dataset, the one that it was trained on by default.

    Queries are localized on a compiled map, or, for a localizer that refines poses where no `poses=FILE` gives
    any, refined from initial poses around the truth. `name` is the run's in a comparison.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: if checkpoint, data or a file are missing or do not fit.
    """
    if cfg.thresholds not in THRESHOLDS:
        raise ValueError(f"thresholds={cfg.thresholds}; expected {' or '.join(THRESHOLDS)}")
    given = read_given(**{key: cfg[key] for key in ("queries", "images", "poses", "truth", "camera", "rig")})
    prepared = prepare(cfg)
    if given.initial is None and prepared.localizer.pose.takes_initial:
        return refine(cfg, prepared)
    return localize(cfg, prepared, given, name)


def make(config: DictConfig) -> Any:
    """What a part of the configuration describes; an error of what is built is raised as it is."""
    try:
        return instantiate(config, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, MENDABLE):
            raise error.__cause__ from None
        raise


def prepare(cfg: DictConfig) -> Prepared:
    """Load networks and data; nothing is evaluated yet. Raises as `run`."""
    limit_images(cfg.max_megapixels)
    if cfg.checkpoint is None or cfg.weights not in (None, cfg.checkpoint):
        raise ValueError(f"give either weights=NAME ({', '.join(PACKAGED)}) or checkpoint=FILE, which train.py wrote")
    cfg.checkpoint = str(find_checkpoint(cfg.checkpoint, runs=cfg.paths.runs_dir))
    checkpoint = read_checkpoint(cfg.checkpoint)
    networks = networks_of(checkpoint, untrained=cfg.baselines, enlarge=cfg.enlarge, allow=cfg.allow)
    # What the user asks for is built by Hydra; what a file asks for never is.
    index = {"index_dir": cfg.paths.index_dir, "allow": cfg.allow}
    data = make(cfg.dataset) if cfg.get("dataset") else checkpoint.dataset(**index)
    localizer = replace(make(cfg.localizer), estimate_focal=cfg.camera is not None)
    from_truth = cfg.poses is None and localizer.pose.takes_initial
    if from_truth and not (cfg.queries is None and cfg.truth is None and cfg.devices == 1 and cfg.resume is None):
        raise ValueError(
            "queries=FILE and truth=FILE need poses=FILE where the localizer refines initial poses (localizer=refine), "
            "and so do devices=N and resume=RUN; give it, or take localizer=sparse_to_dense"
        )
    data.setup_evaluation(mapped=not from_truth, whole=cfg.queries is not None)
    return Prepared(networks, data, checkpoint.step, devices_of(cfg.device, cfg.devices), localizer)


def refine(cfg: DictConfig, prepared: Prepared) -> Results:
    """Refine initial poses around the truth, or the references' poses, with each network: tables and figures."""
    networks, data, steps, (device,), localizer = prepared
    return evaluate_networks(
        networks, data, refiner=localizer.refiner, starts=make(cfg.starts), device=device,
        output=Path(cfg.paths.output_dir), settings={"checkpoint": str(cfg.checkpoint), "steps": steps},
        baselines=cfg.baselines,
    )  # fmt: skip


def localize(cfg: DictConfig, prepared: Prepared, given: Given, name: str = "") -> list[LocalizedQueries]:
    """Localize the queries of each validation set, or of a list, on its map: tables, result files, reports."""
    return localize_validations(
        prepared.data, prepared.networks["trained"], prepared.localizer, Path(cfg.resume or cfg.paths.output_dir),
        device=prepared.devices, resume=cfg.resume is not None, given=given, max_queries=cfg.max_queries,
        maps=MapSettings(Path(cfg.paths.map_dir), cfg.map and Path(cfg.map), cfg.map_points, adjust=cfg.map_adjust),
        thresholds=THRESHOLDS[cfg.thresholds], submit_as=cfg.submit_as, colmap_model=cfg.colmap_model,
        about={"run": name, "checkpoint": str(cfg.checkpoint)}, command=shlex.join(["python", *sys.argv]),
    )  # fmt: skip


@hydra.main(config_path="conf", config_name="evaluate", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Hydra's entry point."""
    job = Job.of(HydraConfig.get())
    with job_status(job.folder if job.in_sweep else None), message_only(*MENDABLE):
        refuse_several_processes("evaluate.py")
        results = run(cfg, job.evaluation())
        if isinstance(results, list) and results and not any(result.any_localized for result in results):
            raise SystemExit("\nno query was localized; localizations.jsonl has the reasons")


if __name__ == "__main__":
    sys.argv[1:] = quote_paths(sys.argv[1:])
    main()
