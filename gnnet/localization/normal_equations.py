"""Normal equations of feature-metric alignment at a pose, without the Jacobian of the channels.

The residual of a point X with descriptor f is r = F(π(cam_from_world · X)) − f, with F the query's map.
With the update on the left, cam_from_world ← exp(δ) cam_from_world and δ = (translation, rotation),

    J = ∂F/∂xy (C×2) · J_p,  J_p = ∂xy/∂X_cam (2×3) · [I | −[X_cam]×] (3×6).

Where a network gives confidences, each point has one more weight, c = the reference's × the query's at π: then
H = Σ c w JᵀJ and g = Σ c w Jᵀr. c is held fixed within a step, as the robust weight w is: the cost that a step lowers
is Σ c ρ with c as it was before the step, so that moving to cells of small confidence lowers nothing.

J (C×6) is never formed: all that H = Σ w JᵀJ and g = Σ w Jᵀr need of the C channels are the products of
the three vectors r, ∂F/∂x and ∂F/∂y with each other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from gnnet.geometry.camera import Camera
from gnnet.geometry.interpolation import Gradient, sample, sample_stacked
from gnnet.geometry.pose import Pose
from gnnet.localization.robust import Robust

# Values gathered from a map at once: on a CPU what its cache holds, on a GPU what its memory can spare.
_VALUES_AT_ONCE = {"cpu": 1 << 20}  # what the caches hold; other devices work on more at once
_CELLS = 12  # that one point gathers, about


@dataclass(frozen=True)
class MatchTerm:
    """Matches of 3D points with the query's pixels, which take part in the cost beside the features.

    Each adds w·ρ(‖π(cam_from_world · X) − x‖²).

    Args:
        points: (B, M, 3) in the world.
        keypoints: (B, M, 2) x, pixels of the queries' images.
        weight: (B, M) w, squared feature residual that one squared pixel is worth; 0 for padding.
        robust: ρ, of squared pixels.
    """

    points: Tensor
    keypoints: Tensor
    weight: Tensor
    robust: Robust

    def __getitem__(self, keep: Tensor) -> MatchTerm:
        """The elements `keep` of the batch."""
        return replace(self, points=self.points[keep], keypoints=self.keypoints[keep], weight=self.weight[keep])


@dataclass(frozen=True)
class Level:
    """One level of the problem, for those elements of the batch that are still at work.

    `usable`, `flat`, `points` and `camera` are of these elements only; `features` and `descriptors` stay
    whole, as copying them costs more than a step, and `rows` says which of their rows each element has.
    A squared derivative of a point's features below `flat` (B, N) is rounding, and counts as zero.
    `confidences` are the query's map (B or 1, 1, H, W) and the points' own (B, N); None where all are one.
    """

    features: Tensor
    stride: int
    descriptors: Tensor
    usable: Tensor
    flat: Tensor
    points: Tensor
    camera: Camera
    robust: Robust
    gradient: Gradient
    rows: tuple[int, ...]
    matches: MatchTerm | None = None
    confidences: tuple[Tensor | None, Tensor | None] = None, None

    @classmethod
    def prepare(
        cls, features, stride, descriptors, usable, points, camera, robust, gradient, matches=None,
        confidences=(None, None),
    ) -> Level:  # fmt: skip
        """A level of a whole batch; descriptors that are not finite are masked, an expanded map is kept once."""
        query, reference = confidences
        features = features[:1] if features.stride(0) == 0 else features  # expanded: one map for all
        rows = tuple(range(points.shape[0]))
        wide = torch.promote_types(features.dtype, torch.float32)
        norms = torch.linalg.vector_norm(descriptors.detach(), dim=-1, dtype=wide)
        finite = norms.isfinite()
        if torch.is_grad_enabled():  # forwards, masking the residual is enough
            descriptors = torch.where(finite[..., None], descriptors, 0)
        flat = (4 * torch.finfo(features.dtype).eps * norms).square()
        usable = usable & finite
        return cls(
            features, stride, descriptors, usable, flat, points, camera, robust, gradient, rows, matches,
            (query if query is None else query[: len(features)], reference),
        )  # fmt: skip

    @property
    def channels(self) -> int:
        """Length of a descriptor."""
        return self.descriptors.shape[-1]

    def select(self, keep: Tensor, rows: tuple[int, ...]) -> Level:
        """The elements `keep` of those at work, whose rows are `rows`."""
        query, reference = self.confidences
        return replace(
            self, usable=self.usable[keep], flat=self.flat[keep], points=self.points[keep],
            camera=self.camera[keep], rows=rows, matches=None if self.matches is None else self.matches[keep],
            confidences=(
                query if query is None or len(query) == 1 else query[keep],
                None if reference is None else reference[keep],
            ),
        )  # fmt: skip


@dataclass(frozen=True)
class RigLevel:
    """One level of a problem with several images for each pose, which is that of the rig of their cameras.

    Args:
        views: one level for each of V images, of the same elements.
        cam_from_rig: (V,) poses of the cameras.
    """

    views: tuple[Level, ...]
    cam_from_rig: Pose

    @property
    def rows(self) -> tuple[int, ...]:
        return self.views[0].rows

    @property
    def channels(self) -> int:
        return self.views[0].channels

    def select(self, keep: Tensor, rows: tuple[int, ...]) -> RigLevel:
        return replace(self, views=tuple(view.select(keep, rows) for view in self.views))


class NormalEquations(NamedTuple):
    """The normal equations at a pose, of the points valid there, and of the matches behind them, if there are any.

    rotation (B, 3, 3), translation (B, 3); points in cells of the level, xy (B, N + M, 2); ρ (B, N + M), zero where
    not valid (B, N + M); confidence c (B, N + M); H = Σ c w JᵀJ (B, 6, 6) and g = Σ c w Jᵀr (B, 6); Σ c w ‖r‖² (B,)
    and Σ w (B,), so that σ² = Σ c w ‖r‖² / (C Σ w) and the covariance σ² H⁻¹ does not depend on the scale of c; the
    mean distance of the points from the camera (B,).
    """

    rotation: Tensor
    translation: Tensor
    xy: Tensor
    cost: Tensor
    valid: Tensor
    confidence: Tensor
    hessian: Tensor
    gradient: Tensor
    weighted_square: Tensor
    weight: Tensor
    distance: Tensor

    @property
    def pose(self) -> Pose:
        """`cam_from_world` (B,)."""
        return Pose(self.rotation, self.translation)


def linearise(level: Level | RigLevel, pose: Pose) -> NormalEquations:
    """Robust cost and normal equations at `pose` of the elements at work."""
    if isinstance(level, RigLevel):
        return _of_rig(level, pose)
    points_cam = pose.transform(level.points)
    xy, projection, in_view = level.camera.project_with_jacobian(points_cam)
    xy = xy / level.stride
    products, in_map = _products(level, xy)
    valid = level.usable & in_view & in_map & products.isfinite().all(-1).all(-1)
    products = torch.where(valid[..., None, None], products, 0).to(pose.dtype)
    # A row j of ∂xy/∂X_cam times [I | −[X]×] is (j, X × j).
    turned = torch.linalg.cross(points_cam[..., None, :].expand_as(projection), projection)
    jacobian = torch.cat([projection, turned], -1) / level.stride  # [B, N, 2, 6] level pixels a metre and a radian
    slopes = products.diagonal(dim1=-2, dim2=-1)[..., 1:] > level.flat[..., None]  # zero where not valid
    jacobian = torch.where(slopes[..., None], jacobian, 0)
    cost, weight = level.robust.cost_and_weight(products[..., 0, 0])
    weight = torch.where(valid, weight, 0)
    confidence = torch.where(valid, _confidence(level, xy), 1)
    products = products * (weight * confidence)[..., None, None]
    # H = Σ J_pᵀ A J_p and g = Σ J_pᵀ b, with w J_FᵀJ_F = A and w J_Fᵀr = b, in one product over points.
    bent = (products[..., 1:, 1:, None] * jacobian[..., None, :, :]).sum(-2)  # A J_p; a bmm of 2×2s is slower
    right = torch.cat([bent, products[..., 1:, :1]], -1)  # [B, N, 2, 7]
    normal = jacobian.flatten(1, 2).transpose(1, 2) @ right.flatten(1, 2)  # [B, 6, 7]
    equations = NormalEquations(
        pose.rotation, pose.translation, xy, torch.where(valid, cost, 0), valid, confidence,
        normal[..., :6], normal[..., 6], products[..., 0, 0].sum(-1), weight.sum(-1),
        (points_cam.norm(dim=-1) * valid).sum(-1) / valid.sum(-1).clamp(min=1),
    )  # fmt: skip
    return equations if level.matches is None else _with_matches(equations, level.matches, level, pose)


def _with_matches(equations: NormalEquations, matches: MatchTerm, level: Level, pose: Pose) -> NormalEquations:
    """The normal equations with the matches' reprojection errors added to those of the features.

    A match has the points' mean confidence, so that the scale of confidences changes nothing here either.
    """
    points_cam = pose.transform(matches.points)
    xy, projection, in_view = level.camera.project_with_jacobian(points_cam)
    residual = xy - matches.keypoints
    squared = residual.square().sum(-1)
    valid = in_view & (matches.weight > 0) & squared.isfinite()
    cost, weight = matches.robust.cost_and_weight(torch.where(valid, squared, 0))
    counted = equations.valid.sum(-1, keepdim=True)
    trusted = (equations.confidence * equations.valid).sum(-1, keepdim=True) / counted.clamp(min=1)
    trusted = torch.where(counted > 0, trusted, 1)
    weight = torch.where(valid, weight * matches.weight * trusted, 0)
    residual = torch.where(valid[..., None], residual, 0)
    turned = torch.linalg.cross(points_cam[..., None, :].expand_as(projection), projection)
    jacobian = torch.where(valid[..., None, None], torch.cat([projection, turned], -1), 0)
    right = weight[..., None, None] * torch.cat([jacobian, residual[..., None]], -1)
    normal = jacobian.flatten(1, 2).transpose(1, 2) @ right.flatten(1, 2)
    return equations._replace(
        xy=torch.cat([equations.xy, xy / level.stride], 1),
        cost=torch.cat([equations.cost, torch.where(valid, cost * matches.weight, 0)], 1),
        valid=torch.cat([equations.valid, valid], 1),
        confidence=torch.cat([equations.confidence, trusted.expand_as(weight)], 1),
        hessian=equations.hessian + normal[..., :6],
        gradient=equations.gradient + normal[..., 6],
        weighted_square=equations.weighted_square + (weight * squared).where(valid, 0).sum(-1),
    )


def _of_rig(level: RigLevel, rig_from_world: Pose) -> NormalEquations:
    """The normal equations of all images together, with points one image after another.

    A step δ of the rig moves a camera by Ad δ, with Ad the adjoint of `cam_from_rig`: H = Σ Adᵀ H_cam Ad.
    """
    cameras = map(level.cam_from_rig.__getitem__, range(len(level.views)))
    parts = [linearise(view, cam @ rig_from_world) for view, cam in zip(level.views, cameras, strict=True)]
    adjoints = level.cam_from_rig.adjoint()
    counts = torch.stack([part.valid.sum(-1) for part in parts])
    distance = (torch.stack([part.distance for part in parts]) * counts).sum(0) / counts.sum(0).clamp(min=1)
    names = ("xy", "cost", "valid", "confidence")
    xy, cost, valid, confidence = (torch.cat([getattr(part, name) for part in parts], 1) for name in names)
    return NormalEquations(
        rig_from_world.rotation, rig_from_world.translation, xy, cost, valid, confidence,
        torch.stack([ad.mT @ part.hessian @ ad for ad, part in zip(adjoints, parts, strict=True)]).sum(0),
        torch.stack([part.gradient @ ad for ad, part in zip(adjoints, parts, strict=True)]).sum(0),
        torch.stack([part.weighted_square for part in parts]).sum(0),
        torch.stack([part.weight for part in parts]).sum(0), distance,
    )  # fmt: skip


def _confidence(level: Level, xy: Tensor) -> Tensor:
    """Confidence (B, N) of the points at `xy` in the query's map, times their own; one where there is none."""
    query, reference = level.confidences
    found = xy.new_ones(xy.shape[:2]) if reference is None else reference.to(xy.dtype)
    if query is None:
        return found
    return found * sample(query, xy.reshape(len(query), -1, 2))[0].view(xy.shape[:2]).to(xy.dtype)


