from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from gnnet.data import agreement
from gnnet.data.agreement import (
    correspondence_errors,
    epipolar_distances,
    errors_in_images,
    image_pairs,
    match_agreement,
    reprojection_errors,
)
from gnnet.evaluation.inspect import inspection
from gnnet.evaluation.inspect.inspection import Distribution, distribution, inspect_scene
from gnnet.evaluation.inspect.pairs import hull_share, occupied_share
from gnnet.evaluation.inspect.tables import bars, print_inspection, write_inspection
from gnnet.evaluation.units import Unit
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose, exp
from gnnet.sampling import evenly
from gnnet.scenes.scene import Depth, Pair, Scene, SceneImage
from gnnet.toy.layout import write_correspondences

SIZE = (80, 60)
CAMERA = Camera.from_colmap("PINHOLE", *SIZE, (50, 50, 40, 30), dtype=torch.float64)
POINTS = torch.cartesian_prod(torch.arange(-1, 3), torch.arange(-1, 2), torch.tensor([5])).double()  # (12, 3)


def at(x: float, *, camera: Camera = CAMERA) -> dict:
    """Camera, pose and observations of an image whose camera stands at (x, 0, 0) and looks along z."""
    pose = Pose(torch.eye(3, dtype=torch.float64), torch.tensor([-x, 0, 0], dtype=torch.float64))
    xy, seen = camera.project(pose.transform(POINTS))
    assert seen.all()
    ids = np.arange(len(POINTS))
    return {"camera": camera, "cam_from_world": pose, "point_ids": ids, "keypoints": xy.numpy(), "is_reference": True}


def write_image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def posed_scene(folder: Path) -> Scene:
    """Two references and a query of another condition, 1 m apart each; a black, a white and a blue image."""
    colours = {"a": (0, 0, 0), "b": (255, 255, 255), "c": (0, 0, 255)}
    paths = {name: write_image(folder / f"{name}.png", colour) for name, colour in colours.items()}
    query = {**at(1.0), "is_reference": False}
    images = {
        "a": SceneImage("a", paths["a"], "day", "square", **at(0.0)),
        "b": SceneImage("b", paths["b"], "day", "square", **at(1.0)),
        "c": SceneImage("c", paths["c"], "night", "square", **query),
    }
    pairs = (Pair("a", "b", "square"), Pair("c", "a", "square"), Pair("b", "c", "square"))
    return Scene("hand-made", images, pairs, points=POINTS)


def changed(scene: Scene, name: str, **values) -> Scene:
    images = dict(scene.images.items())
    return replace(scene, images={**images, name: replace(images[name], **values)})


def printed(found: inspection.Inspection) -> list[str]:
    console = Console(file=io.StringIO(), width=80, highlight=False)
    print_inspection(found, console)
    return console.file.getvalue().splitlines()


def test_cells_that_hold_a_point_are_counted():
    one_cell = np.array([[5.0, 2.5], [6.0, 3.0]])
    assert occupied_share(one_cell, (80, 40)) == 1 / 64
    assert occupied_share(np.array([[5.0, 2.5], [75.0, 37.0], [80.0, 40.0]]), (80, 40)) == 2 / 64  # the edge is inside
    x, y = np.meshgrid(np.arange(8) * 10 + 5, np.arange(8) * 5 + 2)
    assert occupied_share(np.stack([x.ravel(), y.ravel()], 1), (80, 40)) == 1


def test_overlap_is_the_area_of_the_hull():
    corners = np.array([[10.0, 10], [50, 10], [50, 30], [10, 30], [20, 20]])
    assert hull_share(corners, (80, 40)) == pytest.approx(0.25)
    assert hull_share(corners[:2], (80, 40)) == 0
    assert hull_share(np.array([[0.0, 0], [1, 1], [2, 2], [3, 3]]), (80, 40)) == 0


def test_distance_to_epipolar_lines_of_cameras_side_by_side_is_the_difference_of_rows():
    a = SceneImage("a", Path("a"), "day", "p", camera=CAMERA, cam_from_world=at(0.0)["cam_from_world"])
    b = replace(a, name="b", cam_from_world=at(1.0)["cam_from_world"])
    xy_a = np.array([[30.0, 20], [40, 30], [50, 50]])
    xy_b = xy_a + np.array([[-10, 0], [-5, 2], [-7, -3]])
    np.testing.assert_allclose(epipolar_distances(a, b, xy_a, xy_b), [0, 2, 3], atol=1e-9)
    assert len(epipolar_distances(a, replace(a, name="b"), xy_a, xy_a)) == 0  # there are no such lines


