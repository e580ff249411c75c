"""Extended CMU Seasons: a rendered sample in its layout, and what is broken in it."""

from __future__ import annotations

import os
import shutil
from datetime import UTC, date, datetime
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import pose_errors
from gnnet.scenes.formats.colmap import read_model
from gnnet.scenes.formats.correspondences import read_correspondence_file
from gnnet.scenes.layouts.cmu import SLICE_GROUPS, load_cmu
from gnnet.scenes.layouts.cmu_slice import condition_of
from gnnet.scenes.problems import BadInput
from gnnet.toy.camera import image_rays, pixel_rays, trace, windows_in_image
from gnnet.toy.cmu_sample import sample_cameras, write_cmu_sample

SIZE, FRAMES = (96, 72), 2

pytestmark = pytest.mark.slow  # the sample takes seconds to render


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Path:
    """Slices 2 and 20. Read only."""
    return write_cmu_sample(tmp_path_factory.mktemp("cmu") / "sample", image_size=SIZE, frames=FRAMES)


@pytest.fixture
def copy(sample, tmp_path) -> Path:
    """Slice 2 of a sample of one's own to break; `copy / "cmu"`."""
    shutil.copytree(sample, tmp_path / "copy", ignore=shutil.ignore_patterns("slice20", "*slice20_*"))
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def scene(sample):
    return load_cmu(sample, progress=False)


def slice_of(root: Path, number: int = 2) -> Path:
    return root / "cmu" / "images" / f"slice{number}"


def without_distortion(camera: Camera) -> Camera:
    parameters = camera.parameters.clone()
    parameters[..., 4:] = 0
    return Camera(camera.size, parameters)


def test_images_have_names_conditions_cameras_and_poses(scene):
    assert len(scene.images) == 2 * 2 * 4 * FRAMES
    assert scene.places == ("slice2", "slice20") and scene.problems == ()
    assert scene.conditions == ("cloudy-foliage", "low-sun-no-foliage-snow", "sunny-foliage", "sunny-no-foliage")
    assert scene.groups["foliage"] == ("cloudy-foliage", "sunny-foliage")
    assert scene.groups["no-foliage"] == ("low-sun-no-foliage-snow", "sunny-no-foliage")
    assert scene.groups["low-sun"] == ("low-sun-no-foliage-snow",)
    cameras = sample_cameras(SIZE)
    for name, image in scene.images.items():
        assert name == f"{image.place}/{image.path.parent.name}/{image.path.name}" and image.path.is_file()
        which = "c0" if "_c0_" in name else "c1"
        torch.testing.assert_close(image.camera.parameters, cameras[which].parameters, rtol=1e-8, atol=1e-8)
        assert image.is_reference == (image.point_ids is not None) == ("/database/" in name)
        assert (image.cam_from_world is None) == (image.condition == "sunny-foliage")  # not released
    assert scene.images and not torch.equal(cameras["c0"].parameters, cameras["c1"].parameters)


def test_points_project_to_their_keypoints_through_the_distorted_cameras_only(scene):
    true, ideal = [], []
    for image in scene.images.values():
        if image.point_ids is not None:
            assert len(image.point_ids) > 100
            points = image.cam_from_world.transform(scene.points[image.point_ids])
            for camera, errors in ((image.camera, true), (without_distortion(image.camera), ideal)):
                errors.append((camera.project(points)[0] - torch.from_numpy(image.keypoints)).norm(dim=-1))
    assert torch.cat(true).max() < 0.05
    assert torch.cat(ideal).median() > 1.5 and torch.cat(ideal).max() > 5


