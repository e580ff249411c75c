"""Checks of a scene, once before training: the files it names are there and whole, its numbers make sense."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from gnnet.progress import track
from gnnet.scenes.columns import CAMERA, FILE, KEYPOINTS, POINT_IDS, POSE, STATIC, ImageColumns, Views
from gnnet.scenes.formats.correspondences import read_correspondence_header
from gnnet.scenes.formats.images import image_size
from gnnet.scenes.problems import BadInput, describe_problems
from gnnet.scenes.scene import Scene
from gnnet.scenes.table import ImageTable, PairTable

_THREADS = 16  # they wait for the disk most of the time
_ROTATION_TOLERANCE = 1e-3  # largest difference between an entry of RᵀR and of the identity
_OUTSIDE = 1.0  # pixels that a keypoint may lie outside its image


def checked(scene: Scene, bad: BadInput, *, progress: bool = True) -> Scene:
    """Take out of a scene what is broken.

    An image must have a file with a readable header and an end mark, of its camera's size; so must its
    depth map. Its camera and pose must be finite, the pose a rotation; its keypoints must lie inside the
    image (up to a pixel outside), on finite points. A pair needs both images, and a correspondence file with
    a sound header if the reader did not read it; images of a fixed camera need one size. If an image is
    taken out, so are its pairs.

    Args:
        scene: what a reader gave.
        bad: gets each problem, with the file and how to mend it.
        progress: show progress bars.

    Raises:
        FileNotFoundError, ValueError: the first problem, unless `bad` skips.
        ValueError: if no image, or none of the pairs, is left.
    """
    sizes, broken = _check_files(scene.images, bad, progress)
    columns = scene.images.columns
    rows = scene.images.rows[~np.isin(scene.images.rows, list(broken))]
    for row, message in _image_problems(columns, rows, sizes, scene.points.numpy()):
        broken.add(row)
        bad.report(ValueError(f"{columns.views.paths[row]}: {message}"))
    images = scene.images.without(broken) if broken else scene.images
    pairs = _check_pairs(scene.pairs, scene.images, images, sizes, bad, progress)
    for kind, before, after in (("images", scene.images, images), ("pairs", scene.pairs, pairs)):
        if len(after) == 0 and (len(before) or kind == "images"):
            told = describe_problems((*scene.problems, *bad.problems))
            raise ValueError(f"{scene.name}: of {len(before)} {kind} none is left{told and f'; {told}'}")
    return replace(scene, images=images, pairs=pairs, problems=(*scene.problems, *bad.problems))


def _check_files(images: ImageTable, bad: BadInput, progress: bool) -> tuple[np.ndarray, set[int]]:
    """Sizes (N, 2) in pixels of the images in the columns (zero if not looked at), and rows of broken images."""
    columns = images.columns
    sizes = np.zeros((len(columns.names), 2), np.int64)
    broken: set[int] = set()
    Image.init()  # not by several threads at once

    def look(row: int) -> tuple[int, int] | Exception:
        try:
            path = columns.views.paths[row]
            camera = _camera_size(columns.views, row)
            size = image_size(Path(path), camera)
            _require_size(f"image {path}", size, camera)
            _check_depth(columns, int(columns.depth_row[row]), path, camera)
            return size
        except (OSError, ValueError) as error:
            return error

    rows = images.rows.tolist()
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            found = track(pool.map(look, rows), "Checking images", total=len(rows), show=progress)
            for row, size in zip(rows, found, strict=True):
                if isinstance(size, Exception):
                    broken.add(row)
                    bad.report(size)
                else:
                    sizes[row] = size
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return sizes, broken


def _camera_size(views: Views, row: int) -> tuple[float, float] | None:
    """Width and height in pixels that a view's camera says; None without a camera."""
    if not views.flags[row] & CAMERA:
        return None
    width, height = views.camera[row, :2].tolist()
    return width, height


def _check_depth(columns: ImageColumns, row: int, image: str, of_image: tuple[float, float] | None) -> None:
    """Raise if the depth map's file is broken, or not of the size of its own camera or else the image's."""
    if row < 0:
        return
    path = Path(columns.depths.paths[row])
    if path.suffix.lower() != ".png":
        raise ValueError(f"depth map {path} is no .png; expected a 16-bit PNG")
    own = _camera_size(columns.depths, row)
    try:
        size = image_size(path)
        _require_size(f"depth map {path}", size, own)
    except (OSError, ValueError) as error:
        raise type(error)(str(error).replace("image ", "depth map ", 1)) from error
    if own is None and of_image is not None and size != of_image:
        raise ValueError(
            f"depth map {path} is {size[0]}×{size[1]} pixels, its image {image} is {of_image[0]:g}×{of_image[1]:g}; "
            "expected one size, as depth is registered to the image: resize one of them (depth to the nearest pixel)"
        )


def _require_size(what: str, size: tuple[int, int], camera: tuple[float, float] | None) -> None:
    if camera is not None and camera != size:
        exchanged = ": width and height are exchanged" if camera == size[::-1] else ""
        raise ValueError(
            f"{what} is {size[0]}×{size[1]} pixels, its camera says {camera[0]:.6g}×{camera[1]:.6g}{exchanged}; "
            "give the camera of images of this size, or the images that it took"
        )


