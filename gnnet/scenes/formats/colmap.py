"""COLMAP's sparse models: binary files are read here, and text files are turned into binary ones before.

They are not read by pycolmap, as it fills the memory, or never comes back, where a count in them is damaged.
"""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from gnnet.geometry.camera import COLMAP_MODELS, Camera
from gnnet.geometry.pose import Pose
from gnnet.scenes.formats.colmap_text import write_as_binary
from gnnet.scenes.problems import BadInput
from gnnet.scenes.values import SceneImage

_KEYPOINT = np.dtype([("xy", "<f8", 2), ("point", "<u8")])
_POINT = np.dtype([("id", "<u8"), ("xyz", "<f8", 3), ("rgb", "u1", 3), ("error", "<f8"), ("length", "<u8")])
_LENGTH_AT = _POINT.itemsize - 8  # byte of the track's length in a point
_NO_POINT = np.uint64(2**64 - 1)
FARTHEST = 1e11  # greater coordinates are damage, in metres as in millimetres from the middle of the earth
LARGEST = 100_000  # pixels of an image's side; more are damage


class ModelImage(NamedTuple):
    """An image of a model.

    Args:
        name: as it stands in the file.
        camera: unbatched, float64.
        cam_from_world: unbatched, float64, metres.
        point_rows: (K,) int64, rows of the model's points that the image observes.
        keypoints: (K, 2) float64, where it observes them, COLMAP pixels.
    """

    name: str
    camera: Camera
    cam_from_world: Pose
    point_rows: np.ndarray
    keypoints: np.ndarray

    def as_reference(self, path: Path, *, condition: str = "reference", place: str = "") -> SceneImage:
        """The scene's image of this name, whose file is at `path`."""
        return SceneImage(
            self.name, path, condition, place, self.camera, self.cam_from_world,
            is_reference=True, point_ids=self.point_rows, keypoints=self.keypoints,
        )  # fmt: skip


class Model(NamedTuple):
    """Images in the file's order, points (P, 3) in metres, float64, and the number of damaged points left out."""

    images: tuple[ModelImage, ...]
    points: np.ndarray
    points_left_out: int = 0


def read_model(folder: Path, bad: BadInput) -> Model:
    """Read `cameras`, `images` and `points3D`, all `.bin` or all `.txt`.

    Points that are not finite or beyond `FARTHEST`, and keypoints that are not finite, are left out.

    Args:
        folder: of the three files.
        bad: gets a camera or an image whose numbers are damaged; such cameras go with their images.

    Raises:
        FileNotFoundError: if one of the three files is missing.
        ValueError: naming the file, if it is cut off or no such file, and as `bad` says.
    """
    text = (folder / "images.txt").is_file() and not (folder / "images.bin").is_file()
    if any(folder.glob("*.bin")) and not text:  # some file of another kind may end so, too
        return _read_binary(folder, folder, ".bin", bad)
    with tempfile.TemporaryDirectory() as binary:
        models = {name: (number, count) for number, (name, count) in enumerate(COLMAP_MODELS)}
        write_as_binary(folder, Path(binary), models, bad)
        return _read_binary(Path(binary), folder, ".txt", bad)


def _read_binary(folder: Path, told: Path, suffix: str, bad: BadInput) -> Model:
    """Read a binary model; messages tell of the files in the folder `told`, which end with `suffix`."""
    cameras, points, images = (
        _File(folder / f"{name}.bin", told / f"{name}{suffix}") for name in ("cameras", "points3D", "images")
    )
    known = _read_cameras(cameras, bad)
    ids, xyz, left_out = _read_points(points)
    return Model(_read_images(images, known, ids, bad), xyz, left_out)


