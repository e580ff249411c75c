import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import VGG16_Weights

from gnnet.models.unet import UNet
from gnnet.models.vgg import VGG16
from gnnet.models.weights import load_weights


def small_unet(channels=4):
    return UNet(widths=(8, 16), channels=channels, strides=(2, 1))


def small_vgg():
    return VGG16(taps=(7, 5))


@pytest.fixture(scope="module")
def torchvision_state(vgg16_layers):
    """As torchvision's file, but for the classifier's size."""
    state = {f"features.{k}": v for k, v in vgg16_layers[:10].state_dict().items()}
    return {**state, "classifier.0.weight": torch.zeros(2, 2), "classifier.0.bias": torch.zeros(2)}


def save(content, path: Path, **kwargs) -> Path:
    torch.save(content, path, **kwargs)
    return path


def assert_equal_weights(model: nn.Module, state: dict):
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name])


def test_none_is_random():
    model = small_unet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert load_weights(model, None) == "random weights"
    assert_equal_weights(model, before)


def test_bare_state_dict(tmp_path):
    source = small_unet().state_dict()
    model = small_unet()
    said = load_weights(model, str(save(source, tmp_path / "model.pth")))
    assert_equal_weights(model, source)
    assert f"{len(source)} tensors of UNet" in said
    assert "model.pth" in said


def test_training_checkpoint(tmp_path):
    source = small_unet().state_dict()
    checkpoint = {
        "state_dict": {**{f"network.{k}": v for k, v in source.items()}, "loss.temperature": torch.ones(1)},
        "epoch": 3,
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}],
        "config": {"network": {"widths": [8, 16]}},
    }
    model = small_unet()
    assert "training checkpoint" in load_weights(model, save(checkpoint, tmp_path / "last.ckpt"))
    assert_equal_weights(model, source)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "network._orig_mod."])
def test_wrappers_are_unwrapped(tmp_path, wrapper):
    source = small_unet().state_dict()
    model = small_unet()
    load_weights(model, save({wrapper + k: v for k, v in source.items()}, tmp_path / "model.pth"))
    assert_equal_weights(model, source)


@pytest.mark.parametrize("zip_file", [True, False])
def test_torchvision_file(tmp_path, torchvision_state, zip_file):
    model = small_vgg()
    path = save(torchvision_state, tmp_path / "vgg.pth", _use_new_zipfile_serialization=zip_file)
    load_weights(model, path)
    assert_equal_weights(model, torchvision_state)


@pytest.mark.parametrize("prefix", ["encoder.", "encoder.module.", "module.encoder."])
def test_netvlad_checkpoint(tmp_path, torchvision_state, prefix):
    encoder = {k.replace("features.", prefix): v for k, v in torchvision_state.items() if k.startswith("features")}
    pool = {"pool.module.conv.weight": torch.zeros(64, 512, 1, 1), "pool.module.centroids": torch.zeros(64, 512)}
    # Such files hold numpy numbers next to the tensors.
    numbers = {"epoch": 1, "best_score": np.float64(0.8), "recalls": [np.int64(3)]}
    checkpoint = {**numbers, "state_dict": {**encoder, **pool}}
    trusted = list(torch.serialization.get_safe_globals())
    model = small_vgg()
    assert "NetVLAD" in load_weights(model, save(checkpoint, tmp_path / "netvlad.pth.tar"))
    assert_equal_weights(model, torchvision_state)
    assert sorted(map(str, torch.serialization.get_safe_globals())) == sorted(map(str, trusted))


def test_imagenet_loads_torchvision_weights(monkeypatch, torchvision_state):
    asked = {}

    def get_state_dict(self, **kwargs):
        asked.update(kwargs)
        return torchvision_state

    monkeypatch.setattr(VGG16_Weights, "get_state_dict", get_state_dict)
    model = small_vgg()
    assert "imagenet" in load_weights(model, "imagenet")
    assert_equal_weights(model, torchvision_state)
    del asked["progress"]
    assert asked == {"check_hash": True, "weights_only": True}


def test_imagenet_is_for_torchvisions_networks_only():
    with pytest.raises(ValueError, match="exist for VGG16 and Backbone only, and the network is UNet"):
        load_weights(small_unet(), "imagenet")


def test_imagenet_without_a_network(monkeypatch, tmp_path):
    def get_state_dict(self, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(VGG16_Weights, "get_state_dict", get_state_dict)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(ConnectionError) as caught:
        load_weights(small_vgg(), "imagenet")
    message = str(caught.value)
    assert VGG16_Weights.IMAGENET1K_V1.url in message
    assert str(tmp_path / "checkpoints") in message
    assert "weights=<path>" in message


def test_missing_file(tmp_path):
    for path in (tmp_path / "nothing.ckpt", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path} is not a file"):
            load_weights(small_unet(), path)


class _RunsWhenUnpickled:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zip_file", [True, False])
def test_code_in_a_file_does_not_run(tmp_path, zip_file):
    evidence = tmp_path / "executed"
    content = {"state_dict": small_unet().state_dict(), "extra": _RunsWhenUnpickled(evidence)}
    path = save(content, tmp_path / "bad.ckpt", _use_new_zipfile_serialization=zip_file)
    with pytest.raises(ValueError, match=r"would need to execute code \(posix.mkdir\)") as caught:
        load_weights(small_unet(), path)
    assert not evidence.exists()
    assert "weights_only" not in str(caught.value)  # no advice to switch the protection off
    torch.load(path, weights_only=False)  # the same file does run code where it is allowed to
    assert evidence.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint\n", b"PK\x03\x04 damaged", bytes(range(256))])
def test_other_files(tmp_path, content):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a checkpoint that torch\.load can read, or is damaged"):
        load_weights(small_unet(), path)


@pytest.mark.parametrize("content", [{"epoch": 1, "loss": 0.5}, [torch.zeros(1)], {"state_dict": {}}, torch.zeros(2)])
def test_file_without_weights(tmp_path, content):
    with pytest.raises(ValueError, match="expected tensors by name"):
        load_weights(small_unet(), save(content, tmp_path / "model.pth"))


def test_mismatch_lists_a_few_names(tmp_path):
    state = UNet(widths=(8, 16, 32), channels=4, strides=(4, 2, 1)).state_dict()
    del state["stem.0.weight"]
    state["stem.1.weight"] = torch.zeros(3)
    model = small_unet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit UNet") as caught:
        load_weights(model, save(state, tmp_path / "model.pth"))
    message = str(caught.value)
    assert "1 missing (stem.0.weight)" in message
    assert "unexpected (encoder.2.0.0.weight, " in message
    assert ", …)" in message
    assert "of another shape (stem.1.weight (3,) instead of (8,)," in message
    assert "build the network with the settings it was trained with" in message
    assert message.count("encoder.2.") == 5
    assert_equal_weights(model, before)


def test_another_networks_checkpoint(tmp_path, torchvision_state):
    with pytest.raises(ValueError, match=r"does not fit VGG16: .* missing .*unexpected"):
        load_weights(small_vgg(), save(small_unet().state_dict(), tmp_path / "unet.pth"))
    with pytest.raises(ValueError, match="does not fit UNet"):
        load_weights(small_unet(), save(torchvision_state, tmp_path / "vgg.pth"))
