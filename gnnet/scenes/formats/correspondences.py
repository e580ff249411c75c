"""Correspondence files of the cross-season data set (Larsson et al., CVPR 2019), one `.mat` for each pair."""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from gnnet.scenes.formats.matlab import MatlabArray, opened_matlab_file
from gnnet.scenes.values import Correspondences

MAX_PATH = 4096  # characters
_PATHS, _POINTS = ("im_i_path", "im_j_path"), ("pt_i", "pt_j", "dist_from_center")


class CorrespondenceHeader(NamedTuple):
    """What a file says without its points: the paths of both images, and the number of points."""

    name_a: str
    name_b: str
    number: int


def read_correspondence_header(path: Path) -> CorrespondenceHeader:
    """Read image paths (posix, relative to the images' folder), and the number of points from their shapes alone.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming file, key, what was found and what is expected, if the file is no .mat file, a key is
            missing or of another shape, or a path is absolute or leads upwards.
    """
    with opened_matlab_file(path, _PATHS + _POINTS) as arrays:
        name_a, name_b = (_image_path(path, key, arrays[key]) for key in _PATHS)
        return CorrespondenceHeader(name_a, name_b, _count(path, arrays))


def read_correspondence_file(path: Path) -> Correspondences:
    """Read the points of a file; 0.5 is added, as it counts from the first pixel's centre, COLMAP from its corner.

    The weight is exp(−`dist_from_center`), as the data set's authors weigh them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming file, key, what was found and what is expected, if a key is missing, empty, of
            another shape, or not finite.
    """
    with opened_matlab_file(path, _POINTS) as arrays:
        _count(path, arrays)
        points_a, points_b, distance = (arrays[key].read() for key in _POINTS)
    distance = distance.reshape(-1).astype(np.float64)
    if not (np.isfinite(distance) & (distance >= 0)).all():
        raise ValueError(
            f"{path}: dist_from_center holds numbers that are not finite or below zero; expected distances, "
            "of which exp(-d) is the weight"
        )
    weight = np.exp(-distance).astype(np.float32)
    return Correspondences(_pixels(path, "pt_i", points_a), _pixels(path, "pt_j", points_b), weight)


def _count(path: Path, arrays: dict[str, MatlabArray]) -> int:
    """The number of points, on which the shapes of all three arrays must agree."""
    counts = {}
    for key in ("pt_i", "pt_j"):
        array, shape = arrays[key], arrays[key].shape
        if len(shape) == 2 and shape[1] != 2 and shape[0] == 2:
            shape = shape[::-1]  # written from Python as N×2, so turned by MATLAB's order
        if array.kind not in "fiu" or len(shape) != 2 or shape[1] != 2 or shape[0] == 0:
            raise ValueError(
                f"{path}: {key} is {array.type_name} of shape {array.shape}; expected N×2 numbers, N at least 1"
            )
        counts[key] = shape[0]
    count, weight = counts["pt_i"], arrays["dist_from_center"]
    if counts["pt_j"] != count:
        raise ValueError(f"{path}: pt_i has {count} points, pt_j has {counts['pt_j']}; expected as many")
    if weight.kind not in "fiu" or math.prod(weight.shape) != count:
        raise ValueError(
            f"{path}: dist_from_center is {weight.type_name} of shape {weight.shape}; "
            f"expected one number for each of the {count} points of pt_i"
        )
    return count


def _pixels(path: Path, key: str, array: np.ndarray) -> np.ndarray:
    if array.shape[1] != 2:
        array = array.T
    with np.errstate(over="ignore"):
        pixels = (array.astype(np.float64) + 0.5).astype(np.float32)
    if not np.isfinite(pixels).all():
        raise ValueError(f"{path}: {key} holds numbers that are not finite; expected pixels")
    return pixels


def _image_path(path: Path, key: str, array: MatlabArray) -> str:
    expected = "expected an image's path below the images' folder"
    if array.kind not in "iuU" or math.prod(array.shape) > MAX_PATH:
        raise ValueError(f"{path}: {key} is {array.type_name} of shape {array.shape}; {expected}")
    values = array.read().reshape(-1)
    if array.kind == "U":
        text = "".join(v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values.tolist())
    else:  # UTF-16 codes
        text = (values & 0xFFFF).astype("<u2").tobytes().decode("utf-16-le", errors="replace")
    text = text.replace("\\", "/").removeprefix("./")
    name = PurePosixPath(text)
    printable = text[:80].encode("unicode_escape").decode()
    outside = not name.parts or name.is_absolute() or ".." in name.parts or ":" in name.parts[0]
    if outside or not text.isprintable() or len(text) > MAX_PATH:
        raise ValueError(f"{path}: {key} is '{printable}'; {expected}")
    return str(name)
