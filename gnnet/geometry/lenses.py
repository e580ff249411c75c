"""Lenses beyond OPENCV's: COLMAP's rational, fisheye, division, unified and panoramic models.

A lens maps a direction to the image plane, in focal lengths: `lift` bends it to (u, v), and `distort` moves that
within the plane. Each map stands with its derivative and its inverse. Parameters of a lens are `SHAPE` numbers;
which they are stands in `_COLMAP_MODELS` of `camera.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

SHAPE = 12
NEAREST = 1e-9  # of the world's unit, whatever that is: guards divisions by a distance
NO_FOLD = 1e12  # u² + v², farther than any image reaches
_AXIS = 1e-3  # (c r / z)² within which the arc tangent's series is taken
_FLAT = 1e-4  # z of a direction, below which it counts as 90° off the axis

Shape = tuple[Tensor, ...]  # SHAPE numbers of a lens, each (..., 1)
Bent = tuple[Tensor, Tensor, tuple[Tensor, ...]]  # u′, v′ (..., N), and ∂u′/∂u, ∂u′/∂v, ∂v′/∂u, ∂v′/∂v


class LensKind(IntEnum):
    """The families of COLMAP's models; stored as a number with a camera's parameters."""

    RATIONAL = 0
    FOV = 1
    FISHEYE = 2
    RAD_TAN_THIN_PRISM_FISHEYE = 3
    DIVISION = 4
    EUCM = 5
    EQUIRECTANGULAR = 6


class Lens(NamedTuple):
    """What makes a family of camera models.

    Args:
        lift: directions (..., N, 3) of length 1 to (u, v) (..., N, 2), its derivative (..., N, 2, 3), and which
            are seen (..., N).
        lower: u, v (..., N) to directions (..., N, 3) that `lift` maps there, and which there are.
        distort: u, v (..., N) to where they are imaged; None moves nothing.
        radial: the numerator's and denominator's coefficients of s, s², … in u′ / u = 1 + …, s = u² + v², as
            positions among the shape's numbers.
    """

    lift: Callable[[Tensor, Shape], tuple[Tensor, Tensor, Tensor]]
    lower: Callable[[Tensor, Tensor, Shape], tuple[Tensor, Tensor]]
    distort: Callable[[Tensor, Tensor, Shape], Bent] | None = None
    radial: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def project(self, points: Tensor, shape: Shape, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Points (..., N, 3) to (u′, v′) (..., N, 2), its derivative (..., N, 2, 3), and which are seen (..., N).

        `limit` (..., 1) is the largest u² + v².
        """
        length = points.norm(dim=-1, keepdim=True).clamp(min=NEAREST)
        uv, slopes, seen = self.lift(points / length, shape)  # the same for all points of a ray
        seen = seen & (uv.square().sum(-1) < limit)
        slopes = slopes / length[..., None]
        if self.distort is None:
            return uv, slopes, seen
        u, v = torch.where(seen[..., None], uv, 0).unbind(-1)
        bent_u, bent_v, (a, b, c, d) = self.distort(u, v, shape)
        du, dv = slopes.unbind(-2)
        seen = seen & (a * d > b * c)  # decentring and prism fold too
        rows = [a[..., None] * du + b[..., None] * dv, c[..., None] * du + d[..., None] * dv]
        return torch.stack([bent_u, bent_v], -1), torch.stack(rows, -2), seen

    def unproject(self, target: Tensor, shape: Shape, limit: Tensor) -> tuple[Tensor, Tensor]:
        """Directions (..., N, 3) that are imaged at (u′, v′) (..., N, 2), and which there are (..., N)."""
        distort = self.distort
        if distort is None:
            return self.lower(target[..., 0], target[..., 1], shape)
        uv, found = invert(lambda u, v: distort(u, v, shape), target, limit, 20)
        rays, exists = self.lower(uv[..., 0], uv[..., 1], shape)
        return rays, exists & found

    def largest_square_radius(self, shape: Sequence[float]) -> float:
        """u² + v² up to which the image of a radius grows with it."""
        top, bottom = ([1.0, *(shape[i] for i in positions)] for positions in self.radial)
        # u N/D grows while (N + 2 s N′) D − 2 s N D′ > 0, and D > 0.
        scaled = [(1 + 2 * power) * c for power, c in enumerate(top)]
        slope = _sum(_product(scaled, bottom), [-2 * power * c for power, c in enumerate(bottom)], top)
        roots = [root for polynomial in (slope, bottom) for root in _positive_roots(polynomial)]
        return min([*roots, NO_FOLD])


