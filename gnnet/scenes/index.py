"""A dataset read and checked once, and kept as memory-mapped columns until one of its files changes."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch

from gnnet.files import locked
from gnnet.scenes.check import checked
from gnnet.scenes.columns import ImageColumns, PairColumns, Strings
from gnnet.scenes.problems import BadInput, OnBad
from gnnet.scenes.scene import Scene
from gnnet.scenes.table import ImageTable, PairTable

VERSION = 3  # of the files of an index; raise it whenever their meaning changes
_MAX_CHECKSUM = 1 << 26  # bytes; larger files are checked by their size and header alone
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

    The index belongs to the reader, its settings (`functools.partial`), `on_bad` and the root; it holds
    while the program that reads is the same, and path, size and time of change of every file below the
    root and below the folders that the settings name. Several processes may call at once: one reads,
    the others wait.

    Args:
        reader: `reader(root) -> Scene`; it is given `on_bad` and `progress` where it takes them.
        root: the dataset's folder.
        index_dir: folder of all indices; None keeps none. Readers without a name of their own (a
            lambda, a function within a function) are not kept either.
        on_bad: `raise` ends at the first broken input; `skip` leaves it out (`Scene.problems`).
        progress: show progress bars.

    Raises:
        FileNotFoundError, ValueError: from the reader and from `check.checked`.
    """
    root = Path(root)
    read = partial(_read, reader, root, on_bad, progress)
    identity = None if index_dir is None else _identity(reader, root, on_bad)
    if identity is None:
        return read()
    index_dir = Path(index_dir).absolute()
    readable = re.sub(r"[^\w.-]+", "-", f"{_unwrapped(reader).__name__}-{root.absolute().name}")[:60]
    folder = index_dir / f"{readable}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    with ExitStack() as held:
        try:
            index_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(index_dir / f".{folder.name}.lock"))
        except OSError as error:
            _log.warning("no index of the dataset can be kept in %s (%s); it is read anew each time", index_dir, error)
            return read()
        return _load_or_read(folder, reader, root, read)


def _load_or_read(folder: Path, reader: Callable[..., Scene], root: Path, read: Callable[[], Scene]) -> Scene:
    folders, program = _folders(reader, root), _program(reader)
    existed = root.exists()
    state = fingerprint(folders, leave_out=folder.parent)
    scene = _load(folder, program, state)
    if scene is not None:
        return scene
    scene = read()
    after = fingerprint(folders, leave_out=folder.parent)
    if existed and after != state:
        _log.warning("files below %s changed while they were read; no index of them is kept", root)
        return scene
    try:
        _save(scene, folder, program, after)
    except OSError as error:
        _log.warning("no index of the dataset can be kept in %s (%s); it is read anew each time", folder, error)
        return scene
    return _load(folder, program, after) or scene  # the memory of what was read is freed


def _read(reader: Callable[..., Scene], root: Path, on_bad: OnBad, progress: bool) -> Scene:
    parameters = inspect.signature(reader).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    settings = {"on_bad": on_bad, "progress": progress}
    scene = reader(root, **{key: value for key, value in settings.items() if takes_all or key in parameters})
    return checked(scene, BadInput(on_bad), progress=progress)


def _unwrapped(reader: Callable[..., Scene]) -> Callable[..., Scene]:
    while isinstance(reader, partial):
        reader = reader.func
    return reader


def _bound(reader: Callable[..., Scene]) -> dict[str, object]:
    """Settings that partials bind; positional ones by their number."""
    if not isinstance(reader, partial):
        return {}
    return {**_bound(reader.func), **{str(i): value for i, value in enumerate(reader.args)}, **reader.keywords}


def _identity(reader: Callable[..., Scene], root: Path, on_bad: OnBad) -> str | None:
    """What tells one index from another; None where the reader has no name to be known by."""
    function = _unwrapped(reader)
    name = getattr(function, "__qualname__", "<unnamed>")
    if "<" in name:
        return None
    settings = sorted((key, repr(value)) for key, value in _bound(reader).items() if key not in ("on_bad", "progress"))
    return repr((function.__module__, name, settings, on_bad, str(root.absolute())))


