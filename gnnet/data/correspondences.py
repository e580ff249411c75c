"""Correspondences of training pairs, from a pair's file or from the 3D points that both images observe."""

from __future__ import annotations

import numpy as np

from gnnet.scenes.correspondence_file import Correspondences, read_correspondence_file, read_correspondence_paths
from gnnet.scenes.scene import Pair, Scene

__all__ = ["Correspondences", "load_correspondences", "read_correspondence_file", "read_correspondence_paths"]


def load_correspondences(scene: Scene, pair: Pair) -> Correspondences:
    """Matching points of a pair: its `.mat` file, or else the points that both images observe (weight 1).

    Raises:
        ValueError: if the file is malformed, or neither file nor common points are there.
    """
    if pair.correspondences is not None:
        return read_correspondence_file(pair.correspondences)
    a, b = scene.images[pair.image_a], scene.images[pair.image_b]
    for image in (a, b):
        if image.point_ids is None or image.keypoints is None:
            raise ValueError(
                f"{scene.name}: {image.name} observes no 3D points and the pair {a.name}, {b.name} has no "
                "file of correspondences; expected one of them"
            )
    shared, in_a, in_b = np.intersect1d(a.point_ids, b.point_ids, return_indices=True)
    if len(shared) == 0:
        raise ValueError(f"{scene.name}: {a.name} and {b.name} observe no 3D point in common; leave out this pair")
    keypoints_a, keypoints_b = np.asarray(a.keypoints)[in_a], np.asarray(b.keypoints)[in_b]
    return Correspondences(
        keypoints_a.astype(np.float32), keypoints_b.astype(np.float32), np.ones(len(shared), np.float32)
    )
