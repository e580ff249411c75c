"""What every network promises: shapes, layout, types, and that pixel xy is at xy / stride in each map."""

import pytest
import torch
from torch import nn

from gnnet.geometry.interpolation import sample
from gnnet.models.backbone import Backbone
from gnnet.models.enlarged import Enlarged
from gnnet.models.grey import GreyValues
from gnnet.models.pyramid import FeatureNetwork, pair_features
from gnnet.models.unet import UNet
from gnnet.models.vgg import VGG16
from gnnet.models.weights import fingerprint

SMALL = (8, 16, 16)

NETWORKS = {
    "unet": lambda **kw: UNet(widths=SMALL, channels=4, strides=(4, 2, 1), **kw),
    "unet bilinear": lambda **kw: UNet(widths=SMALL, channels=4, strides=(4, 2, 1), upsampling="bilinear", **kw),
    "unet transposed": lambda **kw: UNet(widths=SMALL, channels=4, strides=(4, 2, 1), upsampling="transposed", **kw),
    "unet stem 2": lambda **kw: UNet(widths=SMALL[:2], channels=4, strides=(4, 2), stem_stride=2, **kw),
    "unet stem 4": lambda **kw: UNet(widths=SMALL[:2], channels=4, strides=(8, 4), stem_stride=4, **kw),
    "vgg": lambda **kw: VGG16(taps=(21, 17, 14), **kw),
    "grey": lambda **kw: GreyValues(strides=(8, 4, 2, 1)),
    "enlarged": lambda **kw: Enlarged(UNet(widths=SMALL[:2], channels=4, strides=(4, 2), stem_stride=2, **kw)),
    "backbone": lambda **kw: Backbone(name="mobilenet_v3_small", width=8, strides=(8, 2), deepest=8, **kw),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    return NETWORKS[request.param]().eval()


@pytest.fixture(params=[name for name in NETWORKS if name != "backbone"])  # whose position test_backbone.py measures
def raw_network(request):
    """Without normalisation, in float64."""
    torch.manual_seed(0)
    return NETWORKS[request.param](**({} if request.param == "grey" else {"normalize": False})).double().eval()


def images(batch, height, width, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, height, width, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_contract_of_a_backbone_holds(name):
    """`FeatureNetwork` tells the maps before any image is seen."""
    network: FeatureNetwork = NETWORKS[name]()
    assert isinstance(network, nn.Module)
    assert all(isinstance(value, tuple) for value in (network.strides, network.channels))
    with torch.no_grad():
        pyramid = network(images(1, 19, 33, dtype=torch.float32))
    assert network.strides == pyramid.strides == tuple(sorted(network.strides, reverse=True))
    assert network.channels == tuple(features.shape[1] for features in pyramid.maps)
    assert [m.shape[-2:] for m in pyramid.maps] == [(-(-19 // s), -(-33 // s)) for s in network.strides]


@pytest.mark.parametrize(("height", "width"), [(32, 48), (37, 51), (5, 3)])
def test_maps_of_any_size_in_channels_last(network, height, width):
    with torch.no_grad():
        pyramid = network(images(2, height, width, dtype=torch.float32))
    assert pyramid.strides == network.strides
    for features, stride in zip(pyramid.maps, pyramid.strides, strict=True):
        assert features.shape[-2:] == (-(-height // stride), -(-width // stride))
        assert features.permute(0, 2, 3, 1).is_contiguous()
        assert features.dtype == torch.float32
        assert features.isfinite().all()


@pytest.mark.parametrize("name", [name for name in NETWORKS if name.startswith(("unet", "backbone"))])
def test_confidences_are_maps_beside_the_features_which_stay_as_they_were(name):
    image = images(2, 37, 51, dtype=torch.float32)
    torch.manual_seed(0)
    plain = NETWORKS[name]().eval()
    torch.manual_seed(0)
    network = NETWORKS[name](confidence=True).eval()
    expected, found = plain(image), network(image)
    assert expected.confidences is None and fingerprint(plain) != fingerprint(network)
    assert all(torch.equal(a, b) for a, b in zip(expected.maps, found.maps, strict=True))
    for confidence, features in zip(found.confidences, found.maps, strict=True):
        assert confidence.shape == (2, 1, *features.shape[2:]) and (confidence == 0.5).all()
    sum(c.square().sum() for c in found.confidences).backward()
    assert all(p.grad.abs().max() > 0 for p in network.confidence_heads.parameters())
    for head in network.confidence_heads:
        nn.init.normal_(head.weight, std=3)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(image)
    assert all(c.dtype == torch.float32 and c.std() > 1e-4 for c in found.confidences)
    assert all(c.min() >= 0 and c.max() <= 1 for c in found.confidences)
    assert len(found.select([-1]).confidences) == 1
    pair = pair_features(network, image[:1], image[1:])
    for whole, *halves in zip(network(image).confidences, *(p.confidences for p in pair), strict=True):
        torch.testing.assert_close(torch.cat(halves), whole)


def test_uint8_equals_float(network):
    whole = torch.randint(0, 256, (1, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for a, b in zip(network(whole).maps, network(whole.float() / 255).maps, strict=True):
            torch.testing.assert_close(a, b)


def test_bad_images_are_refused(network):
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
        network(torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match="expected uint8"):
        network(torch.zeros(1, 3, 16, 16, dtype=torch.int64))


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "grey"])
def test_maps_have_unit_length(name):
    for features in NETWORKS[name]()(images(1, 32, 32, dtype=torch.float32)).maps:
        torch.testing.assert_close(features.norm(dim=1), torch.ones_like(features[:, 0]))


def test_maps_stay_float32_under_autocast(network):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        pyramid = network(images(1, 32, 32, dtype=torch.float32))
    assert all(features.dtype == torch.float32 for features in pyramid.maps)


def test_padding_repeats_the_border(raw_network):
    if isinstance(raw_network, Enlarged):
        pytest.skip("the enlarged image is padded to fewer pixels; its network is tested here by itself")
    multiple = 2 * max(raw_network.strides)
    odd = images(1, multiple * 2 - 3, multiple * 2 - 1)
    padded = torch.nn.functional.pad(odd, (0, 1, 0, 3), mode="replicate")
    with torch.no_grad():
        for a, b in zip(raw_network(odd).maps, raw_network(padded).maps, strict=True):
            torch.testing.assert_close(a, b[..., : a.shape[-2], : a.shape[-1]])


def _make_symmetric(network):
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            w = layer.weight.data
            layer.weight.data = (w + w.flip(-1) + w.flip(-2) + w.flip((-1, -2))) / 4
    return network


@pytest.mark.parametrize("axis", [-1, -2])
def test_every_layer_is_centred(raw_network, axis):
    """With mirror-symmetric kernels a mirrored image gives the mirrored maps, unless a layer is off centre.

    A cell (i + 0.5) · stride goes to W − (i + 0.5) · stride, which is the mirrored cell's place only if
    pixel xy is at xy / stride; half a pixel off shows in full.
    """
    network = _make_symmetric(raw_network)
    image = images(1, 64, 64)
    with torch.no_grad():
        for a, b in zip(network(image).maps, network(image.flip(axis)).maps, strict=True):
            torch.testing.assert_close(b, a.flip(axis), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_maps_shift_with_the_image(raw_network):
    """A texture on a flat ground, moved by the coarsest stride, moves each map by coarsest / stride cells."""
    shift = max(raw_network.strides)
    size = 192
    image = torch.full((1, 3, size, size), 0.4, dtype=torch.float64)
    image[..., 80:112, 80:112] = images(1, 32, 32)
    moved = image.roll((shift, 2 * shift), (-2, -1))
    with torch.no_grad():
        before, after = raw_network(image), raw_network(moved)
    for a, b, stride in zip(before.maps, after.maps, before.strides, strict=True):
        cells = shift // stride
        low, high = 80 // stride, 112 // stride
        torch.testing.assert_close(
            b[..., low + cells : high + cells, low + 2 * cells : high + 2 * cells], a[..., low:high, low:high]
        )
        assert (a[..., low:high, low:high] - b[..., low:high, low:high]).abs().max() > 1e-3


def test_sampled_position_of_grey_values():
    """On a ramp of grey, the sample at xy / stride is the grey value at xy, at every level."""
    x = torch.arange(128, dtype=torch.float64) + 0.5
    pyramid = GreyValues(strides=(8, 4, 2, 1)).double()((x / 128).expand(1, 3, 128, 128))
    xy = torch.tensor([[[40.3, 60.1], [77.0, 33.3]]], dtype=torch.float64)
    for features, stride in zip(pyramid.maps, pyramid.strides, strict=True):
        value, valid = sample(features, xy / stride)
        assert valid.all()
        torch.testing.assert_close(value[..., 0], xy[..., 0] / 128)


def test_grey_values_are_antialiased():
    """Pixel noise fades as resolution halves; without the blur its std would stay."""
    pyramid = GreyValues(strides=(4, 2, 1))(images(1, 128, 128, dtype=torch.float32))
    coarse, middle, fine = (features.std().item() for features in pyramid.maps)
    assert middle < 0.45 * fine
    assert coarse < 0.5 * middle
    assert pyramid.maps[-1].min() >= 0
    assert pyramid.maps[-1].max() <= 1


def blurred():
    return UNet(widths=SMALL, strides=(4, 2, 1), pooling="blur", smooth=True)


@pytest.mark.parametrize("make", [*NETWORKS.values(), blurred])
def test_the_host_does_not_wait_for_a_device(make, no_host_numbers):
    network, image = make(), images(1, 64, 64)
    with no_host_numbers, torch.no_grad():
        network(image)
