"""Feature-metric pose refinement: the pose at which the query's features look like the reference's.

For each query, min over cam_from_world of Σ_i c_i ρ(‖F(π(cam_from_world · X_i)) − f_i‖²), where F is the
query's map, X_i are 3D points, f_i the descriptors that the reference image has of them, and c_i is the confidence in
both, one for networks that give none
("Feature-PnP"; von Stumberg et al., "GN-Net", RA-L 2020; Sarlin et al., "Back to the feature", CVPR 2021).
Levenberg-Marquardt per batch element, from the coarsest level to the finest, on the normal equations of
`normal_equations.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from gnnet.geometry.camera import Camera
from gnnet.geometry.interpolation import Gradient, sample
from gnnet.geometry.pose import Pose
from gnnet.localization.normal_equations import Level, MatchTerm, NormalEquations, RigLevel, linearise
from gnnet.localization.robust import Robust
from gnnet.models.pyramid import FeaturePyramid

MIN_DAMPING, MAX_DAMPING = 1e-6, 1e2
NEAR_CELLS = 0.5  # root mean square step of the points, in cells, within which a smaller gradient is progress


class RefinementStatus(IntEnum):
    """Why the refinement of one batch element ended."""

    CONVERGED_STEP = 0
    CONVERGED_GRADIENT = 1
    DAMPING_AT_MAXIMUM = 2
    ITERATION_LIMIT = 3
    TOO_FEW_POINTS = 4
    SINGULAR = 5


@dataclass(frozen=True)
class Refinement:
    """Refined poses of a batch and how each was found. Values are of the finest level, if not said otherwise.

    Args:
        cam_from_world: (B,) refined poses; the initial pose if there were too few points.
        status: (B,) int64, a `RefinementStatus` each.
        initial_cost: (B,) mean ρ(‖r‖²) at the initial pose over the points valid at both poses, weighted by the
            confidence that they have at the refined pose; inf if none is valid.
        final_cost: (B,) the same at the refined pose.
        cost_noise: (B,) standard error of their difference, the points' costs taken as independent.
        iterations: (B,) steps tried, taken or not, over all levels.
        valid_count: (B,) points valid at the refined pose (if too few: at the pose that had too few).
        covariance: (B, 6, 6) of δ = (translation in metres, rotation in radians) in
            cam_from_world_true = exp(δ) cam_from_world: σ² H⁻¹ with H = Σ c w JᵀJ, the robust weights w and
            confidences c, and σ² = Σ c w ‖r‖² / (C Σ w − 6) the variance of one channel of a residual where c = 1.
            It assumes that the errors of channels and points are independent. inf where H is singular. Carries no
            gradient.
        min_points: limit of valid points below which an element fails.
    """

    cam_from_world: Pose
    status: Tensor
    initial_cost: Tensor
    final_cost: Tensor
    cost_noise: Tensor
    iterations: Tensor
    valid_count: Tensor
    covariance: Tensor
    min_points: int

    @property
    def converged(self) -> Tensor:
        """(B,) whether the step or the gradient became small."""
        return self.status <= RefinementStatus.CONVERGED_GRADIENT

    def reason(self, i: int) -> str:
        """Why element `i` ended as it did, in words; waits for the device."""
        iterations = f"{int(self.iterations[i])} iterations"
        match RefinementStatus(int(self.status[i])):
            case RefinementStatus.CONVERGED_STEP:
                return f"converged: step below tolerance after {iterations}"
            case RefinementStatus.CONVERGED_GRADIENT:
                return f"converged: gradient below tolerance after {iterations}"
            case RefinementStatus.DAMPING_AT_MAXIMUM:
                return f"no step lowers the cost, after {iterations}"
            case RefinementStatus.ITERATION_LIMIT:
                return f"not converged within the limit, {iterations}"
            case RefinementStatus.TOO_FEW_POINTS:
                return f"{int(self.valid_count[i])} valid points, {self.min_points} needed"
            case RefinementStatus.SINGULAR:
                return "the features at the points do not fix all six degrees of freedom"


def sample_descriptors(pyramid: FeaturePyramid, keypoints: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Descriptors (B, N, C_l) at keypoints (B, N, 2) in image pixels, and validity (B, N), for each level."""
    samples = [
        sample(features, keypoints / stride) for features, stride in zip(pyramid.maps, pyramid.strides, strict=True)
    ]
    return tuple(d for d, _ in samples), tuple(v for _, v in samples)


