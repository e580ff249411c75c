"""Localize queries with a trained network: `python evaluate.py checkpoint=PATH`, see `python evaluate.py --help`."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import hydra
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from gnnet.data.loaders import Data, all_of
from gnnet.data.matching_pairs import MatchingDataset
from gnnet.data.queries import LocalizationDataset
from gnnet.evaluation.inspect.pairs import sample_evenly
from gnnet.evaluation.localize import (
    LocalizedQueries,
    MapSettings,
    localize_dataset,
    prepare_localizer,
    queries_of_list,
    queries_of_scene,
)
from gnnet.evaluation.matching_report import (
    MatchingReport,
    compare_matching,
    join_matching,
    print_matching,
    write_matching,
)
from gnnet.evaluation.metrics import INDOOR, OUTDOOR
from gnnet.evaluation.networks import compare_networks, draw_basin, grey_values_like, make_report
from gnnet.evaluation.report.examples import draw_examples, draw_matches
from gnnet.evaluation.starts import StartPoses
from gnnet.evaluation.tables import Report, join_reports, print_report, write_results
from gnnet.localization.localizer import Localizer
from gnnet.models.checkpoint import read_checkpoint
from gnnet.models.weights import load_weights
from gnnet.scenes.formats.poses import read_pose_file, read_query_list


def run(cfg: DictConfig) -> Results | list[LocalizedQueries]:
    """Evaluate a checkpoint on the validation sets of a dataset, the one that it was trained on by default.

    Raises:
        FileNotFoundError, ValueError: where checkpoint or data are missing or do not fit, see `prepare`.
    """
    networks, data, steps = prepare(cfg)
    return localize(cfg, networks["trained"], data) if on_map(cfg) else evaluate(cfg, networks, data, steps)


def prepare(cfg: DictConfig) -> tuple[dict[str, nn.Module], Data, int]:
    """The networks by name, the data, and how many steps the checkpoint was trained for.

    Raises:
        FileNotFoundError, ValueError: where checkpoint or data are missing or do not fit.
    """
    checkpoint = read_checkpoint(cfg.checkpoint)
    trained_with = OmegaConf.create(checkpoint["config"])
    pl.seed_everything(trained_with.seed, workers=True, verbose=False)
    networks = {"trained": instantiate(trained_with.model, _convert_="all")}
    load_weights(networks["trained"], cfg.checkpoint)
    if cfg.baselines:
        pl.seed_everything(trained_with.seed, workers=True, verbose=False)
        networks["untrained"] = instantiate(trained_with.model, _convert_="all")
        if trained_with.weights is not None:
            load_weights(networks["untrained"], trained_with.weights)
    data = instantiate(cfg.get("dataset") or trained_with.dataset, _convert_="all")
    data.setup("validate")
    if not data.validations:
        raise ValueError(
            "the dataset leaves nothing to evaluate on; give dataset.validation_root or dataset.validation_fraction"
        )
    return networks, data, checkpoint["global_step"]


def evaluate(cfg: DictConfig, networks: Mapping[str, nn.Module], data: Data, steps: int) -> Results:
    """Localize and report with what `prepare` made."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    return evaluate_networks(
        networks,
        data,
        localizer=instantiate(cfg.localizer, _convert_="all"),
        starts=instantiate(cfg.starts, _convert_="all"),
        device=torch.device(device),
        output=Path(cfg.paths.output_dir),
        settings={"checkpoint": str(cfg.checkpoint), "steps": steps},
        baselines=cfg.baselines,
    )


def on_map(cfg: DictConfig) -> bool:
    """Whether queries are to be localized on a compiled map, or refined from start poses around the truth."""
    return cfg.localizer.mode != "refine" or cfg.poses is not None


