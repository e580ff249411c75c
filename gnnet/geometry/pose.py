"""Rigid motions SE(3) as values: rotation matrix and translation, any leading batch shape.

The name of a pose holds its two frames: `cam_from_world` maps points from the world's frame to the camera's, so
`query_from_reference = query_from_world @ reference_from_world.inverse()`. Units are metres and radians.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pose:
    """A rigid motion `target_from_source`: x_target = rotation @ x_source + translation.

    Args:
        rotation: (..., 3, 3) rotation matrices.
        translation: (..., 3) in metres.
    """

    rotation: Tensor
    translation: Tensor

    @property
    def shape(self) -> torch.Size:
        """Leading batch shape."""
        return self.translation.shape[:-1]

    @property
    def device(self) -> torch.device:
        """Device of both tensors."""
        return self.translation.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of both tensors."""
        return self.translation.dtype

    @classmethod
    def identity(cls, *shape: int, dtype: torch.dtype = torch.float32, device=None) -> Pose:
        """Poses of a batch shape, each with rotation I and translation 0."""
        eye = torch.eye(3, dtype=dtype, device=device).expand(*shape, 3, 3)
        return cls(eye, torch.zeros(*shape, 3, dtype=dtype, device=device))

    @classmethod
    def from_matrix(cls, matrix: Tensor) -> Pose:
        """Poses from matrices [R | t], (..., 3, 4) or (..., 4, 4)."""
        return cls(matrix[..., :3, :3], matrix[..., :3, 3])

    @classmethod
    def from_quaternion(cls, quaternion_wxyz: Tensor, translation: Tensor) -> Pose:
        """Poses from quaternions (..., 4) in w, x, y, z order, as in COLMAP's text files, and translations (..., 3).

        The quaternions are normalised here.
        """
        q = quaternion_wxyz / quaternion_wxyz.norm(dim=-1, keepdim=True)
        w, x, y, z = q.unbind(-1)
        rows = [
            1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
            2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
            2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
        ]  # fmt: skip
        return cls(torch.stack(rows, -1).unflatten(-1, (3, 3)), translation)

    @classmethod
    def from_center(cls, rotation: Tensor, center: Tensor) -> Pose:
        """Poses `cam_from_world` from rotations (..., 3, 3) and camera centres C (..., 3) in the world: t = −R·C.

        NVM files and CMU's pose files store poses in this form.
        """
        return cls(rotation, -(rotation @ center[..., None]).squeeze(-1))

    @classmethod
    def stack(cls, poses: list[Pose], dim: int = 0) -> Pose:
        """Stack poses of one batch shape along a new batch axis `dim`."""
        return cls(
            torch.stack([p.rotation for p in poses], dim),
            torch.stack([p.translation for p in poses], dim),
        )

    def matrix(self) -> Tensor:
        """(..., 4, 4) homogeneous matrices."""
        top = torch.cat([self.rotation, self.translation[..., None]], -1)
        bottom = torch.eye(4, dtype=top.dtype, device=top.device)[3:].expand(*self.shape, 1, 4)
        return torch.cat([top, bottom], -2)

    def quaternion(self) -> Tensor:
        """(..., 4) unit quaternions in w, x, y, z order with w >= 0."""
        r = self.rotation
        m00, m11, m22 = r[..., 0, 0], r[..., 1, 1], r[..., 2, 2]
        # Each row is q times 4 of its components. The row of the largest component loses no digits.
        candidates = torch.stack(
            [
                torch.stack([1 + m00 + m11 + m22, r[..., 2, 1] - r[..., 1, 2],
                             r[..., 0, 2] - r[..., 2, 0], r[..., 1, 0] - r[..., 0, 1]], -1),
                torch.stack([r[..., 2, 1] - r[..., 1, 2], 1 + m00 - m11 - m22,
                             r[..., 1, 0] + r[..., 0, 1], r[..., 0, 2] + r[..., 2, 0]], -1),
                torch.stack([r[..., 0, 2] - r[..., 2, 0], r[..., 1, 0] + r[..., 0, 1],
                             1 - m00 + m11 - m22, r[..., 2, 1] + r[..., 1, 2]], -1),
                torch.stack([r[..., 1, 0] - r[..., 0, 1], r[..., 0, 2] + r[..., 2, 0],
                             r[..., 2, 1] + r[..., 1, 2], 1 - m00 - m11 + m22], -1),
            ],
            -2,
        )  # fmt: skip
        best = candidates.diagonal(dim1=-2, dim2=-1).argmax(-1)
        q = candidates.gather(-2, best[..., None, None].expand(*best.shape, 1, 4)).squeeze(-2)
        q = q / q.norm(dim=-1, keepdim=True)
        return torch.where(q[..., :1] < 0, -q, q)

    def inverse(self) -> Pose:
        """`source_from_target`."""
        rotation = self.rotation.transpose(-1, -2)
        return Pose(rotation, -(rotation @ self.translation[..., None]).squeeze(-1))

    def __matmul__(self, other: Pose) -> Pose:
        """`a_from_b @ b_from_c = a_from_c`."""
        return Pose(self.rotation @ other.rotation, self.transform(other.translation[..., None, :]).squeeze(-2))

    def transform(self, points: Tensor) -> Tensor:
        """Map points (..., N, 3) from the source frame to the target frame."""
        return points @ self.rotation.transpose(-1, -2) + self.translation[..., None, :]

    def center(self) -> Tensor:
        """Origin of the target frame in the source frame, (..., 3): the camera centre −Rᵀt of a `cam_from_world`."""
        return -(self.rotation.transpose(-1, -2) @ self.translation[..., None]).squeeze(-1)

    def shifted(self, origin: Tensor) -> Pose:
        """The same poses in a world with its origin at `origin` (..., 3): x_moved = x − origin.

        `shifted(-origin)` undoes it. Where the origin is near the camera, float32 keeps the translation to less
        than a micrometre.
        """
        return Pose(self.rotation, self.translation + (self.rotation @ origin[..., None]).squeeze(-1))

    def retract(self, delta: Tensor) -> Pose:
        """Updated poses exp(delta) @ self; delta (..., 6) is translation, then rotation, in the target frame."""
        return exp(delta) @ self

    def adjoint(self) -> Tensor:
        """(..., 6, 6) that take a step δ on the source's side to that on the target's: self exp(δ) = exp(Ad δ) self."""
        turned = skew(self.translation) @ self.rotation
        top = torch.cat([self.rotation, turned], -1)
        bottom = torch.cat([torch.zeros_like(turned), self.rotation], -1)
        return torch.cat([top, bottom], -2)

    def __getitem__(self, index) -> Pose:
        """Some poses of the batch; `index` applies to the batch axes."""
        return Pose(self.rotation[index], self.translation[index])

    def to(self, *args, **kwargs) -> Pose:
        """The same poses on another device or in another type, see `Tensor.to`."""
        return Pose(self.rotation.to(*args, **kwargs), self.translation.to(*args, **kwargs))

    def pin_memory(self) -> Pose:
        """The same poses in memory that a GPU copies fast."""
        return Pose(self.rotation.pin_memory(), self.translation.pin_memory())


