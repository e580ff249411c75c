"""Result files of the benchmark: their form for each dataset, and what a check of one tells."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gnnet.evaluation.submission import format_of, main, validate_submission, write_submission
from gnnet.geometry.pose import Pose, perturb, pose_errors
from gnnet.localization.result import Localization, Status
from gnnet.scenes.formats.poses import read_pose_file
from gnnet.scenes.layouts.cmu import load_cmu
from gnnet.scenes.layouts.colmap import load_colmap
from gnnet.scenes.layouts.robotcar import load_robotcar
from gnnet.scenes.scene import Scene
from gnnet.toy.cmu_sample import write_cmu_sample

QUERIES = 3 * 2 * 4  # of the toy town: places, frames, conditions


@pytest.fixture(scope="module")
def town(toy_root) -> Scene:
    return load_robotcar(toy_root, progress=False)


@pytest.fixture(scope="module")
def cmu_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cmu")
    return write_cmu_sample(root, slices=(2, 20), image_size=(96, 72), frames=2)


def localized(name: str, pose: Pose | None = None) -> Localization:
    pose = Pose.identity(dtype=torch.float64) if pose is None else pose
    return Localization(name, Status.LOCALIZED, "", cam_from_world=pose)


def failed(name: str) -> Localization:
    return Localization(name, Status.NO_POSE, "4 inliers, 12 needed")


def estimates(scene: Scene, *, position: float = 0.1, references: bool = False) -> list[Localization]:
    """Estimates of all queries whose pose is known, some centimetres off."""
    generator = torch.Generator().manual_seed(0)
    return [
        localized(image.name, perturb(image.cam_from_world, position, 1.0, generator))
        for image in scene.images.values()
        if image.cam_from_world is not None and image.is_reference == references
    ]


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


CMU = "img_00119_c1_1303398475046031us.jpg"


def test_robotcar_has_rear_images_alone_without_their_condition(tmp_path):
    pose = perturb(Pose.identity(dtype=torch.float64), 5.0, 30.0, torch.Generator().manual_seed(0))
    names = ["night/rear/20.jpg", "dawn/rear/3.jpg", "night/left/20.jpg", "night/right/20.jpg"]
    path = tmp_path / "new" / "results.txt"
    for dataset in ("robotcar", "toy"):
        queries = [*(localized(name, pose) for name in names), failed("rain/rear/4.jpg")]
        assert write_submission(path, queries, dataset=dataset) == []
        words = [line.split() for line in path.read_text().splitlines()]
        assert [line[0] for line in words] == ["rear/20.jpg", "rear/3.jpg"]
        numbers = torch.tensor([float(word) for word in words[0][1:]], dtype=torch.float64)
        torch.testing.assert_close(numbers, torch.cat([pose.quaternion(), pose.translation]))
        assert validate_submission(path, dataset=dataset).errors == []


def test_cmu_has_the_files_names_and_others_the_scenes(tmp_path):
    name = "img_00119_c1_1303398475046031us.jpg"
    write_submission(tmp_path / "cmu.txt", [localized(f"slice2/query/{name}")], dataset="cmu")
    assert list(read_pose_file(tmp_path / "cmu.txt")) == [name]
    write_submission(tmp_path / "room.txt", [localized("seq-02/frame-000000.color.png")], dataset="sevenscenes")
    assert list(read_pose_file(tmp_path / "room.txt")) == ["seq-02/frame-000000.color.png"]


@pytest.mark.parametrize(
    ("dataset", "names", "message"),
    [
        ("toy", ["night/rear/1.jpg", "dawn/rear/1.jpg"], r"night/rear/1\.jpg and dawn/rear/1\.jpg are both rear/1"),
        ("cmu", [f"slice{n}/query/{CMU}" for n in (2, 3)], rf"slice2/query/{CMU} and slice3/query/{CMU} are both"),
        ("colmap", ["a.jpg", "a.jpg"], r"both a\.jpg in a colmap submission"),
        ("aachen", ["query/day/a/1.jpg", "query/day/b/1.jpg"], r"both 1\.jpg in a aachen submission"),
        ("achen", ["a.jpg"], r"dataset 'achen' is not known; expected one of robotcar, cmu.*, aachen, inloc, eth3d"),
    ],
)
def test_names_that_cannot_be_submitted(tmp_path, dataset, names, message):
    with pytest.raises(ValueError, match=message):
        write_submission(tmp_path / "results.txt", [localized(name) for name in names], dataset=dataset)
    assert os.listdir(tmp_path) == []


def test_two_queries_of_one_name_are_told_even_if_one_failed(tmp_path):
    with pytest.raises(ValueError, match="are both"):
        write_submission(
            tmp_path / "r.txt", [failed("night/rear/1.jpg"), localized("dawn/rear/1.jpg")], dataset="robotcar"
        )


def test_every_broken_line_is_told(tmp_path):
    path = write_lines(
        tmp_path / "results.txt",
        "rear/1.jpg 1 0 0 0 1 2 3",
        "night/rear/2.jpg 1 0 0 0 1 2 3",
        "rear/3.png 1 0 0 0 1 2 3",
        "rear/4.jpg 1 0 0 0 1 2",
        "rear/5.jpg 1 0 0 0 1 nan 3",
        "rear/1.jpg 1 0 0 0 1 2 3",
        "rear/7.jpg 1 0.1 0 0 1 2 3",
        "rear/8.jpg 1.0009 0 0 0 1 2 3",
        "left/9.jpg 1 0 0 0 1 2 3",
    )
    found = validate_submission(path, dataset="robotcar")
    assert found.lines == 9 and found.warnings == [] and found.facts == ["9 lines"]
    told = sorted((error.split(" line ")[1].split()[0].rstrip(":"), error) for error in found.errors)
    assert [number for number, _ in told] == ["2", "3", "4", "5", "6", "7", "9"]
    parts = ("without the condition", "/3.png", "7 words", "not finite", "again, after line 1", "length 1.00", "left/9")
    for (_, error), part in zip(told, parts, strict=True):
        assert part in error and str(path) in error and "expected" in error
    cmu = write_lines(tmp_path / "cmu.txt", "slice2/query/img_00119_c1_1303398475046031us.jpg 1 0 0 0 1 2 3")
    [error] = validate_submission(cmu, dataset="cmu").errors
    assert "expected img_<5 digits>_c{0,1}_<microseconds>us.jpg, without folders" in error
    [error] = validate_submission(write_lines(tmp_path / "empty.txt"), dataset="colmap").errors
    assert "holds no pose" in error


@pytest.mark.parametrize("dataset", ["robotcar", "toy"])
def test_a_good_submission(town, toy_root, tmp_path, dataset):
    before = sorted(path.stat().st_mtime_ns for path in toy_root.rglob("*"))
    queries, path = estimates(town), tmp_path / "results.txt"
    write_submission(path, queries, dataset=dataset)
    found = validate_submission(path, dataset=dataset, root=toy_root)
    assert found.errors == found.warnings == [] and found.lines == QUERIES
    assert f"{QUERIES} of {QUERIES} queries of robotcar have a line" in found.facts
    assert "from the nearest reference (median)" in found.facts[-1]
    write_submission(path, queries[3:], dataset=dataset)
    found = validate_submission(path, dataset=dataset, root=toy_root)
    assert found.errors == [] and found.warnings == [f"3 of {QUERIES} queries have no line; each counts as failed"]
    assert before == sorted(path.stat().st_mtime_ns for path in toy_root.rglob("*"))  # the town is not rendered anew


def test_names_that_are_no_queries_of_the_dataset(town, toy_root, tmp_path):
    reference = next(image.name for image in town.images.values() if image.is_reference)
    path = tmp_path / "results.txt"
    write_submission(path, [*estimates(town), localized(reference), localized("night/rear/7.jpg")], dataset="robotcar")
    errors = sorted(validate_submission(path, dataset="robotcar", root=toy_root).errors)
    assert len(errors) == 2
    assert any("names rear/7.jpg, which is no query of robotcar" in error for error in errors)
    assert any(f"rear/{Path(reference).name}, which is a reference of robotcar" in error for error in errors)


def misread(pose: Pose, kind: str) -> torch.Tensor:
    """The seven numbers as others write them."""
    if kind == "centre":
        return torch.cat([pose.quaternion(), pose.center()])
    if kind == "inverted":
        return torch.cat([pose.inverse().quaternion(), pose.inverse().translation])
    if kind == "xyzw":
        return torch.cat([pose.quaternion()[[1, 2, 3, 0]], pose.translation])
    return torch.cat([pose.quaternion(), pose.translation])


def write_misread(path: Path, localizations: list[Localization], kind: str, *, dataset: str) -> Path:
    rows = {found.name: misread(found.cam_from_world, kind).tolist() for found in localizations}
    lines = {format_of(dataset).submitted_name(name): " ".join(map(repr, row)) for name, row in rows.items()}
    return write_lines(path, *(f"{name} {numbers}" for name, numbers in lines.items()))


TOLD = {
    "right": None,
    "centre": "these look like camera centres, not translations",
    "inverted": "these look like inverted poses, world_from_cam",
    "xyzw": "these look like quaternions x y z w",
}


@pytest.mark.parametrize("kind", TOLD)
@pytest.mark.parametrize("outliers", [0.0, 0.4])
@pytest.mark.slow
def test_other_readings_of_the_numbers_are_told(town, cmu_root, toy_root, tmp_path, kind, outliers):
    """Also where many queries were localized somewhere far away."""
    generator = torch.Generator().manual_seed(1)
    for dataset, scene, root in (("robotcar", town, toy_root), ("cmu", load_cmu(cmu_root, progress=False), cmu_root)):
        queries = estimates(scene)
        for i in torch.randperm(len(queries), generator=generator)[: int(outliers * len(queries))].tolist():
            lost = perturb(queries[i].cam_from_world, 5000.0, 90.0, generator)
            queries[i] = localized(queries[i].name, lost)
        path = write_misread(tmp_path / "results.txt", queries, kind, dataset=dataset)
        errors = validate_submission(path, dataset=dataset, root=root).errors
        if TOLD[kind] is None:
            assert errors == []
        else:
            assert len(errors) == 1 and TOLD[kind] in errors[0], errors


def test_poses_in_another_world_are_warned_of(town, toy_root, tmp_path):
    moved = [
        localized(found.name, Pose(pose.rotation, pose.translation + torch.tensor([0.0, 1e5, 0.0])))
        for found in estimates(town)
        for pose in [found.cam_from_world]
    ]
    write_submission(tmp_path / "results.txt", moved, dataset="toy")
    found = validate_submission(tmp_path / "results.txt", dataset="toy", root=toy_root)
    assert found.errors == [] and "100% of the camera centres lie far from all references" in found.warnings[0]


def test_few_queries_tell_nothing_of_the_reading(town, toy_root, tmp_path):
    path = tmp_path / "results.txt"
    write_submission(path, estimates(town)[:4], dataset="toy")
    found = validate_submission(path, dataset="toy", root=toy_root)
    assert found.errors == [] and "not compared with references: that needs 5 queries" in found.facts[-1]


@pytest.mark.slow
def test_cmu_counts_the_queries_of_withheld_pose(cmu_root, tmp_path):
    write_submission(tmp_path / "r.txt", estimates(load_cmu(cmu_root, progress=False)), dataset="cmu")
    found = validate_submission(tmp_path / "r.txt", dataset="cmu", root=cmu_root)
    # Two slices, two frames of two cameras on three days, of which one is withheld.
    assert found.errors == [] and found.lines == 16
    assert found.warnings == ["8 of 24 queries have no line; each counts as failed"]


def test_where_every_image_is_of_the_map_every_image_may_be_a_query(toy_root, tmp_path):
    model = sorted((toy_root / "robotcar/3D-models/individual/colmap_reconstructions").iterdir())[0]
    shutil.copytree(model, tmp_path / "sparse")
    (tmp_path / "images").symlink_to(toy_root / "robotcar/images")
    path = tmp_path / "sparse/images.txt"
    path.write_text(path.read_text().replace(".png", ".jpg"))
    scene = load_colmap(tmp_path, progress=False)
    write_submission(tmp_path / "r.txt", estimates(scene, references=True), dataset="colmap")
    found = validate_submission(tmp_path / "r.txt", dataset="colmap", root=tmp_path)
    assert found.errors == found.warnings == [] and found.lines == 3


def test_the_command(town, toy_root, tmp_path, capsys):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    write_submission(good, estimates(town), dataset="robotcar")
    write_misread(bad, estimates(town), "centre", dataset="robotcar")
    assert main([str(good), "robotcar", str(toy_root), "--quiet"]) == 0
    text = capsys.readouterr().out
    assert f"{QUERIES} lines\n" in text and text.endswith(f"{good}: errors: none, warnings: none\n")
    assert main([str(good), "robotcar"]) == 0
    assert "not compared with the dataset: give its folder as ROOT" in capsys.readouterr().out
    assert main([str(bad), "robotcar", str(toy_root), "--quiet"]) == 1
    text = capsys.readouterr().out
    assert "error: " in text and "camera centres, not translations" in text
    assert text.endswith(f"{bad}: errors: 1, warnings: none\n")
    write_lines(bad, *(f"x{i} 1 0 0 0 0 0 0" for i in range(50)))
    assert main([str(bad), "robotcar"]) == 1
    assert capsys.readouterr().out.count("\nerror: ") == 21
    assert main([str(good), "robotcar", str(tmp_path / "nowhere")]) == 1
    assert "cannot be read: RobotCar Seasons: no folder at" in capsys.readouterr().out
    assert main([str(tmp_path / "none.txt"), "robotcar"]) == 1
    assert "none.txt does not exist; expected name qw qx" in capsys.readouterr().out
    for argv in ([str(good), "achen"], [str(good)]):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2


@pytest.mark.slow
def test_the_command_as_a_process(tmp_path):
    path = write_lines(tmp_path / "r.txt", "rear/1.jpg 1 0 0 0 1 2 3")
    command = [sys.executable, "-m", "gnnet.evaluation.submission", str(path), "toy"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("errors: none, warnings: none\n")


@pytest.mark.skipif("GNNET_DATA" not in os.environ, reason="set GNNET_DATA to the folder that holds 7scenes/")
@pytest.mark.parametrize("kind", TOLD)
@pytest.mark.parametrize(("dataset", "folder"), [("sevenscenes", "7scenes"), ("rgbd", "hololens")])
def test_other_readings_on_real_data(tmp_path, dataset, folder, kind):
    root = Path(os.environ["GNNET_DATA"]) / folder
    scene = format_of(dataset).open(root, progress=False)
    references = all(image.is_reference for image in scene.images.values())
    queries = estimates(scene, position=0.05, references=references)
    path = write_misread(tmp_path / "r.txt", queries, kind, dataset=dataset)
    errors = validate_submission(path, dataset=dataset, root=root).errors
    assert errors == [] if TOLD[kind] is None else (len(errors) == 1 and TOLD[kind] in errors[0])


def test_written_poses_are_the_estimates(town, tmp_path):
    queries = estimates(town)
    write_submission(tmp_path / "r.txt", queries, dataset="toy")
    found = read_pose_file(tmp_path / "r.txt")
    for query in queries:
        position, angle = pose_errors(found[query.name.split("/", 1)[1]], query.cam_from_world)
        assert position < 1e-9 and angle < 1e-6


AACHEN = ["query/day/milestone/2010-10-30_17-47-25_73.jpg", "query/night/nexus5x/IMG_20161227_160713.jpg"]
INLOC = ["query/iphone7/IMG_0731.JPG", "query/iphone7/IMG_0732.JPG"]
ETH3D = ["rgb/1542.25.png", "rgb/999.5.png"]
ROOM = ["seq-03/frame-000010.color.png", "seq-03/frame-000011.color.jpg"]


@pytest.mark.cases
@pytest.mark.parametrize(
    ("dataset", "names", "written"),
    [
        *((dataset, names, [name.rpartition("/")[2] for name in names])
          for names, dataset in ((AACHEN, "aachen"), (AACHEN, "colmap"), (INLOC, "inloc"), (INLOC, "colmap"))),
        ("aachen", ["images/images_upright/" + name for name in AACHEN], [n.rpartition("/")[2] for n in AACHEN]),
        ("sevenscenes", ROOM, ["seq-03/frame-000010.color.png", "seq-03/frame-000011.color.png"]),
        ("eth3d", ETH3D, ["999.5", "1542.25"]),
        ("colmap", ETH3D, ["999.5", "1542.25"]),
        ("colmap", [AACHEN[0], "a/b.jpg"], ["a/b.jpg", AACHEN[0]]),  # as the scene does
        ("rgbd", AACHEN, AACHEN),
    ],
)  # fmt: skip
def test_each_benchmark_has_its_own_names(tmp_path, dataset, names, written):
    path = tmp_path / "results.txt"
    assert write_submission(path, [localized(name) for name in names], dataset=dataset) == []
    assert [line.split()[0] for line in path.read_text().splitlines()] == written
    assert validate_submission(path, dataset=format_of(dataset, names).dataset).errors == []


@pytest.mark.cases
def test_a_name_that_a_benchmark_does_not_know_is_left_out_and_told(tmp_path):
    known = {"robotcar": "night/rear/1.jpg", "toy": "night/rear/1.jpg", "cmu": f"slice2/query/{CMU}", "eth3d": ETH3D[0]}
    for dataset, name in known.items():
        path, own = tmp_path / f"{dataset}.txt", [localized("in/my_photo.jpg"), localized(name), failed("x.jpg")]
        assert write_submission(path, own, dataset=dataset) == ["in/my_photo.jpg", "x.jpg"]
        assert len(path.read_text().splitlines()) == 1


@pytest.mark.cases
def test_a_name_with_a_space_is_left_out_and_in_a_file_an_error(tmp_path):
    """hloc and visuallocalization.net split a line at its spaces."""
    path = tmp_path / "results.txt"
    both = [localized("a 1.jpg"), localized("b.jpg")]
    assert write_submission(path, both, dataset="colmap") == ["a 1.jpg"]
    assert validate_submission(path, dataset="colmap").errors == []
    for dataset in ("colmap", "aachen"):
        write_lines(path, "a 1.jpg 1 0 0 0 1 2 3", "b.jpg 1 0 0 0 1 2 3")
        [error] = validate_submission(path, dataset=dataset).errors
        assert "line 1 names 'a 1.jpg', and a line is split at its spaces" in error


@pytest.mark.cases
def test_eth3d_wants_a_trajectory_from_camera_to_world(tmp_path):
    poses = [perturb(Pose.identity(dtype=torch.float64), 5.0, 60.0, torch.Generator().manual_seed(i)) for i in (0, 1)]
    path = tmp_path / "cables_1.txt"
    write_submission(path, [localized(name, pose) for name, pose in zip(ETH3D, poses, strict=True)], dataset="eth3d")
    for line, pose in zip(path.read_text().splitlines(), poses[::-1], strict=True):
        numbers = torch.tensor([float(word) for word in line.split()[1:]], dtype=torch.float64)
        torch.testing.assert_close(numbers[:3], pose.center())
        world_from_cam = Pose.from_quaternion(numbers[[6, 3, 4, 5]], numbers[:3])
        torch.testing.assert_close(world_from_cam.matrix(), pose.inverse().matrix())
    (tmp_path / "rgb.txt").write_text("# timestamp file\n999.5 rgb/999.5.png\n1000.5 rgb/1000.5.png\n")
    found = validate_submission(path, dataset="eth3d", root=tmp_path)
    assert [error.partition("line ")[2] for error in found.errors] == [
        "2 names 1542.25, which is no query of eth3d; expected queries alone"
    ]
    assert found.warnings == ["1 of 2 queries have no line; each counts as failed"]
    wrong = write_lines(
        tmp_path / "wrong.txt", "2 0 0 0 0 0 0 1", "1 0 0 0 0 0 0 1", "rgb/3.png 0 0 0 0 0 0 1", "4 0 0 0 0 0 0 2",
        "5 0 0 0 0 0 1", "6 0 0 0 0 0 0 0",
    )  # fmt: skip
    errors = validate_submission(wrong, dataset="eth3d").errors
    parts = ("line 2 is not later", "line 3", "7 numbers", "quaternion 0 0 0 0", "order is tx ty tz qx qy qz qw")
    assert len(errors) == 5 and all(any(part in error for error in errors) for part in parts)


@pytest.mark.cases
def test_a_submission_is_compared_with_a_query_list(tmp_path, capsys):
    lists = tmp_path / "queries"
    lists.mkdir()
    for name in AACHEN:
        part = name.split("/")[1]
        write_lines(lists / f"{part}_time_queries_with_intrinsics.txt", f"{name} PINHOLE 1600 1200 1000 1000 800 600")
    names = [AACHEN[0].rpartition("/")[2], "other.jpg", AACHEN[1]]
    path = write_lines(tmp_path / "results.txt", *(f"{name} 1 0 0 0 1 2 3" for name in names))
    for root in (tmp_path, lists):
        errors = validate_submission(path, dataset="aachen", root=root).errors
        assert len(errors) == 3 and any("other.jpg, which is no query of aachen" in error for error in errors)
        assert any(f"names '{AACHEN[1]}'; expected the file's name without folders" in error for error in errors)
    night = lists / "night_time_queries_with_intrinsics.txt"
    good = write_lines(tmp_path / "good.txt", f"{AACHEN[1].rpartition('/')[2]} 1 0 0 0 1 2 3")
    assert main([str(good), "aachen", str(night), "--quiet"]) == 0
    assert "1 of 1 queries of aachen have a line" in capsys.readouterr().out
    inloc = tmp_path / "inloc"
    (inloc / "query" / "iphone7").mkdir(parents=True)
    for name in INLOC:
        (inloc / name).touch()
    path = write_lines(tmp_path / "i.txt", "IMG_0731.JPG 1 0 0 0 1 2 3")
    found = validate_submission(path, dataset="inloc", root=inloc)
    assert found.errors == [] and "1 of 2 queries of inloc have a line" in found.facts
    [error] = validate_submission(path, dataset="inloc", root=inloc / "query").errors
    assert "holds no query; expected lists" in error