def test_correspondences_see_the_same_point(scene, sample):
    """The lists' pixels are rays that meet, found by intersecting them with the posed partner's."""
    posed = [p for p in scene.pairs if all(scene.images[n].cam_from_world is not None for n in (p.image_a, p.image_b))]
    assert len(scene.pairs) == 2 * 2 * 3 * FRAMES and posed
    for pair in posed[::5]:
        matches = read_correspondence_file(pair.correspondences)
        assert pair.count == len(matches.weight) > 0 and pair.place in pair.image_a and pair.place in pair.image_b
        rays, centers = [], []
        for name, xy in ((pair.image_a, matches.keypoints_a), (pair.image_b, matches.keypoints_b)):
            image = scene.images[name]
            world = image.camera.unproject(torch.from_numpy(xy).double())[0] @ image.cam_from_world.rotation
            rays.append(torch.nn.functional.normalize(world, dim=-1))
            centers.append(image.cam_from_world.center())
        baseline = centers[1] - centers[0]
        off_plane = torch.linalg.cross(rays[0], rays[1]) @ baseline / baseline.norm()
        assert off_plane.abs().max() < 1e-4


def test_the_binary_model_is_read_as_pycolmap_reads_it(sample):
    import pycolmap

    folder = slice_of(sample) / "sparse"
    assert sorted(p.name for p in folder.iterdir()) == ["cameras.bin", "images.bin", "points3D.bin"]
    model, oracle = read_model(folder, BadInput()), pycolmap.Reconstruction(str(folder))
    assert len(model.points) == oracle.num_points3D() and len(model.images) == oracle.num_reg_images() == 2 * FRAMES
    ids = sorted(oracle.point3D_ids())
    np.testing.assert_allclose(model.points, [oracle.point3D(i).xyz for i in ids])
    for image in model.images:
        expected = oracle.find_image_with_name(image.name)
        np.testing.assert_allclose(image.cam_from_world.matrix()[:3], expected.cam_from_world().matrix(), atol=1e-12)
        np.testing.assert_allclose(image.camera.parameters, oracle.cameras[expected.camera_id].params)
        observed = expected.get_observation_points2D()
        np.testing.assert_allclose(image.keypoints, [p.xy for p in observed])
        assert [ids[row] for row in image.point_rows] == [p.point3D_id for p in observed]