def skew(v: Tensor) -> Tensor:
    """Cross-product matrices [v]× (..., 3, 3) of vectors (..., 3)."""
    x, y, z = v.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))


def so3_exp(omega: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of rotation vectors (..., 3) in radians (Rodrigues)."""
    return exp(torch.cat([torch.zeros_like(omega), omega], -1)).rotation


def exp(delta: Tensor) -> Pose:
    """SE(3) exponential of twists (..., 6) = (translation part, rotation part)."""
    rho, omega = delta[..., :3], delta[..., 3:]
    a, b, c = _exp_coefficients(omega)
    w = skew(omega)
    ww = w @ w
    eye = torch.eye(3, dtype=delta.dtype, device=delta.device)
    left = eye + b * w + c * ww
    return Pose(eye + a * w + b * ww, (left @ rho[..., None]).squeeze(-1))


def _exp_coefficients(omega: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sin(t)/t, (1−cos t)/t² and (t−sin t)/t³ at t = |omega|, each (..., 1, 1).

    Small t take the Taylor series, because the gradients of the quotients are not finite there.
    """
    square = (omega * omega).sum(-1)[..., None, None]
    small = square < 1e-2
    safe = torch.where(small, torch.ones_like(square), square)
    t = safe.sqrt()
    sin, cos = t.sin(), t.cos()
    a = torch.where(small, 1 - square / 6 * (1 - square / 20 * (1 - square / 42)), sin / t)
    b = torch.where(small, 0.5 - square / 24 * (1 - square / 30 * (1 - square / 56)), (1 - cos) / safe)
    c = torch.where(small, 1 / 6 - square / 120 * (1 - square / 42 * (1 - square / 72)), (t - sin) / (safe * t))
    return a, b, c


def rotation_angle(rotation: Tensor) -> Tensor:
    """Angle in radians, (...), of rotation matrices (..., 3, 3).

    It is the atan2 of skew part and trace, as `acos` of the trace returns 0 below 0.01° in float32.
    """
    axis = torch.stack(
        [
            rotation[..., 2, 1] - rotation[..., 1, 2],
            rotation[..., 0, 2] - rotation[..., 2, 0],
            rotation[..., 1, 0] - rotation[..., 0, 1],
        ],
        -1,
    )
    trace = rotation.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.atan2(axis.norm(dim=-1), trace - 1)


def pose_errors(estimate: Pose, truth: Pose) -> tuple[Tensor, Tensor]:
    """Distance of the camera centres in metres and rotation angle in degrees between two `cam_from_world`, (...) each.

    Computed in float64, because 100 m from the origin a float32 centre is exact to 0.01 mm only.
    """
    estimate, truth = estimate.to(torch.float64), truth.to(torch.float64)
    position = (estimate.center() - truth.center()).norm(dim=-1)
    angle = rotation_angle(estimate.rotation @ truth.rotation.transpose(-1, -2))
    return position, torch.rad2deg(angle)


def perturb(
    pose: Pose, position: float | Tensor, rotation_degrees: float | Tensor, generator: torch.Generator | None
) -> Pose:
    """Move a `cam_from_world` by a given distance and turn it by a given angle, both in random directions.

    Args:
        pose: the poses; each camera turns about its own centre.
        position: metres by which the camera centre moves: a number, or a tensor of the pose's batch shape.
        rotation_degrees: angle by which the camera turns: a number, or a tensor of the pose's batch shape.
        generator: draws the directions; one on the CPU gives all devices the same. None is torch's global one.
    """
    shape, dtype = pose.shape, pose.dtype

    def direction() -> Tensor:
        device = None if generator is None else generator.device
        v = torch.randn(*shape, 3, generator=generator, device=device, dtype=torch.float64)
        return (v / v.norm(dim=-1, keepdim=True)).to(dtype).to(pose.device, non_blocking=True)

    position, degrees = (
        x.to(pose.device, dtype)[..., None] if isinstance(x, Tensor) else x for x in (position, rotation_degrees)
    )
    center = pose.center() + direction() * position
    rotation = so3_exp(torch.deg2rad(direction() * degrees)) @ pose.rotation
    return Pose.from_center(rotation, center)
