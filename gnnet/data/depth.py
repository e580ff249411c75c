"""Correspondences and 3D points from depth maps and poses; only the pixels that are needed are lifted to 3D."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path

import kornia_rs
import numpy as np
import torch
from PIL import Image

from gnnet.geometry.camera import Camera
from gnnet.geometry.lenses import NEAREST
from gnnet.geometry.pose import Pose
from gnnet.scenes.scene import Correspondences, SceneImage

_UNKNOWN = 65535  # as 7-Scenes writes it; others write 0
_TOLERANCE = (0.02, 0.02)  # two depths of one surface differ by at most so many metres plus this share of the depth
_LARGEST_STEP = 0.06  # share of the depth by which a pixel's neighbourhood may vary; more is the edge of an object
_CELLS = 2  # cells of the grid for each point wanted, since many points are not seen in the other image
_TRIES = 3  # random pixels tried in each cell
_LIFTS = 10  # iterations that find where a ray meets the surface
_MARCH = 2.0  # pixels of the depth map between two steps of the search for what hides a point
Window = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of an image
_NEIGHBOURS = np.array([[-1], [0], [1]])
_ONE = np.uint16(1)


def read_depth(path: Path, scale: float = 1000.0) -> np.ndarray:
    """Depth along the optical axis (H, W), float32 metres, from a 16-bit PNG; 0 where it is unknown.

    Args:
        path: the file.
        scale: units of the file in a metre; 1000: millimetres.

    Raises:
        FileNotFoundError: no such file.
        ValueError: if the file is no readable 16-bit image of one channel.
    """
    return _in_metres(_read_units(path), scale)


def _in_metres(units: np.ndarray, scale: float) -> np.ndarray:
    """Depths of a file in metres, float32, 0 where unknown."""
    metres = units * np.float32(1 / scale)
    metres[units == _UNKNOWN] = 0
    return metres


def _read_units(path: Path) -> np.ndarray:
    """The depths (H, W) of a file, uint16 in its own unit; errors as `read_depth`."""
    if not path.is_file():
        raise FileNotFoundError(f"depth map {path} does not exist; expected a 16-bit PNG")
    try:
        return kornia_rs.io.read_image_png_u16(str(path), "mono")[..., 0]  # twice as fast as Pillow
    except Exception:  # all its errors; Pillow reads some damaged files, and says what is wrong with others
        pass
    try:
        with Image.open(path) as image:  # not torchvision, which ends the process on a damaged PNG
            raw, mode, channels = np.array(image), image.mode, len(image.getbands())
    except Exception as error:  # Pillow raises many types on a damaged file
        raise ValueError(
            f"depth map {path} ({path.stat().st_size} bytes) cannot be read ({str(error)[-120:]}); "
            "it may be truncated: fetch it again, or remove the image from the dataset"
        ) from error
    if not mode.startswith("I"):  # I;16, or I where Pillow is older
        raise ValueError(
            f"depth map {path} has {channels} channels of {8 * raw.dtype.itemsize} bits; "
            "expected a 16-bit PNG of one channel"
        )
    return raw.astype(np.uint16, copy=False)


def depth_correspondences(
    a: DepthView, b: DepthView, *, count: int, generator: np.random.Generator, window: Window | None = None
) -> Correspondences:
    """Points of image a's depth map and where image b sees them.

    The points are spread evenly: at most one in each cell of a grid over the depth map, at a random
    pixel. A point is kept if both images see it: it lies inside both, its neighbourhood in both
    depth maps holds no edge of an object, and b's depth agrees to 2 cm + 2 %. If the depth camera is
    not the image's camera, nothing in the depth map may hide the point from the image's camera.

    Args:
        a: depth map of the first image.
        b: depth map of the second image, of the same scene.
        count: the most points.
        generator: draws the pixels.
        window: the part of image a in which the points lie, or near its border; None is the whole.

    Returns:
        Keypoints at the exact projections of the points; weight 1, or less where the two depths disagree by
        more than the surface's slope explains (0.37 at the tolerance). Empty if the images see nothing in common.
    """
    points_a, keypoints_a = _surface_points(a, _CELLS * count, generator, window)
    points_b = _moved(b.cam_from_world @ a.cam_from_world.inverse(), points_a)
    keypoints_b, seen, disagreement = _observe(b, points_b)
    rows = np.flatnonzero(seen)
    for view, points in ((a, points_a), (b, points_b)):
        rows = rows[~_hidden(view, points[rows])]
    rows = _at_most(rows, count, generator)
    return Correspondences(
        keypoints_a[rows].astype(np.float32),
        keypoints_b[rows].astype(np.float32),
        np.exp(-(disagreement[rows] ** 2)).astype(np.float32),
    )


def depth_points(image: SceneImage, *, count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """World points (N, 3) in metres that an image sees, and their keypoints (N, 2), both float64.

    They are spread and chosen as in `depth_correspondences`; N is at most `count`.

    Raises:
        FileNotFoundError, ValueError: if camera, pose or depth map is missing or broken, or no depth is known.
    """
    view = read_depth_view(image)
    points, keypoints = _surface_points(view, _CELLS * count, generator)
    rows = _at_most(np.flatnonzero(~_hidden(view, points)), count, generator)
    if len(rows) == 0:
        raise ValueError(f"depth map {view.path} holds no smooth surface that {image.name} sees; leave it out")
    return _moved(view.cam_from_world.inverse(), points[rows]), keypoints[rows]


def lift_keypoints(image: SceneImage, keypoints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """World points (N, 3), float64 metres, on the rays of an image's keypoints (N, 2), and their validity (N,).

    If the depth map has a camera of its own, where a ray meets the surface is found by iteration. A point is
    invalid at unknown depth, at the edge of an object, or if the iteration does not converge; it is finite then,
    but means nothing.

    Raises:
        FileNotFoundError, ValueError: if camera, pose or depth map is missing or broken.
    """
    view = read_depth_view(image)
    rays = _rays(view.image_camera, np.asarray(keypoints, dtype=np.float64))
    known = _in_metres(view.units, view.scale)
    known = known[known > 0]
    depth = np.full(len(rays), np.median(known) if known.size else 1.0)
    for _ in range(_LIFTS):
        previous = depth
        xy, inside = _project(view.camera, view.to_depth(rays * depth[:, None]))
        patch = _patch(view, xy)
        surface = np.where(patch.middle > 0, patch.middle, np.where(patch.any, (patch.near + patch.far) / 2, 1.0))
        depth = np.maximum(view.to_image(_rays(view.camera, xy) * surface[:, None])[:, 2], 1e-2)
    valid = inside & patch.smooth & (np.abs(depth - previous) <= 0.01 * depth)
    return _moved(view.cam_from_world.inverse(), rays * depth[:, None]), valid


@dataclass(frozen=True)
class DepthView:
    """A depth map, read, and the image that it belongs to.

    Args:
        path: the depth map's file.
        units: (H, W) uint16 depth along the optical axis as the file has it; 0 and 65535 are unknown.
        scale: units in a metre. Only the pixels that are needed are converted.
        camera: took the depth map.
        image_from_depth: maps points of the depth camera to the image's camera; None: they are one.
        image_camera: took the image.
        cam_from_world: pose of the image.
    """

    path: Path
    units: np.ndarray
    scale: float
    camera: Camera
    image_from_depth: Pose | None
    image_camera: Camera
    cam_from_world: Pose

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the depth map in pixels."""
        return self.units.shape[1], self.units.shape[0]

    def at(self, rows: np.ndarray) -> np.ndarray:
        """Depths in metres, float32, of pixels at flat indices y·W + x; 0 where unknown."""
        return _in_metres(self.units.take(rows), self.scale)

    @cached_property
    def span(self) -> tuple[float, float] | None:
        """Least and largest known depth in metres of the pixels in every fourth row and column; None without any."""
        metres = _in_metres(self.units[::4, ::4], self.scale)
        known = metres[metres > 0]
        return (float(known.min()), float(known.max())) if known.size else None

    def to_image(self, points: np.ndarray) -> np.ndarray:
        return points if self.image_from_depth is None else _moved(self.image_from_depth, points)

    def to_depth(self, points: np.ndarray) -> np.ndarray:
        return points if self._depth_from_image is None else _moved(self._depth_from_image, points)

    @cached_property
    def _depth_from_image(self) -> Pose | None:
        return None if self.image_from_depth is None else self.image_from_depth.inverse()


