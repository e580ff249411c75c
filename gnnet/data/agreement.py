"""How far correspondences are from something that they were not made from: pixels by 3D points, poses, or images."""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from gnnet.data.depth import lift_keypoints
from gnnet.data.images import read_view
from gnnet.data.sift import detect_sift, match_sift
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose, skew
from gnnet.progress import track
from gnnet.sampling import evenly
from gnnet.scenes.formats.images import open_image, orientation, orientation_needed
from gnnet.scenes.scene import Pair, Scene, SceneImage

LARGEST_ERROR = 0.02  # of an image's longer side: correspondences and poses that differ by more contradict each other
_IMAGE_PAIRS = 10  # that are matched by SIFT
_LARGEST_SIDE = 1024  # pixels to which images are shrunk for it
_CHEAP_PAIRS, _CHEAP_SIDE = 4, 480  # the same, before training and evaluation
_TRIED = 8  # pairs looked at for each one that is matched
_MATCHES, _PAIRS = 10, 3  # fewer matches of a pair, or fewer pairs, contradict nothing
_NEAR = 0.01  # of an image's longer side: a 3D point so near to a match moves as the match does
_PARALLAX = 0.01  # radians between the two rays of a match whose depth the poses give
_UNITS = (1000.0, 5000.0, 256.0, 6553.5, 10000.0, 4000.0, 100.0)  # of depth maps in a metre that are in use
_RATIOS, _SPREAD, _FACTOR = 50, 0.3, 1.15  # least number, largest distance of quartiles (of logarithms), of depths
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

    Empty where both cameras stand at one spot, as there are no such lines; inf for a pixel that no point projects to.
    """
    (camera_a, a_from_world), (camera_b, b_from_world) = _posed(a), _posed(b)
    b_from_a = b_from_world @ a_from_world.inverse()
    baseline = b_from_a.translation.norm()
    if baseline <= 1e-9 * (a_from_world.translation.norm() + b_from_world.translation.norm()):  # rounding
        return np.zeros(0)
    rays_a, found_a = camera_a.unproject(torch.from_numpy(xy_a))
    rays_b, found_b = camera_b.unproject(torch.from_numpy(xy_b))
    essential = skew(b_from_a.translation / baseline) @ b_from_a.rotation
    lines_b, lines_a = rays_a @ essential.T, rays_b @ essential  # [N, 3]
    residual = (rays_b * lines_b).sum(-1).abs()
    distances = [
        residual / lines[:, :2].norm(dim=-1).clamp(min=1e-12) * camera.parameters[:2].mean()
        for camera, lines in ((camera_a, lines_a), (camera_b, lines_b))
    ]
    return torch.where(found_a & found_b, (distances[0] + distances[1]) / 2, torch.inf).numpy()


class ImageErrors(NamedTuple):
    """What SIFT's matches between images say of the pixels that depth, 3D points and poses give.

    `errors` by kind, and in a sequence by how many images apart: for each pair (N,) distances in pixels of matches
    from where they should be. `depth_ratios` (M,): depth that the poses give a match by triangulation, over the depth
    map's. `images` that were matched.
    """

    errors: dict[str, list[np.ndarray]]
    depth_ratios: np.ndarray
    images: list[SceneImage]

    def contradiction(self, side: float) -> str | None:
        """In words, by how much depth and poses, or pixels and model, contradict each other; None if they do not.

        Args:
            side: longer side of the images in pixels.
        """
        factor = depth_factor(self.depth_ratios)
        if factor is not None:
            scale = next((image.depth.scale for image in self.images if image.depth is not None), 1000.0)
            fitting = next((unit for unit in _UNITS if abs(scale / factor / unit - 1) < 0.03), scale / factor)
            return (
                f"depth and poses contradict each other: by the poses, what SIFT matches is {factor:.3g} times as far "
                f"away as the depth maps say at {scale:g} units a metre; {fitting:.5g} would fit "
                "(dataset.depth_scale), or the poses are not in metres"
            )
        pairs = [errors for found in self.errors.values() for errors in found if len(errors) >= _MATCHES]
        median = float(np.median([np.median(errors) for errors in pairs])) if len(pairs) >= _PAIRS else 0.0
        if median <= LARGEST_ERROR * side:
            return None
        return (
            f"images and poses contradict each other: SIFT matches are {median:.0f} pixels from where poses and points "
            f"put them (median of {len(pairs)} pairs, images of {side:.0f} pixels){self.turned()}; are these the "
            "images, in the order and at the size, that the poses are of?"
        )

    def turned(self) -> str:
        """In words, how many of the images have an orientation tag that is not used; empty if none has."""
        count = sum(_is_tagged(image) for image in self.images)
        if not count:
            return ""
        return (
            f"; {count} of the {len(self.images)} images have an orientation tag (EXIF) that is not used, as they have "
            "their camera's size without: if the model is of upright pixels, turn the files themselves "
            "(`mogrify -auto-orient`)"
        )


def depth_factor(ratios: np.ndarray) -> float | None:
    """The factor that depth lacks, if depths by the poses over those by the depth maps (M,) agree on one far from 1."""
    if len(ratios) < _RATIOS:
        return None
    low, middle, high = np.quantile(np.log(ratios), (0.25, 0.5, 0.75))
    return float(np.exp(middle)) if high - low < _SPREAD and abs(middle) > np.log(_FACTOR) else None


def image_pairs(scene: Scene, count: int) -> list[Pair]:
    """At most `count` pairs, spread over the list, whose correspondences SIFT's matches can measure.

    Of pairs by 3D points, those that share most of them, as their matches are the surest.
    """
    tried = [scene.pairs[i] for i in evenly(len(scene.pairs), _TRIED * count, np.random.default_rng(0))]
    measurable, shared = [], []
    for pair in tried:
        if pair.correspondences is not None or pair.image_a == pair.image_b:
            continue
        a, b = scene.images[pair.image_a], scene.images[pair.image_b]
        if pair.static or (a.depth is not None and b.depth is not None):
            measurable.append(pair)
            shared.append(0)
        elif (common := _common_points(a, b)) is not None and len(common[0]) >= _MATCHES:
            measurable.append(pair)
            shared.append(len(common[0]))
    if not any(shared):
        return [measurable[i] for i in evenly(len(measurable), count, np.random.default_rng(0))]
    return [measurable[i] for i in sorted(np.argsort(-np.array(shared), kind="stable")[:count].tolist())]


def match_agreement(scene: Scene, pair: Pair, largest_side: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Distances (N,) in pixels of image b from where SIFT finds a's keypoints to where the scene puts them.

    Depth and poses put them there; or, where there is no depth, the nearest 3D point that both images observe; a
    fixed camera puts them at the same pixel. Matches are mutual and pass the ratio test; some are wrong, so look at
    the median. A correspondence from depth reprojects exactly by construction; this measures what it is worth.

    Args:
        scene: holds the images.
        pair: two of them.
        largest_side: images are shrunk to it, in pixels, before SIFT; distances are in the files' pixels.

    Returns:
        The distances, and ratios (M,) of depths, see `ImageErrors`; empty without depth.

    Raises:
        FileNotFoundError, ValueError: if a camera, pose, image or depth map is missing or broken.
    """
    a, b = scene.images[pair.image_a], scene.images[pair.image_b]
    views = [read_view(image, largest_side) for image in (a, b)]
    sift_a, sift_b = (detect_sift(view.pixels, upright=pair.static) for view in views)
    matches = match_sift(sift_a.descriptors, sift_b.descriptors, sift_b.keypoints)
    xy_a = sift_a.keypoints[matches.kept].double() / torch.from_numpy(views[0].factors)
    xy_b = matches.keypoints[matches.kept].double() / torch.from_numpy(views[1].factors)
    if pair.static:
        return (xy_b - xy_a).norm(dim=1).numpy(), np.zeros(0)
    if a.depth is None or b.depth is None:
        return _errors_by_points(a, b, xy_a.numpy(), xy_b.numpy()), np.zeros(0)
    points, known = lift_keypoints(a, xy_a.numpy())
    camera, cam_from_world = _posed(b)
    points_b = cam_from_world.transform(torch.from_numpy(points))
    projected, _ = camera.project(points_b)
    ratios = _depth_ratios(a, b, torch.from_numpy(points[known]), xy_a[known], xy_b[known])
    known &= (points_b[:, 2] > 0).numpy()
    return (projected - xy_b).norm(dim=1).numpy()[known], ratios


