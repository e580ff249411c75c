"""Every reader on a small folder of which one file is damaged: what leaves it, and what it opens.

`GNNET_FUZZ=2000` tries so many examples of each layout instead of a few.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

import gnnet
from gnnet.data.pairs import NothingInCommon, PairDataset
from gnnet.scenes.index import open_scene
from gnnet.scenes.layouts.timelapse import load_timelapse
from gnnet.scenes.scene import Scene
from gnnet.toy.layout import write_correspondences
from tests.scenes.sample_layouts import IMAGES_OF, LAYOUTS, Layout

SECONDS = 20  # for reading one damaged folder

# What the readers open, while it is recorded. An audit hook stays for ever, so there is one.
OPENED: list[str] | None = None


def record(event: str, arguments: tuple) -> None:
    if OPENED is not None and event in ("open", "os.listdir", "os.scandir") and arguments:
        path = arguments[0]
        if not isinstance(path, str | bytes | os.PathLike):
            return  # an open file
        if arguments[1:2] == (None,) and not os.path.isabs(path):
            return  # by os.open, below an open folder, as shutil.rmtree goes
        OPENED.append(os.path.realpath(os.fsdecode(path)))


sys.addaudithook(record)
PROGRAM = tuple({os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, Path(gnnet.__file__).parent, "/proc")})


@contextmanager
def watched(root: Path) -> Iterator[None]:
    """Ends after `SECONDS`; fails if a file is opened outside the root, a folder for scratch, and the program."""
    global OPENED
    scratch = root.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"no end within {SECONDS} seconds"))
    signal.alarm(SECONDS)
    OPENED = []
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(scratch))
            yield
        opened = set(OPENED)
    finally:
        OPENED = None
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    # The toy town is rendered beside its place, and moved there.
    inside = tuple(str(p) for p in (root, scratch, root.with_name(f".{root.name}.")))
    modules = {os.path.realpath(folder) for folder in sys.path}  # an import lists them
    assert not [path for path in opened - modules if not path.startswith(inside + PROGRAM)]


NAME = rb"[\w./-]{4,}\.(?:jpg|png)"
WORDS = [b"nan", b"inf", b"1e400", b"-1", b"0", b"1e308", b"9" * 30, b"1_0", "٣".encode(), b"x", b"", b"\0", b"\xff"]
NUMBERS = [
    *(struct.pack("<d", value) for value in (np.nan, np.inf, -1.0, 0.0, 1e308, 1e-320)),
    *(struct.pack("<q", value) for value in (-1, 0, 2**31, 2**40, 2**62)),
]
IMAGES = [
    ("L", (48, 48)), ("RGBA", (48, 36)), ("I;16", (64, 48)), ("1", (640, 480)), ("RGB", (30, 40)), ("P", (2000, 1)),
]  # fmt: skip


def paths_outside(base: Path) -> list[bytes]:
    return [b"/etc/passwd", bytes(base / "outside.jpg"), *(b"../" * up + b"outside.jpg" for up in range(1, 7))]


def damage(draw: Callable, path: Path, content: bytes, files: list[Path], base: Path) -> None:
    """Damage the file in a way that is drawn."""
    kinds = ["noise", "cut", "flip", "empty", "gone", "folder", "swap", "insert"]
    if path.suffix in (".txt", ".nvm", ".json"):
        kinds += ["word"] * 6 + ["path", "line"]
    elif path.suffix == ".bin":
        kinds += ["number"] * 6 + ["path"]
    elif path.suffix == ".mat":
        kinds += ["key"] * 4 + ["path"]
    elif path.suffix in (".jpg", ".png"):
        kinds += ["image"] * 3
    kind = draw(st.sampled_from(kinds))
    at = draw(st.integers(0, len(content)) | st.integers(0, min(len(content), 300)))
    if kind == "gone":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "key":
        spoil_key(draw, path, base)
    else:
        path.write_bytes(changed(draw, kind, path, content, at, files, base))


def changed(draw: Callable, kind: str, path: Path, content: bytes, at: int, files: list[Path], base: Path) -> bytes:
    if kind == "noise":
        return draw(st.binary(max_size=200))
    if kind == "cut":
        return content[:at]
    if kind == "flip":
        return content[:at] + bytes(b ^ 0xFF for b in content[at : at + draw(st.integers(1, 8))]) + content[at + 8 :]
    if kind == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=16)) + content[at:]
    if kind == "number":
        number = draw(st.sampled_from(NUMBERS))
        return content[:at] + number + content[at + len(number) :]
    if kind == "swap":
        return draw(st.sampled_from([other for other in files if other != path])).read_bytes()
    if kind == "image":
        mode, size = draw(st.sampled_from(IMAGES))
        picture = BytesIO()
        Image.new(mode, size).save(picture, "PNG")
        return picture.getvalue()
    if kind == "line":
        lines = content.splitlines(keepends=True)
        row = draw(st.integers(0, max(0, len(lines) - 1)))
        return b"".join([*lines[:row], *draw(st.sampled_from([[], 2 * lines[row : row + 1]])), *lines[row + 1 :]])
    if kind == "path":
        found = list(re.finditer(NAME, content))
        new = draw(st.sampled_from(paths_outside(base)))
    else:
        found = list(re.finditer(rb"[^\s,]+", content)) if kind == "word" else []
        new = draw(st.sampled_from([*WORDS, *paths_outside(base)[:3]]))
    if not found:
        return b""
    match = draw(st.sampled_from(found))
    return content[: match.start()] + new + content[match.end() :]


def utf16(name: bytes) -> np.ndarray:
    return np.frombuffer(name.decode().encode("utf-16-le"), "<u2")[:, None]


def spoil_key(draw: Callable, path: Path, base: Path) -> None:
    """A key of a file of correspondences gets another value."""
    texts = [utf16(name) for name in paths_outside(base)]
    values = [np.full((5, 2), value) for value in (np.nan, -1.0, 1e308, 0.0)]
    values += [np.zeros((0, 2)), np.full(5, -1e300), np.full((5, 2), 2**63 - 1), np.zeros(()), *texts]
    with h5py.File(path, "r+") as file:
        key = draw(st.sampled_from(sorted(file)))
        value = draw(st.sampled_from(range(len(values) + 2)))
        shape = file[key].shape
        del file[key]
        if value == len(values):
            file[key] = h5py.ExternalLink(str(base / "outside.mat"), key)
        elif value < len(values):
            of_shape = len(shape) == values[value].ndim and values[value].size and key.startswith(("pt", "dist"))
            file[key] = np.full(shape, values[value].flat[0]) if of_shape else values[value]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Where all layouts are, each written when it is first asked for; beside them, what no reader may find."""
    base = Path(os.path.realpath(tmp_path_factory.mktemp("fuzz")))
    Image.new("RGB", (48, 48)).save(base / "outside.jpg")
    xy = np.full((5, 2), 20.0)
    write_correspondences(base / "outside.mat", "a/rear/1.jpg", "b/rear/2.jpg", xy, xy, np.ones(5))
    return base


