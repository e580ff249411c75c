"""7-Scenes (Shotton et al., CVPR 2013): RGB-D sequences of a room, some its map and some its queries."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.spatial import cKDTree

from gnnet.files import read_lines, read_text
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.progress import track
from gnnet.scenes.formats.images import named_folders
from gnnet.scenes.layouts.rgbd import parse_pose
from gnnet.scenes.pairing import overlapping_pairs, pairs_at_gaps
from gnnet.scenes.problems import BadInput, OnBad
from gnnet.scenes.scene import Depth, Pair, Scene, SceneImage

READER_VERSION = 1  # raise it when the same files make another scene, so that their index is made anew
_TREE = """\
  <dataset.root>/                  one scene (chess, redkitchen, …), or a folder of scenes
    TrainSplit.txt TestSplit.txt   a line for each sequence: sequence1, sequence2, …
    seq-01/                        unpacked from seq-01.zip
      frame-000000.color.png       or .jpg
      frame-000000.depth.png       16 bits, millimetres, 65535 unknown
      frame-000000.pose.txt        4×4, depth camera to world
See docs/datasets.md "7-Scenes"."""
_SPLITS = {"TrainSplit.txt": True, "TestSplit.txt": False}  # whether the sequences of a split are the map
_FARTHEST = 1e4  # metres from the origin; poses of a room beyond are broken
_FRAME = re.compile(r"frame-(\d{1,9})\.color\.(png|jpg|jpeg)", re.ASCII)

# The principal point that is published, (320, 240), is the middle of the image: that is COLMAP's count of pixels.
_COLOR_CAMERA = Camera.from_colmap("SIMPLE_PINHOLE", 640, 480, (525.0, 320.0, 240.0), dtype=torch.float64)
_DEPTH_CAMERA = Camera.from_colmap("SIMPLE_PINHOLE", 640, 480, (585.0, 320.0, 240.0), dtype=torch.float64)
_COLOR_FROM_DEPTH = Pose.from_matrix(
    torch.tensor(
        [
            [0.99996518, 0.00267651, -0.00790410, -0.02555894],
            [-0.00274093, 0.99996303, -0.00815045, 0.00010110],
            [0.00788199, 0.00817183, 0.99993554, 0.00203183],
        ],
        dtype=torch.float64,
    )
)


def load_sevenscenes(
    root: str | Path,
    *,
    gaps: Sequence[int] = (5, 15, 30),
    stride: int = 1,
    across_sequences: float = 0.5,
    min_overlap: float = 0.3,
    on_bad: OnBad = "raise",
    progress: bool = True,
) -> Scene:
    """Read one scene or a folder of scenes; training sequences are references and pairs, test sequences queries.

    The published poses are of the depth camera; here `cam_from_world` is of the colour camera, 2.6 cm
    beside it. A scene is one place, as its map and its queries show one room: one scene alone cannot be
    split, but validates on its own queries with `dataset.validation_root` the same as `dataset.root`.

    Args:
        root: a scene's folder, or a folder of them; then names begin with the scene's.
        gaps: a training image is paired with the images so many frames later in its sequence (30 frames a
            second).
        stride: only frames whose number is a multiple of it are read.
        across_sequences: a training image is also paired with the most similar view of the scene's other
            training sequences, if that is so many metres away at most; 0 pairs within sequences only.
        min_overlap: pairs whose views share less, judged by their poses as if the room were 1 to 4 m
            away, are left out.
        on_bad, progress: see `gnnet.scenes.layouts`.

    Raises:
        FileNotFoundError: no such layout, or a file that is missing.
        ValueError: a malformed file, a `stride` below 1, or no image is left.
    """
    root, bad = Path(root), BadInput(on_bad)
    if stride < 1:
        raise ValueError(f"dataset.stride is {stride}; expected 1 (every frame) or more")
    sequences = [
        (folder, prefix, name, is_map)
        for prefix, folder in _scenes(root).items()
        for name, is_map in _sequences(folder, bad).items()
    ]
    images: dict[str, SceneImage] = {}
    pairs: list[Pair] = []
    maps: dict[str, list[list[SceneImage]]] = {}
    for folder, prefix, name, is_map in track(sequences, "Reading sequences", show=progress):
        with bad.skipping():
            frames = _read_sequence(folder, prefix, name, is_map, stride, bad)
            images |= {image.name: image for image in frames.values()}
            if is_map:
                maps.setdefault(prefix, []).append(list(frames.values()))
                pairs += pairs_at_gaps(maps[prefix][-1], frames, gaps, min_overlap)
    for views in maps.values():
        pairs += _pairs_across(views, across_sequences, min_overlap)
    if not pairs:
        bad.no_pairs(
            f"{root.absolute()} holds {len(images)} usable images and no pair of training images at gaps "
            f"{list(gaps)}; lower dataset.stride or dataset.min_overlap, or take other dataset.gaps",
            usable=bool(images),
        )
    name = f"7-scenes {root.absolute().name}"
    return Scene(name, images, pairs, problems=tuple(bad.problems), dataset="sevenscenes")


def _scenes(root: Path) -> dict[str, Path]:
    """Folders of the scenes, by the prefix of their images' names."""
    named = named_folders(root, lambda folder: any((folder / split).is_file() for split in _SPLITS))
    if not named:
        raise FileNotFoundError(f"{root.absolute()} holds no scene of 7-Scenes (dataset.root); expected\n{_TREE}")
    return named