def _errors_by_points(a: SceneImage, b: SceneImage, xy_a: np.ndarray, xy_b: np.ndarray) -> np.ndarray:
    """Distances (K,) of matches (N, 2) from where they lie if they move as the nearest common 3D point does."""
    common = _common_points(a, b)
    if common is None or len(xy_a) == 0:
        return np.zeros(0)
    seen_a, seen_b = common
    distance, nearest = cKDTree(seen_a).query(xy_a)
    near = distance <= _NEAR * float(_posed(a)[0].size.max())
    nearest = nearest[near]
    return np.linalg.norm(seen_b[nearest] + xy_a[near] - seen_a[nearest] - xy_b[near], axis=1)


def _common_points(a: SceneImage, b: SceneImage) -> tuple[np.ndarray, np.ndarray] | None:
    """Keypoints (K, 2) in both images of the 3D points that both observe; None where keypoints are not known."""
    if a.point_ids is None or b.point_ids is None or a.keypoints is None or b.keypoints is None:
        return None
    _, in_a, in_b = np.intersect1d(a.point_ids, b.point_ids, return_indices=True)
    return np.asarray(a.keypoints)[in_a], np.asarray(b.keypoints)[in_b]


def _depth_ratios(a: SceneImage, b: SceneImage, points: Tensor, xy_a: Tensor, xy_b: Tensor) -> np.ndarray:
    """Depths of matches (N, 2) in image a by the poses, over those of the points (N, 3) that depth gives, (M,).

    Left out are matches off the poses' epipolar lines, and those of too little parallax.
    """
    (camera_a, a_from_world), (camera_b, b_from_world) = _posed(a), _posed(b)
    b_from_a = b_from_world @ a_from_world.inverse()
    (rays_a, found_a), (rays_b, found_b) = camera_a.unproject(xy_a), camera_b.unproject(xy_b)
    turned = rays_a @ b_from_a.rotation.T
    normal = torch.linalg.cross(rays_b, turned)  # depth · turned + translation is along rays_b
    moved = torch.linalg.cross(rays_b, b_from_a.translation.expand_as(rays_b))
    depth = -(normal * moved).sum(-1) / (normal**2).sum(-1).clamp(min=1e-18)
    parallax = normal.norm(dim=-1) / (rays_b.norm(dim=-1) * turned.norm(dim=-1))
    kept = (parallax > _PARALLAX) & (depth > 0) & found_a & found_b
    off = epipolar_distances(a, b, xy_a.numpy(), xy_b.numpy())
    if len(off) == 0:
        return off
    kept &= torch.from_numpy(off <= 0.1 * LARGEST_ERROR * float(camera_a.size.max()))
    return (depth * rays_a[:, 2] / a_from_world.transform(points)[:, 2])[kept].numpy()


