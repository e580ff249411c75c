"""Files that hloc and the benchmark exchange: reading, writing, and errors for broken ones."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.scenes.formats.poses import (
    read_pairs_file,
    read_pose_file,
    read_pose_lines,
    read_query_list,
    read_query_names,
    write_pose_file,
)
from gnnet.scenes.problems import BadInput


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "file.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def random_poses(count: int, seed: int = 0) -> dict[str, Pose]:
    rotation = Rotation.random(count, random_state=seed)
    translation = np.random.default_rng(seed).normal(scale=1e5, size=(count, 3))
    poses = Pose(torch.from_numpy(rotation.as_matrix()), torch.from_numpy(translation))
    return {f"night/rear/{i}.jpg": poses[i] for i in range(count)}


def test_poses_are_as_scipy_reads_them(tmp_path):
    path = written(tmp_path, "# by some tool\n\nb.jpg 2 0 0 2 1 2 3\r\n a.jpg\t0.1 -0.2 0.3 0.4 -1e3 0 5e-1  \n")
    poses = read_pose_file(path)
    assert list(poses) == ["b.jpg", "a.jpg"] and poses["a.jpg"].shape == () and poses["a.jpg"].dtype == torch.float64
    for name, wxyz in (("b.jpg", (2, 0, 0, 2)), ("a.jpg", (0.1, -0.2, 0.3, 0.4))):
        expected = Rotation.from_quat(wxyz, scalar_first=True).as_matrix()
        np.testing.assert_allclose(poses[name].rotation, expected, atol=1e-15)
    assert poses["a.jpg"].translation.tolist() == [-1000, 0, 0.5]


@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1e200])
def test_quaternions_of_any_length_are_normalised(tmp_path, scale):
    pose = read_pose_file(written(tmp_path, f"a 0 {scale} 0 0 0 0 0\n"))["a"]
    np.testing.assert_allclose(pose.rotation, np.diag([1.0, -1, -1]))


def test_written_poses_are_read_with_every_digit(tmp_path):
    poses, path = random_poses(50), tmp_path / "new" / "folder" / "poses.txt"
    write_pose_file(path, poses)
    found = read_pose_file(path)
    assert list(found) == sorted(poses)
    for name, pose in poses.items():
        assert torch.equal(found[name].translation, pose.translation)
        assert (found[name].rotation - pose.rotation).abs().max() < 1e-15
    first = path.read_text()
    write_pose_file(path, dict(reversed(poses.items())))
    assert path.read_text() == first and [p.name for p in path.parent.iterdir()] == ["poses.txt"]
    write_pose_file(path, {})
    assert path.read_text() == "" and read_pose_file(path) == {}


def test_single_precision_is_written_as_it_is(tmp_path):
    pose = next(iter(random_poses(1).values())).to(torch.float32)
    write_pose_file(tmp_path / "a.txt", {"a": pose})
    found = read_pose_file(tmp_path / "a.txt")["a"]
    assert torch.equal(found.translation.float(), pose.translation)
    assert torch.allclose(found.rotation.float(), pose.rotation)


def test_what_cannot_be_written_leaves_the_file_as_it_was(tmp_path):
    path, good = tmp_path / "poses.txt", Pose.identity(dtype=torch.float64)
    write_pose_file(path, {"a": good})
    nan = Pose(good.rotation, torch.tensor([0, torch.nan, 0], dtype=torch.float64))
    broken = {
        "night 1": (good, "'night 1' cannot stand.*ends with no number"),
        "": (good, "not empty"),
        "batched": (Pose.identity(2), r"batched has the batch shape \(2,\)"),
        "nan": (nan, "pose of nan"),
        "scaled": (Pose(2 * good.rotation, good.translation), "pose of scaled"),
        "mirrored": (Pose(-good.rotation, good.translation), "pose of mirrored"),
        "empty": (Pose(torch.nan * good.rotation, good.translation), "leave out a query that failed"),
    }
    for name, (pose, message) in broken.items():
        with pytest.raises(ValueError, match=message):
            write_pose_file(path, {"b": good, name: pose})
    assert list(read_pose_file(path)) == ["a"] and os.listdir(tmp_path) == ["poses.txt"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a 1 0 0 0 0 0", "line 3 has 7 words"),
        ("a 1 0 0 0 0 0 0 0.5", "line 3 has 9 words .*expected name qw"),
        ("a 1 0 0 0 0 nan 0", "line 3 .*not finite"),
        ("a inf 0 0 0 0 0 0", "line 3 .*not finite"),
        ("a 1 0 0 zero 0 0 0", "line 3: could not convert"),
        ("a 0 0 0 0 1 2 3", "line 3 has the quaternion 0 0 0 0"),
        ("a 1 0 0 0 1 2 1e300", "line 3 has the translation 1 2 1e300; expected metres"),
        ("good 1 0 0 0 0 0 0", "line 3 names good again, after line 1"),
    ],
)
def test_broken_poses_are_named_by_line(tmp_path, line, message):
    path = written(tmp_path, f"good 1 0 0 0 0 0 0\n\n{line}\nlast 1 0 0 0 0 0 0\n")
    with pytest.raises(ValueError, match=message) as raised:
        read_pose_file(path)
    assert str(path) in str(raised.value) and "expected" in str(raised.value)
    bad = BadInput("skip")
    assert [(line.number, line.name) for line in read_pose_lines(path, bad)] == [(1, "good"), (4, "last")]
    assert len(bad.problems) == 1


def test_pairs_keep_their_order(tmp_path):
    path = written(tmp_path, "q2 r9\nq1 r1\nq2 r1\n\nq2 r9\nq1 r0\n")
    assert read_pairs_file(path) == {"q2": ("r9", "r1"), "q1": ("r1", "r0")}
    assert list(read_pairs_file(path)) == ["q2", "q1"]
    for line in ("q", "q r 0.5", "a.jpg b.jpg c.jpg", "a, b, c", "a, , 0.5", ","):
        with pytest.raises(ValueError, match=r"file\.txt line 2 has . words .*expected query reference"):
            read_pairs_file(written(tmp_path, f"q r\n{line}\n"))
        assert read_pairs_file(written(tmp_path, f"q r\n{line}\n"), on_bad="skip") == {"q": ("r",)}
    with pytest.raises(ValueError, match="line 1 has 1 words"):
        read_pairs_file(written(tmp_path, "q\nr\n"), on_bad="skip")


@pytest.mark.cases
def test_pairs_as_kapture_writes_them_and_with_spaces(tmp_path):
    content = "# query_image, map_image, score\nq 1.jpg, db/r 1.jpg, 0.5\nq 1.jpg, db/r 2.jpg, 5e-1\na, b\nc,d,1\n"
    found = read_pairs_file(written(tmp_path, content))
    assert found == {"q 1.jpg": ("db/r 1.jpg", "db/r 2.jpg"), "a": ("b",), "c": ("d",)}
    assert read_pairs_file(written(tmp_path, "q (1).jpg  db/r, 1.png\na,b.jpg c.jpg\n")) == {
        "q (1).jpg": ("db/r, 1.png",), "a,b.jpg": ("c.jpg",),
    }  # fmt: skip


@pytest.mark.cases
def test_names_with_spaces_are_read_and_written(tmp_path):
    poses = {f"Survey A/DJI  {i:04d} map (40{i}).jpg": pose for i, pose in enumerate(random_poses(3).values())}
    write_pose_file(tmp_path / "poses.txt", poses)
    found = read_pose_file(tmp_path / "poses.txt")
    assert list(found) == list(poses)
    assert all(torch.equal(found[name].translation, pose.translation) for name, pose in poses.items())
    cameras = read_query_list(written(tmp_path, " my  PINHOLE (1) 2.jpg\tSIMPLE_RADIAL 640 480 500 320 240 0\r\n"))
    assert list(cameras) == ["my  PINHOLE (1) 2.jpg"]
    assert cameras["my  PINHOLE (1) 2.jpg"].size.tolist() == [640, 480]


@pytest.mark.cases
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_files_from_windows_count_like_others(tmp_path, encoding, end):
    def lines(*content: str) -> Path:
        return written(tmp_path, end.join([*content, ""]).encode(encoding))

    assert list(read_pose_file(lines("é.jpg 1.0e-000 0 0 1 0 0 1.5e+001", "b.jpg 1 0 0 0 0 0 0"))) == ["é.jpg", "b.jpg"]
    assert read_pairs_file(lines("é.jpg b.jpg", "b.jpg é.jpg")) == {"é.jpg": ("b.jpg",), "b.jpg": ("é.jpg",)}
    assert list(read_query_list(lines("é.jpg PINHOLE 64 48 50 50 32 24"))) == ["é.jpg"]


@pytest.mark.cases
def test_one_bad_line_does_not_end_the_rest(tmp_path, caplog):
    lines = "a.jpg 1 0 0 0 0 0 0\nb.jpg 1 0 0 0 0 0 nan\nc.jpg 0 0 0 0 1 1 1\nd.jpg 0 0 0 0 1 1 1\n"
    assert list(read_pose_file(written(tmp_path, lines), on_bad="skip")) == ["a.jpg"]
    assert re.search(r"3 lines are left out, among them: .* line 3 .*0 0 0 0", caplog.text)


@pytest.mark.cases
def test_several_lists_are_read_as_one_by_hlocs_pattern(tmp_path):
    for name, query in (("day_queries.txt", "a.jpg"), ("night_queries.txt", "b.jpg")):
        (tmp_path / name).write_text(f"{query} PINHOLE 64 48 50 50 32 24\n")
    assert list(read_query_list(tmp_path / "*_queries.txt")) == ["a.jpg", "b.jpg"]
    with pytest.raises(FileNotFoundError, match=r"\*_lists.txt does not exist"):
        read_query_list(tmp_path / "*_lists.txt")


@pytest.mark.cases
def test_names_of_a_query_list_are_paths(tmp_path):
    path = written(tmp_path, "./a.jpg PINHOLE 64 48 50 50 32 24\nnight\\rear//b c.jpg PINHOLE 64 48 50 50 32 24\n")
    assert list(read_query_list(path)) == list(read_query_names(path)) == ["a.jpg", "night/rear/b c.jpg"]


def test_query_lists_give_the_cameras_of_pycolmap(tmp_path):
    import pycolmap

    parameters = {
        "SIMPLE_PINHOLE": [500, 320, 240],
        "PINHOLE": [500, 510, 320, 240],
        "SIMPLE_RADIAL": [500, 320, 240, -0.1],
        "RADIAL": [500, 320, 240, -0.1, 0.02],
        "OPENCV": [500, 510, 320, 240, -0.1, 0.02, 1e-3, -2e-3],
        "OPENCV_FISHEYE": [500, 510, 320, 240, -0.1, 0.02, 1e-3, -2e-3],
        "DIVISION": [500, 510, 320, 240, -0.1],
    }
    lines = [f"{model}.jpg {model} 640 480 {' '.join(map(str, values))}" for model, values in parameters.items()]
    cameras = read_query_list(written(tmp_path, "\n".join(lines)))
    points = np.random.default_rng(0).uniform((-0.5, -0.4, 1), (0.5, 0.4, 1), (20, 3))
    assert list(cameras) == [f"{model}.jpg" for model in parameters]
    for model, values in parameters.items():
        camera = cameras[f"{model}.jpg"]
        assert camera.shape == () and camera.parameters.dtype == torch.float64 and camera.size.tolist() == [640, 480]
        expected = pycolmap.Camera(model=model, width=640, height=480, params=values).img_from_cam(points)
        np.testing.assert_allclose(camera.project(torch.from_numpy(points))[0], expected, atol=1e-9)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("b.jpg PINHOLE 640 480", "line 2 has 4 words"),
        ("b.jpg KANNALA 640 480 1 1 1 1 1 1 1 1 1 1 1 1", "line 2: camera model KANNALA is not supported"),
        ("b.jpg PINHOLE 640 480 500 320 240", "line 2: camera model PINHOLE has 4 parameters, found 3"),
        ("b.jpg PINHOLE 640.5 480 500 500 320 240", "line 2 has an image of 640.5 by 480"),
        ("b.jpg PINHOLE 0 480 500 500 320 240", "line 2 has an image of 0 by 480"),
        ("b.jpg PINHOLE 1e300 480 500 500 320 240", "line 2 has an image of 1e300 by 480"),
        ("b.jpg PINHOLE 640 480 500 0 320 240", "line 2 has focal lengths"),
        ("b.jpg PINHOLE 640 480 500 nan 320 240", "line 2 .*not finite"),
        ("b.jpg 640 480 500 500 320 240", "line 2"),
    ],
)
def test_broken_query_lists_are_named_by_line(tmp_path, line, message):
    found = read_query_list(written(tmp_path, f"a.jpg PINHOLE 640 480 500 500 320 240\n{line}\n"))
    assert list(found) == ["a.jpg", "b.jpg"] and isinstance(found["a.jpg"], Camera)
    assert isinstance(found["b.jpg"], ValueError) and re.search(message, str(found["b.jpg"]))
    with pytest.raises(ValueError, match=message.replace("2", "1", 1)):
        read_query_list(written(tmp_path, f"{line}\n"))


def test_a_query_list_without_a_query_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"file\.txt holds no query; expected name MODEL"):
        read_query_list(written(tmp_path, "# none\n\n"))
    same = "a.jpg PINHOLE 64 48 50 50 32 24\n"
    assert list(read_query_list(written(tmp_path, 2 * same))) == ["a.jpg"]
    again = read_query_list(written(tmp_path, f"{same}b.jpg PINHOLE 64 48 50 50 32 24\n{same.replace('50', '60')}"))
    assert "line 3 names a.jpg again, with another camera" in str(again["a.jpg"])


@pytest.mark.parametrize("read", [read_pose_file, read_pairs_file, read_query_list])
def test_missing_and_binary_files(tmp_path, read):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist; expected"):
            read(path)
    with pytest.raises(ValueError, match="cannot be read as text"):
        read(written(tmp_path, b"\xff\xfe\x00"))


_WORDS = st.lists(
    st.sampled_from(["a", "1", "0", "-1", "nan", "1e308", "-inf", "#", "PINHOLE", "OPENCV", "4", "\x00", "é", "1_0"]),
    max_size=13,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=200), st.lists(_WORDS, max_size=4)))
def test_any_content_gives_poses_or_a_clear_error(tmp_path, content):
    path = written(tmp_path, content if isinstance(content, bytes) else "\n".join(" ".join(c) for c in content))
    for read in (read_pose_file, read_pairs_file, read_query_list):
        try:
            found = read(path)
        except ValueError as error:
            assert str(path) in str(error)
            continue
        for value in found.values():
            for numbers in vars(value).values() if isinstance(value, Pose | Camera) else ():
                assert numbers.isfinite().all()
