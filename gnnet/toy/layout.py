"""Files of the toy town, written as RobotCar Seasons and the cross-season correspondences have them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import torch

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.toy.streets import Street
from gnnet.toy.truth import Observations

_CAMERA_ID = 2  # left, rear and right are 1, 2 and 3 in the data set's models
_CAR_FROM_REAR = [[0, 0, -1, -1.2], [1, 0, 0, 0], [0, -1, 0, 1.4], [0, 0, 0, 1]]  # metres


@dataclass
class PlaceFiles:
    """What one place adds to the files of the whole town, as arrays, which pass between processes.

    Matrices are `cam_from_world` (R, 4, 4); points (P, 3) are of the world; for every reference the
    rows (K,) of the points it sees and the keypoints (K, 2).
    """

    place: int
    reference_names: list[str] = field(default_factory=list)
    references: np.ndarray = field(default_factory=lambda: np.zeros((0, 4, 4)))
    points: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))
    rows: list[np.ndarray] = field(default_factory=list)
    keypoints: list[np.ndarray] = field(default_factory=list)
    query_names: list[str] = field(default_factory=list)
    queries: np.ndarray = field(default_factory=lambda: np.zeros((0, 4, 4)))

    def add_references(self, street: Street, names: list[str], camera_from_place: Pose, seen: Observations) -> None:
        """Add the references' poses and what they see."""
        self.reference_names = names
        self.references = _from_world(street, camera_from_place)
        self.points = street.world_from_place.transform(seen.points).numpy()
        self.rows, self.keypoints = seen.rows, seen.keypoints

    def add_queries(self, street: Street, names: list[str], camera_from_place: Pose) -> None:
        """Add one drive's poses."""
        self.query_names += names
        self.queries = np.concatenate([self.queries, _from_world(street, camera_from_place)])

    def tracks(self) -> list[list[tuple[int, int]]]:
        """For each point the references that see it, and where in their lists of keypoints."""
        tracks: list[list[tuple[int, int]]] = [[] for _ in range(len(self.points))]
        for image, rows in enumerate(self.rows):
            for position, row in enumerate(rows.tolist()):
                tracks[row].append((image, position))
        return tracks


def _from_world(street: Street, camera_from_place: Pose) -> np.ndarray:
    return (camera_from_place @ street.world_from_place.inverse()).matrix().numpy()


def image_name(condition: str, number: int, place: int, frame: int) -> str:
    """`<condition>/rear/<timestamp>.jpg`; timestamps in microseconds rise along every drive."""
    timestamp = 1417176458000000 + number * 10**12 + place * 10**8 + frame * 250_000
    return f"{condition}/rear/{timestamp}.jpg"


def correspondence_path(home: Path, condition: str, number: int) -> Path:
    return home / "correspondence" / f"correspondence_run1_overcast-reference_run2_{condition}_{number}.mat"


def write_correspondences(path: Path, name_a: str, name_b: str, xy_a, xy_b, weight) -> None:
    """A MATLAB v7.3 file; points (N, 2) COLMAP pixels are written from the first pixel's centre, weights as −log."""
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
    """Intrinsics, extrinsics, 3D models and query poses."""
    fx, fy, cx, cy = (float(p) for p in camera.parameters[:4])
    _write(home / "intrinsics" / "rear_intrinsics.txt", [f"fx {fx}", f"fy {fy}", f"cx {cx}", f"cy {cy}"])
    _write(home / "extrinsics" / "rear_extrinsics.txt", [",".join(f"{v:.6f}" for v in row) for row in _CAR_FROM_REAR])
    models = home / "3D-models" / "individual" / "colmap_reconstructions"
    for files in places:
        _write_colmap(models / f"{files.place + 1:03d}_aligned", files, camera)
    _write_nvm(home / "3D-models" / "all-merged" / "all.nvm", places, fx)
    lines = []
    for files in places:
        for name, cam_from_world in zip(files.query_names, files.queries, strict=True):
            lines.append(f"{name} {_numbers(np.linalg.inv(cam_from_world).flatten())}")
    _write(home / "robotcar_v2_train.txt", lines)
    _write(home / "robotcar_v2_test.txt", [line.split()[0] for line in lines])


def _write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def _numbers(values) -> str:
    return " ".join(f"{float(v):.12g}" for v in values)


def _model_name(name: str) -> str:
    return name.removesuffix(".jpg") + ".png"  # as the data set's models have it


def _write_colmap(folder: Path, files: PlaceFiles, camera: Camera) -> None:
    width, height = (int(s) for s in camera.size)
    _write(folder / "cameras.txt", [f"{_CAMERA_ID} PINHOLE {width} {height} {_numbers(camera.parameters[:4])}"])
    poses, lines = Pose.from_matrix(torch.from_numpy(files.references)), []
    quaternions = poses.quaternion()
    for index, name in enumerate(files.reference_names):
        pose = f"{_numbers(quaternions[index])} {_numbers(poses.translation[index])}"
        lines.append(f"{index + 1} {pose} {_CAMERA_ID} {_model_name(name)}")
        pixels, rows = files.keypoints[index].tolist(), files.rows[index].tolist()
        lines.append(" ".join(f"{x:.9g} {y:.9g} {row + 1}" for (x, y), row in zip(pixels, rows, strict=True)))
    _write(folder / "images.txt", lines)
    lines = []
    for row, (point, track) in enumerate(zip(files.points.tolist(), files.tracks(), strict=True)):
        seen = " ".join(f"{image + 1} {position}" for image, position in track)
        if seen:
            lines.append(f"{row + 1} {_numbers(point)} 128 128 128 0 {seen}")
    _write(folder / "points3D.txt", lines)


def _write_nvm(path: Path, places: list[PlaceFiles], focal: float) -> None:
    """One model of all places; NVM has the camera's centre where COLMAP has the translation."""
    images, points = [], []
    for files in places:
        first, poses = len(images), Pose.from_matrix(torch.from_numpy(files.references))
        quaternions, centers = poses.quaternion(), poses.center()
        for index, name in enumerate(files.reference_names):
            pose = f"{_numbers(quaternions[index])} {_numbers(centers[index])}"
            images.append(f"./{_model_name(name)} {focal:.6f} {pose} 0 0")
        for point, track in zip(files.points.tolist(), files.tracks(), strict=True):
            seen = [f"{first + image} {at} {_numbers(files.keypoints[image][at])}" for image, at in track]
            if seen:
                points.append(f"{_numbers(point)} 128 128 128 {len(seen)} {' '.join(seen)}")
    _write(path, ["NVM_V3", "", str(len(images)), *images, "", str(len(points)), *points, "", "0"])