def _image_problems(
    columns: ImageColumns, rows: np.ndarray, sizes: np.ndarray, points: np.ndarray
) -> Iterator[tuple[int, str]]:
    """Rows of images whose numbers cannot be right, and what is wrong; one problem an image."""
    of_images, of_depths = _view_problems(columns.views, ""), _view_problems(columns.depths, "depth ")
    finite = np.isfinite(points).all(1)
    for row, depth_row in zip(rows.tolist(), columns.depth_row[rows].tolist(), strict=True):
        problem = of_images.get(row) or of_depths.get(depth_row)
        problem = problem or _observation_problem(columns, row, sizes[row], finite)
        if problem:
            yield row, problem


def _view_problems(views: Views, what: str) -> dict[int, str]:
    """What is wrong with the camera, or else the pose, by row of the views where something is."""
    messages: dict[int, str] = {}
    for row in np.flatnonzero((views.flags & CAMERA > 0) & ~_are_cameras(views.camera)).tolist():
        numbers = " ".join(f"{value:.6g}" for value in views.camera[row])
        messages[row] = (
            f"its {what}camera is width, height, fx, fy, cx, cy and the lens' numbers = {numbers}; expected finite "
            "numbers, sizes and focal lengths above 0: mend the intrinsics, or leave out the image"
        )
    for row in np.flatnonzero((views.flags & POSE > 0) & ~_are_poses(views.pose)).tolist():
        numbers = " ".join(f"{value:.4g}" for value in views.pose[row])
        messages.setdefault(
            row,
            f"its {what}pose has rotation and translation {numbers}; expected finite numbers and a rotation "
            f"(RᵀR = I to {_ROTATION_TOLERANCE:g}, det +1): mend its pose file, or leave out the image",
        )
    return messages


def _are_cameras(cameras: np.ndarray) -> np.ndarray:
    return np.isfinite(cameras).all(1) & (cameras[:, :4] > 0).all(1)


def _are_poses(poses: np.ndarray) -> np.ndarray:
    finite = np.isfinite(poses).all(1)
    rotation = np.where(finite[:, None], poses[:, :9], 0).clip(-10, 10).reshape(-1, 3, 3)
    off = np.abs(rotation.transpose(0, 2, 1) @ rotation - np.eye(3)).max((1, 2), initial=0)
    return finite & (off <= _ROTATION_TOLERANCE) & (np.linalg.det(rotation) > 0)


def _observation_problem(columns: ImageColumns, row: int, size: np.ndarray, finite: np.ndarray) -> str | None:
    """What is wrong with an image's points and keypoints, if anything; `size` (2,) in pixels, `finite` (P,) points."""
    seen, flags = slice(*columns.observations[row : row + 2].tolist()), columns.flags[row]
    if seen.start == seen.stop:
        return None
    if flags & POINT_IDS:
        ids = columns.point_ids[seen]
        if ids.min() < 0 or ids.max() >= len(finite):
            return f"it observes points {ids.min()} to {ids.max()} of {len(finite)}; read the model again"
        if not finite[ids].all():
            point = int(ids[~finite[ids]][0])
            return f"it observes point {point}, which is not finite; take the point out of the model"
    if flags & KEYPOINTS:
        keypoints = columns.keypoints[seen]
        inside = ((keypoints >= -_OUTSIDE) & (keypoints <= size + _OUTSIDE)).all(1)  # NaN is not
        if not inside.all():
            x, y = keypoints[~inside][0]
            return (
                f"{np.count_nonzero(~inside)} of {len(keypoints)} keypoints lie outside its {size[0]}×{size[1]} pixels "
                f"or are not finite, the first at ({x:.6g}, {y:.6g}); was the image resized after the model was made?"
            )
    return None


def _check_pairs(
    pairs: PairTable, before: ImageTable, images: ImageTable, sizes: np.ndarray, bad: BadInput, progress: bool
) -> PairTable:
    """The pairs that are left; one that goes with an image which was there `before` is no problem of its own."""
    broken: set[int] = set()
    columns = pairs.columns
    names, named = columns.names, before.holds(columns.names)
    for row in pairs.rows[~(named[columns.image_a[pairs.rows]] & named[columns.image_b[pairs.rows]])].tolist():
        a, b = names[columns.image_a[row]], names[columns.image_b[row]]
        missing = b if named[columns.image_a[row]] else a
        broken.add(row)
        bad.report(ValueError(f"pair {a} ↔ {b}: the scene has no image {missing}; leave out the pair"))
    kept = pairs.between(images)
    if names is images.columns.names:
        paths = images.columns.views.paths
        fixed = kept.rows[columns.flags[kept.rows] & STATIC > 0]
        unlike = (sizes[columns.image_a[fixed]] != sizes[columns.image_b[fixed]]).any(1)
        for row in fixed[unlike].tolist():
            i, j = int(columns.image_a[row]), int(columns.image_b[row])
            broken.add(row)
            bad.report(
                ValueError(
                    f"{paths[i]} is {sizes[i, 0]}×{sizes[i, 1]} pixels, {paths[j]} is "
                    f"{sizes[j, 0]}×{sizes[j, 1]}; images of a fixed camera must have one size: resize them alike"
                )
            )
    unread = kept.rows[(columns.flags[kept.rows] & FILE > 0) & (columns.count[kept.rows] == 0)].tolist()
    for row in track(unread, "Checking pairs", show=progress and bool(unread)):
        try:
            read_correspondence_header(Path(columns.paths[row]))
        except (OSError, ValueError) as error:
            broken.add(row)
            bad.report(error)
    return kept.without(broken) if broken else kept