def _program(reader: Callable[..., Scene]) -> str:
    """Hash of the source of all readers, and of this one, so that a changed reader reads anew."""
    sources = set(Path(__file__).parent.glob("*.py"))
    own = inspect.getsourcefile(_unwrapped(reader))
    if own is not None:
        sources.add(Path(own))
    digest = hashlib.sha256(str(VERSION).encode())
    for path in sorted(sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _folders(reader: Callable[..., Scene], root: Path) -> list[Path]:
    """The root, and folders elsewhere that the reader's settings name."""
    root = root.absolute()
    named = [root / value for value in _bound(reader).values() if isinstance(value, str | Path) and value]
    normal = [Path(os.path.normpath(path)) for path in named]
    return [root, *sorted({path for path in normal if path.is_dir() and not path.is_relative_to(root)})]


def fingerprint(folders: list[Path], *, leave_out: Path | None = None) -> str:
    """Hash of path, size and time of change of every file below some folders, but for one folder.

    Links to folders are followed, each real folder once.
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
                with os.scandir(path) as entries:
                    entries = sorted(entries, key=lambda entry: entry.name)
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


@dataclass(frozen=True)
class _Described:
    """An array's file as the index's JSON tells of it."""

    dtype: str
    shape: list[int]
    checksum: int | None

    @classmethod
    def of(cls, path: Path, array: np.ndarray) -> _Described:
        return cls(array.dtype.str, list(array.shape), _checksum(path))


def _checksum(path: Path) -> int | None:
    return zlib.crc32(path.read_bytes()) if path.stat().st_size <= _MAX_CHECKSUM else None


def _save(scene: Scene, folder: Path, program: str, state: str) -> None:
    """Write under another name first, so that a folder of this name is complete."""
    for old in folder.parent.glob(f".{folder.name}.*.writing"):  # of a process that was killed; this one has the lock
        shutil.rmtree(old, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".writing", dir=folder.parent))
    try:
        images, pairs = scene.images, scene.pairs
        shared = pairs.columns.names is images.columns.names
        arrays = {"points": scene.points.numpy(), "image_rows": images.rows, "pair_rows": pairs.rows}
        arrays |= dict(_arrays(images.columns, "images"))
        arrays |= dict(_arrays(pairs.columns, "pairs", leave_out=("names",) if shared else ()))
        described = {}
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
            described[name] = vars(_Described.of(temporary / f"{name}.npy", array))
        content = {
            "version": VERSION, "program": program, "files": state, "name": scene.name, "groups": scene.groups,
            "problems": scene.problems, "retrieve_within": scene.retrieve_within, "dataset": scene.dataset,
            "pairs_share_names": shared, "arrays": described,
        }  # fmt: skip
        (temporary / "scene.json").write_text(json.dumps(content))
        temporary.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _arrays(columns, prefix: str, leave_out: tuple[str, ...] = ()) -> Iterator[tuple[str, np.ndarray]]:
    for field in fields(columns):
        value = getattr(columns, field.name)
        if field.name in leave_out:
            continue
        if isinstance(value, Strings):
            yield f"{prefix}.{field.name}.text", value.text
            yield f"{prefix}.{field.name}.offsets", value.offsets
        else:
            yield f"{prefix}.{field.name}", value


def _load(folder: Path, program: str, state: str) -> Scene | None:
    """The scene of an index that still holds; None if there is none, or it is damaged."""
    try:
        content = json.loads((folder / "scene.json").read_text())
        if (content["version"], content["program"], content["files"]) != (VERSION, program, state):
            return None
        arrays = {name: _load_array(folder / f"{name}.npy", _Described(**d)) for name, d in content["arrays"].items()}
        images = _columns(ImageColumns, arrays, "images")
        names = images.names if content["pairs_share_names"] else None
        return Scene(
            name=content["name"],
            images=ImageTable(images, arrays["image_rows"]),
            pairs=PairTable(_columns(PairColumns, arrays, "pairs", names=names), arrays["pair_rows"]),
            points=torch.from_numpy(arrays["points"]),
            groups={name: tuple(members) for name, members in content["groups"].items()},
            problems=tuple(content["problems"]),
            retrieve_within=tuple(content["retrieve_within"]),
            dataset=content["dataset"],
        )
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever stands in a damaged file
        _log.warning("the index %s is damaged (%s: %s); it is made anew", folder, type(error).__name__, error)
        return None


def _load_array(path: Path, described: _Described) -> np.ndarray:
    """Memory-mapped: its pages are shared by all processes; what is written to them stays in the one that writes."""
    if _checksum(path) != described.checksum:
        raise ValueError(f"{path.name} is not as it was written")
    array = np.load(path, allow_pickle=False, mmap_mode="c" if np.prod(described.shape) else None)
    if array.dtype.str != described.dtype or list(array.shape) != described.shape:
        raise ValueError(f"{path.name} is {array.dtype} of shape {array.shape}")
    return np.asarray(array)  # no memmap, whose slices are slow


def _columns(kind: type, arrays: dict[str, np.ndarray], prefix: str, **known: Strings | None):
    values = {}
    for field in fields(kind):
        if known.get(field.name) is not None:
            values[field.name] = known[field.name]
        elif f"{prefix}.{field.name}.text" in arrays:
            values[field.name] = Strings(*(arrays[f"{prefix}.{field.name}.{part}"] for part in ("text", "offsets")))
        else:
            values[field.name] = arrays[f"{prefix}.{field.name}"]
    return kind(**values)
