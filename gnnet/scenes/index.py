"""The index of a dataset: a scene that was read and checked, kept as memory-mapped columns until a file changes."""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import re
import sys
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch

from gnnet.arrays import ArrayFile
from gnnet.files import locked, new_file
from gnnet.scenes.check import checked
from gnnet.scenes.columns import ImageColumns, PairColumns, Strings
from gnnet.scenes.problems import BadInput, OnBad
from gnnet.scenes.scene import Scene
from gnnet.scenes.table import ImageTable, PairTable

VERSION = 6  # of what an index holds; raise it when that, or what `check` or a file format makes of a file, changes
_MAX_CHECKSUM = 1 << 26  # bytes; of a larger array only the size is checked
_log = logging.getLogger(__name__)


def open_scene(
    reader: Callable[..., Scene],
    root: str | Path,
    *,
    index_dir: str | Path | None = None,
    on_bad: OnBad = "raise",
    progress: bool = True,
) -> Scene:
    """Read and check a dataset, or take what an earlier call kept of it.

    An index belongs to the reader's name, its settings (`functools.partial`), `on_bad` and the root. It is
    used while these stay as they were: `VERSION`, the constant `READER_VERSION` of the reader's module (0 if
    there is none), and path, size and time of change of every file below the root and below the folders
    that the settings name. So raise `READER_VERSION` when a reader makes another scene of the same files.
    Several processes may call at once: one reads, the others wait.

    Args:
        reader: `reader(root) -> Scene`; `on_bad` and `progress` are passed on to it where it takes them.
        root: the dataset's folder.
        index_dir: folder of all indices; None keeps none. A reader without a name of its own (a lambda, a
            function within a function) has no index either.
        on_bad: `raise` ends at the first broken input; `skip` leaves it out (`Scene.problems`).
        progress: show progress bars.

    Raises:
        FileNotFoundError, ValueError: from the reader and from `check.checked`.
    """
    root = Path(root)
    read = partial(_read, reader, root, on_bad, progress)
    identity = _identity(reader, root, on_bad)
    if index_dir is None or identity is None:
        return read()
    index_dir = Path(index_dir).absolute()
    readable = re.sub(r"[^\w.-]+", "-", f"{_parts(reader)[0].__name__}-{root.absolute().name}")[:60]
    path = index_dir / f"{readable}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.index"
    with ExitStack() as held:
        try:
            index_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(index_dir / f".{path.name}.lock"))
        except OSError as error:
            _log.warning("no index of the dataset can be kept in %s (%s); it is read anew each time", index_dir, error)
            return read()
        return _load_or_read(path, reader, root, read)


def _load_or_read(path: Path, reader: Callable[..., Scene], root: Path, read: Callable[[], Scene]) -> Scene:
    folders, existed = _folders(reader, root), root.exists()
    module = sys.modules.get(_parts(reader)[0].__module__)
    versions = [VERSION, str(getattr(module, "READER_VERSION", 0))]
    state = fingerprint(folders, leave_out=path.parent)
    scene = _load(path, [*versions, state])
    if scene is not None:
        return scene
    scene = read()
    after = fingerprint(folders, leave_out=path.parent)
    if existed and after != state:
        _log.warning("files below %s changed while they were read; no index of them is kept", root)
        return scene
    try:
        _save(scene, path, [*versions, after])
    except OSError as error:
        _log.warning("no index of the dataset can be kept in %s (%s); it is read anew each time", path, error)
        return scene
    return _load(path, [*versions, after]) or scene  # the memory of what was read is freed


def _read(reader: Callable[..., Scene], root: Path, on_bad: OnBad, progress: bool) -> Scene:
    parameters = inspect.signature(reader).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    settings = {"on_bad": on_bad, "progress": progress}
    scene = reader(root, **{key: value for key, value in settings.items() if takes_all or key in parameters})
    return checked(scene, BadInput(on_bad), progress=progress)


def _parts(reader: Callable[..., Scene]) -> tuple[Callable[..., Scene], dict[str, object]]:
    """A reader's function, and the settings that a partial binds to it; positional ones by their number."""
    if not isinstance(reader, partial):
        return reader, {}
    function, bound = _parts(reader.func)  # a subclass of partial, such as Hydra's, is not flattened
    return function, {**bound, **{str(i): value for i, value in enumerate(reader.args)}, **reader.keywords}


def _identity(reader: Callable[..., Scene], root: Path, on_bad: OnBad) -> str | None:
    """What tells one index from another; None where the reader has no name to be known by."""
    function, bound = _parts(reader)
    name = getattr(function, "__qualname__", "<unnamed>")
    if "<" in name:
        return None
    settings = sorted((key, repr(value)) for key, value in bound.items() if key not in ("on_bad", "progress"))
    return repr((function.__module__, name, settings, on_bad, str(root.absolute())))


def _folders(reader: Callable[..., Scene], root: Path) -> list[Path]:
    """The root, and folders elsewhere that the reader's settings name."""
    root = root.absolute()
    named = [root / value for value in _parts(reader)[1].values() if isinstance(value, str | Path) and value]
    normal = [Path(os.path.normpath(path)) for path in named]
    return [root, *sorted({path for path in normal if path.is_dir() and not path.is_relative_to(root)})]


