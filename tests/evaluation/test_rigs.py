"""Queries of a rig: which are localized together, and what happens where one of them is of no use."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from gnnet.evaluation.given import Given, on_rigs, read_given
from gnnet.evaluation.localize import localize_dataset, localize_queries, together
from gnnet.evaluation.maps import MapSettings, prepare_localizer
from gnnet.evaluation.metrics import INDOOR
from gnnet.geometry.pose import pose_errors
from gnnet.localization.initial_pose import PoseFromMatches
from gnnet.localization.local_features import LocalFeatures
from gnnet.localization.localizer import Localizer
from gnnet.localization.result import Status
from gnnet.models.grey import GreyValues
from gnnet.scenes.formats.rigs import OnRig, images_on_rigs
from gnnet.scenes.layouts.colmap import load_colmap
from gnnet.scenes.layouts.robotcar import load_robotcar
from gnnet.scenes.scene import SceneImage
from gnnet.toy.rig_sample import toy_rig, write_rig_sample
from gnnet.toy.town import TownSettings
from tests.conftest import TOY_SETTINGS


@pytest.fixture(scope="module")
def scene(toy_root):
    return load_robotcar(toy_root, progress=False)


def localizer_on(scene, folder) -> Localizer:
    """By SIFT."""
    settings = Localizer(pose=PoseFromMatches(LocalFeatures("sift", 500)), refiner=None, references=4)
    return prepare_localizer(settings, GreyValues(strides=[8, 2]), scene, MapSettings(folder), device="cpu")


@pytest.fixture(scope="module")
def instant(scene) -> tuple[list[SceneImage], dict[str, OnRig]]:
    """The references of one place, as if taken by three cameras at one instant."""
    taken = [i for i in scene.images.values() if i.is_reference and i.place == scene.places[0]]
    world_from_rig = taken[0].cam_from_world.inverse()
    return taken, {i.name: OnRig("0/1", i.cam_from_world @ world_from_rig) for i in taken}


@pytest.mark.slow
def test_a_broken_image_is_a_row_and_the_others_of_its_rig_go_on(scene, instant, tmp_path):
    (first, second, third), rigs = instant
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    broken = replace(second, path=tmp_path / "broken.jpg")
    alone = next(i for i in scene.images.values() if i.place == scene.places[1] and i.is_reference)
    queries = [first, alone, broken, third]  # not one after another
    result = localize_dataset(
        localizer_on(scene, tmp_path / "maps"), queries, tmp_path / "out", scene=scene, dataset="toy", title="rig",
        thresholds=INDOOR, rigs=rigs,
    )  # fmt: skip
    found = {r.name: r for r in result.localizations}
    assert len(found) == 4 and found[broken.name].status == Status.UNREADABLE and found[broken.name].reason
    assert found[broken.name].cam_from_world is None and found[alone.name].status == Status.LOCALIZED
    relative = found[third.name].cam_from_world @ found[first.name].cam_from_world.inverse()
    expected = rigs[third.name].cam_from_rig @ rigs[first.name].cam_from_rig.inverse()
    torch.testing.assert_close(relative.matrix(), expected.matrix())
    assert first.name not in found[first.name].references


def test_a_rig_that_is_not_there_is_said_at_once(scene, instant, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"rig\.json"):
        read_given(queries=None, images=None, poses=None, truth=None, rig=str(tmp_path / "rig.json"))
    with pytest.raises(ValueError, match="camera=unknown"):
        read_given(queries=None, images=None, poses=None, truth=None, camera="unknown", rig="dataset")
    with pytest.raises(ValueError, match="rig=dataset: robotcar knows no rig of the 1 queries"):
        on_rigs([SceneImage("own.jpg", tmp_path / "own.jpg")], "dataset", scene)
    assert Given().rig is None and on_rigs(instant[0], None, scene) == {}


def test_queries_of_robotcar_belong_together_by_their_moment(scene, instant):
    found = on_rigs(instant[0], "dataset", scene)  # the toy town has the rear camera alone
    assert all(torch.equal(rig.cam_from_rig.matrix(), torch.eye(4, dtype=torch.float64)) for rig in found.values())
    assert [len(group) for group in together(instant[0], found)] == [1, 1, 1]


@pytest.mark.slow
def test_a_rendered_rig_is_read_back_with_its_true_poses(tmp_path):
    settings = TownSettings(**TOY_SETTINGS | {"places": 1})
    sample = write_rig_sample(tmp_path, settings, condition="overcast-reference", instants=1)
    given = read_given(
        queries=str(sample.queries), images=str(sample.images), poses=None, truth=str(sample.truth), rig=str(sample.rig)
    )
    truth, rigs = given.truth.poses, images_on_rigs(given.listed.cameras, sample.rig)
    (front, *others) = sorted(truth)
    for name in others:
        relative = truth[name] @ truth[front].inverse()
        np.testing.assert_allclose(relative.matrix(), rigs[name].cam_from_rig.matrix(), atol=1e-5)
        np.testing.assert_allclose(relative.matrix(), toy_rig()[name.split("/")[0]].matrix(), atol=1e-5)
    scene = load_colmap(sample.map, progress=False)
    assert len(scene.images) == 3 * 3 and {name.split("/")[1] for name in scene.images} == toy_rig().keys()
    for image in scene.images.values():
        xy, _ = image.camera.project(image.cam_from_world.transform(scene.points[image.point_ids]))
        assert len(xy) > 20 and (xy - torch.from_numpy(image.keypoints)).abs().max() < 1e-3
    queries = [SceneImage(name, sample.images / name, camera=camera) for name, camera in given.listed.cameras.items()]
    localizer = localizer_on(scene, tmp_path / "maps")
    results = list(localize_queries(localizer, queries, rigs=rigs))
    assert [r.name for r in results] == [q.name for q in queries]
    poses = {r.name: r.cam_from_world for r in results}
    assert poses[front] is not None
    for name in others:
        expected = rigs[name].cam_from_rig @ poses[front]
        torch.testing.assert_close(poses[name].matrix(), expected.matrix())
    alone = [r for r in localize_queries(localizer, queries) if r.cam_from_world is not None]
    assert len(alone) == 3 and max(pose_errors(r.cam_from_world, truth[r.name])[0] for r in alone) < 0.2
