"""VisualSFM's NVM files, of which the third version is read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from gnnet.files import parse_numbers, text_encoding
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.sampling import evenly
from gnnet.scenes.formats.colmap import FARTHEST, Model, ModelImage, pose_at_center
from gnnet.scenes.problems import BadInput

_CHUNK = 50_000  # lines that are parsed at once
_SAMPLE = 20_000  # measurements that tell where a file counts its pixels from
_CLEARLY = 0.8  # so much smaller must be the reprojection error of another origin than of the image's corner
_POOR = 10.0  # pixels; a greater median reprojection error is warned of
_IMAGE = "name, focal length, quaternion w x y z, centre x y z"
_POINT = "x y z r g b n, then n times: image, feature, x, y"

_log = logging.getLogger(__name__)
_Lines = Iterator[tuple[int, str]]


class _Measurements(NamedTuple):
    """Points (P, 3), and for each of M measurements the point's row, the image's index and the pixel (M, 2)."""

    points: np.ndarray
    point: np.ndarray
    image: np.ndarray
    xy: np.ndarray


def read_nvm(path: Path, image_of: Callable[[str, str], tuple[str, Camera] | None], bad: BadInput) -> Model:
    """Read images, and the points that they observe, of an NVM_V3 file.

    NVM stores the camera's centre C, so t = -R·C. VisualSFM itself writes keypoints relative to the
    principal point or the image's centre; others write them relative to the image's top-left corner, as in
    COLMAP. So pixels are taken as they stand, unless another origin (the first pixel's centre, the image's
    centre, the principal point) reprojects the points clearly better, in the median over a sample.

    Args:
        path: the file.
        image_of: for an image's name in the file, and file and line for messages, gives the name to go by and the
            intrinsics (those of the file are approximate); None leaves the image out, ValueError says that the name
            is wrong.
        bad: gets damaged lines of images and points.

    Raises:
        ValueError: if the file is not NVM_V3 or its counts are damaged, and as `bad` says.
    """
    try:
        with open(path, encoding=text_encoding(path)) as file:
            lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
            if not next(lines, (1, ""))[1].startswith("NVM_V3"):
                raise ValueError(f"{path} does not begin with NVM_V3; expected a VisualSFM model (dataset.root)")
            images = _read_images(lines, path, image_of, bad)
            seen = _read_points(lines, path, np.array([image is not None for image in images], bool), bad)
    except (UnicodeError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); expected NVM_V3 with its images and points") from error
    xy = seen.xy + _origin(seen, images, path)
    by_image = np.argsort(seen.image, kind="stable")
    ends = np.searchsorted(seen.image[by_image], np.arange(len(images) + 1))
    rows = [by_image[ends[i] : ends[i + 1]] for i in range(len(images))]
    seen_by = zip(images, rows, strict=True)
    found = (image._replace(point_rows=seen.point[r], keypoints=xy[r]) for image, r in seen_by if image is not None)
    return Model(tuple(found), seen.points)


def _read_count(lines: _Lines, path: Path, what: str) -> int:
    number, line = next(lines, (0, ""))
    if not line.strip().isdecimal() or len(line) > 18:
        where = f"line {number} is {line.strip()[:40]!r}" if number else "it ends"
        raise ValueError(f"{path} is damaged: {where}; expected the number of {what} of an NVM_V3 model (dataset.root)")
    return int(line.strip())  # of the signs that `strip` takes away `int` does not take all


def _read_images(
    lines: _Lines, path: Path, image_of: Callable[[str, str], tuple[str, Camera] | None], bad: BadInput
) -> list[ModelImage | None]:
    """All images in the file's order, as yet without points; None where an image is damaged or not wanted."""
    images: list[ModelImage | None] = []
    count, taken = _read_count(lines, path, "images"), set()
    for number, line in islice(lines, count):
        images.append(None)
        words, source = line.split(), f"{path} line {number}"
        with bad.skipping():
            found = image_of(words[0], source)
            if found is None:
                continue
            if found[0] in taken:
                raise ValueError(f"{source} names {found[0]} again; expected each image once")
            pose = pose_at_center(parse_numbers(words[2:9], 7, source, _IMAGE))
            if pose is None:
                raise ValueError(f"{source}: {line[:80]!r}; expected {_IMAGE}, in metres")
            taken.add(found[0])
            images[-1] = ModelImage(*found, pose, np.zeros(0, np.int64), np.zeros((0, 2)))
    if len(images) < count:
        raise ValueError(f"{path} is damaged: it ends after {len(images)} of {count} images (dataset.root)")
    return images


