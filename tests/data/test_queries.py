"""Queries with their references."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from gnnet.data.batches import collate
from gnnet.data.observed_points import FARTHEST, observed_points
from gnnet.data.queries import LocalizationDataset, nearest_by_pose
from gnnet.geometry.pose import Pose
from gnnet.scenes.layouts.robotcar import load_robotcar
from gnnet.scenes.scene import Depth


@pytest.fixture(scope="module")
def scene(toy_root):
    return load_robotcar(toy_root, progress=False)


def test_localization_samples_project_where_the_reference_sees_them(scene):
    dataset = LocalizationDataset(scene, points=100, largest_side=64, max_queries=None, seed=0)
    assert len(dataset) == sum(not image.is_reference for image in scene.images.values())
    batch = collate([dataset[0, index] for index in range(3)])
    reference = scene.images[dataset.samples[0].reference]
    xy, visible = batch.reference.camera.project(batch.reference.cam_from_world.transform(batch.points))
    assert visible[batch.valid].all()
    seen = torch.from_numpy(reference.keypoints) * 64 / 96
    distance = torch.cdist(xy[0].double(), seen).min(1).values
    assert distance.max() < 0.001
    torch.testing.assert_close(batch.keypoints[batch.valid], xy[batch.valid], atol=0.001, rtol=0)
    # The world is moved, not the relation of its parts.
    query = scene.images[batch.name[0]]
    center = batch.query.cam_from_world.center()[0].double() + batch.origin[0]
    torch.testing.assert_close(center, query.cam_from_world.center(), atol=1e-4, rtol=0)


def test_queries_are_thinned_evenly_and_repeatably(scene):
    few = LocalizationDataset(scene, points=10, largest_side=None, max_queries=8, seed=0)
    images = [scene.images[sample.query] for sample in few.samples]
    assert len(few) == 8
    assert {image.condition for image in images} == set(few.conditions) == {"night", "rain", "snow", "sun"}
    assert len({image.place for image in images}) >= 2


def test_a_point_is_described_where_the_reference_observes_it(scene):
    """At its keypoint, whatever the pose is off by; not valid where that is far from the projection."""
    reference = next(i for i in scene.images.values() if i.is_reference)
    seen = np.asarray(reference.keypoints) + np.array([1.5, -0.5])
    seen[::7] += [FARTHEST, 0]
    camera = reference.camera.scale(torch.tensor([0.5, 0.75], dtype=torch.float64))

    def observed(image, camera, count=10_000):
        return observed_points(scene, image, camera, count=count, generator=np.random.default_rng(0))

    found = observed(replace(reference, keypoints=seen), reference.camera)
    assert torch.equal(found.ids, torch.from_numpy(reference.point_ids))
    np.testing.assert_allclose(found.keypoints, seen)
    in_camera = reference.cam_from_world.transform(scene.points[found.ids])
    projected, inside = reference.camera.project(in_camera)
    # The point is on the ray of its keypoint, at its depth.
    moved = reference.cam_from_world.transform(found.points)[found.valid]
    torch.testing.assert_close(reference.camera.project(moved)[0], found.keypoints[found.valid], atol=1e-6, rtol=0)
    torch.testing.assert_close(moved[:, 2], in_camera[found.valid, 2])
    near = torch.from_numpy(np.linalg.norm(seen - projected.numpy(), axis=1) <= FARTHEST)
    assert torch.equal(found.valid, inside & near) and found.valid.any() and (inside & ~near).any()
    # In the pixels of the image that is described.
    np.testing.assert_allclose(observed(replace(reference, keypoints=seen), camera).keypoints, seen * [0.5, 0.75])
    unknown = observed(replace(reference, keypoints=None), camera)
    torch.testing.assert_close(unknown.keypoints, projected * torch.tensor([0.5, 0.75]))
    assert torch.equal(unknown.valid, inside)
    few = observed(reference, reference.camera, count=5)
    assert len(few.points) == len(few.ids.unique()) == 5


def test_points_from_depth_have_no_ids_and_are_described_where_they_project(scene, toy_root, tmp_path):
    known = next(i for i in scene.images.values() if i.is_reference)
    metres = np.load((toy_root / "robotcar" / "depth" / known.name).with_suffix(".npy"))
    Image.fromarray((1000 * metres.clip(0, 60)).astype(np.uint16)).save(tmp_path / "depth.png")
    reference = replace(known, point_ids=None, keypoints=None, depth=Depth(tmp_path / "depth.png"))
    found = observed_points(scene, reference, known.camera, count=50, generator=np.random.default_rng(0))
    assert len(found.points) == 50 and (found.ids == -1).all() and found.valid.all()
    projected, _ = known.camera.project(known.cam_from_world.transform(found.points))
    torch.testing.assert_close(found.keypoints, projected)


# --- nearest poses


def poses(count, seed):
    generator = np.random.default_rng(seed)
    rotations, centres = Rotation.random(count, random_state=seed), generator.normal(size=(count, 3)) * 20
    translations = -rotations.apply(centres)
    return Pose(torch.from_numpy(rotations.as_matrix()), torch.from_numpy(translations)), rotations, centres


def test_nearest_by_pose():
    references, rotations, centres = poses(30, 1)
    queries, query_rotations, query_centres = poses(4, 2)
    for q in range(4):
        angle = (rotations * query_rotations[q].inv()).magnitude()
        distance = np.linalg.norm(centres - query_centres[q], axis=1)
        expected = np.argsort(distance + 10 * angle)
        assert nearest_by_pose(queries[q], references, 7).tolist() == expected[:7].tolist()
        assert nearest_by_pose(queries[q].to(torch.float32), references, 99).tolist() == expected.tolist()


def test_nearest_by_pose_weighs_angle_against_distance():
    """A half turn is as far as 31.4 m."""
    half_turn = torch.diag(torch.tensor([-1.0, 1.0, -1.0]))
    eye = torch.eye(3)
    at = [(eye, 32.0), (half_turn, 0.0), (eye, 31.0), (eye, 31.0)]
    references = Pose.stack([Pose(r, -(r @ torch.tensor([x, 0.0, 0.0]))) for r, x in at])
    assert nearest_by_pose(Pose.identity(), references, 4).tolist() == [2, 3, 1, 0]