def sample_confidences(pyramid: FeaturePyramid, keypoints: Tensor) -> tuple[Tensor, ...] | None:
    """Confidences (B, N) at keypoints (B, N, 2) in image pixels for each level; None if the pyramid has none."""
    if pyramid.confidences is None:
        return None
    sampled, _ = sample_descriptors(FeaturePyramid(pyramid.confidences, pyramid.strides), keypoints)
    return tuple(level.squeeze(-1) for level in sampled)


class View(NamedTuple):
    """What one image of each of B queries adds to the cost, see `refine_pose` for the arguments of the same names.

    Args:
        cam_from_rig: pose of the image's camera relative to what is refined, unbatched; None: they are the same.
    """

    pyramid: FeaturePyramid
    descriptors: tuple[Tensor, ...]
    descriptor_valid: tuple[Tensor, ...]
    points: Tensor
    valid: Tensor
    camera: Camera
    matches: MatchTerm | None = None
    cam_from_rig: Pose | None = None
    confidences: tuple[Tensor, ...] | None = None


def refine_pose(
    *,
    pyramid: FeaturePyramid,
    descriptors: tuple[Tensor, ...],
    descriptor_valid: tuple[Tensor, ...],
    points: Tensor,
    valid: Tensor,
    camera: Camera,
    initial: Pose,
    confidences: tuple[Tensor, ...] | None = None,
    matches: MatchTerm | None = None,
    cam_from_rig: Pose | None = None,
    beside: Sequence[View] = (),
    robust: Robust = Robust(),  # noqa: B008, a frozen value
    gradient: Gradient = "central",
    iterations: int | tuple[int, ...] = 50,
    initial_damping: float | Tensor = 1e-4,
    min_points: int = 12,
    step_degrees: float = 1e-3,
    step_stds: float = 0.2,
    gradient_tolerance: float = 1e-5,
) -> Refinement:
    """Refine `cam_from_world` of B queries by feature-metric alignment, coarse to fine.

    A point counts at a pose if `valid`, its descriptor is, and it projects into the image, within the
    distortion's radius and onto cells of the map. A step is taken if it lowers the robust cost *of the
    points that count both before and after*, these being at least `min_points` and half of those
    before: neither losing a bad point nor gaining a good one passes for progress. A step within half a
    cell is also taken if it brings the gradient nearer to zero, as a smoothed gradient finds a better
    pose there than the interpolated cost, whose minimum noise has moved (`benchmarks/gradients.py`).

    An element that has stopped costs nothing more, unless autograd is on and an input requires a
    gradient: then every iteration is unrolled for the whole batch without waiting for the device, and
    the refined poses and the costs are differentiable (steps as functions of the inputs and of the initial
    damping; the choices to take them are constants). The algebra runs in float32 (float64 if the initial
    poses are) whatever the features' type, outside autocast.

    Args:
        pyramid: the queries' maps; (1, C, H, W) is shared by the whole batch.
        descriptors: (B, N, C_l) of each level, sampled in the reference (`sample_descriptors`).
        descriptor_valid: (B, N) of each level.
        points: (B, N, 3) in the world, metres.
        valid: (B, N), False for padding.
        camera: (B,) of the queries' images.
        initial: (B,) `cam_from_world` to start from.
        confidences: (B, N) of each level, in the reference (`sample_confidences`); None: one. They are multiplied with
            those of `pyramid` where the points are seen, if it has any; that weight counts as constant within a step.
        matches: of the queries with 3D points, which take part in the cost of every level; None: features alone.
        cam_from_rig: pose of the camera relative to a rig, whose pose `rig_from_world` is then what `initial` gives and
            what is refined; unbatched. None: the camera's own pose is refined.
        beside: further images of the same instants by cameras of the rig. Points count over all images together.
        iterations: limit on each level, one for all levels or one for each.
        initial_damping: λ at the start of each level in (H + λ diag H) δ = −g, then ÷10 on a step taken
            and ×10 on a step refused, within [1e-6, 1e2]. 0 is Gauss-Newton: no damping, and every
            step that keeps enough points is taken. A tensor (levels, 6) gives each entry of δ its own λ > 0.
        min_points: fewer valid points at the finest level fail that element; a coarser level is skipped.
        step_degrees: stop where the step, with its damping undone, would turn the camera by less, and move it by less
            than the same angle at the mean distance of the points.
        step_stds: stop where the step, with its damping undone, is shorter than so many of its own standard deviations,
            as the residuals tell it (√(δᵀHδ/σ²), see `Refinement.covariance`): what is left is noise.
        gradient_tolerance: stop where |cos| between the residuals and each column of the Jacobian is below.

    Raises:
        ValueError: if levels, batch sizes, point counts or channels do not agree, or a setting is out of range.
    """
    limits = (iterations,) * len(pyramid.maps) if isinstance(iterations, int) else tuple(iterations)
    own = View(pyramid, descriptors, descriptor_valid, points, valid, camera, matches, cam_from_rig, confidences)
    for view in (own, *beside):
        _check_shapes(view, initial, len(pyramid.maps))
    if len(limits) != len(pyramid.maps) or min(limits) < 0:
        raise ValueError(f"iterations {iterations}: expected one count for each of {len(pyramid.maps)} levels, >= 0")
    number = None if isinstance(initial_damping, Tensor) else initial_damping
    if min_points < 3 or not (number is None or 0 <= number <= MAX_DAMPING):
        raise ValueError(
            f"expected min_points >= 3 and initial_damping in [0, {MAX_DAMPING:g}], "
            f"found {min_points} and {initial_damping}"
        )
    rules = _Rules(number == 0, min_points, step_degrees, step_stds, gradient_tolerance)
    dtype = torch.promote_types(initial.dtype, torch.float32)
    with torch.autocast(points.device.type, enabled=False):
        start = initial.to(dtype)
        levels: Sequence[Level | RigLevel] = _levels(own, robust, gradient, dtype)
        if cam_from_rig is not None or beside:
            levels = _rig_levels((own, *beside), robust, gradient, dtype)
        tensors = [
            (*v.pyramid.maps, *v.descriptors, v.points, *(v.pyramid.confidences or ()), *(v.confidences or ()))
            for v in (own, *beside)
        ]
        dampings = _dampings(initial_damping, len(limits), start.translation)
        inputs = (*sum(tensors, ()), start.rotation, start.translation, dampings)
        unroll = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        first = current = linearise(levels[-1], start)
        used = torch.zeros_like(first.weight, dtype=torch.int64)
        for level, limit, damping in zip(levels, limits, dampings, strict=True):
            if len(levels) > 1:
                current = linearise(level, current.pose)
            current, progress = _descend(level, current, damping, rules, limit, unroll)
            used = used + progress.iterations
        return _conclude(first, current, progress.status, used, descriptors[-1].shape[-1], rules)


