"""One slice of Extended CMU Seasons: its images with cameras and poses, and its 3D points."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from gnnet.files import Line, parse_numbers, read_lines
from gnnet.geometry.camera import Camera
from gnnet.scenes.formats.colmap import LARGEST, Model, pose_at_center, read_model
from gnnet.scenes.formats.images import image_files
from gnnet.scenes.problems import BadInput
from gnnet.scenes.scene import SceneImage

# Days as the time stamps tell them. The data set's README dates two of these drives otherwise: the
# reference 4 April 2011, and the overcast one 28 October 2010.
CONDITION_DAYS = {
    date(2010, 9, 1): "sunny-foliage",
    date(2010, 9, 15): "sunny-foliage",
    date(2010, 10, 1): "cloudy-foliage",
    date(2010, 10, 19): "sunny-foliage",
    date(2010, 10, 26): "overcast-mixed-foliage",
    date(2010, 11, 3): "low-sun-mixed-foliage",
    date(2010, 11, 12): "low-sun-mixed-foliage",
    date(2010, 11, 22): "cloudy-mixed-foliage",
    date(2010, 12, 21): "low-sun-no-foliage-snow",
    date(2011, 3, 4): "low-sun-foliage",
    date(2011, 4, 21): "sunny-no-foliage",  # the reference
    date(2011, 7, 28): "overcast-foliage",
}
_DAYS_OFF = 2  # time stamps are in UTC, and the README's days not exact
_PARTS = re.compile(r"(sunny|cloudy|overcast|low-sun)-(foliage|mixed-foliage|no-foliage)(?:-snow)?")
_NAME = re.compile(r"img_\d{1,9}_(c[01])_(\d{10,17})us\.jpg", re.ASCII)
_EXPECTED_NAME = "img_<5 digits>_c{0,1}_<microseconds>us.jpg"
_EXPECTED_POSE = "name qw qx qy qz cx cy cz, the rotation from world to camera and the camera's centre"
_EXPECTED_INTRINSICS = "c0 OPENCV width height fx fy cx cy k1 k2 p1 p2, and so for c1"
_AGREE = 1.0  # pixels by which the model's cameras may differ from intrinsics.txt


class ImageName(NamedTuple):
    """What an image's file name says: the camera, `c0` or `c1`, and the time in microseconds since 1970."""

    camera: str
    time: int


class Slice(NamedTuple):
    """Images by name, whose place is the slice, and the points (P, 3) in metres that they refer to by row."""

    number: int
    images: dict[str, SceneImage]
    points: np.ndarray


def parse_name(name: str, source: Path | str) -> ImageName:
    """Camera and time of an image, from its name in the file `source`.

    Raises:
        ValueError: if it is not an image's name of the data set.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{source} names {name[:80]!r}; expected {_EXPECTED_NAME}")
    return ImageName(match[1], int(match[2]))


def condition_of(time: int) -> str:
    """Condition of the drive at a time in microseconds, or its day (UTC) where the data set lists none."""
    day = datetime.fromtimestamp(time // 1_000_000, tz=UTC).date()
    nearest = min(CONDITION_DAYS, key=lambda known: abs(known - day))
    return CONDITION_DAYS[nearest] if abs(nearest - day).days <= _DAYS_OFF else day.isoformat()


def condition_groups(conditions: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Conditions by their light (`low-sun`) and by their foliage (`mixed-foliage`)."""
    groups: dict[str, tuple[str, ...]] = {}
    for condition in sorted(conditions):
        match = _PARTS.fullmatch(condition)
        for part in match.groups() if match else ():
            groups[part] = (*groups.get(part, ()), condition)
    return groups


def read_intrinsics(folder: Path, bad: BadInput) -> dict[str, Camera]:
    """Read cameras by name from `intrinsics.txt` in the folder of the slices or above it; none without such a file."""
    path, cameras = folder / "intrinsics.txt", {}
    for _, words, source in _lines(path if path.exists() else folder.parent / path.name, _EXPECTED_INTRINSICS, bad):
        with bad.skipping():
            if words[0] not in ("c0", "c1"):
                continue  # the file explains itself
            size, parameters = np.split(parse_numbers(words[2:], 10, source, _EXPECTED_INTRINSICS), [2])
            if words[1] != "OPENCV" or size.min() < 1 or size.max() > LARGEST or parameters[:2].min() <= 0:
                raise ValueError(f"{source} is {' '.join(words)[:120]!r}; expected {_EXPECTED_INTRINSICS}")
            width, height = map(int, size)
            cameras[words[0]] = Camera.from_colmap("OPENCV", width, height, parameters, dtype=torch.float64)
    return cameras