def read_depth_view(image: SceneImage) -> DepthView:
    """The depth map of an image with both cameras.

    Raises:
        FileNotFoundError, ValueError: if camera, pose or depth map is missing or broken.
    """
    depth, image_camera, cam_from_world = image.depth, image.camera, image.cam_from_world
    if depth is None or image_camera is None or cam_from_world is None:
        missing = "depth map" if depth is None else "camera" if image_camera is None else "pose"
        raise ValueError(f"{image.name} has no {missing}; points from depth need depth map, camera and pose")
    camera = depth.camera or image_camera
    view = DepthView(
        depth.path, _read_units(depth.path), depth.scale, camera, depth.image_from_depth, image_camera, cam_from_world
    )
    size = tuple(camera.size.round().int().tolist())
    if size != view.size:
        raise ValueError(
            f"depth map {depth.path} is {view.size[0]}×{view.size[1]} pixels, its camera says "
            f"{size[0]}×{size[1]}; expected them alike"
        )
    return view


@dataclass(frozen=True)
class _Patch:
    """Depths (N,) of the 3×3 pixels around points: that of the middle; the least and largest known. 0 is unknown."""

    middle: np.ndarray
    near: np.ndarray
    far: np.ndarray

    @property
    def any(self) -> np.ndarray:
        """Whether any depth is known (N,)."""
        return self.far > 0

    @property
    def smooth(self) -> np.ndarray:
        """Whether the known depths are of one surface (N,)."""
        return self.any & (self.far - self.near <= _LARGEST_STEP * self.far)


