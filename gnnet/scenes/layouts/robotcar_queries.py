"""Queries of RobotCar Seasons: their poses, some through the rig, and the places they belong to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from scipy.spatial import cKDTree

from gnnet.files import parse_numbers, read_lines, read_text
from gnnet.geometry.pose import Pose
from gnnet.scenes.formats.colmap import FARTHEST
from gnnet.scenes.formats.rigs import OnRig
from gnnet.scenes.layouts.robotcar_models import REFERENCE, camera_of, condition_of, image_name, moment
from gnnet.scenes.pairing import centers_of
from gnnet.scenes.problems import BadInput
from gnnet.scenes.scene import SceneImage

UNKNOWN = "unknown"  # place of an image whose place no file tells
_REACH = 50.0  # metres; if a model is left out, a query farther than this from all references belonged to it


@dataclass(frozen=True)
class Queries:
    """What the data set tells of its queries.

    Args:
        posed: place and `cam_from_world` by image name.
        locations: place by `moment`, as lists give it, for places that have references.
        lost: names of images with pose, and moments, that belong to a model that was left out.
        any_lost: whether a model was left out.
    """

    posed: dict[str, tuple[str, Pose]]
    locations: dict[tuple[str, str], str]
    lost: frozenset[str | tuple[str, str]]
    any_lost: bool

    def belongs_to_lost(self, name: str) -> bool:
        """Whether an image that is not in the scene is missing because its model was left out."""
        if self.any_lost and condition_of(name) == REFERENCE:
            return True
        return name in self.lost or moment(name) in self.lost


def read_queries(
    home: Path, cameras: tuple[str, ...], wanted: Callable[[str], bool], references: dict[str, SceneImage],
    lost: set[str], on_disk: frozenset[str], bad: BadInput,
) -> Queries:  # fmt: skip
    """Read the queries of robotcar_v2_train.txt; without references, none gets a pose.

    The poses in the file are of the rear camera. A left or right image of the same moment gets its pose
    by cam_from_rear = car_from_cam⁻¹ · car_from_rear, if it is on disk. A query is of the place that
    `queries_per_location` lists it in, else of that of the nearest reference.

    Args:
        wanted: whether an image of this name is, by its camera and its condition.
        lost: places whose model was left out.
        on_disk: names of the images that exist.
    """
    known = {reference.place for reference in references.values()}
    listed = _read_locations(home, bad)
    locations = {key: place for key, place in listed.items() if place in known}
    gone: set = {key for key, place in listed.items() if place in lost}
    poses = _query_poses(home, cameras, on_disk, bad) if references else {}
    poses = {name: pose for name, pose in poses.items() if wanted(name)}
    near = _nearest_places(poses, references, reach=_REACH if lost else np.inf)
    places = {name: place for name, place in near.items() if moment(name) not in gone}
    places |= {name: locations[moment(name)] for name in poses if moment(name) in locations}
    gone |= set(poses) - set(places)
    posed = {name: (place, poses[name]) for name, place in places.items()}
    return Queries(posed, locations, frozenset(gone), bool(lost))


def read_test_queries(home: Path, wanted: Callable[[str], bool], queries: Queries, bad: BadInput) -> dict[str, str]:
    """Places of the wanted images that robotcar_v2_test.txt names, `UNKNOWN` where no list tells them."""
    names = _read_names(home / "robotcar_v2_test.txt", bad)
    return {
        name: queries.locations.get(moment(name), UNKNOWN)
        for name in names
        if wanted(name) and not queries.belongs_to_lost(name)
    }


def _read_locations(home: Path, bad: BadInput) -> dict[tuple[str, str], str]:
    """Places `NNN` of the queries' moments, from lists whose file name ends with the location's number."""
    locations: dict[tuple[str, str], str] = {}
    for path in sorted((home / "3D-models" / "individual" / "queries_per_location").glob("*.txt")):
        numbers = re.findall(r"\d+", path.stem)
        if numbers:
            locations |= {moment(name): numbers[-1].zfill(3) for name in _read_names(path, bad)}
    return locations


def _read_names(path: Path, bad: BadInput) -> list[str]:
    """Image names of a list, one a line."""
    names: list[str] = []
    with bad.skipping():
        for _, words, source in read_lines(path, "image names, one a line (dataset.root)"):
            with bad.skipping():
                names.append(image_name(words[0], source))
    return names


def _query_poses(home: Path, cameras: tuple[str, ...], on_disk: frozenset[str], bad: BadInput) -> dict[str, Pose]:
    """Poses that the list gives, and those of the other cameras at the same moments that are on disk."""
    path, poses = home / "robotcar_v2_train.txt", {}
    if path.exists():
        with bad.skipping():
            poses = _read_poses(path, bad)
    rear = {name: pose for name, pose in poses.items() if camera_of(name) == "rear"}
    others = [camera for camera in cameras if camera != "rear"]
    if not poses or not others:
        return poses
    with bad.skipping():
        car_from_rear = _read_extrinsics(home, "rear")
        for camera in others:
            with bad.skipping():
                cam_from_rear = _read_extrinsics(home, camera).inverse() @ car_from_rear
                for name, rear_from_world in rear.items():
                    other = f"{condition_of(name)}/{camera}/{PurePosixPath(name).name}"
                    if other in on_disk:
                        poses.setdefault(other, cam_from_rear @ rear_from_world)
    return poses


def _read_poses(path: Path, bad: BadInput) -> dict[str, Pose]:
    """`cam_from_world` by name, from lines `name` and 16 numbers: camera to world, row by row."""
    poses: dict[str, Pose] = {}
    expected = "a name and 16 numbers (4×4 camera to world, row by row)"
    for _, words, source in read_lines(path, expected):
        with bad.skipping():
            name = image_name(words[0], source)
            if condition_of(name) == REFERENCE or name in poses:
                raise ValueError(f"{source} names {name}; expected a query, and each once")
            poses[name] = _rigid(parse_numbers(words[1:], 16, source, expected), source).inverse()
    return poses


def robotcar_rig(home: Path, names: Iterable[str]) -> dict[str, OnRig]:
    """By image name the moment and the camera's pose relative to the rear camera, from the extrinsics.

    Raises:
        FileNotFoundError, ValueError: if the extrinsics of a camera are missing or broken.
    """
    names = list(names)
    if not names:
        return {}
    rear_from_car = _read_extrinsics(home, "rear").inverse()
    cameras = sorted({camera_of(name) for name in names})
    poses = {c: (rear_from_car @ _read_extrinsics(home, c)).inverse() for c in cameras}
    return {name: OnRig("/".join(moment(name)), poses[camera_of(name)]) for name in names}


def _read_extrinsics(home: Path, camera: str) -> Pose:
    """`car_from_cam` of a camera."""
    path = home / "extrinsics" / f"{camera}_extrinsics.txt"
    expected = "a comma-separated 4×4, camera to car (needed for left and right queries; dataset.root)"
    words = read_text(path, expected).replace(",", " ").split()
    return _rigid(parse_numbers(words, 16, str(path), expected), str(path))


def _rigid(numbers: np.ndarray, source: str) -> Pose:
    """The rigid motion nearest to the 16 numbers of a 4×4, whose rotation may be off by rounding (1e-3)."""
    matrix = numbers.reshape(4, 4)
    rotation = matrix[:3, :3]
    rounding = np.abs(rotation @ rotation.T - np.eye(3)).max() if np.abs(rotation).max() < 2 else np.inf
    if rounding > 1e-3 or np.linalg.det(rotation) < 0 or np.abs(matrix[3] - (0, 0, 0, 1)).max() > 1e-3:
        raise ValueError(
            f"{source} is not a rigid motion; expected a rotation (orthonormal to 1e-3, no reflection) in a 4×4 "
            "whose last row is 0 0 0 1"
        )
    if np.abs(matrix[:3, 3]).max() > FARTHEST:
        raise ValueError(f"{source} has the position {matrix[:3, 3]}; expected metres")
    left, _, right = np.linalg.svd(rotation)
    return Pose(torch.from_numpy(left @ right), torch.from_numpy(matrix[:3, 3].copy()))


def _nearest_places(poses: dict[str, Pose], references: dict[str, SceneImage], reach: float) -> dict[str, str]:
    """The place of the nearest reference, for the poses that have one within `reach` metres."""
    if not poses:
        return {}
    centers = Pose.stack(list(poses.values())).center().numpy()
    distances, nearest = cKDTree(centers_of(references.values())).query(centers)
    places = [reference.place for reference in references.values()]
    found = zip(poses, distances.tolist(), nearest.tolist(), strict=True)
    return {name: places[i] for name, distance, i in found if distance <= reach}
