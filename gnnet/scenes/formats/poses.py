"""Text files that the benchmark, hloc and other tools exchange: poses, pairs of query and reference, cameras.

Names may hold spaces: how many words stand behind a name is known. hloc itself splits a line at each space.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch

from gnnet.files import parse_numbers, read_lines, write_at_once
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.scenes.formats.colmap import FARTHEST, LARGEST
from gnnet.scenes.problems import BadInput, OnBad, kinds_of_problems

_POSE = "name qw qx qy qz tx ty tz a line: cam_from_world, translation (not centre)"
_PAIR = "query reference a line (hloc), or query, reference, score (kapture)"
_QUERY = "name MODEL width height params… a line, as r.jpg PINHOLE 1024 768 868.9 866.1 525.9 420.0"
_NO_ROTATION = 1e-3  # largest difference between an entry of RᵀR and of the identity
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf)", re.ASCII | re.IGNORECASE)
_SUFFIX = re.compile(r"\.[A-Za-z]\w{2,3}(?=\s|$)", re.ASCII)
_CAMERA = re.compile(r"(.*\S)\s+([A-Z][A-Z0-9_]+)\s+(\S+)\s+(\S+)((?:\s+\S+)+)")
_log = logging.getLogger(__name__)


class PoseLine(NamedTuple):
    """A line of a pose file as it stands: quaternion (4,) w, x, y, z, of any length but 0, and translation (3,)."""

    number: int
    name: str
    quaternion: np.ndarray
    translation: np.ndarray


def read_pose_file(path: str | Path, *, on_bad: OnBad = "raise") -> dict[str, Pose]:
    """Read `cam_from_world` by name from lines `name qw qx qy qz tx ty tz`; unbatched, float64, in the file's order.

    Quaternions are normalised. Empty lines and lines that begin with # are left out.

    Args:
        path: the file.
        on_bad: `skip` leaves out lines that are damaged, as long as others are not, and logs how many.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the line, if it has not a name and 7 numbers, a number is not finite, the quaternion is
            zero, or the name stands there twice.
    """
    bad = BadInput(on_bad)
    lines = read_pose_lines(path, bad)
    say_left_out(path, bad, len(lines))
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
    for number, words, source in read_lines(Path(path), _POSE, last=7):
        with bad.skipping():
            if len(words) != 8 or not can_stand_in_file(words[0]):
                count = len(" ".join(words).split())
                raise ValueError(f"{source} has {count} words ({' '.join(words)[:80]!r}); expected {_POSE}")
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


def can_stand_in_file(name: str) -> bool:
    """Whether a name can be read again from a line that begins with it and goes on with numbers."""
    words = name.split()
    return (
        bool(words) and name == name.strip() and not name.startswith("#") and not set(name) & set("\n\r\ufeff")
        and (len(words) == 1 or NUMBER.fullmatch(words[-1]) is None)
    )  # fmt: skip


def write_pose_file(path: str | Path, poses: Mapping[str, Pose]) -> None:
    """Write lines `name qw qx qy qz tx ty tz` by name, every digit of float64; the file appears when it is complete.

    Args:
        path: the file; its folder is made.
        poses: unbatched `cam_from_world` in metres, by name.

    Raises:
        ValueError: naming the image, if its name could not be read again, see `can_stand_in_file`, or its pose is
            batched, not finite or no rotation.
    """
    lines = [f"{name} {' '.join(map(repr, _pose_numbers(name, poses[name])))}\n" for name in sorted(poses)]
    # A file's name may be no text: its bytes are written as they are.
    write_at_once(path, "".join(lines).encode("utf-8", "surrogateescape"))


def _pose_numbers(name: str, pose: Pose) -> list[float]:
    if not can_stand_in_file(name):
        raise ValueError(
            f"image {name!r} cannot stand in a pose file; expected a name that is not empty, begins with no # and no "
            "space, and ends with no number behind a space, so rename it"
        )
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


def read_pairs_file(path: str | Path, *, on_bad: OnBad = "raise") -> dict[str, tuple[str, ...]]:
    """Read the references of each query in the file's order, a repeated pair once.

    A line is `query reference` (hloc) or `query, reference, score` (kapture; the score does not count). Names may
    hold spaces where it is clear from the endings (`.jpg`) or a comma where the first name ends.

    Args:
        path: the file.
        on_bad: `skip` leaves out lines of another form, as long as others are not, and logs how many.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the line, if it is of another form.
    """
    pairs: dict[str, dict[str, None]] = {}
    bad = BadInput(on_bad)
    for _, (text,), source in read_lines(Path(path), _PAIR, last=0):
        with bad.skipping():
            query, reference = _pair(text, source)
            pairs.setdefault(query, {})[reference] = None
    say_left_out(path, bad, len(pairs))
    return {query: tuple(references) for query, references in pairs.items()}


def _pair(text: str, source: str) -> tuple[str, str]:
    """Query and reference that a line names."""
    words = text.split()
    if len(words) == 2 and not words[0].endswith(","):
        return words[0], words[1]
    ends = [found.end() for found in _SUFFIX.finditer(text)]
    if len(ends) == 2 and ends[1] == len(text):
        return text[: ends[0]], text[ends[0] :].strip()
    fields = [field.strip() for field in text.split(",")]
    if all(fields) and (len(fields) == 2 or (len(fields) == 3 and NUMBER.fullmatch(fields[2]))):
        return fields[0], fields[1]
    raise ValueError(f"{source} has {len(words)} words ({text[:80]!r}); expected {_PAIR}")


def read_query_names(path: str | Path) -> dict[str, None]:
    """Read the names of a query list, with or without cameras, which are ignored.

    Raises:
        FileNotFoundError, ValueError: no such file, or no text.
    """
    lines = (text for _, (text,), _ in read_lines(Path(path), "an image's name a line", last=0))
    return {_relative(found[1] if (found := _CAMERA.fullmatch(text)) else text): None for text in lines}


def read_query_list(path: str | Path) -> dict[str, Camera | ValueError]:
    """Read cameras by name from lines `name MODEL width height params…` (hloc), unbatched, float64; COLMAP's models.

    A line whose camera cannot be used gives an error that names the line, in place of the camera; so does a name that
    stands there again with another camera.

    Args:
        path: the file. Where there is none of this name, `*` and `?` stand for any others, as in hloc: the lists are
            read as one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: if it is no text, or has no query with a camera that can be used.
    """
    path = Path(path)
    several = not path.exists() and any(sign in path.name for sign in "*?")
    files = sorted(path.parent.glob(path.name)) if several else [path]
    queries: dict[str, Camera | ValueError] = {}
    for file in files or [path]:
        for _, (text,), source in read_lines(file, _QUERY, last=0):
            found = _CAMERA.fullmatch(text)
            name = _relative(found[1] if found else text.split()[0])
            try:
                camera: Camera | ValueError = _camera(text, source)
            except ValueError as error:
                camera = error
            known = queries.setdefault(name, camera)
            if known is not camera and not _equal(known, camera):
                queries[name] = ValueError(f"{source} names {name} again, with another camera; expected each name once")
    errors = [str(error) for error in queries.values() if isinstance(error, ValueError)]
    if len(errors) == len(queries):
        why = kinds_of_problems(errors)[0][0] if errors else f"{path} holds no query; expected {_QUERY}"
        raise ValueError(why)
    return queries


def _relative(name: str) -> str:
    """A path as it is written without `\\`, `//` and `./`."""
    return str(PurePosixPath(name.replace("\\", "/")))


def _camera(text: str, source: str) -> Camera:
    """The camera of a query list's line."""
    found = _CAMERA.fullmatch(text)
    if found is None:
        raise ValueError(f"{source} has {len(text.split())} words ({text[:80]!r}); expected {_QUERY}")
    model, numbers = found[2], [found[3], found[4], *found[5].split()]
    width, height, *parameters = parse_numbers(numbers, len(numbers), source, _QUERY).tolist()
    if not all(1 <= side <= LARGEST and side == int(side) for side in (width, height)):
        raise ValueError(f"{source} has an image of {numbers[0]} by {numbers[1]} pixels; expected {_QUERY}")
    try:
        camera = Camera.from_colmap(model, int(width), int(height), parameters, dtype=torch.float64)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if not (camera.parameters[:2] > 0).all():
        raise ValueError(f"{source} has focal lengths {camera.parameters[:2].tolist()}; expected pixels, above 0")
    return camera


def _equal(a: Camera | ValueError, b: Camera | ValueError) -> bool:
    if isinstance(a, ValueError) or isinstance(b, ValueError):
        return False
    return torch.equal(a.size, b.size) and torch.equal(a.parameters, b.parameters)


def say_left_out(path: str | Path, bad: BadInput, kept: int) -> None:
    """Log how many lines were left out; ValueError if no other was there."""
    if not bad.problems:
        return
    problem = kinds_of_problems(bad.problems)[0][0]
    if not kept:
        raise ValueError(problem)
    _log.warning("%s: %d lines are left out, among them: %s", path, len(bad.problems), problem)