def _levels(view: View, robust: Robust, gradient: Gradient, dtype: torch.dtype) -> list[Level]:
    valid = view.valid & view.points.isfinite().all(-1)
    points, camera = torch.where(valid[..., None], view.points.to(dtype), 0), view.camera.to(dtype)
    maps, strides, in_query = view.pyramid
    nothing = (None,) * len(maps)
    confidences = zip(in_query or nothing, view.confidences or nothing, strict=True)
    levels = zip(maps, strides, view.descriptors, view.descriptor_valid, confidences, strict=True)
    return [
        Level.prepare(features, stride, d, valid & ok, points, camera, robust, gradient, view.matches, weigh)
        for features, stride, d, ok, weigh in levels
    ]


def _rig_levels(views: Sequence[View], robust: Robust, gradient: Gradient, dtype: torch.dtype) -> list[RigLevel]:
    nowhere = Pose.identity(dtype=dtype, device=views[0].points.device)
    poses = Pose.stack([nowhere if v.cam_from_rig is None else v.cam_from_rig.to(nowhere.device, dtype) for v in views])
    each = [_levels(view, robust, gradient, dtype) for view in views]
    return [RigLevel(level, poses) for level in zip(*each, strict=True)]


def _dampings(initial: float | Tensor, levels: int, like: Tensor) -> Tensor:
    """λ at the start of each level (levels, 6)."""
    if not isinstance(initial, Tensor):
        return like.new_full((levels, 6), initial)
    if initial.shape != (levels, 6):
        raise ValueError(f"initial_damping has shape {tuple(initial.shape)}; expected ({levels}, 6)")
    return initial.to(like)


