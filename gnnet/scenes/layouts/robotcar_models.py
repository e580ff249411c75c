"""Reference images and 3D points of RobotCar Seasons' models: COLMAP text a location, or one merged NVM."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pycolmap
import torch
from rich.progress import track
from torch import Tensor

from gnnet.files import below, parse_numbers
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.scenes.pairing import stretches_by_length
from gnnet.scenes.problems import BadInput

REFERENCE = "overcast-reference"
CAMERAS = ("left", "rear", "right")
FARTHEST = 1e8  # metres; greater coordinates are damage
_CHUNK = 50_000  # lines of an NVM file that are parsed at once
_SAMPLE = 20_000  # observations that tell where an NVM file counts its pixels from
_CLEARLY = 0.8  # so much smaller must be the reprojection error of another origin than the image's corner
_POOR = 10.0  # pixels; a greater median reprojection error is warned of

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """A reference image: its pose, and rows (K,) of the scene's points with the pixels (K, 2) that see them."""

    place: str
    cam_from_world: Pose
    point_ids: np.ndarray
    keypoints: np.ndarray
    camera: Camera | None = None


def image_name(name: str, source: str) -> str:
    """`<condition>/<camera>/<timestamp>.jpg` of a name in one of the data set's files (`source` says which).

    Models say .png, may begin with ./, and may leave out the reference's folder.

    Raises:
        ValueError: if it leaves `images/`, or is of another form.
    """
    path = PurePosixPath(below(Path("images"), name.removeprefix("./"), source).as_posix()).relative_to("images")
    parts = path.parts if len(path.parts) > 2 else (REFERENCE, *path.parts)
    if len(parts) != 3 or parts[1] not in CAMERAS:
        raise ValueError(
            f"{source} names {name[:80]!r}; expected <condition>/{{{','.join(CAMERAS)}}}/<timestamp>.jpg below images/"
        )
    return str(PurePosixPath(*parts).with_suffix(".jpg"))


def _reference_name(name: str, source: str, taken) -> str:
    found = image_name(name, source)
    if condition_of(found) != REFERENCE or found in taken:
        raise ValueError(f"{source} names {name[:80]!r}; expected an image of {REFERENCE}, and each once")
    return found


def camera_of(name: str) -> str:
    """Which of the three cameras took an image."""
    return PurePosixPath(name).parent.name


def condition_of(name: str) -> str:
    """The condition, an image's first folder."""
    return PurePosixPath(name).parts[0]


def moment(name: str) -> tuple[str, str]:
    """Condition and timestamp, which the three cameras' images of one moment share."""
    return condition_of(name), PurePosixPath(name).stem


def by_time(name: str) -> tuple[str, str]:
    """Orders images as they were taken, the three cameras' images of one moment together."""
    return PurePosixPath(name).stem, name


def read_colmap_models(
    folders: list[Path], cameras: tuple[str, ...], bad: BadInput, progress: bool
) -> tuple[dict[str, Reference], Tensor]:
    """References by name and points (P, 3) of the models `NNN_aligned`; NNN is the place.

    A model that cannot be read is reported to `bad`, and its place is left out; so is an image whose
    name or pose is damaged.

    Raises:
        ValueError: as `bad` says.
    """
    references: dict[str, Reference] = {}
    points, count = [np.zeros((0, 3))], 0
    for folder in track(folders, "Reading models", disable=not progress, transient=True):
        with bad.skipping():
            found, xyz = _references_of(_read_model(folder), folder, cameras, bad, first_row=count)
            references |= found
            points.append(xyz)
            count += len(xyz)
    return references, torch.from_numpy(np.concatenate(points))


def _read_model(folder: Path) -> pycolmap.Reconstruction:
    """The text files that the data set has; of damaged binary ones pycolmap's reading may never end."""
    model = pycolmap.Reconstruction()
    try:
        model.read_text(str(folder))
    except Exception as error:  # pycolmap raises several types
        raise ValueError(
            f"{folder} cannot be read as a COLMAP model ({error}); expected cameras.txt, images.txt and "
            "points3D.txt (dataset.root)"
        ) from error
    if not len(model.images):
        raise ValueError(f"{folder} holds no image; expected a COLMAP model with poses in images.txt (dataset.root)")
    return model


