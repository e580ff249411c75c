from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from gnnet.geometry.pose import pose_errors
from gnnet.scenes.layouts.robotcar import load_robotcar
from gnnet.scenes.pairing import stretches_by_length
from gnnet.scenes.scene import Scene
from gnnet.toy.layout import write_correspondences


@pytest.fixture
def copy(toy_root: Path, tmp_path: Path) -> Path:
    """The toy town's robotcar folder, to be damaged."""
    return Path(shutil.copytree(toy_root / "robotcar", tmp_path / "robotcar", copy_function=os.link))


def replace_text(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)  # it is a hard link
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def models_of(home: Path) -> list[Path]:
    return sorted((home / "3D-models" / "individual" / "colmap_reconstructions").iterdir())


# Camera to car (x forward, y left, z up): what the data set's extrinsics are, for cameras that look to the sides.
TILT = Rotation.from_rotvec([0.1, -0.2, 0.05]).as_matrix()
CAR_FROM = {}
for _camera, _axes, _center in (
    ("left", [[1, 0, 0], [0, 0, 1], [0, -1, 0]], (-0.5, 0.6, 1.3)),
    ("right", [[-1, 0, 0], [0, 0, -1], [0, -1, 0]], (-0.4, -0.7, 1.2)),
):
    CAR_FROM[_camera] = np.eye(4)
    CAR_FROM[_camera][:3, :3], CAR_FROM[_camera][:3, 3] = np.array(_axes) @ TILT, _center
SIDE_INTRINSICS = {"left": (60, 60, 45.5, 50.25), "right": (61, 62, 51.0, 44.5)}


@pytest.fixture
def three(copy: Path) -> Path:
    """The copy with left and right cameras: images, intrinsics, extrinsics, and their part of the models."""
    car_from_rear = np.loadtxt(copy / "extrinsics" / "rear_extrinsics.txt", delimiter=",")
    for camera, car_from_cam in CAR_FROM.items():
        for rear in copy.glob("images/*/rear/*.jpg"):
            folder = rear.parent.parent / camera
            folder.mkdir(exist_ok=True)
            os.link(rear, folder / rear.name)
        values = zip(("fx", "fy", "cx", "cy"), SIDE_INTRINSICS[camera], strict=True)
        replace_text(copy / "intrinsics" / f"{camera}_intrinsics.txt", "".join(f"{k} {v}\n" for k, v in values))
        rows = [",".join(f"{v:.15g}" for v in row) + "\n" for row in car_from_cam]
        replace_text(copy / "extrinsics" / f"{camera}_extrinsics.txt", "".join(rows))
        for model in models_of(copy):
            add_camera_to_model(model, camera, np.linalg.inv(car_from_cam) @ car_from_rear)
    return copy


def add_camera_to_model(model: Path, camera: str, cam_from_rear: np.ndarray) -> None:
    """Each rear image gets a companion, which sees twelve points of its own."""
    camera_id = {"left": 1, "right": 3}[camera]
    fx, fy, cx, cy = SIDE_INTRINSICS[camera]
    cameras, images, points = (
        (model / f"{name}.txt").read_text().splitlines() for name in ("cameras", "images", "points3D")
    )
    cameras.append(f"{camera_id} PINHOLE 96 96 {fx} {fy} {cx} {cy}")
    generator = np.random.default_rng(camera_id)
    for line in [line for line in images[::2] if "/rear/" in line]:
        rear_id, *pose, _, name = line.split()
        rotation, translation = Rotation.from_quat(np.float64(pose[:4])[[1, 2, 3, 0]]).as_matrix(), np.float64(pose[4:])
        rotation = cam_from_rear[:3, :3] @ rotation
        translation = cam_from_rear[:3, :3] @ translation + cam_from_rear[:3, 3]
        image_id, xy = int(rear_id) + 100 * camera_id, generator.uniform(5, 91, (12, 2)).round(2)
        depth = generator.uniform(4, 9, 12)
        in_camera = np.column_stack([(xy - (cx, cy)) / (fx, fy), np.ones(12)]) * depth[:, None]
        xyz = (in_camera - translation) @ rotation
        x, y, z, w = Rotation.from_matrix(rotation).as_quat()
        pose = " ".join(f"{v:.15g}" for v in (w, x, y, z, *translation))
        ids = 10_000 * image_id + np.arange(12)
        images += [f"{image_id} {pose} {camera_id} {name.replace('/rear/', f'/{camera}/')}"]
        images += [" ".join(f"{u} {v} {i}" for (u, v), i in zip(xy, ids, strict=True))]
        points += [
            f"{i} {' '.join(f'{v:.15g}' for v in point)} 128 128 128 0 {image_id} {k}"
            for k, (i, point) in enumerate(zip(ids, xyz, strict=True))
        ]
    for name, lines in (("cameras", cameras), ("images", images), ("points3D", points)):
        replace_text(model / f"{name}.txt", "\n".join(lines) + "\n")


