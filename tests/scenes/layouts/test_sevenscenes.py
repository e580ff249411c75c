"""7-Scenes folders, written here; and real ones where they are available."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from gnnet.data.agreement import match_agreement
from gnnet.scenes.layouts.sevenscenes import load_sevenscenes
from gnnet.scenes.scene import Pair

COLOR_FROM_DEPTH = np.array(
    [
        [0.99996518, 0.00267651, -0.00790410, -0.02555894],
        [-0.00274093, 0.99996303, -0.00815045, 0.00010110],
        [0.00788199, 0.00817183, 0.99993554, 0.00203183],
        [0, 0, 0, 1],
    ]
)


def world_from_depth(sequence: int, number: int) -> np.ndarray:
    """A depth camera that moves along x, 1 cm per frame; sequences are 30 cm apart, and the third looks backwards."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec([0, np.pi if sequence == 3 else 0.002 * number, 0]).as_matrix()
    matrix[:3, 3] = 0.01 * number, 0.3 * sequence, 1
    return matrix


def write_frame(folder: Path, sequence: int, number: int, color: str = "png") -> None:
    stem = folder / f"seq-{sequence:02d}" / f"frame-{number:06d}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (640, 480)).save(f"{stem}.color.{color}")
    Image.fromarray(np.full((480, 640), 2000, np.uint16)).save(f"{stem}.depth.png")
    np.savetxt(f"{stem}.pose.txt", world_from_depth(sequence, number), fmt="%.7e", delimiter="\t ")


def write_scene(
    folder: Path, train: tuple[int, ...] = (1,), test: tuple[int, ...] = (2,), frames=range(0, 12, 2)
) -> Path:
    folder.mkdir(parents=True)
    (folder / "TrainSplit.txt").write_text("".join(f"sequence{n}\r\n" for n in train))
    (folder / "TestSplit.txt").write_text("".join(f"sequence{n}\n" for n in test))
    for sequence in (*train, *test):
        for number in frames:
            write_frame(folder, sequence, number, "jpg" if sequence == 2 else "png")
    return folder


def load(root: Path, **kwargs):
    return load_sevenscenes(root, progress=False, **kwargs)


def test_the_map_the_queries_and_their_cameras(tmp_path):
    scene = load(write_scene(tmp_path / "attic"), gaps=(2,))
    assert scene.places == ("attic",) and len(scene.images) == 12 and not scene.problems
    for name, image in scene.images.items():
        assert image.is_reference == name.startswith("seq-01/") and image.condition == "reference"
    image = scene.images["seq-02/frame-000004.color.jpg"]
    # The files give poses of the depth camera; the colour camera's centre is 2.6 cm to the right of it.
    np.testing.assert_allclose(
        image.cam_from_world.matrix(), COLOR_FROM_DEPTH @ np.linalg.inv(world_from_depth(2, 4)), atol=1e-6
    )
    beside = image.cam_from_world.center() - torch.tensor([0.04, 0.6, 1])
    moved = Rotation.from_rotvec([0, 0.008, 0]).inv().apply(beside)
    np.testing.assert_allclose(moved, [0.0256, 0, 0], atol=0.003)
    np.testing.assert_allclose(image.depth.image_from_depth.matrix(), COLOR_FROM_DEPTH)
    assert image.depth.path == tmp_path / "attic/seq-02/frame-000004.depth.png"
    assert image.camera.parameters.tolist() == [525, 525, 320, 240, 0, 0, 0, 0]
    assert image.depth.camera.parameters.tolist() == [585, 585, 320, 240, 0, 0, 0, 0]
    assert image.camera.size.tolist() == image.depth.camera.size.tolist() == [640, 480]
    with pytest.raises(ValueError, match="1 place, so it cannot be split by place"):
        scene.split(0.2, seed=0)


def test_pairs_at_gaps_in_frame_numbers(tmp_path):
    scene = load(write_scene(tmp_path / "attic", frames=(0, 2, 4, 10, 12)), gaps=(3, 8))
    numbers = {tuple(int(name[13:19]) for name in (p.image_a, p.image_b)) for p in scene.pairs}
    # A missing frame is replaced by the next one, up to half a gap later: 3 by 4, but 7 not by 10.
    assert numbers == {(0, 4), (0, 10), (2, 10), (4, 12)}
    assert all(p.image_a.startswith("seq-01/") and p.image_b.startswith("seq-01/") for p in scene.pairs)
    scene = load(tmp_path / "attic", gaps=(4, 8), stride=4)
    assert {int(name[13:19]) for name in scene.images} == {0, 4, 12}


