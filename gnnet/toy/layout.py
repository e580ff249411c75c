"""Files of the toy town, in the formats of RobotCar Seasons and of the cross-season correspondences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.toy.streets import Street
from gnnet.toy.truth import Observations

_CAMERA_ID = 2  # in the models of the dataset, left, rear and right are 1, 2 and 3
_CAR_FROM_REAR: list[list[float]] = [[0, 0, -1, -1.2], [1, 0, 0, 0], [0, -1, 0, 1.4], [0, 0, 0, 1]]  # metres
_NOTHING_SEEN = Observations(np.zeros((0, 3)), [], [])


@dataclass
class PlaceFiles:
    """What one place adds to the files of the whole town; arrays, because these pass between processes cheaply.

    Args:
        place: number of the place.
        reference_names: image names of the references.
        references: (R, 4, 4) their `cam_from_world`.
        seen: 3D points in the world, and where the references see them.
        query_names: image names in all other conditions.
        queries: (Q, 4, 4) their `cam_from_world`.
    """

    place: int
    reference_names: list[str] = field(default_factory=list)
    references: np.ndarray = field(default_factory=lambda: np.zeros((0, 4, 4)))
    seen: Observations = _NOTHING_SEEN
    query_names: list[str] = field(default_factory=list)
    queries: np.ndarray = field(default_factory=lambda: np.zeros((0, 4, 4)))

    def add_references(self, street: Street, names: list[str], camera_from_place: Pose, seen: Observations) -> None:
        """Add the references; the points of `seen` are in the place's frame."""
        self.reference_names = names
        self.references = cam_from_world(street, camera_from_place).matrix().numpy()
        self.seen = in_world(street, seen)

    def add_queries(self, street: Street, names: list[str], camera_from_place: Pose) -> None:
        """Add the images of one drive."""
        self.query_names += names
        self.queries = np.concatenate([self.queries, cam_from_world(street, camera_from_place).matrix().numpy()])


def cam_from_world(street: Street, camera_from_place: Pose) -> Pose:
    """Poses in the world of cameras in the place's frame."""
    return camera_from_place @ street.world_from_place.inverse()


def in_world(street: Street, seen: Observations) -> Observations:
    """The same observations, with the points in the world instead of the place's frame."""
    return seen._replace(points=street.world_from_place.transform(torch.from_numpy(seen.points)).numpy())


def image_name(condition: str, number: int, place: int, frame: int) -> str:
    """`<condition>/rear/<timestamp>.jpg`; timestamps are microseconds and rise along each drive.

    Args:
        number: number of the condition, which keeps the timestamps of the drives apart.
    """
    timestamp = 1417176458000000 + number * 10**12 + place * 10**8 + frame * 250_000
    return f"{condition}/rear/{timestamp}.jpg"


def correspondence_path(home: Path, condition: str, number: int) -> Path:
    """File of the pair `number` of images in the condition; `home` is the dataset's folder."""
    return home / "correspondence" / f"correspondence_run1_overcast-reference_run2_{condition}_{number}.mat"


def write_image(path: Path, image: np.ndarray) -> None:
    """Write an image (H, W, 3) uint8 as JPEG of high quality."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=95, subsampling=0)


def write_depth(path: Path, depth: np.ndarray) -> None:
    """Write depths (H, W) in metres as float32, to the path with the suffix `.npy`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path.with_suffix(".npy"), depth.astype(np.float32))


