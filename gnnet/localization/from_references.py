"""The pose of one query from several references: match their points, PnP in RANSAC, feature-metric refinement.

A group is a `LocalizationBatch` whose K rows hold one and the same query, each with another of its
references, all in one world. So there is no start pose, other than what the matches say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gnnet.data.batches import LocalizationBatch
from gnnet.data.sift import SiftFeatures, detect_sift, match_sift
from gnnet.geometry.pose import Pose
from gnnet.localization.localizer import Localizer
from gnnet.localization.matching import Matcher
from gnnet.localization.pnp import PnPResult, PoseSolver
from gnnet.localization.refinement import Refinement, refine_pose, sample_descriptors
from gnnet.models.pyramid import FeaturePyramid

NEAR_POINT = 3.0  # pixels within which a detection takes the depth of a known point


class LocalizedFromReferences(NamedTuple):
    """The pose that the matches give, and what refinement made of it (batch of one); None where there was no pose."""

    pnp: PnPResult
    refinement: Refinement | None


@torch.no_grad()
def localize_from_references(
    network: nn.Module,
    group: LocalizationBatch,
    *,
    localizer: Localizer,
    matcher: Matcher = Matcher(),  # noqa: B008, frozen values
    solver: PoseSolver = PoseSolver(),  # noqa: B008
) -> LocalizedFromReferences:
    """Localize the query of a group; the network runs once on it, and once on its references.

    Args:
        network: in evaluation mode, on the group's device.
        group: K rows of one query.
        localizer: settings of the refinement.
        matcher: of the matching.
        solver: of the pose from matches.

    Raises:
        ValueError: if the rows are not of one query and one world.
    """
    check_group(group)
    query, references = network(group.query.image[:1]), network(group.reference.image)
    in_reference = group.reference.cam_from_world.transform(group.points)
    keypoints, visible = group.reference.camera.project(in_reference)
    valid = group.valid & visible
    found = matcher.match(references, keypoints, query)
    kept = valid & found.kept & group.query.camera.contains(found.keypoints)
    pnp = solver.solve(found.keypoints[kept], group.points[kept], group.query.camera[0])
    if pnp.cam_from_world is None:
        return LocalizedFromReferences(pnp, None)
    descriptors, descriptor_valid = sample_descriptors(references, keypoints)
    refinement = _refine(query, descriptors, descriptor_valid, valid, group, pnp.cam_from_world, localizer)
    return LocalizedFromReferences(pnp, refinement)


def _refine(
    query: FeaturePyramid,
    descriptors: tuple[Tensor, ...],
    descriptor_valid: tuple[Tensor, ...],
    valid: Tensor,
    group: LocalizationBatch,
    initial: Pose,
    localizer: Localizer,
) -> Refinement:
    """Refinement of a batch of one on the points of all references together, (1, K·N)."""
    pose = initial.to(device=group.points.device, dtype=group.points.dtype)
    return refine_pose(
        pyramid=query,
        descriptors=tuple(d.flatten(0, 1)[None] for d in descriptors),
        descriptor_valid=tuple(v.flatten()[None] for v in descriptor_valid),
        points=group.points.flatten(0, 1)[None],
        valid=valid.flatten()[None],
        camera=group.query.camera[:1],
        initial=Pose(pose.rotation[None], pose.translation[None]),
        robust=localizer.robust,
        gradient=localizer.gradient,
        iterations=localizer.iterations,
        min_points=localizer.min_points,
    )


@torch.no_grad()
def localize_with_sift(
    group: LocalizationBatch,
    *,
    solver: PoseSolver = PoseSolver(),  # noqa: B008, a frozen value
    ratio: float = 0.8,
    detect: Callable[[Tensor], SiftFeatures] = detect_sift,
) -> PnPResult:
    """The pose of a group's query by SIFT matches and PnP, as structure-based localization has it by default.

    A reference's detection lies on its own ray, at the depth of the nearest known point, if that is
    within `NEAR_POINT` pixels of it; other detections are not used.

    Args:
        group: K rows of one query.
        solver: of the pose from matches.
        ratio: of Lowe's test.
        detect: features of an image (3, H, W) uint8 on the CPU.

    Raises:
        ValueError: if the rows are not of one query and one world.
    """
    check_group(group)
    group = group.to("cpu")
    query = detect(group.query.image[0])
    keypoints, points = [], []
    for row in range(len(group.points)):
        detections = detect(group.reference.image[row])
        found = match_sift(detections.descriptors, query.descriptors, ratio=ratio)
        at, known = _points_of_detections(detections.keypoints, group, row)
        used = found.kept & known
        keypoints.append(query.keypoints[found.nearest[used]])
        points.append(at[used])
    return solver.solve(torch.cat(keypoints), torch.cat(points), group.query.camera[0])


def _points_of_detections(detections: Tensor, group: LocalizationBatch, row: int) -> tuple[Tensor, Tensor]:
    """World points (M, 3) of detections (M, 2) in one reference, and which are known (M,)."""
    camera, pose = group.reference.camera[row], group.reference.cam_from_world[row]
    in_camera = pose.transform(group.points[row])
    xy, visible = camera.project(in_camera)
    shown = group.valid[row] & visible
    if not shown.any() or not len(detections):
        return detections.new_zeros(len(detections), 3), torch.zeros(len(detections), dtype=torch.bool)
    exact = "donot_use_mm_for_euclid_dist"
    nearest = [torch.cdist(part, xy[shown], compute_mode=exact).min(-1) for part in detections.split(1024)]
    distance, which = (torch.cat(column) for column in zip(*nearest, strict=True))
    depth = in_camera[shown][which, 2]
    points = pose.inverse().transform(camera.unproject(detections) * depth[:, None])
    # Padding beyond the reference's own image is no part of it.
    return points, (distance <= NEAR_POINT) & camera.contains(detections)


def check_group(group: LocalizationBatch) -> None:
    """Whether the rows are of one query in one world.

    Raises:
        ValueError: if not.
    """
    pose = group.query.cam_from_world
    one = (
        len(group.name) > 0
        and len(set(group.name)) == 1
        and (group.origin == group.origin[:1]).all()
        and (pose.translation == pose.translation[:1]).all()
    )
    if not one:
        raise ValueError(
            f"a group of {len(group.name)} rows of the queries {', '.join(sorted(set(group.name))) or 'none'}; "
            "expected rows of one query, with one origin"
        )
