"""RobotCar Seasons (Sattler et al., CVPR 2018) with cross-season correspondences (Larsson et al., CVPR 2019)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from scipy.spatial import cKDTree

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.scenes.correspondence_file import read_correspondence_paths
from gnnet.scenes.robotcar_models import Reference, read_colmap_models, read_nvm
from gnnet.scenes.scene import Pair, Scene, SceneImage

REFERENCE = "overcast-reference"
_BLOCK = 100  # references a place where no model tells the places apart
_TREE = """\
  <dataset.root>/robotcar/   (or this folder itself)
    images/<condition>/{left,right,rear}/<timestamp>.jpg
    correspondence/correspondence_run1_overcast-reference_run2_<condition>*.mat
    intrinsics/{left,right,rear}_intrinsics.txt
    3D-models/individual/colmap_reconstructions/NNN_aligned/{cameras,images,points3D}.txt
    3D-models/all-merged/all.nvm   (where there are no individual models)
    robotcar_v2_train.txt
It comes from: RobotCar Seasons from visuallocalization.net; cross-season correspondences, Larsson et al., CVPR 2019."""

_log = logging.getLogger(__name__)


def load_robotcar(
    root: Path,
    *,
    conditions: list[str] | None = None,
    cameras: Iterable[str] = ("rear",),
    place_size: float = 50.0,
    progress: bool = True,
) -> Scene:
    """The references with their 3D points, the queries of known pose, and the pairs with correspondences.

    Places are the individual models (`NNN`), where they exist; a query belongs to the place of the
    nearest reference. With the merged model alone, a new place begins where the reference drive has
    gone `place_size` metres or jumps as far; without any model, after 100 references. A pair whose
    images belong to two places (at their border) is left out.

    Args:
        root: the folder that holds `robotcar/`, or `robotcar` itself.
        conditions: query conditions to read; None for all.
        cameras: of `left`, `rear`, `right`.
        place_size: metres, used with the merged model only.
        progress: show progress bars.

    Raises:
        FileNotFoundError: if folders, correspondences, intrinsics or images are missing.
        ValueError: if a file is malformed or a condition is not there.
    """
    home = _find_home(Path(root))
    cameras = tuple(cameras)
    files = _correspondence_files(home, conditions)
    references, points = _read_references(home, cameras, place_size, progress)
    intrinsics = _Intrinsics(home)
    images = {name: _reference_image(home, name, r, intrinsics) for name, r in references.items()}
    images |= _query_images(home, cameras, conditions, references, intrinsics)
    files = track(files, "Reading pairs", disable=not progress, transient=True)
    named = [(path, *read_correspondence_paths(path)) for path in files]
    named = [entry for entry in named if all(_camera_of(name) in cameras for name in entry[1:])]
    if not references:
        images |= _references_in_blocks(home, {a for _, a, _ in named}, intrinsics)
    pairs, crossing = [], 0
    for path, name_a, name_b in named:
        for name, partner in ((name_a, name_b), (name_b, name_a)):
            if name not in images:
                place = images[partner].place if partner in images else "unknown"
                images[name] = SceneImage(name, home / "images" / name, _condition_of(name), place, intrinsics.of(name))
        place = images[name_a].place
        if place == images[name_b].place:
            pairs.append(Pair(name_a, name_b, place, path))
        else:
            crossing += 1
    if crossing:
        _log.info("%d of %d pairs left out, as their images belong to two places", crossing, len(named))
    _check_images(home, images, pairs)
    return Scene("robotcar", images, tuple(pairs), points)


def _find_home(root: Path) -> Path:
    home = root / "robotcar" if (root / "robotcar").is_dir() else root
    missing = "folder" if not home.is_dir() else None
    for name in ("images", "correspondence"):
        if missing is None and not (home / name).is_dir():
            missing = f"folder {name}/"
    if missing is not None:
        raise FileNotFoundError(
            f"RobotCar Seasons: no {missing} at {home.absolute()} (dataset.root is {root}); expected\n{_TREE}"
        )
    return home


def _correspondence_files(home: Path, conditions: list[str] | None) -> list[Path]:
    folder, prefix = home / "correspondence", f"correspondence_run1_{REFERENCE}_run2_"
    files = sorted(folder.glob(f"{prefix}*.mat"))
    if not files:
        raise FileNotFoundError(
            f"RobotCar Seasons: {folder.absolute()} holds no {prefix}*.mat (dataset.root); expected\n{_TREE}"
        )
    if conditions is None:
        return files
    # night is not night-rain: after the condition comes _ or the end
    found = {path: re.split(r"[_.]", path.name.removeprefix(prefix), maxsplit=1)[0] for path in files}
    have = set(found.values()) | {p.name for p in (home / "images").iterdir() if p.is_dir()}
    unknown = sorted(set(conditions) - have)
    if unknown:
        raise ValueError(
            f"dataset.conditions names {', '.join(unknown)}, which {home.absolute()} does not have; "
            f"it has {', '.join(sorted(have - {REFERENCE}))}"
        )
    return [path for path in files if found[path] in conditions]


def _read_references(
    home: Path, cameras: tuple[str, ...], place_size: float, progress: bool
) -> tuple[dict[str, Reference], torch.Tensor]:
    models = sorted((home / "3D-models" / "individual" / "colmap_reconstructions").glob("*_aligned"))
    merged = home / "3D-models" / "all-merged" / "all.nvm"
    if models:
        return read_colmap_models(models, cameras, progress)
    if merged.is_file():
        return read_nvm(merged, cameras, place_size)
    return {}, torch.zeros(0, 3, dtype=torch.float64)


def _condition_of(name: str) -> str:
    return PurePosixPath(name).parts[0]


def _camera_of(name: str) -> str:
    return PurePosixPath(name).parent.name


class _Intrinsics:
    """Cameras of the intrinsics files, each read when first asked for; the size is an image's."""

    def __init__(self, home: Path):
        self._home = home
        self._cameras: dict[str, Camera] = {}

    def of(self, name: str) -> Camera:
        """The camera of an image; its name says which of the three took it."""
        camera = _camera_of(name)
        if camera not in self._cameras:
            self._cameras[camera] = self._read(camera, self._home / "images" / name)
        return self._cameras[camera]

    def _read(self, camera: str, image: Path) -> Camera:
        path = self._home / "intrinsics" / f"{camera}_intrinsics.txt"
        if not path.is_file():
            raise FileNotFoundError(f"{path.absolute()} does not exist (dataset.root); expected\n{_TREE}")
        values = {}
        for line in path.read_text().splitlines():
            parts = line.replace(":", " ").split()
            if len(parts) == 2:
                values[parts[0]] = parts[1]
        try:
            parameters = [float(values[key]) for key in ("fx", "fy", "cx", "cy")]
        except (KeyError, ValueError):
            raise ValueError(
                f"{path} has {path.read_text()[:200]!r}; expected four lines `name value` of fx, fy, cx, cy in pixels"
            ) from None
        if not image.is_file():
            raise FileNotFoundError(f"{image.absolute()} does not exist, but models or pairs name it (dataset.root)")
        with Image.open(image) as file:
            width, height = file.size
        return Camera.from_colmap("PINHOLE", width, height, parameters, dtype=torch.float64)