def written(base: Path, name: str) -> Path:
    """The folder of a layout."""
    root = base / re.sub(r"\W+", "-", name) / "set"
    if not root.exists():
        root.parent.mkdir()
        LAYOUTS[name].write(root)
    return root


def kinds_of(files: list[Path]) -> list[list[Path]]:
    """Files of one folder and ending together, so that many images do not hide the lists."""
    kinds: dict[tuple, list[Path]] = {}
    for path in files:
        kinds.setdefault((path.parent, "".join(path.suffixes)), []).append(path)
    return list(kinds.values())


def try_to_train(scene: Scene, on_bad: str) -> None:
    """The first pairs, as training reads them: sound points inside their images, or an error about a broken pair."""
    pairs = PairDataset(scene, correspondences=20, largest_side=None, crop=32, warp=0.5, seed=0, on_bad=on_bad)
    for index in range(min(3, len(pairs))):
        try:
            sample = pairs[0, index]
        except RuntimeError as error:
            assert "cannot be used" in str(error)
            assert isinstance(error.__cause__ or error.__context__, OSError | ValueError | NothingInCommon | None)
            assert on_bad == "raise" or "pairs in a row" in str(error)
        else:
            assert sample.weight.isfinite().all() and len(sample.weight)
            for xy in (sample.keypoints_a, sample.keypoints_b):
                assert ((xy >= 0) & (xy <= 32)).all()


