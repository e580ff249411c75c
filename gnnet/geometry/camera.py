"""Cameras of all of COLMAP's models.

SIMPLE_PINHOLE, PINHOLE, SIMPLE_RADIAL and RADIAL are OPENCV with some parameters equal or zero, so eight numbers hold
them all. The other models are lenses of `lenses.py`. A batch may mix them. Pixels are COLMAP's: the centre of the
first pixel is (0.5, 0.5).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gnnet.geometry.lenses import LENSES, NEAREST, NO_FOLD, SHAPE, LensKind, invert

_OPENCV = 8  # fx, fy, cx, cy, k1, k2, p1, p2
_ANY = 4 + SHAPE + 2  # fx, fy, cx, cy, the lens' shape, its largest u² + v², the number of its kind
PARAMETER_COUNTS = (_OPENCV, _ANY)
_STEEPEST = 1e4  # x / z and y / z, beyond which nothing is in an image

_F, _FX, _FY, _CX, _CY = (0, 1), (0,), (1,), (2,), (3,)


def _slots(*positions: int) -> tuple[tuple[int, ...], ...]:
    return (_FX, _FY, _CX, _CY, *((position,) for position in positions))


# The kind of each model, in the order of COLMAP's numbers, and where its parameters stand; None is OPENCV's eight.
_COLMAP_MODELS: dict[str, tuple[LensKind | None, tuple[tuple[int, ...], ...]]] = {
    "SIMPLE_PINHOLE": (None, (_F, _CX, _CY)),
    "PINHOLE": (None, _slots()),
    "SIMPLE_RADIAL": (None, (_F, _CX, _CY, (4,))),
    "RADIAL": (None, (_F, _CX, _CY, (4,), (5,))),
    "OPENCV": (None, _slots(4, 5, 6, 7)),
    "OPENCV_FISHEYE": (LensKind.FISHEYE, _slots(4, 5, 8, 9)),
    "FULL_OPENCV": (LensKind.RATIONAL, _slots(4, 5, 6, 7, 8, 10, 11, 12)),
    "FOV": (LensKind.FOV, _slots(4)),
    "SIMPLE_RADIAL_FISHEYE": (LensKind.FISHEYE, (_F, _CX, _CY, (4,))),
    "RADIAL_FISHEYE": (LensKind.FISHEYE, (_F, _CX, _CY, (4,), (5,))),
    "THIN_PRISM_FISHEYE": (LensKind.FISHEYE, _slots(4, 5, 6, 7, 8, 9, 13, 14)),
    "RAD_TAN_THIN_PRISM_FISHEYE": (LensKind.RAD_TAN_THIN_PRISM_FISHEYE, _slots(*range(4, 16))),
    "SIMPLE_DIVISION": (LensKind.DIVISION, (_F, _CX, _CY, (4,))),
    "DIVISION": (LensKind.DIVISION, _slots(4)),
    "SIMPLE_FISHEYE": (LensKind.FISHEYE, (_F, _CX, _CY)),
    "FISHEYE": (LensKind.FISHEYE, _slots()),
    "EUCM": (LensKind.EUCM, _slots(4, 5)),
    "EQUIRECTANGULAR": (LensKind.EQUIRECTANGULAR, (_FX, _FY)),
}

# Name and number of parameters of each model, in the order of COLMAP's numbers.
COLMAP_MODELS = tuple((name, len(slots)) for name, (_, slots) in _COLMAP_MODELS.items())

# The model that holds all that a kind can be, where its name is another.
_WHOLE = {LensKind.RATIONAL: "FULL_OPENCV", LensKind.FISHEYE: "THIN_PRISM_FISHEYE"}


@dataclass(frozen=True)
class Camera:
    """Intrinsics of any leading batch shape.

    Args:
        size: (..., 2) image width and height in pixels.
        parameters: (..., 8) fx, fy, cx, cy in pixels, then k1, k2, p1, p2 (OpenCV's), where all cameras of the batch
            are so; else (..., 18): fx, fy, cx, cy, twelve numbers of the lens, the largest u² + v² in its plane, and
            the number of its `LensKind`. An EQUIRECTANGULAR image has pixels a radian for fx and fy.
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
            ValueError: if the model is not known, or the number of parameters is not the model's.
        """
        if model not in _COLMAP_MODELS:
            raise ValueError(
                f"camera model {model} is not supported; expected one of {', '.join(_COLMAP_MODELS)} "
                "(undistort the images: colmap image_undistorter)"
            )
        kind, slots = _COLMAP_MODELS[model]
        if len(parameters) != len(slots):
            raise ValueError(f"camera model {model} has {len(slots)} parameters, found {len(parameters)}")
        full = torch.zeros(_ANY, dtype=torch.float64)
        for value, targets in zip(parameters, slots, strict=True):
            full[list(targets)] = float(value)
        if kind is LensKind.EQUIRECTANGULAR:
            across, down = full[:2].tolist()
            full[:4] = full.new_tensor([across / (2 * math.pi), down / math.pi, across / 2, down / 2])
        size, shape = torch.tensor([width, height], dtype=dtype), full[4 : 4 + SHAPE].tolist()
        opencv_alone = kind is LensKind.RATIONAL and not any(shape[4:])
        if kind is None or opencv_alone or (kind is LensKind.FOV and shape[0] == 0):
            return cls(size, full[:_OPENCV].to(dtype))
        full[-2], full[-1] = LENSES[kind].largest_square_radius(shape), kind
        return cls(size, full.to(dtype))

    def to_colmap(self) -> tuple[str, int, int, list[float]]:
        """COLMAP's model, width, height and parameters of one camera: PINHOLE where the lens does not distort."""
        width, height = (round(side) for side in self.size.tolist())
        full = self.parameters.detach().cpu().double().tolist()
        kind = LensKind(int(full[-1])) if self._has_lens else None
        if kind is None or (kind is LensKind.RATIONAL and not any(full[_OPENCV : 4 + SHAPE])):
            model = "OPENCV" if any(full[4:_OPENCV]) else "PINHOLE"
        else:
            model = _WHOLE.get(kind, kind.name)
        if kind is LensKind.EQUIRECTANGULAR:
            full[:2] = 2 * math.pi * full[0], math.pi * full[1]
        return model, width, height, [full[slot[0]] for slot in _COLMAP_MODELS[model][1]]

    @property
    def _has_lens(self) -> bool:
        """Whether parameters are those of any lens, and not OPENCV's alone."""
        return self.parameters.shape[-1] == _ANY

    def with_lens(self) -> Camera:
        """The same cameras with the parameters of any lens."""
        if self._has_lens:
            return self
        limit = _largest_square_radius(*self.parameters[..., 4:6].unbind(-1))[..., None].clamp(max=NO_FOLD)
        rest = limit.new_zeros(*self.shape, _ANY - _OPENCV - 2)
        kind = torch.full_like(limit, LensKind.RATIONAL)
        return Camera(self.size, torch.cat([self.parameters, rest, limit, kind], -1))

    def without_distortion(self) -> Camera:
        """Pinhole cameras of the same focal lengths and principal point."""
        return Camera(self.size, torch.cat([self.parameters[..., :4], torch.zeros_like(self.parameters[..., :4])], -1))

    @classmethod
    def stack(cls, cameras: list[Camera], dim: int = 0) -> Camera:
        if any(c._has_lens for c in cameras):
            cameras = [c.with_lens() for c in cameras]
        return cls(
            torch.stack([c.size for c in cameras], dim),
            torch.stack([c.parameters for c in cameras], dim),
        )

    def scale(self, factor: float | Tensor) -> Camera:
        """The camera of the same image resized by `factor` (a number or (..., 2) for x and y)."""
        factor = torch.as_tensor(factor, dtype=self.parameters.dtype, device=self.parameters.device)
        factor = factor.expand(2) if factor.ndim == 0 else factor
        scaled = self.parameters[..., :4] * torch.cat([factor, factor], -1)
        distortion = self.parameters[..., 4:].expand(*scaled.shape[:-1], -1)
        return Camera(self.size * factor, torch.cat([scaled, distortion], -1))

    def project(self, points_cam: Tensor) -> tuple[Tensor, Tensor]:
        """Project camera points (..., N, 3) to pixels (..., N, 2) and a validity mask (..., N).

        Invalid: behind the camera, outside the image, beyond the radius where distortion folds back. Fisheye,
        division, unified and panoramic cameras see points behind them, up to where their image folds.
        """
        if self._has_lens:
            xy, _, valid = self._through_lens(points_cam)
            return xy, valid
        uv, in_front = _perspective(points_cam)
        xy, in_radius = self._distort_to_pixels(uv)
        return xy, in_front & in_radius & self.contains(xy)

    def project_with_jacobian(self, points_cam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `project`, with ∂xy/∂point_cam (..., N, 2, 3) in pixels a unit of the world: xy, jacobian, valid."""
        if self._has_lens:
            return self._through_lens(points_cam)
        uv, in_front = _perspective(points_cam)
        xy, in_radius = self._distort_to_pixels(uv)
        u, v = uv.unbind(-1)
        du_du, du_dv, dv_dv = self._distortion_slopes(u, v)
        fx, fy = self.parameters[..., 0, None], self.parameters[..., 1, None]
        z = points_cam[..., 2].clamp(min=NEAREST)
        xu, xv, yu, yv = fx * du_du / z, fx * du_dv / z, fy * du_dv / z, fy * dv_dv / z
        jacobian = torch.stack([xu, xv, -(xu * u + xv * v), yu, yv, -(yu * u + yv * v)], -1).unflatten(-1, (2, 3))
        return xy, jacobian, in_front & in_radius & self.contains(xy)

    def unproject(self, xy: Tensor) -> tuple[Tensor, Tensor]:
        """Rays (..., N, 3) through pixels (..., N, 2), and which pixels any point projects to, (..., N).

        Rays end at z = 1; those of cameras that may see behind them (fisheye, division, EUCM, EQUIRECTANGULAR) have
        length 1.
        """
        target = (xy - self.parameters[..., None, 2:4]) / self.parameters[..., None, :2]
        if self._has_lens:
            rays, found = self._by_kind(target, lambda lens, target, shape, limit: lens.unproject(target, shape, limit))
            return rays, found

        def distort(u: Tensor, v: Tensor):
            a, b, d = self._distortion_slopes(u, v)
            return *self._distort(u, v).unbind(-1), (a, b, b, d)

        k1, k2, _, _ = self._distortion
        uv, found = invert(distort, target, _largest_square_radius(k1, k2), 12)
        return torch.cat([uv, torch.ones_like(uv[..., :1])], -1), found

    def _through_lens(self, points_cam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `project_with_jacobian`, for parameters of any lens."""
        uv, slopes, seen = self._by_kind(
            points_cam, lambda lens, points, shape, limit: lens.project(points, shape, limit)
        )
        focal, center = self.parameters[..., None, :2], self.parameters[..., None, 2:4]
        xy = uv * focal + center
        return xy, slopes * focal[..., None], seen & self.contains(xy)

    def _by_kind(self, values: Tensor, function: Callable) -> tuple[Tensor, ...]:
        """What `function(lens, values, shape, limit)` gives, called once for each kind of lens; values (..., N, D)."""
        shape = self.parameters[..., 4 : 4 + SHAPE]
        limit, kind = self.parameters[..., -2, None], self.parameters[..., -1]
        kinds = kind.unique().tolist()
        if len(kinds) <= 1:
            lens = LENSES[LensKind(int(kinds[0]))] if kinds else LENSES[LensKind.RATIONAL]
            return function(lens, values, tuple(p[..., None] for p in shape.unbind(-1)), limit)
        values = values.expand(*self.shape, *values.shape[-2:])
        parts: tuple[Tensor, ...] = ()
        for number in kinds:
            rows = kind == number  # [...]
            mine = tuple(p[..., None] for p in shape[rows].unbind(-1))
            found = function(LENSES[LensKind(int(number))], values[rows], mine, limit[rows])
            parts = parts or tuple(f.new_zeros(*self.shape, *f.shape[1:]) for f in found)
            parts = tuple(part.index_put((rows,), f) for part, f in zip(parts, found, strict=True))
        return parts

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
    return (points_cam[..., :2] / z.clamp(min=NEAREST)).clamp(-_STEEPEST, _STEEPEST), z.squeeze(-1) > NEAREST


def _largest_square_radius(k1: Tensor, k2: Tensor) -> Tensor:
    """Square of the radius up to which r(1 + k1 r² + k2 r⁴) rises: first root of 1 + 3 k1 s + 5 k2 s²."""
    discriminant = 9 * k1 * k1 - 20 * k2
    # This form of the quadratic's smaller positive root also holds at k2 = 0.
    denominator = -3 * k1 + discriminant.clamp(min=0).sqrt()
    infinity = torch.full_like(k1, torch.inf)
    has_root = (discriminant >= 0) & (denominator > 1e-12)
    return torch.where(has_root, 2 / torch.where(has_root, denominator, torch.ones_like(k1)), infinity)