def _references_of(
    model: pycolmap.Reconstruction, folder: Path, cameras: tuple[str, ...], bad: BadInput, first_row: int
) -> tuple[dict[str, Reference], np.ndarray]:
    """The model as arrays; only points that the wanted cameras see."""
    point_ids = np.array(sorted(model.point3D_ids()), np.int64)
    xyz = np.array([model.points3D[int(i)].xyz for i in point_ids], np.float64).reshape(-1, 3)  # no bulk access
    sound = (np.abs(xyz) < FARTHEST).all(-1)
    if not sound.all():
        bad.report(ValueError(f"{folder}: {np.sum(~sound)} of {len(xyz)} points are not finite, or not in metres"))
        point_ids, xyz = point_ids[sound], xyz[sound]
    place, found, seen = folder.name.removesuffix("_aligned"), {}, np.zeros(len(xyz), bool)
    intrinsics = {key: _camera(camera, folder, bad) for key, camera in model.cameras.items()}
    for image in model.images.values():
        with bad.skipping():
            source = f"{folder} image {image.image_id}"
            name = _reference_name(image.name, source, found)
            if camera_of(name) not in cameras or not image.has_pose or intrinsics[image.camera_id] is None:
                continue
            pose = _finite_pose(np.array(image.cam_from_world().matrix(), np.float64), source)
            rows, keypoints = _observations(image, point_ids)
            seen[rows] = True
            found[name] = Reference(place, pose, rows, keypoints, intrinsics[image.camera_id])
    row_of = first_row + np.cumsum(seen) - 1
    rows = {
        name: Reference(place, r.cam_from_world, row_of[r.point_ids], r.keypoints, r.camera)
        for name, r in sorted(found.items())
    }
    return rows, xyz[seen]