def errors_in_images(
    scene: Scene, *, pairs: int = _IMAGE_PAIRS, largest_side: int | None = _LARGEST_SIDE, progress: bool
) -> ImageErrors:
    """Errors of some pairs against SIFT's matches.

    Args:
        scene: with images on disk.
        pairs: the most pairs that are matched.
        largest_side: see `match_agreement`.
        progress: show a bar.
    """
    position: dict[str, int] = {}  # of an image in its folder
    for _, names in groupby(sorted(scene.images, key=lambda name: (_folder(name), name)), _folder):
        position |= {name: i for i, name in enumerate(names)}
    errors: dict[str, list[np.ndarray]] = {}
    ratios, images = [np.zeros(0)], set()
    for pair in track(image_pairs(scene, pairs), "Matching images", show=progress):
        try:
            found, of_depth = match_agreement(scene, pair, largest_side)
        except (OSError, ValueError):  # among the problems with pairs and images
            continue
        images |= {pair.image_a, pair.image_b}
        ratios.append(of_depth)
        if pair.static:
            how = "SIFT matches to the same pixel (fixed camera)"
        elif scene.images[pair.image_a].depth is None or scene.images[pair.image_b].depth is None:
            how = "SIFT matches to common 3D points near them"
        elif _folder(pair.image_a) == _folder(pair.image_b):
            apart = abs(position[pair.image_a] - position[pair.image_b])
            gap = _GAPS[max(least for least in _GAPS if least <= apart)]
            how = f"SIFT matches to depth and poses, {gap} images apart"
        else:
            how = "SIFT matches to depth and poses, in two sequences"
        if len(found):
            errors.setdefault(how, []).append(found)
    by_kind = dict(sorted(errors.items(), key=lambda item: (len(item[0]), item[0])))
    return ImageErrors(by_kind, np.concatenate(ratios), [scene.images[name] for name in sorted(images)])


def refuse_contradiction(scene: Scene) -> None:
    """Match a few pairs of images in small, and raise ValueError if they contradict depth, points or poses.

    It takes a second or two. Pairs by fixed cameras or with listed correspondences are left aside.
    """
    pairs = [p for p in image_pairs(scene, _CHEAP_PAIRS) if not p.static]
    if not pairs:
        return
    few = Scene(scene.name, {n: scene.images[n] for p in pairs for n in (p.image_a, p.image_b)}, pairs, scene.points)
    found = errors_in_images(few, pairs=len(pairs), largest_side=_CHEAP_SIDE, progress=False)
    side = max((float(i.camera.size.max()) for i in found.images if i.camera is not None), default=0.0)
    problem = found.contradiction(side)
    if problem is not None:
        raise ValueError(
            f"{scene.name}: {problem} (`python -m gnnet.scenes` tells more; dataset.check_images=false starts anyway)"
        )


def _is_tagged(image: SceneImage) -> bool:
    try:
        with open_image(image.path) as opened:
            size = None if image.camera is None else tuple(image.camera.size.tolist())
            return orientation(opened) > 1 and orientation_needed(opened, size) == 1
    except (OSError, ValueError):
        return False


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _posed(image: SceneImage) -> tuple[Camera, Pose]:
    """Camera and pose of an image, or a ValueError if one is not known."""
    if image.camera is None or image.cam_from_world is None:
        raise ValueError(f"image {image.name} has no camera or no pose; expected both")
    return image.camera, image.cam_from_world
