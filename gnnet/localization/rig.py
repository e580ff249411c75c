"""Cameras that are fixed to each other, and what their images of one instant have in common: one pose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gnnet.data.batches import Matches
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.localization.map import Observations
from gnnet.localization.result import Localization


@dataclass(frozen=True, eq=False)
class Rig:
    """Cameras that are fixed to each other. A camera alone is a rig of one, which lies where the camera does.

    Args:
        cameras: V of them, unbatched, float64 on the CPU.
        cam_from_rig: (V,) float64 on the CPU; lengths in the map's unit.
    """

    cameras: tuple[Camera, ...]
    cam_from_rig: Pose

    @classmethod
    def of(cls, camera: Camera) -> Rig:
        """The rig of one camera alone."""
        return cls((camera,), Pose.identity(1, dtype=torch.float64))

    @property
    def is_one_camera(self) -> bool:
        """Whether the pose of the rig is that of its only camera."""
        one = len(self.cameras) == 1
        return one and torch.equal(self.cam_from_rig.matrix()[0], torch.eye(4, dtype=torch.float64))

    def cam_from_world(self, rig_from_world: Pose) -> Pose:
        """Poses (V,) of the cameras where the rig has an unbatched pose."""
        return self.cam_from_rig @ rig_from_world

    def project(self, rig_from_world: Pose, points: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
        """Project points (M, 3) of the world, each into the image `view` (M,): pixels (M, 2) and validity (M,)."""
        xy, valid = points.new_zeros(len(points), 2), torch.zeros_like(view, dtype=torch.bool)
        for i, camera in enumerate(self.cameras):
            mine = view == i
            xy[mine], valid[mine] = camera.project((self.cam_from_rig[i] @ rig_from_world).transform(points[mine]))
        return xy, valid


@dataclass(frozen=True, eq=False)
class Matched:
    """Observations of a map, M of them, that were matched with the images of a rig, or with one image.

    Args:
        matches: (M,) with keypoints in the pixels of the image of each.
        observations: (M,) that were matched.
        view: (M,) position of the image.
        rig: the V cameras of the images.
    """

    matches: Matches
    observations: Observations
    view: Tensor
    rig: Rig

    @classmethod
    def of(
        cls, matches: Sequence[Matches], observations: Sequence[Observations], rig: Rig, view_of: Tensor | None = None
    ) -> Matched:
        """What was matched with each of V images, or with the images `view_of`, one for each part."""
        view = torch.repeat_interleave(torch.tensor([len(m.kept) for m in matches]))
        view = view if view_of is None else view_of[view]
        if len(matches) == 1:
            return cls(matches[0], observations[0], view, rig)
        return cls(Matches(*map(torch.cat, zip(*matches, strict=True))), Observations.cat(observations), view, rig)

    def squared_errors(self, rig_from_world: Pose) -> Tensor:
        """(M,) squared reprojection errors in pixels at a pose; inf where the point is not seen."""
        xy, valid = self.rig.project(rig_from_world, self.observations.points, self.view)
        return torch.where(valid, (xy - self.matches.keypoints).square().sum(-1), torch.inf)

    def count(self, view: int, rig_from_world: Pose | None, max_error: float) -> tuple[int, int]:
        """How many matches an image has, and how many of them agree with a pose within `max_error` pixels."""
        mine = self.matches.kept & (self.view == view)
        agree = 0 if rig_from_world is None else int((self.squared_errors(rig_from_world)[mine] <= max_error**2).sum())
        return int(mine.sum()), agree


@dataclass(frozen=True, eq=False)
class RigImage:
    """One image of a rig that is to be localized, as the caller hands it over.

    Args:
        image: (3, H, W) RGB, as for `Localizer.localize`.
        camera: its intrinsics, unbatched.
        cam_from_rig: pose of the camera relative to the rig, unbatched; lengths in the map's unit.
        name: for the record.
        references, itself, full_size: as for `Localizer.localize`.
    """

    image: Tensor
    camera: Camera
    cam_from_rig: Pose
    name: str = "query"
    references: Sequence[str] | None = None
    itself: str | None = None
    full_size: tuple[int, int] | None = None


@dataclass(frozen=True)
class RigLocalization:
    """The localization of the images of a rig.

    Args:
        rig_from_world: the pose of the rig, unbatched, float64, on the CPU; None if there is none.
        covariance: (6, 6) of it where it was refined, as `Localization.covariance` in the rig's frame; None without.
        images: of each image, in the order in which they were given. An image that nothing matched has its pose
            through the rig; one that could not be used has none.
    """

    rig_from_world: Pose | None
    covariance: Tensor | None
    images: tuple[Localization, ...]


def through_rig(image: Localization, rig: Localization, cam_from_rig: Pose) -> Localization:
    """The localization of an image whose rig is localized, with the rig's pose as `cam_from_world` of `rig`."""
    adjoint = cam_from_rig.adjoint()
    return replace(
        rig, name=image.name, status=image.status, reason=image.reason, references=image.references,
        cam_from_world=None if rig.cam_from_world is None else cam_from_rig @ rig.cam_from_world,
        initial=None if rig.initial is None else cam_from_rig @ rig.initial,
        covariance=None if rig.covariance is None else adjoint @ rig.covariance @ adjoint.mT, matches=0, inliers=0,
    )  # fmt: skip
