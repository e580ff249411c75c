"""Positions of images by name, as GPS or odometry give them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gnnet.files import parse_numbers, read_lines
from gnnet.scenes.formats.colmap import FARTHEST
from gnnet.scenes.formats.poses import read_pose_file

_POSITION = "name x y z a line, in the map's world (or a pose file: name qw qx qy qz tx ty tz)"


def read_positions(path: str | Path) -> dict[str, Tensor]:
    """Positions (3,) float64 by name, from lines `name x y z`, or the camera centres of a pose file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the line, if it has other words, a number is damage, or the name stands there twice.
    """
    lines = list(read_lines(Path(path), _POSITION))
    if lines and len(lines[0][1]) == 8:
        return {name: pose.center() for name, pose in read_pose_file(path).items()}
    positions: dict[str, Tensor] = {}
    for _, words, source in lines:
        if len(words) != 4:
            raise ValueError(f"{source} has {len(words)} words ({' '.join(words)[:80]!r}); expected {_POSITION}")
        position = torch.from_numpy(parse_numbers(words[1:], 3, source, _POSITION))
        if position.abs().max() > FARTHEST:
            raise ValueError(f"{source} has the position {' '.join(words[1:])[:80]}; expected {_POSITION}")
        if words[0] in positions:
            raise ValueError(f"{source} names {words[0]} again; expected each name once, so take out one of the two")
        positions[words[0]] = position
    return positions