def read_slice(
    folder: Path, number: int, cameras: tuple[str, ...], intrinsics: dict[str, Camera], bad: BadInput
) -> Slice:
    """All images of the wanted cameras in `database` and `query`, with what the model and the lists know of them.

    For a camera that is not among the `intrinsics`, the model's are taken. `bad` gets a damaged model, a camera that
    is not known, broken lines, and images that are listed but not there.
    """
    home = folder / f"slice{number}"
    model = Model((), np.zeros((0, 3)))
    if (home / "sparse").exists():
        with bad.skipping():
            model = read_model(home / "sparse", bad)
    known = _with_model_cameras(intrinsics, model, home / "sparse", bad)
    images = _images_on_disk(home, cameras, known, bad)
    find = partial(_find, home, images, cameras)
    _add_listed_poses(images, partial(find, "database"), home / f"ground-truth-database-images-{home.name}.txt", bad)
    for path in sorted((home / "camera-poses").glob("*.txt")):
        _add_listed_poses(images, partial(find, "query"), path, bad)
    test_list = home / f"test-images-{home.name}.txt"
    for _, words, _ in _lines(test_list, "a query's name a line", bad):
        with bad.skipping():
            find("query", words[0], test_list)  # its pose may not be released
    for image in model.images:
        with bad.skipping():
            found = find("database", image.name, home / "sparse" / "images.bin")
            if found is not None:
                camera = intrinsics.get(parse_name(image.name, home).camera, image.camera)
                reference = image._replace(name=found.name, camera=camera)
                images[found.name] = reference.as_reference(found.path, condition=found.condition, place=found.place)
    return Slice(number, images, model.points)


def _with_model_cameras(intrinsics: dict[str, Camera], model: Model, source: Path, bad: BadInput) -> dict[str, Camera]:
    """Cameras by name, from `intrinsics.txt` and checked against the model, or else from the model."""
    known, checked = dict(intrinsics), set()
    for image in model.images:
        match = _NAME.fullmatch(image.name)
        if match is None or (match[1], id(image.camera)) in checked:
            continue
        checked.add((match[1], id(image.camera)))
        expected = known.setdefault(match[1], image.camera)
        difference = _difference(expected, image.camera)
        if match[1] in intrinsics and not difference <= _AGREE:
            bad.report(
                ValueError(
                    f"{source}: the camera of {image.name} is {_in_words(image.camera)}, and {match[1]} of "
                    f"intrinsics.txt is {_in_words(expected)}: {difference:.3g} pixels apart; expected at most "
                    f"{_AGREE:g}, so take the files of one release"
                )
            )
    return known


def _difference(a: Camera, b: Camera) -> float:
    """The largest distance in pixels at which two cameras see the rays of one's image; inf if that cannot be told."""
    if not torch.equal(a.size, b.size):
        return torch.inf
    steps = torch.linspace(0, 1, 9, dtype=a.size.dtype)
    xy = torch.cartesian_prod(steps * a.size[0], steps * a.size[1])
    distance = (b.project(a.unproject(xy)[0])[0] - xy).norm(dim=-1)
    return float(distance.nan_to_num(nan=torch.inf).max())


def _in_words(camera: Camera) -> str:
    return " ".join(f"{v:g}" for v in torch.cat([camera.size, camera.parameters]).tolist())


def _images_on_disk(
    home: Path, cameras: tuple[str, ...], known: dict[str, Camera], bad: BadInput
) -> dict[str, SceneImage]:
    images: dict[str, SceneImage] = {}
    unknown: dict[str, Path] = {}
    for kind in ("database", "query"):
        for path in image_files(home / kind) if (home / kind).is_dir() else []:
            match = _NAME.fullmatch(path.name)
            if match is None or match[1] not in cameras:
                continue
            if match[1] in known:
                name = f"{home.name}/{kind}/{path.name}"
                images[name] = SceneImage(name, path, condition_of(int(match[2])), home.name, known[match[1]])
            else:
                unknown.setdefault(match[1], path)
    for camera, path in unknown.items():
        bad.report(
            FileNotFoundError(
                f"neither {home.parent / 'intrinsics.txt'} nor {home / 'sparse'} tells the camera of {path.name} and "
                f"other images; expected in intrinsics.txt {_EXPECTED_INTRINSICS.replace('c0', camera, 1)}"
            )
        )
    return images


def _find(
    home: Path, images: dict[str, SceneImage], cameras: tuple[str, ...], kind: str, name: str, source: Path
) -> SceneImage | None:
    """The image of the slice that a file names, None if its camera is not wanted.

    Raises:
        ValueError, FileNotFoundError: no name of an image, or the image is not there.
    """
    full = f"{home.name}/{kind}/{name}"
    if parse_name(name, source).camera in cameras and full not in images:
        path = home / kind / name
        reason = "is of a camera that is not known" if path.is_file() else "does not exist"
        raise FileNotFoundError(f"image {path} {reason}, but {source} names it; unpack {home.name}.tar again")
    return images.get(full)


def _add_listed_poses(
    images: dict[str, SceneImage], find: Callable[[str, Path], SceneImage | None], path: Path, bad: BadInput
) -> None:
    """Add the poses that a file lists; the file may be missing or empty."""
    for _, words, source in _lines(path, _EXPECTED_POSE, bad):
        with bad.skipping():
            image = find(words[0], path)
            pose = pose_at_center(parse_numbers(words[1:], 7, source, _EXPECTED_POSE))
            if pose is None:
                raise ValueError(f"{source} has {' '.join(words[1:])[:80]}; expected {_EXPECTED_POSE}")
            if image is None:
                continue
            if image.cam_from_world is not None and not torch.allclose(image.cam_from_world.matrix(), pose.matrix()):
                raise ValueError(f"{source} gives {image.name} another pose than before; expected one pose an image")
            images[image.name] = replace(image, cam_from_world=pose, is_reference=image.path.parent.name == "database")


def _lines(path: Path, expected: str, bad: BadInput) -> list[Line]:
    """Lines of a list; none where there is no such file, or it is no text."""
    if path.exists():
        with bad.skipping():
            return read_lines(path, expected)
    return []
