"""What is kept of localizations: a record for each query, and the table of all."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch

from gnnet.evaluation.metrics import (
    INSIDE,
    Thresholds,
    errors_of,
    paired_difference,
    squared_mahalanobis,
    summarize_errors,
)
from gnnet.evaluation.tables import Table, localization_table
from gnnet.geometry.pose import Pose
from gnnet.localization.localizer import Localizer
from gnnet.localization.refinement import RefinementStatus
from gnnet.localization.result import Localization, Status
from gnnet.scenes.scene import SceneImage


def to_record(result: Localization, truth: Pose | None = None) -> dict:
    """A localization as plain values for JSON: poses as quaternion (w, x, y, z) and translation; errors if known."""

    def pose(value: Pose | None) -> dict | None:
        if value is None:
            return None
        return {"quaternion": value.quaternion().tolist(), "translation": value.translation.tolist()}

    def number(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    record = {
        "name": result.name,
        "condition": result.condition,
        "status": str(result.status),
        "reason": result.reason,
        "cam_from_world": pose(result.cam_from_world),
        "initial": pose(result.initial),
        "refined": result.refined,
        "references": list(result.references),
        "matches": result.matches,
        "inliers": result.inliers,
        "initial_cost": number(result.initial_cost),
        "final_cost": number(result.final_cost),
        "focal_length": None if result.camera is None else float(result.camera.parameters[0]),
        "covariance": None,
        "seconds": {stage: round(seconds, 6) for stage, seconds in result.seconds.items()},
    }
    if result.covariance is not None and result.covariance.isfinite().all():
        record["covariance"] = result.covariance.tolist()
    if truth is not None:
        for key, value in (("error", result.cam_from_world), ("initial_error", result.initial)):
            position, rotation = errors_of(value, truth)
            record[key] = {"position_m": number(position), "rotation_deg": number(rotation)}
    return record


def make_localization_report(
    localizer: Localizer,
    localizations: Sequence[Localization],
    queries: Sequence[SceneImage],
    *,
    title: str,
    thresholds: Thresholds,
    settings: Mapping,
) -> Table:
    """The table: for each condition the nearest reference, the pose before refinement, and the pose after it.

    Queries without a known pose are left out; those that failed count with infinite errors.
    """
    pairs = zip(localizations, queries, strict=True)
    known = [(r, q.condition, q.cam_from_world) for r, q in pairs if q.cam_from_world is not None]
    methods = {"nearest": [errors_of(_nearest(localizer, r), truth) for r, _, truth in known]}
    methods[localizer.pose.name] = [errors_of(r.initial, truth) for r, _, truth in known]
    if localizer.refiner is not None:
        methods["refined"] = [errors_of(r.cam_from_world, truth) for r, _, truth in known]
    present = sorted({condition for _, condition, _ in known})
    rows = []
    for condition in ("all", *(present if len(present) > 1 else ())) if known else ():
        chosen = [i for i, (_, own, _) in enumerate(known) if condition in ("all", own)]
        for method, errors in methods.items():
            position, rotation = torch.tensor([errors[i] for i in chosen], dtype=torch.float64).unbind(-1)
            summary = summarize_errors(position, rotation, thresholds=thresholds)
            rows.append((method, condition, len(chosen), summary))
    notes = list(_notes(localizer, localizations))
    if "refined" in methods and known:
        before, after = (torch.tensor(methods[m], dtype=torch.float64)[:, 0] for m in (localizer.pose.name, "refined"))
        notes.insert(0, paired_difference(before, after).describe(localizer.pose.name, "refined"))
    lengths = [
        squared_mahalanobis(r.cam_from_world, query.cam_from_world, r.covariance).item()
        for r, query in zip(localizations, queries, strict=True)
        if r.cam_from_world is not None and query.cam_from_world is not None and r.covariance is not None
        and r.covariance.isfinite().all()
    ]  # fmt: skip
    if lengths:
        inside = 100 * sum(length <= INSIDE for length in lengths) / len(lengths)
        notes.append(f"covariance: {inside:.0f} % of {len(lengths)} true poses lie inside its 95 % ellipsoid")
    return localization_table(title, thresholds, rows, settings=dict(settings), notes=tuple(notes))


def _nearest(localizer: Localizer, result: Localization) -> Pose | None:
    if not result.references:
        return None
    return localizer.map.poses[localizer.map.rows[result.references[0]]]


def _ending(result: Localization) -> str:
    """Why a pose is not a refined one; empty if it is."""
    if result.refined:
        return ""
    match result.ended:
        case None:
            return "not refined"
        case RefinementStatus.ITERATION_LIMIT:
            return "ended at the iteration limit"
        case RefinementStatus.CONVERGED_STEP | RefinementStatus.CONVERGED_GRADIENT:
            return "lost against the pose before"
        case _:
            return "failed"


def _notes(localizer: Localizer, localizations: Sequence[Localization]) -> Iterator[str]:
    localized = [r for r in localizations if r.status == Status.LOCALIZED]
    yield f"{len(localized)} of {len(localizations)} queries localized"
    failed = Counter(str(r.status) for r in localizations if r.status != Status.LOCALIZED)
    if failed:
        yield "not localized: " + ", ".join(f"{count} {status}" for status, count in failed.most_common())
    if localizer.refiner is not None and localized:
        ended = Counter(_ending(r) for r in localized)
        kept = ended.pop("", 0)
        others = "".join(f"; {count} {why}" for why, count in ended.most_common())
        stands = ": there the pose before it stands" if others else ""
        yield f"refinement kept for {kept} of {len(localized)}{others}{stands}"
    stages = {stage for r in localized for stage in r.seconds}
    if stages:
        means = {s: sum(r.seconds.get(s, 0) for r in localized) / len(localized) for s in sorted(stages)}
        yield "seconds a query: " + ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in means.items())