def read_damaged(root: Path, layout: Layout, on_bad: str, *, shared: bool) -> None:
    try:
        scene = open_scene(layout.read, root, on_bad=on_bad, progress=False)
    except (ValueError, FileNotFoundError) as error:
        assert str(root) in str(error)
        assert shared or on_bad == "raise", f"nothing is left, though one of many was damaged: {error}"
        return
    except FileExistsError as error:
        assert "so it is no toy town" in str(error)
        return
    # Under `raise` only what is no damage is noted: a camera that moved, or that there is no pair to train on.
    noted = layout.read is load_timelapse or (not len(scene.pairs) and len(scene.problems) == 1)
    assert scene.images and (on_bad == "skip" or noted or not scene.problems)
    for image in scene.images.values():
        assert image.path.resolve().is_relative_to(root)
        assert image.depth is None or image.depth.path.resolve().is_relative_to(root)
    for pair in scene.pairs:
        assert pair.image_a in scene.images and pair.image_b in scene.images
        assert pair.correspondences is None or pair.correspondences.resolve().is_relative_to(root)
    if scene.pairs:
        try_to_train(scene, on_bad)


@pytest.mark.parametrize("name", LAYOUTS)
@settings(
    max_examples=int(os.environ.get("GNNET_FUZZ", 16)), deadline=None, derandomize="GNNET_FUZZ" not in os.environ,
    database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(data=st.data())
@pytest.mark.slow
def test_one_damaged_file(base: Path, name: str, data):
    layout, root = LAYOUTS[name], written(base, name)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(kinds_of(files)).flatmap(st.sampled_from), label="file")
    shared = bool(re.search(layout.shared, path.relative_to(root).as_posix()))
    content = path.read_bytes()
    try:
        damage(data.draw, path, content, files, base)
        for on_bad in ("raise", "skip"):
            with watched(root):
                read_damaged(root, layout, on_bad, shared=shared)
    finally:
        if path.is_dir():
            path.rmdir()
        path.write_bytes(content)


@pytest.mark.parametrize("name", IMAGES_OF)
@pytest.mark.slow
def test_names_of_images_outside(base: Path, name: str):
    """Each file that names images names one outside, which is there."""
    root = written(base, name)
    files = [path for path in root.rglob("*") if path.suffix in (".txt", ".bin", ".nvm")]
    files = [path for path in files if re.search(NAME, path.read_bytes())] + sorted(root.rglob("*.mat"))[:1]
    assert files
    outside = os.path.relpath(base / "outside.jpg", root / IMAGES_OF[name]).encode()
    for path in files:
        content = path.read_bytes()
        for new in (outside, bytes(base / "outside.jpg")):
            if path.suffix == ".mat":
                with h5py.File(path, "r+") as file:
                    del file["im_j_path"]
                    file["im_j_path"] = utf16(new)
            else:
                path.write_bytes(re.sub(NAME, new, content, count=1))
            for on_bad in ("raise", "skip"):
                with watched(root):
                    read_damaged(root, LAYOUTS[name], on_bad, shared=True)
            path.write_bytes(content)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.slow
def test_undamaged(base: Path, name: str):
    scene = open_scene(LAYOUTS[name].read, written(base, name), progress=False)
    assert scene.pairs and not scene.problems and scene.dataset == name.partition(",")[0]
    try_to_train(scene, "raise")


@pytest.mark.parametrize(("name", "pattern"), [("robotcar", "images/overcast-*/rear/*"), ("rgbd", "000/images/*")])
@pytest.mark.slow
def test_one_image_of_another_size_does_not_spoil_the_others(base: Path, tmp_path: Path, name: str, pattern: str):
    root = Path(shutil.copytree(written(base, name), tmp_path / "set"))
    first = sorted(root.rglob(pattern))[0]
    Image.new("RGB", (40, 30)).save(first)
    whole = open_scene(LAYOUTS[name].read, written(base, name), progress=False)
    scene = open_scene(LAYOUTS[name].read, root, on_bad="skip", progress=False)
    assert len(scene.images) == len(whole.images) - 1 and len(scene.problems) == 1
    assert str(first) in scene.problems[0] and "40×30" in scene.problems[0]


@pytest.mark.slow
def test_correspondences_too_uncertain_to_have_a_weight(base: Path, tmp_path: Path):
    root = Path(shutil.copytree(written(base, "toy"), tmp_path / "set"))
    broken, *_ = sorted(root.rglob("*.mat"))
    with h5py.File(broken, "r+") as file:
        file["dist_from_center"][:] = 1000.0  # exp(−1000) is 0
    scene = open_scene(LAYOUTS["toy"].read, root, progress=False)
    index = [pair.correspondences for pair in scene.pairs].index(broken)
    for crop in (None, 24):
        pairs = PairDataset(scene, correspondences=20, largest_side=None, crop=crop, seed=0)
        with pytest.raises(RuntimeError, match=rf"{broken.name}\) cannot be used: no correspondence with a weight"):
            pairs[0, index]
