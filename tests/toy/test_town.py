from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gnnet.data.correspondences import PairPoints
from gnnet.geometry.pose import perturb
from gnnet.scenes.layouts.robotcar import load_robotcar
from gnnet.scenes.scene import Scene, SceneImage
from gnnet.toy import town as toy
from gnnet.toy.camera import image_rays, pixel_rays, toy_camera, trace, windows_in_image
from gnnet.toy.light import ATLAS_WIDTH, paint_street
from gnnet.toy.streets import build_street, drive
from gnnet.toy.town import CONDITIONS, TownSettings, ensure_toy_town, load_toy, render_toy_town
from gnnet.toy.truth import render_depth

ALL = {"generator": np.random.default_rng(0), "count": 0}  # draws all correspondences of a file
TOY_SEED = 0  # of the town in toy_root
SMALL = {"places": 1, "frames": 2, "query_frames": 1, "image_size": 48, "conditions": ("overcast-reference", "night")}


@pytest.fixture(scope="module")
def town(toy_root: Path) -> Scene:
    return load_robotcar(toy_root, progress=False)


def depth_of(root: Path, name: str) -> np.ndarray:
    return np.load((root / "robotcar" / "depth" / name).with_suffix(".npy"))


def depth_between_pixels(depth: np.ndarray, xy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Depth at pixels (N, 2), and whether it is known: the inverse depth is interpolated, which is exact on planes."""
    inverse = np.where(depth > 0, 1 / np.maximum(depth.astype(np.float64), 1e-3), 1e6)
    flat = np.zeros(depth.shape, bool)
    along_x = inverse[1:-1, :-2] + inverse[1:-1, 2:] - 2 * inverse[1:-1, 1:-1]
    along_y = inverse[:-2, 1:-1] + inverse[2:, 1:-1] - 2 * inverse[1:-1, 1:-1]
    flat[1:-1, 1:-1] = np.maximum(np.abs(along_x), np.abs(along_y)) < 1e-6 * inverse[1:-1, 1:-1]
    flat &= depth > 0
    x, y = np.clip(np.floor(xy - 0.5).astype(int), 0, len(depth) - 2).T
    fx, fy = (xy - 0.5).T - [x, y]
    corners = [(y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1)]
    a, b, c, d = (inverse[corner] for corner in corners)
    value = (1 - fy) * ((1 - fx) * a + fx * b) + fy * ((1 - fx) * c + fx * d)
    return 1 / value, np.all([flat[corner] for corner in corners], axis=0)


def transfer(a: SceneImage, b: SceneImage, xy: np.ndarray, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Project pixels (N, 2) of image a with depths (N,) into image b: pixels (N, 2) and validity (N,)."""
    rays, _ = a.camera.unproject(torch.from_numpy(xy))
    world = a.cam_from_world.inverse().transform(rays * torch.from_numpy(depth)[:, None])
    projected, valid = b.camera.project(b.cam_from_world.transform(world))
    return projected.numpy(), valid.numpy()


@pytest.mark.slow
def test_correspondences_agree_with_poses_and_depth(toy_root: Path, town: Scene):
    errors = []
    for pair in town.pairs:
        a, b = town.images[pair.image_a], town.images[pair.image_b]
        found = PairPoints(town, pair).draw(**ALL)
        for one, other, xy_one, xy_other in (
            (a, b, found.keypoints_a, found.keypoints_b),
            (b, a, found.keypoints_b, found.keypoints_a),
        ):
            depth, known = depth_between_pixels(depth_of(toy_root, one.name), xy_one.astype(np.float64))
            projected, valid = transfer(one, other, xy_one.astype(np.float64), depth)
            assert valid[known].all()
            errors.append(np.linalg.norm(projected - xy_other, axis=-1)[known])
        assert found.weight.min() > 0 and found.weight.max() <= 1
    errors = np.concatenate(errors)
    assert len(errors) > 200 * len(town.pairs)
    # A few points are on poles so thin that they are between the centres of the depth map's pixels.
    assert (errors > 0.05).mean() < 0.002 and np.quantile(errors, 0.99) < 1e-3


def test_correspondences_are_exact_by_casting_rays(town: Scene):
    pair = town.pairs[0]
    a, b = town.images[pair.image_a], town.images[pair.image_b]
    found = PairPoints(town, pair).draw(**ALL)
    world_from_place = build_street(0, TOY_SEED).world_from_place
    bounds = build_street(0, TOY_SEED).bounds(torch.float64)
    ends = []
    for image, xy in ((a, found.keypoints_a), (b, found.keypoints_b)):
        camera_from_place = image.cam_from_world @ world_from_place
        origin, direction = pixel_rays(image.camera, camera_from_place, torch.from_numpy(xy).double())
        ends.append(origin + trace(bounds, origin, direction).depth * direction)
    apart = (ends[0] - ends[1]).norm(dim=0)
    assert apart.quantile(0.99) < 1e-3  # metres; pixels are float32, and surfaces may be seen at a grazing angle


def test_half_a_pixel_or_a_moved_camera_would_be_noticed(toy_root: Path, town: Scene):
    pair = town.pairs[0]
    a, b = town.images[pair.image_a], town.images[pair.image_b]
    found = PairPoints(town, pair).draw(**ALL)
    depth, known = depth_between_pixels(depth_of(toy_root, a.name), found.keypoints_a.astype(np.float64))
    shifted, _ = transfer(a, b, found.keypoints_a - 0.5, depth)
    assert np.median(np.linalg.norm(shifted - found.keypoints_b, axis=-1)[known]) > 0.05
    moved = perturb(b.cam_from_world, 0.1, 1.0, torch.Generator().manual_seed(0))
    elsewhere, _ = transfer(a, SceneImage(b.name, b.path, "", "", b.camera, moved), found.keypoints_a, depth)
    assert np.median(np.linalg.norm(elsewhere - found.keypoints_b, axis=-1)[known]) > 0.05


def test_observed_points_reproject_exactly_and_lie_at_the_depth(toy_root: Path, town: Scene):
    for image in town.images.values():
        if not image.is_reference:
            continue
        in_camera = image.cam_from_world.transform(town.points[torch.from_numpy(image.point_ids)])
        xy, valid = image.camera.project(in_camera)
        assert valid.all() and np.abs(xy.numpy() - image.keypoints).max() < 0.01
        depth, known = depth_between_pixels(depth_of(toy_root, image.name), image.keypoints)
        assert known.mean() > 0.7
        assert np.abs(depth / in_camera[:, 2].numpy() - 1)[known].max() < 1e-5
        assert len(image.point_ids) >= 200


def test_points_are_tracked_through_the_references(town: Scene):
    seen = np.bincount(np.concatenate([i.point_ids for i in town.images.values() if i.is_reference]))
    assert len(seen) == len(town.points) and seen.min() >= 1 and seen.mean() > 1.5


def test_depth_is_that_of_a_plane_where_the_camera_looks_at_the_road():
    street, camera = build_street(0, 0), toy_camera(64)
    pose = drive(frames=1, reference_frames=2, rng=np.random.default_rng(0))[0]
    depth = render_depth(street, camera, pose)
    origin, direction = pixel_rays(camera, pose, torch.tensor([[32.0, 63.5]], dtype=torch.float64))
    assert depth[63, 31:33].mean() == pytest.approx(float(-origin[2, 0] / direction[2, 0]), rel=1e-3)
    assert (depth == 0).any()  # sky


def test_windows_exclude_no_hit():
    street, camera = build_street(1, 0), toy_camera(48)
    bounds = street.bounds(torch.float32)
    poses = drive(frames=3, reference_frames=4, rng=np.random.default_rng(1))
    for frame in range(3):
        origin, direction = image_rays(camera, poses[frame])
        whole = trace(bounds, origin, direction)
        quick = trace(bounds, origin, direction, windows_in_image(bounds, camera, poses[frame]))
        assert torch.equal(whole.box, quick.box) and torch.equal(whole.depth, quick.depth)


def test_conditions_differ_and_have_contrast(town: Scene):
    means = {}
    for condition in CONDITIONS:
        images = [np.asarray(Image.open(i.path)) for i in town.images.values() if i.condition == condition]
        assert all(image.shape == (96, 96, 3) and image.std() > 12 for image in images)
        means[condition] = np.mean([image.mean() for image in images])
    assert means["night"] < 0.75 * means["overcast-reference"] < means["snow"]


def test_layout_counts_and_places(town: Scene):
    assert town.conditions == tuple(sorted(CONDITIONS)) and town.places == ("001", "002", "003")
    references = [image for image in town.images.values() if image.is_reference]
    assert len(references) == 9 and len(town.images) == 9 + 3 * 4 * 2 and len(town.pairs) == 3 * 4 * 2 * 2
    centers = torch.stack([image.cam_from_world.center() for image in town.images.values()])
    places = np.array([image.place for image in town.images.values()])
    apart = torch.cdist(centers, centers).numpy()
    same = places[:, None] == places[None]
    assert apart[same].max() < 15 and apart[~same].min() > 100


@pytest.mark.slow
def test_rendering_is_deterministic(tmp_path: Path):
    first = render_toy_town(tmp_path / "a", TownSettings(**SMALL), progress=False)
    second = render_toy_town(tmp_path / "b", TownSettings(**SMALL), progress=False)
    other = render_toy_town(tmp_path / "c", TownSettings(**SMALL, seed=1), progress=False)
    names = sorted(p.relative_to(first) for p in first.rglob("*") if p.suffix in {".jpg", ".txt", ".nvm"})
    assert len(names) > 8
    assert all((first / n).read_bytes() == (second / n).read_bytes() for n in names)
    images = [n for n in names if n.suffix == ".jpg"]
    assert all((first / n).read_bytes() != (other / n).read_bytes() for n in images)
    pairs_a, pairs_b = (load_robotcar(root, progress=False) for root in (first, second))
    for pair_a, pair_b in zip(pairs_a.pairs, pairs_b.pairs, strict=True):
        found = (PairPoints(scene, pair).draw(**ALL) for scene, pair in ((pairs_a, pair_a), (pairs_b, pair_b)))
        assert all(np.array_equal(x, y) for x, y in zip(*found, strict=True))


def test_ensure_renders_once_for_each_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rendered = []

    def fake(root: Path, settings: TownSettings, *, progress: bool) -> Path:
        rendered.append(settings.seed)
        root.mkdir(parents=True)
        (root / "toy.json").write_text(settings.text())
        return root

    monkeypatch.setattr(toy, "render_toy_town", fake)
    root = tmp_path / "data" / "toy"
    with ThreadPoolExecutor(4) as pool:  # as several processes of one training do
        for path in pool.map(lambda _: ensure_toy_town(root, TownSettings(**SMALL), progress=False), range(4)):
            assert path == root
    assert rendered == [0]
    for _ in range(2):
        ensure_toy_town(root, TownSettings(**SMALL, seed=3), progress=False)
    assert rendered == [0, 3]
    assert sorted(p.name for p in root.iterdir()) == ["toy.json"]


def test_ensure_leaves_other_folders_alone(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="no toy town"):
        ensure_toy_town(tmp_path, TownSettings(**SMALL), progress=False)
    assert (tmp_path / "mine.txt").read_text() == "keep"


@pytest.mark.slow
def test_load_toy_reads_the_folder_as_load_robotcar_does(tmp_path: Path):
    scene = load_toy(tmp_path / "toy", **SMALL, progress=False)
    again = load_robotcar(tmp_path / "toy", progress=False)
    assert scene.pairs == again.pairs and len(scene.pairs) == 2
    assert list(scene.images) == list(again.images) and torch.equal(scene.points, again.points)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"conditions": ("overcast-reference", "fog")}, "fog"), ({"conditions": ("night",)}, "overcast-reference"),
     ({"places": 0}, "places"), ({"image_size": 8}, "image_size")],
)  # fmt: skip
def test_bad_settings(tmp_path: Path, settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        load_toy(tmp_path / "toy", **{**SMALL, **settings}, progress=False)
    assert not (tmp_path / "toy").exists()


def test_the_order_of_conditions_changes_nothing():
    conditions = ("overcast-reference", "sun")
    assert TownSettings(conditions=conditions) == TownSettings(conditions=conditions[::-1])


@pytest.mark.slow
def test_a_street_for_large_images_fits_its_atlas():
    street = build_street(1, 0)
    painted = paint_street(street, np.random.default_rng([0, 1, 1]), coarseness=256 / 768)
    assert painted.paint.shape[-1] == ATLAS_WIDTH
