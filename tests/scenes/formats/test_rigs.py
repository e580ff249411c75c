"""COLMAP's rig_config.json, against pycolmap's reader, and which images belong together."""

from __future__ import annotations

import json

import numpy as np
import pycolmap
import pytest

from gnnet.scenes.formats.rigs import images_on_rigs, read_rig_config
from gnnet.scenes.layouts.robotcar_queries import robotcar_rig

SIDE = {"image_prefix": "left/", "cam_from_rig_rotation": [0.8, 0.2, -0.4, 0.4], "cam_from_rig_translation": [1, 2, 3]}
RIG = [{"cameras": [{"image_prefix": "front/", "ref_sensor": True}, SIDE]}]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_it_is_read_as_pycolmap_does(tmp_path):
    path = write(tmp_path / "rig_config.json", RIG)
    (found,) = read_rig_config(path)
    (theirs,) = pycolmap.read_rig_config(path)
    left = next(camera for camera in theirs.cameras if camera.image_prefix == "left/")
    np.testing.assert_allclose(found["left/"].matrix()[:3], left.cam_from_rig.matrix(), atol=1e-12)
    np.testing.assert_array_equal(found["front/"].matrix(), np.eye(4))


def test_images_of_one_instant_have_the_same_name_below_the_prefix(tmp_path):
    more = [*RIG, {"cameras": [{"image_prefix": "left/b/", "ref_sensor": True}]}]
    path = write(tmp_path / "rigs.json", more)
    names = ["front/1.jpg", "left/1.jpg", "left/2.jpg", "left/b/2.jpg", "other/1.jpg"]
    found = images_on_rigs(names, path)
    assert found.keys() == set(names[:4])
    assert found["front/1.jpg"].instant == found["left/1.jpg"].instant
    assert len({found[name].instant for name in names[1:4]}) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is no file of rigs"),
        ("{}", "no camera"),
        ([{"cameras": 3}], "is no file of rigs"),
        ([{"cameras": [{"image_prefix": 3}]}], "no text"),
        ([{"cameras": [SIDE, SIDE]}], "'left/' twice"),
        ([{"cameras": [SIDE]}, {"cameras": [SIDE]}], "'left/' twice"),
        ([{"cameras": [{"image_prefix": "a/"}]}], "'a/': cam_from_rig_rotation and cam_from_rig_translation"),
        ([{"cameras": [SIDE | {"cam_from_rig_rotation": [0, 0, 0, 0]}]}], "are no pose"),
        ([{"cameras": [SIDE | {"cam_from_rig_rotation": [1, 0, 0]}]}], "expected COLMAP"),
        ([{"cameras": [SIDE | {"cam_from_rig_translation": [1, 0, "x"]}]}], "expected COLMAP"),
    ],
)
def test_another_form_is_said(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_rig_config(write(tmp_path / "rig_config.json", content))


def test_a_number_of_5000_digits_names_the_file(tmp_path):
    content = json.dumps(RIG).replace("[1, 2, 3]", f"[{'1' * 5000}, 2, 3]")
    with pytest.raises(ValueError, match=r"rigs\.json, camera 'left/'.* not finite"):
        read_rig_config(write(tmp_path / "rigs.json", content))


def test_a_file_of_other_cameras_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"names no camera of the 1 images.*'front/'.*'rear/1.jpg'"):
        images_on_rigs(["rear/1.jpg"], write(tmp_path / "rig_config.json", RIG))


def test_robotcars_cameras_relative_to_the_rear_one(tmp_path):
    (tmp_path / "extrinsics").mkdir()
    rear, left = np.eye(4), np.eye(4)
    rear[:3, 3], left[:3, 3] = (0, 0, 1), (0, 1, 0)
    left[:3, :3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    for name, car_from_cam in (("rear", rear), ("left", left)):
        np.savetxt(tmp_path / "extrinsics" / f"{name}_extrinsics.txt", car_from_cam, delimiter=",")
    found = robotcar_rig(tmp_path, ["night/rear/5.jpg", "night/left/5.jpg", "dusk/rear/5.jpg"])
    np.testing.assert_allclose(found["night/left/5.jpg"].cam_from_rig.matrix(), np.linalg.inv(left) @ rear, atol=1e-9)
    np.testing.assert_allclose(found["night/rear/5.jpg"].cam_from_rig.matrix(), np.eye(4), atol=1e-9)
    assert found["night/rear/5.jpg"].instant == found["night/left/5.jpg"].instant != found["dusk/rear/5.jpg"].instant


@pytest.mark.cases
def test_a_file_from_windows_is_read_alike(tmp_path):
    path = tmp_path / "rig_config.json"
    content = json.dumps(RIG).replace("front/", ".\\\\front\\\\").replace("left/", "left\\\\")
    path.write_bytes(b"\xef\xbb\xbf" + content.replace(", ", ",\r\n").encode())
    assert images_on_rigs(["front/1.jpg", "left/1.jpg"], path).keys() == {"front/1.jpg", "left/1.jpg"}
