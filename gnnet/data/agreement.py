"""How well depth and poses agree with what the images show: SIFT matches against projected points."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gnnet.data.depth import lift_keypoints
from gnnet.data.transforms import read_image
from gnnet.scenes.scene import Pair, Scene

_RATIO = 0.8  # Lowe's: the second nearest descriptor is farther by this factor


def match_agreement(scene: Scene, pair: Pair) -> np.ndarray:
    """Pixel distances (N,) in image b between where SIFT finds a's keypoints and where depth and poses put them.

    Matches are mutual and pass the ratio test; some are wrong, so look at the median. A correspondence
    from depth reprojects exactly by construction; this measures what it is worth.

    Raises:
        FileNotFoundError, ValueError: if a camera, pose, image or depth map is missing or broken.
    """
    a, b = scene.images[pair.image_a], scene.images[pair.image_b]
    (keypoints_a, descriptors_a), (keypoints_b, descriptors_b) = _sift(a.path), _sift(b.path)
    rows_a, rows_b = _mutual_matches(descriptors_a, descriptors_b)
    points, valid = lift_keypoints(a, keypoints_a[rows_a])
    points_b = b.cam_from_world.transform(torch.from_numpy(points))
    projected, _ = b.camera.project(points_b)
    valid &= (points_b[:, 2] > 0).numpy()
    return np.linalg.norm(projected.numpy() - keypoints_b[rows_b], axis=1)[valid]


def _sift(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints (N, 2) in COLMAP pixels and unit descriptors (N, 128)."""
    import pycolmap  # slow to import, and only this measurement needs it

    grey = np.asarray(Image.fromarray(read_image(path).permute(1, 2, 0).numpy()).convert("L"))
    options = pycolmap.FeatureExtractionOptions()
    options.num_threads = 1
    level = pycolmap.logging.minloglevel
    pycolmap.logging.minloglevel = int(pycolmap.logging.WARNING)  # it announces itself otherwise
    try:
        extractor = pycolmap.FeatureExtractor.create(options, device=pycolmap.Device.cpu)
    finally:
        pycolmap.logging.minloglevel = level
    found, descriptors = extractor.extract_from_uint8_array(grey)
    keypoints = np.array([(k.x, k.y) for k in found], dtype=np.float64).reshape(-1, 2)
    descriptors = np.array(descriptors.data, dtype=np.float32).reshape(-1, 128)
    return keypoints, descriptors / np.linalg.norm(descriptors, axis=1, keepdims=True).clip(min=1e-9)


def _mutual_matches(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of descriptors (N, D), (M, D) that are each other's nearest and pass the ratio test."""
    if len(a) == 0 or len(b) < 2:
        return np.zeros(0, dtype=int), np.zeros(0, dtype=int)
    distance = np.sqrt((2 - 2 * a @ b.T).clip(min=0))
    nearest = distance.argmin(1)
    first, second = np.partition(distance, 1, axis=1)[:, :2].T
    rows = np.flatnonzero((distance.argmin(0)[nearest] == np.arange(len(a))) & (first < _RATIO * second))
    return rows, nearest[rows]