class _Rules(NamedTuple):
    """Whether steps are damped, and when to stop, see `refine_pose`."""

    undamped: bool
    min_points: int
    step_degrees: float
    step_stds: float
    gradient_tolerance: float


class _Progress(NamedTuple):
    """Damping λ (B, 6), and status (`ITERATION_LIMIT` while at work) and steps tried of each element (B,)."""

    damping: Tensor
    status: Tensor
    iterations: Tensor


_Values = TypeVar("_Values", NormalEquations, _Progress)


def _descend(
    level: Level | RigLevel, start: NormalEquations, damping: Tensor, rules: _Rules, limit: int, unroll: bool
) -> tuple[NormalEquations, _Progress]:
    """Levenberg-Marquardt at one level, with one evaluation and one wait for the device for each step."""
    count = start.valid.sum(-1)
    at_work = RefinementStatus.ITERATION_LIMIT
    status = torch.where(count < rules.min_points, RefinementStatus.TOO_FEW_POINTS, at_work)
    current = start
    progress = _Progress(damping.expand(len(count), 6), status, torch.zeros_like(count))
    stopped = current, progress  # each element as it was when it stopped
    rows = torch.arange(len(count), device=count.device)  # of those at work
    for _ in range(limit):
        delta, solved = _solve(current.hessian, current.gradient, progress.damping, unroll)
        progress = progress._replace(status=_stop_if_converged(level, current, progress, delta, solved, rules))
        if not unroll:
            running = progress.status == at_work
            flags = running.tolist()
            if not all(flags):
                stopped = _merge(stopped[0], current, rows), _merge(stopped[1], progress, rows)
                if not any(flags):
                    return stopped
                # Sorted on the device: an index made of Python numbers would have to be copied there.
                keep = running.logical_not().byte().argsort(stable=True)[: sum(flags)]
                level = level.select(keep, tuple(row for row, flag in zip(level.rows, flags, strict=True) if flag))
                rows = rows[keep]
                current, progress = (
                    NormalEquations(*(x[keep] for x in current)),
                    _Progress(*(x[keep] for x in progress)),
                )
                delta, solved = delta[keep], solved[keep]
        trial = linearise(level, current.pose.retract(delta))
        running = progress.status == at_work
        accepted = running & solved & _improves(current, trial, rules)
        current = NormalEquations(*(_where(accepted, new, old) for new, old in zip(trial, current, strict=True)))
        progress = _after_step(progress, running, accepted, rules)
    return _merge(stopped[0], current, rows), _merge(stopped[1], progress, rows)


def _merge(whole: _Values, part: _Values, rows: Tensor) -> _Values:
    """Values of the whole batch, with `part` as those of the elements `rows`."""
    if len(rows) == len(whole[0]):
        return part
    return type(whole)(*(x.index_copy(0, rows, y) for x, y in zip(whole, part, strict=True)))


