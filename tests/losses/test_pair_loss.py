import pytest
import torch

from gnnet.data.batches import PairBatch
from gnnet.losses.contrastive import Contrastive
from gnnet.losses.cross_entropy import CrossEntropy
from gnnet.losses.gauss_newton import GaussNewton
from gnnet.losses.levenberg_marquardt import LevenbergMarquardt
from gnnet.losses.pair_loss import PairLoss
from gnnet.losses.term import LevelPair, PyramidPair
from gnnet.models.pyramid import FeaturePyramid

from .conftest import random_map, random_points

STRIDES = (8, 8, 2)
SIZE = 96


def make_inputs(seed=0, batch=2, points=12, dtype=torch.float64, requires_grad=False):
    """Two pyramids of 96×96 images, and their batch."""
    source = torch.Generator().manual_seed(seed)

    def pyramid():
        maps = [
            random_map(source, batch=batch, channels=8, height=SIZE // s, width=SIZE // s, dtype=dtype) for s in STRIDES
        ]
        return FeaturePyramid(tuple(m.requires_grad_(requires_grad) for m in maps), STRIDES)

    keypoints = [random_points(source, batch=batch, points=points, height=SIZE, width=SIZE, margin=22) for _ in "ab"]
    weight = torch.rand(batch, points, generator=source, dtype=torch.float64) + 0.1
    image = torch.zeros(batch, 3, SIZE, SIZE, dtype=torch.uint8)
    valid = torch.ones(batch, points, dtype=torch.bool)
    index = torch.arange(batch)
    keypoints_a, keypoints_b = (xy.to(dtype) for xy in keypoints)
    pairs = PairBatch(image, image, keypoints_a, keypoints_b, weight.to(dtype), valid, index, torch.zeros_like(index))
    return pyramid(), pyramid(), pairs


def all_terms():
    return {
        "dmc": Contrastive(weight=2.0),
        "gn": GaussNewton(weight=0.5),
        "nce": CrossEntropy(weight=0.25, dense_cells=1000, window=4),
    }


def deterministic_terms():
    """Terms without randomness: only the hardest negative, starts at the true point, every cell a candidate."""
    return {
        "dmc": Contrastive(hardest_start=1, hardest_min=1),
        "gn": GaussNewton(vicinity=0.0),
        "nce": CrossEntropy(dense_cells=10**6),
    }


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_total_is_the_weighted_sum_of_means_over_levels_and_directions():
    a, b, batch = make_inputs()
    terms = deterministic_terms()
    terms["gn"].weight = 0.5
    total, parts = PairLoss(terms=terms)(PyramidPair(a, b, batch), step=0)
    expected = 0.0
    for name, term in terms.items():
        losses = []
        for stride, map_a, map_b in zip(STRIDES, a.maps, b.maps, strict=True):
            xy_a, xy_b = batch.keypoints_a / stride, batch.keypoints_b / stride
            common = {"weight": batch.weight, "valid": batch.valid}
            forth = LevelPair.from_maps(map_a, map_b, xy_a=xy_a, xy_b=xy_b, **common)
            back = LevelPair.from_maps(map_b, map_a, xy_a=xy_b, xy_b=xy_a, **common)
            losses.append(sum(term(pair, *term.draw(pair), step=0)[0] for pair in (forth, back)) / 2)
        for level, loss in zip(("stride8", "stride8_2", "stride2"), losses, strict=True):
            torch.testing.assert_close(parts[f"{name}/{level}"], loss)
        torch.testing.assert_close(parts[name], sum(losses) / 3)
        expected = expected + term.weight * sum(losses) / 3
    torch.testing.assert_close(total, expected)
    assert {"gn/converged", "gn/stride2/converged", "dmc/positive", "nce/accuracy"} <= parts.keys()


def test_levels_are_sampled_where_the_pixels_are():
    # Each cell holds its own position in image pixels, so that a level sampled elsewhere would not match.
    maps, (_, _, batch) = [], make_inputs(batch=1)
    for stride in STRIDES:
        centres = (torch.arange(SIZE // stride, dtype=torch.float64) + 0.5) * stride
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        maps.append(torch.stack([x, y])[None])
    shift = torch.tensor([4.0, -6.0], dtype=torch.float64)
    pyramid_a = FeaturePyramid(tuple(maps), STRIDES)
    pyramid_b = FeaturePyramid(tuple(m - shift[:, None, None] for m in maps), STRIDES)
    batch = batch._replace(keypoints_b=batch.keypoints_a + shift)
    loss = PairLoss(terms={"dmc": Contrastive(positive_margin=0.0), "gn": GaussNewton(epsilon=1e-12)})
    _, parts = loss(PyramidPair(pyramid_a, pyramid_b, batch), step=0, generator=generator())
    assert parts["dmc/positive"].item() < 1e-20
    assert parts["gn/step"].item() < 1e-18
    assert parts["gn/converged"].item() == 1


def test_both_directions_have_the_same_weight():
    a, b, batch = make_inputs()
    loss = PairLoss(terms=deterministic_terms())
    swapped = batch._replace(keypoints_a=batch.keypoints_b, keypoints_b=batch.keypoints_a)
    torch.testing.assert_close(loss(PyramidPair(a, b, batch), step=0)[0], loss(PyramidPair(b, a, swapped), step=0)[0])


def test_padding_changes_nothing():
    a, b, batch = make_inputs()
    pad = torch.full((2, 5, 2), torch.nan, dtype=torch.float64)
    padded = batch._replace(
        keypoints_a=torch.cat([batch.keypoints_a, pad], 1),
        keypoints_b=torch.cat([batch.keypoints_b, pad], 1),
        weight=torch.cat([batch.weight, torch.ones(2, 5, dtype=torch.float64)], 1),
        valid=torch.cat([batch.valid, torch.zeros(2, 5, dtype=torch.bool)], 1),
    )
    terms = {**deterministic_terms(), "fine": CrossEntropy(dense_cells=0, window_candidates=0)}
    loss = PairLoss(terms=terms)
    torch.testing.assert_close(loss(PyramidPair(a, b, padded), step=0)[0], loss(PyramidPair(a, b, batch), step=0)[0])


def test_a_batch_is_the_weighted_mean_of_its_pairs():
    a, b, batch = make_inputs()
    loss = PairLoss(terms=deterministic_terms())
    singles = []
    for i in range(2):
        one_a, one_b = (FeaturePyramid(tuple(m[i : i + 1] for m in p.maps), STRIDES) for p in (a, b))
        one = PyramidPair(one_a, one_b, PairBatch(*(field[i : i + 1] for field in batch[:8])))
        singles.append(loss(one, step=0)[0])
    share = batch.weight.sum(1) / batch.weight.sum()
    torch.testing.assert_close(loss(PyramidPair(a, b, batch), step=0)[0], share[0] * singles[0] + share[1] * singles[1])


def test_confidence_weighs_points():
    a, b, batch = make_inputs()
    loss = PairLoss(terms=deterministic_terms())
    only_first = torch.zeros_like(batch.weight)
    only_first[:, 0] = 1
    masked = batch._replace(valid=only_first.bool(), weight=torch.ones_like(batch.weight))
    weighted = loss(PyramidPair(a, b, batch._replace(weight=only_first)), step=0)[0]
    torch.testing.assert_close(weighted, loss(PyramidPair(a, b, masked), step=0)[0])
    assert (weighted - loss(PyramidPair(a, b, batch), step=0)[0]).abs() > 1e-3


def test_one_seed_gives_one_loss():
    a, b, batch = make_inputs()
    loss = PairLoss(terms=all_terms())
    values = [loss(PyramidPair(a, b, batch), step=0, generator=generator(seed))[0].item() for seed in (5, 5, 6)]
    assert values[0] == values[1] != values[2]


def test_gradient_reaches_every_map_and_no_valid_point_is_no_gradient():
    a, b, batch = make_inputs(requires_grad=True)
    loss = PairLoss(terms=all_terms())
    loss(PyramidPair(a, b, batch), step=0, generator=generator())[0].backward()
    for features in (*a.maps, *b.maps):
        assert features.grad.isfinite().all() and features.grad.abs().max() > 0
        features.grad = None
    nothing = batch._replace(valid=torch.zeros_like(batch.valid))
    total, _ = loss(PyramidPair(a, b, nothing), step=0, generator=generator())
    total.backward()
    assert total.item() == 0
    assert all(features.grad.abs().max() == 0 for features in (*a.maps, *b.maps))


def test_bf16_autocast_stays_near_float32():
    a, b, batch = make_inputs(dtype=torch.float32, points=40)
    half_a, half_b = (FeaturePyramid(tuple(m.bfloat16() for m in p.maps), STRIDES) for p in (a, b))
    loss = PairLoss(terms=deterministic_terms())
    exact = loss(PyramidPair(a, b, batch), step=0)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(PyramidPair(a, b, batch), step=0)[0], exact)
        rounded = loss(PyramidPair(half_a, half_b, batch), step=0)[0]
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=3e-2, atol=0)


def test_terms_switch_on_and_levels_are_chosen():
    a, b, batch = make_inputs()
    loss = PairLoss(terms={"dmc": Contrastive(), "gn": GaussNewton(start_step=100)}, levels=[-1])
    _, before = loss(PyramidPair(a, b, batch), step=99)
    _, after = loss(PyramidPair(a, b, batch), step=100)
    assert "gn" not in before and "gn" in after
    assert {key for key in after if key.startswith("dmc/stride")} >= {"dmc/stride2"}
    assert "dmc/stride8" not in after


def test_a_term_counts_on_its_levels_alone():
    a, b, batch = make_inputs()
    terms = {"dmc": Contrastive(hardest_start=1, hardest_min=1), "gn": GaussNewton(vicinity=0.0, levels=[-1])}
    total, parts = PairLoss(terms=terms)(PyramidPair(a, b, batch), step=0)
    assert {key for key in parts if key.startswith("gn/stride")} >= {"gn/stride2"}
    assert "gn/stride8" not in parts and "dmc/stride8" in parts
    torch.testing.assert_close(parts["gn"], parts["gn/stride2"])
    torch.testing.assert_close(total, parts["dmc"] + parts["gn/stride2"])
    # Where the loss uses some levels only, a term counts its positions among these.
    _, parts = PairLoss(terms=terms, levels=[0, 1])(PyramidPair(a, b, batch), step=0)
    assert "gn/stride8_2" in parts and "gn/stride8" not in parts


@pytest.mark.parametrize("levels", [[3], [-4], []])
def test_a_level_that_the_pyramid_lacks_is_explained(levels):
    a, b, batch = make_inputs()
    # At the first step already, although the term does not count yet.
    loss = PairLoss(terms={"dmc": Contrastive(), "gn": GaussNewton(start_step=100, levels=levels)})
    with pytest.raises(ValueError, match=r"loss\.terms\.gn\.levels is .*strides \[8, 8, 2\].*expected some of 0 to 2"):
        loss(PyramidPair(a, b, batch), step=0)


def test_the_parameters_of_a_term_are_trained_and_saved():
    class Scaled(GaussNewton):
        def __post_init__(self):
            super().__post_init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

    loss = PairLoss(terms={"dmc": Contrastive(), "gn": Scaled()})
    assert [name for name, _ in loss.named_parameters()] == list(loss.state_dict()) == ["terms.gn.scale"]


def test_bad_input_is_explained():
    a, b, batch = make_inputs()
    with pytest.raises(ValueError, match=r"terms \(empty\)"):
        PairLoss(terms={})
    with pytest.raises(ValueError, match=r"terms \(gn\) has no term with a weight at step 0"):
        PairLoss(terms={"gn": GaussNewton(start_step=10)})
    with pytest.raises(ValueError, match=r"strides \(8, 8, 2\) and \(8, 2\)"):
        PairLoss(terms={"gn": GaussNewton()})(PyramidPair(a, b.select([0, 2]), batch), step=0)


@pytest.mark.slow
def test_a_compiled_loss_is_two_graphs_although_it_draws_from_a_generator():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def step(pair, source):
        return loss(pair, step=0, generator=source)[0]

    pair = PyramidPair(*make_inputs())
    loss = PairLoss(terms={**all_terms(), "lm": LevenbergMarquardt()}, levels=[2])
    found = torch.compile(step, backend=backend)(pair, generator())
    assert len(graphs) == 2
    torch.testing.assert_close(found, step(pair, generator()))
