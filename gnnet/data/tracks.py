"""Tracks: in which images, and where, each 3D point was observed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.geometry.triangulation import triangulate
from gnnet.scenes.scene import SceneImage

_AT_ONCE = 1 << 14  # points that are triangulated together


class Tracks(NamedTuple):
    """Observations of P points in R images, one point after another.

    `offsets` (P+1,) tells where each point's begin; `images` (T,) rows of the images; `keypoints` (T, 2) pixels of
    these as they are on disk. P is 0 where tracks are not known.
    """

    offsets: np.ndarray
    images: np.ndarray
    keypoints: np.ndarray

    @classmethod
    def of(cls, images: Sequence[SceneImage], count: int) -> Tracks:
        """The tracks of `count` points in some images; empty unless each image knows where it observes points."""
        seen = [(i.point_ids, i.keypoints) for i in images if i.point_ids is not None and i.keypoints is not None]
        if len(seen) < len(images):
            return cls(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros((0, 2), np.float32))
        ids = np.concatenate([np.zeros(0, np.int64), *(ids for ids, _ in seen)])
        order = np.argsort(ids, kind="stable")
        rows = np.repeat(np.arange(len(seen), dtype=np.int32), [len(ids) for ids, _ in seen])
        keypoints = np.concatenate([np.zeros((0, 2), np.float32), *(np.asarray(xy, np.float32) for _, xy in seen)])
        return cls(np.searchsorted(ids[order], np.arange(count + 1)), rows[order], keypoints[order])

    def onto(self, images: Sequence[SceneImage]) -> list[SceneImage]:
        """The images that these tracks are of, each with the keypoints of the tracks."""
        ids = [np.asarray(image.point_ids) for image in images]
        keypoints = np.empty_like(self.keypoints)
        keypoints[np.argsort(np.concatenate(ids), kind="stable")] = self.keypoints
        ends = np.cumsum([len(each) for each in ids])[:-1]
        return [replace(i, keypoints=xy) for i, xy in zip(images, np.split(keypoints, ends), strict=True)]

    def triangulated(self, points: Tensor, poses: Pose, cameras: Camera) -> Tensor:
        """Points (P, 3) in metres as all observations fix them; where they do not, as in `points`.

        Args:
            points: (P, 3) metres.
            poses, cameras: (R,) of the images, float64.
        """
        points = points.clone()
        for start in range(0, len(points), _AT_ONCE):
            offsets = np.asarray(self.offsets[start : start + _AT_ONCE + 1])
            count, part = len(offsets) - 1, slice(offsets[0], offsets[-1])
            rows = torch.from_numpy(np.array(self.images[part])).long()
            point = torch.arange(count).repeat_interleave(torch.from_numpy(np.diff(offsets)))
            keypoints = torch.from_numpy(np.array(self.keypoints[part]))
            found, fixed = triangulate(keypoints, cameras[rows], poses[rows], point, count)
            points[start : start + count] = torch.where(fixed[:, None], found, points[start : start + count])
        return points

    def without(self, image: int, ids: Tensor, poses: Pose, cameras: Camera) -> tuple[Tensor, Tensor, Tensor]:
        """Points as they are triangulated without what one image saw.

        Args:
            image: its row.
            ids: (N,) of the points asked for, in any order; -1 is none.
            poses, cameras: (R,) of all images, float64.

        Returns:
            Points (N, 3) in metres, which of them the image saw (N,), and which of these the other images
            fix (N,). A point that the image did not see is left at zero.
        """
        points = torch.zeros(len(ids), 3, dtype=torch.float64)
        nothing = torch.zeros(len(ids), dtype=torch.bool)
        if len(self.offsets) < 2:
            return points, nothing, nothing
        asked, inverse = ids.clamp(min=0).unique(return_inverse=True)
        starts, ends = (torch.from_numpy(np.asarray(self.offsets[(asked + k).numpy()])) for k in (0, 1))
        length = ends - starts
        point = torch.arange(len(asked)).repeat_interleave(length)
        at = torch.arange(len(point)) + (starts - length.cumsum(0) + length)[point]
        rows = torch.from_numpy(np.asarray(self.images[at.numpy()])).long()
        seen = torch.zeros(len(asked), dtype=torch.bool)
        seen[point[rows == image]] = True
        others = seen[point] & (rows != image)
        at, rows, point = at[others], rows[others], point[others]
        keypoints = torch.from_numpy(np.asarray(self.keypoints[at.numpy()]))
        found, fixed = triangulate(keypoints, cameras[rows], poses[rows], point, len(asked))
        saw = seen[inverse] & (ids >= 0)
        return torch.where(saw[:, None], found[inverse], points), saw, fixed[inverse] & saw