def test_true_correspondences_lie_on_epipolar_lines_of_distorted_cameras():
    generator = torch.Generator().manual_seed(0)
    camera = Camera.from_colmap("OPENCV", *SIZE, (50, 55, 41, 29, 0.05, -0.01, 0.002, -0.001), dtype=torch.float64)
    small = 0.1 * torch.randn(2, 6, generator=generator, dtype=torch.float64)
    views = [SceneImage(str(i), Path("x"), "day", "p", camera=camera, cam_from_world=exp(small[i])) for i in (0, 1)]
    points = torch.randn(50, 3, generator=generator, dtype=torch.float64) * 0.5 + torch.tensor([0, 0, 5.0])
    xy = [camera.project(view.cam_from_world.transform(points))[0].numpy() for view in views]
    assert epipolar_distances(*views, *xy).max() < 1e-6
    assert np.median(epipolar_distances(*views, xy[0], xy[1] + [3.0, 4.0])) > 0.5


def test_reprojection_errors_are_distances_and_infinite_behind_the_camera():
    image = SceneImage("a", Path("a"), "day", "p", **at(0.0))
    moved = replace(image, keypoints=image.keypoints + np.array([3.0, 4.0]))
    rows = np.array([2, 0])
    np.testing.assert_allclose(reprojection_errors(moved, POINTS[rows], rows), 5)
    assert np.isinf(reprojection_errors(image, -POINTS[rows], rows)).all()


def test_what_was_made_from_poses_is_not_held_against_them(tmp_path):
    scene = posed_scene(tmp_path)
    a, b = scene.images["a"], scene.images["b"]
    xy = a.keypoints, b.keypoints
    errors, how = correspondence_errors(scene, scene.pairs[0], *xy)
    assert len(errors) == 24 and errors.max() < 1e-9 and how == "common 3D points projected to both images"
    listed = replace(scene.pairs[0], correspondences=tmp_path / "pair.mat")
    errors, how = correspondence_errors(scene, listed, xy[0], xy[1] + [0, 7])
    np.testing.assert_allclose(errors, 7)
    assert how == "correspondences to the epipolar lines of the poses"
    deep = changed(changed(scene, "a", depth=Depth(Path("a"))), "b", depth=Depth(Path("b")))
    assert correspondence_errors(deep, scene.pairs[0], *xy)[1] is None
    assert correspondence_errors(changed(scene, "a", cam_from_world=None), scene.pairs[0], *xy)[1] is None
    assert image_pairs(scene, 5) == list(scene.pairs) and scene.pairs[0] in image_pairs(deep, 5)


def test_a_camera_that_moved_is_seen_in_the_images(tmp_path):
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 255, (30, 40), dtype=np.uint8))
    texture = coarse.resize((320, 240), Image.Resampling.BICUBIC)
    texture.crop((10, 10, 250, 190)).convert("RGB").save(tmp_path / "a.png")
    texture.crop((13, 14, 253, 194)).convert("RGB").save(tmp_path / "b.png")
    images = {name: SceneImage(name, tmp_path / f"{name}.png", "day", "p") for name in "ab"}
    pairs = (Pair("a", "b", "p", static=True), Pair("a", "a", "p", static=True))
    scene = Scene("still", images, pairs)
    assert image_pairs(scene, 5) == [pairs[0]]  # an image is where it is itself
    assert np.median(match_agreement(scene, pairs[0])[0]) == pytest.approx(5, abs=0.1)
    found = inspect_scene(scene, progress=False)
    assert [e.how for e in found.agreement] == ["SIFT matches to the same pixel (fixed camera)"]
    assert found.agreement[0].median_px == pytest.approx(5, abs=0.1) and found.agreement[0].within_3_px < 0.2


def test_errors_of_a_sequence_are_told_by_how_many_images_lie_between(tmp_path, monkeypatch):
    names = [f"seq-{s}/{i:03d}" for s in (1, 2) for i in range(9)]
    images = {n: SceneImage(n, Path(n), "day", "p", depth=Depth(Path(n))) for n in names}
    pairs = tuple(Pair(a, b, "p") for a, b in [(names[0], names[2]), (names[0], names[8]), (names[0], names[9])])

    def found_in(pair: Pair) -> np.ndarray:
        return np.array([1.0, float(names.index(pair.image_b))])

    monkeypatch.setattr(agreement, "match_agreement", lambda _, pair, side: (found_in(pair), np.zeros(0)))
    found = errors_in_images(Scene("sequence", images, pairs), progress=False).errors
    kinds = {how.removeprefix("SIFT matches to depth and poses, "): e[0].tolist() for how, e in found.items()}
    assert kinds == {"0–2 images apart": [1, 2], "6–10 images apart": [1, 8], "in two sequences": [1, 9]}