class _File:
    """A binary file, read from its start to its end; reading past the end raises a ValueError that names it.

    Args:
        path: the file.
        told: its name in messages.
    """

    def __init__(self, path: Path, told: Path) -> None:
        self.path, self.at = told, 0
        if not path.is_file():
            raise FileNotFoundError(f"{told} does not exist; expected a COLMAP model's cameras, images and points3D")
        try:
            self.data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{told} cannot be read ({error}); expected a COLMAP model") from error

    def damaged(self, what: str) -> ValueError:
        return ValueError(
            f"{self.path} ({len(self.data)} bytes) is damaged: {what}; expected a COLMAP model, so unpack it again"
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
        return os.fsdecode(text)  # as the name of a file, which may be no text


def _read_cameras(file: _File, bad: BadInput) -> dict[int, Camera | None]:
    """Cameras by id; None where the camera is damaged."""
    cameras: dict[int, Camera | None] = {}
    for _ in range(file.numbers("Q")[0]):
        camera_id, model, width, height = file.numbers("IiQQ")
        if not 0 <= model < len(COLMAP_MODELS):  # where its parameters end is not known
            raise file.damaged(
                f"camera {camera_id} has model number {model}, {COLMAP_MODELS[-1][0]}, the last that is known, "
                f"{len(COLMAP_MODELS) - 1}"
            )
        name, count = COLMAP_MODELS[model]
        parameters = file.numbers(f"{count}d")
        cameras[camera_id] = None
        with bad.skipping():
            sides = 0 < width <= LARGEST and 0 < height <= LARGEST
            if not (sides and np.isfinite(parameters).all() and parameters[0] > 0):
                raise file.damaged(f"camera {camera_id} is {name} {width} {height} {parameters}")
            cameras[camera_id] = Camera.from_colmap(name, width, height, parameters, dtype=torch.float64)
    return cameras


def _read_points(file: _File) -> tuple[np.ndarray, np.ndarray, int]:
    """Ids (P,), ascending, points (P, 3), and the number of points that were left out."""
    starts = []
    for _ in range(file.numbers("Q")[0]):  # a loop, as where a point begins follows from the track of the last one
        start = file.skip(_POINT.itemsize)
        starts.append(start)
        file.skip(8 * struct.unpack_from("<Q", file.data, start + _LENGTH_AT)[0])
    values = np.frombuffer(file.data, np.uint8)
    points = np.empty(len(starts), _POINT)
    for first in range(0, len(starts), 50_000):  # the indices of all would take ten times the file
        at = np.array(starts[first : first + 50_000], np.int64)[:, None] + np.arange(_POINT.itemsize)
        points[first : first + len(at)] = values[at].reshape(-1).view(_POINT)
    sound = points[(np.abs(points["xyz"]) < FARTHEST).all(-1)]
    ids, unique = np.unique(sound["id"], return_index=True)
    return ids, sound["xyz"][unique].astype(np.float64), len(points) - len(sound)


def _read_images(
    file: _File, cameras: dict[int, Camera | None], ids: np.ndarray, bad: BadInput
) -> tuple[ModelImage, ...]:
    images: list[ModelImage] = []
    for _ in range(file.numbers("Q")[0]):
        image_id, *pose, camera_id = file.numbers("I7dI")
        name, keypoints = file.text(), file.records(_KEYPOINT)
        row = np.searchsorted(ids, keypoints["point"])
        seen = (keypoints["point"] != _NO_POINT) & np.isfinite(keypoints["xy"]).all(-1) & (row < len(ids))
        seen[seen] = ids[row[seen]] == keypoints["point"][seen]
        quaternion, translation = np.array(pose[:4]), np.array(pose[4:])
        with bad.skipping():
            if camera_id not in cameras:
                raise file.damaged(f"image {image_id} has camera {camera_id}, which the file of cameras does not")
            if not (_is_rotation(quaternion) and (np.abs(translation) < FARTHEST).all()):
                raise file.damaged(f"image {image_id} has pose {pose}")
            camera = cameras[camera_id]
            if camera is not None:
                cam_from_world = Pose.from_quaternion(torch.from_numpy(quaternion), torch.from_numpy(translation))
                xy = keypoints["xy"][seen].astype(np.float64)
                images.append(ModelImage(name, camera, cam_from_world, row[seen].astype(np.int64), xy))
    return tuple(images)


def _is_rotation(quaternion: np.ndarray) -> bool:
    """Whether four numbers are a quaternion of about unit length, and not damage."""
    return bool((np.abs(quaternion) < 2).all() and 0.5 < np.linalg.norm(quaternion) < 2)


def pose_at_center(numbers: np.ndarray) -> Pose | None:
    """`cam_from_world` of a quaternion w x y z and the camera's centre in metres (7,); None if they are damage."""
    if not _is_rotation(numbers[:4]) or np.abs(numbers[4:]).max() > FARTHEST:
        return None
    quaternion, center = torch.from_numpy(numbers[:4]), torch.from_numpy(numbers[4:])
    return Pose.from_center(Pose.from_quaternion(quaternion, center).rotation, center)
