"""Torchvision's networks as backbones: stages, where their cells look, weights, training."""

import pytest
import torch
import torchvision
from torch import nn

from gnnet.models.backbone import Backbone
from gnnet.models.checkpoint import read_checkpoint
from gnnet.models.weights import load_weights

FAMILIES = {
    "resnet18": [-0.5, -1.5, -3.5, -7.5],
    "convnext_tiny": [0, 0, 0],
    "efficientnet_b0": [-0.5, -1.5, -3.5, -7.5],
    "mobilenet_v3_small": [-0.5, -1.5, -3.5, -7.5],
    "vgg11": [0, 0, 0, 0],
}


def symmetric(name: str) -> Backbone:
    """A network of random but mirror-symmetric kernels, with a map of every stride from 2 to 16."""
    torch.manual_seed(0)
    network = Backbone(name=name, width=16, channels=16, strides=(16, 8, 4, 2), deepest=16, normalize=False).eval()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            w = layer.weight.data
            layer.weight.data = (w + w.flip(-1) + w.flip(-2) + w.flip((-1, -2))) / 4
    for parameter_name, parameter in network.named_parameters():
        if parameter_name.endswith("layer_scale"):
            parameter.data.fill_(0.1)  # ConvNeXt starts with 1e-6, and its blocks would do nothing
    return network


