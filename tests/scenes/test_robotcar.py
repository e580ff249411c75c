from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gnnet.geometry.pose import pose_errors
from gnnet.scenes.robotcar import load_robotcar
from gnnet.scenes.robotcar_models import _stretches
from gnnet.scenes.scene import Scene
from gnnet.scenes.toy_layout import write_correspondences


@pytest.fixture
def copy(toy_root: Path, tmp_path: Path) -> Path:
    """The toy town's robotcar folder, to be damaged."""
    return Path(shutil.copytree(toy_root / "robotcar", tmp_path / "robotcar", copy_function=os.link))


def replace_text(path: Path, text: str) -> None:
    path.unlink()  # it is a hard link
    path.write_text(text)


def load(root: Path, **settings) -> Scene:
    return load_robotcar(root, progress=False, **settings)


def test_root_may_be_the_folder_or_its_parent(toy_root: Path):
    one, other = load(toy_root), load(toy_root / "robotcar")
    assert one.pairs == other.pairs and list(one.images) == list(other.images)


def test_images_have_what_the_layout_knows(toy_root: Path):
    scene = load(toy_root)
    for name, image in scene.images.items():
        assert name == image.name and name.endswith(".jpg") and image.path.is_file()
        assert image.is_reference == (image.condition == "overcast-reference") == (image.point_ids is not None)
        assert image.camera.parameters.tolist() == [60, 60, 48, 48, 0, 0, 0, 0]
        assert image.camera.size.tolist() == [96, 96] and image.cam_from_world.dtype == torch.float64
    for pair in scene.pairs:
        a, b = scene.images[pair.image_a], scene.images[pair.image_b]
        assert a.is_reference and not b.is_reference and a.place == b.place == pair.place
        assert f"run2_{b.condition}_" in pair.correspondences.name


def test_conditions_choose_pairs_and_queries(toy_root: Path):
    scene = load(toy_root, conditions=["night"])
    assert scene.conditions == ("night", "overcast-reference")
    assert {scene.images[pair.image_b].condition for pair in scene.pairs} == {"night"} and len(scene.pairs) == 12
    with pytest.raises(ValueError, match=r"dusk.*has night, rain, snow, sun"):
        load(toy_root, conditions=["dusk"])


def test_a_condition_is_not_one_that_begins_alike(copy: Path):
    points = np.full((4, 2), 20.0)
    scene = load(copy)
    a, b = scene.pairs[0].image_a, scene.pairs[0].image_b
    (copy / "images" / "night-rain" / "rear").mkdir(parents=True)
    os.link(copy / "images" / b, copy / "images" / "night-rain" / "rear" / "1.jpg")
    path = copy / "correspondence" / "correspondence_run1_overcast-reference_run2_night-rain_c1_c2.mat"
    write_correspondences(path, a, "night-rain/rear/1.jpg", points, points, np.ones(4))
    assert load(copy, conditions=["night-rain"]).conditions == ("night-rain", "overcast-reference")
    assert load(copy, conditions=["night"]).conditions == ("night", "overcast-reference")


def test_split_by_place_is_disjoint_and_stable(toy_root: Path, copy: Path):
    scene = load(toy_root)
    train, validation = scene.split(0.34, seed=0)
    assert set(train.places).isdisjoint(validation.places) and set(train.images).isdisjoint(validation.images)
    assert len(train.pairs) + len(validation.pairs) == len(scene.pairs) and validation.pairs
    again = load(copy).split(0.34, seed=0)[1]
    assert again.places == validation.places and list(again.images) == list(validation.images)


def test_merged_model_agrees_with_individual_models(toy_root: Path, copy: Path):
    individual = load(toy_root)
    shutil.rmtree(copy / "3D-models" / "individual")
    merged = load(copy)
    assert set(merged.images) == set(individual.images) and len(merged.pairs) == len(individual.pairs)
    assert torch.allclose(merged.points, individual.points, atol=1e-7)
    for name, image in individual.images.items():
        other = merged.images[name]
        position, rotation = pose_errors(other.cam_from_world, image.cam_from_world)
        assert position < 1e-6 and rotation < 1e-6
        assert torch.equal(other.camera.parameters, image.camera.parameters)
        if image.is_reference:
            order, order_other = np.argsort(image.point_ids), np.argsort(other.point_ids)
            assert np.array_equal(image.point_ids[order], other.point_ids[order_other])
            assert np.allclose(image.keypoints[order], other.keypoints[order_other], atol=1e-6)
    partition = {frozenset(n for n in individual.images if individual.images[n].place == p) for p in individual.places}
    assert partition == {frozenset(n for n in merged.images if merged.images[n].place == p) for p in merged.places}


def test_stretches_begin_after_their_length_and_at_jumps():
    x = np.array([0, 20, 40, 60, 80, 300, 320])
    names = _stretches(np.stack([x, 0 * x, 0 * x], -1).astype(float), place_size=50.0)
    assert names == ["stretch000"] * 3 + ["stretch001"] * 2 + ["stretch002"] * 2


