"""Text files that are read with clear errors, files and folders that appear when they are complete, and locks."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import unicodedata
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np


def below(root: Path, name: str, source: str) -> Path:
    """`root / name` for a relative name that stands in a file.

    Args:
        root: folder that the name must stay inside.
        name: with `/` or `\\` between its parts.
        source: the file that gives the name, and where in it.

    Raises:
        ValueError: if the name is empty, absolute, or leads out of the root.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if not path.parts or "\0" in name or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise ValueError(f"{source} names {name[:80]!r}; expected a path inside {root}")
    return root / path


def found_below(root: Path, name: str, source: str) -> Path:
    """`below`, or where there is no such file, the only one whose name is alike: see `alike`.

    Raises:
        ValueError: as `below`, and if the system cannot have a file of this name.
    """
    path = below(root, name, source)
    found = root
    try:
        for part in path.relative_to(root).parts:
            if not (found / part).exists() and found.is_dir():
                others = _by_likeness(found, found.stat().st_mtime_ns).get(alike(part), [])
                part = others[0] if len(others) == 1 else part
            found /= part
    except OSError as error:  # such as a name that is too long
        raise ValueError(f"{source} names {name[:80]!r}, which cannot be looked for ({error.strerror})") from None
    return found


@lru_cache(maxsize=32)
def _by_likeness(folder: Path, changed: int) -> dict[str, list[str]]:
    """Names in a folder by what is `alike` in them; `changed` makes the folder be listed again when it has changed."""
    names: dict[str, list[str]] = {}
    for name in os.listdir(folder):
        names.setdefault(alike(name), []).append(name)
    return names


def alike(name: str) -> str:
    """What a file's name has in common with those that other systems make of it.

    Windows and macOS hold `A.JPG` and `a.jpg` for one, macOS writes `é` as two characters, and a browser writes a space
    as `%20`.
    """
    return unicodedata.normalize("NFC", unquote(name)).casefold()


def results_folder(path: Path) -> Path:
    """Make a folder for results and see that files can be written into it, before what takes long.

    Raises:
        ValueError: if it cannot be made or written into.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        problem = None if os.access(path, os.W_OK) else "no permission"
    except OSError as error:
        problem = error.strerror
    if problem is not None:
        raise ValueError(f"{path.absolute()} cannot take results ({problem}); name another folder (paths.output_dir)")
    return path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that one process at a time can hold; the system frees it if the process dies.

    Raises:
        OSError: if the file cannot be written.
    """
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def text_encoding(path: Path) -> str:
    """Encoding of a text file: UTF-8, with a mark or without, or UTF-16 with its mark."""
    with open(path, "rb") as file:
        return _encoding(file.read(2))


def _encoding(content: bytes) -> str:
    return "utf-16" if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig"


def read_text(path: Path, expected: str) -> str:
    """Text of a UTF-8 file, or one of UTF-16 with its mark; without that mark, and with `\\n` at the end of each line.

    Raises:
        FileNotFoundError, ValueError: if the file is missing or no text; the message ends with what is `expected`.
    """
    try:
        content = path.read_bytes()
        text = content.decode(_encoding(content))
        text = text.replace("\ufeff", "")  # of files that were joined
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise FileNotFoundError(f"{path} does not exist; expected {expected}") from None
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} cannot be read as text ({error}); expected {expected}") from error


class Line(NamedTuple):
    """One line of a text file: its number, from 1, its words (at least one), and `file line number` for messages."""

    number: int
    words: list[str]
    source: str


def read_lines(path: Path, expected: str, *, last: int = -1) -> list[Line]:
    """Lines of a text file that are neither empty nor begin with #.

    Args:
        path: the file.
        expected: what should stand there, for messages.
        last: number of words at the end of a line that are split off; what stands before them is the first word,
            which may hold spaces. -1 splits all.

    Raises:
        FileNotFoundError, ValueError: as `read_text`.
    """
    numbered = enumerate(map(str.strip, read_text(path, expected).split("\n")), start=1)
    return [Line(n, t.rsplit(None, last), f"{path} line {n}") for n, t in numbered if t and not t.startswith("#")]


def parse_numbers(words: list[str], count: int, source: str, expected: str) -> np.ndarray:
    """Turn words into finite numbers (count,), float64.

    Args:
        words: as they stand in a file.
        count: how many there must be.
        source: file and line, for messages.
        expected: what should stand there, for messages.

    Raises:
        ValueError: if there are fewer or more, or one is no finite number.
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


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; after the block, that file takes the name `path`.

    The folder is made. A file that stood at `path` is replaced; it stays as it was if the block raises.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to make a folder at; after the block, that folder takes the name `path`.

    One process at a time may do so (`locked`). A folder that stood at `path` is replaced after the block; what a
    process left at the temporary path when it was killed is removed before.
    """
    partial = path.with_name(f".{path.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    shutil.rmtree(path, ignore_errors=True)
    partial.replace(path)


def write_at_once(path: str | Path, content: bytes) -> Path:
    """Write a file, whose folder is made; what stood there is replaced only when all is written."""
    with new_file(path) as partial:
        partial.write_bytes(content)
    return Path(path)


def write_json(path: str | Path, content: dict) -> Path:
    """Write strict JSON by `write_at_once`.

    Raises:
        ValueError: if a number is NaN or infinite, which JSON does not know.
    """
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    return write_at_once(path, text.encode("utf-8"))
