"""Training pairs drawn from a scene."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gnnet.data.batches import collate_by_size
from gnnet.data.pairs import PairDataset
from gnnet.geometry.pose import exp
from gnnet.scenes.layouts.robotcar import load_robotcar


@pytest.fixture(scope="module")
def scene(toy_root):
    return load_robotcar(toy_root, progress=False)


def pairs_of(scene, **settings) -> PairDataset:
    return PairDataset(scene, **({"correspondences": 50, "largest_side": None, "crop": None, "seed": 0} | settings))


def test_draws_follow_from_seed_pass_and_index(scene):
    first, same = pairs_of(scene)[0, 3], pairs_of(scene)[0, 3]
    assert torch.equal(first.keypoints_a, same.keypoints_a)
    for other in (pairs_of(scene)[1, 3], pairs_of(scene, seed=1)[0, 3]):
        assert not torch.equal(first.keypoints_a, other.keypoints_a)
    assert len(first.keypoints_a.unique(dim=0)) == 50  # without replacement


@pytest.mark.parametrize(("largest_side", "crop"), [(None, None), (64, None), (None, 48), (64, 40)])
def test_keypoints_follow_resizing_and_cropping(scene, largest_side, crop):
    """Image content moves with its keypoint, so that both keypoints still show the same world point."""
    whole = pairs_of(scene, correspondences=10_000)[0, 0]
    part = pairs_of(scene, correspondences=10_000, largest_side=largest_side, crop=crop)[0, 0]
    side = min(part.image_a.shape[-2:])
    assert side == (crop or largest_side or 96)
    for name in ("a", "b"):
        xy, size = getattr(part, f"keypoints_{name}"), getattr(part, f"image_{name}").shape[-1]
        assert ((xy >= 0) & (xy <= size)).all()
    if crop is None:
        torch.testing.assert_close(part.keypoints_a, whole.keypoints_a * (largest_side or 96) / 96)
    elif largest_side is None:
        # A crop moves all keypoints by the same whole number of pixels.
        offsets = (whole.keypoints_a - part.keypoints_a[0]).double()
        moved = part.keypoints_a[None] + offsets[:, None]
        explained = torch.cdist(moved, whole.keypoints_a[None].double()).min(-1).values.max(-1).values < 1e-3
        assert explained.any()
        offset = offsets[explained.nonzero()[0, 0]]
        torch.testing.assert_close(offset, offset.round(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("largest_side", "crop"), [(None, None), (64, None), (None, 48), (64, 40)])
def test_points_of_a_pair_are_seen_where_its_images_show_them(scene, largest_side, crop):
    dataset = pairs_of(scene, largest_side=largest_side, crop=crop)
    for index in (0, 5):
        pair = dataset[0, index]
        points, valid, camera, b_from_a = pair.geometry
        assert valid.float().mean() > 0.9
        assert camera.size.tolist() == [pair.image_b.shape[-1], pair.image_b.shape[-2]]
        xy, _ = camera.project(b_from_a.transform(points))
        torch.testing.assert_close(xy[valid], pair.keypoints_b[valid], atol=2e-3, rtol=0)
        if crop is None:  # camera a is the file's, of the size of the image
            a = scene.images[scene.pairs[index].image_a]
            xy, _ = a.camera.scale(pair.image_a.shape[-1] / a.camera.size[0]).project(points.double())
            torch.testing.assert_close(xy[valid].float(), pair.keypoints_a[valid], atol=2e-3, rtol=0)


def test_without_geometry_a_pair_is_the_same(scene, monkeypatch):
    known = pairs_of(scene)[0, 0]
    monkeypatch.setattr("gnnet.data.pairs._located", None)  # it is not even called
    without = pairs_of(scene, geometry=False)
    pair = without[0, 0]
    assert pair.geometry is None and all(torch.equal(a, b) for a, b in zip(pair[:-1], known[:-1], strict=True))
    (batch,) = collate_by_size([pair, without[0, 1]])
    assert batch.geometry is None and len(batch.index) == 2


def test_points_are_unknown_under_a_warp_without_a_pose_or_where_poses_contradict(scene):
    def share(images, **settings):
        return pairs_of(replace(scene, images=images), **settings)[0, 0].geometry.valid.float().mean().item()

    images = dict(scene.images)
    assert share(images, crop=48, warp=0.5) == 0
    name = scene.pairs[0].image_b
    there = images[name].cam_from_world
    rolled = exp(torch.tensor([0.0, 0, 0, 0, 0, torch.pi / 2], dtype=torch.float64)) @ there
    assert share(images | {name: replace(images[name], cam_from_world=rolled)}) < 0.1
    assert share(images | {name: replace(images[name], cam_from_world=None)}) == 0


def test_correspondences_of_a_batch_are_padded_and_masked(scene):
    dataset = pairs_of(scene)
    items = [dataset[0, 0], dataset[0, 1]]
    short = items[1]._replace(
        **{k: getattr(items[1], k)[:20] for k in ("keypoints_a", "keypoints_b", "weight", "valid")},
        geometry=items[1].geometry._replace(**{k: getattr(items[1].geometry, k)[:20] for k in ("points", "valid")}),
    )
    (batch,) = collate_by_size([items[0], short])
    assert batch.valid.sum(1).tolist() == [50, 20]
    torch.testing.assert_close(batch.keypoints_a[1, :20], short.keypoints_a)
    assert batch.geometry.points.shape == (2, 50, 3) and not batch.geometry.valid[1, 20:].any()
    assert batch.geometry.camera_b.shape == batch.geometry.b_from_a.shape == (2,)


def test_images_of_a_batch_have_one_size(scene):
    dataset = pairs_of(scene)
    items = [dataset[0, index] for index in range(4)]
    items[1], items[3] = (items[i]._replace(image_b=items[i].image_b[:, :80]) for i in (1, 3))
    batches = collate_by_size(items)
    assert [batch.image_b.shape for batch in batches] == [(2, 3, 96, 96), (2, 3, 80, 96)]
    assert [batch.index.tolist() for batch in batches] == [[0, 2], [1, 3]]


def test_a_bad_pair_names_itself(scene, tmp_path):
    pair = replace(scene.pairs[2], correspondences=tmp_path / "gone.mat")
    broken = replace(scene, pairs=(*scene.pairs[:2], pair))
    with pytest.raises(RuntimeError, match=rf"pair 2 .*{pair.image_b}.*gone\.mat"):
        pairs_of(broken)[0, 2]
