"""Positions of images by name, as GPS or odometry give them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gnnet.files import parse_numbers, read_lines
from gnnet.scenes.formats.colmap import FARTHEST
from gnnet.scenes.formats.poses import NUMBER, read_pose_file, say_left_out
from gnnet.scenes.problems import BadInput, OnBad

_POSITION = "name x y z a line, in the map's world (or a pose file: name qw qx qy qz tx ty tz)"


def read_positions(path: str | Path, *, on_bad: OnBad = "raise") -> dict[str, Tensor]:
    """Read positions (3,) float64 by name from lines `name x y z`, or the camera centres of a pose file.

    Args:
        path: the file. It is a pose file if most lines end with seven numbers; names may hold spaces.
        on_bad: `skip` leaves out lines that are damaged, as long as others are not, and logs how many.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the line, if it has other words, a number is damage, or the name stands there twice.
    """
    lines = read_lines(Path(path), _POSITION, last=7)
    poses = sum(len(words) == 8 and all(map(NUMBER.fullmatch, words[1:])) for _, words, _ in lines)
    if 2 * poses > len(lines):
        return {name: pose.center() for name, pose in read_pose_file(path, on_bad=on_bad).items()}
    positions: dict[str, Tensor] = {}
    bad = BadInput(on_bad)
    for _, words, source in read_lines(Path(path), _POSITION, last=3):
        with bad.skipping():
            if len(words) != 4:
                raise ValueError(f"{source} has {len(words)} words ({' '.join(words)[:80]!r}); expected {_POSITION}")
            position = torch.from_numpy(parse_numbers(words[1:], 3, source, _POSITION))
            if position.abs().max() > FARTHEST:
                raise ValueError(f"{source} has the position {' '.join(words[1:])[:80]}; expected {_POSITION}")
            if words[0] in positions:
                raise ValueError(
                    f"{source} names {words[0]} again; expected each name once, so take out one of the two"
                )
            positions[words[0]] = position
    say_left_out(path, bad, len(positions))
    return positions
