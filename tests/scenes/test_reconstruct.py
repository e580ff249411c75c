"""A COLMAP model of a folder of photographs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gnnet.scenes.layouts.colmap import load_colmap
from gnnet.scenes.reconstruct import main, reconstruct

STREET = Path(__file__).parents[2] / "examples" / "lund_street"


def write_images(folder: Path, count: int, size=(64, 48)) -> Path:
    folder.mkdir()
    for k in range(count):
        noise = np.random.default_rng(k).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{k}.png")
    return folder


def test_what_cannot_be_reconstructed_is_said_first(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"none holds 0 image files; expected a folder of three or more"):
        reconstruct(tmp_path / "none", tmp_path / "out")
    two, three = write_images(tmp_path / "two", 2), write_images(tmp_path / "three", 3)
    assert main([str(two), str(tmp_path / "out")]) == 1
    assert "two holds 2 image files" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "old" / "sparse").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="sparse exists; take it away"):
        reconstruct(three, tmp_path / "old")
    (tmp_path / "other" / "images").mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"images exists and is not .*three"):
        reconstruct(three, tmp_path / "other")


def test_images_without_overlap_are_said(tmp_path):
    with pytest.raises(ValueError, match=r"no two of the 3 images in .* match: they have no overlap; take more"):
        reconstruct(write_images(tmp_path / "noise", 3, (160, 120)), tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "sparse").exists() and not list((tmp_path / "out").glob(".reconstruct*"))


@pytest.mark.slow
def test_photographs_become_a_scene(tmp_path, capsys):
    """Half of the street, walked straight ahead; images are matched with their neighbours and those that look alike."""
    photographs = tmp_path / "out" / "images"  # where no link is needed
    photographs.mkdir(parents=True)
    for k in range(2, 12):
        shutil.copy(STREET / ("queries" if k in (5, 8, 11) else "images") / f"{k:02d}.jpg", photographs)
    made = reconstruct(photographs, tmp_path / "out", exhaustive=4)
    assert len(made.registered) >= 8 and made.points > 300 and made.error_pixels < 1, made
    assert "one camera" in capsys.readouterr().out
    scene = load_colmap(tmp_path / "out", progress=False)
    assert set(scene.images) == set(made.registered)
    assert set(made.registered) | set(made.left_out) == {path.name for path in photographs.iterdir()}
