"""Pinhole cameras with radial and tangential distortion (COLMAP's five common models).

SIMPLE_PINHOLE, PINHOLE, SIMPLE_RADIAL and RADIAL are OPENCV with some parameters equal or zero,
so one value type holds them all and a batch may mix them. Pixels are COLMAP's: the centre of the
first pixel is (0.5, 0.5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Where each model's parameters stand among (fx, fy, cx, cy, k1, k2, p1, p2).
_COLMAP_MODELS: dict[str, tuple[tuple[int, ...], ...]] = {
    "SIMPLE_PINHOLE": ((0, 1), (2,), (3,)),
    "PINHOLE": ((0,), (1,), (2,), (3,)),
    "SIMPLE_RADIAL": ((0, 1), (2,), (3,), (4,)),
    "RADIAL": ((0, 1), (2,), (3,), (4,), (5,)),
    "OPENCV": ((0,), (1,), (2,), (3,), (4,), (5,), (6,), (7,)),
}

MIN_DEPTH = 1e-3  # metres; nearer points count as behind the camera


@dataclass(frozen=True)
class Camera:
    """Intrinsics of any leading batch shape.

    Args:
        size: (..., 2) image width and height in pixels.
        parameters: (..., 8) fx, fy, cx, cy in pixels, then k1, k2, p1, p2 (OpenCV's).
    """

    size: Tensor
    parameters: Tensor

    @property
    def shape(self) -> torch.Size:
        """Leading batch shape."""
        return self.parameters.shape[:-1]

    @classmethod
    def from_colmap(cls, model: str, width: int, height: int, parameters, dtype=torch.float32) -> Camera:
        """From COLMAP's model name and parameter list.

        Raises:
            ValueError: if the model is not one of the five, or the number of parameters is not the model's.
        """
        if model not in _COLMAP_MODELS:
            raise ValueError(
                f"camera model {model} is not supported; expected one of {', '.join(_COLMAP_MODELS)} "
                "(undistort the images: colmap image_undistorter)"
            )
        slots = _COLMAP_MODELS[model]
        if len(parameters) != len(slots):
            raise ValueError(f"camera model {model} has {len(slots)} parameters, found {len(parameters)}")
        full = torch.zeros(8, dtype=torch.float64)
        for value, targets in zip(parameters, slots, strict=True):
            full[list(targets)] = float(value)
        return cls(torch.tensor([width, height], dtype=dtype), full.to(dtype))

    @classmethod
    def stack(cls, cameras: list[Camera], dim: int = 0) -> Camera:
        return cls(
            torch.stack([c.size for c in cameras], dim),
            torch.stack([c.parameters for c in cameras], dim),
        )

    def scale(self, factor: float | Tensor) -> Camera:
        """The camera of the same image resized by `factor` (a number or (..., 2) for x and y)."""
        factor = torch.as_tensor(factor, dtype=self.parameters.dtype, device=self.parameters.device)
        factor = factor.expand(2) if factor.ndim == 0 else factor
        scaled = self.parameters[..., :4] * torch.cat([factor, factor], -1)
        distortion = self.parameters[..., 4:].expand(*scaled.shape[:-1], 4)
        return Camera(self.size * factor, torch.cat([scaled, distortion], -1))

    def project(self, points_cam: Tensor) -> tuple[Tensor, Tensor]:
        """Project camera points (..., N, 3) in metres to pixels (..., N, 2) and a validity mask (..., N).

        Invalid: nearer than `MIN_DEPTH`, outside the image, beyond the radius where distortion folds back.
        """
        uv, in_front = _perspective(points_cam)
        xy, in_radius = self._distort_to_pixels(uv)
        return xy, in_front & in_radius & self.contains(xy)

    def project_with_jacobian(self, points_cam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `project`, with ∂xy/∂point_cam (..., N, 2, 3) in pixels a metre: xy, jacobian, valid."""
        uv, in_front = _perspective(points_cam)
        xy, in_radius = self._distort_to_pixels(uv)
        u, v = uv.unbind(-1)
        du_du, du_dv, dv_dv = self._distortion_slopes(u, v)
        fx, fy = self.parameters[..., 0, None], self.parameters[..., 1, None]
        z = points_cam[..., 2].clamp(min=MIN_DEPTH)
        xu, xv, yu, yv = fx * du_du / z, fx * du_dv / z, fy * du_dv / z, fy * dv_dv / z
        jacobian = torch.stack([xu, xv, -(xu * u + xv * v), yu, yv, -(yu * u + yv * v)], -1).unflatten(-1, (2, 3))
        return xy, jacobian, in_front & in_radius & self.contains(xy)

    def unproject(self, xy: Tensor) -> Tensor:
        """Rays (..., N, 3) with z = 1 through pixels (..., N, 2); distortion inverted by Newton's method."""
        target = (xy - self.parameters[..., None, 2:4]) / self.parameters[..., None, :2]
        u, v = target.unbind(-1)
        for _ in range(12):
            error_u, error_v = (self._distort(u, v) - target).unbind(-1)
            a, b, d = self._distortion_slopes(u, v)
            determinant = a * d - b * b
            u = u - (d * error_u - b * error_v) / determinant
            v = v - (a * error_v - b * error_u) / determinant
        return torch.stack([u, v, torch.ones_like(u)], -1)

    def contains(self, xy: Tensor) -> Tensor:
        """Which pixels (..., N, 2) lie in the image, (..., N)."""
        return ((xy >= 0) & (xy <= self.size[..., None, :])).all(-1)

    def _distort_to_pixels(self, uv: Tensor) -> tuple[Tensor, Tensor]:
        u, v = uv.unbind(-1)
        xy = self._distort(u, v) * self.parameters[..., None, :2] + self.parameters[..., None, 2:4]
        k1, k2, _, _ = self._distortion
        return xy, u * u + v * v < _largest_square_radius(k1, k2)

    @property
    def _distortion(self) -> tuple[Tensor, ...]:
        """k1, k2, p1, p2, each (..., 1)."""
        return tuple(p[..., None] for p in self.parameters[..., 4:].unbind(-1))

    def _distort(self, u: Tensor, v: Tensor) -> Tensor:
        """Distorted points (..., N, 2) of the image plane."""
        k1, k2, p1, p2 = self._distortion
        square = u * u + v * v
        radial = 1 + square * (k1 + square * k2)
        distorted_u = u * radial + 2 * p1 * u * v + p2 * (square + 2 * u * u)
        distorted_v = v * radial + p1 * (square + 2 * v * v) + 2 * p2 * u * v
        return torch.stack([distorted_u, distorted_v], -1)

    def _distortion_slopes(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The symmetric derivative of `_distort`: ∂u′/∂u, ∂u′/∂v = ∂v′/∂u, ∂v′/∂v, each (..., N)."""
        k1, k2, p1, p2 = self._distortion
        square = u * u + v * v
        radial = 1 + square * (k1 + square * k2)
        slope = 2 * (k1 + 2 * k2 * square)  # d radial / du = slope · u
        return (
            radial + slope * u * u + 2 * p1 * v + 6 * p2 * u,
            slope * u * v + 2 * p1 * u + 2 * p2 * v,
            radial + slope * v * v + 6 * p1 * v + 2 * p2 * u,
        )

    def __getitem__(self, index) -> Camera:
        return Camera(self.size[index], self.parameters[index])

    def to(self, *args, **kwargs) -> Camera:
        return Camera(self.size.to(*args, **kwargs), self.parameters.to(*args, **kwargs))

    def pin_memory(self) -> Camera:
        return Camera(self.size.pin_memory(), self.parameters.pin_memory())


def _perspective(points_cam: Tensor) -> tuple[Tensor, Tensor]:
    z = points_cam[..., 2:]
    return points_cam[..., :2] / z.clamp(min=MIN_DEPTH), z.squeeze(-1) > MIN_DEPTH


def _largest_square_radius(k1: Tensor, k2: Tensor) -> Tensor:
    """Square of the radius up to which r(1 + k1 r² + k2 r⁴) rises: first root of 1 + 3 k1 s + 5 k2 s²."""
    discriminant = 9 * k1 * k1 - 20 * k2
    # This form of the quadratic's smaller positive root also holds at k2 = 0.
    denominator = -3 * k1 + discriminant.clamp(min=0).sqrt()
    infinity = torch.full_like(k1, torch.inf)
    has_root = (discriminant >= 0) & (denominator > 1e-12)
    return torch.where(has_root, 2 / torch.where(has_root, denominator, torch.ones_like(k1)), infinity)
