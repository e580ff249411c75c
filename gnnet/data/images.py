"""Image files: read, shrunk together with the camera, and points chosen evenly over an image."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import resize

from gnnet.geometry.camera import Camera
from gnnet.scenes.formats.images import eight_bits, open_image, orientation_needed, stored_size
from gnnet.scenes.scene import SceneImage

_LARGE = 50e6  # pixels from which an image is shrunk as it is decoded: a JPEG by its decoder, others strip by strip


class ImageView(NamedTuple):
    """An image of a scene, read and perhaps shrunk.

    Args:
        pixels: (3, H, W) uint8 RGB.
        camera: intrinsics of these pixels; None where the scene has none.
        factors: (2,) float64, for x and y: a pixel of the file times `factors` is a pixel of this view.
    """

    pixels: Tensor
    camera: Camera | None
    factors: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the view in pixels."""
        return self.pixels.shape[-1], self.pixels.shape[-2]

    @property
    def file_size(self) -> tuple[int, int]:
        """Width and height of the file's image in pixels."""
        width, height = np.round(self.size / self.factors).astype(int).tolist()
        return width, height


def read_view(image: SceneImage, largest_side: int | None = None) -> ImageView:
    """The pixels of an image and its camera, both shrunk to `largest_side` pixels; None keeps the file's size.

    An image is turned as `read_image` tells.

    Raises:
        FileNotFoundError: no such file.
        ValueError: if the file is no readable image, or not of its camera's size; the message names the file.
    """
    camera = image.camera
    view = read_pixels(image.path, camera, largest_side)
    if camera is None:
        return view
    found, (width, height) = view.file_size, camera.size.round().int().tolist()
    if found != (width, height):
        raise ValueError(
            f"image {image.path} is {found[0]}×{found[1]} pixels, its camera says {width}×{height}; "
            "give the camera of images of this size, or the image that it took"
        )
    return view._replace(camera=camera if (view.factors == 1).all() else camera.scale(torch.from_numpy(view.factors)))


def read_image(path: Path, camera: Camera | None = None) -> Tensor:
    """RGB image (3, H, W) uint8.

    Args:
        path: the file.
        camera: an image that has the camera's size only when it is turned by its orientation tag (EXIF) is turned;
            any other is given as the file stores it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: if the file is no readable image; the message names it.
    """
    return read_pixels(path, camera).pixels


def read_pixels(path: Path, camera: Camera | None = None, largest_side: int | None = None) -> ImageView:
    """An image shrunk to `largest_side` pixels, without its camera; a very large one in little memory.

    Args:
        path: the file.
        camera: turns the image, as `read_image` tells.
        largest_side: in pixels; None keeps the file's size.

    Raises:
        FileNotFoundError, ValueError: as `read_image`.
    """
    camera_size = None if camera is None else tuple(camera.size.round().tolist())
    with open_image(path) as image:
        turn, size = orientation_needed(image, camera_size), stored_size(image)
        if largest_side is not None and size[0] * size[1] >= _LARGE and max(size) > largest_side:
            small = _limited(size, largest_side)
            factors = np.array(small) / size
            pixels = _as_tensor(eight_bits(image, camera_size, small))
            return ImageView(pixels, None, factors if turn < 5 else factors[::-1].copy())
        if image.format == "JPEG" and turn == 1:
            pixels = decode_image(str(path), mode=ImageReadMode.RGB)
        else:  # not by torchvision, which ends the process on a damaged PNG
            pixels = _as_tensor(eight_bits(image, camera_size))
    small_pixels, factors = limit_size(pixels, largest_side)
    return ImageView(small_pixels, None, factors)


def _as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def _limited(size: tuple[int, int], largest_side: int) -> tuple[int, int]:
    """Width and height of an image that is shrunk to `largest_side` pixels."""
    ratio = largest_side / max(size)
    return round(size[0] * ratio), round(size[1] * ratio)


def limit_size(image: Tensor, largest_side: int | None) -> tuple[Tensor, np.ndarray]:
    """Shrink an image (3, H, W) to `largest_side` pixels; also the factors (2,) by which its x and y shrank."""
    height, width = image.shape[-2:]
    if largest_side is None or max(height, width) <= largest_side:
        return image, np.ones(2)
    new_width, new_height = _limited((width, height), largest_side)
    factors = np.array([new_width / width, new_height / height])
    return resize(image, [new_height, new_width], antialias=True), factors


def even_subset(
    xy: np.ndarray,
    size: tuple[int, int],
    count: int,
    generator: np.random.Generator,
    *,
    preference: np.ndarray | None = None,
) -> np.ndarray:
    """Rows of at most `count` of the points (N, 2), spread evenly over an image.

    The image is cut into about `count` / 2 cells, which give their points in turn, one a round.

    Args:
        xy: (N, 2) points in pixels.
        size: width and height of the image in pixels.
        count: number of points wanted.
        generator: draws the order of the points of a cell.
        preference: (N,) makes a point likelier to be drawn early; None treats all alike. Do not pass the
            weights of a training pair's correspondences: the loss weighs by them already.
    """
    if len(xy) <= count:
        return np.arange(len(xy))
    cell = np.sqrt(2 * size[0] * size[1] / count)
    columns = int(size[0] // cell) + 1
    cells = (xy[:, 1] // cell).astype(np.int64) * columns + (xy[:, 0] // cell).astype(np.int64)
    # Exponential clocks: the first to ring is one with probability proportional to its preference.
    time = generator.exponential(size=len(xy)) / (1 if preference is None else np.maximum(preference, 1e-6))
    grouped = np.lexsort((time, cells))
    _, first, counts = np.unique(cells[grouped], return_index=True, return_counts=True)
    turn = np.arange(len(xy)) - np.repeat(first, counts)  # how many of its cell come before a point
    return grouped[np.lexsort((time[grouped], turn))[:count]]
