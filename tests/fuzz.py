"""Random damage to the good input of every text reader and image header, many times and fast.

`python -m tests.fuzz --count 100000 --seed 0` prints what became of it. What leaves a reader must be a value, or a
ValueError or FileNotFoundError that names the file, soon, and nothing outside the folder may have been opened.
(`tests.scenes.test_fuzz` damages whole datasets.)
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from gnnet.data.images import read_image
from gnnet.evaluation import runs
from gnnet.evaluation.result_formats import FORMATS, format_of
from gnnet.geometry.camera import Camera
from gnnet.scenes.formats.colmap import read_model
from gnnet.scenes.formats.images import exif_focal_length, image_size
from gnnet.scenes.formats.nvm import read_nvm
from gnnet.scenes.formats.poses import read_pairs_file, read_pose_file, read_query_list, read_query_names
from gnnet.scenes.formats.positions import read_positions
from gnnet.scenes.formats.rigs import read_rig_config
from gnnet.scenes.layouts import cmu_slice, rgbd, robotcar, robotcar_queries, sevenscenes
from gnnet.scenes.problems import BadInput, OnBad

_POSE = "1 0 0 0 0.5 1e-3 2"
_CAMERA = Camera.from_colmap("PINHOLE", 64, 48, (50.0, 50.0, 32.0, 24.0), dtype=torch.float64)
_POSES = f"a.jpg {_POSE}\nb c.jpg {_POSE}\n# x\n\nd/e.jpg {_POSE}\n"
_NVM = (
    "NVM_V3\n\n2\na.jpg 400 1 0 0 0 1 2 3 0 0\nb.jpg 400 1 0 0 0 1 2 4 0 0\n\n2\n"
    "1 2 3 0 0 0 2 0 0 1 1 1 0 2 2\n4 5 6 0 0 0 1 0 1 3 3\n"
)
_CMU = "c0 OPENCV 1024 768 868.9 866.0 525.9 420 -0.39 0.18 0 0\nc1 OPENCV 1024 768 868.9 866.0 525.9 420 -0.4 0 0 0\n"
_MODEL = {
    "cameras.txt": "# c\n1 PINHOLE 64 48 50 50 32 24\n2 SIMPLE_RADIAL 64 48 50 32 24 0.1\n",
    "images.txt": f"# i\n1 {_POSE} 1 a b.jpg\n1.5 2.5 1 3 4 -1\n2 {_POSE} 2 c.jpg\n\n",
    "points3D.txt": "1 0 1 2 255 0 0 0.5 1 0 2 0\n2 3 4 5 1 2 3 0.1\n",
}
_RIGS = (
    '[{"cameras": [{"image_prefix": "front/", "ref_sensor": true}, {"image_prefix": "left/", '
    '"cam_from_rig_rotation": [1, 0, 0, 0], "cam_from_rig_translation": [0.5, 0, 1e-3]}]}]'
)
_SOON = 2.0  # seconds of CPU for any of these small inputs
_ON_BAD: tuple[OnBad, ...] = ("raise", "skip")
_PIECES = [
    b"nan", b"inf", b"-inf", b"1e400", b"-1", b"0", b"1e308", b"9" * 30, b"1_0", "٣".encode(), b"", b"\0", b"\xff",
    b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b"\r\n", b"\n\n", b"  ", b"\t", "\u2028".encode(), "\x85".encode(), b"#", b",",
    b"../../x", b"/etc/passwd", b"PINHOLE", b"OPENCV_FISHEYE", b".jpg ", b"1" * 5000, b"-0", b"0x10", b"1e-320",
    b"2147483648", b"18446744073709551616", b"NVM_V3", b"\x1c", b"\x0b", b"*", b"\xd8\x00",
]  # fmt: skip


class Reader(NamedTuple):
    """Reads a file (path, on_bad), whose good content is known; `file` is where it stands below a folder."""

    content: bytes
    read: Callable[[Path, OnBad], object]
    file: str = "f.txt"


def _text(content: str, read: Callable[[Path, OnBad], object], file: str = "f.txt") -> Reader:
    return Reader(content.encode(), read, file)


def _pictures() -> dict[str, Reader]:
    """A small image of each format."""
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8769)[0xA405] = 26
    found = {}
    for kind in ("JPEG", "PNG", "TIFF", "BMP", "WEBP"):
        file = io.BytesIO()
        pixels.save(file, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
        found[kind] = Reader(file.getvalue(), _read_picture, "f.img")
    return found


def _read_picture(path: Path, on_bad: OnBad) -> None:
    exif_focal_length(path)
    image_size(path, (24, 32))
    read_image(path)


def _read_intrinsics(path: Path, on_bad: OnBad) -> object:
    images = path.parents[1] / "images"
    (images / "a/rear").mkdir(parents=True, exist_ok=True)
    if not (images / "a/rear/1.jpg").exists():
        Image.new("RGB", (64, 48)).save(images / "a/rear/1.jpg")
    return robotcar._read_intrinsics(path.parents[1], ("rear",), frozenset(["a/rear/1.jpg"]), BadInput(on_bad))


def readers(root: Path) -> dict[str, Reader]:
    """Every reader by a name."""
    Image.new("RGB", (64, 48)).save(root / "i.png")
    found = {
        "poses": _text(_POSES, lambda p, k: read_pose_file(p, on_bad=k)),
        "pairs": _text("a.jpg b.jpg\na.jpg c d.jpg\nq, r, 0.5\n", lambda p, k: read_pairs_file(p, on_bad=k)),
        "query list": _text("a.jpg PINHOLE 64 48 50 50 32 24\nb c.jpg FOV 64 48 50 50 32 24 0.5\n",
                            lambda p, k: read_query_list(p)),
        "query names": _text("a.jpg\nb c.jpg\n", lambda p, k: read_query_names(p)),
        "nvm": _text(_NVM, lambda p, k: read_nvm(p, lambda name, source: (name, _CAMERA), BadInput(k))),
        "nvm in UTF-16": Reader(_NVM.encode("utf-16"),
                                lambda p, k: read_nvm(p, lambda name, source: (name, _CAMERA), BadInput(k))),
        "posed RGB-D's camera": _text("50 0 32\n0 50 24\n0 0 1\n", lambda p, k: rgbd._read_camera(p, [root / "i.png"])),
        "robotcar's poses": _text("night/rear/1.jpg 1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1\n",
                                  lambda p, k: robotcar_queries._read_poses(p, BadInput(k))),
        "robotcar's intrinsics": _text("fx 50\nfy 50\ncx 32\ncy 24\n", _read_intrinsics,
                                       "intrinsics/rear_intrinsics.txt"),
        "robotcar's extrinsics": _text("1,0,0,0\n0,1,0,0\n0,0,1,0\n0,0,0,1\n",
                                       lambda p, k: robotcar_queries._read_extrinsics(p.parents[1], "rear"),
                                       "extrinsics/rear_extrinsics.txt"),
        "7-Scenes' split": _text("sequence1\nseq-02\n", lambda p, k: sevenscenes._sequences(p.parent, BadInput(k)),
                                 "TrainSplit.txt"),
        "positions": _text("a.jpg 1 2 3\nb c.jpg 1e-3 2 -3\n", lambda p, k: read_positions(p, on_bad=k)),
        "rigs": _text(_RIGS, lambda p, k: read_rig_config(p)),
        "localizations.jsonl": _text('{"name": "a.jpg", "error": {"position_m": 0.5}}\n{"name": "b.jpg"}\n',
                                     lambda p, k: runs._position_errors(p)),
        "cmu's cameras": _text(_CMU, lambda p, k: cmu_slice.read_intrinsics(p.parent, BadInput(k)),
                               "s2/intrinsics.txt"),
    }  # fmt: skip
    for dataset in FORMATS:
        form = format_of(dataset)
        found[f"{dataset}'s results"] = _text("1.5 " + _POSE + "\n2.5 " + _POSE + "\n",
                                              lambda p, k, form=form: form.read(p, BadInput(k)))  # fmt: skip
    for name, content in _MODEL.items():
        found[f"COLMAP's {name}"] = _text(content, lambda p, k: read_model(p.parent, BadInput(k)), f"model/{name}")
    (root / "model").mkdir()
    return found | _pictures()


def damaged(content: bytes, draw: random.Random, *, header: bool) -> bytes:
    """The content with one to eight damages; of an image mostly near its beginning."""
    found = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 3, 8])):
        kind, end = draw.random(), len(found)
        at = draw.randrange((min(end, 200) if header and draw.random() < 0.8 else end) + 1)
        if kind < 0.35 and not header:
            words = bytes(found).split(b" ")
            words[draw.randrange(len(words))] = draw.choice(_PIECES)
            found = bytearray(b" ".join(words))
        elif kind < 0.5:
            found[at:at] = draw.randbytes(draw.randrange(1, 5)) if header else draw.choice(_PIECES)
        elif kind < 0.6:
            del found[at:]
        elif kind < 0.7:
            del found[at : at + draw.randrange(1, 9)]
        elif kind < 0.8 or header:
            for i in range(at, min(len(found), at + draw.randrange(1, 5))):
                found[i] ^= draw.choice([255, 1 << draw.randrange(8)])
        elif kind < 0.9:
            lines = bytes(found).split(b"\n")
            row = draw.randrange(len(lines))
            lines[row : row + 1] = draw.choice([[], [lines[row]] * 2, [draw.choice(lines)]])
            found = bytearray(b"\n".join(lines))
        elif kind < 0.95:
            found = bytearray(bytes(found).replace(b"\n", draw.choice([b"\r\n", b"\r", b"\n\n"])))
        else:
            found = bytearray(draw.randbytes(draw.randrange(200)))
    return bytes(found)


class Outcome(NamedTuple):
    """What became of the inputs: counts by reader and kind, each reader's slowest (CPU seconds, input), and faults."""

    counts: Counter[tuple[str, str]]
    slowest: dict[str, tuple[float, bytes]]
    faults: list[str]