def localize(cfg: DictConfig, network: nn.Module, data: Data) -> list[LocalizedQueries]:
    """Localize the queries of each validation set, or of a list, on its map: tables, result files, reports.

    Raises:
        FileNotFoundError, ValueError: where map, poses, pairs or query list are missing or do not fit.
    """
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device)
    settings = instantiate(cfg.localizer, _convert_="all")
    starts = None if cfg.poses is None else read_pose_file(cfg.poses)
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
        queries = [queries[i] for i in sample_evenly(len(queries), cfg.max_queries)]
        result = localize_dataset(
            localizer,
            queries,
            output,
            scene=scene,
            dataset=cfg.submit_as or reader_name(cfg, validation),
            title=f"{cfg.localizer.mode} on {validation.name or scene.name}: {len(queries)} queries, "
            f"{len(localizer.map.names)} references, retrieval={settings.retrieval}",
            thresholds=thresholds,
            starts=starts,
            settings={"run": overrides(), "checkpoint": str(cfg.checkpoint), "map": str(localizer.map.path)},
            colmap_model=cfg.colmap_model,
            command=shlex.join(["python", *sys.argv]),
        )
        print_report(result.report)
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
    dataset = cfg.get("dataset") or OmegaConf.create(read_checkpoint(cfg.checkpoint)["config"]).dataset
    source = dataset.sources[validation.name] if "sources" in dataset else dataset
    return source.scene._target_.rpartition("load_")[2]


class Results(NamedTuple):
    """Tables of what was measured; None where the data has nothing of the kind.

    `localization` is of poses refined from start poses, `matching` of pairs by still cameras.
    """

    localization: Report | None
    matching: MatchingReport | None

    def score(self) -> float:
        """Mean of the trained network's shares of converged starts and of keypoints matched within 3 pixels."""
        shares = []
        if self.localization is not None:
            shares += [x.converged for x in self.localization.lines if x.method == "trained" and _is_all(x.condition)]
        if self.matching is not None:
            column = self.matching.thresholds.index(3.0)
            shares += [x.within[column] for x in self.matching.lines["trained"] if _is_all(x.condition)]
        return sum(shares) / len(shares) if shares else math.nan


def _is_all(condition: str) -> bool:
    return condition.split("/")[-1] == "all"


def evaluate_networks(
    networks: Mapping[str, nn.Module],
    data: Data,
    *,
    localizer: Localizer,
    starts: StartPoses,
    device: torch.device,
    output: Path,
    settings: dict,
    baselines: bool = True,
) -> Results:
    """Try every network on each validation set: print the tables, write them as JSON, and draw figures.

    Args:
        networks: by name, `trained` among them; pictures are drawn with that.
        data: set up.
        localizer, starts: how refinement runs and where from.
        device: where.
        output: folder to write into.
        settings: to stand in the reports.
        baselines: also evaluate raw grey values, and SIFT where keypoints are matched.
    """
    if baselines:
        networks = {**networks, "grey values": grey_values_like(networks["trained"])}
    common = {"device": device, "settings": settings}
    localized, matched = {}, {}
    for validation in data.validations:
        name, loader = validation.name, all_of(data, validation)
        figures = output / "figures" / name
        if isinstance(validation, MatchingDataset):
            title = f"Matching on {name or validation.scene.name}: {len(validation)} pairs"
            matched[name] = compare_matching(
                networks, loader, conditions=validation.conditions, title=title, sift=baselines, upright=baselines,
                **common,
            )  # fmt: skip
            draw_matches(networks["trained"].to(device), validation, figures)
            continue
        comparison = compare_networks(
            networks, loader, localizer=localizer, starts=starts, conditions=validation.conditions, device=device
        )
        title = f"Localization on {name or validation.scene.name}: {len(validation)} queries, {describe(starts)}"
        localized[name] = make_report(comparison, title=title, settings=settings)
        draw_basin(comparison, figures / "convergence_basin.png")
        samples = [batch.to(device) for batch in validation.one_of_each_condition()]
        draw_examples(networks["trained"], samples, figures, localizer=localizer, starts=replace(starts, exact=True))
    results = Results(join_reports(localized), join_matching(matched))
    if results.localization is not None:
        write_results(results.localization, output / "results.json")
        print_report(results.localization)
    if results.matching is not None:
        write_matching(results.matching, output / "matching.json")
        print_matching(results.matching)
    print(f"Tables as .json, figures and logs are in {output}", flush=True)
    return results


def describe(starts: StartPoses) -> str:
    """Where refinement starts from, in words."""
    if starts.kind == "reference":
        return "started at the reference's pose"
    return f"started up to {starts.position:g} m and {starts.rotation:g}° off"


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