def _patch(view: DepthView, xy: np.ndarray) -> _Patch:
    """The patches around points (N, 2) in pixels of a depth map, which goes on as its border beyond it."""
    width, height = view.size
    x, y = (
        _limited(_limited(column, side).astype(np.intp) + _NEIGHBOURS, side)  # [3, N]
        for column, side in zip(xy.T, (width, height), strict=True)
    )
    units = view.units.take((y[:, None] * width + x).reshape(9, -1))
    units[units == _UNKNOWN] = 0
    near = (units - _ONE).min(0) + _ONE  # 0 less 1 is the largest
    scale = np.float32(1 / view.scale)
    return _Patch(units[4] * scale, near * scale, units.max(0) * scale)


def _limited(values: np.ndarray, side: int) -> np.ndarray:
    """Values within 0 … side − 1, in a third of the time of `np.clip`; 0 for what is no number."""
    return np.fmin(np.fmax(values, 0), side - 1)


# In numpy, since torch takes several times as long for so few numbers.


def _moved(pose: Pose, points: np.ndarray) -> np.ndarray:
    """`Pose.transform` for points (N, 3)."""
    return points @ pose.rotation.numpy().T + pose.translation.numpy()


def _rays(camera: Camera, xy: np.ndarray) -> np.ndarray:
    """Rays to z = 1 through pixels (N, 2), without `unproject`'s iteration where there is no distortion.

    Zero where no point with a depth, z > 0, is seen.
    """
    parameters = camera.parameters.numpy()
    if parameters[4:].any():
        rays, found = (each.numpy() for each in camera.unproject(torch.from_numpy(xy)))
        return np.where((found & (rays[:, 2] > 0))[:, None], rays / np.maximum(rays[:, 2:], NEAREST), 0)
    rays = np.ones((len(xy), 3))
    rays[:, :2] = (xy - parameters[2:4]) / parameters[:2]
    return rays


