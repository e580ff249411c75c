"""RobotCar Seasons (Sattler et al., CVPR 2018) with cross-season correspondences (Larsson et al., CVPR 2019)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Iterable
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch

from gnnet.files import parse_numbers, read_text
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.progress import track
from gnnet.scenes.formats.correspondences import read_correspondence_header
from gnnet.scenes.formats.images import usual_size
from gnnet.scenes.layouts.robotcar_models import (
    CAMERAS,
    REFERENCE,
    by_time,
    camera_of,
    condition_of,
    image_name,
    moment,
    read_colmap_models,
    read_merged_model,
)
from gnnet.scenes.layouts.robotcar_queries import UNKNOWN, Queries, read_queries, read_test_queries
from gnnet.scenes.pairing import within_places
from gnnet.scenes.problems import BadInput, OnBad
from gnnet.scenes.scene import Pair, Scene, SceneImage

READER_VERSION = 1  # raise it when the same files make another scene, so that their index is made anew
NIGHT = ("night", "night-rain")
_BLOCK = 100  # moments of the reference drive a place where no model tells the places apart
_TREE = """\
  <dataset.root>/robotcar/   (or this folder itself)
    images/<condition>/{left,right,rear}/<timestamp>.jpg
    correspondence/correspondence_run1_overcast-reference_run2_<condition>*.mat
    intrinsics/{left,right,rear}_intrinsics.txt
    extrinsics/{left,right,rear}_extrinsics.txt   (for left and right queries)
    3D-models/individual/colmap_reconstructions/NNN_aligned/{cameras,images,points3D}.txt
    3D-models/individual/queries_per_location/*NNN.txt   (optional)
    3D-models/all-merged/all.nvm   (where there are no individual models)
    robotcar_v2_train.txt, robotcar_v2_test.txt
It comes from: RobotCar Seasons from visuallocalization.net; cross-season correspondences, Larsson et al., CVPR 2019."""


def load_robotcar(
    root: Path,
    *,
    conditions: list[str] | None = None,
    cameras: Iterable[str] = ("rear",),
    place_size: float = 50.0,
    test_queries: bool = False,
    on_bad: OnBad = "raise",
    progress: bool = True,
) -> Scene:
    """Read the references with their 3D points, the queries of known pose, and the pairs with correspondences.

    Places are the individual models (`NNN`), where they exist; a query belongs to the place that
    `queries_per_location` lists it in, else to that of the nearest reference. With the merged model
    alone, a new place begins where the reference drive has gone `place_size` metres or jumps as far;
    without any model, after 100 moments. A pair whose images belong to two places (at their border) is
    left out. The known poses are of the rear camera; a left or right query of the same moment gets its
    pose through the rig. `Scene.groups` are `night-all` (night, night-rain) and `day-all` (the others).

    Args:
        root: the folder that holds `robotcar/`, or `robotcar` itself.
        conditions: query conditions or groups of them to read; None for all.
        cameras: some of `left`, `rear`, `right`.
        place_size: metres, used with the merged model only.
        test_queries: also the images of robotcar_v2_test.txt, without pose; their place is
            `unknown` where `queries_per_location` does not tell it.
        on_bad, progress: see `gnnet.scenes.layouts`.

    Raises:
        FileNotFoundError: if folders, correspondences, intrinsics or images are missing.
        ValueError: if a file is malformed, a condition or camera is not there, or nothing is left.
    """
    bad, home = BadInput(on_bad), _find_home(Path(root))
    cameras = _check_cameras(cameras)
    files, chosen = _choose(home, conditions)
    on_disk = _list_images(home)
    intrinsics = _read_intrinsics(home, cameras, on_disk, bad)
    references, points, lost = _read_references(home, intrinsics, place_size, bad, progress)

    def wanted(name: str) -> bool:
        return camera_of(name) in intrinsics and (chosen is None or condition_of(name) in chosen)

    queries = read_queries(home, tuple(intrinsics), wanted, references, lost, on_disk, bad)
    plain_image = partial(_plain_image, home, intrinsics)
    images = references | {name: plain_image(name, *query) for name, query in queries.posed.items()}
    pairs = _read_pairs(files, intrinsics, bad, progress)
    if not references:
        images |= _references_in_blocks(pairs, plain_image)
    images, pairs = _join(images, pairs, plain_image, queries)
    if test_queries:
        for name, place in read_test_queries(home, wanted, queries, bad).items():
            images.setdefault(name, plain_image(name, place))
    images, pairs = _on_disk_only(home, images, pairs, on_disk, bad)
    groups = _groups({image.condition for image in images.values()})
    return Scene("robotcar", images, pairs, points, groups, tuple(bad.problems), ("camera",), "robotcar")


def _find_home(root: Path) -> Path:
    home = root / "robotcar" if (root / "robotcar").is_dir() else root
    needed = {"folder": home, "folder images/": home / "images", "folder correspondence/": home / "correspondence"}
    missing = next((what for what, folder in needed.items() if not folder.is_dir()), None)
    if missing is not None:
        raise FileNotFoundError(
            f"RobotCar Seasons: no {missing} at {home.absolute()} (dataset.root is {root}); expected\n{_TREE}"
        )
    return home


def _check_cameras(cameras: Iterable[str]) -> tuple[str, ...]:
    cameras = tuple(dict.fromkeys([cameras] if isinstance(cameras, str) else cameras))
    if not cameras or set(cameras) - set(CAMERAS):
        raise ValueError(f"dataset.cameras is [{', '.join(map(str, cameras))}]; expected some of {', '.join(CAMERAS)}")
    return cameras


def _choose(home: Path, conditions: list[str] | None) -> tuple[list[Path], frozenset[str] | None]:
    """The correspondence files of the chosen conditions, and these conditions, with groups resolved."""
    folder, prefix = home / "correspondence", f"correspondence_run1_{REFERENCE}_run2_"
    files = sorted(folder.glob(f"{prefix}*.mat"))
    if not files:
        raise FileNotFoundError(
            f"RobotCar Seasons: {folder.absolute()} holds no {prefix}*.mat (dataset.root); expected\n{_TREE}"
        )
    if conditions is None:
        return files, None
    # night is not night-rain: after the condition comes _ or the end
    found = {path: re.split(r"[_.]", path.name.removeprefix(prefix), maxsplit=1)[0] for path in files}
    have = set(found.values()) | {p.name for p in (home / "images").iterdir() if p.is_dir()}
    groups = _groups(have)
    unknown = sorted(set(conditions) - have - set(groups))
    if unknown:
        raise ValueError(
            f"dataset.conditions names {', '.join(unknown)}, which {home.absolute()} does not have; "
            f"it has {', '.join(sorted(have - {REFERENCE}))}, and of groups {', '.join(groups)}"
        )
    chosen = frozenset(c for condition in conditions for c in groups.get(condition, (condition,)))
    return [path for path in files if found[path] in chosen], chosen


def _groups(conditions: set[str]) -> dict[str, tuple[str, ...]]:
    groups = {
        "night-all": tuple(c for c in NIGHT if c in conditions),
        "day-all": tuple(sorted(conditions - set(NIGHT) - {REFERENCE})),
    }
    return {name: members for name, members in groups.items() if members}


def _list_images(home: Path) -> frozenset[str]:
    """Names of the images on disk; one listing a folder, as there are tens of thousands of images."""
    folders = [(c.name, camera) for c in (home / "images").iterdir() for camera in CAMERAS if (c / camera).is_dir()]
    return frozenset(
        f"{condition}/{camera}/{entry.name}"
        for condition, camera in folders
        for entry in os.scandir(home / "images" / condition / camera)
        if entry.name.endswith(".jpg") and entry.is_file()
    )


def _read_intrinsics(home: Path, cameras: tuple[str, ...], on_disk: frozenset[str], bad: BadInput) -> dict[str, Camera]:
    """Cameras by name; the size is that of their images. A camera with broken intrinsics is left out."""
    intrinsics = {}
    for camera in cameras:
        with bad.skipping():
            path = home / "intrinsics" / f"{camera}_intrinsics.txt"
            expected = f"four lines `name value` of fx, fy, cx, cy in pixels (dataset.root):\n{_TREE}"
            words = [line.replace(":", " ").split() for line in read_text(path, expected).splitlines()]
            values = dict(pair for pair in words if len(pair) == 2)
            given = [values[key] for key in ("fx", "fy", "cx", "cy") if key in values]
            parameters = parse_numbers(given, 4, str(path), expected)
            if parameters[:2].min() <= 0:
                raise ValueError(f"{path} has fx, fy {parameters[:2]}; expected positive numbers in pixels")
            names = [name for name in on_disk if camera_of(name) == camera]
            names.sort(key=lambda name: (condition_of(name) != REFERENCE, name))
            if not names:
                raise FileNotFoundError(
                    f"no image of the camera {camera} in {home.absolute()}/images/<condition>/{camera}; "
                    "unpack them, or leave the camera out (dataset.cameras)"
                )
            width, height = usual_size([home / "images" / name for name in names])
            intrinsics[camera] = Camera.from_colmap("PINHOLE", width, height, parameters, dtype=torch.float64)
    if not intrinsics:
        raise ValueError(f"no camera of {home.absolute()} can be used{bad.first}")
    return intrinsics


def _read_references(
    home: Path, intrinsics: dict[str, Camera], place_size: float, bad: BadInput, progress: bool
) -> tuple[dict[str, SceneImage], torch.Tensor, set[str]]:
    """References by name, points (P, 3), and the places whose model was left out."""
    models = sorted((home / "3D-models" / "individual" / "colmap_reconstructions").glob("*_aligned"))
    merged = home / "3D-models" / "all-merged" / "all.nvm"
    if models:
        references, points = read_colmap_models(home, models, tuple(intrinsics), bad, progress)
        if not references:
            raise ValueError(
                f"none of the {len(models)} models in {models[0].parent} holds an image of {', '.join(intrinsics)}; "
                "choose other cameras (dataset.cameras), or unpack the models again"
            )
        lost = {folder.name.removesuffix("_aligned") for folder in models} - {r.place for r in references.values()}
        return references, points, lost
    if merged.is_file():
        with bad.skipping():
            return *read_merged_model(home, merged, intrinsics, place_size, bad), set()
    return {}, torch.zeros(0, 3, dtype=torch.float64), set()


def _plain_image(
    home: Path, intrinsics: dict[str, Camera], name: str, place: str, pose: Pose | None = None
) -> SceneImage:  # fmt: skip
    return SceneImage(name, home / "images" / name, condition_of(name), place, intrinsics[camera_of(name)], pose)


def _references_in_blocks(pairs: list[Pair], plain_image: Callable[[str, str], SceneImage]) -> dict[str, SceneImage]:
    """References that pairs name, in places of `_BLOCK` moments each."""
    names = {name for pair in pairs for name in (pair.image_a, pair.image_b) if condition_of(name) == REFERENCE}
    images = {}
    for number, (_, at_once) in enumerate(groupby(sorted(names, key=by_time), moment)):
        for name in at_once:
            images[name] = replace(plain_image(name, f"block{number // _BLOCK:03d}"), is_reference=True)
    return dict(sorted(images.items()))


def _read_pairs(files: list[Path], cameras: Container[str], bad: BadInput, progress: bool) -> list[Pair]:
    """Pairs of the correspondence files, for the chosen cameras, without their place."""
    pairs = []
    for path in track(files, "Reading pairs", show=progress):
        with bad.skipping():
            name_a, name_b, count = read_correspondence_header(path)
            name_a, name_b = image_name(name_a, str(path)), image_name(name_b, str(path))
            if camera_of(name_a) in cameras and camera_of(name_b) in cameras:
                pairs.append(Pair(name_a, name_b, "", path, count=count))
    return pairs


def _join(
    images: dict[str, SceneImage], pairs: list[Pair], plain_image: Callable[[str, str], SceneImage], queries: Queries
) -> tuple[dict[str, SceneImage], list[Pair]]:
    """Images with those that only pairs name, in the place of their partner, and the pairs with their places."""
    images, kept = dict(images), []
    for pair in pairs:
        names = (pair.image_a, pair.image_b)
        unknown = [name for name in names if name not in images]
        if not any(queries.belongs_to_lost(name) for name in unknown):
            partner = next((images[name].place for name in names if name in images), UNKNOWN)
            for name in unknown:
                images[name] = plain_image(name, queries.locations.get(moment(name), partner))
            kept.append(pair)
    return images, within_places(kept, {name: image.place for name, image in images.items()})


def _on_disk_only(
    home: Path, images: dict[str, SceneImage], pairs: list[Pair], on_disk: frozenset[str], bad: BadInput
) -> tuple[dict[str, SceneImage], list[Pair]]:
    absent = set(images) - on_disk
    missing = sorted(absent)
    kept = [pair for pair in pairs if pair.image_a not in absent and pair.image_b not in absent]
    if missing and bad.on_bad == "raise":
        raise FileNotFoundError(
            f"{len(missing)} images, of {len(pairs) - len(kept)} pairs, are not in {(home / 'images').absolute()}, the "
            f"first is {missing[0]}; unpack their folders, or choose the conditions you have (dataset.conditions)"
        )
    for name in missing:
        bad.report(FileNotFoundError(f"image {images[name].path} does not exist, but models, lists or pairs name it"))
    images = {name: image for name, image in images.items() if name not in absent}
    if not images:
        raise ValueError(
            f"nothing usable is left of {home.absolute()} (dataset.root); no model and no pair names an image "
            f"that is there{bad.first}"
        )
    return images, kept