def _read_points(lines: _Lines, path: Path, wanted: np.ndarray, bad: BadInput) -> _Measurements:
    """What the wanted images (N,) measure; points that none of them sees are left out."""
    count, done = _read_count(lines, path, "points"), 0
    found: list[_Measurements] = []
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
                try:
                    found.append(_parse_points([line], wanted))
                except ValueError as error:
                    bad.report(ValueError(f"{path} line {number}: {line[:80]!r}: {error}"))
    first = np.cumsum([0] + [len(part.points) for part in found])[: len(found)]
    shifted = [part._replace(point=part.point + row) for part, row in zip(found, first, strict=True)]
    return _Measurements(*(np.concatenate(arrays) for arrays in zip(none, *shifted, strict=True)))


def _parse_points(lines: list[str], wanted: np.ndarray) -> _Measurements:
    """Lines `x y z r g b n` and n times `image feature x y`, all at once."""
    words = [line.split() for line in lines]
    lengths = np.array([len(w) for w in words])
    if (lengths < 7).any():
        raise ValueError(f"too few numbers; expected {_POINT}")
    values = np.array(list(chain.from_iterable(words)), dtype=np.float64)
    starts, counts = np.cumsum(lengths) - lengths, (lengths - 7) // 4
    if (lengths != 7 + 4 * counts).any() or (values[starts + 6] != counts).any():
        raise ValueError(f"the number of measurements does not agree with what follows; expected {_POINT}")
    points = values[starts[:, None] + np.arange(3)]
    point = np.repeat(np.arange(len(lines)), counts)
    start = starts[point] + 7 + 4 * (np.arange(len(point)) - (np.cumsum(counts) - counts)[point])
    image, xy = values[start], values[start[:, None] + (2, 3)]
    if not ((image >= 0) & (image < len(wanted)) & (image == np.floor(image))).all():
        raise ValueError(f"an image's index is not of 0 to {len(wanted) - 1}; expected {_POINT}")
    if not (np.isfinite(xy).all() and (np.abs(points) < FARTHEST).all()):
        raise ValueError(f"not finite, or not in metres; expected {_POINT}")
    kept = wanted[image.astype(np.int64)]
    seen = np.zeros(len(lines), bool)
    seen[point[kept]] = True
    return _Measurements(points[seen], (np.cumsum(seen) - 1)[point[kept]], image[kept].astype(np.int64), xy[kept])


def _origin(seen: _Measurements, images: list[ModelImage | None], path: Path) -> np.ndarray:
    """What to add to each measurement (M, 2), so that it counts from its image's top-left corner."""
    if not len(seen.image):
        return np.zeros((0, 2))
    used, index = np.unique(seen.image, return_inverse=True)
    measured = [image for image in (images[i] for i in used) if image is not None]
    cameras = Camera.stack([image.camera for image in measured])
    poses = Pose.stack([image.cam_from_world for image in measured])
    sample = evenly(len(index), _SAMPLE)
    at, points = torch.from_numpy(index[sample]), torch.from_numpy(seen.points[seen.point[sample]])
    projected, valid = cameras[at].project(poses[at].transform(points[:, None]))
    projects = valid[:, 0].numpy()
    if not projects.any():
        return np.zeros((len(index), 2))
    offset = (projected[:, 0].numpy() - seen.xy[sample])[projects]
    row = index[sample][projects]
    size, center = cameras.size.numpy(), cameras.parameters[:, 2:4].numpy()
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