def test_images_are_rendered_through_the_lens(sample):
    """Rays of the image are those of its pixels, and leaving out boxes beside a window changes nothing."""
    from gnnet.geometry.pose import Pose
    from gnnet.toy.streets import build_street, drive

    camera = sample_cameras(SIZE)["c0"]
    pose = drive(frames=1, reference_frames=1, rng=np.random.default_rng(0))[0]
    origin, direction = image_rays(camera, pose)
    xy = torch.tensor([[0.25, 0.25], [0.75, 0.75], [40.25, 17.25], [95.75, 71.75]], dtype=torch.float64)
    columns, rows = (2 * xy[:, 0]).long(), xy[:, 1].long()
    _, expected = pixel_rays(camera, pose, xy)
    torch.testing.assert_close(direction[:, rows, columns].double(), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(pose, Pose) and direction.shape == (3, SIZE[1], 2 * SIZE[0])
    bounds = build_street(2, 0).bounds(torch.float32)
    seen = trace(bounds, origin, direction, windows_in_image(bounds, camera, pose))
    whole = trace(bounds, origin, direction)
    assert torch.equal(seen.box, whole.box) and torch.equal(seen.depth, whole.depth)


def test_slices_are_chosen_by_number_and_group(sample, scene):
    def places(slices):
        return load_cmu(sample, slices=slices, places=1, progress=False).places

    assert places([2]) == places(2) == places(["2"]) == places("urban") == ("slice2",)
    assert places([20]) == places("park") == ("slice20",)
    assert places(["urban", 20]) == places("test") == places(None) == ("slice2", "slice20")
    only = load_cmu(sample, slices=[2], progress=False)
    assert all("slice2/" in name for name in only.images)
    assert all(pair.correspondences.name.startswith("correspondence_slice2_") for pair in only.pairs)
    assert len(scene.points) > len(only.points) > 0
    with pytest.raises(FileNotFoundError, match=r"no slice 3 in .*dataset\.slices.* slices 2, 20"):
        places([2, 3])
    with pytest.raises(FileNotFoundError, match=r"no slice of train in .* 2, 20"):
        places("train")
    for wrong in ("suburb", [2.5], [-2], [True], [[2]]):
        with pytest.raises(ValueError, match=r"dataset\.slices names .*urban, suburban, park, train, test"):
            places(wrong)
    with pytest.raises(ValueError, match=r"dataset\.slices is empty"):
        places([])
    every = set(range(2, 26))
    assert set(SLICE_GROUPS["urban"] + SLICE_GROUPS["suburban"] + SLICE_GROUPS["park"]) == every
    assert set(SLICE_GROUPS["train"]) | set(SLICE_GROUPS["test"]) == every
    assert not set(SLICE_GROUPS["train"]) & set(SLICE_GROUPS["test"])


def test_one_slice_is_cut_into_stretches(sample):
    scene = load_cmu(sample, slices=[2], places=2, progress=False)
    assert scene.places == ("slice2/0", "slice2/1")
    references = [image for image in scene.images.values() if image.is_reference]
    assert sum(image.place == "slice2/0" for image in references) == len(references) // 2
    for image in scene.images.values():
        if image.cam_from_world is not None:
            center = image.cam_from_world.center()
            nearest = min(references, key=lambda r: (r.cam_from_world.center() - center).norm())
            assert nearest.place == image.place
    # The drive without poses has its places from its partners in the pairs.
    unposed = [image for image in scene.images.values() if image.cam_from_world is None]
    assert len(unposed) == 2 * FRAMES and all(image.place for image in unposed)
    assert scene.pairs and all(scene.images[p.image_a].place == scene.images[p.image_b].place for p in scene.pairs)
    train, validation = scene.split(0.5, seed=0)
    assert train.pairs and validation.images


def test_an_unposed_image_is_in_the_place_of_its_neighbour_in_time(copy):
    poses = next((slice_of(copy) / "camera-poses").glob("*2010-12-21.txt"))
    lines = poses.read_text().splitlines()
    poses.write_text("\n".join(lines[:-1]))
    shutil.rmtree(copy / "cmu/correspondence")
    scene = load_cmu(copy, places=2, progress=False)
    # The last frame of c1 was taken 7 ms after that of c0, which is near it; the withheld drive is left out.
    name = f"slice2/query/{lines[-1].split()[0]}"
    assert scene.images[name].cam_from_world is None
    assert scene.images[name].place == scene.images[f"slice2/query/{lines[FRAMES - 1].split()[0]}"].place
    assert len(scene.images) == 2 * 3 * FRAMES
    assert "sunny-foliage" not in scene.conditions


def test_cameras_are_chosen(sample):
    scene = load_cmu(sample, cameras=["c1"], progress=False)
    assert len(scene.images) == 2 * 4 * FRAMES and all("_c1_" in name for name in scene.images)
    assert len(scene.pairs) == 2 * 3 * FRAMES
    with pytest.raises(ValueError, match=r"dataset\.cameras is \['left'\]; expected c0, c1"):
        load_cmu(sample, cameras=["left"], progress=False)


def test_the_data_set_as_it_is_unpacked_is_read_with_covisible_pairs(sample):
    scene = load_cmu(sample / "cmu" / "images", progress=False)
    assert len(scene.images) == 2 * 2 * 4 * FRAMES
    assert scene.pairs and all(pair.correspondences is None for pair in scene.pairs)
    for pair in scene.pairs:
        a, b = scene.images[pair.image_a], scene.images[pair.image_b]
        assert len(np.intersect1d(a.point_ids, b.point_ids)) >= 30 and a.place == b.place == pair.place


def test_without_a_model_references_have_the_listed_poses(copy):
    with_model = load_cmu(copy, progress=False)
    shutil.rmtree(slice_of(copy) / "sparse")
    scene = load_cmu(copy, progress=False)
    assert len(scene.points) == 0 and len(scene.pairs) == len(with_model.pairs)
    for name, image in scene.images.items():
        assert image.is_reference == ("/database/" in name) and image.point_ids is None
        if image.is_reference:
            position, rotation = pose_errors(image.cam_from_world, with_model.images[name].cam_from_world)
            assert position < 1e-6 and rotation < 1e-5


def test_intrinsics_come_from_their_file_or_else_from_the_model(copy):
    intrinsics = copy / "cmu/images/intrinsics.txt"
    text = intrinsics.read_text()
    intrinsics.unlink()
    scene = load_cmu(copy, progress=False)
    for name, image in scene.images.items():
        expected = sample_cameras(SIZE)["c0" if "_c0_" in name else "c1"]
        torch.testing.assert_close(image.camera.parameters, expected.parameters)
    intrinsics.write_text(text.replace("-0.399431", "-0.1"))
    with pytest.raises(ValueError, match=r"sparse: the camera of .* and c0 of intrinsics\.txt .* pixels apart"):
        load_cmu(copy, progress=False)
    skipping = load_cmu(copy, on_bad="skip", progress=False)
    assert len(skipping.problems) == 1
    image = next(i for n, i in skipping.images.items() if "_c0_" in n)
    assert image.camera.parameters[4] == -0.1
    intrinsics.unlink()
    shutil.rmtree(slice_of(copy) / "sparse")
    with pytest.raises(FileNotFoundError, match=r"intrinsics\.txt .*c0 OPENCV width height fx"):
        load_cmu(copy, progress=False)
    with pytest.raises(ValueError, match=r"no usable image of c0, c1 .*24 problems alike: .*first problem: neither"):
        load_cmu(copy, on_bad="skip", progress=False)


def test_conditions_follow_from_the_day_of_the_drive():
    def at(day: date, hour: int) -> int:
        return int(datetime(day.year, day.month, day.day, hour, tzinfo=UTC).timestamp() * 1e6)

    assert condition_of(1303398475046031) == "sunny-no-foliage"  # of slice 2's first database image
    assert condition_of(1283347879534213) == "sunny-foliage"
    assert condition_of(1288106907370711) == "overcast-mixed-foliage"
    assert condition_of(1292959625065025) == "low-sun-no-foliage-snow"
    assert condition_of(at(date(2010, 10, 28), 1)) == "overcast-mixed-foliage"  # as the README has it
    assert condition_of(at(date(2011, 7, 27), 23)) == "overcast-foliage"
    assert condition_of(at(date(2012, 2, 29), 12)) == "2012-02-29"


def test_missing_layouts_are_told_with_the_expected_tree(tmp_path):
    (tmp_path / "cmu/images/slice").mkdir(parents=True)
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"(?s)no folder slice<N> .*dataset\.root.*slice<N>/sparse"):
            load_cmu(root, progress=False)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def first(root: Path, pattern: str) -> Path:
    return sorted(root.glob(pattern))[0]


