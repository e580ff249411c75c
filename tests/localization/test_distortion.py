"""Refinement through a distorted lens: the distortion belongs in the projection and its Jacobian."""

from __future__ import annotations

import pytest

from gnnet.data.batches import collate
from gnnet.data.queries import LocalizationDataset
from gnnet.evaluation.starts import PerturbedPoses, localize_batch
from gnnet.geometry.camera import Camera
from gnnet.localization.refiner import Refiner
from gnnet.localization.robust import Robust
from gnnet.models.grey import GreyValues
from gnnet.scenes.layouts.cmu import load_cmu
from gnnet.toy.cmu_sample import write_cmu_sample


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """Queries in the reference's light, on another drive, each with the nearest reference."""
    root = write_cmu_sample(tmp_path_factory.mktemp("cmu"), slices=(2,), frames=3, image_size=(160, 120))
    scene = load_cmu(root, places=1, progress=False).with_conditions(["cloudy-foliage"])
    dataset = LocalizationDataset(scene, points=1000, largest_side=None, max_queries=None, seed=0)
    return collate([dataset[0, index] for index in range(len(dataset))])


def ignoring(view):
    """The view as if its camera had no distortion."""
    parameters = view.camera.parameters.clone()
    parameters[..., 4:] = 0
    return view._replace(camera=Camera(view.camera.size, parameters))


def median_errors(batch) -> tuple[float, float]:
    """Median position (m) and rotation (degrees) error of the refined poses, from poses 10 cm and 0.5° off."""
    refiner = Refiner(robust=Robust("huber", scale=0.05), iterations=30)
    starts = PerturbedPoses(position=0.1, rotation=0.5, exact=True)
    localized = localize_batch(GreyValues(strides=(4, 2, 1)), refiner, batch, starts)
    return localized.position.median().item(), localized.rotation.median().item()


@pytest.mark.slow
def test_refinement_that_respects_distortion_beats_one_that_ignores_it(batch):
    assert len(batch.name) == 6 and (batch.query.camera.parameters[:, 4] < -0.39).all()
    position, rotation = median_errors(batch)
    assert position < 0.02 and rotation < 0.15
    query_only = median_errors(batch._replace(query=ignoring(batch.query)))
    assert query_only[0] > 10 * position and query_only[1] > 3 * rotation
    # In both images the errors cancel in part: a point is displaced much as its descriptor is.
    reference = ignoring(batch.reference)
    keypoints, _ = reference.camera.project(reference.cam_from_world.transform(batch.points))
    both = median_errors(batch._replace(query=ignoring(batch.query), reference=reference, keypoints=keypoints))
    assert both[0] > 4 * position and both[1] > 3 * rotation
    assert query_only[0] > both[0]


@pytest.mark.slow
def test_the_true_pose_is_a_minimum_with_distortion_only(batch):
    """Started at the truth, refinement stays there, unless it ignores distortion."""
    refiner = Refiner(robust=Robust("huber", scale=0.05), iterations=50)
    starts = PerturbedPoses(position=0.0, rotation=0.0, exact=True)
    network = GreyValues(strides=(2, 1))
    stays = localize_batch(network, refiner, batch, starts).position.median()
    leaves = localize_batch(network, refiner, batch._replace(query=ignoring(batch.query)), starts).position.median()
    assert stays < 0.02 and leaves > 10 * stays
