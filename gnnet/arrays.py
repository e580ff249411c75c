"""The array file: named arrays and a JSON header in one file.

It is a format of our own, as an array is written piece by piece, read as a memory map, and nothing in it is executed.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gnnet.files import new_file

_MAGIC = b"gnnet arrays 1\n"
_PAGE = 4096
_FLOCK = "hhqqi0q"  # C's struct flock: type, whence, start, length, process
_KINDS = ("u1", "i4", "i8", "u8", "f2", "f4", "f8")


class ArrayFile:
    """Arrays by name; their sizes are fixed when the file is made.

    The file stays open, so that header and arrays are of one file even if another takes its place meanwhile.

    Args:
        path: an existing file.
        writable: open it for `write`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is of another kind, cut off, or its header is broken.
    """

    def __init__(self, path: str | Path, *, writable: bool = False) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} does not exist; expected a map or an index of gnnet")
        self._writable = writable
        self._file = file = self.path.open("r+b" if writable else "rb")
        start = file.read(len(_MAGIC) + 8)
        length = int.from_bytes(start[len(_MAGIC) :], "little")
        size = os.fstat(file.fileno()).st_size
        if not start.startswith(_MAGIC) or length > size:
            raise ValueError(f"{self.path} is no map or index of gnnet, or is damaged; delete it: it is made anew")
        try:
            content = json.loads(file.read(length))
            self.about: dict = dict(content["about"])
            self._places = {name: _place(*place) for name, place in content["arrays"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"the header of {self.path} is damaged ({error}); delete the file") from error
        ends = (offset + kind.itemsize * math.prod(shape) for kind, shape, offset in self._places.values())
        end = max(ends, default=0)
        if end > size:
            raise ValueError(f"{self.path} has {size} bytes, its header says {end}: it was cut off; delete it")

    @classmethod
    def create(cls, path: str | Path, arrays: Mapping[str, tuple[str, tuple[int, ...]]], about: dict) -> ArrayFile:
        """Make a file with zeros in all arrays, open for `write`; it replaces one at `path`.

        Args:
            path: its folder is made.
            arrays: type (`f4`) and shape of each.
            about: what JSON can hold; `about` gives it back.
        """
        offset, places = 0, {}
        for name, (kind, shape) in arrays.items():
            places[name] = (kind, shape, offset)
            offset += -(-np.dtype(kind).itemsize * math.prod(shape) // _PAGE) * _PAGE
        # The header's length moves the offsets, whose digits are part of it: room for them to grow.
        room = len(json.dumps({"about": about, "arrays": places})) + 24 * len(places) + len(_MAGIC) + 8
        first = -(-room // _PAGE) * _PAGE
        places = {name: (kind, shape, at + first) for name, (kind, shape, at) in places.items()}
        header = json.dumps({"about": about, "arrays": places}).encode()
        with new_file(path) as partial, partial.open("wb") as file:
            file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
            file.truncate(first + max(offset, _PAGE))
        return cls(path, writable=True)

    @property
    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of each array, as `create` takes them."""
        return {name: (kind.str[1:], shape) for name, (kind, shape, _) in self._places.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array."""
        return self._places[name][1]

    def mapped(self, name: str, mode: Literal["r", "c"]) -> np.ndarray:
        """An array, read from disk where it is touched.

        Args:
            name: of the array.
            mode: `r`, read-only; `c`, what is written to the array stays in this process.
        """
        kind, shape, offset = self._places[name]
        if 0 in shape:
            return np.zeros(shape, kind)
        return np.memmap(self._file, kind, mode, offset, shape)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.mapped(name, "r")

    def __reduce__(self) -> tuple[Any, ...]:
        return _same_file, (self.path, os.fstat(self._file.fileno()).st_ino)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def write(self, name: str, start: int, rows: np.ndarray) -> None:
        """Write rows of an array from row `start` on.

        By plain writing, as pages that are mapped and changed would count as memory of this process.

        Raises:
            ValueError: if they do not fit into the array, or the file is not open for writing.
        """
        kind, shape, _ = self._places[name]
        rows = np.ascontiguousarray(rows, kind)
        if rows.shape[1:] != shape[1:] or start + len(rows) > shape[0]:
            raise ValueError(f"{rows.shape} rows from {start} of {name}, which is {shape}")
        if not self._writable or self._file.closed:
            raise ValueError(f"{self.path} is not open for writing")
        self._file.seek(self._bytes(name, start)[0])
        self._file.write(rows.data)

    def flush(self) -> None:
        """Hand what was written to the system, so that a reader sees it."""
        self._file.flush()

    def claim(self, name: str, row: int, *, wait: bool = False) -> bool:
        """Lock a row of an array; False if another opening of the file, in any process, has locked it.

        The system frees it if the process dies. On a disk that machines share, what one wrote before it released a row
        is seen by another that claims one afterwards. Elsewhere than on Linux nothing is locked.

        Args:
            name, row: the array and its row.
            wait: until it is released, instead of giving False.

        Raises:
            OSError: if the file is not open for writing, or its disk has no locks.
        """
        try:
            self._lock(fcntl.F_WRLCK, *self._bytes(name, row), wait=wait)
        except BlockingIOError:
            return False
        return True

    def release(self, name: str | None = None, row: int = 0) -> None:
        """Hand what was written to the system, and free a row that was claimed; without a name, all of them."""
        self.flush()
        self._lock(fcntl.F_UNLCK, *((0, 0) if name is None else self._bytes(name, row)), wait=False)

    def _bytes(self, name: str, row: int) -> tuple[int, int]:
        """Where a row begins in the file, and its length."""
        kind, shape, offset = self._places[name]
        length = kind.itemsize * math.prod(shape[1:])
        return offset + row * length, length

    def _lock(self, kind: int, start: int, length: int, *, wait: bool) -> None:
        if sys.platform == "linux":  # locks of the opening; those of the process are lost when a mapping is closed
            command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
            fcntl.fcntl(self._file, command, struct.pack(_FLOCK, kind, os.SEEK_SET, start, length, 0))

    def close(self) -> None:
        """End reading and writing; arrays that were given out stay as they are."""
        self._file.close()


def _same_file(path: Path, inode: int) -> ArrayFile:
    """What an open file becomes in another process.

    Raises:
        ValueError: if another file has taken its place.
    """
    file = ArrayFile(path)
    if os.fstat(file._file.fileno()).st_ino != inode:
        raise ValueError(f"{path} was replaced by another file while it was in use; start again")
    return file


def _place(kind: str, shape: list[int], offset: int) -> tuple[np.dtype, tuple[int, ...], int]:
    """An array's type, shape and offset as they stand in a header.

    Raises:
        ValueError: if they cannot be such.
    """
    counts = [*shape, offset]  # Python's own numbers, as numpy's products overflow in silence
    if kind not in _KINDS or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"array {kind!r}, {shape!r}, {offset!r}"[:200])
    return np.dtype(kind), tuple(shape), offset
