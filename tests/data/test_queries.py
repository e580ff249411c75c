"""Queries with their references."""

from __future__ import annotations

import pytest
import torch

from gnnet.data.queries import LocalizationDataset, collate_localization
from gnnet.scenes.layouts.robotcar import load_robotcar


@pytest.fixture(scope="module")
def scene(toy_root):
    return load_robotcar(toy_root, progress=False)


def test_localization_samples_project_where_the_reference_sees_them(scene):
    dataset = LocalizationDataset(scene, points=100, largest_side=64, max_queries=None, seed=0)
    assert len(dataset) == sum(not image.is_reference for image in scene.images.values())
    batch = collate_localization([dataset[0, index] for index in range(3)])
    reference = scene.images[dataset.samples[0].reference]
    xy, visible = batch.reference.camera.project(batch.reference.cam_from_world.transform(batch.points))
    assert visible[batch.valid].all()
    seen = torch.from_numpy(reference.keypoints) * 64 / 96
    distance = torch.cdist(xy[0].double(), seen).min(1).values
    assert distance.max() < 0.001
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
