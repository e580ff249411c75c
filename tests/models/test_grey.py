import pytest

from gnnet.models.grey import GreyValues


def test_no_parameters_and_nothing_to_load():
    network = GreyValues()
    assert list(network.parameters()) == []
    assert network.state_dict() == {}


@pytest.mark.parametrize("strides", [(1, 2), (3,), (), (4, 4), (0,)])
def test_impossible_strides_are_refused(strides):
    with pytest.raises(ValueError, match="powers of two, coarse to fine"):
        GreyValues(strides=strides)
