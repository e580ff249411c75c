"""COLMAP models of a map and localized queries, read back by pycolmap and by the reader of COLMAP folders."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pycolmap
import pytest
import torch

from gnnet.evaluation.colmap_export import write_colmap_model
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose, perturb
from gnnet.localization.result import Localization, Status
from gnnet.scenes.layouts.cmu import load_cmu
from gnnet.scenes.layouts.colmap import load_colmap
from gnnet.scenes.layouts.robotcar import load_robotcar
from gnnet.scenes.scene import Scene
from gnnet.toy.cmu_sample import write_cmu_sample


@pytest.fixture(scope="module")
def town(toy_root) -> Scene:
    return load_robotcar(toy_root, progress=False)


@pytest.fixture(scope="module")
def lenses(tmp_path_factory) -> Scene:
    """A slice of two cameras with distortion."""
    root = write_cmu_sample(tmp_path_factory.mktemp("cmu"), slices=(2,), image_size=(96, 72), frames=2)
    return load_cmu(root, progress=False)


def localized(scene: Scene, names: list[str]) -> list[Localization]:
    """Localizations some centimetres off the truth."""
    generator = torch.Generator().manual_seed(0)
    poses = [perturb(scene.images[name].cam_from_world, 0.1, 1.0, generator) for name in names]
    return [Localization(n, Status.LOCALIZED, "", cam_from_world=p) for n, p in zip(names, poses, strict=True)]


def queries_of(scene: Scene, count: int = 4) -> list[str]:
    queries = [i.name for i in scene.images.values() if not i.is_reference and i.cam_from_world is not None]
    return queries[:: max(1, len(queries) // count)]


@pytest.mark.parametrize("name", ["town", "lenses"])
@pytest.mark.slow
def test_pycolmap_reads_the_same_poses_cameras_and_tracks(name, request, tmp_path):
    scene = request.getfixturevalue(name)
    localizations = localized(scene, queries_of(scene))
    failed = Localization("lost.jpg", Status.NO_POSE, "3 inliers, 12 needed")
    write_colmap_model(tmp_path / "new" / "sparse", scene, [*localizations, failed])
    model = pycolmap.Reconstruction(tmp_path / "new" / "sparse")
    references = {image.name: image for image in scene.images.values() if image.is_reference}
    poses = {name: image.cam_from_world for name, image in references.items()}
    poses |= {found.name: found.cam_from_world for found in localizations}
    found = {image.name: image for image in model.images.values()}
    assert set(found) == set(poses) and model.num_reg_images() == len(poses)
    for name, pose in poses.items():
        np.testing.assert_allclose(found[name].cam_from_world().matrix(), pose.matrix()[:3], atol=1e-9)
        points = torch.tensor([[0.1, -0.2, 2.0], [-0.3, 0.1, 1.0]], dtype=torch.float64)
        camera = model.cameras[found[name].camera_id]
        np.testing.assert_allclose(
            camera.img_from_cam(points.numpy()), scene.images[name].camera.project(points)[0], atol=1e-6
        )
    assert len(model.cameras) == (1 if scene.name == "robotcar" else 2)
    for name, image in references.items():
        seen = {int(p.point3D_id) - 1: p.xy for p in found[name].points2D}
        assert sorted(seen) == sorted(image.point_ids.tolist())
        rows = image.point_ids.tolist()
        np.testing.assert_array_equal([seen[row] for row in rows], image.keypoints)
        xyz = [model.points3D[row + 1].xyz for row in rows]
        np.testing.assert_array_equal(xyz, scene.points[image.point_ids])
    assert model.compute_num_observations() == sum(len(image.point_ids) for image in references.values())
    assert model.compute_mean_reprojection_error() < 0.1


def test_the_reader_of_colmap_folders_agrees(town, toy_root, tmp_path):
    localizations = localized(town, queries_of(town))
    write_colmap_model(tmp_path / "sparse", town, localizations)
    scene = load_colmap(tmp_path, images=toy_root.absolute() / "robotcar/images", min_shared_points=5, progress=False)
    assert len(scene.images) == 9 + len(localizations) and scene.problems == ()
    for image in scene.images.values():
        before = town.images[image.name]
        torch.testing.assert_close(image.camera.parameters, before.camera.parameters)
        if not before.is_reference:
            assert len(image.point_ids) == 0
            continue
        torch.testing.assert_close(image.cam_from_world.matrix(), before.cam_from_world.matrix())
        xy, valid = image.camera.project(image.cam_from_world.transform(scene.points[image.point_ids]))
        assert valid.all() and (xy - torch.from_numpy(image.keypoints)).norm(dim=-1).max() < 0.05
    for localization in localizations:
        torch.testing.assert_close(
            scene.images[localization.name].cam_from_world.matrix(), localization.cam_from_world.matrix()
        )


def test_queries_with_cameras_of_their_own(town, tmp_path):
    pose = Pose.identity(dtype=torch.float32)
    unknown = Localization("phone.jpg", Status.LOCALIZED, "", cam_from_world=pose)
    with pytest.raises(ValueError, match=r"query phone\.jpg has no camera.*give it there"):
        write_colmap_model(tmp_path, town, [unknown])
    camera = Camera.from_colmap("SIMPLE_RADIAL", 64, 48, [50, 32, 24, -0.1])
    known = localized(town, queries_of(town, 1)[:1])
    cameras = {"phone.jpg": camera, known[0].name: camera}  # before the scene's
    write_colmap_model(tmp_path, town, [unknown, *known], cameras=cameras)
    model = pycolmap.Reconstruction(tmp_path)
    for name in cameras:
        found = model.cameras[model.find_image_with_name(name).camera_id]
        assert (found.width, found.height, found.model.name) == (64, 48, "OPENCV")
        np.testing.assert_allclose(found.params, [50, 50, 32, 24, -0.1, 0, 0, 0], rtol=1e-6)


def test_a_query_that_is_a_reference_stands_beside_it(town, tmp_path):
    reference = next(image for image in town.images.values() if image.is_reference)
    [localization] = localized(town, [reference.name])
    write_colmap_model(tmp_path, town, [localization])
    model = pycolmap.Reconstruction(tmp_path)
    assert sum(image.name.startswith("localized/") for image in model.images.values()) == 1
    map_image = model.find_image_with_name(reference.name)
    np.testing.assert_allclose(map_image.cam_from_world().matrix(), reference.cam_from_world.matrix()[:3], atol=1e-9)
    query = model.find_image_with_name(f"localized/{reference.name}")
    np.testing.assert_allclose(query.cam_from_world().matrix(), localization.cam_from_world.matrix()[:3], atol=1e-9)
    with pytest.raises(ValueError, match="stands twice"):
        write_colmap_model(tmp_path, town, [localization, localization])


def test_maps_without_points_and_without_anything(town, tmp_path):
    bare = {name: replace(image, point_ids=None, keypoints=None) for name, image in town.images.items()}
    scene = Scene("bare", bare, ())
    write_colmap_model(tmp_path, scene, localized(scene, queries_of(scene, 1)[:1]))
    model = pycolmap.Reconstruction(tmp_path)
    assert model.num_points3D() == 0 and model.compute_num_observations() == 0
    nothing = Scene("nothing", {n: replace(i, cam_from_world=None) for n, i in bare.items()}, ())
    with pytest.raises(ValueError, match="nothing has no reference with camera and pose"):
        write_colmap_model(tmp_path, nothing, [Localization("a", Status.NO_POSE, "")])


@pytest.mark.skipif("GNNET_DATA" not in os.environ, reason="set GNNET_DATA to the folder that holds strecha/")
def test_a_real_reconstruction_returns(tmp_path):
    root = Path(os.environ["GNNET_DATA"]) / "strecha" / "herz-jesus-p25"
    scene = load_colmap(root, progress=False)
    write_colmap_model(tmp_path / "sparse", scene, [])
    again = load_colmap(tmp_path, images=root.absolute() / "images", progress=False)
    pairs = [[(p.image_a, p.image_b, p.count) for p in s.pairs] for s in (again, scene)]
    assert list(again.images) == list(scene.images) and pairs[0] == pairs[1]
    np.testing.assert_array_equal(again.points, scene.points)
    before, after = (pycolmap.Reconstruction(folder / "sparse") for folder in (root, tmp_path))
    assert after.compute_num_observations() == before.compute_num_observations()
    assert abs(after.compute_mean_reprojection_error() - before.compute_mean_reprojection_error()) < 1e-3
