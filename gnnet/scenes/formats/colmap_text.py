"""COLMAP's text files, turned into the binary ones that are read.

pycolmap does not do it, as it ends a name at its first space, stops at a byte-order mark, and names no line.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from gnnet.files import parse_numbers, read_text
from gnnet.scenes.problems import BadInput

_CAMERA = "CAMERA_ID MODEL WIDTH HEIGHT PARAMS…"
_POINT = "POINT3D_ID X Y Z R G B ERROR, then the track"
_IMAGE = "IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME"
_KEYPOINTS = "the line below an image's: X Y POINT3D_ID for each keypoint, or nothing"
_MODEL = "a COLMAP model's cameras, images and points3D, all as .txt or all as .bin (dataset.root)"
_IDS = 2**32  # what ids of cameras and images are below
_POINT_IDS = 2**53  # what those of points are below, which are read as float64 beside keypoints


def write_as_binary(folder: Path, binary: Path, models: Mapping[str, tuple[int, int]], bad: BadInput) -> None:
    """Read `cameras.txt`, `points3D.txt` and `images.txt`, and write them as `.bin`; tracks are left out.

    Args:
        folder: of the text files.
        binary: folder to write into.
        models: number, and number of parameters, of each camera model by its name.
        bad: gets lines that are damaged.

    Raises:
        FileNotFoundError, ValueError: if a file is missing or no text, and as `bad` says.
    """
    for name, records in (
        ("cameras", _cameras(folder / "cameras.txt", models, bad)),
        ("points3D", _points(folder / "points3D.txt", bad)),
        ("images", _images(folder / "images.txt", bad)),
    ):
        written = list(records)
        (binary / f"{name}.bin").write_bytes(struct.pack("<Q", len(written)) + b"".join(written))


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines, also empty ones, with file and number for messages."""
    for number, line in enumerate(read_text(path, _MODEL).split("\n"), start=1):
        yield line.strip(), f"{path} line {number}"


def _cameras(path: Path, models: Mapping[str, tuple[int, int]], bad: BadInput) -> Iterator[bytes]:
    for text, source in _lines(path):
        words = text.split()
        if not words or text.startswith("#"):
            continue
        with bad.skipping():
            if len(words) < 4 or words[1] not in models:
                raise ValueError(f"{source} is {text[:80]!r}; expected {_CAMERA} with a model of {', '.join(models)}")
            number, count = models[words[1]]
            parameters = parse_numbers(words[4:], count, source, f"{count} parameters of {words[1]}")
            width, height = (_whole(word, source, _CAMERA) for word in words[2:4])
            yield struct.pack(f"<IiQQ{count}d", _whole(words[0], source, _CAMERA), number, width, height, *parameters)


def _points(path: Path, bad: BadInput) -> Iterator[bytes]:
    for text, source in _lines(path):
        if not text or text.startswith("#"):
            continue
        with bad.skipping():
            words = text.split(None, 4)[:4]
            if len(words) < 4:
                raise ValueError(f"{source} is {text[:80]!r}; expected {_POINT}")
            try:
                xyz = [float(word) for word in words[1:]]  # what is not finite is left out later, and counted
            except ValueError as error:
                raise ValueError(f"{source}: {error}; expected {_POINT}") from None
            yield struct.pack("<Q3d3BdQ", _whole(words[0], source, _POINT, _POINT_IDS), *xyz, 0, 0, 0, 0.0, 0)


def _images(path: Path, bad: BadInput) -> Iterator[bytes]:
    lines = _lines(path)
    for text, source in lines:
        if not text or text.startswith("#"):
            continue
        keypoints, below = next(lines, ("", source))
        with bad.skipping():
            words = text.split(None, 9)
            if len(words) < 10 or "\0" in words[9]:
                raise ValueError(f"{source} is {text[:80]!r}; expected {_IMAGE}, then {_KEYPOINTS}")
            pose = parse_numbers(words[1:8], 7, source, _IMAGE)
            ids = [_whole(words[place], source, _IMAGE) for place in (0, 8)]
            try:
                seen = np.array(keypoints.split(), np.float64).reshape(-1, 3)
            except ValueError:
                raise ValueError(f"{below} is {keypoints[:80]!r}; expected {_KEYPOINTS}") from None
            point = np.where(seen[:, 2] >= 0, seen[:, 2], -1)  # NaN is none either
            record = np.empty(len(seen), np.dtype([("xy", "<f8", 2), ("point", "<i8")]))
            record["xy"], record["point"] = seen[:, :2], np.minimum(point, _POINT_IDS)
            name = words[9].encode("utf-8") + b"\0"
            yield struct.pack("<I7dI", ids[0], *pose, ids[1]) + name + struct.pack("<Q", len(seen)) + record.tobytes()


def _whole(word: str, source: str, expected: str, limit: int = _IDS) -> int:
    if not (word.isascii() and word.isdecimal() and len(word) < 20 and int(word) < limit):
        raise ValueError(f"{source} has {word[:40]!r} where a whole number stands; expected {expected}")
    return int(word)