def test_distributions_have_round_edges():
    found = distribution([100, 150, 220, 300, 430])
    assert (found.minimum, found.quartiles, found.maximum) == (100, (150, 220, 300), 430)
    assert found.edges == (100, 150, 200, 250, 300, 350, 400, 450) and found.counts == (1, 1, 1, 0, 1, 0, 1)
    assert distribution([]) is None
    for values in ([7.0], [0.0, 0.0], [0.31, 0.999, 1.0], [0, 10_000], list(range(1000))):
        found = distribution(values)
        assert sum(found.counts) == len(values) and len(found.edges) == len(found.counts) + 1 <= 12
        assert found.edges[0] <= min(values) and max(values) <= found.edges[-1]


def test_samples_are_spread_over_lists_that_repeat_themselves():
    assert evenly(3, None).tolist() == evenly(3, 5).tolist() == [0, 1, 2]
    chosen = evenly(300, 100)
    assert (chosen // 3 == np.arange(100)).all()
    assert (np.bincount(chosen % 3, minlength=3) > 20).all()
    assert len(set(evenly(574, 200).tolist())) == 200 and evenly(574, 200).max() < 574
    assert len(evenly(5, 0)) == len(evenly(0, 3)) == 0


def test_inspection_of_a_scene_worked_out_by_hand(tmp_path):
    found = inspect_scene(posed_scene(tmp_path), progress=False)
    day, night = found.images
    assert (day.condition, day.size, day.focal, day.cameras, day.images, day.references) == (
        "day", SIZE, (50, 50), 1, 2, 2,
    )  # fmt: skip
    assert (night.images, night.references, night.posed, night.with_points, night.with_depth) == (1, 0, 1, 1, 0)
    groups = [(g.conditions, g.pairs, g.measured) for g in found.pairs]
    assert groups == [(("day", "night"), 2, 2), (("day", "day"), 1, 1)]
    assert found.pairs[0].correspondences == 12 and found.pairs[0].error_px < 1e-9
    # Points are 10 pixels apart: 30×20 pixels of 80×60, one a cell of 10×7.5 pixels.
    assert found.overlap.quartiles == pytest.approx((0.125,) * 3) and found.spread.maximum == 12 / 64
    assert found.colours.mean == pytest.approx((1 / 3, 1 / 3, 2 / 3))
    assert found.colours.std == pytest.approx((np.sqrt(2) / 3,) * 3)
    assert [(e.how, e.pairs, e.within_3_px) for e in found.agreement] == [
        ("common 3D points projected to both images", 3, 1.0)
    ]
    assert found.problems == () and found.training.yes
    assert found.localization.yes and "1 queries" in found.localization.reason
    assert not found.split.yes and "validation_root" in found.split.reason


def test_what_is_broken_is_named_and_counted(tmp_path):
    scene = posed_scene(tmp_path)
    (tmp_path / "c.png").write_bytes((tmp_path / "c.png").read_bytes()[:60])
    outside = scene.images["b"].keypoints.copy()
    outside[0] = [-20, 5]
    scene = changed(scene, "b", keypoints=outside)
    pairs = (*scene.pairs, Pair("a", "c", "square", tmp_path / "x.mat"))
    scene = replace(scene, pairs=pairs, problems=("told before",))
    found = inspect_scene(scene, progress=False)
    assert found.problems[0] == "told before" and len(found.problems) == 5
    assert "pair a ↔ b: 1 of 12 correspondences lie outside b (80×60), the first at (-20.0, 5.0)" in found.problems[1:]
    assert any(str(tmp_path / "x.mat") in problem for problem in found.problems)
    assert any(str(tmp_path / "c.png") in problem for problem in found.problems)
    assert found.training.yes and "dataset.on_bad=skip" in found.training.reason
    lines = printed(found)
    assert any(line.startswith("problems: 5 (4 pairs and 3 images read)") for line in lines)
    assert "• told before" in lines


def test_images_of_another_size_than_their_camera_are_problems(tmp_path):
    scene = posed_scene(tmp_path)
    write_image(tmp_path / "a.png", (0, 0, 0), size=(40, 30))
    assert [p for p in inspect_scene(scene, progress=False).problems if "a.png is 40×30 pixels" in p and "80×60" in p]


def test_limits_and_all(tmp_path):
    scene = posed_scene(tmp_path)
    found = inspect_scene(scene, pairs=1, images=2, progress=False)
    assert (found.pairs_read, found.images_read, found.colours.images) == (1, 2, 2)
    assert sum(group.measured for group in found.pairs) == 1 and sum(group.pairs for group in found.pairs) == 3
    assert inspect_scene(scene, pairs=None, images=None, progress=False).pairs_read == 3


def test_datasets_that_cannot_be_trained_on(tmp_path):
    scene = posed_scene(tmp_path)
    empty = inspect_scene(replace(scene, pairs=()), progress=False)
    assert empty.training == inspection.Answer(False, "it holds no pair of images")
    assert empty.correspondences is None and empty.pairs == ()

    unmatched = changed(scene, "a", point_ids=None, keypoints=None)
    found = inspect_scene(replace(unmatched, pairs=scene.pairs[:2]), progress=False).training
    assert not found.yes and found.reason == "2 of the 2 pairs read cannot be used"

    wrong = changed(scene, "a", cam_from_world=exp(torch.tensor([0, 0, 0, 0.2, 0, 0], dtype=torch.float64)))
    found = inspect_scene(replace(wrong, pairs=scene.pairs[:2]), progress=False).training
    assert not found.yes and "contradict each other" in found.reason

    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"no image")
    found = inspect_scene(scene, progress=False).training
    assert not found.yes and found.reason == "2 of the 3 images decoded cannot be used"