def _camera(camera: pycolmap.Camera, folder: Path, bad: BadInput) -> Camera | None:
    with bad.skipping():
        if not np.isfinite(camera.params).all() or camera.width < 1 or camera.height < 1:
            raise ValueError(
                f"{folder} camera {camera.camera_id} has {camera.width}×{camera.height} and {camera.params}; "
                "expected a size and finite parameters in pixels"
            )
        try:
            return Camera.from_colmap(
                camera.model.name, camera.width, camera.height, camera.params, dtype=torch.float64
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{folder} camera {camera.camera_id}: {error}") from None
    return None


def _finite_pose(matrix: np.ndarray, source: str) -> Pose:
    if not (np.abs(matrix) < FARTHEST).all():
        raise ValueError(f"{source} has a pose that is not finite, or not in metres; expected a rigid motion")
    return Pose.from_matrix(torch.from_numpy(matrix))


def _observations(image: pycolmap.Image, point_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (K,) of the sorted ids and keypoints (K, 2); what is not finite or has no point is left out."""
    observed = image.get_observation_points2D()
    ids = np.array([point.point3D_id for point in observed], np.int64)
    keypoints = np.array([point.xy for point in observed], np.float64).reshape(-1, 2)
    rows = np.searchsorted(point_ids, ids)
    known = np.isfinite(keypoints).all(-1) & (rows < len(point_ids))
    known[known] = point_ids[rows[known]] == ids[known]
    return rows[known], keypoints[known]


class _Measurements(NamedTuple):
    """Points (P, 3), and for each of M measurements the point's row, the image's index and the pixel (M, 2)."""

    points: np.ndarray
    point: np.ndarray
    image: np.ndarray
    xy: np.ndarray


def read_nvm(
    path: Path, cameras: dict[str, Camera], place_size: float, bad: BadInput
) -> tuple[dict[str, Reference], Tensor]:
    """References by name and points (P, 3) of a VisualSFM model; a place is a stretch of `place_size` metres.

    NVM has the camera's centre C, so t = -R·C. VisualSFM itself writes keypoints relative to the
    principal point or the image's centre; the data set's README says that (0, 0) is the image's
    top-left corner in its NVM models, as in COLMAP. So pixels are taken as they stand, unless another
    origin (the first pixel's centre, the image's centre, the principal point) reprojects the points
    clearly better, in the median over a sample of the measurements.

    Args:
        path: the file.
        cameras: intrinsics of each wanted camera, by its name; the file's own are approximate.
        place_size: metres.
        bad: damaged lines of images and points are reported to it.

    Raises:
        ValueError: if the file is not NVM_V3 or its counts are damaged, and as `bad` says.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
            if not next(lines, (1, ""))[1].startswith("NVM_V3"):
                raise ValueError(f"{path} does not begin with NVM_V3; expected a VisualSFM model (dataset.root)")
            names, poses = _nvm_images(lines, path, cameras, bad)
            wanted = np.array([name is not None for name in names], bool)
            seen = _nvm_points(lines, path, wanted, bad)
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); expected NVM_V3 with its images and points") from error
    order = sorted(np.flatnonzero(wanted).tolist(), key=lambda i: by_time(names[i]))
    intrinsics = [None if name is None else cameras[camera_of(name)] for name in names]
    xy = seen.xy + _origin(seen, poses, intrinsics, path)
    by_image = np.argsort(seen.image, kind="stable")
    ends = np.searchsorted(seen.image[by_image], np.arange(len(names) + 1))
    centers = np.array([poses[i].center().numpy() for i in order]).reshape(-1, 3)
    references = {}
    for i, place in zip(order, stretches_by_length(centers, place_size), strict=True):
        rows = by_image[ends[i] : ends[i + 1]]
        references[names[i]] = Reference(f"stretch{place:03d}", poses[i], seen.point[rows], xy[rows])
    return references, torch.from_numpy(seen.points)


def _nvm_count(lines: Iterator[tuple[int, str]], path: Path, what: str) -> int:
    number, line = next(lines, (0, ""))
    if not line.strip().isdecimal() or len(line) > 18:
        where = f"line {number} is {line.strip()[:40]!r}" if number else "it ends"
        raise ValueError(f"{path} is damaged: {where}; expected the number of {what} of an NVM_V3 model (dataset.root)")
    return int(line)


def _nvm_images(
    lines: Iterator[tuple[int, str]], path: Path, cameras: dict[str, Camera], bad: BadInput
) -> tuple[list[str | None], list[Pose | None]]:
    """Names and poses by index; None where an image is damaged or of another camera."""
    names: list[str | None] = []
    poses: list[Pose | None] = []
    count, taken = _nvm_count(lines, path, "images"), set()
    for number, line in islice(lines, count):
        name, pose, source = None, None, f"{path} line {number}"
        with bad.skipping():
            words, expected = line.split(), "name, focal length, quaternion w x y z, centre x y z"
            found = _reference_name(words[0], source, taken)
            if camera_of(found) in cameras:
                values = parse_numbers(words[2:9], 7, source, expected)
                length = np.linalg.norm(values[:4])
                if not 0.5 < length < 2 or np.abs(values[4:]).max() > FARTHEST:
                    raise ValueError(f"{source}: {line[:80]!r}; expected {expected}, in metres")
                taken.add(found)
                quaternion, center = torch.from_numpy(values[:4]), torch.from_numpy(values[4:])
                rotation = Pose.from_quaternion(quaternion, torch.zeros(3, dtype=torch.float64)).rotation
                name, pose = found, Pose(rotation, -(rotation @ center))
        names.append(name)
        poses.append(pose)
    if len(names) < count:
        raise ValueError(f"{path} is damaged: it ends after {len(names)} of {count} images (dataset.root)")
    return names, poses


def _nvm_points(lines: Iterator[tuple[int, str]], path: Path, wanted: np.ndarray, bad: BadInput) -> _Measurements:
    """What the wanted images see; points that none of them sees are left out."""
    count, done, found = _nvm_count(lines, path, "points"), 0, []
    none = _Measurements(np.zeros((0, 3)), *(np.zeros(0, np.int64),) * 2, np.zeros((0, 2)))
    while done < count:
        chunk = list(islice(lines, min(_CHUNK, count - done)))
        if not chunk:
            bad.report(ValueError(f"{path} is damaged: it ends after {done} of {count} points (dataset.root)"))
            break
        done += len(chunk)
        try:
            found.append(_parse_points([line for _, line in chunk], wanted))
        except ValueError:  # line by line, to name the broken ones
            for number, line in chunk:
                with bad.skipping():
                    try:
                        found.append(_parse_points([line], wanted))
                    except ValueError as error:
                        raise ValueError(f"{path} line {number}: {line[:80]!r}: {error}") from None
    first = np.cumsum([0] + [len(part.points) for part in found])[: len(found)]
    shifted = [part._replace(point=part.point + row) for part, row in zip(found, first, strict=True)]
    return _Measurements(*(np.concatenate(arrays) for arrays in zip(none, *shifted, strict=True)))


def _parse_points(lines: list[str], wanted: np.ndarray) -> _Measurements:
    """Lines `x y z r g b n` and n times `image feature x y`, all at once."""
    expected = "expected x y z r g b n, then n times: image, feature, x, y"
    words = [line.split() for line in lines]
    lengths = np.array([len(w) for w in words])
    if (lengths < 7).any():
        raise ValueError(f"too few numbers; {expected}")
    values = np.array(list(chain.from_iterable(words)), dtype=np.float64)
    starts, counts = np.cumsum(lengths) - lengths, (lengths - 7) // 4
    if (lengths != 7 + 4 * counts).any() or (values[starts + 6] != counts).any():
        raise ValueError(f"the number of measurements does not agree with what follows; {expected}")
    points = values[starts[:, None] + np.arange(3)]
    point = np.repeat(np.arange(len(lines)), counts)
    start = starts[point] + 7 + 4 * (np.arange(len(point)) - (np.cumsum(counts) - counts)[point])
    image, xy = values[start], values[start[:, None] + (2, 3)]
    if not ((image >= 0) & (image < len(wanted)) & (image == np.floor(image))).all():
        raise ValueError(f"an image's index is not of 0 to {len(wanted) - 1}; {expected}")
    if not (np.isfinite(xy).all() and (np.abs(points) < FARTHEST).all()):
        raise ValueError(f"not finite, or not in metres; {expected}")
    kept = wanted[image.astype(np.int64)]
    seen = np.zeros(len(lines), bool)
    seen[point[kept]] = True
    return _Measurements(points[seen], (np.cumsum(seen) - 1)[point[kept]], image[kept].astype(np.int64), xy[kept])


def _origin(
    seen: _Measurements, poses: list[Pose | None], intrinsics: list[Camera | None], path: Path
) -> np.ndarray:  # fmt: skip
    """What to add to each measurement (M, 2), so that it counts from its image's top-left corner."""
    if not len(seen.image):
        return np.zeros((0, 2))
    used, index = np.unique(seen.image, return_inverse=True)
    cameras = [intrinsics[i] for i in used]
    size, center = (np.array([v.numpy() for v in values]) for values in (
        [camera.size for camera in cameras], [camera.parameters[2:4] for camera in cameras]
    ))  # fmt: skip
    sample = np.unique(np.linspace(0, len(index) - 1, _SAMPLE).astype(np.int64))
    at = torch.from_numpy(index[sample])
    points = torch.from_numpy(seen.points[seen.point[sample]])[:, None]
    in_camera = Pose.stack([poses[i] for i in used])[at].transform(points)
    projected, valid = Camera.stack(cameras)[at].project(in_camera)
    offset = (projected[:, 0].numpy() - seen.xy[sample])[valid[:, 0].numpy()]
    if not len(offset):
        return np.zeros((len(index), 2))
    row = index[sample][valid[:, 0].numpy()]
    shifts = {
        "the image's corner": np.zeros_like(size),
        "the first pixel's centre": np.full_like(size, 0.5),
        "the image's centre": size / 2,
        "the principal point": center,
    }
    errors = {name: float(np.median(np.linalg.norm(offset - s[row], axis=-1))) for name, s in shifts.items()}
    corner = next(iter(errors))
    best = min(errors, key=errors.__getitem__)
    best = best if errors[best] < _CLEARLY * errors[corner] else corner
    if best != corner:
        _log.info("%s: keypoints count from %s (reprojection error in pixels: %s)", path, best, errors)
    if errors[best] > _POOR:
        _log.warning("%s: points reproject %.1f pixels (median) from their keypoints", path, errors[best])
    return shifts[best][index]
