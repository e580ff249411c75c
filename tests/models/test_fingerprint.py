"""Fingerprints of networks: what they tell apart."""

import pytest
import torch
from torch import nn

from gnnet.models.grey import GreyValues
from gnnet.models.unet import UNet
from gnnet.models.vgg import VGG16
from gnnet.models.weights import fingerprint, load_weights


def small_unet(seed=0, **settings):
    torch.manual_seed(seed)
    return UNet(**{"widths": (8, 16, 16), "channels": (6, 4), "strides": (4, 2), "stem_stride": 2, **settings})


def test_fingerprints_tell_weights_and_settings_but_not_the_mode():
    network = small_unet()
    assert fingerprint(network) == fingerprint(small_unet()) == fingerprint(network.train()) == fingerprint(network)
    others = [
        small_unet(seed=1), small_unet(normalize=False), small_unet(upsampling="bilinear"),
        small_unet(channels=(4, 6)), small_unet(strides=(8, 2)),
    ]  # fmt: skip
    network.heads[0].bias.data[0] += 1e-3
    assert len({fingerprint(n) for n in (small_unet(), network, *others)}) == 7


def test_networks_of_the_same_weights_differ_by_what_they_do_with_them():
    vgg = VGG16(taps=(10, 5))
    raw = VGG16(taps=(10, 5), normalize=False)
    raw.load_state_dict(vgg.state_dict())
    other = VGG16(taps=(10, 7))
    other.load_state_dict(vgg.state_dict())
    assert len({fingerprint(n) for n in (vgg, raw, other)}) == 3
    assert fingerprint(GreyValues(strides=(4, 2))) != fingerprint(GreyValues(strides=(8, 4)))
    assert fingerprint(vgg.double()) == fingerprint(vgg.float())


def test_fingerprints_are_those_of_maps_that_were_compiled_before():
    """A map is opened with a network whose fingerprint it holds, so these letters may not change."""
    networks = {"8d8d49992d390915": small_unet(), "08f50de94288dce9": VGG16(taps=(10, 5))}
    for letters, network in networks.items():
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.fill_(0.5)
        assert fingerprint(network) == letters


@pytest.mark.cases
@pytest.mark.slow
def test_wrappers_change_neither_fingerprint_nor_weights(tmp_path):
    network, part = small_unet(), small_unet()
    part.heads[0] = torch.compile(part.heads[0], backend="eager")
    wrapped = [torch.compile(small_unet(), backend="eager"), nn.DataParallel(small_unet()), part]
    other = small_unet(seed=1)
    torch.save(
        {"network." + name: value for name, value in torch.compile(other).state_dict().items()}, tmp_path / "w.pth"
    )
    for one in wrapped:
        assert fingerprint(one) == fingerprint(network)
        load_weights(one, tmp_path / "w.pth")
        assert fingerprint(one) == fingerprint(other)
    vgg = torch.compile(VGG16(taps=(10, 5)))
    torch.save(
        {f"encoder.{k.removeprefix('_orig_mod.features.')}": v for k, v in vgg.state_dict().items()}, tmp_path / "v.pth"
    )
    assert "S2DHM" in load_weights(vgg, tmp_path / "v.pth")
