"""Evaluation on a whole dataset: every network on each validation set, with tables, result files and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from gnnet.data.datamodule import DataModule
from gnnet.data.matching_pairs import MatchingDataset
from gnnet.evaluation.matching_report import (
    MatchingReport,
    compare_matching,
    join_matching,
    print_matching,
    write_matching,
)
from gnnet.evaluation.networks import compare_networks, draw_basin, grey_values_like, make_report
from gnnet.evaluation.report.examples import draw_examples, draw_matches
from gnnet.evaluation.starts import StartPoses
from gnnet.evaluation.tables import Report, join_reports, print_report, write_results
from gnnet.localization.localizer import Localizer


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
    data: DataModule,
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
        name, loader = validation.name, data.all_of(validation)
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
