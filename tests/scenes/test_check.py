"""Each kind of damage is reported, and left out if asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.scenes.check import checked
from gnnet.scenes.problems import BadInput
from gnnet.scenes.scene import Depth, Pair, Scene, SceneImage
from gnnet.toy.layout import write_correspondences

NAMES = ("0", "1", "2", "3")


def camera(width: float = 40, height: float = 30, focal: float = 50) -> Camera:
    return Camera.from_colmap("SIMPLE_PINHOLE", width, height, [focal, 20, 15], dtype=torch.float64)


def pose(scale: float = 1.0, sign: float = 1.0, x: float = 0.0) -> Pose:
    rotation = torch.diag(torch.tensor([1.0, 1.0, sign], dtype=torch.float64)) * scale
    return Pose(rotation, torch.tensor([x, 0, 0], dtype=torch.float64))


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """Four whole images with depth, in a ring of pairs: of a fixed camera, and with files."""
    images = {}
    for name in NAMES:
        Image.new("RGB", (40, 30), (9, 9, 9)).save(tmp_path / f"{name}.jpg")
        Image.fromarray(np.full((24, 32), 1000, np.uint16)).save(tmp_path / f"{name}.png")
        depth = Depth(tmp_path / f"{name}.png", camera(32, 24), pose(x=0.02))
        images[name] = SceneImage(
            name, tmp_path / f"{name}.jpg", "day", "p", camera(), pose(), True,
            point_ids=np.array([0, 1]), keypoints=np.array([[-0.9, 0], [40.9, 30.9]]), depth=depth,
        )  # fmt: skip
    xy = np.ones((5, 2))
    write_correspondences(tmp_path / "23.mat", "2", "3", xy, xy, np.ones(5))
    pairs = (
        Pair("0", "1", "p", static=True),
        Pair("1", "2", "p", static=True),
        Pair("2", "3", "p", correspondences=tmp_path / "23.mat"),
        Pair("3", "0", "p", correspondences=tmp_path / "never read again.mat", count=7),
    )
    return Scene("ring", images, pairs, torch.zeros(2, 3, dtype=torch.float64), problems=("an old problem",))


def changed(scene: Scene, name: str, **fields) -> Scene:
    images = dict(scene.images.items())
    images[name] = replace(images[name], **fields)
    return replace(scene, images=images, pairs=tuple(scene.pairs))


def check(scene: Scene, on_bad: str = "raise") -> Scene:
    return checked(scene, BadInput(on_bad), progress=False)


def test_a_scene_without_damage_is_unchanged(scene):
    found = check(scene)
    assert list(found.images) == list(NAMES) and found.pairs == scene.pairs and found.problems == ("an old problem",)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


FILES = {
    "missing": (lambda s, d: (d / "1.jpg").unlink(), FileNotFoundError, r"image .*/1\.jpg does not exist; put it"),
    "empty": (lambda s, d: (d / "1.jpg").write_bytes(b""), ValueError, r"1\.jpg \(0 bytes\) cannot be read .*fetch it"),
    "foreign": (lambda s, d: (d / "1.jpg").write_text("<html>"), ValueError, r"1\.jpg \(6 bytes\) cannot be read"),
    "cut": (lambda s, d: cut(d / "1.jpg"), ValueError, r"1\.jpg .*truncated: the JPEG ends before its end mark"),
    "no depth": (lambda s, d: (d / "1.png").unlink(), FileNotFoundError, r"depth map .*/1\.png does not exist"),
    "cut depth": (lambda s, d: cut(d / "1.png"), ValueError, r"depth map .*/1\.png .*truncated"),
}
NUMBERS = {
    "camera size": ({"camera": camera(41)}, r"image .*/1\.jpg is 40×30 pixels, its camera says 41×30; give"),
    "focal": ({"camera": camera(focal=0)}, r"/1\.jpg: its camera is .*40 30 0 0 20 15.*mend the intrinsics"),
    "negative focal": ({"camera": camera(focal=-9)}, r"/1\.jpg: its camera is"),
    "camera NaN": ({"camera": camera(focal=np.nan)}, r"/1\.jpg: its camera is .*nan"),
    "pose NaN": ({"cam_from_world": pose(x=np.nan)}, r"/1\.jpg: its pose has .*nan.*mend its pose file"),
    "pose infinite": ({"cam_from_world": pose(x=-np.inf)}, r"/1\.jpg: its pose has .*-inf"),
    "scaled": ({"cam_from_world": pose(scale=1.002)}, r"/1\.jpg: its pose has .*RᵀR = I to 0\.001"),
    "huge": ({"cam_from_world": pose(scale=1e200)}, r"/1\.jpg: its pose has"),
    "mirrored": ({"cam_from_world": pose(sign=-1)}, r"/1\.jpg: its pose has .*det \+1"),
    "outside": (
        {"keypoints": np.array([[20.0, 15.0], [20, 31.1]])},
        r"/1\.jpg: 1 of 2 keypoints lie outside its 40×30 pixels .*\(20, 31\.1\); was the image resized",
    ),
    "keypoint NaN": ({"keypoints": np.array([[20.0, np.nan], [20, 15]])}, r"/1\.jpg: 1 of 2 keypoints .*\(20, nan\)"),
    "ids": ({"point_ids": np.array([0, 2])}, r"/1\.jpg: it observes points 0 to 2 of 2"),
    "negative ids": ({"point_ids": np.array([-1, 1])}, r"/1\.jpg: it observes points -1 to 1 of 2"),
}


def assert_named_and_left_out(scene: Scene, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        check(scene)
    found = check(scene, "skip")
    assert list(found.images) == ["0", "2", "3"] and found.pairs == scene.pairs[2:]
    assert len(found.problems) == 2 and found.problems[0] == "an old problem"


@pytest.mark.parametrize("damage", FILES)
def test_files(scene, tmp_path, damage):
    apply, kind, message = FILES[damage]
    apply(scene, tmp_path)
    assert_named_and_left_out(scene, kind, message)


@pytest.mark.parametrize("damage", NUMBERS)
def test_numbers(scene, damage):
    fields, message = NUMBERS[damage]
    assert_named_and_left_out(changed(scene, "1", **fields), ValueError, message)


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        ({"camera": camera(40)}, r"depth map .*/1\.png is 32×24 pixels, its camera says 40×30"),
        ({"camera": None}, r"/1\.png is 32×24 pixels, its image .*/1\.jpg is 40×30; expected one size"),
        ({"camera": camera(32, 24, focal=-1)}, r"/1\.jpg: its depth camera is"),
        ({"image_from_depth": pose(scale=2)}, r"/1\.jpg: its depth pose has"),
    ],
)
def test_depth(scene, depth, message):
    image = scene.images["1"]
    assert_named_and_left_out(changed(scene, "1", depth=replace(image.depth, **depth)), ValueError, message)


def test_points(scene):
    points = scene.points.clone()
    points[1, 2] = torch.nan
    seen_by_one = {name: replace(i, point_ids=np.array([0, int(name == "1")])) for name, i in scene.images.items()}
    damaged = replace(scene, images=seen_by_one, pairs=tuple(scene.pairs), points=points)
    assert_named_and_left_out(damaged, ValueError, r"/1\.jpg: it observes point 1, which is not finite")
    unseen = {name: replace(i, point_ids=np.array([0, 0])) for name, i in scene.images.items()}
    assert len(check(replace(scene, images=unseen, points=points)).images) == 4


def test_images_of_a_fixed_camera_have_one_size(scene, tmp_path):
    Image.new("RGB", (42, 30)).save(tmp_path / "0.jpg")
    other = changed(scene, "0", camera=None, point_ids=None, keypoints=None)
    with pytest.raises(ValueError, match=r"/0\.jpg is 42×30 pixels, .*/1\.jpg is 40×30; .*resize them"):
        check(other)
    found = check(other, "skip")
    assert list(found.images) == list(NAMES) and found.pairs == scene.pairs[1:] and len(found.problems) == 2


def test_files_of_correspondences(scene, tmp_path):
    (tmp_path / "23.mat").write_bytes(b"no mat")
    with pytest.raises(ValueError, match=r"23\.mat \(6 bytes\) cannot be read"):
        check(scene)
    found = check(scene, "skip")
    assert list(found.images) == list(NAMES) and found.pairs == (*scene.pairs[:2], scene.pairs[3])


def test_pairs_of_images_that_the_scene_lacks(scene):
    stray = replace(scene, pairs=(*scene.pairs, Pair("1", "9", "p", static=True)))
    with pytest.raises(ValueError, match="pair 1 ↔ 9: the scene has no image 9; leave out the pair"):
        check(stray)
    assert check(stray, "skip").pairs == scene.pairs


def test_every_problem_is_reported(scene, tmp_path):
    (tmp_path / "0.jpg").unlink()
    (tmp_path / "2.jpg").write_bytes(b"")
    damaged = changed(scene, "3", camera=camera(focal=-1), cam_from_world=None)
    with pytest.raises(ValueError, match="ring: of 4 pairs none is left; 4 problems, the first: an old problem"):
        check(damaged, "skip")
    found = check(replace(damaged, pairs=()), "skip")
    assert list(found.images) == ["1"] and len(found.problems) == 4


def test_nothing_left(scene, tmp_path):
    for name in NAMES:
        (tmp_path / f"{name}.jpg").unlink()
    told = "5 problems, 4 of them alike: image .*0\\.jpg does not exist.*; the first: an old problem"
    with pytest.raises(ValueError, match=f"ring: of 4 images none is left; {told}"):
        check(scene, "skip")
    with pytest.raises(ValueError, match="of 0 images none is left"):
        check(Scene("empty", {}, ()))


def test_a_scene_without_pairs_is_one(scene):
    assert len(check(replace(scene, pairs=())).images) == 4