def break_pose(root: Path) -> str:
    path = first(slice_of(root), "camera-poses/*10-01.txt")
    edit(path, path.read_text().split()[3], "nan")
    return r"camera-poses/\S+ line 1 holds .*not finite; expected name qw qx qy qz cx cy cz"


def shorten_pose(root: Path) -> str:
    path = slice_of(root) / "ground-truth-database-images-slice2.txt"
    edit(path, path.read_text().splitlines()[2], path.read_text().splitlines()[2].rsplit(" ", 1)[0])
    return r"ground-truth-database-images-slice2.txt line 3 has 6 numbers"


def contradict_pose(root: Path) -> str:
    path = first(slice_of(root), "camera-poses/*10-01.txt")
    name, qw, *rest = path.read_text().splitlines()[0].split()
    (path.parent / "z.txt").write_text(" ".join((name, qw, *rest[:-1], "123")))
    return r"camera-poses/z.txt line 1 gives .* another pose"


def leave_the_root(root: Path) -> str:
    path = slice_of(root) / "test-images-slice2.txt"
    path.write_text(path.read_text() + "../../../../etc/passwd\n")
    return r"test-images-slice2.txt names '../../../../etc/passwd'; expected img_"


def lose_image(root: Path) -> str:
    path = first(slice_of(root) / "query", "*_c0_*.jpg")
    path.unlink()
    return rf"image {path} does not exist"


