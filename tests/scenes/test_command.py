"""`python -m gnnet.scenes`, in this process."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from gnnet.scenes.__main__ import main
from gnnet.scenes.formats.correspondences import read_correspondence_file
from gnnet.scenes.layouts.registry import DATASETS
from gnnet.scenes.layouts.robotcar import load_robotcar
from gnnet.toy.layout import write_correspondences


@pytest.fixture
def copy(toy_root: Path, tmp_path: Path) -> Path:
    """The toy town, to be damaged."""
    return Path(shutil.copytree(toy_root, tmp_path / "town", copy_function=os.link))


def replace_bytes(path: Path, content: bytes) -> None:
    path.unlink()  # it is a hard link
    path.write_bytes(content)


def last_line(capsys) -> str:
    return capsys.readouterr().out.strip().splitlines()[-1]


def usage_error(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.slow
def test_a_whole_dataset(toy_root, tmp_path, capsys):
    out, path = tmp_path / "figures", tmp_path / "inspection.json"
    argv = ["robotcar", str(toy_root), "--quiet", "--set", "conditions=[night, rain]", "--set", "cameras=[rear]"]
    assert main([*argv, "--json", str(path), "--figures", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.strip().splitlines()[-1].startswith("can be trained on: yes, because")
    assert "problems: none (24 pairs and 21 images read)" in text
    assert "localization can be validated: yes, because 12 queries" in text
    for figure in out.iterdir():
        assert f"figure: {figure}" in text.replace("\n", "")
    content = json.loads(path.read_text())
    assert content["settings"] == {"conditions": ["night", "rain"], "cameras": ["rear"]}
    assert {i["condition"]: (i["images"], i["references"]) for i in content["images"]} == {
        "overcast-reference": (9, 9), "night": (6, 0), "rain": (6, 0),
    }  # fmt: skip
    pairs = [p["conditions"] for p in content["pairs"]]
    assert pairs == [["night", "overcast-reference"], ["overcast-reference", "rain"]]
    assert content["agreement"][0]["pairs"] == 24 and content["agreement"][0]["median_px"] < 0.01
    assert sum(content["overlap"]["counts"]) == content["pairs_read"] == 24
    assert content["problems"] == [] and content["split"]["yes"]


@pytest.mark.slow
def test_samples_unless_all_is_asked_for(toy_root, tmp_path, capsys):
    path = tmp_path / "inspection.json"
    for argv, pairs, images in ((["--pairs", "5", "--images", "3"], 5, 3), (["--pairs", "5", "--all"], 48, 33)):
        assert main(["robotcar", str(toy_root), "--quiet", "--json", str(path), *argv]) == 0
        content = json.loads(path.read_text())
        assert (content["pairs_read"], content["images_read"]) == (pairs, images)
    capsys.readouterr()


@pytest.mark.slow
def test_broken_files_are_left_out_and_named(copy, capsys):
    images = sorted((copy / "robotcar/images/snow/rear").iterdir())
    files = sorted((copy / "robotcar/correspondence").glob("*_rain_*.mat"))
    replace_bytes(images[0], images[0].read_bytes()[:500])
    replace_bytes(files[0], b"no correspondences")
    assert main(["robotcar", str(copy), "--quiet"]) == 0
    text = capsys.readouterr().out
    assert str(images[0]) in text and str(files[0]) in text
    assert text.strip().splitlines()[-1].endswith("is left out with dataset.on_bad=skip")


@pytest.mark.slow
def test_correspondences_of_other_images_cannot_be_trained_on(copy, capsys):
    rng = np.random.default_rng(0)
    for pair in load_robotcar(copy, progress=False).pairs:
        matches = read_correspondence_file(pair.correspondences)
        pair.correspondences.unlink()
        shuffled = rng.permutation(matches.keypoints_b)
        write_correspondences(
            pair.correspondences, pair.image_a, pair.image_b, matches.keypoints_a, shuffled, matches.weight
        )
    assert main(["robotcar", str(copy), "--quiet"]) == 1
    assert "correspondences and poses contradict each other" in last_line(capsys)


def test_nothing_to_train_on(copy, tmp_path, capsys):
    assert main(["robotcar", str(tmp_path / "nowhere"), "--quiet"]) == 1
    text = capsys.readouterr().out
    assert "dataset.root" in text and text.strip().splitlines()[-1].startswith("can be trained on: no, because")
    for path in (copy / "robotcar/correspondence").glob("*.mat"):
        replace_bytes(path, b"")
    assert main(["robotcar", str(copy), "--quiet"]) == 1
    assert last_line(capsys).startswith("can be trained on: no, because")


def test_wrong_usage_is_said_before_anything_is_read(capsys):
    message = usage_error(capsys, "robotkar", "/data")
    assert "robotkar" in message and all(name in message for name in DATASETS)
    message = usage_error(capsys, "robotcar", "/nowhere", "--set", "slices=[2]")
    assert "robotcar has no argument slices; it has conditions=None, cameras=('rear',)" in message
    assert "on_bad" not in message.partition("it has")[2]
    assert "KEY=VALUE" in usage_error(capsys, "robotcar", "/nowhere", "--set", "cameras")
    assert "no YAML value" in usage_error(capsys, "robotcar", "/nowhere", "--set", "cameras=[rear")
    assert "1 or more" in usage_error(capsys, "robotcar", "/nowhere", "--pairs", "0")


def test_values_of_another_type_are_wrong_usage(toy_root, capsys):
    assert "cannot take" in usage_error(capsys, "robotcar", str(toy_root), "--quiet", "--set", "cameras=7")


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text and "--set" in text and "Exit status" in text


@pytest.mark.skipif("GNNET_DATA" not in os.environ, reason="set GNNET_DATA to the folder that holds strecha/")
def test_a_real_reconstruction(tmp_path, capsys):
    path, root = tmp_path / "inspection.json", Path(os.environ["GNNET_DATA"]) / "strecha" / "entry-p10"
    assert main(["colmap", str(root), "--quiet", "--json", str(path)]) == 0
    capsys.readouterr()
    assert json.loads(path.read_text())["agreement"][0]["median_px"] < 0.4
