"""How well depth and poses agree with what the images show: SIFT matches against projected points."""

from __future__ import annotations

import numpy as np
import torch

from gnnet.data.depth import lift_keypoints
from gnnet.data.images import read_image
from gnnet.data.sift import detect_sift, match_sift
from gnnet.scenes.scene import Pair, Scene


def match_agreement(scene: Scene, pair: Pair) -> np.ndarray:
    """Pixel distances (N,) in image b between where SIFT finds a's keypoints and where depth and poses put them.

    Matches are mutual and pass the ratio test; some are wrong, so look at the median. A correspondence
    from depth reprojects exactly by construction; this measures what it is worth.

    Raises:
        FileNotFoundError, ValueError: if a camera, pose, image or depth map is missing or broken.
    """
    a, b = scene.images[pair.image_a], scene.images[pair.image_b]
    sift_a, sift_b = (detect_sift(read_image(image.path)) for image in (a, b))
    matches = match_sift(sift_a.descriptors, sift_b.descriptors)
    points, valid = lift_keypoints(a, sift_a.keypoints[matches.kept].double().numpy())
    points_b = b.cam_from_world.transform(torch.from_numpy(points))
    projected, _ = b.camera.project(points_b)
    valid &= (points_b[:, 2] > 0).numpy()
    keypoints_b = sift_b.keypoints[matches.nearest[matches.kept]]
    return (projected - keypoints_b).norm(dim=1).numpy()[valid]
