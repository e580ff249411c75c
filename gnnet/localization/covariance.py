"""The part of a refined pose's covariance that its residuals cannot tell: errors that many points share.

What a lens model leaves, what references' poses are off, and what a viewpoint does to features moves all points of a
part of the image alike. The pose gives way to such a shift, so that little of it is left in the residuals, and
more points do not average it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gnnet.geometry.camera import Camera
from gnnet.geometry.interpolation import Gradient, sample, sample_with_gradient
from gnnet.geometry.pose import Pose
from gnnet.localization.robust import Robust

FINE, COARSE = 8, 2  # cells along the image's longer side: in which shifts are measured, and of what shares an error
# Shared error by the shifts that are left, fitted on 7-Scenes' kitchen (SfM poses): of 50 queries 92 %
# (sparse-to-dense) and 96 % (hybrid) of the true poses lie inside the 95 % ellipsoid. On facades, whose calibration
# is exact, 1.0 would do: all of 35 lie inside, and σ is 5 to 10 times too large.
SHARED = 5.0


class SharedTerms(NamedTuple):
    """What the N points of one image say of the errors that they share, see `shared_terms`.

    `jacobian` (N, 2, 6) of pixels by the pose's steps, `information` (N, 2, 2) and `pull` (N, 2) of a pixel's shift;
    `at` (N, 2) in the image, whose longer side is 1.
    """

    jacobian: Tensor
    information: Tensor
    pull: Tensor
    at: Tensor


def shared_terms(
    features: Tensor,
    stride: int,
    descriptors: Tensor,
    valid: Tensor,
    points: Tensor,
    camera: Camera,
    pose: Pose,
    robust: Robust,
    gradient: Gradient = "central",
    cam_from_rig: Pose | None = None,
    confidences: tuple[Tensor | None, Tensor | None] = (None, None),
) -> SharedTerms:
    """What the points of one image say of the errors that they share.

    Args:
        features: (1, C, H, W) of the query, the finest level that was refined on.
        stride: of this level.
        descriptors: (N, C) of the points.
        valid: (N,) which of them to use.
        points: (N, 3) in the world.
        camera, pose: of the image, unbatched.
        robust: cost of a residual.
        gradient: how gradients of the features are taken.
        cam_from_rig: of the image's camera, if the covariance is to be of the rig's pose.
        confidences: the query's map (1, 1, H, W) and the points' own (N,); None where all are one.
    """
    points_cam = pose.transform(points)
    xy, projection, in_view = camera.project_with_jacobian(points_cam)
    values, slopes, in_map = sample_with_gradient(features.float(), (xy / stride).float()[None], gradient)
    residual, slopes = (values[0] - descriptors).double(), slopes[0].double().mT / stride  # [N, 2, C] a pixel
    usable = valid & in_view & in_map[0] & residual.isfinite().all(-1) & slopes.isfinite().flatten(1).all(-1)
    residual, slopes, xy = residual[usable], slopes[usable], xy[usable].double()
    turned = torch.linalg.cross(points_cam[:, None].expand_as(projection), projection)
    jacobian = torch.cat([projection, turned], -1)[usable].double()  # [N, 2, 6]
    weight = robust.cost_and_weight(residual.square().sum(-1))[1]
    if confidences[0] is not None:
        weight = weight * sample(confidences[0], (xy / stride).to(confidences[0])[None])[0][0, :, 0]
    if confidences[1] is not None:
        weight = weight * confidences[1][usable]
    weight = weight[:, None, None]
    information = weight * (slopes @ slopes.mT)  # [N, 2, 2]
    pull = weight * (slopes @ residual[..., None])  # [N, 2, 1]
    if cam_from_rig is not None:
        jacobian = jacobian @ cam_from_rig.adjoint().to(jacobian)
    return SharedTerms(jacobian, information, pull, xy / camera.size.max())


def shared_covariance(images: Sequence[SharedTerms]) -> Tensor:
    """Covariance (6, 6) from errors that all points of a quarter of an image share.

    Each quarter (squares of half the image's longer side) is thought to be off by some pixels of its own, which
    moves the pose by H⁻¹ Σ_{its points} w Jᵀ ∂F/∂xy. How many pixels is told by the shifts that the features still
    ask for at the pose, in squares of an eighth of the longer side, times `SHARED`. Matches that take part in the
    cost beside the features are thought to share these errors.

    Args:
        images: one, or those of a rig.

    Returns:
        Of (translation in metres, rotation in radians), on the left of the pose as in `Refinement`, float64 on the CPU;
        inf where the features do not fix the pose.
    """
    # One image lies below the other, so that no two share a cell.
    apart = [terms._replace(at=terms.at + terms.at.new_tensor([0, 2 * i])) for i, terms in enumerate(images)]
    return _from_cells(*map(torch.cat, zip(*apart, strict=True))).cpu()


def _from_cells(jacobian: Tensor, information: Tensor, pull: Tensor, at: Tensor) -> Tensor:
    moved = jacobian.mT @ information  # [N, 6, 2]
    hessian = (moved @ jacobian).sum(0)
    scale = hessian.diagonal().clamp(min=torch.finfo(hessian.dtype).tiny).rsqrt()  # metres and radians on one footing
    factor, info = torch.linalg.cholesky_ex(hessian * scale[:, None] * scale)
    # A pivot is the share of a column of J that no other column explains; at the features' rounding it is none.
    if info > 0 or factor.diagonal().square().min() < 10 * torch.finfo(torch.float32).eps:
        return torch.full_like(hessian, torch.inf)
    of_cell, pulls = _by_cell(at, FINE, information, pull)
    trace = of_cell.diagonal(dim1=-2, dim2=-1).sum(-1)
    flat = 1e-6 * trace.max() * torch.eye(2, dtype=trace.dtype, device=trace.device)
    shifts = torch.linalg.solve(of_cell + flat, pulls).squeeze(-1)
    variance = SHARED**2 * (trace * shifts.square().mean(-1)).sum() / trace.sum()
    (of_quarter,) = _by_cell(at, COARSE, moved)
    gain = scale[:, None] * torch.cholesky_solve(scale[:, None] * of_quarter, factor)  # [Q, 6, 2]
    return variance * (gain @ gain.mT).sum(0)


def _by_cell(at: Tensor, cells: int, *values: Tensor) -> list[Tensor]:
    """Sums (K, ...) of values (N, ...) over the points of each cell."""
    column, row = (at * cells).long().unbind(-1)
    found, cell = (row * (cells + 1) + column).unique(return_inverse=True)
    return [v.new_zeros(len(found), *v.shape[1:]).index_add(0, cell, v) for v in values]
