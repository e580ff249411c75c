"""Several networks localize the same queries from the same starts: one table, and the pictures beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from rich.progress import track
from torch import nn

from gnnet.data.batches import LocalizationBatch
from gnnet.evaluation.metrics import CONVERGED, LocalizationMetrics, LocalizationSummary
from gnnet.evaluation.protocol import localize_features
from gnnet.evaluation.report import charts as figures
from gnnet.evaluation.starts import StartPoses
from gnnet.evaluation.tables import Line, Report
from gnnet.localization.localizer import Localizer
from gnnet.models.grey import GreyValues

RINGS = (0.0, 1.0, 2.0, 3.0, 4.0)  # of the convergence basin, in multiples of the largest start offset


@dataclass(frozen=True)
class Comparison:
    """What each network reached, by its name: summaries at the configured starts, and shares that converge by ring."""

    summaries: dict[str, LocalizationSummary]
    basins: dict[str, tuple[float, ...]]
    starts_per_ring: int
    starts: StartPoses


def grey_values_like(network: nn.Module) -> GreyValues:
    """Raw grey values at the strides of a network's maps, to hold it against."""
    return GreyValues(strides=sorted(set(network.strides), reverse=True))


@torch.no_grad()
def compare_networks(
    networks: Mapping[str, nn.Module],
    batches: Iterable[LocalizationBatch],
    *,
    localizer: Localizer,
    starts: StartPoses,
    conditions: tuple[str, ...],
    device: torch.device | str,
) -> Comparison:
    """Localize every query with every network from `starts`; if perturbations, also from rings of growing offset.

    Networks are put into evaluation mode for it, and back.

    Args:
        networks: by the name that stands in the table.
        batches: the queries; read once.
        localizer: settings of the refinement.
        starts: where it starts from.
        conditions: all conditions of the queries.
        device: where to run.
    """
    rings = ring_starts(starts) if starts.kind == "perturbation" else []
    # Only one process compares, so nothing is gathered.
    new_metrics = partial(LocalizationMetrics, conditions=conditions, sync_on_compute=False)
    table = {name: new_metrics() for name in networks}
    basins = {name: [new_metrics() for _ in rings] for name in networks}
    was_training = {name: network.training for name, network in networks.items()}
    for network in networks.values():
        network.eval().to(device)
    for batch in track(batches, description=f"Localizing with {len(networks)} networks", transient=True):
        batch = batch.to(device)
        for name, network in networks.items():
            query, reference = localizer.features(network, batch)
            for metrics, at in zip((table[name], *basins[name]), (starts, *rings), strict=True):
                metrics.update(**localize_features(localizer, query, reference, batch, at)._asdict())
    for name, network in networks.items():
        network.train(was_training[name])
    shares = {name: [ring.compute().overall for ring in metrics] for name, metrics in basins.items()}
    return Comparison(
        summaries={name: metrics.compute() for name, metrics in table.items()},
        basins={name: tuple(ring.final.converged for ring in rings) for name, rings in shares.items()},
        starts_per_ring=next((ring.count for rings in shares.values() for ring in rings), 0),
        starts=starts,
    )


def ring_starts(starts: StartPoses) -> list[StartPoses]:
    """One start a query in each ring: exactly so far off, position and rotation growing together."""
    other = replace(starts, count=1, exact=True, seed=starts.seed + 1)
    middles = [(low + high) / 2 for low, high in pairwise(RINGS)]
    return [replace(other, position=m * starts.position, rotation=m * starts.rotation) for m in middles]


def make_report(comparison: Comparison, *, title: str, settings: dict, notes: tuple[str, ...] = ()) -> Report:
    """The comparison as lines of a table: per condition the start poses, then every network."""
    first = next(iter(comparison.summaries.values()))
    lines = []
    single = len(first.conditions) < 2  # then "all" says the same
    for position, of_first in enumerate((first.overall, *(() if single else first.conditions))):
        lines.append(Line.of("start", of_first.condition, of_first.count, of_first.initial))
        for name, summary in comparison.summaries.items():
            condition = (summary.overall, *summary.conditions)[position]
            lines.append(Line.of(name, condition.condition, condition.count, condition.final))
    return Report(title=title, thresholds=first.thresholds, lines=tuple(lines), settings=settings, notes=notes)


def draw_basin(comparison: Comparison, path: Path) -> None:
    """Picture of the share of starts that converge against how far off they start; nothing without rings."""
    if not comparison.starts_per_ring:
        return
    starts = comparison.starts
    figures.convergence_basin(
        [ring * starts.position for ring in RINGS],
        comparison.basins,
        [comparison.starts_per_ring] * (len(RINGS) - 1),
        quantity=f"start offset, with {starts.rotation / starts.position:g}° a metre",
        title=f"Share of starts refined to within {100 * CONVERGED[0]:g} cm and {CONVERGED[1]:g}°",
        path=path,
    )
