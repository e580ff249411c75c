"""Image files: which ones a folder holds, what their headers say, whether they are whole, and their pixels in 8 bits.

Read are JPEG, PNG, TIFF, BMP and WebP, by their content, whatever the file's ending.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
LIMIT = "GNNET_MAX_MEGAPIXELS"  # environment variable, which worker processes inherit
_MEGAPIXELS = 250.0  # where the variable is not set: the largest photographs of phones, with room
# By their first bytes. Opened by these classes, as `Image.open` has a limit of its own and tries forty formats.
_READERS = {
    b"\xff\xd8\xff": JpegImageFile, b"\x89PNG\r\n\x1a\n": PngImageFile, b"II*\0": TiffImageFile,
    b"MM\0*": TiffImageFile, b"BM": BmpImageFile, b"RIFF": WebPImageFile,
}  # fmt: skip
_NOT_READ = {
    b"GIF8": "a GIF", b"\0\0\0\x0cjP": "JPEG 2000", b"\xff\x4f\xff\x51": "JPEG 2000", b"8BPS": "a Photoshop file",
    b"\x76\x2f\x31\x01": "OpenEXR", b"P5": "PGM", b"P6": "PPM", b"II+\0": "BigTIFF", b"MM\0+": "BigTIFF",
}  # fmt: skip
_UNSUPPORTED = re.compile(r"not support|unsupport|cannot handle|unknown pixel|not available", re.IGNORECASE)
_CONVERT = "convert it to an 8-bit JPEG or PNG, or remove it from the dataset"
_FETCH = "fetch it again, or remove it from the dataset"
_MODES = ("1", "L", "P", "LA", "La", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "I")  # and I;16 of all kinds
_BITS = (8, 10, 12, 14, 16)  # that cameras write in 16
_NUMBER = re.compile(r"([0-9]{1,30})")
_ORIENTATION = 0x0112  # EXIF's tag
_EXIF = 0x8769  # where the notes below stand
_FOCAL_ON_FILM, _FOCAL, _PLANE_RESOLUTION, _PLANE_UNIT, _TAKEN_WIDTH = 0xA405, 0x920A, 0xA20E, 0xA210, 0xA002
_FILM_DIAGONAL = math.hypot(36, 24)  # mm
_MILLIMETRES = {2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}  # of the sensor's unit: inch, cm, mm, µm
_PLAUSIBLE = 0.1, 50.0  # focal lengths in widths of the image
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_STRIPS = ((273, 324), (279, 325))  # TIFF's tags: where strips or tiles begin, and their lengths in bytes
_COMPRESSION = 259  # TIFF's tag; 1 is none, where a pixel takes a bit at least
_STRIP = 4e6  # pixels that are converted at once while an image is shrunk
_PIECES, _PIECE = 16, 512  # number and bytes of the pieces of a file that are hashed
_LOOKED_AT = 5  # images that tell the usual size
_TAIL = 4096  # bytes at a file's end that are looked at first for its end mark
_PIXELS_A_BYTE = 512  # of a JPEG, at most: a bit at least for each block of 64 pixels


def limit_images(megapixels: float | None) -> None:
    """Refuse larger images in this process, and in those that it starts; None leaves the limit as it is.

    Raises:
        ValueError: if it is no positive number.
    """
    if megapixels is None:
        return
    if isinstance(megapixels, str) or not megapixels > 0:
        raise ValueError(f"max_megapixels={megapixels}; expected a positive number")
    os.environ[LIMIT] = str(megapixels)


def subfolders(folder: Path) -> list[Path]:
    """Folders directly in a folder, sorted by name, without hidden ones; none if the folder does not exist."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def named_folders(root: Path, is_one: Callable[[Path], bool]) -> dict[str, Path]:
    """Folders of a dataset by the prefix of their images' names: the root if it `is_one`, else those in it that are."""
    return {"": root} if is_one(root) else {f"{f.name}/": f for f in subfolders(root) if is_one(f)}


def image_files(folder: Path) -> list[Path]:
    """Image files directly in a folder, sorted by name, without hidden ones."""
    return sorted(
        p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".") and p.is_file()
    )


