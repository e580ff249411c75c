"""MATLAB files, v7.3 (HDF5) and v5: arrays by key, and their shapes without their values.

They are read here, and not by scipy, as its reader of v5 files follows a wrong type code into foreign memory. Nothing
that a file declares is trusted: an HDF5 link may name any file of the machine.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import h5py

MAX_VALUES = 20_000_000  # of one array; a damaged header may declare any number
_COMPRESSED, _MATRIX, _UTF8, _CHAR = 15, 14, 16, 4
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8", 17: "u2"}
_CLASSES = ["cell", "struct", "object", "char", "sparse", "double", "single", "int8", "uint8", "int16", "uint16",
            "int32", "uint32", "int64", "uint64"]  # fmt: skip


class MatlabArray(NamedTuple):
    """An array as the file declares it; text is codes of UTF-16, or strings.

    Args:
        shape: as h5py gives it, MATLAB's last axis first.
        kind: numpy's letter of the type, `i`, `u`, `f` or `U`; text of v5 files is `u`.
        type_name: the file's name of the type, for messages.
        read: reads the values.
    """

    shape: tuple[int, ...]
    kind: str
    type_name: str
    read: Callable[[], np.ndarray]


@contextmanager
def opened_matlab_file(path: Path, keys: tuple[str, ...]) -> Iterator[dict[str, MatlabArray]]:
    """Open a file and give the arrays `keys`, whose values can be read inside the `with` block only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the file (and the key): no .mat file, damaged, a key that is missing, is no array, is
            larger than `MAX_VALUES` or kept in another file. What fails while values are read, too.
    """
    import h5py  # only these files need it: localizing does without

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist (a file of correspondences, named by dataset.root)")
    try:
        if not path.is_file():
            raise ValueError("it is no regular file")
        if h5py.is_hdf5(path):
            with h5py.File(path, "r") as file:
                _require(path, keys, list(file))
                yield {key: _checked(path, key, _hdf5_array(path, file, key)) for key in keys}
        else:
            arrays = _v5_arrays(path.read_bytes())
            _require(path, keys, list(arrays))
            yield {key: _checked(path, key, arrays[key]) for key in keys}
    except Exception as error:  # h5py raises many types
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        size = path.stat().st_size if path.exists() else 0
        raise ValueError(
            f"{path} ({size} bytes) cannot be read as a MATLAB v7.3 or v5 file ({str(error)[:200]}); "
            "expected a correspondence_*.mat, so unpack or download it again"
        ) from error


def _require(path: Path, keys: tuple[str, ...], found: list[str]) -> None:
    missing = [key for key in keys if key not in found]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}; it has {', '.join(sorted(found)[:20]) or 'nothing'}")


def _checked(path: Path, key: str, array: MatlabArray) -> MatlabArray:
    if array.kind not in "iufU":
        raise ValueError(f"{path}: {key} is a {array.type_name}; expected an array of numbers or text")
    if math.prod(array.shape) > MAX_VALUES:
        raise ValueError(f"{path}: {key} is of shape {array.shape}; expected at most {MAX_VALUES:,} values")
    return array


def _hdf5_array(path: Path, file: h5py.File, key: str) -> MatlabArray:
    import h5py  # only these files need it: localizing does without

    link = file.get(key, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise ValueError(f"{path}: {key} is a link ({type(link).__name__}); expected an array in the file itself")
    data = file[key]
    if not isinstance(data, h5py.Dataset) or data.shape is None:
        kind = "group" if isinstance(data, h5py.Group) else "key without values"
        raise ValueError(f"{path}: {key} is a {kind}; expected an array of numbers or text")
    if data.external or data.is_virtual:
        raise ValueError(f"{path}: {key} keeps its values in another file; expected them in the file itself")
    if math.prod(data.chunks or ()) > MAX_VALUES:
        raise ValueError(f"{path}: {key} is stored in pieces of {data.chunks}; expected at most {MAX_VALUES:,} values")
    kind = "U" if h5py.check_string_dtype(data.dtype) is not None else data.dtype.kind
    return MatlabArray(data.shape, kind, str(data.dtype), lambda: np.asarray(data[()]))


def _v5_arrays(content: bytes) -> dict[str, MatlabArray]:
    order = {b"IM": "<", b"MI": ">"}.get(content[126:128])
    if order is None:
        raise ValueError("neither begins as HDF5 nor as v5 does")
    arrays, position = {}, 128
    while position + 8 <= len(content):
        code, size = struct.unpack_from(order + "II", content, position)
        body = content[position : position + 8 + size]
        if len(body) < 8 + size:
            raise ValueError(f"the file ends within the element at byte {position}")
        position += len(body)
        if code in (_COMPRESSED, _MATRIX):  # the others are notes of MATLAB's own
            name, array = _v5_array(body, code == _COMPRESSED, order)
            arrays[name] = array
    return arrays


def _v5_array(body: bytes, compressed: bool, order: str) -> tuple[str, MatlabArray]:
    """Name and array of a matrix element."""

    def first_bytes(size: int) -> bytes:  # no more of them, so that a small file cannot fill the memory
        return zlib.decompressobj().decompress(body[8:], size) if compressed else body[:size]

    head = first_bytes(2048)  # flags, shape and name come first, and are short
    if struct.unpack_from(order + "I", head)[0] != _MATRIX:
        raise ValueError("an element holds no matrix")
    _, flags, position = _v5_element(head, 8, order)
    _, sizes, position = _v5_element(head, position, order)
    _, name, start = _v5_element(head, position, order)
    code = struct.unpack_from(order + "I", flags)[0] & 0xFF
    type_name = _CLASSES[code - 1] if 1 <= code <= len(_CLASSES) else f"class {code}"
    shape: tuple[int, ...] = tuple(np.frombuffer(sizes, order + "i4").tolist())[::-1]
    if min(shape, default=0) < 0:
        raise ValueError(f"an array is of shape {shape}")
    kind = {"double": "f", "single": "f", "char": "u"}.get(type_name, "O")
    kind = type_name[0] if type_name.startswith(("int", "uint")) else kind

    def read() -> np.ndarray:
        data_type, data, _ = _v5_element(first_bytes(start + 16 + 8 * math.prod(shape)), start, order)
        if data_type == _UTF8 and code == _CHAR:
            return np.frombuffer(data.decode("utf-8").encode("utf-16-le"), "<u2")
        if data_type not in _TYPES:
            raise ValueError(f"numbers are of the unknown type {data_type}")
        return np.frombuffer(data, order + _TYPES[data_type]).reshape(shape)

    return name.decode("latin-1"), MatlabArray(shape, kind, type_name, read)


def _v5_element(content: bytes, position: int, order: str) -> tuple[int, bytes, int]:
    """Type and data of the element at a position, and where the next begins; a short element is inside its own tag."""
    code, size = struct.unpack_from(order + "II", content, position)
    if code >> 16:
        code, size, start, after = code & 0xFFFF, code >> 16, position + 4, position + 8
    else:
        start, after = position + 8, position + 8 + -(-size // 8) * 8
    data = content[start : start + size]
    if len(data) < size:
        raise ValueError(f"an array ends after {len(data)} of {size} bytes")
    return code, data, after