def truncate_model(root: Path) -> str:
    path = slice_of(root) / "sparse/images.bin"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return r"images\.bin \(\d+ bytes\) is damaged: it ends within .*unpack it again"


def lose_points(root: Path) -> str:
    (slice_of(root) / "sparse/points3D.bin").unlink()
    return r"points3D\.bin does not exist"


def break_pair(root: Path) -> str:
    first(root, "cmu/correspondence/*.mat").write_bytes(b"MATLAB")
    return r"correspondence_slice2_\S+\.mat \(6 bytes\) cannot be read"


def stray_pair(root: Path) -> str:
    with h5py.File(first(root, "cmu/correspondence/*.mat"), "r+") as file:
        del file["im_i_path"]
        name = "slice2/img_99999_c0_1283347879534213us.jpg"
        file["im_i_path"] = np.frombuffer(name.encode("utf-16-le"), "<u2")[:, None]
    return r"query/img_99999_c0_1283347879534213us.jpg does not exist, nor in database/.*dataset\.slices"


def garble_intrinsics(root: Path) -> str:
    edit(root / "cmu/images/intrinsics.txt", "c1 OPENCV 96", "c1 OPENCV ninety-six")
    return r"intrinsics\.txt line 3: could not convert .*expected c0 OPENCV width"


@pytest.mark.parametrize(
    "damage",
    [break_pose, shorten_pose, contradict_pose, leave_the_root, lose_image, truncate_model, lose_points, break_pair,
     stray_pair, garble_intrinsics],
)  # fmt: skip
def test_broken_input_is_named_or_left_out(copy, damage):
    message = damage(copy)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_cmu(copy, progress=False)
    scene = load_cmu(copy, on_bad="skip", progress=False)
    assert scene.problems and len(scene.images) >= 2 * 4 * FRAMES - 1
    assert sum(image.is_reference for image in scene.images.values()) >= 2 * FRAMES - 1
    with pytest.raises(ValueError, match=r"dataset\.on_bad is 'ignore'"):
        load_cmu(copy, on_bad="ignore", progress=False)


def test_the_sample_is_the_same_for_the_same_seed(sample, tmp_path):
    again = write_cmu_sample(tmp_path, slices=(20,), image_size=SIZE, frames=FRAMES)
    for path in slice_of(again, 20).rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (slice_of(sample, 20) / path.relative_to(slice_of(again, 20))).read_bytes()
    with pytest.raises(ValueError, match="expected a width of at least the height"):
        write_cmu_sample(tmp_path / "small", image_size=(72, 96))


@pytest.mark.parametrize("override", ["dataset.slices=[2]", "dataset.slices=urban", "dataset.slices=null"])
def test_the_configuration_chooses_slices(sample, tmp_path, override):
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    with initialize_config_dir(str(Path(__file__).parents[3] / "conf"), version_base="1.3"):
        overrides = ["dataset=cmu", f"dataset.root={sample}", f"dataset.index_dir={tmp_path}", override]
        config = compose("train", overrides)
    data = instantiate(config.dataset)
    data.setup()
    names = [*data.train_pairs.scene.images, *data.validations[0].scene.images]
    assert {name.split("/")[0] for name in names} == ({"slice2", "slice20"} if "null" in override else {"slice2"})


@pytest.mark.skipif(
    not (Path(os.environ.get("GNNET_DATA", "/nonexistent")) / "cmu").is_dir(),
    reason="set GNNET_DATA to the folder that holds cmu/",
)
def test_the_real_data_set():
    scene = load_cmu(Path(os.environ["GNNET_DATA"]), on_bad="skip")
    errors = []
    for image in scene.images.values():
        if image.point_ids is not None:
            xy, _ = image.camera.project(image.cam_from_world.transform(scene.points[image.point_ids]))
            errors.append((xy - torch.from_numpy(image.keypoints)).norm(dim=-1))
    assert torch.cat(errors).median() < 1.5
