"""The finer map of an enlarged image."""

import pytest
import torch

from gnnet.geometry.interpolation import sample
from gnnet.models.enlarged import Enlarged, enlarged
from gnnet.models.grey import GreyValues
from gnnet.models.unet import UNet
from gnnet.models.weights import fingerprint


def small_unet(**settings):
    torch.manual_seed(0)
    return UNet(widths=(8, 16), channels=(4, 6), strides=(4, 2), stem_stride=2, **settings).eval()


def test_the_added_map_has_a_pixel_where_the_image_has_it():
    """On a ramp of grey, the sample of the finer map at xy / stride is the grey value at xy."""
    x = torch.arange(64, dtype=torch.float64) + 0.5
    pyramid = Enlarged(GreyValues(strides=(4, 2)).double())((x / 64).expand(1, 3, 64, 64))
    xy = torch.tensor([[[20.3, 30.1], [37.0, 16.3]]], dtype=torch.float64)
    assert pyramid.strides == (4, 2, 1)
    value, valid = sample(pyramid.maps[-1], xy)
    assert valid.all()
    torch.testing.assert_close(value[..., 0], xy[..., 0] / 64)


def test_the_other_maps_stay_as_they_were():
    image, network = torch.rand(1, 3, 19, 33), small_unet(confidence=True)
    with torch.no_grad():
        before, after = network(image), Enlarged(network)(image)
    assert all(torch.equal(a, b) for a, b in zip(before.maps, after.maps[:-1], strict=True))
    assert [tuple(c.shape) for c in after.confidences] == [(1, 1, 5, 9), (1, 1, 10, 17), (1, 1, 19, 33)]


def test_a_map_of_the_enlarged_network_is_of_another_network():
    network = small_unet()
    assert fingerprint(network) != fingerprint(Enlarged(network))


@pytest.mark.parametrize("factor", [0, 3, 4, -2])
def test_a_factor_that_the_stride_does_not_allow_is_refused(factor):
    with pytest.raises(ValueError, match=rf"enlarge={factor} for a network whose finest map has stride 2; expected 1"):
        enlarged(small_unet(), factor)


def test_a_factor_of_one_changes_nothing():
    network = small_unet()
    assert enlarged(network, 1) is network
