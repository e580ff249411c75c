"""Extended CMU Seasons (Sattler et al., CVPR 2018) with cross-season correspondences (Larsson et al., CVPR 2019)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from scipy.spatial import cKDTree

from gnnet.progress import track
from gnnet.scenes.formats.correspondences import read_correspondence_header
from gnnet.scenes.layouts.cmu_slice import Slice, condition_groups, parse_name, read_intrinsics, read_slice
from gnnet.scenes.pairing import centers_of, covisible_pairs, stretches_of, within_places
from gnnet.scenes.problems import BadInput, OnBad
from gnnet.scenes.scene import Pair, Scene, SceneImage

READER_VERSION = 1  # raise it when the same files make another scene, so that their index is made anew
SLICE_GROUPS = {
    "urban": tuple(range(2, 9)),
    "suburban": tuple(range(9, 18)),
    "park": tuple(range(18, 26)),
    "train": (*range(7, 13), *range(22, 26)),
    "test": (*range(2, 7), *range(13, 22)),
}
_NEAR_IN_TIME = 5_000_000  # microseconds: some tens of metres of a drive
_TREE = """\
  <dataset.root>/cmu/              (or this folder itself)
    images/                        (or the slices directly)
      intrinsics.txt
      slice<N>/{database,query}/img_<5 digits>_c{0,1}_<microseconds>us.jpg
      slice<N>/sparse/{cameras,images,points3D}.bin
      slice<N>/ground-truth-database-images-slice<N>.txt
      slice<N>/camera-poses/*.txt
      slice<N>/test-images-slice<N>.txt
    correspondence/correspondence_slice<N>_*.mat
It comes from: Extended CMU Seasons, visuallocalization.net; cross-season correspondences, Larsson et al., CVPR 2019."""

_log = logging.getLogger(__name__)


def load_cmu(
    root: str | Path,
    *,
    slices: int | str | Iterable[int | str] | None = None,
    cameras: Iterable[str] = ("c0", "c1"),
    images: str = "images",
    places: int = 5,
    min_shared_points: int = 30,
    pairs_per_image: int = 8,
    on_bad: OnBad = "raise",
    progress: bool = True,
) -> Scene:
    """Read the database images with their 3D points, the queries, and the pairs with correspondences.

    The images are distorted, and the cameras keep k1, k2, p1, p2. Names are `slice<N>/query/img_….jpg`;
    the benchmark's result lines have the last part. The condition (`sunny-foliage`) follows from the
    day of the drive; a day that the data set does not list is the condition itself. `Scene.groups`
    are kinds of light and foliage (`low-sun`, `mixed-foliage`).

    A slice is a place: slices see nothing in common. One that is read alone is cut into `places`
    stretches of equally many database images along its longer axis, so that it can be split as well;
    neighbouring stretches may still see common points at their border. A query is in the stretch of
    the nearest database image. A query of unknown pose is in the stretch of the image taken next to it in
    time, or else of its partner in a pair, or it is left out. Pairs across stretches are left out.

    Pairs are those of the correspondence files; in a slice without any, database images that see
    common points of its model.

    Args:
        root: the folder that holds `cmu/`, or `cmu` itself, or Extended CMU Seasons as it is unpacked.
        slices: numbers of slices and groups of them (`urban`, `suburban`, `park`, `train`, `test`), of
            which those are read that are there; None reads all that are there.
        cameras: of `c0`, `c1`.
        images: folder inside `cmu/` of the slices and intrinsics.txt.
        places: into how many stretches a slice that is read alone is cut.
        min_shared_points: fewer common points make no covisible pair.
        pairs_per_image: number of others that each database image is paired with, those that share most points.
        on_bad, progress: see `gnnet.scenes.layouts`.

    Raises:
        FileNotFoundError: no such layout, a slice that is not there, or a file or image that is missing.
        ValueError: a malformed file or setting, or no usable image is left.
    """
    bad, cameras = BadInput(on_bad), _check_cameras(cameras)
    folder, files = _find_slices(Path(root), images, slices)
    read = _read_slices(folder, list(files), cameras, bad, progress)
    named, points = _joined(read, places if len(files) == 1 else 1)
    pairs = _listed_pairs(folder, files, named, cameras, bad, progress)
    named = _placed_by_partner(named, pairs)
    for part in read:
        observed = [named[n] for n in part.images if n in named and named[n].point_ids is not None]
        if observed and not files[part.number]:
            pairs += covisible_pairs(observed, min_shared_points, pairs_per_image, progress)
    groups = condition_groups({image.condition for image in named.values()})
    pairs = within_places(pairs, {image.name: image.place for image in named.values()})
    return Scene(
        "cmu", named, pairs, points, groups, tuple(bad.problems),
        retrieve_within=("camera", "place") if len(files) > 1 else ("camera",),  # stretches of a slice are ours
        dataset="cmu",
    )  # fmt: skip


def _check_cameras(cameras: Iterable[str]) -> tuple[str, ...]:
    cameras = (cameras,) if isinstance(cameras, str) else tuple(cameras)
    if not cameras or not set(cameras) <= {"c0", "c1"}:
        raise ValueError(f"dataset.cameras is {list(cameras)}; expected c0, c1 or both")
    return cameras


def _read_slices(
    folder: Path, numbers: list[int], cameras: tuple[str, ...], bad: BadInput, progress: bool
) -> list[Slice]:
    """The chosen slices that can be read; at least one of them has an image."""
    intrinsics = read_intrinsics(folder, bad)
    read: list[Slice] = []
    for number in track(numbers, "Reading slices", show=progress):
        with bad.skipping():
            read.append(read_slice(folder, number, cameras, intrinsics, bad))
    if not any(part.images for part in read):
        raise ValueError(
            f"{folder.absolute()} holds no usable image of {', '.join(cameras)} in the slices "
            f"{', '.join(map(str, numbers))} (dataset.cameras, dataset.slices){bad.first}"
        )
    return read


def _find_slices(
    root: Path, images: str, slices: int | str | Iterable[int | str] | None
) -> tuple[Path, dict[int, list[Path]]]:
    """The folder of the slices, and the correspondence files of each that is chosen, by its number, ascending."""
    home = root / "cmu" if (root / "cmu").is_dir() else root
    for folder in (home / images, home):
        # Whole numbers: slice2 is not slice20.
        present = [n for n, p in _numbered(folder, r"slice([1-9]\d{0,5})") if p.is_dir()]
        if present:
            files: dict[int, list[Path]] = {number: [] for number in _choose_slices(slices, sorted(present), folder)}
            for number, path in _numbered(home / "correspondence", r"correspondence_slice([1-9]\d{0,5})_.*\.mat"):
                if number in files:
                    files[number].append(path)
            return folder, files
    raise FileNotFoundError(
        f"Extended CMU Seasons: no folder slice<N> in {(home / images).absolute()} (dataset.root is {root}); "
        f"expected\n{_TREE}"
    )


def _numbered(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    """Number and path of the files and folders whose name has the pattern, sorted by name."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    matches = [(re.fullmatch(pattern, path.name, re.ASCII), path) for path in paths]
    return [(int(match[1]), path) for match, path in matches if match]


def _choose_slices(slices: int | str | Iterable[int | str] | None, present: list[int], folder: Path) -> tuple[int, ...]:
    """Numbers of the slices asked for, ascending; for a group, its slices that are there."""
    if slices is None:
        return tuple(present)
    chosen: set[int] = set()
    for entry in (slices,) if isinstance(slices, int | str) else slices:
        if isinstance(entry, str) and entry in SLICE_GROUPS:
            numbers, what = SLICE_GROUPS[entry], f"slice of {entry}"
        elif not isinstance(entry, bool) and re.fullmatch(r"\d{1,6}", str(entry), re.ASCII):
            numbers, what = (int(entry),), f"slice {entry}"
        else:
            raise ValueError(
                f"dataset.slices names {entry!r}; expected numbers of slices, or of {', '.join(SLICE_GROUPS)}"
            )
        if not set(numbers) & set(present):
            raise FileNotFoundError(
                f"Extended CMU Seasons: no {what} in {folder.absolute()} (dataset.slices); there are the slices "
                f"{', '.join(map(str, present))}, so choose of these, or unpack slice<N>.tar there"
            )
        chosen |= set(numbers) & set(present)
    if not chosen:
        raise ValueError("dataset.slices is empty; expected numbers of slices, groups of them, or null for all")
    return tuple(sorted(chosen))


def _joined(read: list[Slice], places: int) -> tuple[dict[str, SceneImage], torch.Tensor]:
    """Images of all slices in their places, and the points; images without a place have an empty one."""
    named: dict[str, SceneImage] = {}
    first = 0
    for part in read:
        images = list(part.images.values())
        for image, place in zip(images, _places(images, places), strict=True):
            rows = None if image.point_ids is None else image.point_ids + first
            named[image.name] = replace(image, place=place, point_ids=rows)
        first += len(part.points)
    return named, torch.from_numpy(np.concatenate([np.zeros((0, 3)), *(part.points for part in read)]))


def _places(images: list[SceneImage], count: int) -> list[str]:
    """Place of each image of a slice: the slice, or one of `count` stretches of it; empty where that is not known."""
    posed = [image for image in images if image.cam_from_world is not None]
    references = [image for image in posed if image.is_reference] or posed
    if count <= 1 or not references:
        return [image.place for image in images]
    centers = centers_of(references)
    of_reference = stretches_of(centers, count)
    nearest = cKDTree(centers).query(centers_of(posed))[1]
    stretch = {image.name: int(of_reference[i]) for image, i in zip(posed, nearest.tolist(), strict=True)}
    by_time = sorted((_time(image), stretch[image.name]) for image in posed)
    times = np.array([time for time, _ in by_time])
    places = []
    for image in images:
        if image.name not in stretch:
            at = int(np.abs(times - _time(image)).argmin())
            if abs(by_time[at][0] - _time(image)) <= _NEAR_IN_TIME:
                stretch[image.name] = by_time[at][1]
        places.append(f"{image.place}/{stretch[image.name]}" if image.name in stretch else "")
    return places


def _time(image: SceneImage) -> int:
    return parse_name(image.path.name, image.path).time


def _listed_pairs(
    folder: Path, files: dict[int, list[Path]], images: dict[str, SceneImage], cameras: tuple[str, ...],
    bad: BadInput, progress: bool,
) -> list[Pair]:  # fmt: skip
    """Pairs of the correspondence files, without their place."""
    listed = [(number, path) for number, paths in files.items() for path in paths]
    pairs = []
    for number, path in track(listed, "Reading pairs", show=progress):
        with bad.skipping():
            header = read_correspondence_header(path)
            names = [PurePosixPath(name).name for name in (header.name_a, header.name_b)]
            if all(parse_name(name, path).camera in cameras for name in names):
                a, b = (_image_of(folder / f"slice{number}", name, images, path) for name in names)
                pairs.append(Pair(a, b, "", path, count=header.number))
    return pairs


def _image_of(home: Path, name: str, images: dict[str, SceneImage], source: Path) -> str:
    """Full name of a slice's image, which is a query or else a database image."""
    for kind in ("query", "database"):
        if f"{home.name}/{kind}/{name}" in images:
            return f"{home.name}/{kind}/{name}"
    raise FileNotFoundError(
        f"image {home / 'query' / name} does not exist, nor in database/, but {source} names it; "
        f"unpack {home.name}.tar there, or choose the slices you have (dataset.slices)"
    )


def _placed_by_partner(images: dict[str, SceneImage], pairs: list[Pair]) -> dict[str, SceneImage]:
    """Give images without a place that of their first partner in a pair that has one; leave out the others."""
    partner: dict[str, str] = {}
    for pair in pairs:
        for name, other in ((pair.image_a, pair.image_b), (pair.image_b, pair.image_a)):
            if not images[name].place and images[other].place:
                partner.setdefault(name, images[other].place)
    placed = {n: i if i.place else replace(i, place=partner.get(n, "")) for n, i in images.items()}
    lost = sum(not image.place for image in placed.values())
    if lost:
        _log.info("%d of %d images left out, as nothing tells their stretch of the slice", lost, len(placed))
    return {name: image for name, image in placed.items() if image.place}