def fingerprint(folders: list[Path], *, leave_out: Path | None = None) -> str:
    """Hash of path, size and time of change of every file below some folders.

    Links to folders are followed, each real folder once.

    Args:
        folders: where to look.
        leave_out: a folder that does not count.
    """
    digest, seen = hashlib.sha256(), set()
    if leave_out is not None and leave_out.exists():
        seen.add(_real(os.stat(leave_out)))
    for folder in folders:
        digest.update(os.fsencode(f"{folder}\n"))
        waiting = [(os.fspath(folder), "")]
        while waiting:
            path, name = waiting.pop()
            try:
                real = _real(os.stat(path))
                if real in seen:
                    continue
                seen.add(real)
                with os.scandir(path) as found:
                    entries = sorted(found, key=lambda entry: entry.name)
            except OSError as error:
                digest.update(os.fsencode(f"{name} {type(error).__name__}\n"))
                continue
            lines = []
            for entry in entries:
                try:
                    if entry.is_dir():
                        waiting.append((entry.path, f"{name}/{entry.name}"))
                        continue
                    status = entry.stat()
                    lines.append(f"{name}/{entry.name}\0{status.st_size}\0{status.st_mtime_ns}\n")
                except OSError as error:  # a link to nowhere
                    lines.append(f"{name}/{entry.name}\0{type(error).__name__}\n")
            digest.update(os.fsencode("".join(lines)))
    return digest.hexdigest()


def _real(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _save(scene: Scene, path: Path, key: list[Any]) -> None:
    """Write an index; `key` is what must be as it is now for the index to be used."""
    for killed in path.parent.glob(f".*{path.name}.*.part"):  # what a process left; this one has the lock
        killed.unlink()
    images, pairs = scene.images, scene.pairs
    shared = pairs.columns.names is images.columns.names
    arrays = {"points": scene.points.numpy(), "image_rows": images.rows, "pair_rows": pairs.rows}
    arrays |= _packed(images.columns, "images") | _packed(pairs.columns, "pairs", leave_out="names" if shared else "")
    about = {
        "key": key, "name": scene.name, "groups": scene.groups, "problems": scene.problems,
        "retrieve_within": scene.retrieve_within, "dataset": scene.dataset, "pairs_share_names": shared,
        "checksums": {name: _checksum(array) for name, array in arrays.items() if array.nbytes <= _MAX_CHECKSUM},
    }  # fmt: skip
    with new_file(path) as partial:
        file = ArrayFile.create(partial, {name: (a.dtype.str[1:], a.shape) for name, a in arrays.items()}, about)
        for name, array in arrays.items():
            file.write(name, 0, array)
        file.close()
    old = sorted(path.parent.glob("*/scene.json"))
    if old:
        _log.info("%s and others like it are indices of an older gnnet that nothing reads: delete them", old[0].parent)


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).data)


def _packed(columns: Any, prefix: str, leave_out: str = "") -> dict[str, np.ndarray]:
    """Arrays of columns by `prefix.column`; a column of several parts is as many arrays."""
    arrays: dict[str, np.ndarray] = {}
    for name in (field.name for field in fields(columns) if field.name != leave_out):
        column = getattr(columns, name)
        arrays |= _packed(column, f"{prefix}.{name}") if is_dataclass(column) else {f"{prefix}.{name}": column}
    return arrays


def _load(path: Path, key: list[Any]) -> Scene | None:
    """The scene of an index that is up to date; None if there is none, or it is damaged."""
    try:
        file = ArrayFile(path)
        about = file.about
        if about["key"] != key:
            return None
        # No memmaps, whose slices are slow; the pages are shared by all processes until one writes to them.
        arrays = {name: np.asarray(file.mapped(name, "c")) for name in file.arrays}
        for name, checksum in about["checksums"].items():
            if _checksum(file[name]) != checksum:  # by a mapping of its own, which is not kept
                raise ValueError(f"{name} is not as it was written")
        images = _columns(ImageColumns, arrays, "images")
        names = {"names": images.names} if about["pairs_share_names"] else {}
        return Scene(
            name=about["name"],
            images=ImageTable(images, arrays["image_rows"]),
            pairs=PairTable(_columns(PairColumns, arrays, "pairs", **names), arrays["pair_rows"]),
            points=torch.from_numpy(arrays["points"]),
            groups={name: tuple(members) for name, members in about["groups"].items()},
            problems=tuple(about["problems"]),
            retrieve_within=tuple(about["retrieve_within"]),
            dataset=about["dataset"],
        )
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever stands in a damaged file
        _log.warning("the index %s is damaged (%s: %s); it is made anew", path, type(error).__name__, error)
        return None


def _columns(kind: Any, arrays: dict[str, np.ndarray], prefix: str, **known: Strings) -> Any:
    """The columns that `_packed` made arrays of."""
    values: dict[str, Any] = dict(known)
    for name, column in get_type_hints(kind).items():
        if name not in known:
            path = f"{prefix}.{name}"
            values[name] = _columns(column, arrays, path) if is_dataclass(column) else arrays[path]
    return kind(**values)
