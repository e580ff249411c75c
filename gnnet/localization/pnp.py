"""A pose from matches of pixels with 3D points: LO-RANSAC with PnP, then refinement of the reprojection error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.localization.rig import Rig

_FAR = 1.2  # ratio of an estimated focal length to a likely one from which on they contradict each other
_NEARLY = 0.9  # share of the inliers of the estimated one that the likely one must have


class PnPResult(NamedTuple):
    """The pose that the matches of one query agree on; of a query by a rig, `cam_from_world` is `rig_from_world`.

    `cam_from_world` is unbatched, float64 on the CPU, None if there is no pose; `inliers` (N,) bool on the CPU, all
    False without a pose; `reason` says in words why there is none, or how many matches agree.
    """

    cam_from_world: Pose | None
    inliers: Tensor
    reason: str


@dataclass(frozen=True)
class PoseSolver:
    """Finds the pose of a query from pixels and the 3D points seen there, most of which may be wrong.

    Args:
        max_error: pixels, the largest reprojection error of an inlier.
        min_inliers: fewer are a failure; at least 4, as three points have several poses.
        seed: seed of RANSAC's draws; the same input and seed give the same pose.

    Raises:
        ValueError: if a setting is out of range.
    """

    max_error: float = 4.0
    min_inliers: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.max_error > 0 or self.min_inliers < 4:
            raise ValueError(f"max_error {self.max_error} and min_inliers {self.min_inliers}; expected > 0 and >= 4")

    def solve(
        self, keypoints: Tensor | np.ndarray, points: Tensor | np.ndarray, camera: Camera | Rig,
        view: Tensor | None = None,
    ) -> PnPResult:  # fmt: skip
        """The pose that the matches agree on; none, with a reason, from too few or equal points, a line, or NaN.

        Args:
            keypoints: (N, 2) COLMAP pixels.
            points: (N, 3) in metres, in the frame that the pose is to be from.
            camera: of the query, unbatched; distortion is part of the projection. A rig, of several images at once.
            view: (N,) which of the rig's images the match is in; None for a single camera.

        Raises:
            ValueError: if shapes do not fit each other.
        """
        rig = camera if isinstance(camera, Rig) else Rig.of(camera)
        xy, xyz = (torch.as_tensor(a).detach().cpu().double() for a in (keypoints, points))
        shapes = [tuple(one.shape) for one in rig.cameras]
        if xy.ndim != 2 or xy.shape[1] != 2 or xyz.shape != (len(xy), 3) or any(shapes):
            raise ValueError(
                f"keypoints {tuple(xy.shape)}, points {tuple(xyz.shape)} and camera {shapes[0]}; "
                "expected (N, 2), (N, 3) and ()"
            )
        view = torch.zeros(len(xy), dtype=torch.int64) if view is None else view
        inliers = torch.zeros(len(xy), dtype=torch.bool)
        finite = (xy.isfinite().all(1) & xyz.isfinite().all(1)).nonzero().squeeze(1)
        if len(finite) < self.min_inliers:
            return PnPResult(None, inliers, f"{len(finite)} matches, {self.min_inliers} needed")
        found = self._ransac(xy[finite].numpy(), xyz[finite].numpy(), rig, view[finite])
        if found is None:
            return PnPResult(None, inliers, f"no pose agrees with the {len(finite)} matches")
        matrix, mask, _ = found
        count = int(mask.sum())
        if count < self.min_inliers:
            return PnPResult(None, inliers, f"{count} inliers, {self.min_inliers} needed")
        if not np.isfinite(matrix).all() or _rank(xyz[finite][mask]) < 2:
            return PnPResult(None, inliers, f"the {count} inliers lie on one line or point, which fixes no pose")
        inliers[finite[mask]] = True
        return PnPResult(
            Pose.from_matrix(torch.from_numpy(matrix)), inliers, f"{count} inliers of {len(finite)} matches"
        )

    def estimate_focal(
        self, keypoints: Tensor, points: Tensor, camera: Camera, *, likely: bool = False
    ) -> Camera | None:
        """The camera with the focal length at which most matches agree on a pose; None if too few do.

        Args:
            keypoints: (N, 2) COLMAP pixels.
            points: (N, 3) in any world.
            camera: the query's size and principal point, unbatched, without distortion.
            likely: whether its focal length is about right, as EXIF's is; else it does not count. Few matches, or
                points in one plane, may fix none: where the estimate is far from the likely one, that one is taken
                unless it loses more than a tenth of the inliers.
        """
        if len(keypoints) < self.min_inliers:
            return None
        xy, xyz = (values.detach().cpu().double().numpy() for values in (keypoints, points))
        rig, view = Rig.of(camera), torch.zeros(len(xy), dtype=torch.int64)
        guess, focal, count = float(camera.parameters[0]), None, 0
        found = self._ransac(xy, xyz, rig, view, estimate_focal=True)
        if found is not None and int(found[1].sum()) >= self.min_inliers and 0 < found[2] < np.inf:
            focal, count = found[2], int(found[1].sum())
        if likely and (focal is None or not 1 / _FAR < focal / guess < _FAR):
            found = self._ransac(xy, xyz, rig, view)
            if found is not None and int(found[1].sum()) >= max(self.min_inliers, _NEARLY * count):
                focal = guess
        if focal is None:
            return None
        parameters = camera.parameters.clone()
        parameters[:2] = focal
        return Camera(camera.size, parameters)

    def _ransac(
        self, xy: np.ndarray, xyz: np.ndarray, rig: Rig, view: Tensor, *, estimate_focal: bool = False
    ) -> tuple[np.ndarray, Tensor, float] | None:
        """Matrix (3, 4) of the rig's pose, mask of inliers (N,), and focal length in pixels of the first image seen.

        None if there is no pose. With `estimate_focal`, the matches are of one image.
        """
        from gnnet.colmap import pycolmap  # slow to import

        options, refinement = pycolmap.AbsolutePoseEstimationOptions(), pycolmap.AbsolutePoseRefinementOptions()
        options.ransac.max_error, options.ransac.random_seed = self.max_error, self.seed
        options.ransac.min_inlier_ratio = 0.01
        options.estimate_focal_length = refinement.refine_focal_length = estimate_focal
        cameras, (first, *others) = [], view.unique().tolist()
        for camera in rig.cameras:
            model, width, height, parameters = camera.to_colmap()
            if estimate_focal:
                model, parameters = "SIMPLE_PINHOLE", [parameters[0], *parameters[2:4]]
            cameras.append(pycolmap.Camera(model=model, width=width, height=height, params=parameters))
        # COLMAP ends its refinement on a gradient, whose size depends on the world's unit.
        spread = float(np.abs(xyz - xyz.mean(0)).mean())
        unit = spread if 0 < spread < 1e12 else 1.0  # beyond, coordinates are damage
        xyz = xyz / unit
        try:
            if others:
                scaled = replace(rig.cam_from_rig, translation=rig.cam_from_rig.translation / unit)
                poses = [pycolmap.Rigid3d(matrix[:3]) for matrix in scaled.matrix().numpy()]
                found = pycolmap.estimate_and_refine_generalized_absolute_pose(
                    xy, xyz, view.tolist(), poses, cameras, options.ransac
                )
            else:
                found = pycolmap.estimate_and_refine_absolute_pose(xy, xyz, cameras[first], options, refinement)
        except (RuntimeError, ValueError):  # a check inside that degenerate input fails
            found = None
        if found is None:
            return None
        matrix = torch.from_numpy(np.array(found["rig_from_world" if others else "cam_from_world"].matrix()))
        matrix[:, 3] *= unit
        if not others:
            matrix = (rig.cam_from_rig[first].inverse() @ Pose.from_matrix(matrix)).matrix()[:3]
        inliers = torch.from_numpy(np.array(found["inlier_mask"], dtype=bool))
        return matrix.numpy(), inliers, cameras[first].mean_focal_length()


def _rank(points: Tensor) -> int:
    """Dimensions (0 to 3) that points (N, 3) spread over."""
    spread = torch.linalg.svdvals(points - points.mean(0))
    return int((spread > 1e-6 * spread.max().clamp(min=1e-12)).sum())