def _reference_image(home: Path, name: str, reference: Reference, intrinsics: _Intrinsics) -> SceneImage:
    camera = reference.camera if reference.camera is not None else intrinsics.of(name)
    return SceneImage(
        name, home / "images" / name, REFERENCE, reference.place, camera, reference.cam_from_world,
        is_reference=True, point_ids=reference.point_ids, keypoints=reference.keypoints,
    )  # fmt: skip


def _references_in_blocks(home: Path, names: set[str], intrinsics: _Intrinsics) -> dict[str, SceneImage]:
    return {
        name: SceneImage(
            name, home / "images" / name, REFERENCE, f"block{i // _BLOCK:03d}", intrinsics.of(name), is_reference=True
        )
        for i, name in enumerate(sorted(names))
    }


def _query_images(
    home: Path, cameras: tuple[str, ...], conditions: list[str] | None, references: dict[str, Reference],
    intrinsics: _Intrinsics,
) -> dict[str, SceneImage]:  # fmt: skip
    """Queries of robotcar_v2_train.txt, each in the place of the nearest reference."""
    path = home / "robotcar_v2_train.txt"
    if not path.is_file() or not references:
        return {}
    poses = {
        name: pose
        for name, pose in _read_query_poses(path).items()
        if _camera_of(name) in cameras and (conditions is None or _condition_of(name) in conditions)
    }
    if not poses:
        return {}
    tree = cKDTree(np.stack([r.cam_from_world.center().numpy() for r in references.values()]))
    places = [r.place for r in references.values()]
    nearest = tree.query(np.stack([pose.center().numpy() for pose in poses.values()]))[1]
    return {
        name: SceneImage(
            name, home / "images" / name, _condition_of(name), places[i], intrinsics.of(name), pose
        )
        for (name, pose), i in zip(poses.items(), nearest.tolist(), strict=True)
    }  # fmt: skip


def _read_query_poses(path: Path) -> dict[str, Pose]:
    """`cam_from_world` of lines `name` + 16 numbers: camera to world, row by row."""
    poses = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        name, *values = line.split()
        try:
            matrix = torch.tensor([float(v) for v in values], dtype=torch.float64).reshape(4, 4)
        except (ValueError, RuntimeError):
            raise ValueError(
                f"{path} line {number}: {line[:80]!r} has {len(values)} values after the name; "
                "expected 16 numbers (4×4 camera to world)"
            ) from None
        poses[str(PurePosixPath(name).with_suffix(".jpg"))] = Pose.from_matrix(matrix).inverse()
    return poses


def _check_images(home: Path, images: dict[str, SceneImage], pairs: list[Pair]) -> None:
    """One listing a folder, as there are thousands of images."""
    folders = {image.path.parent for image in images.values()}
    present = {folder: {p.name for p in folder.iterdir()} if folder.is_dir() else set() for folder in folders}
    missing = sorted(name for name, image in images.items() if image.path.name not in present[image.path.parent])
    if missing:
        absent = set(missing)
        count = sum(pair.image_a in absent or pair.image_b in absent for pair in pairs)
        raise FileNotFoundError(
            f"{len(missing)} images, of {count} pairs, are not in {(home / 'images').absolute()}, the first is "
            f"{missing[0]}; unpack their folders, or choose the conditions you have (dataset.conditions)"
        )
