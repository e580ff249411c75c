"""Posed RGB-D sequences: `images/` and `depth/` beside `K.txt` and `poses.txt`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from gnnet.files import parse_numbers, read_lines, read_text
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.progress import track
from gnnet.scenes.formats.images import image_files, in_order, named_folders, usual_size
from gnnet.scenes.pairing import pairs_at_gaps
from gnnet.scenes.problems import BadInput, OnBad
from gnnet.scenes.scene import Depth, Pair, Scene, SceneImage

READER_VERSION = 2  # raise it when the same files make another scene, so that their index is made anew
_TREE = """\
  <dataset.root>/            one sequence, or a folder of such folders
    images/*.jpg or *.png    in the sequence's order, when sorted by name, or by the one number in the names
    depth/*.png              same names but for the ending; 16 bits, millimetres (else dataset.depth_scale), 0 unknown
    K.txt                    3×3 intrinsics of the images and of the depth maps, which are registered to them
    poses.txt                camera to world, metres: 16 numbers a line, row by row, a line for each image
See docs/datasets.md "Posed RGB-D"."""
_POSE = "a row-major 4×4 camera-to-world matrix (16 numbers, the last four 0 0 0 1)"


def load_rgbd(
    root: str | Path,
    *,
    images: str = "images",
    depth: str = "depth",
    depth_scale: float = 1000.0,
    gaps: Sequence[int] = (2, 4, 8, 16),
    min_overlap: float = 0.3,
    places: int = 5,
    on_bad: OnBad = "raise",
    progress: bool = True,
) -> Scene:
    """Read posed RGB-D sequences: every image is both a reference and a query.

    The principal point of `K.txt` is taken as OpenCV counts it, from the first pixel's centre, so half
    a pixel is added.

    Args:
        root: a sequence's folder, or a folder of them; then names begin with the sequence's.
        images: image folder inside a sequence.
        depth: folder of the depth maps inside a sequence.
        depth_scale: units of the depth maps in a metre: 1000 for millimetres, 5000 as TUM RGB-D writes them.
        gaps: an image is paired with the images so many places later in the sequence.
        min_overlap: pairs whose views share less, judged by their poses as if the room were 1 to 4 m
            away, are left out.
        places: into how many stretches along time each sequence is cut for splitting; neighbouring
            stretches may still see the same surfaces. Pairs across stretches are left out.
        on_bad, progress: see `gnnet.scenes.layouts`.

    Raises:
        FileNotFoundError: no such layout, or a file that is missing.
        ValueError: a malformed file, or no image is left.
    """
    root, bad = Path(root), BadInput(on_bad)
    if places < 1:
        raise ValueError(f"dataset.places is {places}; expected 1 (each sequence a place) or more")
    if not 0 < depth_scale < float("inf"):
        raise ValueError(f"dataset.depth_scale is {depth_scale}; expected units of the depth maps in a metre, above 0")
    named = named_folders(root, lambda folder: _is_sequence(folder, images))
    if not named:
        raise FileNotFoundError(f"{root.absolute()} holds no posed RGB-D sequence (dataset.root); expected\n{_TREE}")
    found: dict[str, SceneImage] = {}
    pairs: list[Pair] = []
    for prefix, folder in track(named.items(), "Reading sequences", show=progress):
        with bad.skipping():
            for stretch in _read_sequence(folder, prefix, images, depth, depth_scale, places, bad):
                found |= {image.name: image for image in stretch}
                pairs += pairs_at_gaps(stretch, range(len(stretch)), gaps, min_overlap)
    if not pairs:
        bad.no_pairs(
            f"{root.absolute()} holds {len(found)} usable images and no pair at gaps {list(gaps)} within one of "
            f"{places} stretches; lower dataset.gaps, dataset.min_overlap or dataset.places, or add images",
            usable=bool(found),
        )
    name = f"rgbd {root.absolute().name}"
    return Scene(name, found, pairs, problems=tuple(bad.problems), dataset="rgbd")


def parse_pose(words: list[str], source: str) -> Pose:
    """Turn the 16 words of a camera-to-world matrix into `cam_from_world` (float64); `source` names file and line.

    Raises:
        ValueError: if they are no such matrix.
    """
    matrix = parse_numbers(words, 16, source, _POSE).reshape(4, 4)
    if not np.allclose(matrix[3], (0, 0, 0, 1), atol=1e-6):
        raise ValueError(f"{source} ends with {' '.join(words[12:])[:80]}; expected {_POSE}")
    return Pose.from_matrix(torch.from_numpy(matrix)).inverse()


def _is_sequence(folder: Path, images: str) -> bool:
    return (folder / images).is_dir() and ((folder / "K.txt").exists() or (folder / "poses.txt").exists())


def _read_sequence(
    folder: Path, prefix: str, images: str, depth: str, depth_scale: float, places: int, bad: BadInput
) -> list[list[SceneImage]]:
    """Usable images, a list for each stretch."""
    files = in_order(image_files(folder / images))
    path = folder / "poses.txt"
    lines = read_lines(path, f"{_POSE} for each image")
    if len(lines) != len(files):
        raise ValueError(
            f"{path} has {len(lines)} lines, {folder / images} has {len(files)} images; expected a line for each image"
        )
    if not files:
        raise ValueError(f"{folder / images} holds no image; expected *.jpg or *.png")
    camera = _read_camera(folder / "K.txt", files)
    stretches: list[list[SceneImage]] = [[] for _ in range(min(places, len(files)))]
    for i, (file, line) in enumerate(zip(files, lines, strict=True)):
        with bad.skipping():
            pose = parse_pose(line.words, line.source)
            depth_path = (folder / depth / file.name).with_suffix(".png")
            if not depth_path.is_file():
                raise FileNotFoundError(f"{file} has no depth map {depth_path}; put it there, or remove the image")
            stretch = i * len(stretches) // len(files)
            name, place = f"{prefix}{file.name}", f"{folder.absolute().name}/{stretch}"
            map = Depth(depth_path, scale=depth_scale)
            image = SceneImage(name, file, "reference", place, camera, pose, is_reference=True, depth=map)
            stretches[stretch].append(image)
    return stretches


def _read_camera(path: Path, files: list[Path]) -> Camera:
    expected = "a 3×3 matrix fx 0 cx, 0 fy cy, 0 0 1 in pixels"
    words = read_text(path, expected).split()
    k = parse_numbers(words, 9, str(path), expected).reshape(3, 3)
    # A skew of some hundredths of a pixel is left aside.
    if min(k[0, 0], k[1, 1]) <= 0 or abs(k[0, 1]) > 0.1 or k[1, 0] != 0 or not np.array_equal(k[2], (0, 0, 1)):
        raise ValueError(f"{path} holds {' '.join(words)[:120]}; expected {expected}")
    width, height = usual_size(files)
    parameters = (k[0, 0], k[1, 1], k[0, 2] + 0.5, k[1, 2] + 0.5)
    return Camera.from_colmap("PINHOLE", width, height, parameters, dtype=torch.float64)