def in_order(paths: Sequence[Path]) -> list[Path]:
    """The frames of a sequence in order: as their names are sorted, or, where that differs, by the one number in them.

    Raises:
        ValueError: if both orders differ and the names differ in more than one number, so that neither is certain.
    """
    by_name = sorted(paths, key=lambda path: path.name)
    words = [_NUMBER.split(path.stem) for path in by_name]  # text and numbers in turn
    if len({len(word) for word in words}) == 1:
        columns = [list(column) for column in zip(*words, strict=True)]
        vary = [i for i, column in enumerate(columns) if len(set(column)) > 1]
        if len(vary) == 1 and vary[0] % 2 == 1:
            numbers = [int(number) for number in columns[vary[0]]]
            if len(set(numbers)) == len(numbers):
                return [by_name[i] for i in np.argsort(numbers, kind="stable")]
    natural = sorted(by_name, key=lambda p: [int(w) if w.isdigit() else w for w in _NUMBER.split(p.stem)])
    for first, second in zip(by_name, natural, strict=True):
        if first != second:
            raise ValueError(
                f"the order of the images in {first.parent} is not certain: sorted by name {first.name} comes where "
                f"by the numbers in the names {second.name} would; give all numbers as many digits (0001, 0002, …)"
            )
    return by_name


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """An image file whose header is read, and whose pixels are not yet.

    Whatever goes wrong with the file, in the block too, becomes a ValueError that names it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: if the file is no image of a format that is read, damaged, larger than the limit (`LIMIT`), of
            pixels that are not read, or no regular file.
    """
    if not path.is_file():
        if path.exists():
            raise ValueError(f"image {path} is a folder or device; expected an image file")
        raise FileNotFoundError(f"image {path} does not exist; put it there, or take it out of the dataset's lists")
    told = f"image {path} ({path.stat().st_size} bytes)"
    try:
        with open(path, "rb") as file:
            reader = _reader(file)
            file.seek(0)
            with reader(file) as image:
                _require_readable(image, path.stat().st_size)
                yield image
    except _Refused as error:
        raise ValueError(f"{told} {error}") from None
    except Exception as error:  # Pillow raises many types on a damaged file
        text = (str(error) or type(error).__name__).splitlines()[0][:120]
        advice = _CONVERT if _UNSUPPORTED.search(text) else f"it may be truncated: {_FETCH}"
        raise ValueError(f"{told} cannot be read ({text!r}); {advice}") from error


class _Refused(Exception):
    """Why a file is not read: what stands in the message after the file's name."""


def _reader(file: BinaryIO) -> Callable[[BinaryIO], Image.Image]:
    head = file.read(16)
    for mark, reader in _READERS.items():
        if head.startswith(mark) and (mark != b"RIFF" or head[8:12] == b"WEBP"):
            return reader
    known = next((name for mark, name in _NOT_READ.items() if head.startswith(mark)), None)
    if head[4:8] == b"ftyp":
        known = "HEIC or AVIF"
    if known is not None:
        raise _Refused(f"is {known}, which is not read; {_CONVERT}")
    found = f"is no JPEG, PNG, TIFF, BMP or WebP, and begins {head!r}" if head else "is empty"
    raise _Refused(f"cannot be read (it {found}); {_FETCH}")


