"""Timelapse: photographs by a fixed camera over days and seasons; each pixel corresponds to itself in all of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from gnnet.progress import track
from gnnet.sampling import evenly
from gnnet.scenes.formats.images import eight_bits, image_files, image_size, open_image, subfolders
from gnnet.scenes.problems import BadInput, OnBad
from gnnet.scenes.scene import Pair, Scene, SceneImage

READER_VERSION = 1  # raise it when the same files make another scene, so that their index is made anew
DUSK, NIGHT = 0.65, 0.3  # of the place's usual median grey value: darker images are dusk, or night
_SIDE = 256  # pixels, largest side of the images by which light and alignment are judged
_CONFIDENT = 0.12  # height of the correlation peak from which a shift is believed
_TREE = """\
  <dataset.root>/<place>/*.jpg   photographs by one fixed camera, one folder a place
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
    """Read folders of images: each folder is a place, and its images are paired with each other.

    An image's condition is `day`, `dusk` or `night`, by its median grey value relative to the place's. An
    image that is shifted against the others of its place, as the camera had moved, is left out, and a
    message about it is among the scene's problems whatever `on_bad` says.

    Args:
        root: the folder of the places, or of one place.
        folders: places to read; None reads all.
        partners: number of steps at which an image is paired with later and with earlier images of its place.
        max_shift: pixels; an image that is shifted by more is left out.
        on_bad, progress: see `gnnet.scenes.layouts`.

    Raises:
        FileNotFoundError: no folder, or no place with two images.
        ValueError: an image that cannot be read, or a place that is not there.
    """
    root, bad = Path(root), BadInput(on_bad)
    found = _folders(root, folders)
    files = [(place, path) for place, folder in found.items() for path in image_files(folder)]
    looks: dict[str, list[_Look]] = {place: [] for place in found}
    with ThreadPoolExecutor(8) as pool:
        futures = [(place, pool.submit(_look_at, path)) for place, path in files]
        for place, future in track(futures, "Looking at photographs", show=progress):
            with bad.skipping():
                looks[place].append(future.result())
    images: dict[str, SceneImage] = {}
    pairs: list[Pair] = []
    moved: list[str] = []
    for place, seen in looks.items():
        seen = _without_moved(_of_one_size(place, seen, bad), max_shift, moved)
        if len(seen) < 2:
            continue
        of_place = [
            SceneImage(f"{place}/{look.path.name}", look.path, condition, place)
            for look, condition in zip(seen, _conditions(seen), strict=True)
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
    """An image in small: its size in pixels, median grey value, and equalised gradient magnitudes (h, w)."""

    path: Path
    size: tuple[int, int]
    grey: float
    edges: np.ndarray


def _look_at(path: Path) -> _Look:
    size = image_size(path)
    with open_image(path) as image:
        image.draft("L", (_SIDE, _SIDE))
        factor = _SIDE / max(size)
        small = eight_bits(image).convert("L")
        small = small.resize((round(size[0] * factor), round(size[1] * factor)), Image.Resampling.BOX)
    grey = np.asarray(small, np.float32)
    dy, dx = np.gradient(grey)
    magnitude = np.hypot(dx, dy)
    return _Look(path, size, float(np.median(grey)), magnitude / (magnitude + magnitude.mean() + 1.0))


def _of_one_size(place: str, seen: list[_Look], bad: BadInput) -> list[_Look]:
    """The images of the place's most frequent size; `bad` gets the others."""
    sizes = [look.size for look in seen]
    usual = max(sorted(set(sizes)), key=sizes.count, default=(0, 0))
    for look in seen:
        if look.size != usual:
            bad.report(
                ValueError(
                    f"image {look.path} is {look.size[0]}×{look.size[1]} pixels, the others of {place} are "
                    f"{usual[0]}×{usual[1]}; a place's images must be of one camera and size: move it elsewhere"
                )
            )
    return [look for look in seen if look.size == usual]


def _without_moved(seen: list[_Look], max_shift: float, messages: list[str]) -> list[_Look]:
    """The images that are not shifted against the place's mean picture; `messages` gets one for each of the others."""
    if len(seen) < 3:
        return seen
    mean = np.mean([look.edges for look in seen], axis=0)
    kept: list[_Look] = []
    for look in seen:
        shift, height = _shift(look.edges, mean)
        pixels = shift * max(look.size) / _SIDE
        if pixels > max_shift and height > _CONFIDENT:
            messages.append(
                f"image {look.path} is shifted by {pixels:.0f} pixels against the others of its folder: the camera had "
                "moved; put the images of each position into a folder of their own"
            )
        else:
            kept.append(look)
    return kept


def _shift(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """How far picture a is shifted against b, in cells, and the height of the correlation's peak (1: identical)."""
    window = np.outer(np.hanning(a.shape[0]), np.hanning(a.shape[1]))
    spectrum_a, spectrum_b = (np.fft.rfft2((x - x.mean()) * window) for x in (a, b))
    power = np.sqrt(np.mean(np.abs(spectrum_a) ** 2) * np.mean(np.abs(spectrum_b) ** 2)) + 1e-9
    correlation = np.fft.irfft2(spectrum_a * spectrum_b.conj(), a.shape) / power
    height, width = a.shape
    y, x = np.unravel_index(correlation.argmax(), a.shape)
    distance = np.hypot((y + height // 2) % height - height // 2, (x + width // 2) % width - width // 2)
    return float(distance), float(correlation.max())


def _conditions(looks: list[_Look]) -> list[str]:
    usual = np.median([look.grey for look in looks]) + 1e-6
    return ["night" if look.grey < NIGHT * usual else "dusk" if look.grey < DUSK * usual else "day" for look in looks]


def _pairs(images: list[SceneImage], partners: int) -> list[Pair]:
    """Pair each image with others on a ring of all, at `partners` steps: equally many pairs an image, none twice.

    The steps are spread over half the ring, so that an image is paired with images of distant dates too.
    """
    count = len(images)
    steps = (1 + evenly(count // 2, partners)).tolist()
    chosen = {(min(i, j), max(i, j)) for step in steps for i in range(count) for j in [(i + step) % count]}
    return [Pair(images[i].name, images[j].name, images[i].place, static=True) for i, j in sorted(chosen)]