def invert(
    distort: Callable[[Tensor, Tensor], Bent], target: Tensor, limit: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Newton's method: the points (..., N, 2) that are moved to `target`, and which are found within `limit` (..., 1).

    Args:
        distort: u, v (..., N) to where they are moved.
    """

    u, v = target.unbind(-1)
    square = (u * u + v * v).clamp(min=1e-24)
    start = (0.98 * limit / square).clamp(max=1).sqrt()
    u, v = u * start, v * start
    for _ in range(steps):
        bent_u, bent_v, (a, b, c, d) = distort(u, v)
        error_u, error_v = bent_u - target[..., 0], bent_v - target[..., 1]
        determinant = a * d - b * c
        step_u, step_v = (d * error_u - b * error_v) / determinant, (a * error_v - c * error_u) / determinant
        # No step leaves the side of the axis, or goes more than half the way to the fold.
        radius = (u * u + v * v).clamp(min=1e-24).sqrt()
        room = torch.minimum(0.7 * radius, ((limit.sqrt() - radius) / 2).clamp(min=1e-12))
        share = (room / (step_u * step_u + step_v * step_v).clamp(min=1e-36).sqrt()).clamp(max=1)
        u, v = u - share * step_u, v - share * step_v
    bent_u, bent_v, (a, b, c, d) = distort(u, v)
    off = (torch.stack([bent_u, bent_v], -1) - target).abs().amax(-1)
    found = (off <= 1e-5 * target.abs().amax(-1).clamp(min=1)) & (u * u + v * v < limit) & (a * d > b * c)
    return torch.where(found[..., None], torch.stack([u, v], -1), 0), found


def _positive_roots(coefficients: list[float]) -> list[float]:
    """Real roots above 0 of a polynomial, whose coefficients are given from the constant on."""
    while coefficients and coefficients[-1] == 0:
        coefficients = coefficients[:-1]
    degree = len(coefficients) - 1
    if degree < 1:
        return []
    companion = torch.diag(torch.ones(degree - 1, dtype=torch.float64), -1)
    companion[:, -1] = -torch.tensor(coefficients[:-1], dtype=torch.float64) / coefficients[-1]
    if not companion.isfinite().all():
        return []
    roots = torch.linalg.eigvals(companion)
    real = roots.real[(roots.imag.abs() <= 1e-9 * roots.abs()) & (roots.real > 0)]
    return real.tolist()


def _product(a: list[float], b: list[float]) -> list[float]:
    product = [0.0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            product[i + j] += x * y
    return product


def _sum(a: list[float], b: list[float], times: list[float]) -> list[float]:
    """a + b · times, polynomials as their coefficients."""
    product = _product(b, times)
    return [x + y for x, y in zip(a, product, strict=True)]


def _radial(direction: Tensor, scale: Tensor, by_r: Tensor, by_z: Tensor) -> tuple[Tensor, Tensor]:
    """(x, y) · m(r, z) and its derivative, from m, (∂m/∂r) / r and ∂m/∂z, each (..., N)."""
    x, y, _ = direction.unbind(-1)
    xy = x * y * by_r
    slopes = [scale + x * x * by_r, xy, x * by_z, xy, scale + y * y * by_r, y * by_z]
    return direction[..., :2] * scale[..., None], torch.stack(slopes, -1).unflatten(-1, (2, 3))


def _lift_plane(direction: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    z = direction[..., 2]
    inverse = 1 / z.clamp(min=_FLAT)
    return *_radial(direction, inverse, torch.zeros_like(z), -inverse * inverse), z > _FLAT


def _lower_plane(u: Tensor, v: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    return torch.stack([u, v, torch.ones_like(u)], -1), torch.ones_like(u, dtype=torch.bool)


def _angular(direction: Tensor, steepness: Tensor | float, gain: Tensor | float) -> tuple[Tensor, Tensor]:
    """A radius of gain / steepness · atan2(steepness · r, z), and its derivative."""
    x, y, z = direction.unbind(-1)
    square = (x * x + y * y) * steepness**2
    near_axis = (square < _AXIS * z * z) & (z > 0)
    safe_z = torch.where(near_axis, z, 1)
    t = torch.where(near_axis, square, 0) / safe_z**2
    safe = torch.where(near_axis, 1, square).clamp(min=1e-12)
    ratio = torch.atan2(safe.sqrt(), z) / safe.sqrt()
    whole = (square + z * z).clamp(min=1e-12)
    scale = torch.where(near_axis, (1 - t * (1 / 3 - t * (1 / 5 - t * (1 / 7 - t / 9)))) / safe_z, ratio)
    series = -2 / 3 + t * (4 / 5 - t * (6 / 7 - t * (8 / 9 - t * 10 / 11)))
    by_r = torch.where(near_axis, series / safe_z**3, (z / whole - ratio) / safe)
    return _radial(direction, gain * scale, gain * steepness**2 * by_r, -gain / whole)


def _lift_fisheye(direction: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    x, y, z = direction.unbind(-1)
    return *_angular(direction, 1.0, 1.0), (z > 0) | (x * x + y * y > 1e-9)


def _lower_fisheye(u: Tensor, v: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    angle = (u * u + v * v).clamp(min=1e-24).sqrt()
    sine = angle.sin() / angle
    return torch.stack([u * sine, v * sine, angle.cos()], -1), angle < math.pi


def _lift_fov(direction: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    steepness = 2 * (shape[0] / 2).tan()
    return *_angular(direction, steepness, steepness / shape[0]), direction[..., 2] > _FLAT


def _lower_fov(u: Tensor, v: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    radius = (u * u + v * v).clamp(min=1e-24).sqrt()
    angle = radius * shape[0]
    ahead = angle < math.pi / 2 - _FLAT
    grown = torch.where(ahead, angle, 0).tan() / (radius * 2 * (shape[0] / 2).tan())
    return torch.stack([u * grown, v * grown, torch.ones_like(u)], -1), ahead


def _lift_division(direction: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """The image (u, v) with (x, y, z) along (u, v, 1 + k (u² + v²)); k < 0 sees beyond 90°."""
    x, y, z = direction.unbind(-1)
    k = shape[0]
    discriminant = z * z - 4 * k * (x * x + y * y)
    root = discriminant.clamp(min=1e-12).sqrt()
    seen = (discriminant > 1e-12) & (z + root > 1e-6)
    scale = 2 / torch.where(seen, z + root, 2)
    by_r = 2 * k * scale * scale / root
    return *_radial(direction, scale, by_r, -scale * scale / 2 * (1 + z / root)), seen


def _lower_division(u: Tensor, v: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    square = u * u + v * v
    ray = torch.stack([u, v, 1 + shape[0] * square], -1)
    # With k > 0, a radius beyond 1/√k is imaged again nearer to the axis.
    return ray / ray.norm(dim=-1, keepdim=True), shape[0] * square < 1


def _lift_eucm(direction: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """(x, y) / (α √(β r² + z²) + (1 − α) z); α > ½ sees beyond 90°."""
    x, y, z = direction.unbind(-1)
    alpha, beta = shape[0], shape[1]
    distance = (beta * (x * x + y * y) + z * z).clamp(min=1e-12).sqrt()
    divisor = alpha * distance + (1 - alpha) * z
    # Behind this cone the image folds back.
    cone = torch.where(alpha > 0.5, (1 - alpha) / alpha.clamp(min=0.5), alpha / (1 - alpha).clamp(min=0.5))
    seen = (divisor > 1e-6) & (z > -cone * distance)
    scale = 1 / torch.where(seen, divisor, 1)
    by_r, by_z = -scale * scale * alpha * beta / distance, -scale * scale * (alpha * z / distance + 1 - alpha)
    return *_radial(direction, scale, by_r, by_z), seen


def _lower_eucm(u: Tensor, v: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    alpha, beta = shape[0], shape[1]
    square = beta * (u * u + v * v)
    inner = 1 - (2 * alpha - 1) * square
    z = (1 - alpha * alpha * square) / (alpha * inner.clamp(min=0).sqrt() + 1 - alpha).clamp(min=1e-9)
    ray = torch.stack([u, v, z], -1)
    return ray / ray.norm(dim=-1, keepdim=True), inner > 0


def _lift_sphere(direction: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Longitude and latitude in radians, x to the right and y down."""
    x, y, z = direction.unbind(-1)
    square = x * x + z * z
    seen = square > 1e-12
    safe = torch.where(seen, square, 1)
    across, zero = safe.sqrt(), torch.zeros_like(x)
    whole = (y * y + safe).clamp(min=1e-12)
    uv = torch.stack([torch.atan2(x, torch.where(seen, z, 1)), torch.atan2(y, across)], -1)
    up = y / (across * whole)
    slopes = [z / safe, zero, -x / safe, -x * up, across / whole, -z * up]
    return uv, torch.stack(slopes, -1).unflatten(-1, (2, 3)), seen


def _lower_sphere(u: Tensor, v: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    ray = torch.stack([v.cos() * u.sin(), v.sin(), v.cos() * u.cos()], -1)
    return ray, (u.abs() <= math.pi + 1e-6) & (v.abs() <= math.pi / 2 + 1e-6)


def _polynomial(s: Tensor, coefficients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """1 + c₁ s + c₂ s² + … and its derivative."""
    value, slope = torch.zeros_like(s), torch.zeros_like(s)
    for c in reversed(coefficients):
        slope = slope * s + value
        value = value * s + c
    return value * s + 1, slope * s + value


def _tangential(u: Tensor, v: Tensor, p1: Tensor, p2: Tensor, prism: Sequence[Tensor | float]) -> tuple[Tensor, ...]:
    """What decentring and prism add to u and v, and the derivative of that in the order of `Bent`."""
    s = u * u + v * v
    x1, x2, y1, y2 = prism
    by_x, by_y = 2 * (x1 + 2 * x2 * s), 2 * (y1 + 2 * y2 * s)
    cross = 2 * p1 * u + 2 * p2 * v
    return (
        2 * p1 * u * v + p2 * (s + 2 * u * u) + s * (x1 + s * x2),
        p1 * (s + 2 * v * v) + 2 * p2 * u * v + s * (y1 + s * y2),
        2 * p1 * v + 6 * p2 * u + by_x * u,
        cross + by_x * v,
        cross + by_y * u,
        6 * p1 * v + 2 * p2 * u + by_y * v,
    )


def _distort_brown(u: Tensor, v: Tensor, shape: Shape) -> Bent:
    """Rational radial distortion, decentring and thin prism, all of the same u and v."""
    k1, k2, p1, p2, k3, k4, q1, q2, q3, sx, sy, _ = shape
    s = u * u + v * v
    top, top_slope = _polynomial(s, (k1, k2, k3, k4))
    bottom, bottom_slope = _polynomial(s, (q1, q2, q3))
    radial = top / bottom
    slope = 2 * (top_slope - radial * bottom_slope) / bottom
    add_u, add_v, a, b, c, d = _tangential(u, v, p1, p2, (sx, 0.0, sy, 0.0))
    cross = slope * u * v
    return (
        u * radial + add_u, v * radial + add_v,
        (radial + slope * u * u + a, cross + b, cross + c, radial + slope * v * v + d),
    )  # fmt: skip


def _distort_aria(u: Tensor, v: Tensor, shape: Shape) -> Bent:
    """Radial distortion first, decentring and thin prism of its result."""
    radial, slope = _polynomial(u * u + v * v, shape[:6])
    a, b, d = radial + 2 * slope * u * u, 2 * slope * u * v, radial + 2 * slope * v * v
    u, v = u * radial, v * radial
    p0, p1, *prism = shape[6:]
    add_u, add_v, uu, uv, vu, vv = _tangential(u, v, p1, p0, prism)
    uu, vv = uu + 1, vv + 1
    return u + add_u, v + add_v, (uu * a + uv * b, uu * b + uv * d, vu * a + vv * b, vu * b + vv * d)


LENSES = {
    LensKind.RATIONAL: Lens(_lift_plane, _lower_plane, _distort_brown, ((0, 1, 4, 5), (6, 7, 8))),
    LensKind.FOV: Lens(_lift_fov, _lower_fov),
    LensKind.FISHEYE: Lens(_lift_fisheye, _lower_fisheye, _distort_brown, ((0, 1, 4, 5), (6, 7, 8))),
    LensKind.RAD_TAN_THIN_PRISM_FISHEYE: Lens(
        _lift_fisheye, _lower_fisheye, _distort_aria, ((0, 1, 2, 3, 4, 5), ())
    ),
    LensKind.DIVISION: Lens(_lift_division, _lower_division),
    LensKind.EUCM: Lens(_lift_eucm, _lower_eucm),
    LensKind.EQUIRECTANGULAR: Lens(_lift_sphere, _lower_sphere),
}  # fmt: skip
