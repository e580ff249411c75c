"""Correspondence files of the cross-season data set (Larsson et al., CVPR 2019): one `.mat` a pair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import h5py
import numpy as np
import scipy.io


class Correspondences(NamedTuple):
    """Matching points of two images: (N, 2) float32 COLMAP pixels each, and confidence (N,) float32 in (0, 1]."""

    keypoints_a: np.ndarray
    keypoints_b: np.ndarray
    weight: np.ndarray


def read_correspondence_paths(path: Path) -> tuple[str, str]:
    """The two image paths that a file names (posix, relative to the images' folder); the points are not read.

    Raises:
        ValueError: if the file is no .mat file, lacks a path, or a path is absolute or leads upwards.
    """
    content = _read(path, ("im_i_path", "im_j_path"))
    return _image_path(path, "im_i_path", content), _image_path(path, "im_j_path", content)


def read_correspondence_file(path: Path) -> Correspondences:
    """The points of a file, with 0.5 added: it counts from the first pixel's centre, COLMAP from its corner.

    Raises:
        ValueError: naming file, key, what was found and what is expected, if a key is missing, empty, of
            another shape, or not finite.
    """
    content = _read(path, ("pt_i", "pt_j", "dist_from_center"))
    points_a, points_b = (_points(path, key, content[key]) for key in ("pt_i", "pt_j"))
    if len(points_a) != len(points_b):
        raise ValueError(f"{path}: pt_i has {len(points_a)} points, pt_j has {len(points_b)}; expected as many")
    weight = content["dist_from_center"]
    if not _is_number(weight) or weight.size != len(points_a):
        raise ValueError(
            f"{path}: dist_from_center is {weight.dtype} of shape {weight.shape}; "
            f"expected one number for each of the {len(points_a)} points of pt_i"
        )
    weight = weight.reshape(-1).astype(np.float32)
    if not np.isfinite(weight).all():
        raise ValueError(f"{path}: dist_from_center holds numbers that are not finite; expected weights in (0, 1]")
    return Correspondences(points_a, points_b, weight)


def _read(path: Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Arrays of a MATLAB v7.3 file as h5py lays them out (last axis first); v5 arrays are turned likewise."""
    try:
        if h5py.is_hdf5(path):
            with h5py.File(path, "r") as file:
                return _select(path, keys, file.keys(), lambda key: np.asarray(file[key]))
        content = scipy.io.loadmat(str(path), variable_names=list(keys))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist (a file of correspondences, named by dataset.root)") from None
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(_unreadable(path, error)) from error
    except Exception as error:  # h5py and scipy raise many types on a damaged file
        raise ValueError(_unreadable(path, error)) from error
    found = [key for key in content if not key.startswith("__")]
    return _select(path, keys, found, lambda key: np.asarray(content[key]).T)


def _unreadable(path: Path, error: Exception) -> str:
    size = path.stat().st_size if path.exists() else 0
    return (
        f"{path} ({size} bytes) cannot be read as a MATLAB v7.3 or v5 file ({error}); "
        "expected a correspondence_*.mat, so unpack or download it again"
    )


def _select(path: Path, keys: tuple[str, ...], found, read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    missing = [key for key in keys if key not in found]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}; it has {', '.join(sorted(found)) or 'nothing'}")
    return {key: read(key) for key in keys}


def _is_number(array: np.ndarray) -> bool:
    return array.dtype.kind in "fiu"


def _points(path: Path, key: str, array: np.ndarray) -> np.ndarray:
    if _is_number(array) and array.ndim == 2 and array.shape[1] != 2 and array.shape[0] == 2:
        array = array.T  # written from Python as N×2, so turned by MATLAB's order
    if not _is_number(array) or array.ndim != 2 or array.shape[1] != 2 or len(array) == 0:
        raise ValueError(f"{path}: {key} is {array.dtype} of shape {array.shape}; expected N×2 numbers, N at least 1")
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: {key} holds numbers that are not finite; expected pixels")
    return (array.astype(np.float64) + 0.5).astype(np.float32)


def _image_path(path: Path, key: str, content: dict[str, np.ndarray]) -> str:
    array = content[key]
    if array.dtype.kind == "u" or array.dtype.kind == "i":
        text = array.reshape(-1).astype("<u2").tobytes().decode("utf-16-le", errors="replace")
    else:
        text = "".join(str(part) for part in array.reshape(-1))
    text = text.replace("\\", "/").removeprefix("./")
    name = PurePosixPath(text)
    if not text or "\0" in text or name.is_absolute() or ".." in name.parts or ":" in name.parts[0]:
        raise ValueError(f"{path}: {key} is {text!r}; expected an image's path below the images' folder")
    return str(name)