def _products(level: Level, xy: Tensor) -> tuple[Tensor, Tensor]:
    """Products over channels (B, N, 3, 3) of r, ∂F/∂x and ∂F/∂y with each other, and validity (B, N).

    The channels stay in the cache: a few points, or a few elements, at a time.
    """
    count, channels = xy.shape[1], level.features.shape[1]
    at_once = max(1, _VALUES_AT_ONCE.get(xy.device.type, 1 << 28) // (_CELLS * channels))
    shared = level.features.shape[0] == 1
    products, valid = [], []
    for first, last in _runs(level.rows, max(1, at_once // max(1, count))):
        rows = slice(level.rows[first], level.rows[first] + last - first)
        features, descriptors, here = level.features[rows], level.descriptors[rows], xy[first:last]
        if shared:
            features, descriptors, here = level.features, descriptors.flatten(0, 1)[None], here.flatten(0, 1)[None]
        for d, p in zip(descriptors.split(at_once, 1), here.split(at_once, 1), strict=True):
            stacked, in_map = sample_stacked(features, p, level.gradient)  # [b, n, 3, C] F, ∂F/∂x, ∂F/∂y
            stacked = stacked.to(torch.promote_types(stacked.dtype, torch.float32))
            stacked[..., 0, :] -= d  # in place: the row of values becomes the residual
            products.append((stacked @ stacked.transpose(-1, -2)).view(-1, 3, 3))
            valid.append(in_map.view(-1))
    return torch.cat(products).view(*xy.shape[:2], 3, 3), torch.cat(valid).view(xy.shape[:2])


def _runs(rows: tuple[int, ...], longest: int) -> list[tuple[int, int]]:
    """Ranges [first, last) of positions whose rows follow one another, at most `longest` each."""
    runs: list[tuple[int, int]] = []
    for i, row in enumerate(rows):
        if runs and row == rows[i - 1] + 1 and i - runs[-1][0] < longest:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs
