"""Checkpoints of our own training: the network that they hold, and files that are damaged or made to harm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from gnnet.models.checkpoint import build, read_checkpoint
from gnnet.models.unet import UNet

SETTINGS = {"widths": [8, 16], "channels": 4, "strides": [2, 1]}


def write_checkpoint(path: Path, network: UNet | None = None, **changes) -> Path:
    network = network or UNet(**SETTINGS)
    content = {
        "state_dict": {f"network.{name}": value for name, value in network.state_dict().items()},
        "config": {"model": {"_target_": "gnnet.models.unet.UNet", **SETTINGS}},
        "global_step": 3,
        **changes,
    }
    torch.save(content, path)
    return path


def test_the_network_is_built_with_its_settings_and_weights(tmp_path):
    torch.manual_seed(5)
    network = UNet(**SETTINGS)
    found = read_checkpoint(str(write_checkpoint(tmp_path / "best.ckpt", network))).network()
    assert isinstance(found, UNet) and found.strides == (2, 1) and found.channels == (4, 4)
    for name, value in network.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt does not exist"):
        read_checkpoint(tmp_path / "none.ckpt").network()


class RunsWhenRead:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "model",
    [
        {"_target_": "os.system", "command": "true"}, {"_target_": "torch.nn.Linear", "in_features": 1},
        {"_target_": "gnnet.models.unet.nn"}, {"_target_": "gnnet.models.vgg.load_weights"}, {"_target_": "UNet"},
        {"_target_": "gnnet.models..UNet"}, {"_target_": "gnnet.models.missing.UNet"}, {"_target_": ""}, {}, None, [],
        {"_target_": "gnnet.models.unet.Tensor"}, {"_target_": "gnnet.localization.localizer.Localizer"},
        {"_target_": "gnnet.models.unet.UNet", "depth": 3}, {"_target_": "gnnet.models.unet.UNet", "strides": [3]},
        {"_target_": "gnnet.models.unet.UNet", "widths": [8, 8, 8], "strides": [4, 2]}, {"_target_": 3},
    ],
)  # fmt: skip
def test_checkpoints_that_name_other_things_are_refused(tmp_path, model):
    path = write_checkpoint(tmp_path / "last.ckpt", config={"model": model})
    with pytest.raises(ValueError, match=r"last\.ckpt|strides"):
        read_checkpoint(path).network()


def test_the_pose_loss_may_be_named_and_nothing_else_of_its_module():
    loss = build({"_target_": "gnnet.localization.pose_loss.PoseLoss", "iterations": 2}, source="file")
    assert loss.iterations == 2
    with pytest.raises(ValueError, match="file names"):
        build({"_target_": "gnnet.localization.pose_loss.reprojection_error"}, source="file")


def test_damaged_checkpoints_and_such_with_code_are_refused(tmp_path):
    path = write_checkpoint(tmp_path / "last.ckpt")
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"text", bytes(100), whole[:200] + bytes(300) + whole[500:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"last\.ckpt"):
            read_checkpoint(path).network()
    for content in (torch.zeros(3), [1], {"state_dict": {}}, None):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"last\.ckpt has no .*config"):
            read_checkpoint(path).network()
    write_checkpoint(path, hyper=RunsWhenRead(tmp_path / "ran"))
    with pytest.raises(ValueError, match=r"last\.ckpt .*holds more than plain tensors"):
        read_checkpoint(path).network()
    assert not (tmp_path / "ran").exists()
    for config, expected in ((None, "has no config"), ({}, r"has no settings of a network \(config\.model")):
        with pytest.raises(ValueError, match=expected):
            read_checkpoint(write_checkpoint(path, config=config)).network()
