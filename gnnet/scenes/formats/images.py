"""Image files: which ones a folder holds, their sizes, and whether they are whole; no pixel is decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_LOOKED_AT = 5  # images that tell the usual size
_TAIL = 4096  # bytes at a file's end that hold its end mark; some cameras write notes after it
_END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}


def subfolders(folder: Path) -> list[Path]:
    """Folders directly in a folder, sorted by name, without hidden ones; none if the folder does not exist."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def named_folders(root: Path, is_one: Callable[[Path], bool]) -> dict[str, Path]:
    """Folders of a dataset by the prefix of their images' names: the root if it `is_one`, else those in it that are."""
    return {"": root} if is_one(root) else {f"{f.name}/": f for f in subfolders(root) if is_one(f)}


def image_files(folder: Path) -> list[Path]:
    """JPEG and PNG files directly in a folder, sorted by name, without hidden ones."""
    return sorted(
        p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".") and p.is_file()
    )


def image_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels of an image whose header is readable and whose end mark is there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the file, if it is empty, truncated, no image, or no regular file.
    """
    if not path.is_file():
        if path.exists():
            raise ValueError(f"image {path} is a folder or device; expected a JPEG or PNG file")
        raise FileNotFoundError(f"image {path} does not exist; put it there, or take it out of the dataset's lists")
    bytes_found = path.stat().st_size
    try:
        with open(path, "rb") as file:
            with Image.open(file) as image:
                size, kind = image.size, image.format
            mark = _END_MARKS.get(str(kind))
            complete = mark is None or _has_end(file, mark, start=0 if kind == "PNG" else _scan_start(file))
    except Exception as error:  # Pillow raises many types on a damaged file
        raise ValueError(
            f"image {path} ({bytes_found} bytes) cannot be read ({(str(error) or type(error).__name__)[:120]!r}); "
            "fetch it again, or remove it from the dataset"
        ) from error
    if not complete:
        raise ValueError(
            f"image {path} ({bytes_found} bytes) is truncated: the {kind} ends before its end mark; "
            "fetch it again, or remove it from the dataset"
        )
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
    """Whether the mark is in the last bytes, after `start`."""
    file.seek(max(start, file.seek(0, 2) - _TAIL))
    return mark in file.read()
