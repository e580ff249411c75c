"""A small sample of Extended CMU Seasons: rendered streets, in its layout and through its two distorted lenses."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose, so3_exp
from gnnet.toy.layout import cam_from_world, in_world, write_correspondences, write_image, write_lines
from gnnet.toy.light import WEATHERS, LitStreet, light_street, paint_street
from gnnet.toy.render import render_frame
from gnnet.toy.streets import Street, build_street, drive
from gnnet.toy.truth import Observations, Spread, match_image, observe_points, see_points, spread_points

# Width, height and OPENCV parameters as published; k1, k2, p1, p2 are the same at every size.
_SIZE = (1024, 768)
_PARAMETERS = {
    "c0": (868.993378, 866.063001, 525.942323, 420.042529, -0.399431, 0.188924, 0.000153, 0.000571),
    "c1": (873.382641, 876.489513, 529.324138, 397.272397, -0.397066, 0.181925, 0.000176, -0.000579),
}
REFERENCE = "2011-04-21"
# Day of each drive, and its weather.
DRIVES = {
    REFERENCE: "overcast-reference",
    "2010-10-01": "overcast-reference",
    "2010-12-21": "snow",
    "2010-09-01": "sun",
}
_WITHHELD = "2010-09-01"  # the poses of this drive are not released
_YAW = 12.0  # degrees by which c0 looks to the left of the car's axis, c1 to the right
_APART = 0.5  # metres between the cameras
_WIDER = 0.8  # factor of the focal length with which a camera without distortion sees as much in the corners


@dataclass
class _Drive:
    """One drive through a slice: for each camera, the names of its images and their `camera_from_place`."""

    day: str
    lit: LitStreet
    names: dict[str, list[str]] = field(default_factory=dict)
    from_place: dict[str, Pose] = field(default_factory=dict)


def sample_cameras(image_size: tuple[int, int]) -> dict[str, Camera]:
    """The published OPENCV cameras `c0` and `c1`, scaled to images of (width, height) pixels; float64."""
    factor = torch.tensor(image_size, dtype=torch.float64) / torch.tensor(_SIZE, dtype=torch.float64)
    return {
        name: Camera.from_colmap("OPENCV", *_SIZE, parameters, dtype=torch.float64).scale(factor)
        for name, parameters in _PARAMETERS.items()
    }


def write_cmu_sample(
    root: str | Path,
    *,
    slices: tuple[int, ...] = (2, 20),
    frames: int = 4,
    image_size: tuple[int, int] = (160, 120),
    seed: int = 0,
) -> Path:
    """Render one street for each slice, driven through by two cameras on four days; returns `root`.

    The same settings give the same files. As for half the queries of the dataset, the poses of one day are
    not released.

    Args:
        root: folder to write `cmu/images/…` and `cmu/correspondence/…` to.
        slices: numbers of the slices.
        frames: images of each camera on each drive, 1.25 m apart.
        image_size: width and height in pixels; the width is at least the height.
        seed: another seed gives other streets.

    Raises:
        ValueError: if a size or number is too small.
    """
    if not image_size[0] >= image_size[1] >= 32 or frames < 2:
        raise ValueError(
            f"the CMU sample has images of {image_size[0]}×{image_size[1]} and {frames} frames; "
            "expected a width of at least the height, a height of at least 32, and at least 2 frames"
        )
    home, cameras = Path(root) / "cmu", sample_cameras(image_size)
    for number in slices:
        _write_slice(home, number, cameras, frames, seed)
    lines = ["# camera model width height fx fy cx cy k1 k2 p1 p2; the images are distorted"]
    lines += [f"{name} OPENCV {_camera_line(camera)}" for name, camera in cameras.items()]
    write_lines(home / "images" / "intrinsics.txt", lines)
    return Path(root)


def _write_slice(home: Path, number: int, cameras: dict[str, Camera], frames: int, seed: int) -> None:
    street, folder = build_street(number, seed), home / "images" / f"slice{number}"
    focal = float(next(iter(cameras.values())).parameters[0])
    painted = paint_street(street, np.random.default_rng([seed, number, 1]), coarseness=160 / focal)
    drives = []
    for place, (day, weather) in enumerate(DRIVES.items()):
        rng = np.random.default_rng([seed, number, 2, place])
        lit = light_street(painted, WEATHERS[weather], rng)
        car = drive(frames=frames, reference_frames=frames, rng=rng)
        found = _Drive(day, lit)
        for c, (camera, model) in enumerate(cameras.items()):
            found.from_place[camera] = _mounted(c) @ car
            found.names[camera] = [_image_name(day, number, frame, c, first=100 * place) for frame in range(frames)]
            for frame, name in enumerate(found.names[camera]):
                path = folder / ("database" if day == REFERENCE else "query") / name
                write_image(path, render_frame(lit, model, found.from_place[camera][frame], rng))
        drives.append(found)
    reference, *queries = drives
    _write_model(folder / "sparse", cameras, reference)
    write_lines(folder / f"ground-truth-database-images-slice{number}.txt", _pose_lines(street, reference))
    for query in queries:
        # A drive whose poses are not released has an empty file.
        lines = [] if query.day == _WITHHELD else _pose_lines(street, query)
        write_lines(folder / "camera-poses" / f"slice{number}_{query.day}.txt", lines)
    names = [name for query in queries for camera_names in query.names.values() for name in camera_names]
    write_lines(folder / f"test-images-slice{number}.txt", names)
    _write_pairs(home, number, street, cameras, drives, np.random.default_rng([seed, number, 3]))


def _mounted(camera: int) -> Pose:
    """`camera_from_car` of camera 0 (left) or 1 (right)."""
    side = (-1.0, 1.0)[camera]
    rotation = so3_exp(torch.tensor([0.0, -side * np.radians(_YAW), 0.0], dtype=torch.float64))
    return Pose.from_center(rotation, torch.tensor([side * _APART / 2, 0.0, 0.0], dtype=torch.float64))


def _image_name(day: str, number: int, frame: int, camera: int, *, first: int) -> str:
    """`img_<number>_c<camera>_<microseconds>us.jpg`; the car drives 2 m in a second, c1 is 7 ms later than c0."""
    start = datetime.fromisoformat(day).replace(hour=15, minute=number, tzinfo=UTC)
    time = int(start.timestamp()) * 1_000_000 + frame * 600_000 + 7_000 * camera
    return f"img_{1000 * number + first + frame:05d}_c{camera}_{time}us.jpg"


def _camera_line(camera: Camera) -> str:
    width, height = (round(float(side)) for side in camera.size)
    return f"{width} {height} {' '.join(f'{p:.9g}' for p in camera.parameters.tolist())}"


def _pose_lines(street: Street, drive: _Drive) -> list[str]:
    """Lines `name qw qx qy qz cx cy cz`: the rotation `cam_from_world` and the camera's centre in metres."""
    lines = []
    for camera, names in drive.names.items():
        poses = cam_from_world(street, drive.from_place[camera])
        numbers = torch.cat([poses.quaternion(), poses.center()], -1).tolist()
        lines += [f"{name} {' '.join(f'{v:.9f}' for v in row)}" for name, row in zip(names, numbers, strict=True)]
    return lines