def _sequences(folder: Path, bad: BadInput) -> dict[str, bool]:
    """For each sequence of a scene, whether it belongs to the map."""
    sequences: dict[str, bool] = {}
    for split, is_map in _SPLITS.items():
        with bad.skipping():
            path, expected = folder / split, "a line for each sequence: sequence1, …"
            for _, words, source in read_lines(path, expected):
                with bad.skipping():
                    name = " ".join(words)
                    match = re.fullmatch(r"(?:sequence|seq-)(\d{1,4})", name, re.ASCII)
                    if match is None:
                        raise ValueError(f"{source} is {name[:80]!r}; expected {expected}")
                    if sequences.setdefault(f"seq-{int(match[1]):02d}", is_map) != is_map:
                        raise ValueError(f"{source}: {name} is in both splits; expected one of them")
    return sequences


def _read_sequence(
    scene: Path, prefix: str, sequence: str, is_map: bool, stride: int, bad: BadInput
) -> dict[int, SceneImage]:
    """Usable images by frame number, ascending."""
    folder = scene / sequence
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist, but a split names it; unpack {sequence}.zip there")
    found = [(_FRAME.fullmatch(path.name), path) for path in sorted(folder.iterdir(), reverse=True)]
    numbered = {int(match[1]): path for match, path in found if match and int(match[1]) % stride == 0}
    images = {}
    for number, path in sorted(numbered.items()):
        with bad.skipping():
            stem = path.name.partition(".")[0]
            pose_path, depth_path = folder / f"{stem}.pose.txt", folder / f"{stem}.depth.png"
            words = read_text(pose_path, "4×4 numbers, depth camera to world").split()
            if not depth_path.is_file():
                raise FileNotFoundError(f"{path} has no depth map {depth_path}; put it there, or remove the frame")
            name, place = f"{prefix}{sequence}/{path.name}", scene.absolute().name
            pose = _COLOR_FROM_DEPTH @ parse_pose(words, str(pose_path))
            depth = Depth(depth_path, _DEPTH_CAMERA, _COLOR_FROM_DEPTH)
            images[number] = SceneImage(name, path, "reference", place, _COLOR_CAMERA, pose, is_map, depth=depth)
    return images


def _pairs_across(sequences: list[list[SceneImage]], distance: float, min_overlap: float) -> list[Pair]:
    """Pair each image with the most similar view, by position and direction, in any other sequence."""
    images = [image for sequence in sequences for image in sequence]
    number = np.repeat(np.arange(len(sequences)), list(map(len, sequences)))
    if distance <= 0 or not images:
        return []
    poses = Pose.stack([image.cam_from_world for image in images if image.cam_from_world is not None])
    # √½ times the distance of two rotation matrices is about the angle between them: a radian counts as a metre.
    views = np.concatenate([poses.center().numpy(), poses.rotation.flatten(1).numpy() / np.sqrt(2)], 1)
    usable = (np.abs(views) < _FARTHEST).all(1)  # a broken pose is not; `check` reports it
    rows = set()
    for n in range(len(sequences)):
        own, others = np.flatnonzero(usable & (number == n)), np.flatnonzero(usable & (number != n))
        if len(own) == 0 or len(others) == 0:
            continue
        gap, nearest = cKDTree(views[others]).query(views[own], distance_upper_bound=distance)
        near = np.isfinite(gap)
        found = np.sort(np.stack([own[near], others[nearest[near]]], 1), axis=1)
        rows |= set(map(tuple, found.tolist()))
    return overlapping_pairs(images, sorted(rows), min_overlap)
