"""Timelapse: a fixed camera over days and seasons, whose pixels correspond to themselves under any light."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.progress import track

from gnnet.scenes.formats.images import image_files, image_size, subfolders
from gnnet.scenes.problems import BadInput, OnBad
from gnnet.scenes.scene import Pair, Scene, SceneImage

READER_VERSION = 1  # raise it when the same files make another scene, so that their index is made anew
DUSK, NIGHT = 0.65, 0.3  # of the place's usual median grey value: darker images are dusk, or night
_SIDE = 256  # pixels, largest side of the images by which light and alignment are judged
_CONFIDENT = 0.12  # height of the correlation peak from which a shift is believed
_TREE = """\
  <dataset.root>/<place>/*.jpg   photographs by one camera that stands still, one folder a place
or
  <dataset.root>/*.jpg           one place"""

_log = logging.getLogger(__name__)


def load_timelapse(
    root: str | Path,
    *,
    folders: Iterable[str] | None = None,
    partners: int = 20,
    max_shift: float = 4.0,
    on_bad: OnBad = "raise",
    progress: bool = True,
) -> Scene:
    """Each folder of images is a place; its images are paired at random, those of other light first.

    An image's condition is `day`, `dusk` or `night` by its median grey value against the place's. An
    image that is shifted against the others of its place, as the camera was moved, is left out, and
    is among the scene's problems whatever `on_bad` says.

    Args:
        root: the folder of the places, or of one place.
        folders: places to read; None reads all.
        partners: each image is paired with so many others of its place, at most.
        max_shift: pixels that an image may be shifted by.
        on_bad: what to do with files that cannot be read.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: no folder, or no place with two images.
        ValueError: an image that cannot be read, or a place that is not there.
    """
    root, bad = Path(root), BadInput(on_bad)
    found = _folders(root, folders)
    files = [(place, path) for place, folder in found.items() for path in image_files(folder)]
    looks: dict[str, list[tuple[Path, _Look]]] = {place: [] for place in found}
    with ThreadPoolExecutor(8) as pool:
        futures = [(place, path, pool.submit(_look_at, path)) for place, path in files]
        for place, path, future in track(futures, "Looking at photographs", disable=not progress, transient=True):
            with bad.skipping():
                looks[place].append((path, future.result()))
    images: dict[str, SceneImage] = {}
    pairs: list[Pair] = []
    moved: list[str] = []
    for place, seen in looks.items():
        seen = _of_one_size(place, seen, bad)
        seen, messages = _standing_still(seen, max_shift)
        moved += messages
        if len(seen) < 2:
            continue
        of_place = [
            SceneImage(f"{place}/{path.name}", path, condition, place)
            for (path, _), condition in zip(seen, _conditions([look for _, look in seen]), strict=True)
        ]
        images |= {image.name: image for image in of_place}
        pairs += _pairs(of_place, partners)
    if not pairs:
        lost = bad.problems + moved
        left_out = f" ({len(lost)} left out: {lost[0]})" if lost else ""
        raise FileNotFoundError(
            f"{root.absolute()} holds no place with two images of one size{left_out} (dataset.root); expected\n{_TREE}"
        )
    if moved:
        _log.warning("%d images left out as the camera had moved, the first: %s", len(moved), moved[0])
    return Scene("timelapse", images, tuple(pairs), problems=(*bad.problems, *moved), dataset="timelapse")


def _folders(root: Path, chosen: Iterable[str] | None) -> dict[str, Path]:
    if not root.is_dir():
        raise FileNotFoundError(f"{root.absolute()} is no folder (dataset.root); expected\n{_TREE}")
    folders = {folder.name: folder for folder in subfolders(root)}
    if image_files(root):
        folders = {root.absolute().name: root}
    if chosen is None:
        return folders
    chosen = list(chosen)
    unknown = sorted(set(chosen) - set(folders))
    if unknown:
        raise ValueError(
            f"dataset.folders names {', '.join(unknown)}, which {root.absolute()} does not have; "
            f"it has {', '.join(folders) or 'no folder'}"
        )
    return {name: folders[name] for name in chosen}


class _Look(NamedTuple):
    """An image in small: size in pixels, median grey value, and gradient magnitudes (h, w), equalised."""

    size: tuple[int, int]
    grey: float
    edges: np.ndarray


def _look_at(path: Path) -> _Look:
    size = image_size(path)
    try:
        with Image.open(path) as image:
            image.draft("L", (_SIDE, _SIDE))
            factor = _SIDE / max(size)
            small = image.convert("L").resize((round(size[0] * factor), round(size[1] * factor)), Image.Resampling.BOX)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"image {path} cannot be read ({error}); fetch it again, or remove it") from error
    grey = np.asarray(small, np.float32)
    dy, dx = np.gradient(grey)
    magnitude = np.hypot(dx, dy)
    return _Look(size, float(np.median(grey)), magnitude / (magnitude + magnitude.mean() + 1.0))


def _of_one_size(place: str, seen: list[tuple[Path, _Look]], bad: BadInput) -> list[tuple[Path, _Look]]:
    """The images that have the place's most frequent size; the others are reported."""
    if not seen:
        return []
    sizes = [look.size for _, look in seen]
    usual = max(sorted(set(sizes)), key=sizes.count)
    for path, look in seen:
        if look.size != usual:
            with bad.skipping():
                raise ValueError(
                    f"image {path} is {look.size[0]}×{look.size[1]} pixels, the others of {place} are "
                    f"{usual[0]}×{usual[1]}; a place's images must be of one camera and size: move it elsewhere"
                )
    return [entry for entry in seen if entry[1].size == usual]


def _standing_still(seen: list[tuple[Path, _Look]], max_shift: float) -> tuple[list[tuple[Path, _Look]], list[str]]:
    """Without the images that are shifted against the place's mean picture, and a message for each of these."""
    if len(seen) < 3:
        return seen, []
    mean = np.mean([look.edges for _, look in seen], axis=0)
    still, messages = [], []
    for path, look in seen:
        shift, height = _shift(look.edges, mean)
        pixels = shift * max(look.size) / _SIDE
        if pixels > max_shift and height > _CONFIDENT:
            messages.append(
                f"image {path} is shifted by {pixels:.0f} pixels against the others of its folder: the camera had "
                "moved; put the images of each position into a folder of their own"
            )
        else:
            still.append((path, look))
    return still, messages


def _shift(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """How far picture a is shifted against b, in cells, and the height of the correlation's peak (1: identical)."""
    window = np.outer(np.hanning(a.shape[0]), np.hanning(a.shape[1]))
    spectrum_a, spectrum_b = (np.fft.rfft2((x - x.mean()) * window) for x in (a, b))
    power = np.sqrt(np.mean(np.abs(spectrum_a) ** 2) * np.mean(np.abs(spectrum_b) ** 2)) + 1e-9
    correlation = np.fft.irfft2(spectrum_a * spectrum_b.conj(), a.shape) / power
    height, width = a.shape
    y, x = np.unravel_index(correlation.argmax(), a.shape)
    return float(np.hypot((y + height // 2) % height - height // 2, (x + width // 2) % width - width // 2)), float(
        correlation.max()
    )


def _conditions(looks: list[_Look]) -> list[str]:
    usual = np.median([look.grey for look in looks]) + 1e-6
    return ["night" if look.grey < NIGHT * usual else "dusk" if look.grey < DUSK * usual else "day" for look in looks]


def _pairs(images: list[SceneImage], partners: int) -> list[Pair]:
    """Each image with the `partners` next ones on a ring: every image in as many pairs, and no pair twice.

    Steps of the ring are spread over it, so that an image meets others of far-off dates too.
    """
    count = len(images)
    steps = np.unique(np.linspace(1, count // 2, min(partners, count // 2)).round().astype(int))
    chosen = {tuple(sorted((i, (i + int(step)) % count))) for step in steps for i in range(count)}
    place = images[0].place
    return [Pair(images[i].name, images[j].name, place, static=True) for i, j in sorted(chosen)]
