"""Text files that the benchmark, hloc and other tools exchange: poses, pairs of query and reference, cameras."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from gnnet.files import parse_numbers, read_lines, write_at_once
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.scenes.formats.colmap import FARTHEST, LARGEST
from gnnet.scenes.problems import BadInput

_POSE = "name qw qx qy qz tx ty tz a line: cam_from_world, translation (not centre), names without spaces"
_PAIR = "query reference a line, names without spaces"
_QUERY = "name MODEL width height params… a line, as r.jpg PINHOLE 1024 768 868.9 866.1 525.9 420.0"
_NO_ROTATION = 1e-3  # largest difference between an entry of RᵀR and of the identity


class PoseLine(NamedTuple):
    """A line of a pose file as it stands: quaternion (4,) w, x, y, z, of any length but 0, and translation (3,)."""

    number: int
    name: str
    quaternion: np.ndarray
    translation: np.ndarray


def read_pose_file(path: str | Path) -> dict[str, Pose]:
    """Read `cam_from_world` by name from lines `name qw qx qy qz tx ty tz`; unbatched, float64, in the file's order.

    Quaternions are normalised. Empty lines and lines that begin with # are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the line, if it has not 8 words, a number is not finite, the quaternion is
            zero, or the name stands there twice.
    """
    lines = read_pose_lines(path, BadInput("raise"))
    if not lines:
        return {}
    quaternions = np.stack([line.quaternion for line in lines])
    quaternions /= np.abs(quaternions).max(1, keepdims=True)  # the square of 1e200 is not finite
    translations = np.stack([line.translation for line in lines])
    poses = Pose.from_quaternion(torch.from_numpy(quaternions), torch.from_numpy(translations))
    return {line.name: poses[i] for i, line in enumerate(lines)}


def read_pose_lines(path: str | Path, bad: BadInput) -> list[PoseLine]:
    """Read the lines of a pose file, each name once.

    Args:
        path: the file.
        bad: gets each line that `read_pose_file` does not take.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no text, or as `bad` says.
    """
    found: dict[str, PoseLine] = {}
    for number, words, source in read_lines(Path(path), _POSE):
        with bad.skipping():
            if len(words) != 8:
                raise ValueError(f"{source} has {len(words)} words ({' '.join(words)[:80]!r}); expected {_POSE}")
            values = parse_numbers(words[1:], 7, source, _POSE)
            if not values[:4].any():
                raise ValueError(f"{source} has the quaternion 0 0 0 0, which is no rotation; expected {_POSE}")
            if np.abs(values[4:]).max() > FARTHEST:
                raise ValueError(f"{source} has the translation {' '.join(words[5:])[:80]}; expected metres")
            if words[0] in found:
                raise ValueError(
                    f"{source} names {words[0]} again, after line {found[words[0]].number}; expected each name once, "
                    "so take out one of the two"
                )
            found[words[0]] = PoseLine(number, words[0], values[:4], values[4:])
    return list(found.values())


def write_pose_file(path: str | Path, poses: Mapping[str, Pose]) -> None:
    """Write lines `name qw qx qy qz tx ty tz` by name, every digit of float64; the file appears when it is complete.

    Args:
        path: the file; its folder is made.
        poses: unbatched `cam_from_world` in metres, by name.

    Raises:
        ValueError: naming the image, if its name is empty or holds spaces, or its pose is batched, not
            finite or no rotation.
    """
    lines = [f"{name} {' '.join(map(repr, _pose_numbers(name, poses[name])))}\n" for name in sorted(poses)]
    write_at_once(path, "".join(lines).encode("utf-8"))


def _pose_numbers(name: str, pose: Pose) -> list[float]:
    if name.split() != [name]:
        raise ValueError(f"image {name!r} cannot stand in a pose file; expected a name without spaces, so rename it")
    if pose.shape != ():
        raise ValueError(f"the pose of {name} has the batch shape {tuple(pose.shape)}; expected one pose a name")
    pose = pose.to(device="cpu", dtype=torch.float64)
    off = (pose.rotation.T @ pose.rotation - torch.eye(3, dtype=torch.float64)).abs().max()
    if not (off <= _NO_ROTATION and torch.linalg.det(pose.rotation) > 0 and pose.translation.isfinite().all()):
        raise ValueError(
            f"the pose of {name} is rotation {pose.rotation.flatten().tolist()}, translation "
            f"{pose.translation.tolist()}; expected finite numbers and a rotation (RᵀR = I to {_NO_ROTATION:g}), "
            "so leave out a query that failed"
        )
    return torch.cat([pose.quaternion(), pose.translation]).tolist()


def read_pairs_file(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Read lines `query reference` (hloc): the references of each query in the file's order, a repeated pair once.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the line, if it has not 2 words.
    """
    pairs: dict[str, dict[str, None]] = {}
    for _, words, source in read_lines(Path(path), _PAIR):
        if len(words) != 2:
            raise ValueError(f"{source} has {len(words)} words ({' '.join(words)[:80]!r}); expected {_PAIR}")
        pairs.setdefault(words[0], {})[words[1]] = None
    return {query: tuple(references) for query, references in pairs.items()}


def read_query_list(path: str | Path) -> dict[str, Camera]:
    """Read cameras by name from lines `name MODEL width height params…` (hloc), unbatched, float64; COLMAP's models.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the line, if it is of another form, the model is not supported, a number is
            damage, or the name stands there twice.
    """
    cameras: dict[str, Camera] = {}
    for _, words, source in read_lines(Path(path), _QUERY):
        if len(words) < 5:
            raise ValueError(f"{source} has {len(words)} words ({' '.join(words)[:80]!r}); expected {_QUERY}")
        name, model, *numbers = words
        if name in cameras:
            raise ValueError(f"{source} names {name} again; expected each name once, so take out one of the two")
        width, height, *parameters = parse_numbers(numbers, len(numbers), source, _QUERY).tolist()
        if not all(1 <= side <= LARGEST and side == int(side) for side in (width, height)):
            raise ValueError(f"{source} has an image of {numbers[0]} by {numbers[1]} pixels; expected {_QUERY}")
        try:
            camera = Camera.from_colmap(model, int(width), int(height), parameters, dtype=torch.float64)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        if not (camera.parameters[:2] > 0).all():
            raise ValueError(f"{source} has focal lengths {camera.parameters[:2].tolist()}; expected pixels, above 0")
        cameras[name] = camera
    return cameras
