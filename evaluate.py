"""Localize queries with a trained network: `python evaluate.py checkpoint=PATH`, see `python evaluate.py --help`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import hydra
import numpy as np
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from gnnet.data.datamodule import DataModule
from gnnet.data.queries import LocalizationDataset
from gnnet.evaluation.dataset import Results, evaluate_networks
from gnnet.evaluation.localize import (
    LocalizedQueries,
    MapSettings,
    localize_dataset,
    prepare_localizer,
    queries_of_list,
    queries_of_scene,
)
from gnnet.evaluation.metrics import INDOOR, OUTDOOR
from gnnet.evaluation.tables import print_table
from gnnet.models.checkpoint import read_checkpoint
from gnnet.models.weights import load_weights
from gnnet.sampling import evenly
from gnnet.scenes.formats.poses import read_pose_file, read_query_list


def run(cfg: DictConfig) -> Results | list[LocalizedQueries]:
    """Evaluate a checkpoint on the validation sets of a dataset, the one that it was trained on by default.

    Raises:
        FileNotFoundError, ValueError: where checkpoint or data are missing or do not fit, see `prepare`.
    """
    networks, data, steps = prepare(cfg)
    return localize(cfg, networks["trained"], data) if on_map(cfg) else evaluate(cfg, networks, data, steps)


def prepare(cfg: DictConfig) -> tuple[dict[str, nn.Module], DataModule, int]:
    """The networks by name, the data, and how many steps the checkpoint was trained for.

    Raises:
        FileNotFoundError, ValueError: where checkpoint or data are missing or do not fit.
    """
    checkpoint = read_checkpoint(cfg.checkpoint)
    pl.seed_everything(checkpoint.seed, workers=True, verbose=False)
    networks = {"trained": checkpoint.network(allow=cfg.allow)}
    if cfg.baselines:
        pl.seed_everything(checkpoint.seed, workers=True, verbose=False)
        networks["untrained"] = checkpoint.network(trained=False, allow=cfg.allow)
        load_weights(networks["untrained"], checkpoint.config.get("weights"))
    # What the user asks for is built by Hydra; what a file asks for never is.
    if cfg.get("dataset"):
        data = instantiate(cfg.dataset, _convert_="all")
    else:
        data = checkpoint.dataset(index_dir=cfg.paths.index_dir, allow=cfg.allow)
    data.setup("validate")
    if not data.validations:
        raise ValueError(
            "the dataset leaves nothing to evaluate on; give dataset.validation_root or dataset.validation_fraction"
        )
    return networks, data, checkpoint.step


def evaluate(cfg: DictConfig, networks: Mapping[str, nn.Module], data: DataModule, steps: int) -> Results:
    """Localize and report with what `prepare` made."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    return evaluate_networks(
        networks,
        data,
        refiner=instantiate(cfg.localizer.refiner, _convert_="all"),
        starts=instantiate(cfg.starts, _convert_="all"),
        device=torch.device(device),
        output=Path(cfg.paths.output_dir),
        settings={"checkpoint": str(cfg.checkpoint), "steps": steps},
        baselines=cfg.baselines,
    )


def on_map(cfg: DictConfig) -> bool:
    """Whether queries are to be localized on a compiled map, or refined from initial poses around the truth."""
    return cfg.poses is not None or not instantiate(cfg.localizer.pose, _convert_="all").takes_initial


def localize(cfg: DictConfig, network: nn.Module, data: DataModule) -> list[LocalizedQueries]:
    """Localize the queries of each validation set, or of a list, on its map: tables, result files, reports.

    Raises:
        FileNotFoundError, ValueError: where map, poses, pairs or query list are missing or do not fit.
    """
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device)
    settings = instantiate(cfg.localizer, _convert_="all")
    initial = None if cfg.poses is None else read_pose_file(cfg.poses)
    cameras = None if cfg.queries is None else read_query_list(cfg.queries)
    thresholds = {"indoor": INDOOR, "outdoor": OUTDOOR}.get(cfg.thresholds)
    if thresholds is None:
        raise ValueError(f"thresholds={cfg.thresholds}; expected indoor or outdoor")
    if cameras is not None and cfg.images is None:
        raise ValueError("queries=FILE needs images=DIR, the folder that its names are below")
    localizable = [v for v in data.validations if isinstance(v, LocalizationDataset)]
    if not localizable:
        raise ValueError("the dataset has no references to make a map of; matching sets have no poses")
    if cfg.map is not None and len(localizable) > 1:
        names = ", ".join(v.name for v in localizable)
        raise ValueError(f"map={cfg.map} is one file, and there are {len(localizable)} maps ({names}); leave map out")
    done = []
    for validation in localizable:
        scene, output = validation.scene, Path(cfg.paths.output_dir) / validation.name
        localizer = prepare_localizer(
            settings,
            network.to(device),
            scene,
            MapSettings(
                folder=Path(cfg.paths.map_dir),
                file=None if cfg.map is None else Path(cfg.map),
                points=cfg.map_points,
                largest_side=validation.largest_side,
            ),
            device=device,
        )
        queries = queries_of_scene(scene)
        if cameras is not None:
            queries = queries_of_list(cameras, Path(cfg.images), scene)
        queries = [queries[i] for i in evenly(len(queries), cfg.max_queries, np.random.default_rng(0))]
        result = localize_dataset(
            localizer,
            queries,
            output,
            scene=scene,
            dataset=cfg.submit_as or reader_name(cfg, validation),
            title=f"Localization on {validation.name or scene.name}: {len(queries)} queries, "
            f"{len(localizer.map.names)} references; {settings.title}",
            thresholds=thresholds,
            initial=initial,
            settings={"run": overrides(), "checkpoint": str(cfg.checkpoint), "map": str(localizer.map.path)},
            colmap_model=cfg.colmap_model,
            command=shlex.join(["python", *sys.argv]),
        )
        print_table(result.report)
        print(f"Poses, records, submission.txt, report.html and figures are in {output}", flush=True)
        done.append(result)
    return done


def overrides() -> str:
    """What was asked for on the command line but the checkpoint and its data, which name a run in a comparison."""
    if not HydraConfig.initialized():
        return ""
    given = [o for o in HydraConfig.get().overrides.task if not o.startswith(("checkpoint=", "dataset", "paths."))]
    return " ".join(o.removeprefix("localizer=").removeprefix("localizer.") for o in given)


def reader_name(cfg: DictConfig, validation: LocalizationDataset) -> str:
    """Name of the dataset whose reader made a validation set: `toy`, `robotcar`, …"""
    dataset = cfg.get("dataset") or read_checkpoint(cfg.checkpoint).config["dataset"]
    source = dataset["sources"][validation.name] if "sources" in dataset else dataset
    return source["scene"]["_target_"].rpartition("load_")[2]


@hydra.main(config_path="conf", config_name="evaluate", version_base="1.3")
def main(cfg: DictConfig) -> None:
    try:
        networks, data, steps = prepare(cfg)
        done = localize(cfg, networks["trained"], data) if on_map(cfg) else None
    except (FileNotFoundError, ConnectionError, ValueError) as error:  # what the user can mend; the message says how
        raise SystemExit(f"\n{error}") from error
    if done is None:
        evaluate(cfg, networks, data, steps)
    elif not any(result.any_localized for result in done):
        raise SystemExit("\nno query was localized; localizations.jsonl has the reasons")


if __name__ == "__main__":
    main()