def write_nvm(home: Path, scene: Scene, origin: dict[str, tuple[float, float]]) -> Path:
    """The scene as one merged model, with each camera's keypoints counted from an origin; in place of the others."""
    references = [image for image in scene.images.values() if image.is_reference]
    lines = ["NVM_V3", "", str(len(references))]
    seen: dict[int, list[str]] = {}
    for index, image in enumerate(references):
        numbers = [60.0, *image.cam_from_world.quaternion().tolist(), *image.cam_from_world.center().tolist()]
        lines.append(f"./{image.name.replace('.jpg', '.png')}\t{' '.join(map(str, numbers))} 0 0")
        shifted = image.keypoints - origin[image.path.parent.name]
        for k, (row, (x, y)) in enumerate(zip(image.point_ids.tolist(), shifted, strict=True)):
            seen.setdefault(row, []).append(f"{index} {k} {x} {y}")
    lines += ["", str(len(seen))]
    for row, measured in sorted(seen.items()):
        xyz = " ".join(map(str, scene.points[row].tolist()))
        lines.append(f"{xyz} 128 128 128 {len(measured)} {' '.join(measured)}")
    shutil.rmtree(home / "3D-models" / "individual", ignore_errors=True)
    path = home / "3D-models" / "all-merged" / "all.nvm"
    replace_text(path, "\n".join([*lines, "", "0", ""]))
    return path


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
    centers = np.stack([x, 0 * x, 0 * x], -1).astype(float)
    assert stretches_by_length(centers, 50.0) == [0, 0, 0, 1, 1, 2, 2]


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
    with pytest.raises(ValueError, match=r"robotcar_v2_train\.txt line 1 has 3 numbers; expected .*16 numbers"):
        load(copy)


