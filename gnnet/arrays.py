"""One file of named arrays and a JSON header: written piece by piece, read as memory maps, nothing executed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_MAGIC = b"gnnet arrays 1\n"
_PAGE = 4096
_KINDS = ("u1", "i4", "i8", "f2", "f4", "f8")


class ArrayFile:
    """Arrays by name; their size is known when the file is made.

    Args:
        path: of an existing file.
        writable: `write` is to be called.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is of another kind, cut off, or its header is broken.
    """

    def __init__(self, path: str | Path, *, writable: bool = False) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"map {self.path} does not exist")
        with self.path.open("rb") as file:
            start = file.read(len(_MAGIC) + 8)
            length = int.from_bytes(start[len(_MAGIC) :], "little")
            size = self.path.stat().st_size
            if not start.startswith(_MAGIC) or length > size:
                raise ValueError(f"{self.path} is no map of gnnet's, or is damaged; delete it, and it is compiled anew")
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
        self._file = self.path.open("r+b") if writable else None

    @classmethod
    def create(cls, path: str | Path, arrays: Mapping[str, tuple[str, tuple[int, ...]]], about: dict) -> ArrayFile:
        """A new file with zeros in all arrays (`(type, shape)` each), open to write; it replaces one at `path`."""
        path, offset, places = Path(path), 0, {}
        for name, (kind, shape) in arrays.items():
            places[name] = [kind, list(shape), offset]
            offset += -(-np.dtype(kind).itemsize * int(np.prod(shape)) // _PAGE) * _PAGE
        # The header's length moves the offsets, whose digits are part of it: room for them to grow.
        room = len(json.dumps({"about": about, "arrays": places})) + 24 * len(places) + len(_MAGIC) + 8
        first = -(-room // _PAGE) * _PAGE
        places = {name: [kind, shape, at + first] for name, (kind, shape, at) in places.items()}
        header = json.dumps({"about": about, "arrays": places}).encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.new")
        with partial.open("wb") as file:
            file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
            file.truncate(first + max(offset, _PAGE))
        partial.replace(path)
        return cls(path, writable=True)

    @property
    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of each, as `create` takes them."""
        return {name: (kind.str[1:], shape) for name, (kind, shape, _) in self._places.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an array."""
        return self._places[name][1]

    def __getitem__(self, name: str) -> np.ndarray:
        """An array, mapped: read from disk where it is touched."""
        kind, shape, offset = self._places[name]
        if 0 in shape:
            return np.zeros(shape, kind)
        return np.memmap(self.path, kind, "r", offset, shape)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def write(self, name: str, start: int, rows: np.ndarray) -> None:
        """Rows from `start` on. By plain writing: pages that are mapped and changed would count as memory."""
        kind, shape, offset = self._places[name]
        rows = np.ascontiguousarray(rows, kind)
        if rows.shape[1:] != shape[1:] or start + len(rows) > shape[0]:
            raise ValueError(f"{rows.shape} rows from {start} of {name}, which is {shape}")
        self._file.seek(offset + start * kind.itemsize * int(np.prod(shape[1:])))
        self._file.write(rows.tobytes())

    def flush(self) -> None:
        """What was written is on its way to the disk, in this order: a reader sees it."""
        self._file.flush()

    def close(self) -> None:
        """No more is written."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _place(kind: str, shape: list[int], offset: int) -> tuple[np.dtype, tuple[int, ...], int]:
    """An array's type, shape and offset as a header has them.

    Raises:
        ValueError: if they are none; Python's own numbers, as numpy's products overflow in silence.
    """
    counts = [*shape, offset]
    if kind not in _KINDS or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"array {kind!r}, {shape!r}, {offset!r}"[:200])
    return np.dtype(kind), tuple(shape), offset