def _project(camera: Camera, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`Camera.project` for points (N, 3), at a fraction of the cost without distortion."""
    parameters = camera.parameters.numpy()
    if parameters[4:].any():
        xy, seen = camera.project(torch.from_numpy(points))
        return xy.numpy(), seen.numpy()
    fx, fy, cx, cy = parameters[:4].tolist()
    width, height = camera.size.tolist()
    depth = np.maximum(points[:, 2], NEAREST)
    x, y = points[:, 0] / depth * fx + cx, points[:, 1] / depth * fy + cy  # numpy is slow along an axis of two
    return np.stack([x, y], 1), (depth > NEAREST) & (x >= 0) & (x <= width) & (y >= 0) & (y <= height)


def _surface_points(
    view: DepthView, cells: int, generator: np.random.Generator, window: Window | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Points (N, 3) in the image's frame on smooth surfaces, at most one in each grid cell, and keypoints (N, 2)."""
    left, top, end, bottom = _in_depth_map(view, window)
    width, height = end - left, bottom - top
    rows = min(height, max(1, round((cells * height / width) ** 0.5)))
    columns = min(width, -(-cells // rows))
    waiting = np.arange(rows * columns)  # cells without a point so far
    chosen, depth = np.zeros((len(waiting), 2)), np.zeros(len(waiting))
    for draw in generator.random((_TRIES, len(waiting), 2)):
        down, right = np.divmod(waiting, columns)
        x = np.minimum(np.floor((right + draw[waiting, 0]) * (width / columns)), width - 1) + (left + 0.5)
        y = np.minimum(np.floor((down + draw[waiting, 1]) * (height / rows)), height - 1) + (top + 0.5)
        patch = _patch(view, np.stack([x, y], 1))
        good = (patch.middle > 0) & patch.smooth
        chosen[waiting[good]], depth[waiting[good]] = np.stack([x[good], y[good]], 1), patch.middle[good]
        waiting = waiting[~good]
    rays = _rays(view.camera, chosen[depth > 0])
    points = view.to_image(rays * depth[depth > 0, None])
    keypoints, inside = _project(view.image_camera, points)
    return points[inside], keypoints[inside]


def _in_depth_map(view: DepthView, window: Window | None) -> tuple[int, int, int, int]:
    """The part of the depth map, in whole pixels and never empty, that holds all that a window of the image sees."""
    width, height = view.size
    if window is None or view.span is None:
        return 0, 0, width, height
    left, top, right, bottom = window
    corners = np.array([[left, top], [right, top], [left, bottom], [right, bottom]], dtype=np.float64)
    rays = _rays(view.image_camera, corners)
    if not rays.any(1).all():  # a fisheye's corners see nothing
        return 0, 0, width, height
    points = np.concatenate([rays * depth for depth in view.span])
    xy, _ = _project(view.camera, view.to_depth(points))
    (left, top), (right, bottom) = xy.min(0), xy.max(0)
    left, top = (int(min(max(0, value), side - 1)) for value, side in ((left, width), (top, height)))
    return left, top, max(left + 1, min(width, ceil(right))), max(top + 1, min(height, ceil(bottom)))


def _observe(view: DepthView, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where an image sees points (N, 3) in its frame: keypoints (N, 2), and for each point, (N,), whether the depth
    map agrees that it is seen, and by how many tolerances the depths disagree."""
    keypoints, inside = _project(view.image_camera, points)
    in_depth = view.to_depth(points)
    xy, measured = _project(view.camera, in_depth)
    patch, depth = _patch(view, xy), in_depth[:, 2]
    # The surface's slope lets its depth vary between the neighbours.
    disagreement = np.maximum(0, np.maximum(patch.near - depth, depth - patch.far)) / _tolerance(depth)
    return keypoints, inside & measured & patch.smooth & (disagreement <= 1), disagreement


def _tolerance(depth: np.ndarray) -> np.ndarray:
    return _TOLERANCE[0] + _TOLERANCE[1] * np.abs(depth)


def _hidden(view: DepthView, points: np.ndarray) -> np.ndarray:
    """Which points (N, 3) in the image's frame, seen by the depth camera, are hidden from the image's camera, (N,)."""
    # The ray from a point to the image's camera is blocked where it passes behind a surface that the depth camera sees.
    if view.image_from_depth is None or len(points) == 0 or view.span is None:
        return np.zeros(len(points), dtype=bool)
    points = view.to_depth(points)
    eye = view.image_from_depth.center().numpy()
    stretch = np.maximum(points[:, 2] / view.span[0], 1)  # from the point's depth to that of the nearest surface
    parallax = float(view.camera.parameters[:2].max()) * np.linalg.norm(eye) / points[:, 2] * (stretch - 1)
    steps = int(np.clip(np.ceil(parallax.max() / _MARCH), 1, 64))
    # Even steps in inverse depth are even steps in the depth map.
    share = 1 / (1 + np.linspace(0, 1, steps + 1)[1:, None] * (stretch - 1))
    way = (eye + share[..., None] * (points - eye)).reshape(-1, 3)  # [steps · N, 3]
    xy, inside = _project(view.camera, way)
    width, height = view.size
    x, y = (_limited(column, side).astype(np.intp) for column, side in zip(xy.T, (width, height), strict=True))
    surface = view.at(y * width + x)
    depth = way[:, 2]
    blocked = inside & (surface > 0) & (surface < depth - _tolerance(depth))
    return blocked.reshape(steps, -1).any(0)


def _at_most(rows: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    return generator.choice(rows, count, replace=False) if len(rows) > count else rows
