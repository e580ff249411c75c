"""The pose loss: what it is worth, its gradient against finite differences, and which pairs take part."""

import pytest
import torch

from gnnet.data.batches import PairBatch, PairGeometry
from gnnet.geometry.pose import Pose, perturb
from gnnet.localization.pose_loss import PoseLoss, reprojection_error
from gnnet.localization.refinement import refine_pose
from gnnet.losses.cross_entropy import CrossEntropy
from gnnet.losses.pair_loss import PairLoss
from gnnet.losses.term import PyramidPair
from gnnet.models.pyramid import FeaturePyramid

from .test_refinement import HEIGHT, MODELS, POINTS, WIDTH, problem


def inputs(*, batch=2, strides=(8, 4), channels=6, models=MODELS):
    """A pyramid, and pairs of two such images from one place: the true pose is the identity."""
    arguments, truth = problem(batch=batch, strides=strides, channels=channels, models=models)
    points, camera = truth.transform(arguments["points"]), arguments["camera"]
    keypoints, _ = camera.project(points)
    geometry = PairGeometry(points, arguments["valid"], camera, Pose.identity(batch, dtype=torch.float64))
    image, ones = torch.zeros(batch, 3, HEIGHT, WIDTH, dtype=torch.uint8), torch.ones(batch, POINTS)
    index = torch.arange(batch)
    pairs = PairBatch(image, image, keypoints, keypoints, ones, ones > 0, index, 0 * index, geometry)
    return arguments["pyramid"], pairs


def compute(term, a, b, batch, seed=0):
    return term(PyramidPair(a, b, batch), step=0, generator=torch.Generator().manual_seed(seed))


def test_a_refined_pose_costs_nothing_and_the_initial_one_costs_pixels():
    pyramid, batch = inputs(batch=4)
    loss, parts = compute(PoseLoss(iterations=30, rotation=1.0, position=0.01), pyramid, pyramid, batch)
    assert parts.keys() == {"pairs", "initial", "stride8", "stride4"}
    assert parts["pairs"] == 1 and 0.2 < parts["initial"] < 3
    assert parts["stride4"] < 1e-4 and loss < 1e-4


def test_an_error_of_many_pixels_costs_almost_as_many():
    _, batch = inputs(batch=1, models=MODELS[:1])
    points, valid, camera, truth = batch.geometry
    turned = perturb(truth, 0.0, 6.0, torch.Generator().manual_seed(0))
    target, _ = camera.project(points)
    distance = (camera.project(turned.transform(points))[0] - target).norm(dim=-1)
    found = reprojection_error(turned, points, valid, camera, target)
    torch.testing.assert_close(found, 2 * ((1 + distance.square() / 4).sqrt() - 1).mean(-1))


@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 1])
def test_gradient_against_finite_differences_with_the_damping(level):
    """Each level's gradient is exact; that of what a coarser level does to a finer one's start is left out."""
    pyramid, batch = inputs(channels=4)
    pyramid, chosen = (pyramid.select([0]), 0) if level == 0 else (pyramid, 1)
    generator = torch.Generator().manual_seed(5)
    along = [torch.randn(pyramid.maps[chosen].shape, generator=generator, dtype=torch.float64) for _ in "ab"]
    term = PoseLoss(iterations=3, rotation=2.0, position=0.02, success=1e6).double()

    def loss(by_a, by_b, theta):
        rows = [theta if i == chosen else torch.zeros_like(theta) for i in range(8)]
        term._parameters["theta"] = torch.stack(rows)
        maps = [list(pyramid.maps), list(pyramid.maps)]
        for side, by, direction in zip(maps, (by_a, by_b), along, strict=True):
            side[chosen] = side[chosen] + by * direction
        a, b = (FeaturePyramid(tuple(side), pyramid.strides) for side in maps)
        return compute(term, a, b, batch)[0]

    at = [torch.tensor(0.02, dtype=torch.float64), torch.tensor(-0.01, dtype=torch.float64)]
    at = [value.requires_grad_() for value in (*at, torch.linspace(-0.05, 0.1, 6, dtype=torch.float64))]
    assert torch.autograd.gradcheck(loss, at, eps=1e-7, atol=1e-6, rtol=1e-4)
    gradients = torch.autograd.grad(loss(*at), at)
    assert all(gradient.abs().max() > 1e-5 for gradient in gradients)


def test_the_confidence_is_trained_by_its_exact_gradient():
    pyramid, batch = inputs(channels=4, strides=(8,))
    generator = torch.Generator().manual_seed(5)
    shape = pyramid.maps[0][:, :1].shape
    along = torch.randn(shape, generator=generator, dtype=torch.float64)
    noisy = pyramid.each(lambda m: m + 0.3 * torch.randn(m.shape, generator=generator, dtype=torch.float64))
    term = PoseLoss(iterations=3, rotation=2.0, position=0.02, learn_damping=False).double()

    def loss(in_reference, in_query):
        a, b = (
            maps._replace(confidences=((value * along).sigmoid(),))
            for maps, value in ((pyramid, in_reference), (noisy, in_query))
        )
        return compute(term, a, b, batch)[0]

    at = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.4, -0.3)]
    assert torch.autograd.gradcheck(loss, at, eps=1e-7, atol=1e-6, rtol=1e-4)
    assert all(gradient.abs() > 1e-4 for gradient in torch.autograd.grad(loss(*at), at))


