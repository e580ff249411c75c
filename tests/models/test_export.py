"""Weights as a safetensors file: what is written is what is read, and what the package ships."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gnnet.models.checkpoint import read_checkpoint
from gnnet.models.export import export_weights, main
from gnnet.models.unet import UNet
from gnnet.models.weights import PACKAGED, fingerprint, load_weights
from tests.models.test_checkpoint import SETTINGS, write_checkpoint


def rewritten(file: Path, path: Path, about: object) -> Path:
    """The file's tensors with other metadata."""
    text = about if isinstance(about, str) else json.dumps(about)
    save_file(load_file(file), path, metadata={"gnnet": text})
    return path


@pytest.fixture
def exported(tmp_path) -> Path:
    torch.manual_seed(5)
    checkpoint = write_checkpoint(tmp_path / "best.ckpt", UNet(**SETTINGS))
    assert "SHA-256" in export_weights(checkpoint, tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


def test_the_network_is_the_checkpoints_rounded_to_half(exported):
    original = read_checkpoint(exported.with_name("best.ckpt")).network()
    read = read_checkpoint(exported)
    assert read.step == 3 and read.config["model"]["widths"] == SETTINGS["widths"]
    found, loaded = read.network(), UNet(**SETTINGS)
    assert str(exported) in load_weights(loaded, str(exported))
    assert fingerprint(found) == fingerprint(loaded)
    for name, value in original.state_dict().items():
        assert found.state_dict()[name].dtype == torch.float32
        assert torch.equal(found.state_dict()[name], value.half().float())
    images = torch.rand(1, 3, 32, 32)
    for a, b in zip(original.eval()(images).maps, found.eval()(images).maps, strict=True):
        torch.testing.assert_close(a, b, atol=5e-3, rtol=0)


def test_a_network_with_confidence_keeps_it(tmp_path):
    settings = {**SETTINGS, "confidence": True}
    network = UNet(**settings)
    for head in network.confidence_heads:
        torch.nn.init.normal_(head.weight)
    config = {"model": {"_target_": "gnnet.models.unet.UNet", **settings}}
    export_weights(write_checkpoint(tmp_path / "best.ckpt", network, config=config), tmp_path / "small.safetensors")
    images = torch.rand(1, 3, 32, 32)
    found = read_checkpoint(tmp_path / "small.safetensors").network().eval()(images)
    for a, b in zip(network.eval()(images).confidences, found.confidences, strict=True):
        torch.testing.assert_close(a, b, atol=5e-3, rtol=0)
    with pytest.raises(ValueError, match="confidence_heads"):
        load_weights(UNet(**SETTINGS), tmp_path / "small.safetensors")


def test_settings_in_metadata_choose_no_code(exported, tmp_path):
    for target in ("os.mkdir", "gnnet.files.new_folder"):
        about = {"config": {"model": {"_target_": target, "path": str(tmp_path / "made")}}, "global_step": 1}
        path = rewritten(exported, tmp_path / "hostile.safetensors", about)
        with pytest.raises(ValueError, match=f"hostile.*{target}"):
            read_checkpoint(path).network()
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("about", ["{", "[" * 100_000, "[1]", {"config": 3, "global_step": 1}, {}])
def test_metadata_of_another_kind_is_said(exported, tmp_path, about):
    path = rewritten(exported, tmp_path / "other.safetensors", about)
    with pytest.raises(ValueError, match=r"other\.safetensors"):
        read_checkpoint(path)


def test_tensors_of_another_program_load_without_metadata(exported, tmp_path):
    save_file(load_file(exported), tmp_path / "plain.safetensors")
    load_weights(UNet(**SETTINGS), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="has no config, global_step"):
        read_checkpoint(tmp_path / "plain.safetensors")


def test_a_damaged_file_is_named(exported, tmp_path):
    content = exported.read_bytes()
    for name, damaged in (("cut", content[:-9]), ("empty", b""), ("long", b"\xff" * 64)):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name}\.safetensors.*damaged"):
            load_weights(UNet(**SETTINGS), path)


def test_export_refuses_what_half_cannot_hold(tmp_path):
    network = UNet(**SETTINGS)
    with torch.no_grad():
        next(network.parameters()).fill_(1e6)
    with pytest.raises(ValueError, match="float16 cannot hold"):
        export_weights(write_checkpoint(tmp_path / "a.ckpt", network), tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        export_weights(tmp_path / "a.ckpt", tmp_path / "a.pth")


def test_command(exported, tmp_path, capsys):
    assert main([str(exported.with_name("best.ckpt")), str(tmp_path / "again.safetensors")]) == 0
    assert (tmp_path / "again.safetensors").read_bytes() == exported.read_bytes()
    assert main([str(tmp_path / "none.ckpt"), str(tmp_path / "x.safetensors")]) == 1
    assert "none.ckpt does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("name", PACKAGED)
def test_weights_in_the_package(name):
    read = read_checkpoint(name)
    network = read.network()
    assert name in load_weights(network, name)
    assert os.path.getsize(PACKAGED[name]) < 4 * 2**20
    card = PACKAGED[name].with_suffix(".md").read_text()
    digest = hashlib.sha256(PACKAGED[name].read_bytes()).hexdigest()
    assert digest in card, "the model card is of another file"


def test_an_unknown_name_is_answered_by_those_that_exist():
    assert "gnnet-small" in PACKAGED
    with pytest.raises(FileNotFoundError, match="in the package there are gnnet-small"):
        read_checkpoint("gnnet-large")
    with pytest.raises(FileNotFoundError, match=r"in the package \(gnnet-small\)"):
        load_weights(UNet(**SETTINGS), "gnnet-large")
