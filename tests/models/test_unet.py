import pytest
import torch
from torch import nn

from gnnet.models.unet import UNet


def convolutions(network):
    return [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]


def test_paper_settings():
    network = UNet()
    assert network.strides == (8, 4, 2, 1)
    assert sorted({c.out_channels for c in convolutions(network)}) == [16, 64, 128, 256, 512, 1024]
    # Encoder 2·5, decoder 2·4 + 4 upsamplings, 4 outputs.
    assert len(convolutions(network)) == 10 + 12 + 4


def test_there_is_no_stage_finer_than_asked_for():
    fine = UNet(widths=(8, 16, 16, 16), strides=(4, 1))
    coarse = UNet(widths=(8, 16, 16, 16), strides=(4,))
    assert len(fine.decoder) == 3
    assert len(coarse.decoder) == 1
    deepest = UNet(widths=(8, 16, 16, 16), strides=(8,))
    assert len(deepest.decoder) == 0
    assert deepest(torch.zeros(1, 3, 16, 16)).maps[0].shape == (1, 16, 2, 2)


@pytest.mark.parametrize("upsampling", ["nearest", "bilinear", "transposed"])
def test_every_parameter_gets_a_gradient(upsampling):
    torch.manual_seed(0)
    network = UNet(widths=(8, 16, 16), channels=4, strides=(2, 1), upsampling=upsampling)
    pyramid = network(torch.rand(2, 3, 16, 16))
    sum((features * torch.rand_like(features)).sum() for features in pyramid.maps).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_checkpointing_keeps_less_and_gives_the_same_gradients():
    gradients, kept = {}, {}
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = UNet(widths=(8, 16, 16), channels=4, strides=(2, 1), pooling="blur", checkpointing=checkpointing)
        images, numbers = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)), []

        def note(saved, numbers=numbers):
            numbers.append(saved.numel())
            return saved

        with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
            total = sum(features.square().square().sum() for features in network(images).maps)
        kept[checkpointing] = sum(numbers)
        total.backward()
        gradients[checkpointing] = {name: p.grad for name, p in network.named_parameters()}
    torch.testing.assert_close(gradients[True], gradients[False], rtol=1e-6, atol=1e-8)
    assert kept[True] < 0.6 * kept[False]  # the stem and what lies between the stages are kept


def test_images_of_a_batch_do_not_mix():
    network = UNet(widths=(8, 16), channels=4, strides=(2, 1)).eval()
    images = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        together, alone = network(images), network(images[1:2])
    for a, b in zip(together.maps, alone.maps, strict=True):
        torch.testing.assert_close(a[1:2], b)


def test_blurred_features_depend_little_on_where_in_the_grid_a_place_lies():
    image = torch.rand(1, 3, 72, 72, generator=torch.Generator().manual_seed(0))

    def change(pooling: str) -> float:
        """Change of the features after a shift by less than the deepest stride, as a share of their variance."""
        torch.manual_seed(0)
        network = UNet(widths=(16, 16, 16, 16), strides=(1,), upsampling="bilinear", pooling=pooling, normalize=False)
        with torch.no_grad():
            here, there = (network(image[..., s : 64 + s, s : 64 + s]).maps[0] for s in (0, 3))
        here, there = here[..., 19:45, 19:45], there[..., 16:42, 16:42]  # the same places, far from the borders
        return float((here - there).var() / here.var())

    assert 0 < change("blur") < change("max") / 2


def test_smooth_maps_hold_no_checkerboard():
    torch.manual_seed(0)
    settings = {"widths": (16, 16, 16), "strides": (2, 1), "normalize": False}
    plain, smooth = UNet(**settings), UNet(**settings, smooth=True)
    smooth.load_state_dict(plain.state_dict())
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for before, after in zip(plain(image).maps, smooth(image).maps, strict=True):
            checkerboard = torch.ones(before.shape[-2:])
            checkerboard[::2] *= -1
            checkerboard[:, ::2] *= -1
            inside = (slice(None), slice(None), slice(4, -4), slice(4, -4))
            share = [(m * checkerboard)[inside].mean((-1, -2)).abs().max() / m.std() for m in (before, after)]
            assert share[1] < 0.3 * share[0]
            torch.testing.assert_close(after.mean(), before.mean(), atol=0.02, rtol=0)


@pytest.mark.parametrize("width", [4, 12, 16, 24, 64, 1024])
def test_narrow_stages_have_few_groups(width):
    norm = next(layer for layer in UNet(widths=(width,), strides=(1,)).modules() if isinstance(layer, nn.GroupNorm))
    assert norm.num_groups <= 32
    assert norm.num_channels // norm.num_groups >= min(8, width)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strides": (1, 2)}, "coarse to fine"),
        ({"strides": (32,)}, r"expected some of \[16, 8, 4, 2, 1\]"),
        ({"strides": (2, 1), "stem_stride": 2}, r"expected some of \[32, 16, 8, 4, 2\]"),
        ({"strides": ()}, "coarse to fine"),
        ({"upsampling": "cubic"}, "expected nearest, bilinear or transposed"),
        ({"pooling": "mean"}, "expected max or blur"),
        ({"stem_stride": 3}, "expected 1, 2 or 4"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        UNet(**settings)
