"""Evaluation on a whole dataset: every network on each validation set, then tables, result files and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from gnnet.data.datamodule import DataModule, Validation
from gnnet.data.matching_pairs import MatchingDataset
from gnnet.evaluation.metrics import CONVERGED
from gnnet.evaluation.networks import Basin, compare_localization, compare_matching, grey_values_like
from gnnet.evaluation.report import charts
from gnnet.evaluation.report.examples import draw_examples, draw_matches
from gnnet.evaluation.runs import join_tables
from gnnet.evaluation.starts import InitialPoses
from gnnet.evaluation.tables import Setting, Table, print_table, write_table
from gnnet.localization.refiner import Refiner


class Results(NamedTuple):
    """Tables of what was measured; None where the data has nothing of the kind.

    `localization` is of poses refined from initial poses, `matching` of keypoints in pairs by fixed cameras.
    """

    localization: Table | None
    matching: Table | None

    def score(self) -> float:
        """Mean of two shares of the trained network: poses that converge, and keypoints matched within 3 pixels."""
        shares = [
            float(row[column])
            for table, column in ((self.localization, "converged"), (self.matching, "matched_3px"))
            for row in (() if table is None else table.rows)
            if row.method == "trained" and row.condition.split("/")[-1] == "all"
        ]
        return sum(shares) / len(shares) if shares else math.nan


def evaluate_networks(
    networks: Mapping[str, nn.Module],
    data: DataModule,
    *,
    refiner: Refiner,
    starts: InitialPoses,
    device: torch.device,
    output: Path,
    settings: Mapping[str, Setting],
    baselines: bool = True,
) -> Results:
    """Measure every network on each validation set: print the tables, write them as JSON; then draw figures.

    Args:
        networks: by name, `trained` among them; pictures are drawn with that one.
        data: set up.
        refiner: settings of the refinement.
        starts: the initial poses.
        device: where the networks run.
        output: folder to write into.
        settings: kept in the tables.
        baselines: also evaluate raw grey values, and SIFT where keypoints are matched.
    """
    if baselines:
        networks = {**networks, "grey values": grey_values_like(networks["trained"])}
    localized: dict[str, Table] = {}
    matched: dict[str, Table] = {}
    basins: dict[str, Basin | None] = {}
    for validation in data.validations:
        name, place = validation.name, validation.name or validation.scene.name
        batches = data.all_of(validation)
        if isinstance(validation, MatchingDataset):
            title = f"Matching on {place}: {len(validation)} pairs"
            matched[name] = compare_matching(
                networks, batches, conditions=validation.conditions, device=device, title=title, settings=settings,
                sift=baselines,
            )  # fmt: skip
        else:
            title = f"Localization on {place}: {len(validation)} queries, {starts.describe()}"
            localized[name], basins[name] = compare_localization(
                networks, batches, conditions=validation.conditions, device=device, title=title, settings=settings,
                refiner=refiner, starts=starts,
            )  # fmt: skip
    results = Results(join_tables(localized), join_tables(matched))
    for table, file in ((results.localization, "results.json"), (results.matching, "matching.json")):
        if table is not None:
            write_table(table, output / file)
            print_table(table)
    trained = networks["trained"].to(device)
    for validation in data.validations:
        figures, basin = output / "figures" / validation.name, basins.get(validation.name)
        draw_figures(trained, validation, basin, figures, refiner=refiner, starts=starts)
    print(f"Tables as .json, figures and logs are in {output}", flush=True)
    return results


def draw_figures(
    network: nn.Module,
    validation: Validation,
    basin: Basin | None,
    folder: Path,
    *,
    refiner: Refiner,
    starts: InitialPoses,
) -> None:
    """Draw what a network makes of one query, or pair, of each condition, and the convergence basin if it is given."""
    if isinstance(validation, MatchingDataset):
        draw_matches(network, validation, folder)
        return
    draw_basin(basin, folder / "convergence_basin.png")
    device = next(network.parameters()).device
    samples = [batch.to(device) for batch in validation.one_of_each_condition()]
    draw_examples(network, samples, folder, refiner=refiner, starts=starts.farthest())


def draw_basin(basin: Basin | None, path: Path) -> None:
    """Draw the share of poses that converge against the initial offset; nothing without a basin."""
    if basin is None or not basin.count:
        return
    charts.convergence_basin(
        list(basin.offsets),
        basin.converged,
        [basin.count] * (len(basin.offsets) - 1),
        quantity=f"initial offset, with {basin.degrees_per_metre:g}° a metre",
        title=f"Share of poses refined to within {100 * CONVERGED[0]:g} cm and {CONVERGED[1]:g}°",
        path=path,
    )