def test_without_models_references_have_no_pose_and_blocks_are_places(copy: Path):
    shutil.rmtree(copy / "3D-models")
    scene = load(copy)
    assert scene.places == ("block000",) and len(scene.points) == 0 and len(scene.pairs) == 48
    reference = scene.images[scene.pairs[0].image_a]
    assert reference.is_reference and reference.cam_from_world is None and reference.camera is not None


def test_images_without_pose_take_the_place_of_their_reference(toy_root: Path, copy: Path):
    replace_text(copy / "robotcar_v2_train.txt", "")
    scene, known = load(copy), load(toy_root)
    assert {n: i.place for n, i in scene.images.items()} == {n: i.place for n, i in known.images.items()}
    assert all((image.cam_from_world is not None) == image.is_reference for image in scene.images.values())


def test_a_pair_across_places_is_left_out(copy: Path):
    scene = load(copy)
    a = next(p.image_a for p in scene.pairs if p.place == "001")
    b = next(p.image_b for p in scene.pairs if p.place == "002")
    path = copy / "correspondence" / "correspondence_run1_overcast-reference_run2_night_across.mat"
    write_correspondences(path, a, b, np.ones((3, 2)), np.ones((3, 2)), np.ones(3))
    assert load(copy).pairs == scene.pairs


def test_missing_data_says_what_where_and_whence_at_once(tmp_path: Path):
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError) as error:
        load(tmp_path / "nowhere")
    assert time.perf_counter() - start < 0.5
    message = str(error.value)
    for part in ("nowhere", str(tmp_path), "dataset.root", "visuallocalization.net", "Larsson", "correspondence/"):
        assert part in message


@pytest.mark.parametrize("folder", ["images", "correspondence"])
def test_missing_folder(copy: Path, folder: str):
    shutil.rmtree(copy / folder)
    with pytest.raises(FileNotFoundError, match=f"no folder {folder}/"):
        load(copy)


def test_no_correspondences(copy: Path):
    for path in (copy / "correspondence").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"correspondence holds no correspondence_run1.*dataset\.root"):
        load(copy)


def test_missing_images_are_counted_and_the_first_is_named(copy: Path):
    shutil.rmtree(copy / "images" / "sun")
    with pytest.raises(FileNotFoundError, match=r"sun/rear/\d+\.jpg"):
        load(copy)
    assert load(copy, conditions=["night"]).pairs
    scene = load(copy, conditions=["night"])
    gone = sorted(i.path for i in scene.images.values() if i.condition == "night")[1:3]
    for path in gone:
        path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"2 images, of 4 pairs.*the first is night/rear/{gone[0].name}"):
        load(copy, conditions=["night"])


@pytest.mark.parametrize("name", ["../../etc/passwd.jpg", "/etc/passwd.jpg", "night\\..\\..\\x.jpg", "C:\\x.jpg"])
def test_paths_that_leave_the_root_are_refused(copy: Path, name: str):
    scene = load(copy)
    path = copy / "correspondence" / "correspondence_run1_overcast-reference_run2_night_bad.mat"
    write_correspondences(path, scene.pairs[0].image_a, name, np.ones((3, 2)), np.ones((3, 2)), np.ones(3))
    with pytest.raises(ValueError, match=r"night_bad\.mat: im_j_path"):
        load(copy)


def test_damaged_intrinsics_and_poses_are_named(copy: Path):
    replace_text(copy / "intrinsics" / "rear_intrinsics.txt", "fx 400\nfy nonsense\n")
    with pytest.raises(ValueError, match=r"rear_intrinsics\.txt.*fx, fy, cx, cy"):
        load(copy)
    replace_text(copy / "intrinsics" / "rear_intrinsics.txt", "fx 60\nfy 60\ncx 48\ncy 48\n")
    replace_text(copy / "robotcar_v2_train.txt", "night/rear/1.jpg 1 2 3\n")
    with pytest.raises(ValueError, match=r"robotcar_v2_train\.txt line 1.*3 values.*expected 16"):
        load(copy)


def test_damaged_models_are_named(copy: Path):
    model = copy / "3D-models" / "individual"
    (model / "colmap_reconstructions" / "002_aligned" / "images.txt").unlink()
    with pytest.raises(ValueError, match="002_aligned cannot be read"):
        load(copy)
    shutil.rmtree(model)
    nvm = copy / "3D-models" / "all-merged" / "all.nvm"
    replace_text(nvm, "\n".join(nvm.read_text().splitlines()[:8]))
    with pytest.raises(ValueError, match=r"all\.nvm is damaged"):
        load(copy)
    replace_text(nvm, "PLY\n")
    with pytest.raises(ValueError, match="does not begin with NVM_V3"):
        load(copy)