def test_training_the_loss_lowers_it_and_moves_the_damping():
    pyramid, batch = inputs(batch=2, strides=(8,))
    features = (pyramid.maps[0] + 0.3 * torch.randn(pyramid.maps[0].shape, dtype=torch.float64)).requires_grad_()
    term = PoseLoss(iterations=3, rotation=3.0).double()
    optimizer = torch.optim.Adam([features, *term.parameters()], lr=1e-2)
    losses = []
    for _ in range(15):
        loss, _ = compute(term, pyramid, FeaturePyramid((features,), (8,)), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert (term.damping(1) - 0.01).abs().max() > 1e-3 and not term.theta[1:].any()


def test_pairs_without_known_points_take_no_part():
    pyramid, batch = inputs(batch=3)
    few = batch.geometry.valid.clone()
    few[1, 5:] = False
    alone = PoseLoss(iterations=3)
    loss, parts = compute(alone, pyramid, pyramid, batch._replace(geometry=batch.geometry._replace(valid=few)))
    assert parts["pairs"] == pytest.approx(2 / 3)
    assert loss.isfinite()
    maps = tuple(m.clone().requires_grad_() for m in pyramid.maps)
    confidences = tuple(m[:, :1].detach().sigmoid().requires_grad_() for m in maps)
    pyramid = FeaturePyramid(maps, pyramid.strides, confidences)
    for geometry in (None, batch.geometry._replace(valid=few & False)):
        loss, parts = compute(alone, pyramid, pyramid, batch._replace(geometry=geometry))
        assert loss == 0 and parts["pairs"] == 0 and parts.keys() == {"pairs", "initial", "stride8", "stride4"}
        gradients = torch.autograd.grad(loss, maps + confidences)
        assert not any(gradient.any() for gradient in gradients)


def test_a_fine_level_counts_only_where_the_coarse_one_succeeded():
    term = PoseLoss(success=2.0, clamp=50.0)
    coarse = torch.tensor([1.0, 17.0, 80.0], requires_grad=True)
    fine = torch.tensor([3.0, 5.0, 7.0], requires_grad=True)
    loss = term._staged([coarse, fine], (8, 2))
    assert loss.item() == pytest.approx((1 + 17 + 50 + 3) / 3 / 2)
    loss.backward()
    assert (fine.grad > 0).tolist() == [True, False, False]
    assert (coarse.grad > 0).tolist() == [True, True, False]


def test_beside_other_terms_it_is_added_once_with_its_weight_and_levels():
    pyramid, batch = inputs()
    terms = {"nce": CrossEntropy(weight=0.5), "pose": PoseLoss(weight=0.1, levels=[-1])}
    seeded = torch.Generator().manual_seed(0)
    total, parts = PairLoss(terms=terms)(PyramidPair(pyramid, pyramid, batch), step=0, generator=seeded)
    torch.testing.assert_close(total, 0.5 * parts["nce"] + 0.1 * parts["pose"])
    assert "pose/stride4" in parts and "pose/stride8" not in parts


def test_settings_and_levels_out_of_range_are_named():
    for key in ("rotation", "position", "iterations", "clamp", "success"):
        with pytest.raises(ValueError, match=key):
            PoseLoss(**{key: 0})
    with pytest.raises(ValueError, match="min_points"):
        PoseLoss(min_points=2)
    with pytest.raises(ValueError, match="9 levels"):
        PoseLoss().damping(9)


def test_dampings_as_a_tensor_equal_those_as_a_number():
    arguments, _ = problem(batch=3, strides=(8, 4))
    number = refine_pose(**arguments, initial_damping=1e-3)
    same = refine_pose(**arguments, initial_damping=torch.full((2, 6), 1e-3, dtype=torch.float64))
    assert torch.equal(number.cam_from_world.matrix(), same.cam_from_world.matrix())
    assert torch.equal(number.iterations, same.iterations)
    heavy = torch.full((2, 6), 1e-3, dtype=torch.float64)
    heavy[:, :3] = 100.0  # the camera hardly moves at first
    one = refine_pose(**arguments | {"iterations": 1, "initial_damping": heavy}).cam_from_world
    free = refine_pose(**arguments | {"iterations": 1, "initial_damping": 1e-3}).cam_from_world
    moved, free_moved = (
        (p.translation - arguments["initial"].translation).norm(dim=-1).max().item() for p in (one, free)
    )
    assert moved != free_moved
    with pytest.raises(ValueError, match=r"\(6,\); expected \(2, 6\)"):
        refine_pose(**arguments, initial_damping=torch.ones(6))