def _where(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Elements (B, ...) of `a` where mask (B,), else of `b`."""
    return torch.where(mask.view(-1, *(1,) * (a.ndim - 1)), a, b)


def _stop_if_converged(
    level: Level | RigLevel, current: NormalEquations, progress: _Progress, delta: Tensor, solved: Tensor, rules: _Rules
) -> Tensor:
    """Status (B,), with those stopped whose next step or gradient is small, or that Gauss-Newton cannot solve."""
    running = progress.status == RefinementStatus.ITERATION_LIMIT
    # Damping in proportion to the diagonal shrinks a step by about 1 + λ: that is no convergence.
    delta = delta * (1 + progress.damping)
    angle = math.radians(rules.step_degrees)
    small_step = (delta[:, :3].norm(dim=-1) <= angle * current.distance) & (delta[:, 3:].norm(dim=-1) <= angle)
    # Within the noise: (δᵀHδ) / σ² with σ² the variance of one channel of a residual.
    squared = (delta[:, None] @ current.hessian @ delta[..., None]).view(-1)
    variance = current.weighted_square / (level.channels * current.weight).clamp(min=1)
    small_step |= squared <= rules.step_stds**2 * variance
    small_step &= solved
    flat = (_squared_cosines(current) <= rules.gradient_tolerance**2).all(-1)
    status = torch.where(running & small_step, RefinementStatus.CONVERGED_STEP, progress.status)
    status = torch.where(running & flat, RefinementStatus.CONVERGED_GRADIENT, status)
    if rules.undamped:
        status = torch.where(running & ~solved, RefinementStatus.SINGULAR, status)
    return status


def _squared_cosines(at: NormalEquations) -> Tensor:
    """cos² (B, 6) between the residuals and each column of the Jacobian: g_k² / (‖J_k‖² ‖r‖²), zero where r or J_k is.

    Free of the scale of features, metres and radians, and of the number of points (Moré, "The
    Levenberg-Marquardt algorithm", 1978).
    """
    lengths = at.hessian.diagonal(dim1=-2, dim2=-1) * at.weighted_square[:, None]
    return torch.where(lengths > 0, at.gradient.square() / torch.where(lengths > 0, lengths, 1), 0)


@torch.no_grad()
def _improves(current: NormalEquations, trial: NormalEquations, rules: _Rules) -> Tensor:
    """Whether the trial (B,) keeps enough points, and brings the points that it keeps nearer to the minimum."""
    common = current.valid & trial.valid
    count = common.sum(-1)
    enough = (count >= rules.min_points) & (2 * count >= current.valid.sum(-1))
    if rules.undamped:
        return enough
    lower = ((trial.cost - current.cost) * current.confidence * common).sum(-1) < 0
    # Within a cell the cost is that of the interpolant, bent by noise; the smoothed gradient is what to trust.
    moved = torch.where(common[..., None], trial.xy - current.xy, 0).square().sum((-1, -2))
    near = moved < NEAR_CELLS**2 * count
    flatter = _squared_cosines(trial).sum(-1) < _squared_cosines(current).sum(-1)
    return enough & (lower | (near & flatter))


def _after_step(progress: _Progress, running: Tensor, accepted: Tensor, rules: _Rules) -> _Progress:
    refused = running & ~accepted
    if rules.undamped:  # refused for lack of points, and would be again
        damping, stuck = progress.damping, refused
    else:
        damping = _where(accepted, 0.1 * progress.damping, 10.0 * progress.damping).clamp(MIN_DAMPING, MAX_DAMPING)
        stuck = refused & (progress.damping >= MAX_DAMPING).all(-1)
    status = torch.where(stuck, RefinementStatus.DAMPING_AT_MAXIMUM, progress.status)
    return _Progress(damping, status, progress.iterations + running)


def _solve(hessian: Tensor, gradient: Tensor, damping: Tensor, unroll: bool) -> tuple[Tensor, Tensor]:
    """δ (B, 6) of (H + diag λ diag H) δ = −g, zero where this is singular, and whether it was solved (B,)."""
    scaled, scale = _unit_diagonal(hessian)
    identity = torch.eye(6, dtype=scaled.dtype, device=scaled.device)
    system = scaled + damping[:, None] * identity
    factor, info = torch.linalg.cholesky_ex(system.detach() if unroll else system)
    solved = (info == 0) & factor.isfinite().all(-1).all(-1)
    if unroll:  # the gradient of a failed factorisation is not finite: factor the identity there
        factor, _ = torch.linalg.cholesky_ex(_where(solved, system, identity))
    delta = -scale * torch.cholesky_solve((scale * gradient)[..., None], factor).squeeze(-1)
    solved = solved & delta.isfinite().all(-1)
    return _where(solved, delta, torch.zeros_like(delta)), solved


def _unit_diagonal(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """D H D with a diagonal of ones (or zeros), and D's diagonal (B, 6): metres and radians on one footing."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, 1).rsqrt()
    return hessian * scale[:, :, None] * scale[:, None, :], scale


def _conclude(
    first: NormalEquations, last: NormalEquations, status: Tensor, iterations: Tensor, channels: int, rules: _Rules
) -> Refinement:
    """Costs, covariance and status of the whole batch, from the finest level at the start and at the end."""
    too_few = status == RefinementStatus.TOO_FEW_POINTS
    pose = Pose(_where(too_few, first.rotation, last.rotation), _where(too_few, first.translation, last.translation))
    common = first.valid & last.valid
    count = common.sum(-1)
    weight = last.confidence.detach() * common
    total = weight.sum(-1)
    mean = lambda values: (values * weight).sum(-1) / total.clamp(min=1e-12)  # noqa: E731, it is used three times here
    initial_cost, final_cost = (torch.where(count > 0, mean(at.cost), torch.inf) for at in (first, last))
    change = (last.cost - first.cost).detach()
    spread = mean((change - mean(change)[:, None]).square())
    effective = total * (total / weight.square().sum(-1).clamp(min=1e-24))  # number of points of one weight
    scaled, scale = _unit_diagonal(last.hessian.detach())
    factor, info = torch.linalg.cholesky_ex(scaled)
    # A pivot is the share of a column of J that no other column explains; at rounding's level it is none.
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    regular = (info == 0) & (pivots > 10 * torch.finfo(pivots.dtype).eps).all(-1)
    eye = torch.eye(6, dtype=factor.dtype, device=factor.device).expand_as(factor)
    inverse = torch.cholesky_inverse(_where(regular, factor, eye)) * scale[:, :, None] * scale[:, None, :]
    freedom = (channels * last.weight.detach() - 6).clamp(min=1)
    covariance = inverse * (last.weighted_square.detach() / freedom)[:, None, None]
    return Refinement(
        cam_from_world=pose,
        status=torch.where(~too_few & ~regular, RefinementStatus.SINGULAR, status),
        initial_cost=initial_cost,
        final_cost=torch.where(too_few, initial_cost, final_cost),
        cost_noise=(spread / (effective - 1).clamp(min=1)).sqrt(),
        iterations=iterations,
        valid_count=last.valid.sum(-1),
        covariance=_where(regular, covariance, torch.full_like(covariance, torch.inf)),
        min_points=rules.min_points,
    )


def _check_shapes(view: View, initial: Pose, expected_levels: int) -> None:
    pyramid, descriptors, descriptor_valid, points, valid, camera, _, _, confidences = view
    levels = len(pyramid.maps)
    counts = {expected_levels, levels, len(pyramid.strides), len(descriptors), len(descriptor_valid)}
    if len(counts) > 1 or levels == 0:
        raise ValueError(
            f"the pyramid has {levels} maps and {len(pyramid.strides)} strides, with {len(descriptors)} levels of "
            f"descriptors and {len(descriptor_valid)} of their masks; expected one of each a level"
        )
    for name, given in (("pyramid.confidences", pyramid.confidences), ("confidences", confidences)):
        if given is not None and len(given) != levels:
            raise ValueError(f"{len(given)} levels of {name} for a pyramid of {levels} maps; expected one each")
    batch, count = points.shape[:2]
    found = {"valid": valid.shape, "camera": camera.shape, "initial": initial.shape}
    expected = {"valid": (batch, count), "camera": (batch,), "initial": (batch,)}
    for i, (features, d, ok) in enumerate(zip(pyramid.maps, descriptors, descriptor_valid, strict=True)):
        found |= {f"descriptors[{i}]": d.shape, f"descriptor_valid[{i}]": ok.shape}
        expected |= {f"descriptors[{i}]": (batch, count, features.shape[1]), f"descriptor_valid[{i}]": (batch, count)}
        if features.shape[0] not in (1, batch):
            raise ValueError(f"pyramid.maps[{i}] holds {features.shape[0]} maps; expected one for all, or {batch}")
        if pyramid.confidences is not None:
            found[f"pyramid.confidences[{i}]"] = pyramid.confidences[i].shape
            expected[f"pyramid.confidences[{i}]"] = (len(features), 1, *features.shape[2:])
        if confidences is not None:
            found[f"confidences[{i}]"], expected[f"confidences[{i}]"] = confidences[i].shape, (batch, count)
    for name, shape in found.items():
        if tuple(shape) != expected[name]:
            raise ValueError(
                f"{name} has shape {tuple(shape)}; expected {expected[name]} for points of shape {tuple(points.shape)}"
            )
