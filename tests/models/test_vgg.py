import pytest
import torch

from gnnet.models.vgg import VGG16


def test_taps_are_inputs_of_torchvision_layers(vgg16_layers):
    network = VGG16(normalize=False).eval()
    network.features.load_state_dict(vgg16_layers[:28].state_dict())
    images = torch.rand(1, 3, 32, 48)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (images - mean[:, None, None]) / std[:, None, None]
    inputs = {}
    with torch.no_grad():
        for index, layer in enumerate(vgg16_layers):
            inputs[index] = x.clone()
            x = layer(x)
        pyramid = network(images)
    assert pyramid.strides == network.strides == (16, 16, 8, 8, 4)
    assert network.channels == (512, 512, 512, 256, 256)
    for tap, features in zip((28, 24, 21, 17, 14), pyramid.maps, strict=True):
        torch.testing.assert_close(features, inputs[tap], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("taps", [(3,), (2, 1), (14, 13, 12), (30, 5)])
def test_any_layers(vgg16_layers, taps):
    """The input of a ReLU may be a tap too, and must not be overwritten in place."""
    network = VGG16(taps=taps, normalize=False).eval()
    network.features.load_state_dict(vgg16_layers[: taps[0]].state_dict())
    with torch.no_grad():
        pyramid = network(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
        x = network.images(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
        for tap, features, stride, channels in zip(taps, pyramid.maps, network.strides, network.channels, strict=True):
            torch.testing.assert_close(features, vgg16_layers[:tap](x), rtol=1e-4, atol=1e-5)
            assert features.shape == (1, channels, 32 // stride, 32 // stride)


def test_only_the_layers_needed_are_built():
    assert len(VGG16(taps=(14,)).features) == 14
    assert len(VGG16().features) == 28


def test_frozen_layers_are_not_trained():
    network = VGG16(taps=(14, 7), frozen_layers=5)
    assert {name for name, p in network.named_parameters() if not p.requires_grad} == {
        "features.0.weight", "features.0.bias", "features.2.weight", "features.2.bias",
    }  # fmt: skip
    network(torch.rand(1, 3, 16, 16)).maps[0].sum().backward()
    assert network.features[0].weight.grad is None
    assert network.features[12].weight.grad is not None


@pytest.mark.parametrize("taps", [(14, 17), (31,), (0,), (), (14, 14)])
def test_impossible_taps_are_refused(taps):
    with pytest.raises(ValueError, match="coarse to fine"):
        VGG16(taps=taps)
