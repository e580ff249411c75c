"""Refinement through a distorted lens: the distortion belongs in the projection and its Jacobian."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gnnet.data.batches import LocalizationBatch, View, collate
from gnnet.data.queries import LocalizationDataset
from gnnet.evaluation.starts import PerturbedPoses, localize_batch
from gnnet.geometry.camera import Camera
from gnnet.localization.refiner import Refiner
from gnnet.localization.robust import Robust
from gnnet.models.grey import GreyValues
from gnnet.scenes.layouts.cmu import load_cmu
from gnnet.toy.cmu_sample import write_cmu_sample
from gnnet.toy.light import WEATHERS, light_street, paint_street
from gnnet.toy.render import render_frame
from gnnet.toy.streets import build_street, drive
from gnnet.toy.truth import spread_points


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """Queries in the reference's light, on another drive, each with the nearest reference."""
    root = write_cmu_sample(tmp_path_factory.mktemp("cmu"), slices=(2,), frames=3, image_size=(160, 120))
    scene = load_cmu(root, places=1, progress=False).with_conditions(["cloudy-foliage"])
    dataset = LocalizationDataset(scene, points=1000, largest_side=None, max_queries=None, seed=0)
    return collate([dataset[0, index] for index in range(len(dataset))])


def ignoring(view):
    """The view as if its camera had no distortion."""
    return view._replace(camera=view.camera.without_distortion())


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


@pytest.mark.slow
@pytest.mark.cases
def test_refinement_of_fisheye_images_needs_their_model():
    """A lens of 115° across, rendered: with its model poses are good to a centimetre, without it they are lost."""
    camera = Camera.from_colmap("OPENCV_FISHEYE", 160, 160, [80, 80, 80, 80, -0.02, 0.003, 0, 0], dtype=torch.float64)
    rng = np.random.default_rng(0)
    street = build_street(2, 0)
    lit = light_street(paint_street(street, rng, coarseness=2.0), WEATHERS["overcast-reference"], rng)
    poses = drive(frames=4, reference_frames=4, rng=rng)  # `camera_from_place`
    views = [torch.from_numpy(render_frame(lit, camera, poses[i], rng)).permute(2, 0, 1) for i in range(4)]
    items = []
    for i in range(3):
        seen = spread_points(street, camera, poses[i], rng)  # at random pixels of the reference
        query, reference = (View(views[k], camera.to(torch.float32), poses[k].to(torch.float32)) for k in (i + 1, i))
        valid, origin = torch.ones(len(seen.xy), dtype=torch.bool), torch.zeros(3, dtype=torch.float64)
        items.append(
            LocalizationBatch(
                query, reference, seen.points.float(), seen.xy.float(), valid, origin, torch.tensor(i), [""], [str(i)]
            )
        )
    batch = collate(items)
    _, seen = camera.project(in_camera := poses[1].transform(batch.points[1].double()))
    widest = torch.atan2(in_camera[seen, :2].norm(dim=1), in_camera[seen, 2]).max().rad2deg()
    assert widest > 70
    right, wrong = median_errors(batch), median_errors(batch._replace(query=ignoring(batch.query)))
    assert right[0] < 0.02 and right[1] < 0.15  # 8 mm, 0.10°
    assert wrong[0] > 20 * right[0]  # 0.53 m