def test_listed_correspondences_that_contradict_the_poses(tmp_path):
    scene = posed_scene(tmp_path)
    xy_a, xy_b = (scene.images[name].keypoints for name in "ab")
    for shift, yes in ((0.0, True), (12.0, False)):
        path = tmp_path / f"{shift}.mat"
        write_correspondences(path, "a", "b", xy_a, xy_b + np.array([0, shift]), np.ones(len(xy_a)))
        found = inspect_scene(replace(scene, pairs=(Pair("a", "b", "square", path),)), progress=False)
        assert found.training.yes is yes
        assert found.agreement[0].median_px == pytest.approx(shift, abs=1e-4)


def test_tables_fit_80_columns_and_end_with_the_verdict(tmp_path):
    scene = posed_scene(tmp_path)
    long = {"day": "overcast-reference", "night": "overcast-summer"}
    images = {n: replace(image, condition=long[image.condition]) for n, image in scene.images.items()}
    lines = printed(inspect_scene(replace(scene, images=images), progress=False))
    assert lines[-1].startswith("can be trained on: yes, because a pair has 12 correspondences")
    assert lines[-2].startswith("can be split by place: no, because")
    assert all(len(line) <= 80 for line in lines[:-3])
    assert any(line.split() == ["overcast-reference", "80×60", "50", "1", "2", "2", "2", "–", "2"] for line in lines)
    assert any("overcast-reference ↔ overcast-summer" in line for line in lines)


def test_a_scene_without_poses_says_so(tmp_path):
    images = {n: SceneImage(n, write_image(tmp_path / f"{n}.png", (9, 9, 9)), "day", n) for n in "ab"}
    found = inspect_scene(Scene("photos", images, tuple(Pair(n, n, n, static=True) for n in "ab")), progress=False)
    assert "error of the correspondences: not known (no poses)" in printed(found)
    assert found.images[0].focal is None and found.images[0].size == SIZE and found.split.yes


def test_bars_are_as_long_as_their_counts():
    values = Distribution(0, (1, 2, 3), 4, edges=(0, 10, 20, 30), counts=(80, 0, 1))
    lines = bars(values, Unit.COUNT)
    assert lines == [f"   0 – 10  80  {'█' * 40}", "  10 – 20   0", "  20 – 30   1  ▌"]


def test_json_is_strict(tmp_path):
    found = inspect_scene(posed_scene(tmp_path), progress=False)
    unknown = (replace(found.agreement[0], median_px=float("inf"), within_3_px=float("nan")),)
    path = tmp_path / "new" / "inspection.json"
    write_inspection(
        replace(found, agreement=unknown), path, dataset="colmap", root="/data", settings={"cameras": ["rear"]}
    )

    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert content["format"] == "gnnet inspection 2" and content["settings"] == {"cameras": ["rear"]}
    assert (content["agreement"][0]["median_px"], content["agreement"][0]["within_3_px"]) == ("inf", None)
    assert content["images"][0]["size"] == list(SIZE) and content["training"]["yes"] is True
    assert sum(content["correspondences"]["counts"]) == 3