def test_damaged_models_are_named(copy: Path):
    model = copy / "3D-models" / "individual"
    (model / "colmap_reconstructions" / "002_aligned" / "images.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"002_aligned.images\.txt does not exist; expected a COLMAP model"):
        load(copy)
    shutil.rmtree(model)
    nvm = copy / "3D-models" / "all-merged" / "all.nvm"
    replace_text(nvm, "\n".join(nvm.read_text().splitlines()[:8]))
    with pytest.raises(ValueError, match=r"all\.nvm is damaged"):
        load(copy)
    replace_text(nvm, "PLY\n")
    with pytest.raises(ValueError, match="does not begin with NVM_V3"):
        load(copy)


ALL = ("left", "rear", "right")


def test_three_cameras_have_their_models_intrinsics_and_images(three: Path, toy_root: Path):
    scene, rear = load(three, cameras=ALL), load(toy_root)
    assert len(scene.images) == 3 * len(rear.images)
    for name, image in scene.images.items():
        camera = image.path.parent.name
        expected = SIDE_INTRINSICS.get(camera, (60, 60, 48, 48))
        assert image.camera.parameters[:4].tolist() == list(expected) and image.path.is_file()
        assert image.place == rear.images[name.replace(f"/{camera}/", "/rear/")].place
        if image.is_reference:
            in_camera = image.cam_from_world.transform(scene.points[image.point_ids])
            xy, valid = image.camera.project(in_camera)
            assert valid.all() and np.allclose(xy.numpy(), image.keypoints, atol=0.05)
    alone = load(three, cameras=["rear"])
    assert set(alone.images) == set(rear.images) and torch.equal(alone.points, rear.points)


def test_left_and_right_queries_get_their_pose_through_the_rig(three: Path):
    gone = sorted((three / "images" / "night" / "left").iterdir())[0]
    gone.unlink()  # a moment that the left camera missed
    scene = load(three, cameras=ALL)
    world_from_rear = {
        line.split()[0]: np.float64(line.split()[1:]).reshape(4, 4)
        for line in (three / "robotcar_v2_train.txt").read_text().splitlines()
    }
    car_from_rear = np.loadtxt(three / "extrinsics" / "rear_extrinsics.txt", delimiter=",")
    checked = 0
    for name, world_from in world_from_rear.items():
        for camera, car_from_cam in CAR_FROM.items():
            image = scene.images.get(name.replace("/rear/", f"/{camera}/"))
            if image is None:
                assert camera == "left" and name.endswith(gone.name)
                continue
            world_from_cam = world_from @ np.linalg.inv(car_from_rear) @ car_from_cam
            assert np.allclose(image.cam_from_world.matrix().inverse().numpy(), world_from_cam, atol=1e-9)
            checked += 1
    assert checked == 2 * len(world_from_rear) - 1
    left_alone = load(three, cameras=["left"], conditions=["sun"])
    assert {i.path.parent.name for i in left_alone.images.values()} == {"left"} and len(left_alone.conditions) == 2
    assert all(image.cam_from_world is not None for image in left_alone.images.values())


BROKEN_EXTRINSICS = {
    "missing": (None, FileNotFoundError, r"left_extrinsics\.txt does not exist"),
    "short": ("1,0,0,0\n", ValueError, r"left_extrinsics\.txt has 4 numbers"),
    "not finite": ("nan," * 15 + "1", ValueError, r"left_extrinsics\.txt holds nan"),
    "scaled": ("2,0,0,0\n0,2,0,0\n0,0,2,0\n0,0,0,1", ValueError, r"left_extrinsics\.txt is not a rigid motion"),
    "mirrored": ("1,0,0,0\n0,1,0,0\n0,0,-1,0\n0,0,0,1", ValueError, r"left_extrinsics\.txt is not a rigid motion"),
}


@pytest.mark.parametrize("kind", BROKEN_EXTRINSICS)
@pytest.mark.slow
def test_extrinsics_are_checked_where_they_are_needed(three: Path, kind: str):
    text, error, message = BROKEN_EXTRINSICS[kind]
    path = three / "extrinsics" / "left_extrinsics.txt"
    path.unlink()
    if text is not None:
        path.write_text(text)
    assert load(three, cameras=["rear"]).pairs and load(three, cameras=["right"]).images
    with pytest.raises(error, match=message):
        load(three, cameras=ALL)
    scene = load(three, cameras=ALL, on_bad="skip")
    assert len(scene.problems) == 1 and "left_extrinsics.txt" in scene.problems[0]
    left = [image for image in scene.images.values() if image.path.parent.name == "left"]
    assert left and all(image.is_reference for image in left)


@pytest.mark.parametrize("cameras", [["front"], [], ["rear", 3]])
def test_unknown_cameras_are_refused(toy_root: Path, cameras: list):
    with pytest.raises(ValueError, match=r"dataset\.cameras.*left, rear, right"):
        load(toy_root, cameras=cameras)


def test_a_camera_without_images_or_intrinsics_is_named(three: Path):
    (three / "intrinsics" / "right_intrinsics.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"right_intrinsics\.txt does not exist"):
        load(three, cameras=ALL)
    scene = load(three, cameras=ALL, on_bad="skip")
    assert {image.path.parent.name for image in scene.images.values()} == {"left", "rear"}
    for folder in (three / "images").glob("*/left"):
        shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=r"no image of the camera left.*dataset\.cameras"):
        load(three, cameras=["left"])
    with pytest.raises(ValueError, match="no camera of"):
        load(three, cameras=["left"], on_bad="skip")


def test_groups_of_conditions(copy: Path):
    scene = load(copy)
    assert scene.groups == {"night-all": ("night",), "day-all": ("rain", "snow", "sun")}
    assert load(copy, conditions=["night-all", "sun"]).conditions == ("night", "overcast-reference", "sun")
    day = load(copy, conditions=["day-all"])
    assert day.groups == {"day-all": ("rain", "snow", "sun")} and len(day.pairs) == 36
    for condition in ("rain", "snow", "sun"):
        shutil.rmtree(copy / "images" / condition)
        for path in (copy / "correspondence").glob(f"*_{condition}_*.mat"):
            path.unlink()
    with pytest.raises(ValueError, match=r"day-all.*has night, and of groups night-all"):
        load(copy, conditions=["day-all"])


def test_pairs_know_their_number_of_correspondences(toy_root: Path):
    for pair in load(toy_root).pairs:
        with h5py.File(pair.correspondences) as file:
            assert pair.count == len(file["pt_i"]) > 0


@pytest.mark.slow
def test_test_queries_are_read_where_asked(copy: Path):
    lines = (copy / "robotcar_v2_train.txt").read_text().splitlines()
    test = [line.split()[0] for line in lines if line.startswith(("night", "sun"))][::2]
    paired = {name for pair in load(copy).pairs for name in (pair.image_a, pair.image_b)}
    for name in test[1:]:  # the first stays in the pairs
        for path in [pair.correspondences for pair in load(copy).pairs if pair.image_b == name]:
            path.unlink()
    replace_text(copy / "robotcar_v2_train.txt", "\n".join(line for line in lines if line.split()[0] not in test))
    replace_text(copy / "robotcar_v2_test.txt", "\n".join(test) + "\n")
    known = load(copy)
    assert set(test) <= paired and set(test) & set(known.images) == {test[0]}
    scene = load(copy, test_queries=True)
    assert set(scene.images) == set(known.images) | set(test) and scene.pairs == known.pairs
    for name in test:
        image = scene.images[name]
        assert image.cam_from_world is None and not image.is_reference and image.camera is not None
        assert image.place == (known.images[name].place if name == test[0] else "unknown")
    night = load(copy, test_queries=True, conditions=["night"])
    assert night.conditions == ("night", "overcast-reference") and len(set(night.images) & set(test)) > 1
    (copy / "robotcar_v2_test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"robotcar_v2_test\.txt does not exist"):
        load(copy, test_queries=True)


def test_queries_per_location_tell_the_place(three: Path):
    scene = load(three, cameras=ALL)
    queries = [image for image in scene.images.values() if not image.is_reference]
    moved = next(image for image in queries if image.place == "001" and image.path.parent.name == "rear")
    folder = three / "3D-models" / "individual" / "queries_per_location"
    for number in (1, 2, 3):
        names = [i.name for i in queries if (i.place == f"{number:03d}") != (i is moved and number in (1, 2))]
        names = [name for name in names if "/rear/" in name]  # the others are of the same moments
        replace_text(folder / f"queries_location_{number:03d}.txt", "\n".join(names) + "\n")
    replace_text(folder / "README.txt", "no image names")
    listed = load(three, cameras=ALL)
    for image in queries:
        expected = "002" if image.path.name == moved.path.name and image.condition == moved.condition else image.place
        assert listed.images[image.name].place == expected
    for pair in listed.pairs:
        assert pair.place == listed.images[pair.image_a].place == listed.images[pair.image_b].place
    assert len(listed.pairs) < len(scene.pairs)
    replace_text(three / "robotcar_v2_train.txt", "")  # then of the test queries too
    tested = load(three, test_queries=True)
    assert tested.images[moved.name].place == "002" and "unknown" not in tested.places
    replace_text(folder / "queries_location_003.txt", "night/rear/../../../x.jpg\n")
    with pytest.raises(ValueError, match=r"queries_location_003\.txt line 1 names"):
        load(three)


MATRICES = {
    "nan": ("nan" + " 0" * 14 + " 1", "holds nan"),
    "infinite": ("1 0 0 inf 0 1 0 0 0 0 1 0 0 0 0 1", "not finite"),
    "scaled": ("1.01 0 0 3 0 1.01 0 4 0 0 1.01 5 0 0 0 1", "not a rigid motion"),
    "mirrored": ("1 0 0 3 0 1 0 4 0 0 -1 5 0 0 0 1", "not a rigid motion"),
    "by columns": ("1 0 0 0 0 1 0 0 0 0 1 0 3 4 5 1", "not a rigid motion"),
    "far": ("1 0 0 1e300 0 1 0 0 0 0 1 0 0 0 0 1", "expected metres"),
    "huge": ("1e200 0 0 3 0 1 0 4 0 0 1 5 0 0 0 1", "not a rigid motion"),
    "words": ("1 0 0 here 0 1 0 4 0 0 1 5 0 0 0 1", "could not convert"),
}


@pytest.mark.parametrize("kind", MATRICES)
def test_query_poses_are_rigid_motions(copy: Path, kind: str):
    values, message = MATRICES[kind]
    path = copy / "robotcar_v2_train.txt"
    name, *lines = path.read_text().splitlines()
    name = name.split()[0]
    replace_text(path, "\n".join([*lines, "", f"{name} {values}"]))
    with pytest.raises(ValueError, match=rf"robotcar_v2_train\.txt line {len(lines) + 2}.*{message}"):
        load(copy)
    scene = load(copy, on_bad="skip")
    assert len(scene.problems) == 1 and scene.images[name].cam_from_world is None
    assert len(scene.pairs) == 48


def test_a_rounded_rotation_keeps_the_centre(copy: Path):
    path = copy / "robotcar_v2_train.txt"
    lines = path.read_text().splitlines()
    name, *values = lines[0].split()
    matrix = np.float64(values).reshape(4, 4)
    matrix[:3, 3] = (5000, -3000, 120)
    rounded = matrix.copy()
    rounded[:3, :3] = matrix[:3, :3].round(3)
    replace_text(path, "\n".join([f"{name} {' '.join(map(str, rounded.flatten()))}", *lines[1:]]))
    pose = load(copy).images[name].cam_from_world
    assert np.allclose(pose.center().numpy(), matrix[:3, 3], atol=1e-9)
    assert np.allclose(pose.rotation.numpy(), matrix[:3, :3].T, atol=1e-3)
    assert torch.allclose(pose.rotation @ pose.rotation.T, torch.eye(3, dtype=torch.float64), atol=1e-12)


def test_broken_files_are_skipped_and_counted(copy: Path):
    whole = load(copy)
    garbled = whole.pairs[0].correspondences
    garbled.unlink()
    garbled.write_bytes(b"not a mat file")
    missing = whole.images[whole.pairs[5].image_b]
    missing.path.unlink()
    with pytest.raises(ValueError, match=garbled.name):
        load(copy)
    scene = load(copy, on_bad="skip")
    assert len(scene.problems) == 2
    assert garbled.name in scene.problems[0] and str(missing.path) in scene.problems[1]
    assert set(scene.images) == set(whole.images) - {missing.name}
    assert scene.pairs == tuple(p for p in whole.pairs[1:] if p.image_b != missing.name)
    with pytest.raises(ValueError, match=r"dataset\.on_bad"):
        load(copy, on_bad="ignore")


@pytest.mark.parametrize("listed", [False, True])
def test_an_unreadable_model_leaves_its_place_out(copy: Path, listed: bool):
    whole = load(copy)
    if listed:
        for place in whole.places:
            names = [i.name for i in whole.images.values() if i.place == place and not i.is_reference]
            path = copy / "3D-models" / "individual" / "queries_per_location" / f"queries_location_{place}.txt"
            replace_text(path, "\n".join(names))
    replace_text(models_of(copy)[1] / "images.txt", "1 2 3\n")
    with pytest.raises(ValueError, match="002_aligned"):
        load(copy)
    scene = load(copy, on_bad="skip", test_queries=listed)
    line, model = scene.problems
    assert "002_aligned/images.txt line 1 is '1 2 3'" in line and "002_aligned holds no image" in model
    assert scene.places == ("001", "003")
    assert set(scene.images) == {name for name, image in whole.images.items() if image.place != "002"}
    assert scene.pairs == tuple(pair for pair in whole.pairs if pair.place != "002")
    for model in models_of(copy):
        replace_text(model / "images.txt", "1 2 3\n")
    with pytest.raises(ValueError, match="none of the 3 models"):
        load(copy, on_bad="skip")


def test_damaged_images_and_points_of_a_model_are_left_out(copy: Path):
    whole = load(copy)
    model = models_of(copy)[0]
    images, points = ((model / f"{name}.txt").read_text().splitlines() for name in ("images", "points3D"))
    images[0] = images[0].replace("overcast-reference/rear/", "../../rear/")
    words = images[2].split()
    images[2] = " ".join([*words[:5], "1e300", *words[6:]])
    points[3] = " ".join(["4", "1e300", *points[3].split()[2:]])
    replace_text(model / "images.txt", "\n".join(images) + "\n")
    replace_text(model / "points3D.txt", "\n".join(points) + "\n")
    with pytest.raises(ValueError, match="001_aligned"):
        load(copy)
    scene = load(copy, on_bad="skip")
    assert len(scene.problems) == 3 and all("001_aligned" in problem for problem in scene.problems)
    left = [i for i in scene.images.values() if i.place == "001" and i.is_reference and i.cam_from_world is not None]
    assert len(left) == 1 and torch.isfinite(scene.points).all()
    before = whole.images[left[0].name]
    assert len(left[0].point_ids) in (len(before.point_ids) - 1, len(before.point_ids))
    rows = {tuple(xy): row for xy, row in zip(before.keypoints, before.point_ids, strict=True)}
    then = np.array([rows[tuple(xy)] for xy in left[0].keypoints])
    assert torch.equal(scene.points[left[0].point_ids], whole.points[then])


ORIGINS = {
    "corner": dict.fromkeys(ALL, (0.0, 0.0)),
    "first pixel's centre": dict.fromkeys(ALL, (0.5, 0.5)),
    "image's centre": dict.fromkeys(ALL, (48.0, 48.0)),
    "principal point": {camera: values[2:] for camera, values in SIDE_INTRINSICS.items()},
}


@pytest.mark.parametrize("kind", ORIGINS)
def test_where_an_nvm_file_counts_pixels_from_is_found(three: Path, kind: str):
    cameras = ["left", "right"]
    individual = load(three, cameras=cameras)
    write_nvm(three, individual, ORIGINS[kind])
    merged = load(three, cameras=cameras)
    assert set(merged.images) == set(individual.images) and torch.allclose(merged.points, individual.points)
    for name, image in individual.images.items():
        if image.is_reference:
            assert np.allclose(merged.images[name].keypoints, image.keypoints, atol=1e-9)
            assert np.array_equal(merged.images[name].point_ids, image.point_ids)
    places = {n: i.place for n, i in individual.images.items()}
    assert len(set(zip(places.values(), [merged.images[n].place for n in places], strict=True))) == 3


def test_a_poor_calibration_does_not_move_an_nvm_files_keypoints(three: Path):
    individual = load(three, cameras=["left", "right"])
    noise = dict.fromkeys(ALL, (0.27, 0.27))  # a little nearer to the first pixel's centre than to the corner
    write_nvm(three, individual, noise)
    merged = load(three, cameras=["left", "right"])
    name = next(name for name, image in individual.images.items() if image.is_reference)
    assert np.allclose(merged.images[name].keypoints, individual.images[name].keypoints - 0.27, atol=1e-9)


@pytest.mark.slow
def test_bad_lines_of_an_nvm_file_are_skipped(three: Path):
    individual = load(three, cameras=ALL)
    path = write_nvm(three, individual, ORIGINS["corner"])
    merged = load(three, cameras=ALL)
    lines = path.read_text().splitlines()
    first_point = lines.index("", 3) + 2
    bad = [first_point, first_point + 1, first_point + 2, first_point + 3, 5]
    lines[bad[0]] = "1 2 3 128 128 128 2 0 0 5 5"
    lines[bad[1]] = "1 2 nan " + lines[bad[1]].split(maxsplit=3)[3]
    lines[bad[2]] = "1 2 3 128 128 128 1 9999 0 5 5"
    lines[bad[3]] = "1 2 3 128 128 128 one 0 0 5 5"
    gone = lines[bad[4]].split()[0].removeprefix("./").replace(".png", ".jpg")
    lines[bad[4]] = "./overcast-reference/rear/1.png\t60 1 0 0 inf 0 0 0 0 0"
    replace_text(path, "\n".join(lines))
    with pytest.raises(ValueError, match=rf"all\.nvm line {bad[4] + 1}"):
        load(three, cameras=ALL)
    scene = load(three, cameras=ALL, on_bad="skip")
    assert len(scene.problems) == 5
    for line in bad:
        assert any(f"all.nvm line {line + 1}" in problem for problem in scene.problems)
    assert len(merged.points) > len(scene.points) >= len(merged.points) - 4 - len(merged.images[gone].point_ids)
    for name, image in merged.images.items():
        if image.is_reference and name != gone:
            kept = {tuple(xyz) for xyz in scene.points[scene.images[name].point_ids].tolist()}
            assert kept <= {tuple(xyz) for xyz in merged.points[image.point_ids].tolist()}
    replace_text(path, "\n".join(lines[: first_point + 40]))
    short = load(three, cameras=ALL, on_bad="skip")
    assert any("ends after 40 of" in problem for problem in short.problems) and 30 < len(short.points) <= 36


@pytest.mark.parametrize("count", ["-1", "9" * 40, "many", "1e3"])
def test_damaged_counts_of_an_nvm_file(copy: Path, count: str):
    shutil.rmtree(copy / "3D-models" / "individual")
    path = copy / "3D-models" / "all-merged" / "all.nvm"
    lines = path.read_text().splitlines()
    lines[2] = count
    replace_text(path, "\n".join(lines))
    with pytest.raises(ValueError, match=r"all\.nvm is damaged: line 3"):
        load(copy)
    scene = load(copy, on_bad="skip")  # as without a model
    assert len(scene.problems) == 1 and scene.places == ("block000",)


def test_blocks_hold_the_three_cameras_of_a_moment(three: Path):
    scene = load(three)
    shutil.rmtree(three / "3D-models")
    path = three / "correspondence" / "correspondence_run1_overcast-reference_run2_night_left.mat"
    a, b = (name.replace("/rear/", "/left/") for name in (scene.pairs[0].image_a, scene.pairs[0].image_b))
    write_correspondences(path, a, b, np.ones((3, 2)), np.ones((3, 2)), np.ones(3))
    both = load(three, cameras=ALL)
    assert both.places == ("block000",) and both.images[a].is_reference and not both.images[b].is_reference