def run(count: int, seed: int) -> Outcome:
    """Damage inputs and read them."""
    draw, outcome = random.Random(seed), Outcome(Counter(), {}, [])
    opened: list[str] = []
    watching = [False]

    def record(event: str, arguments: tuple) -> None:
        named = event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str | os.PathLike)
        if watching[0] and named:
            opened.append(os.path.realpath(arguments[0]))

    sys.addaudithook(record)
    program = tuple(os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, Path(__file__).parent.parent))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = Path(os.path.realpath(folder))
        (root / "scratch").mkdir()
        before, tempfile.tempdir = tempfile.tempdir, str(root / "scratch")  # where COLMAP's text is unpacked
        of_name = readers(root)
        for _ in range(count):
            name = draw.choice([*of_name])
            reader, on_bad = of_name[name], draw.choice(_ON_BAD)
            path = root / reader.file
            path.parent.mkdir(exist_ok=True)
            if path.parent.name == "model":
                for file, text in _MODEL.items():
                    (path.parent / file).write_text(text)
            content = damaged(reader.content, draw, header=path.suffix == ".img")
            path.write_bytes(content)
            watching[0], start = True, time.process_time()
            try:
                reader.read(path, on_bad)
                kind = "value"
            except (ValueError, FileNotFoundError) as error:
                kind = type(error).__name__
                if path.name not in str(error) and str(path.parent) not in str(error):
                    outcome.faults.append(f"{name}: {error!r} names no file: {content[:300]!r}")
            except Exception as error:
                kind = type(error).__name__
                outcome.faults.append(f"{name}: {error!r}: {content[:300]!r}")
            watching[0] = False
            outcome.counts[name, kind] += 1
            took = time.process_time() - start
            outcome.slowest[name] = max(outcome.slowest.get(name, (0.0, b"")), (took, content))
            outside = [p for p in opened if not p.startswith((str(root), *program))]
            outcome.faults.extend(f"{name}: opened {p}: {content[:300]!r}" for p in outside)
            opened.clear()
        tempfile.tempdir = before
    return outcome


def main() -> int:
    """Run the command; the exit status is 1 if a fault was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    start = time.process_time()
    outcome = run(arguments.count, arguments.seed)
    for name in sorted(outcome.slowest):
        kinds = ", ".join(f"{k} {c}" for (n, k), c in sorted(outcome.counts.items()) if n == name)
        print(f"{name}: {kinds}; slowest {outcome.slowest[name][0]:.3f} s")
        seconds, content = outcome.slowest[name]
        if seconds > _SOON:
            outcome.faults.append(f"{name}: {seconds:.1f} s: {content[:300]!r}")
    print(f"{arguments.count} inputs, {time.process_time() - start:.0f} s of CPU, {len(outcome.faults)} faults")
    print("\n".join(outcome.faults[:20]))
    return bool(outcome.faults)


if __name__ == "__main__":
    sys.exit(main())
