"""Several networks on the same queries or pairs: the tables in which a trained network stands beside baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, pairwise

import torch
from torch import nn

from gnnet.data.batches import LocalizationBatch, Matches, MatchingPair
from gnnet.evaluation.matching import THRESHOLDS, MatchingMetrics, match_pair, match_pair_with_sift
from gnnet.evaluation.metrics import LocalizationMetrics, LocalizationSummary, paired_difference
from gnnet.evaluation.starts import InitialPoses, PerturbedPoses, localize_features
from gnnet.evaluation.tables import INITIAL_POSES, Setting, Table, localization_table, matching_table
from gnnet.localization.refiner import Refiner
from gnnet.models.grey import GreyValues
from gnnet.progress import track

RINGS = (0.0, 1.0, 2.0, 3.0, 4.0)  # bounds of the rings of offsets, in multiples of the largest initial offset


@dataclass(frozen=True)
class Basin:
    """How many of the poses converge, by how far off the initial pose is.

    Args:
        offsets: metres, the bounds of R rings of offsets (R + 1,).
        degrees_per_metre: the initial rotation error that goes with an offset.
        converged: shares (R,) that converge from each ring, by network.
        count: initial poses in each ring.
    """

    offsets: tuple[float, ...]
    degrees_per_metre: float
    converged: Mapping[str, tuple[float, ...]]
    count: int


@torch.no_grad()
def compare_localization(
    networks: Mapping[str, nn.Module],
    batches: Iterable[list[LocalizationBatch]],
    *,
    refiner: Refiner,
    starts: InitialPoses,
    conditions: Sequence[str],
    device: torch.device | str,
    title: str,
    settings: Mapping[str, Setting] | None = None,
) -> tuple[Table, Basin | None]:
    """Localize every query with every network, from the same initial poses.

    Args:
        networks: by the name that stands in the table; put into evaluation mode for it, and back.
        batches: the queries, as `DataModule.all_of` gives them; read once.
        refiner: settings of the refinement.
        starts: the initial poses.
        conditions: all conditions of the queries.
        device: where the networks run.
        title, settings: kept in the table.

    Returns:
        The table: on each condition the initial poses, then every network. And, where initial poses are
        perturbations of the true ones, what converges from rings of growing offset.
    """
    rings = _rings(starts)
    # Only one process compares, so nothing is gathered.
    new_metrics = partial(LocalizationMetrics, conditions=conditions, sync_on_compute=False)
    metrics = {name: [new_metrics() for _ in (starts, *rings)] for name in networks}
    with _evaluating(networks, device):
        for batch in chain.from_iterable(track(batches, description=f"Localizing with {len(networks)} networks")):
            batch = batch.to(device)
            for name, network in networks.items():
                query, reference = network(batch.query.image), network(batch.reference.image)
                for metric, initial in zip(metrics[name], (starts, *rings), strict=True):
                    metric.update(**localize_features(refiner, query, reference, batch, initial)._asdict())
    summaries = {name: of_network[0].compute() for name, of_network in metrics.items()}
    table = _localization_table(summaries, title, settings, tuple(_differences(metrics)))
    if not isinstance(starts, PerturbedPoses) or not rings:
        return table, None
    in_rings = {name: [m.compute().overall for m in of_network[1:]] for name, of_network in metrics.items()}
    return table, Basin(
        offsets=tuple(ring * starts.position for ring in RINGS),
        degrees_per_metre=starts.rotation / starts.position,
        converged={name: tuple(ring.final.converged for ring in found) for name, found in in_rings.items()},
        count=next(iter(in_rings.values()))[0].poses,
    )


def _localization_table(
    summaries: Mapping[str, LocalizationSummary],
    title: str,
    settings: Mapping[str, Setting] | None,
    notes: Sequence[str],
) -> Table:
    rows = []
    # Where there is one condition, "all" says the same.
    by_network = {name: [s.overall, *(s.conditions if len(s.conditions) > 1 else ())] for name, s in summaries.items()}
    for of_condition in zip(*by_network.values(), strict=True):
        first = of_condition[0]
        rows.append((INITIAL_POSES, first.condition, first.poses, first.initial))
        rows += [(name, s.condition, s.poses, s.final) for name, s in zip(by_network, of_condition, strict=True)]
    thresholds = next(iter(summaries.values())).thresholds
    return localization_table(title, thresholds, rows, settings=settings, notes=notes)


def _differences(metrics: Mapping[str, Sequence[LocalizationMetrics]]) -> Iterator[str]:
    """How the first network's poses differ from the initial poses and from each other network's."""
    (name, first), *others = ((name, of_network[0].position_errors()) for name, of_network in metrics.items())
    yield paired_difference(*first).describe(INITIAL_POSES, name)
    for other, errors in others:
        yield paired_difference(errors[1], first[1]).describe(other, name)


def _rings(starts: InitialPoses) -> list[PerturbedPoses]:
    """One initial pose a query in each ring, off by the ring's middle; position and rotation grow together."""
    if not isinstance(starts, PerturbedPoses) or not starts.position > 0:
        return []
    other = replace(starts, count=1, exact=True, seed=starts.seed + 1)
    middles = [(low + high) / 2 for low, high in pairwise(RINGS)]
    return [replace(other, position=m * starts.position, rotation=m * starts.rotation) for m in middles]


def compare_matching(
    networks: Mapping[str, nn.Module],
    pairs: Iterable[MatchingPair],
    *,
    conditions: Iterable[str],
    device: torch.device | str,
    title: str,
    sift: bool = True,
    settings: Mapping[str, Setting] | None = None,
) -> Table:
    """Match every pair with every network, and with SIFT.

    Args:
        networks: by the name that stands in the table; put into evaluation mode for it, and back.
        pairs: read once.
        conditions: all conditions of the pairs.
        device: where the networks run.
        sift: add rows of SIFT, and of SIFT whose descriptors are not turned into the gradient's direction, which is
            the stronger between images of a fixed camera.
        title, settings: kept in the table.
    """
    conditions = tuple(conditions)
    methods: dict[str, Callable[[MatchingPair], Matches]] = {
        name: partial(match_pair, network) for name, network in networks.items()
    }
    if sift:
        methods |= {"SIFT": match_pair_with_sift, "SIFT, upright": partial(match_pair_with_sift, upright=True)}
    # Only one process compares, so nothing is gathered.
    metrics = {name: MatchingMetrics(conditions=conditions, sync_on_compute=False) for name in methods}
    with _evaluating(networks, device):
        for index, pair in enumerate(track(pairs, description="Matching pairs")):
            for name, match in methods.items():
                metrics[name].update(match(pair), pair.keypoints_b, condition=pair.condition, index=index)
    summaries = {name: metric.compute() for name, metric in metrics.items()}
    return matching_table(title, THRESHOLDS, summaries, settings=settings)


def grey_values_like(network: nn.Module) -> GreyValues:
    """Raw grey values at the strides of a network's maps, as a baseline."""
    strides: Sequence[int] = network.strides  # type: ignore[assignment]  # nn.Module's attributes have no types
    return GreyValues(strides=sorted(set(strides), reverse=True))


@contextmanager
def _evaluating(networks: Mapping[str, nn.Module], device: torch.device | str) -> Iterator[None]:
    """Networks on `device` and in evaluation mode; at the end of the block they go back to the mode before it."""
    was_training = {name: network.training for name, network in networks.items()}
    for network in networks.values():
        network.eval().to(device)
    try:
        yield
    finally:
        for name, network in networks.items():
            network.train(was_training[name])
