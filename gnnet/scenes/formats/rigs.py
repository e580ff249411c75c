"""COLMAP's `rig_config.json`: cameras that are fixed to each other, told by the beginnings of their images' names."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from gnnet.files import parse_numbers, read_text
from gnnet.geometry.pose import Pose
from gnnet.scenes.formats.colmap import FARTHEST

_EXPECTED = (
    'COLMAP\'s rig_config.json: [{"cameras": [{"image_prefix": "front/", "ref_sensor": true}, '
    '{"image_prefix": "left/", "cam_from_rig_rotation": [w, x, y, z], "cam_from_rig_translation": [x, y, z]}, …]}, …]'
)


class OnRig(NamedTuple):
    """The instant of an image of a rig, the same text for all images that belong together, and its camera's pose."""

    instant: str
    cam_from_rig: Pose


def read_rig_config(path: str | Path) -> list[dict[str, Pose]]:
    """Read the rigs of a file: of each, `cam_from_rig` by `image_prefix`, float64.

    Intrinsics in the file are not read.

    Raises:
        FileNotFoundError, ValueError: no such file, or not COLMAP's format.
    """
    try:
        rigs = json.loads(read_text(Path(path), _EXPECTED), parse_int=float)  # an int of 5,000 digits is an error
        found = [_cameras(rig["cameras"], path) for rig in rigs]
    except (json.JSONDecodeError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no file of rigs ({type(error).__name__}: {error}); expected {_EXPECTED}") from None
    prefixes = [prefix for rig in found for prefix in rig]
    twice = next((prefix for prefix in prefixes if prefixes.count(prefix) > 1), None)
    if twice is not None or not prefixes:
        what = "no camera" if twice is None else f"the image_prefix {twice!r} twice"
        raise ValueError(f"{path} has {what}; expected {_EXPECTED}")
    return found


def _cameras(cameras: list[dict], path: str | Path) -> dict[str, Pose]:
    poses: dict[str, Pose] = {}
    for camera in cameras:
        prefix = camera["image_prefix"]
        if isinstance(prefix, str):
            prefix = prefix.replace("\\", "/").removeprefix("./")
        if not isinstance(prefix, str) or prefix in poses:
            raise ValueError(f"{path} has the image_prefix {prefix!r} twice, or no text; expected {_EXPECTED}")
        source = f"{path}, camera {prefix!r}"
        if camera.get("ref_sensor"):
            poses[prefix] = Pose.identity(dtype=torch.float64)
            continue
        if not {"cam_from_rig_rotation", "cam_from_rig_translation"} <= camera.keys():
            raise ValueError(
                f"{source}: cam_from_rig_rotation and cam_from_rig_translation are not both there, and it is no "
                f"ref_sensor; expected {_EXPECTED}"
            )
        rotation, translation = (
            torch.from_numpy(parse_numbers(list(map(str, camera[f"cam_from_rig_{key}"])), count, source, _EXPECTED))
            for key, count in (("rotation", 4), ("translation", 3))
        )
        if not 0.5 < rotation.norm() < 2 or translation.abs().max() > FARTHEST:
            raise ValueError(f"{source}: {rotation.tolist()}, {translation.tolist()} are no pose; expected {_EXPECTED}")
        poses[prefix] = Pose.from_quaternion(rotation, translation)
    return poses


def images_on_rigs(names: Iterable[str], path: str | Path) -> dict[str, OnRig]:
    """Which of the images belong together: those whose names are the same below the prefixes of one rig's cameras.

    An image of no rig's camera is not among them.

    Raises:
        FileNotFoundError, ValueError: from the file, or if none of the names begins with a prefix of it.
    """
    names, rigs = list(names), read_rig_config(path)
    prefixes = {prefix: (number, pose) for number, rig in enumerate(rigs) for prefix, pose in rig.items()}
    longest = sorted(prefixes, key=len, reverse=True)
    found = {}
    for name in names:
        prefix = next((prefix for prefix in longest if name.startswith(prefix)), None)
        if prefix is not None:
            number, pose = prefixes[prefix]
            found[name] = OnRig(f"{number}/{name.removeprefix(prefix)}", pose)
    if names and not found:
        raise ValueError(
            f"{path} names no camera of the {len(names)} images: it has the prefixes {', '.join(map(repr, longest))}, "
            f"the images' names are as {names[0]!r}; expected names that begin with an image_prefix"
        )
    return found
