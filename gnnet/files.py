"""Text files that are read with clear errors, files that are written atomically, and locks between processes."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np


def below(root: Path, name: str, source: str) -> Path:
    """`root / name` for a relative name that a file gives (`source` says which, and where in it).

    Raises:
        ValueError: if the name is empty, absolute, or leads out of the root.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if not path.parts or "\0" in name or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise ValueError(f"{source} names {name[:80]!r}; expected a path inside {root}")
    return root / path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system frees it if the process dies.

    Raises:
        OSError: if the file cannot be written.
    """
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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


def write_at_once(path: str | Path, content: bytes) -> Path:
    """Write a file, whose folder is made; what stood there is replaced only when all is written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def write_json(path: str | Path, content: dict) -> Path:
    """`write_at_once` of strict JSON.

    Raises:
        ValueError: if a number is NaN or infinite, which JSON does not know.
    """
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    return write_at_once(path, text.encode("utf-8"))
