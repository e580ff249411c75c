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
from gnnet.sampling import turns
from gnnet.scenes.scene import SceneImage

_PNG_MARK = b"\x89PNG\r\n\x1a\n"


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

    Raises:
        FileNotFoundError: no such file.
        ValueError: if the file is no readable image, or not of its camera's size; the message names the file.
    """
    pixels = read_image(image.path)
    camera = image.camera
    if camera is not None:
        height, width = pixels.shape[-2:]
        expected = camera.size.round().int().tolist()
        if expected != [width, height]:
            raise ValueError(
                f"image {image.path} is {width}×{height} pixels, its camera says {expected[0]}×{expected[1]}; "
                "give the camera of images of this size, or the image that it took"
            )
    pixels, factors = limit_size(pixels, largest_side)
    return ImageView(pixels, None if camera is None else camera.scale(torch.from_numpy(factors)), factors)


def read_image(path: Path) -> Tensor:
    """RGB image (3, H, W) uint8.

    Raises:
        FileNotFoundError: no such file.
        ValueError: if the file is no readable image; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"image {path} does not exist")
    try:
        with open(path, "rb") as file:
            is_png = file.read(len(_PNG_MARK)) == _PNG_MARK
        if is_png:  # not by torchvision, which ends the process on a damaged PNG
            with Image.open(path) as image:
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
        return decode_image(str(path), mode=ImageReadMode.RGB)
    except Exception as error:  # Pillow raises many types on a damaged file
        raise ValueError(
            f"image {path} cannot be read ({(str(error) or type(error).__name__).splitlines()[0][:120]}); "
            "it may be truncated: fetch it again, or remove it from the dataset"
        ) from error


def limit_size(image: Tensor, largest_side: int | None) -> tuple[Tensor, np.ndarray]:
    """Shrink an image (3, H, W) to `largest_side` pixels; also the factors (2,) by which its x and y shrank."""
    height, width = image.shape[-2:]
    if largest_side is None or max(height, width) <= largest_side:
        return image, np.ones(2)
    ratio = largest_side / max(height, width)
    new_height, new_width = round(height * ratio), round(width * ratio)
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
    order = np.argsort(time)
    return order[np.argsort(turns(cells[order].tolist()), kind="stable")[:count]]
