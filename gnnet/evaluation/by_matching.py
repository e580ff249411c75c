"""Localization from several references by matching, PnP and refinement: networks, grey values and SIFT in one table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn

from gnnet.data.batches import LocalizationBatch
from gnnet.data.sift import SiftFeatures, detect_sift
from gnnet.evaluation.metrics import INDOOR, Thresholds, summarize_errors
from gnnet.evaluation.protocol import refined_errors
from gnnet.evaluation.report import Line, Report, Setting
from gnnet.geometry.pose import pose_errors
from gnnet.localization.from_references import localize_from_references, localize_with_sift
from gnnet.localization.localizer import Localizer
from gnnet.localization.matching import Matcher
from gnnet.localization.pnp import PnPResult, PoseSolver

FAILED = (float("inf"), float("inf"))


class LocalizedByMatching(NamedTuple):
    """Errors (metres, degrees) of one query: by PnP, and after refinement; infinite where it failed.

    `refined_errors` is None where nothing refines; `inliers` are PnP's, and `reason` says what came of it.
    """

    pnp_errors: tuple[float, float]
    refined_errors: tuple[float, float] | None
    inliers: int
    reason: str


def localize_by_matching(
    network: nn.Module,
    localizer: Localizer,
    group: LocalizationBatch,
    *,
    matcher: Matcher = Matcher(),  # noqa: B008, frozen values
    solver: PoseSolver = PoseSolver(),  # noqa: B008
) -> LocalizedByMatching:
    """Localize the query of a group of references with a network, see `localize_from_references`.

    Raises:
        ValueError: if the rows are not of one query and one world.
    """
    localized = localize_from_references(network, group, localizer=localizer, matcher=matcher, solver=solver)
    found = _of_pnp(localized.pnp, group)
    if localized.refinement is None:
        return found._replace(refined_errors=FAILED)
    errors = refined_errors(localized.refinement, group.query.cam_from_world[:1])
    reason = f"{found.reason}; {localized.refinement.reason(0)}"
    return found._replace(refined_errors=tuple(e.item() for e in errors), reason=reason)


def localize_by_sift(
    group: LocalizationBatch,
    *,
    solver: PoseSolver = PoseSolver(),  # noqa: B008, a frozen value
    detect: Callable[[Tensor], SiftFeatures] = detect_sift,
) -> LocalizedByMatching:
    """Localize the query of a group of references with SIFT and PnP, see `localize_with_sift`."""
    return _of_pnp(localize_with_sift(group, solver=solver, detect=detect), group)


def compare_by_matching(
    networks: Mapping[str, nn.Module],
    groups: Iterable[LocalizationBatch],
    *,
    localizer: Localizer,
    title: str,
    device: torch.device | str,
    matcher: Matcher = Matcher(),  # noqa: B008, frozen values
    solver: PoseSolver = PoseSolver(),  # noqa: B008
    sift: bool = True,
    thresholds: Thresholds = INDOOR,
    settings: Mapping[str, Setting] | None = None,
) -> Report:
    """Localize every query from its references: lines of SIFT, and of every network before and after refinement.

    Networks are put into evaluation mode for it, and back.

    Args:
        networks: by the name that stands in the table.
        groups: of references, one a query; read once.
        localizer, matcher, solver: settings of refinement, matching, and pose from matches.
        title: of the report.
        device: where to run.
        sift: add the line of SIFT.
        thresholds: (metres, degrees) of each recall.
        settings: to stand in the report.

    Raises:
        ValueError: if there is no group.
    """
    detect = _remembering(detect_sift)
    conditions: list[str] = []
    errors: dict[str, list[tuple[float, float]]] = {}
    was_training = {name: network.training for name, network in networks.items()}
    for network in networks.values():
        network.eval().to(device)
    for group in track(groups, description="Localizing by matching", transient=True):
        conditions.append(group.condition[0])
        if sift:
            errors.setdefault("SIFT + PnP", []).append(localize_by_sift(group, solver=solver, detect=detect).pnp_errors)
        group = group.to(device)
        for name, network in networks.items():
            found = localize_by_matching(network, localizer, group, matcher=matcher, solver=solver)
            errors.setdefault(f"{name} + PnP", []).append(found.pnp_errors)
            errors.setdefault(f"{name} + PnP + refinement", []).append(found.refined_errors)
    for name, network in networks.items():
        network.train(was_training[name])
    if not conditions:
        raise ValueError("no query with references to localize by matching")
    present = sorted(set(conditions))
    lines = []
    for condition in ("all", *(present if len(present) > 1 else ())):
        rows = [i for i, name in enumerate(conditions) if condition in ("all", name)]
        lines += [_line(method, condition, [of[i] for i in rows], thresholds) for method, of in errors.items()]
    failures = {method: sum(e == FAILED for e in of) for method, of in errors.items()}
    notes = tuple(f"{method}: {n} of {len(conditions)} queries failed" for method, n in failures.items() if n)
    return Report(title=title, thresholds=thresholds, lines=tuple(lines), settings=dict(settings or {}), notes=notes)


def _remembering(detect: Callable[[Tensor], SiftFeatures]) -> Callable[[Tensor], SiftFeatures]:
    """`detect`, which does not do the last images again: neighbouring queries share references."""

    @lru_cache(maxsize=64)
    def of_bytes(data: bytes, shape: torch.Size) -> SiftFeatures:
        return detect(torch.frombuffer(bytearray(data), dtype=torch.uint8).view(shape))

    return lambda image: of_bytes(image.cpu().numpy().tobytes(), image.shape)


def _of_pnp(pnp: PnPResult, group: LocalizationBatch) -> LocalizedByMatching:
    errors = FAILED
    if pnp.cam_from_world is not None:
        truth = group.query.cam_from_world[0].to(device="cpu")
        errors = tuple(e.item() for e in pose_errors(pnp.cam_from_world, truth))
    return LocalizedByMatching(errors, None, int(pnp.inliers.sum()), pnp.reason)


def _line(method: str, condition: str, errors: list[tuple[float, float]], thresholds: Thresholds) -> Line:
    position, rotation = torch.tensor(errors, dtype=torch.float64).unbind(-1)
    summary = summarize_errors(position, rotation, thresholds=thresholds)
    return Line(
        method=method,
        condition=condition,
        count=len(errors),
        median_position_m=summary.median_position,
        median_rotation_deg=summary.median_rotation,
        recall=summary.recall,
        converged=summary.converged,
    )