def _write_model(folder: Path, cameras: dict[str, Camera], drive: _Drive) -> None:
    """Write the reference drive as a COLMAP binary model; each camera has its own points."""
    from gnnet.colmap import pycolmap  # slow to load

    model, street = pycolmap.Reconstruction(), drive.lit.painted.street
    image_id, first_point = 1, 1
    for camera_id, (name, camera) in enumerate(cameras.items(), start=1):
        width, height = (round(float(side)) for side in camera.size)
        model.add_camera_with_trivial_rig(
            pycolmap.Camera(
                model="OPENCV", width=width, height=height, params=camera.parameters.numpy(), camera_id=camera_id
            )
        )
        seen = in_world(street, _observations(drive.lit, camera, drive.from_place[name]))
        poses = cam_from_world(street, drive.from_place[name])
        for frame, image in enumerate(drive.names[name]):
            model.add_image_with_trivial_frame(
                pycolmap.Image(
                    name=image, keypoints=seen.keypoints[frame], camera_id=camera_id, image_id=image_id + frame
                ),
                pycolmap.Rigid3d(poses[frame].matrix()[:3].numpy()),
            )
        for row, (point, track) in enumerate(zip(seen.points, seen.tracks(), strict=True)):
            if track:
                elements = [pycolmap.TrackElement(image_id + frame, position) for frame, position in track]
                found = pycolmap.Point3D(xyz=point, track=pycolmap.Track(elements))
                model.add_point3D_with_id(first_point + row, found)
        image_id, first_point = image_id + len(drive.names[name]), first_point + len(seen.points)
    folder.mkdir(parents=True, exist_ok=True)
    model.write_binary(folder)
    for name in ("rigs.bin", "frames.bin"):  # newer than the dataset
        (folder / name).unlink(missing_ok=True)


def _observations(lit: LitStreet, camera: Camera, from_place: Pose) -> Observations:
    """Points at corners of images without distortion, and where the images of the distorted camera see them."""
    street = lit.painted.street
    straight = torch.cat([_WIDER * camera.parameters[:2], camera.parameters[2:4], camera.parameters.new_zeros(4)])
    plain = Camera(camera.size, straight)
    views = [render_frame(lit, plain, from_place[i], np.random.default_rng(i)) for i in range(from_place.shape[0])]
    points = observe_points(street, plain, from_place, views).points
    rows, keypoints = [], []
    for i in range(from_place.shape[0]):
        xy, visible, _ = see_points(street.bounds(torch.float64), camera, from_place[i], torch.from_numpy(points))
        rows.append(visible.nonzero().squeeze(1).numpy())
        keypoints.append(xy[visible].numpy())
    return Observations(points, rows, keypoints)


def _write_pairs(
    home: Path, number: int, street: Street, cameras: dict[str, Camera], drives: list[_Drive], rng: np.random.Generator
) -> None:
    """Write the correspondences of each image with the nearest of the drive before, camera by camera."""
    for run, (before, after) in enumerate(pairwise(drives), start=1):
        for name, camera in cameras.items():
            poses, targets = before.from_place[name], after.from_place[name]
            for frame, image in enumerate(after.names[name]):
                near = int((poses.center() - targets[frame].center()).norm(dim=-1).argmin())
                spread = _inside(camera, spread_points(street, camera, poses[near], rng))
                [match] = match_image(street, camera, [spread], targets[frame], rng)
                if len(match.weight) > 0:
                    file = f"correspondence_slice{number}_run{run}_run{run + 1}_{name}{near}_{name}{frame}.mat"
                    name_a, name_b = f"slice{number}/{before.names[name][near]}", f"slice{number}/{image}"
                    write_correspondences(home / "correspondence" / file, name_a, name_b, *match)


def _inside(camera: Camera, spread: Spread) -> Spread:
    """Those points in the image; they are spread over a square that is as wide as the image."""
    inside = camera.contains(spread.xy)
    return Spread(*(values[inside] for values in spread))
