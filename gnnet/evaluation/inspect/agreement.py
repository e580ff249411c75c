"""How far correspondences are from something that they were not made from: pixels by 3D points, poses, or images."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import torch

from gnnet.data.depth import lift_keypoints
from gnnet.data.images import read_view
from gnnet.data.sift import detect_sift, match_sift
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose, skew
from gnnet.progress import track
from gnnet.sampling import evenly
from gnnet.scenes.scene import Pair, Scene, SceneImage

_IMAGE_PAIRS = 30  # that are matched by SIFT
_GAPS = {0: "0–2", 3: "3–5", 6: "6–10", 11: "11–20", 21: "21 or more"}  # images between two, by the least of each kind


def correspondence_errors(
    scene: Scene, pair: Pair, xy_a: np.ndarray, xy_b: np.ndarray
) -> tuple[np.ndarray, str | None]:
    """Errors (K,) in pixels of correspondences (N, 2) in a and b, and in words how they were measured.

    Empty and None where poses are not known, and where the correspondences were made from depth and the
    poses, so that they agree in any case: see `match_agreement`.
    """
    a, b = scene.images[pair.image_a], scene.images[pair.image_b]
    unknown = np.zeros(0), None
    if any(image.camera is None or image.cam_from_world is None for image in (a, b)):
        return unknown
    if pair.correspondences is not None:
        distances = epipolar_distances(a, b, xy_a, xy_b)
        return (distances, "correspondences to the epipolar lines of the poses") if len(distances) else unknown
    made_from_depth = a.depth is not None and b.depth is not None
    if pair.static or made_from_depth or a.point_ids is None or b.point_ids is None:
        return unknown
    shared, in_a, in_b = np.intersect1d(a.point_ids, b.point_ids, return_indices=True)
    points = scene.points[torch.from_numpy(shared)]
    errors = [reprojection_errors(image, points, rows) for image, rows in ((a, in_a), (b, in_b))]
    return np.concatenate(errors), "common 3D points projected to both images"


def reprojection_errors(image: SceneImage, points: torch.Tensor, rows: np.ndarray) -> np.ndarray:
    """Distances (K,) in pixels from an image's keypoints `rows` to projected points (K, 3); inf where not visible."""
    camera, cam_from_world = _posed(image)
    xy, valid = camera.project(cam_from_world.transform(points))
    distance = np.linalg.norm(xy.numpy() - np.asarray(image.keypoints)[rows], axis=-1)
    return np.where(valid.numpy(), distance, np.inf)


def epipolar_distances(a: SceneImage, b: SceneImage, xy_a: np.ndarray, xy_b: np.ndarray) -> np.ndarray:
    """Distances (N,) in undistorted pixels of points (N, 2) to each other's epipolar line, the mean of both images.

    Empty where both cameras stand at one spot, as there are no such lines.
    """
    (camera_a, a_from_world), (camera_b, b_from_world) = _posed(a), _posed(b)
    b_from_a = b_from_world @ a_from_world.inverse()
    baseline = b_from_a.translation.norm()
    if baseline < 1e-6:
        return np.zeros(0)
    rays_a, rays_b = camera_a.unproject(torch.from_numpy(xy_a)), camera_b.unproject(torch.from_numpy(xy_b))
    essential = skew(b_from_a.translation / baseline) @ b_from_a.rotation
    lines_b, lines_a = rays_a @ essential.T, rays_b @ essential  # [N, 3]
    residual = (rays_b * lines_b).sum(-1).abs()
    distances = [
        residual / lines[:, :2].norm(dim=-1).clamp(min=1e-12) * camera.parameters[:2].mean()
        for camera, lines in ((camera_a, lines_a), (camera_b, lines_b))
    ]
    return ((distances[0] + distances[1]) / 2).numpy()


def image_pairs(scene: Scene, count: int) -> list[Pair]:
    """At most `count` pairs, spread over the list, whose correspondences `match_agreement` can measure."""
    with_depth = {image.name for image in scene.images.values() if image.depth is not None}
    pairs = [
        pair
        for pair in scene.pairs
        if pair.correspondences is None
        and pair.image_a != pair.image_b
        and (pair.static or (pair.image_a in with_depth and pair.image_b in with_depth))
    ]
    return [pairs[i] for i in evenly(len(pairs), count, np.random.default_rng(0))]


def match_agreement(scene: Scene, pair: Pair) -> np.ndarray:
    """Distances (N,) in pixels of image b from where SIFT finds a's keypoints to where depth and poses put them.

    A fixed camera puts them at the same pixel. Matches are mutual and pass the ratio test; some are wrong, so
    look at the median. A correspondence from depth reprojects exactly by construction; this measures what it is
    worth.

    Raises:
        FileNotFoundError, ValueError: if a camera, pose, image or depth map is missing or broken.
    """
    a, b = scene.images[pair.image_a], scene.images[pair.image_b]
    sift_a, sift_b = (detect_sift(read_view(image).pixels, upright=pair.static) for image in (a, b))
    matches = match_sift(sift_a.descriptors, sift_b.descriptors, sift_b.keypoints)
    xy_a = sift_a.keypoints[matches.kept].double()
    xy_b = matches.keypoints[matches.kept].double()
    if pair.static:
        return (xy_b - xy_a).norm(dim=1).numpy()
    points, known = lift_keypoints(a, xy_a.numpy())
    camera, cam_from_world = _posed(b)
    points_b = cam_from_world.transform(torch.from_numpy(points))
    projected, _ = camera.project(points_b)
    known &= (points_b[:, 2] > 0).numpy()
    return (projected - xy_b).norm(dim=1).numpy()[known]


def errors_in_images(scene: Scene, *, progress: bool) -> dict[str, list[np.ndarray]]:
    """Errors of some pairs against SIFT's matches, by kind and, in a sequence, by how many images apart they are."""
    pairs = image_pairs(scene, _IMAGE_PAIRS)
    position: dict[str, int] = {}  # of an image in its folder
    for _, names in groupby(sorted(scene.images, key=lambda name: (_folder(name), name)), _folder):
        position |= {name: i for i, name in enumerate(names)}
    errors: dict[str, list[np.ndarray]] = {}
    for pair in track(pairs, "Matching images", show=progress):
        try:
            found = match_agreement(scene, pair)
        except (OSError, ValueError):  # among the problems with pairs and images
            continue
        if pair.static:
            how = "SIFT matches to the same pixel (fixed camera)"
        elif _folder(pair.image_a) == _folder(pair.image_b):
            apart = abs(position[pair.image_a] - position[pair.image_b])
            gap = _GAPS[max(least for least in _GAPS if least <= apart)]
            how = f"SIFT matches to depth and poses, {gap} images apart"
        else:
            how = "SIFT matches to depth and poses, in two sequences"
        if len(found):
            errors.setdefault(how, []).append(found)
    return dict(sorted(errors.items(), key=lambda item: (len(item[0]), item[0])))


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _posed(image: SceneImage) -> tuple[Camera, Pose]:
    """Camera and pose of an image, or a ValueError if one is not known."""
    if image.camera is None or image.cam_from_world is None:
        raise ValueError(f"image {image.name} has no camera or no pose; expected both")
    return image.camera, image.cam_from_world
