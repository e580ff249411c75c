"""Localize queries with a trained network: `python evaluate.py checkpoint=PATH`, see `python evaluate.py --help`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import hydra
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from gnnet.data.loaders import Data, all_of
from gnnet.data.matching_pairs import MatchingDataset
from gnnet.evaluation.by_matching import compare_by_matching
from gnnet.evaluation.comparison import compare_networks, draw_basin, grey_values_like, make_report
from gnnet.evaluation.examples import draw_examples, draw_matches
from gnnet.evaluation.matching_report import (
    MatchingReport,
    compare_matching,
    join_matching,
    print_matching,
    write_matching,
)
from gnnet.evaluation.report import Report, join_reports, print_report, write_results
from gnnet.localization.localizer import Localizer, StartPoses
from gnnet.models.checkpoint import read_checkpoint
from gnnet.models.weights import load_weights


def run(cfg: DictConfig) -> Results:
    """Evaluate a checkpoint on the validation sets of a dataset, the one that it was trained on by default.

    Raises:
        FileNotFoundError, ValueError: where checkpoint or data are missing or do not fit, see `prepare`.
    """
    return evaluate(cfg, *prepare(cfg))


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
        by_matching=cfg.by_matching,
    )


class Results(NamedTuple):
    """Tables of what was measured; None where the data has nothing of the kind.

    `localization` is of poses refined from start poses, `matching` of pairs by still cameras,
    `by_matching` of queries localized by matching with several references, PnP and refinement.
    """

    localization: Report | None
    matching: MatchingReport | None
    by_matching: Report | None

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
    by_matching: bool = False,
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
        by_matching: also localize queries without a start pose, from several references.
    """
    if baselines:
        networks = {**networks, "grey values": grey_values_like(networks["trained"])}
    common = {"device": device, "settings": settings}
    localized, matched, found = {}, {}, {}
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
        draw_examples(
            networks["trained"], samples, figures, localizer=localizer, starts=replace(starts, exact=True)
        )
        if by_matching:
            title = f"Localization by matching on {name or validation.scene.name}: {len(validation)} queries"
            groups = (validation.query_group(index) for index in range(len(validation)))
            found[name] = compare_by_matching(
                networks, groups, localizer=localizer, title=title, sift=baselines, **common
            )
    results = Results(join_reports(localized), join_matching(matched), join_reports(found))
    if results.localization is not None:
        write_results(results.localization, output / "results.json")
        print_report(results.localization)
    if results.matching is not None:
        write_matching(results.matching, output / "matching.json")
        print_matching(results.matching)
    if results.by_matching is not None:
        write_results(results.by_matching, output / "localization_by_matching.json")
        print_report(results.by_matching)
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
        prepared = prepare(cfg)
    except (FileNotFoundError, ConnectionError, ValueError) as error:  # what the user can mend; the message says how
        raise SystemExit(f"\n{error}") from error
    evaluate(cfg, *prepared)


if __name__ == "__main__":
    main()
