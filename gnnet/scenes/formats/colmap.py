"""COLMAP's binary models, read within bounds: a truncated or damaged file ends with its name, and at once."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose

# Names and numbers of parameters, by COLMAP's number of the model.
_MODELS = (
    ("SIMPLE_PINHOLE", 3), ("PINHOLE", 4), ("SIMPLE_RADIAL", 4), ("RADIAL", 5), ("OPENCV", 8), ("OPENCV_FISHEYE", 8),
    ("FULL_OPENCV", 12), ("FOV", 5), ("SIMPLE_RADIAL_FISHEYE", 4), ("RADIAL_FISHEYE", 5), ("THIN_PRISM_FISHEYE", 12),
    ("RAD_TAN_THIN_PRISM_FISHEYE", 16),
)  # fmt: skip
_KEYPOINT = np.dtype([("xy", "<f8", 2), ("point", "<u8")])
_POINT = np.dtype([("id", "<u8"), ("xyz", "<f8", 3), ("rgb", "u1", 3), ("error", "<f8"), ("length", "<u8")])
_NO_POINT = np.uint64(2**64 - 1)
FARTHEST = 1e8  # metres; greater coordinates are damage
LARGEST = 100_000  # pixels of an image's side; more are damage


class ModelImage(NamedTuple):
    """An image of a model; it sees rows (K,) of the points at keypoints (K, 2), COLMAP pixels."""

    name: str
    camera: Camera
    cam_from_world: Pose
    point_rows: np.ndarray
    keypoints: np.ndarray


class BinaryModel(NamedTuple):
    """Images in the file's order, and points (P, 3) in metres, float64."""

    images: tuple[ModelImage, ...]
    points: np.ndarray


def read_binary_model(folder: Path) -> BinaryModel:
    """Read `cameras.bin`, `images.bin` and `points3D.bin`; what is not finite of points and keypoints is left out.

    Raises:
        FileNotFoundError: one of the three is missing.
        ValueError: naming the file, if it is damaged or a camera model is not supported.
    """
    cameras = _read_cameras(folder / "cameras.bin")
    ids, points = _read_points(folder / "points3D.bin")
    return BinaryModel(tuple(_read_images(folder / "images.bin", cameras, ids)), points)


class _File:
    """A binary file from its start to its end; reading past it raises a ValueError that names the file."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; expected a COLMAP model's cameras, images, points3D .bin")
        self.path, self.at = path, 0
        try:
            self.data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error}); expected a COLMAP binary model") from error

    def damaged(self, what: str) -> ValueError:
        return ValueError(
            f"{self.path} ({len(self.data)} bytes) is damaged: {what}; "
            "expected a COLMAP binary model, so unpack it again"
        )

    def skip(self, count: int) -> int:
        """Move over `count` bytes; the position before them."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise self.damaged(f"it ends within the {count} bytes from byte {start}")
        return start

    def numbers(self, layout: str) -> tuple:
        layout = f"<{layout}"
        return struct.unpack_from(layout, self.data, self.skip(struct.calcsize(layout)))

    def records(self, layout: np.dtype) -> np.ndarray:
        """As many records as the number before them says."""
        (count,) = self.numbers("Q")
        start = self.skip(count * layout.itemsize)
        return np.frombuffer(self.data, layout, count, start)

    def text(self) -> str:
        end = self.data.find(b"\0", self.at)
        if end < 0:
            raise self.damaged(f"the name at byte {self.at} does not end")
        text = self.data[self.at : end]
        self.at = end + 1
        return text.decode("utf-8", errors="replace")


def _read_cameras(path: Path) -> dict[int, Camera]:
    file, cameras = _File(path), {}
    for _ in range(file.numbers("Q")[0]):
        camera_id, model, width, height = file.numbers("IiQQ")
        if not 0 <= model < len(_MODELS):
            raise file.damaged(f"camera {camera_id} has model number {model}")
        name, count = _MODELS[model]
        parameters = file.numbers(f"{count}d")
        if not (np.isfinite(parameters).all() and 0 < width <= LARGEST and 0 < height <= LARGEST and parameters[0] > 0):
            raise file.damaged(f"camera {camera_id} is {name} {width} {height} {parameters}")
        try:
            cameras[camera_id] = Camera.from_colmap(name, width, height, parameters, dtype=torch.float64)
        except ValueError as error:
            raise ValueError(f"{path} camera {camera_id}: {error}") from None
    return cameras


def _read_points(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Ids (P,), ascending, and points (P, 3); a loop, as where a point begins follows from the last one's track."""
    file = _File(path)
    starts = []
    length_at = _POINT.fields["length"][1]
    for _ in range(file.numbers("Q")[0]):
        start = file.skip(_POINT.itemsize)
        starts.append(start)
        file.skip(8 * struct.unpack_from("<Q", file.data, start + length_at)[0])
    values = np.frombuffer(file.data, np.uint8)
    points = np.empty(len(starts), _POINT)
    for first in range(0, len(starts), 50_000):  # the indices of all would take ten times the file
        at = np.array(starts[first : first + 50_000], np.int64)[:, None] + np.arange(_POINT.itemsize)
        points[first : first + len(at)] = values[at].reshape(-1).view(_POINT)
    points = points[(np.abs(points["xyz"]) < FARTHEST).all(-1)]
    ids, first = np.unique(points["id"], return_index=True)
    return ids, points["xyz"][first].astype(np.float64)


def _read_images(path: Path, cameras: dict[int, Camera], ids: np.ndarray) -> Iterator[ModelImage]:
    file = _File(path)
    for _ in range(file.numbers("Q")[0]):
        image_id, *pose, camera_id = file.numbers("I7dI")
        name, keypoints = file.text(), file.records(_KEYPOINT)
        if camera_id not in cameras:
            raise file.damaged(f"image {image_id} has camera {camera_id}, which cameras.bin does not")
        row = np.searchsorted(ids, keypoints["point"])
        seen = (keypoints["point"] != _NO_POINT) & np.isfinite(keypoints["xy"]).all(-1) & (row < len(ids))
        seen[seen] = ids[row[seen]] == keypoints["point"][seen]
        quaternion, translation = np.array(pose[:4]), np.array(pose[4:])
        if not (is_rotation(quaternion) and (np.abs(translation) < FARTHEST).all()):
            raise file.damaged(f"image {image_id} has pose {pose}")
        yield ModelImage(
            name,
            cameras[camera_id],
            Pose.from_quaternion(torch.from_numpy(quaternion), torch.from_numpy(translation)),
            row[seen].astype(np.int64),
            keypoints["xy"][seen].astype(np.float64),
        )


def is_rotation(quaternion: np.ndarray) -> bool:
    """Whether four numbers are a quaternion of about unit length, and not damage."""
    return bool((np.abs(quaternion) < 2).all() and 0.5 < np.linalg.norm(quaternion) < 2)
