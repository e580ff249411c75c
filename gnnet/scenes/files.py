"""Reading a dataset's files so that what is broken is named: the file, what was found, what is expected."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}


def below(root: Path, name: str, source: str) -> Path:
    """`root / name` for a relative name that a file gives (`source` says which, and where in it).

    Raises:
        ValueError: if the name is empty, absolute, or leads out of the root.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if not path.parts or "\0" in name or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise ValueError(f"{source} names {name[:80]!r}; expected a path inside {root}")
    return root / path


def image_files(folder: Path) -> list[Path]:
    """The JPEG and PNG files directly in a folder, by name; hidden ones are left out."""
    return sorted(
        p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".") and p.is_file()
    )


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image whose header is readable and whose end is there; pixels are not decoded.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty, truncated or foreign file; it is named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"image {path} does not exist; put it there, or take it out of the dataset's lists")
    try:
        with Image.open(path) as image:
            size, kind = image.size, image.format
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"image {path} ({path.stat().st_size} bytes) cannot be read ({str(error).splitlines()[0][:120]}); "
            "fetch it again, or remove it from the dataset"
        ) from error
    mark = _END_MARKS.get(kind)
    if mark is not None and not _ends_with(path, mark):
        raise ValueError(
            f"image {path} ({path.stat().st_size} bytes) is truncated: the {kind} ends before its end mark; "
            "fetch it again, or remove it from the dataset"
        )
    return size


def _ends_with(path: Path, mark: bytes, within: int = 4096) -> bool:
    """Whether the mark stands in the last bytes; some cameras write notes of their own behind it."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - within))
        return mark in file.read()


def read_text(path: Path, expected: str) -> str:
    """Text of a file.

    Raises:
        FileNotFoundError, ValueError: if it is missing or no text; the message ends with what is `expected`.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise FileNotFoundError(f"{path} does not exist; expected {expected}") from None
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} cannot be read as text ({error}); expected {expected}") from error


def parse_numbers(words: list[str], count: int, source: str, expected: str) -> np.ndarray:
    """`count` finite numbers (float64) of words; `source` names the file and line they stand in.

    Raises:
        ValueError: if they are fewer or more, or one is no finite number.
    """
    try:
        numbers = np.array([float(word) for word in words])
    except ValueError as error:
        raise ValueError(f"{source}: {error}; expected {expected}") from None
    if len(numbers) != count:
        raise ValueError(f"{source} has {len(numbers)} numbers; expected {expected}")
    if not np.isfinite(numbers).all():
        raise ValueError(f"{source} holds {' '.join(words)[:80]}, which is not finite; expected {expected}")
    return numbers