def _require_readable(image: Image.Image, length: int) -> None:
    width, height = stored_size(image)
    try:
        limit = float(os.environ.get(LIMIT) or _MEGAPIXELS)
    except ValueError as error:
        raise _Refused(f"is not opened, as {LIMIT} in the environment is no number: {error}") from None
    if width * height > limit * 1e6:
        raise _Refused(
            f"is {width}×{height} = {width * height / 1e6:.0f} megapixels, more than the limit of {limit:g}; "
            f"shrink it with its camera, or raise the limit: max_megapixels=N, or {LIMIT}=N in the environment"
        )
    plain = isinstance(image, TiffImageFile) and image.tag_v2.get(_COMPRESSION, 1) == 1
    if (isinstance(image, JpegImageFile) or plain) and width * height > (8 if plain else _PIXELS_A_BYTE) * length:
        raise _Refused(f"is too short for the {width}×{height} pixels that its header tells; {_FETCH}")
    if image.mode not in _MODES and not image.mode.startswith("I;16"):
        kind = "32-bit floating-point numbers" if image.mode == "F" else f"the kind {image.mode}"
        raise _Refused(f"has pixels of {kind}, which are not read; {_CONVERT}")


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Width and height in pixels of an opened image as the file stores it, whatever its orientation tag."""
    if isinstance(image, TiffImageFile):  # Pillow gives the size of the turned image
        return int(image.tag_v2[256]), int(image.tag_v2[257])
    return image.size


def orientation(image: Image.Image) -> int:
    """The orientation tag (EXIF) of an opened image, 1 to 8; 1 (upright) where there is none."""
    try:
        tag = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged notes: the pixels may be sound
        return 1
    return tag if tag in range(1, 9) else 1


def orientation_needed(image: Image.Image, camera_size: tuple[float, float] | None) -> int:
    """The orientation tag where an opened image has its camera's size only when it is turned by it, else 1.

    So a model of the pixels as stored, as COLMAP makes it, is taken whatever the tag; and so is a model of
    upright pixels, where width and height tell. A turn of 180° or of a square image cannot be told by its size.
    """
    size = stored_size(image)
    if camera_size is None or camera_size == size or camera_size != size[::-1]:
        return 1
    tag = orientation(image)
    return tag if tag >= 5 else 1


def image_size(path: Path, camera_size: tuple[float, float] | None = None) -> tuple[int, int]:
    """Width and height in pixels of an image whose header is readable and whose end is there.

    Args:
        path: the file.
        camera_size: width and height that the camera says; an image that has them only when it is turned by its
            orientation tag is told as turned.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the file, if it is empty, truncated, no image, or no regular file.
    """
    with open_image(path) as image, open(path, "rb") as file:
        size = stored_size(image)
        if orientation_needed(image, camera_size) > 1:
            size = size[::-1]
        if not _is_whole(image, file):
            raise _Refused(f"is truncated: the {image.format} ends before its end mark; {_FETCH}")
    return size


def usual_size(paths: Sequence[Path]) -> tuple[int, int]:
    """Width and height in pixels that most of the first readable images have, as one may be of another size.

    Raises:
        FileNotFoundError, ValueError: if no image can be read; the message is that of the last one.
    """
    sizes: list[tuple[int, int]] = []
    problem: Exception = ValueError("no image to take a size from")
    for path in paths:
        try:
            sizes.append(image_size(path))
        except (OSError, ValueError) as error:  # said where all images are checked
            problem = error
        if len(sizes) == _LOOKED_AT:
            break
    if not sizes:
        raise problem
    return max(sizes, key=sizes.count)


def eight_bits(
    image: Image.Image, camera_size: tuple[float, float] | None = None, size: tuple[int, int] | None = None
) -> Image.Image:
    """The pixels of an opened image in 8 bits a colour, grey (L) or RGB, turned as `image_size` tells.

    Grey of 16 bits is scaled by the bits that it uses: cameras of 10, 12 and 14 bits write into 16. Alpha is dropped.

    Args:
        image: from `open_image`, whose block tells what is refused here: pixels of more than 16 bits, and colours of
            16 bits that use the lower ones only.
        camera_size: width and height that the camera says.
        size: width and height that the image as it is stored is shrunk to, taking little more memory than its decoded
            pixels do; None keeps its size.
    """
    wanted = orientation_needed(image, camera_size)
    given = orientation(image) if isinstance(image, TiffImageFile) else 1  # Pillow turns TIFF alone as it reads it
    deep_colour = any(";16" in str(tile) for tile in image.tile)  # type: ignore[attr-defined]
    if size is None:
        found = _converted(image, 1, deep_colour)
    else:
        drafted = image.draft("RGB", (2 * size[0], 2 * size[1]))  # a JPEG's decoder shrinks by 2, 4 or 8
        image.load()
        size = size[::-1] if given >= 5 else size
        step = max(1, min(image.width // (2 * size[0]), image.height // (2 * size[1])))
        right, bottom = drafted[1][2:] if drafted else image.size  # where the stored image ends in the decoded one
        found = _converted(image, step, deep_colour)
        found = found.resize(size, Image.Resampling.BILINEAR, box=(0, 0, right / step, bottom / step))
    if wanted != given:
        found = turned(found, wanted if given == 1 else {6: 8, 8: 6}.get(given, given))
    return found


def _converted(image: Image.Image, step: int, deep_colour: bool) -> Image.Image:
    """An image in 8 bits, L or RGB, in which a pixel is the mean of `step` by `step`.

    Several are made strip by strip, as a conversion of all would take as much memory again.

    Args:
        deep_colour: whether the file has 16 bits a colour, of which Pillow gives the upper 8.
    """
    width, height = image.size
    rows = height if step == 1 else max(1, int(_STRIP / (width * step))) * step
    strips = [(0, top, width, min(top + rows, height)) for top in range(0, height, rows)]
    crop = image.crop if len(strips) > 1 else lambda box: image
    deep, bits, brightest = image.mode.startswith("I"), 8, 0
    if deep:
        extrema = [(values.min(), values.max()) for values in (np.asarray(crop(box)) for box in strips)]
        low, high = min(low for low, _ in extrema), max(high for _, high in extrema)
        if low < 0 or high >= 1 << _BITS[-1]:
            raise _Refused(f"holds numbers from {low} to {high}, deeper than 16 bits; {_CONVERT}")
        bits = next(bits for bits in _BITS if high < 1 << bits)
    mode = "L" if deep or image.mode in ("1", "L") else "RGB"
    parts = []
    for strip in map(crop, strips):
        part = Image.fromarray((np.asarray(strip) >> (bits - 8)).astype(np.uint8)) if deep else strip.convert(mode)
        if deep_colour and not deep:
            brightest = max(brightest, *(high for _, high in part.getextrema()))  # type: ignore[misc]
        parts.append(part if step == 1 else part.reduce(step))
    if deep_colour and not deep and brightest < 16:  # 12 bits of 16 would be almost black
        raise _Refused(f"has 16 bits a colour, of which it uses the lower 12 only; {_CONVERT}")
    if len(parts) == 1:
        return parts[0]
    found = Image.new(mode, (-(-width // step), -(-height // step)))
    for part, (_, top, _, _) in zip(parts, strips, strict=True):
        found.paste(part, (0, top // step))
    return found


def turned(image: Image.Image, tag: int) -> Image.Image:
    """An image turned upright by its orientation tag, 1 to 8."""
    return image if tag == 1 else image.transpose(_UPRIGHT[tag])


def exif_focal_length(path: Path) -> float | None:
    """Focal length in pixels of the stored image by the photograph's notes (EXIF); None where they do not tell it.

    It is known to a few percent: from the equivalent on 35 mm film, whose diagonal is as long as the image's, or from
    the focal length in mm and the sensor's pixels in a mm. An image that was cut after it was taken is told wrongly.
    """
    try:
        with open_image(path) as image:
            width, height = stored_size(image)
            notes = image.getexif().get_ifd(_EXIF)
        on_film, focal, per_unit, taken = (
            float(notes.get(tag, 0)) for tag in (_FOCAL_ON_FILM, _FOCAL, _PLANE_RESOLUTION, _TAKEN_WIDTH)
        )
        found = on_film * math.hypot(width, height) / _FILM_DIAGONAL
        if not found > 0:
            resized = width / taken if taken > 0 else 1.0
            found = focal * per_unit / _MILLIMETRES[int(notes.get(_PLANE_UNIT, 2))] * resized
    except Exception:  # damaged notes raise many types; the pixels may be sound
        return None
    return found if _PLAUSIBLE[0] < found / max(width, height) < _PLAUSIBLE[1] else None


def _is_whole(image: Image.Image, file: BinaryIO) -> bool:
    """Whether the file of an opened image reaches to where its pixels end."""
    length = file.seek(0, 2)
    if isinstance(image, JpegImageFile):
        return _has_end(file, b"\xff\xd9", start=_scan_start(file))
    if isinstance(image, PngImageFile):
        return _has_end(file, b"IEND", start=0)
    if isinstance(image, TiffImageFile):
        strips = zip(*(_numbers(image.tag_v2.get(a) or image.tag_v2.get(b)) for a, b in _STRIPS), strict=False)
        return all(start + count <= length for start, count in strips)
    if isinstance(image, WebPImageFile):
        file.seek(4)
        return 8 + int.from_bytes(file.read(4), "little") <= length
    if isinstance(image, BmpImageFile) and image.tile[:1] and image.tile[0][0] == "raw":
        _, _, start, settings = image.tile[0]
        return start + settings[1] * image.height <= length  # type: ignore[index, operator]  # (mode, bytes a row, …)
    return True


def _numbers(value: int | tuple[int, ...] | None) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)


def _scan_start(file: BinaryIO) -> int:
    """Byte where a JPEG's compressed pixels begin, after its headers, which may hold a thumbnail with an end mark."""
    position = 2
    while True:
        file.seek(position)
        marker = file.read(4)
        if len(marker) < 4 or marker[0] != 0xFF:
            raise ValueError(f"no JPEG marker at byte {position}")
        if marker[1] == 0xFF:  # a fill byte
            position += 1
            continue
        position += 2 + int.from_bytes(marker[2:], "big")
        if marker[1] == 0xDA:
            return position


def _has_end(file: BinaryIO, mark: bytes, *, start: int) -> bool:
    """Whether the mark comes after `start`: in the last bytes, or before what phones append, as a short film."""
    length = file.seek(0, 2)
    for first in (max(start, length - _TAIL), start):
        file.seek(first)
        if mark in file.read():
            return True
    return False


def sample_digest(path: Path) -> str:
    """Hash of a file's size and of sixteen pieces spread over it, which tells two photographs of one name apart."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        length = file.seek(0, 2)
        digest.update(str(length).encode())
        for piece in range(_PIECES):
            file.seek(piece * max(0, length - _PIECE) // (_PIECES - 1))
            digest.update(file.read(_PIECE))
    return digest.hexdigest()