def test_pairs_across_training_sequences_are_of_similar_views(tmp_path):
    folder = write_scene(tmp_path / "attic", train=(1, 2, 3), test=(), frames=range(0, 40, 10))
    across = [p for p in load(folder, gaps=(10,)).pairs if p.image_a[:6] != p.image_b[:6]]
    assert {(p.image_a[:19], p.image_b[:19]) for p in across} == {
        (f"seq-01/frame-{n:06d}", f"seq-02/frame-{n:06d}") for n in range(0, 40, 10)
    }
    assert len({frozenset((p.image_a, p.image_b)) for p in across}) == len(across)
    for distance in (0, 0.2):
        pairs = load(folder, gaps=(10,), across_sequences=distance).pairs
        assert all(p.image_a[:6] == p.image_b[:6] for p in pairs) and len(pairs) == 9


def test_a_folder_of_scenes_is_split_by_scene(tmp_path):
    for name in ("attic", "cellar"):
        write_scene(tmp_path / name)
    (tmp_path / "meshes").mkdir()
    scene = load(tmp_path, gaps=(2,))
    assert scene.places == ("attic", "cellar") and "cellar/seq-01/frame-000002.color.png" in scene.images
    train, validation = scene.split(0.5, seed=0)
    assert {i.place for i in train.images.values()} != {i.place for i in validation.images.values()}
    assert len(train.pairs) == len(validation.pairs) == 5


FRAME = "seq-01/frame-000004"
BROKEN = {
    "a short pose": (lambda f: (f / f"{FRAME}.pose.txt").write_text("1 0 0"), rf"{FRAME}\.pose\.txt has 3 numbers", 11),
    "a lost pose": (lambda f: (f / f"{FRAME}.pose.txt").write_text("-1.#IND " * 16), rf"{FRAME}\.pose\.txt", 11),
    "a binary pose": (lambda f: (f / f"{FRAME}.pose.txt").write_bytes(b"\xff\xfe\x81"), "cannot be read as text", 11),
    "no pose": (lambda f: (f / f"{FRAME}.pose.txt").unlink(), rf"{FRAME}\.pose\.txt does not exist", 11),
    "no depth": (lambda f: (f / f"{FRAME}.depth.png").unlink(), rf"{FRAME}\.color\.png has no depth map", 11),
    "no sequence": (lambda f: shutil.rmtree(f / "seq-02"), "seq-02 does not exist, .* unpack seq-02.zip", 6),
    "a folder of a sequence's parent": (
        lambda f: (f / "TestSplit.txt").write_text("sequence2\n../../secret\n"), r"line 2 is '\.\./\.\./secret'", 12,
    ),
    "one sequence in both": (
        lambda f: (f / "TestSplit.txt").write_text("sequence1\n"), "sequence1 is in both splits", 6,
    ),
    "no test split": (lambda f: (f / "TestSplit.txt").unlink(), r"TestSplit\.txt does not exist", 6),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_ends_the_reading_or_is_left_out(tmp_path, name):
    spoil, message, left = BROKEN[name]
    folder = write_scene(tmp_path / "attic")
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(folder, gaps=(2,))
    scene = load(folder, gaps=(2,), on_bad="skip")
    assert len(scene.images) == left and len(scene.problems) == 1 and scene.pairs


def test_the_expected_layout_is_explained(tmp_path):
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"(?s)no scene of 7-Scenes \(dataset\.root\); .*TrainSplit"):
            load(root)
    folder = write_scene(tmp_path / "attic", frames=(0,))
    without = load(folder)  # it may still be a map
    assert len(without.images) == 2 and not len(without.pairs)
    assert re.search(r"2 usable images and no pair of training images at gaps \[5, 15, 30\]", without.problems[0])
    with pytest.raises(ValueError, match=r"dataset\.stride is 0"):
        load(folder, stride=0)


@pytest.mark.skipif("GNNET_DATA" not in os.environ, reason="set GNNET_DATA to the folder that holds 7scenes/")
def test_real_scene_agrees_with_its_images():
    scene = load(Path(os.environ["GNNET_DATA"]) / "7scenes")
    references = sorted(name for name, image in scene.images.items() if image.is_reference)
    assert (len(references), len(scene.images)) == (200, 300) and scene.places == ("redkitchen",)
    pairs = [Pair(references[n], references[n + 8], "redkitchen") for n in range(0, 180, 20)]
    assert np.median(np.concatenate([match_agreement(scene, pair)[0] for pair in pairs])) < 4