def write_correspondences(
    path: Path, name_a: str, name_b: str, xy_a: np.ndarray, xy_b: np.ndarray, weight: np.ndarray
) -> None:
    """Write correspondences of two images as the dataset stores them, a MATLAB v7.3 file.

    Args:
        name_a, name_b: image names.
        xy_a, xy_b: (N, 2) pixels; the file counts from the first pixel's centre, half a pixel less.
        weight: (N,) in (0, 1]; the file holds −log of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w", userblock_size=512) as file:
        for key, text in (("im_i_path", name_a), ("im_j_path", name_b)):
            dataset = file.create_dataset(key, data=np.frombuffer(text.encode("utf-16-le"), "<u2")[:, None])
            dataset.attrs["MATLAB_class"] = np.bytes_("char")
            dataset.attrs["MATLAB_int_decode"] = np.int32(2)
        for key, values in (("pt_i", xy_a - 0.5), ("pt_j", xy_b - 0.5), ("dist_from_center", -np.log(weight)[:, None])):
            dataset = file.create_dataset(key, data=values.astype(np.float64))
            dataset.attrs["MATLAB_class"] = np.bytes_("double")
    header = b"MATLAB 7.3 MAT-file, written by gnnet".ljust(124) + b"\x00\x02IM"
    with open(path, "r+b") as file:
        file.write(header)


def write_town(home: Path, places: list[PlaceFiles], camera: Camera) -> None:
    """Write intrinsics, extrinsics, 3D models and query poses of all places below the dataset's folder `home`."""
    fx, fy, cx, cy = (float(p) for p in camera.parameters[:4])
    write_lines(home / "intrinsics" / "rear_intrinsics.txt", [f"fx {fx}", f"fy {fy}", f"cx {cx}", f"cy {cy}"])
    car_from_rear = [",".join(f"{v:.6f}" for v in row) for row in _CAR_FROM_REAR]
    write_lines(home / "extrinsics" / "rear_extrinsics.txt", car_from_rear)
    models = home / "3D-models" / "individual" / "colmap_reconstructions"
    for files in places:
        names = [_model_name(name) for name in files.reference_names]
        write_colmap(models / f"{files.place + 1:03d}_aligned", names, files.references, files.seen, camera)
    _write_nvm(home / "3D-models" / "all-merged" / "all.nvm", places, fx)
    lines = []
    for files in places:
        for name, pose in zip(files.query_names, files.queries, strict=True):
            lines.append(f"{name} {_numbers(np.linalg.inv(pose).flatten())}")
    write_lines(home / "robotcar_v2_train.txt", lines)
    write_lines(home / "robotcar_v2_test.txt", [line.split()[0] for line in lines])


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write a text file, whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def _numbers(values: Iterable[float] | np.ndarray | Tensor) -> str:
    return " ".join(f"{float(v):.12g}" for v in values)


def _model_name(name: str) -> str:
    return name.removesuffix(".jpg") + ".png"  # the models of the dataset say .png, its images are .jpg


def write_colmap(
    folder: Path, names: Sequence[str], cam_from_world: np.ndarray, seen: Observations, camera: Camera
) -> None:
    """Write a COLMAP model as text; the points of `seen`, and the poses (R, 4, 4), are of the world."""
    model, width, height, parameters = camera.to_colmap()
    write_lines(folder / "cameras.txt", [f"{_CAMERA_ID} {model} {width} {height} {_numbers(parameters)}"])
    poses, lines = Pose.from_matrix(torch.from_numpy(cam_from_world)), []
    quaternions = poses.quaternion()
    for index, name in enumerate(names):
        pose = f"{_numbers(quaternions[index])} {_numbers(poses.translation[index])}"
        lines.append(f"{index + 1} {pose} {_CAMERA_ID} {name}")
        pixels, rows = seen.keypoints[index].tolist(), seen.rows[index].tolist()
        lines.append(" ".join(f"{x:.9g} {y:.9g} {row + 1}" for (x, y), row in zip(pixels, rows, strict=True)))
    write_lines(folder / "images.txt", lines)
    lines = []
    for row, (point, track) in enumerate(zip(seen.points.tolist(), seen.tracks(), strict=True)):
        where = " ".join(f"{image + 1} {position}" for image, position in track)
        if where:
            lines.append(f"{row + 1} {_numbers(point)} 128 128 128 0 {where}")
    write_lines(folder / "points3D.txt", lines)


def _write_nvm(path: Path, places: list[PlaceFiles], focal: float) -> None:
    """Write one model of all places; NVM has the camera's centre where COLMAP has the translation."""
    images: list[str] = []
    points: list[str] = []
    for files in places:
        first, poses = len(images), Pose.from_matrix(torch.from_numpy(files.references))
        quaternions, centers = poses.quaternion(), poses.center()
        for index, name in enumerate(files.reference_names):
            pose = f"{_numbers(quaternions[index])} {_numbers(centers[index])}"
            images.append(f"./{_model_name(name)} {focal:.6f} {pose} 0 0")
        for point, track in zip(files.seen.points.tolist(), files.seen.tracks(), strict=True):
            seen = [f"{first + image} {at} {_numbers(files.seen.keypoints[image][at])}" for image, at in track]
            if seen:
                points.append(f"{_numbers(point)} 128 128 128 {len(seen)} {' '.join(seen)}")
    write_lines(path, ["NVM_V3", "", str(len(images)), *images, "", str(len(points)), *points, "", "0"])
