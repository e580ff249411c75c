import pytest
import torch

from gnnet.losses.term import LevelPair, Term, rows_at, uniform, weighted_mean

from .conftest import make_pair


def test_points_outside_either_map_are_invalid_and_the_rest_are_sampled():
    pair = make_pair()
    xy_a = pair.xy_a.clone()
    xy_a[1, 3] = torch.tensor([-1.0, 3.0])
    xy_b = pair.xy_b.clone()
    xy_b[1, 4] = torch.tensor([3.0, 12.0])
    xy_b[0, 2] = torch.inf  # not valid before, so it may hold anything
    moved = LevelPair.from_maps(pair.map_a, pair.map_b, xy_a=xy_a, xy_b=xy_b, weight=pair.weight, valid=pair.valid)
    expected = pair.valid.clone()
    expected[1, 3:5] = False
    assert torch.equal(moved.valid, expected)
    assert torch.equal(moved.descriptors_a[expected], pair.descriptors_a[expected])
    assert moved.xy_b.isfinite().all()


def test_half_precision_maps_become_float32():
    pair = make_pair()
    half = LevelPair.from_maps(
        pair.map_a.bfloat16(), pair.map_b.bfloat16(),
        xy_a=pair.xy_a.float(), xy_b=pair.xy_b.float(), weight=pair.weight.float(), valid=pair.valid,
    )  # fmt: skip
    assert half.map_a.dtype == half.descriptors_b.dtype == torch.float32


def test_weighted_mean_ignores_invalid_values_even_infinite_ones():
    values = torch.tensor([[1.0, 3.0, torch.inf]], requires_grad=True)
    valid = torch.tensor([[True, True, False]])
    mean = weighted_mean(values, torch.tensor([[1.0, 3.0, 5.0]]), valid)
    mean.backward()
    assert mean.item() == pytest.approx(2.5)
    assert torch.equal(values.grad, torch.tensor([[0.25, 0.75, 0.0]]))


@pytest.mark.parametrize("points", [0, 3])
def test_weighted_mean_of_no_valid_point_is_zero_with_a_graph(points):
    values = torch.ones(2, points, requires_grad=True)
    mean = weighted_mean(values, torch.ones(2, points), torch.zeros(2, points, dtype=torch.bool))
    mean.backward()
    assert mean.item() == 0
    assert torch.equal(values.grad, torch.zeros(2, points))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_rows_at_reads_the_cells_of_its_own_batch_element(memory_format):
    features = torch.randn(2, 3, 4, 5).contiguous(memory_format=memory_format)
    cells = torch.tensor([[[0, 7]], [[19, 7]]])
    rows = rows_at(features, cells)
    assert rows.shape == (2, 1, 2, 3)
    assert torch.equal(rows[1, 0, 0], features[1, :, 3, 4])
    assert torch.equal(rows[0, 0, 1], features[0, :, 1, 2])


def test_weight_starts_late_and_ramps():
    term = Term(weight=2.0, start_step=10, ramp_steps=3)
    assert [term.weight_at(step) for step in (0, 9, 10, 11, 12, 13, 99)] == [0, 0, 0.5, 1.0, 1.5, 2.0, 2.0]
    with pytest.raises(ValueError, match=r"Term.weight is -1"):
        Term(weight=-1)


def test_uniform_follows_its_generator():
    like = torch.zeros(1, dtype=torch.float64)
    draws = [uniform((5,), like=like, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].dtype == torch.float64
