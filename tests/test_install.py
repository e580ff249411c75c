"""What is installed: the two lists of requirements agree, and localizing does without the training packages."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import gnnet
from gnnet.geometry.pose import pose_errors
from gnnet.localization.compile import compile_map
from gnnet.models.unet import UNet
from gnnet.scenes.layouts.robotcar import load_robotcar
from tests import walls

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DISTRIBUTIONS = {
    "PIL": "pillow", "yaml": "pyyaml", "hydra": "hydra-core", "pytorch_lightning": "pytorch-lightning",
    "faiss": "faiss-cpu",
    "kornia_rs": "kornia-rs", "wandb_workspaces": "wandb-workspaces",
}  # fmt: skip


def name(requirement: str) -> str:
    return requirement.partition(">")[0].strip()


def test_requirements_are_those_of_localizing_and_training():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = [line for line in lines if line and not line.startswith("#")]
    assert required == PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["train"]


@pytest.mark.slow
def test_every_imported_package_is_required_and_every_required_one_imported():
    needed = {i.package for i in walls.imports()} - {"gnnet", *walls.SCRIPTS} - sys.stdlib_module_names
    needed = {DISTRIBUTIONS.get(package, package) for package in needed}
    extras = PROJECT["project"]["optional-dependencies"]
    listed = PROJECT["project"]["dependencies"] + extras["train"] + extras["index"] + extras["dashboard"]
    by_config = {"wandb", "tensorboard"}  # Lightning's loggers import them, see conf/logger
    listed = {name(requirement) for requirement in listed}
    assert needed <= listed and listed - needed <= by_config


def test_types_are_part_of_the_package():
    assert (Path(gnnet.__file__).parent / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["gnnet"]


def test_changelog_has_the_version():
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0].split()[1] == gnnet.__version__


LOCALIZE = """
import json, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in given["missing"]:
            raise ModuleNotFoundError(f"No module named {name!r}")

given = json.loads(sys.stdin.read())
sys.meta_path.insert(0, NotInstalled())

import torch
from pathlib import Path
from gnnet.data.images import read_image
from gnnet.geometry.camera import Camera
from gnnet.localization.localizer import Localizer

localizer = Localizer.from_checkpoint(given["checkpoint"], given["map"], references=1)
camera = Camera.from_colmap("OPENCV", *given["size"], given["parameters"], torch.float64)
found = localizer.localize(read_image(Path(given["image"])), camera, **given["about"])
pose = found.cam_from_world
print(json.dumps([found.status.name, pose.rotation.tolist(), pose.translation.tolist()]))
"""


@pytest.mark.slow
def test_a_query_is_localized_without_the_training_packages(toy_root: Path, tmp_path: Path):
    """An image of the map, from a checkpoint and the map, in a process where those packages cannot be imported."""
    settings = {"widths": [16, 32, 32], "channels": 16, "strides": [4, 2]}
    torch.manual_seed(0)
    network = UNet(**settings).eval()
    config = {"model": {"_target_": "gnnet.models.unet.UNet", **settings}}
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state, "config": config, "global_step": 0}, tmp_path / "best.ckpt")
    scene = load_robotcar(toy_root, progress=False)
    compile_map(tmp_path / "town.gnmap", scene, network, points=500, progress=False)
    query = next(i for i in scene.images.values() if i.is_reference and i.name.endswith("250000.jpg"))
    assert query.camera is not None and query.cam_from_world is not None
    given = {
        "missing": sorted(walls.TRAINING_PACKAGES),
        "checkpoint": str(tmp_path / "best.ckpt"),
        "map": str(tmp_path / "town.gnmap"),
        "image": str(query.path),
        "about": {"condition": query.condition, "place": query.place},
        "size": query.camera.size.int().tolist(),
        "parameters": query.camera.parameters.tolist(),
    }
    child = subprocess.run(
        [sys.executable, "-c", LOCALIZE], cwd=ROOT, input=json.dumps(given), capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    status, rotation, translation = json.loads(child.stdout)
    truth = query.cam_from_world
    found = type(truth)(*(torch.tensor(x, dtype=truth.rotation.dtype) for x in (rotation, translation)))
    position, rotation_error = pose_errors(found, truth)
    assert status == "LOCALIZED" and position < 0.01 and rotation_error < 0.05


@pytest.mark.parametrize("package", sorted(walls.TRAINING_PACKAGES - {"lightning"}))
def test_training_packages_are_no_core_requirement(package: str):
    core = {name(requirement) for requirement in PROJECT["project"]["dependencies"]}
    assert DISTRIBUTIONS.get(package, package) not in core
