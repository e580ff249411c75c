"""Image files that are whole, and those that are not."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gnnet.scenes.formats.images import image_size


def picture(kind: str = "JPEG", size: tuple[int, int] = (64, 48), **settings) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **settings)
    return file.getvalue()


def with_thumbnail() -> bytes:
    """A JPEG whose notes (EXIF) hold a small JPEG with an end mark of its own."""
    thumbnail, whole = picture(size=(8, 8)), picture()
    note = b"\xff\xe1" + (len(thumbnail) + 8).to_bytes(2, "big") + b"Exif\0\0" + thumbnail
    return whole[:2] + note + whole[2:]


@pytest.mark.parametrize(
    "content",
    [
        picture(),
        picture(progressive=True),
        picture(quality=100),
        picture("PNG"),
        with_thumbnail(),
        picture() + b"a camera's note" * 20,
    ],
)
def test_whole_images(tmp_path: Path, content: bytes):
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    assert image_size(path) == (64, 48)


@pytest.mark.parametrize("content", [picture(), picture(progressive=True), picture("PNG"), with_thumbnail()])
def test_an_image_cut_anywhere_is_named(tmp_path: Path, content: bytes):
    path = tmp_path / "x.jpg"
    for length in [*range(0, len(content) - 8, max(1, len(content) // 40)), len(content) - 8]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"x\.jpg \({length} bytes\).*fetch it again"):
            image_size(path)
    path.write_bytes(content[:1500].ljust(len(content), b"\0"))  # a download that reserved its place
    with pytest.raises(ValueError, match=r"truncated|cannot be read"):
        image_size(path)


def test_other_things(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg does not exist"):
        image_size(tmp_path / "gone.jpg")
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(ValueError, match="folder or device"):
        image_size(tmp_path / "folder.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ValueError, match="folder or device"):
        image_size(tmp_path / "pipe.jpg")


def test_damaged_images_raise_value_errors_alone(tmp_path: Path):
    rng, path = np.random.default_rng(0), tmp_path / "x.jpg"
    for content in (picture(), picture("PNG"), picture(progressive=True)):
        for _ in range(100):
            damaged = bytearray(content)
            for position in rng.integers(200, size=rng.integers(1, 8)):
                damaged[position] = rng.choice([0, 1, 127, 255, rng.integers(256)])
            path.write_bytes(damaged)
            try:
                image_size(path)
            except ValueError as error:
                assert str(path) in str(error)