def texture(side: int, *cells: int) -> torch.Tensor:
    """An image that is the mean of smooth textures, each of one size."""
    generator = torch.Generator().manual_seed(1)
    layers = [torch.rand(1, 3, side // cell, side // cell, generator=generator) for cell in cells]
    whole = sum(nn.functional.interpolate(x, size=(side, side), mode="bicubic") for x in layers)
    return whole.clamp(0, len(cells)) / len(cells)


def off_grid(here: torch.Tensor, mirrored: torch.Tensor) -> float:
    """Cells by which a map's cells lie off the grid to the right, found from the map of the mirrored image.

    With cells that look `o` to the right, the mirrored map, mirrored back, shows what lies 2·o further left.
    """
    back, inside = mirrored.flip(-1), (..., slice(4, -4), slice(4, -4))
    offset = 0.0
    for _ in range(5):  # Gauss-Newton on the shift between the two, each moved by half of it
        a, b = (_moved(m, s)[inside] for m, s in ((here, -offset), (back, offset)))
        slope = ((a + b).roll(-1, -1) - (a + b).roll(1, -1))[..., 1:-1] / 4
        offset += float(((a - b)[..., 1:-1] * slope).sum() / (slope**2).sum()) / 2
    return offset


def _moved(features: torch.Tensor, cells: float) -> torch.Tensor:
    """Maps at i + `cells`, exact for what is periodic and smooth; the borders are not looked at."""
    frequency = torch.fft.fftfreq(features.shape[-1], dtype=torch.float64)
    return torch.fft.ifft(torch.fft.fft(features.double()) * torch.exp(2j * torch.pi * frequency * cells)).real


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_mirrored_image_shows_that_every_level_lies_on_the_grid(name):
    network, image = symmetric(name), texture(320, 16)
    with torch.no_grad():
        stages, mirrored = (network.encoder(network.images(i)) for i in (image, image.flip(-1)))
        shifts = [lateral[1] for lateral in network.lateral if isinstance(lateral, nn.Sequential)]
        for shift, off, a, b in zip(shifts, FAMILIES[name], stages, mirrored, strict=True):
            stride = 320 / a.shape[-1]
            assert shift.cells == -off / stride  # as computed
            assert off_grid(a, b) == pytest.approx(off / stride, abs=0.03)  # what torchvision's own map shows
            assert abs(off_grid(shift(a), shift(b))) < 0.02, stride

        # Of the whole pyramid the measure is coarser: random layers alias what they subsample. A map that is not
        # moved is off by 0.25 of a cell and more.
        for norm in (layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)):
            norm.momentum = 1.0  # takes the statistics of one pass, without which the maps of some networks fade away
        network.train()(texture(320, 16, 32))
        image = texture(384, 64, 16)
        pyramid, mirrored = (network.eval()(i) for i in (image, image.flip(-1)))
    for stride, a, b in zip(pyramid.strides, pyramid.maps, mirrored.maps, strict=True):
        assert abs(off_grid(a, b)) < 0.05, stride


def small(**settings) -> Backbone:
    return Backbone(name="mobilenet_v3_small", **{"width": 8, "channels": 4, "strides": (8, 2), **settings})


@pytest.mark.slow
def test_stages_are_cut_where_all_that_follows_passes():
    """In a ResNet-50 the first layer of a stage still has the resolution of the stage before, but a shortcut goes
    around it."""
    network = Backbone(name="resnet50", width=8, strides=(8, 2))
    assert [lateral[0].in_channels for lateral in network.lateral] == [64, 256, 512, 1024, 2048]
    assert [lateral[1].cells for lateral in network.lateral] == [0.25, 0.375, 0.4375, 0.46875, 0.484375]


def test_layers_beyond_the_deepest_stage_are_not_built():
    assert not [n for n in Backbone(name="resnet18", deepest=16).state_dict() if "layer4" in n or "fc" in n]
    assert small(deepest=8).images.multiple == 8


@pytest.mark.slow
def test_the_image_stands_in_for_strides_that_the_network_lacks():
    network = Backbone(name="convnext_tiny", width=8, strides=(4, 2, 1), deepest=8).eval()
    assert [part.in_channels for part in network.lateral[:2]] == [3, 3]
    with torch.no_grad():
        assert [m.shape[-2:] for m in network(torch.rand(1, 3, 37, 50)).maps] == [(10, 13), (19, 25), (37, 50)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "resnet19"}, "no network 'resnet19' for classification; expected one of alexnet, "),
        ({"name": "fasterrcnn_resnet50_fpn"}, "no network 'fasterrcnn_resnet50_fpn' for classification"),
        ({"name": "squeezenet1_1"}, "no map of this network has a half"),
        ({"deepest": 64}, "deepest=64; expected a stride of mobilenet_v3_small: 2, 4, 8, 16, 32"),
        ({"strides": (64, 8)}, r"expected some of \[32, 16, 8, 4, 2, 1\], coarse to fine"),
        ({"channels": (4,)}, "expected a number for each stride"),
        ({"upsampling": "cubic"}, "expected nearest, bilinear or transposed"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Backbone(**{"name": "mobilenet_v3_small", **settings})


def test_a_few_steps_of_training_lower_a_loss():
    torch.manual_seed(0)
    network, images = small(), torch.rand(2, 3, 64, 64)
    target = torch.randn(2, 4, 32, 32)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        coarse, fine = network(images).maps
        loss = (fine - target).square().mean() + coarse.sum(1).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    unused = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert unused == []


def test_frozen_batch_norm_keeps_its_statistics():
    for frozen in (True, False):
        network = small(frozen_batch_norm=frozen).eval().train()
        before = {name: value.clone() for name, value in network.named_buffers()}
        network(torch.rand(2, 3, 64, 64))
        changed = [name for name, value in network.named_buffers() if not torch.equal(value, before[name])]
        assert bool(changed) != frozen
        assert network.training and all(p.requires_grad for p in network.parameters())


@pytest.fixture(scope="module")
def classifier_state():
    torch.manual_seed(3)
    return torchvision.models.mobilenet_v3_small(weights=None).state_dict()


def test_torchvisions_file_gives_the_encoder(tmp_path, classifier_state):
    """Also without the counts of batches, as torchvision's oldest files are."""
    old = {name: value for name, value in classifier_state.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "mobilenet.pth")
    network = small(deepest=16)
    heads = network.heads[0].weight.clone()
    assert "decoder and heads are random" in load_weights(network, tmp_path / "mobilenet.pth")
    for name, value in network.encoder.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(value, classifier_state[name])
    assert torch.equal(network.heads[0].weight, heads)
    with pytest.raises(ValueError, match=r"does not fit Backbone: .*missing .*unexpected"):
        load_weights(Backbone(name="resnet18"), tmp_path / "mobilenet.pth")


def test_imagenet_loads_torchvisions_weights_of_that_network(monkeypatch, classifier_state):
    weights = torchvision.models.MobileNet_V3_Small_Weights
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **_: classifier_state)
    network = small()
    assert "from imagenet" in load_weights(network, "imagenet")
    assert torch.equal(network.encoder.state_dict()["features.0.0.weight"], classifier_state["features.0.0.weight"])


def test_a_checkpoint_gives_the_network_again(tmp_path):
    torch.manual_seed(7)
    network = small().eval()
    settings = {"name": "mobilenet_v3_small", "width": 8, "channels": 4, "strides": [8, 2]}
    content = {
        "state_dict": {f"network.{name}": value for name, value in network.state_dict().items()},
        "config": {"model": {"_target_": "gnnet.models.backbone.Backbone", **settings}},
        "global_step": 3,
    }
    torch.save(content, tmp_path / "last.ckpt")
    again, images = read_checkpoint(tmp_path / "last.ckpt").network().eval(), torch.rand(1, 3, 40, 56)
    with torch.no_grad():
        for a, b in zip(network(images).maps, again(images).maps, strict=True):
            torch.testing.assert_close(a, b)
