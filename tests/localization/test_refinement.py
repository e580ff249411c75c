"""Feature-metric refinement: normal equations against autograd, convergence, masks, failures, derivatives."""

import math
from dataclasses import replace

import pytest
import torch

from gnnet.geometry.camera import Camera
from gnnet.geometry.interpolation import sample
from gnnet.geometry.pose import Pose, exp, perturb, pose_errors
from gnnet.localization.normal_equations import Level, MatchTerm, linearise
from gnnet.localization.refinement import RefinementStatus, _improves, _Rules, refine_pose, sample_descriptors
from gnnet.localization.robust import Robust
from gnnet.models.pyramid import FeaturePyramid

WIDTH, HEIGHT, POINTS = 160, 128, 60
MODELS = [
    ("PINHOLE", [120.0, 118.0, 80.0, 64.0]),
    ("OPENCV", [120.0, 118.0, 78.0, 66.0, -0.12, 0.03, 2e-3, -1e-3]),
    ("SIMPLE_RADIAL", [118.0, 80.0, 64.0, -0.08]),
    ("RADIAL", [121.0, 80.0, 64.0, 0.05, -0.02]),
]


def smooth_map(generator, *, batch, channels, stride, cells=4.0, dtype=torch.float64):
    """Maps (B, C, H, W) of random waves that vary over `cells` cells, L2-normalised over channels."""
    x = torch.arange(WIDTH // stride, dtype=torch.float64) + 0.5
    y = torch.arange(HEIGHT // stride, dtype=torch.float64) + 0.5
    centers = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    frequency = torch.randn(batch, 1, 2, 64, generator=generator, dtype=torch.float64) / cells
    phase = 6.3 * torch.rand(batch, 1, 1, 64, generator=generator, dtype=torch.float64)
    mixing = torch.randn(batch, 1, 64, channels, generator=generator, dtype=torch.float64)
    features = (centers @ frequency + phase).cos() @ mixing
    features = features / features.norm(dim=-1, keepdim=True)
    return features.permute(0, 3, 1, 2).to(dtype)


def problem(*, batch=1, channels=12, strides=(4,), models=MODELS, seed=0, dtype=torch.float64, **settings):
    """Arguments of `refine_pose` for queries that see random points, and the true poses, used for the descriptors."""
    generator = torch.Generator().manual_seed(seed)
    cameras = [Camera.from_colmap(m, WIDTH, HEIGHT, p, dtype) for m, p in (models * batch)[:batch]]
    camera = Camera.stack(cameras)
    truth = perturb(Pose.identity(batch, dtype=dtype), 2.0, 40.0, generator)
    pixels = 20 + torch.rand(batch, POINTS, 2, generator=generator, dtype=torch.float64) * torch.tensor(
        [WIDTH - 40, HEIGHT - 40]
    )
    depth = 4 + 4 * torch.rand(batch, POINTS, 1, generator=generator, dtype=torch.float64)
    points = truth.inverse().transform(camera.unproject(pixels.to(dtype))[0] * depth.to(dtype))
    maps = tuple(smooth_map(generator, batch=batch, channels=channels, stride=s, dtype=dtype) for s in strides)
    pyramid = FeaturePyramid(maps, strides)
    keypoints, seen = camera.project(truth.transform(points))
    assert seen.all()
    descriptors, descriptor_valid = sample_descriptors(pyramid, keypoints)
    arguments = {
        "pyramid": pyramid, "descriptors": descriptors, "descriptor_valid": descriptor_valid, "points": points,
        "valid": torch.ones(batch, POINTS, dtype=torch.bool), "camera": camera,
        "initial": perturb(truth, 0.05, 0.5, generator), **settings,
    }  # fmt: skip
    return arguments, truth


def element(arguments, i):
    """The arguments for one element of the batch."""
    one = slice(i, i + 1)
    pyramid = arguments["pyramid"]
    return arguments | {
        "pyramid": pyramid.each(lambda m: m[one]),
        **({"confidences": tuple(c[one] for c in arguments["confidences"])} if "confidences" in arguments else {}),
        "descriptors": tuple(d[one] for d in arguments["descriptors"]),
        "descriptor_valid": tuple(d[one] for d in arguments["descriptor_valid"]),
        **{key: arguments[key][one] for key in ("points", "valid", "camera", "initial")},
    }


def with_confidences(arguments, *, seed=11):
    """The same with random confidences, smooth in the query."""
    generator, pyramid = torch.Generator().manual_seed(seed), arguments["pyramid"]
    maps = tuple(
        smooth_map(generator, batch=len(m), channels=2, stride=s, dtype=m.dtype)[:, :1].add(1.2).div(2.4)
        for m, s in zip(pyramid.maps, pyramid.strides, strict=True)
    )
    own = tuple(
        0.1 + 0.9 * torch.rand(d.shape[:2], generator=generator, dtype=torch.float64).to(d.dtype)
        for d in arguments["descriptors"]
    )
    return arguments | {"pyramid": pyramid._replace(confidences=maps), "confidences": own}


def level_of(arguments, *, robust=Robust(), gradient="exact", index=0):  # noqa: B008
    pyramid, own = arguments["pyramid"], arguments.get("confidences")
    query = pyramid.confidences and pyramid.confidences[index]
    usable = arguments["valid"] & arguments["descriptor_valid"][index]
    return Level.prepare(
        pyramid.maps[index], pyramid.strides[index], arguments["descriptors"][index], usable,
        arguments["points"], arguments["camera"], robust, gradient, confidences=(query, own and own[index]),
    )  # fmt: skip


@pytest.mark.parametrize("robust", [Robust(), Robust("cauchy", scale=0.05), Robust("huber", scale=0.05)], ids=str)
def test_normal_equations_against_autograd_of_the_whole_residual(robust):
    arguments, _ = problem(batch=2, models=MODELS[1:3])
    pose, level = arguments["initial"], level_of(arguments, robust=robust)
    found = linearise(level, pose)

    def residual(delta):  # [B, N, C]
        moved = Pose(*(exp(delta) @ pose).__dict__.values())
        xy, _ = level.camera.project(moved.transform(level.points))
        return sample(level.features, xy / level.stride)[0] - level.descriptors

    zero = torch.zeros(2, 6, dtype=torch.float64)
    r, jacobian = residual(zero), torch.func.jacrev(residual)(zero)
    for b in range(2):
        keep = found.valid[b]
        rb, jb = r[b, keep], jacobian[b, keep][:, :, b]  # [n, C], [n, C, 6]
        cost, weight = robust.cost_and_weight(rb.square().sum(-1))
        torch.testing.assert_close(found.cost[b, keep], cost)
        torch.testing.assert_close(found.hessian[b], torch.einsum("n,nci,ncj->ij", weight, jb, jb))
        torch.testing.assert_close(found.gradient[b], torch.einsum("n,nci,nc->i", weight, jb, rb))
        torch.testing.assert_close(found.weighted_square[b], (weight * rb.square().sum(-1)).sum())
    # The equations minimize half the summed cost.
    (gradient,) = torch.func.jacrev(
        lambda d: (robust.cost_and_weight(residual(d).square().sum(-1))[0] * found.valid).sum(-1) / 2
    )(zero).unbind(0)[:1]
    torch.testing.assert_close(found.gradient[0], gradient[0])


@pytest.mark.parametrize("shared", [False, True])
def test_confidences_weigh_the_equations_and_are_constant_within_a_step(shared):
    """g is the derivative of half the cost with the confidence frozen, H = Σ c w JᵀJ."""
    robust = Robust("cauchy", scale=0.05)
    plain, _ = problem(batch=2, models=MODELS[1:3])
    arguments = with_confidences(plain)
    if shared:
        one = element(arguments, 0)
        arguments |= {"pyramid": one["pyramid"]}
        plain |= {"pyramid": one["pyramid"]._replace(confidences=None)}
    pose, level = arguments["initial"], level_of(arguments, robust=robust)
    found, unweighted = linearise(level, pose), linearise(level_of(plain, robust=robust), pose)
    xy, _ = level.camera.project(pose.transform(level.points))
    maps = arguments["pyramid"].confidences[0].expand(2, -1, -1, -1)
    c = sample(maps, xy / level.stride)[0][..., 0] * arguments["confidences"][0]
    assert c[found.valid].std() > 0.1
    torch.testing.assert_close(found.confidence[found.valid], c[found.valid])
    assert torch.equal(found.cost, unweighted.cost) and torch.equal(found.weight, unweighted.weight)

    def residual(delta):  # [B, N, C]
        moved, _ = level.camera.project((exp(delta) @ pose).transform(level.points))
        return sample(level.features.expand(2, -1, -1, -1), moved / level.stride)[0] - level.descriptors

    zero = torch.zeros(2, 6, dtype=torch.float64)
    r, jacobian = residual(zero), torch.func.jacrev(residual)(zero)
    weight = c * robust.cost_and_weight(r.square().sum(-1))[1] * found.valid
    for b in range(2):
        jb = jacobian[b][:, :, b]  # [N, C, 6]
        torch.testing.assert_close(found.hessian[b], torch.einsum("n,nci,ncj->ij", weight[b], jb, jb))
    frozen = lambda d: (c * robust.cost_and_weight(residual(d).square().sum(-1))[0] * found.valid).sum() / 2  # noqa: E731
    torch.testing.assert_close(found.gradient, torch.func.jacrev(frozen)(zero))
    torch.testing.assert_close(found.weighted_square, (weight * r.square().sum(-1)).sum(-1))


@pytest.mark.parametrize("matched", [False, True])
def test_confidences_of_one_are_none_and_their_scale_changes_nothing(matched):
    plain, truth = problem(batch=3, strides=(8, 4), robust=Robust("cauchy", scale=0.3))
    if matched:
        plain["matches"] = match_term(plain, truth, noise=0.5)
    plain["descriptors"] = tuple(d + 0.05 * torch.randn(d.shape, dtype=d.dtype) for d in plain["descriptors"])
    expected = refine_pose(**plain)

    def result(query, own):
        pyramid = plain["pyramid"]
        maps = tuple(torch.full_like(m[:, :1], query) for m in pyramid.maps)
        points = tuple(torch.full(d.shape[:2], own, dtype=d.dtype) for d in plain["descriptors"])
        return refine_pose(**plain | {"pyramid": pyramid._replace(confidences=maps), "confidences": points})

    ones, halves = result(1.0, 1.0), result(0.5, 0.25)
    for name, value in expected.__dict__.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(ones, name), value)
            torch.testing.assert_close(getattr(halves, name), value)
    torch.testing.assert_close(ones.cam_from_world.matrix(), expected.cam_from_world.matrix())
    torch.testing.assert_close(halves.cam_from_world.matrix(), expected.cam_from_world.matrix())


def test_points_of_little_confidence_do_not_disturb_and_a_batch_is_its_elements_one_by_one():
    arguments, truth = problem(batch=4, strides=(8, 4))
    wrong = torch.rand(POINTS, generator=torch.Generator().manual_seed(1)) < 0.4
    generator = torch.Generator().manual_seed(2)
    noise = [torch.randn(d.shape, generator=generator, dtype=d.dtype) for d in arguments["descriptors"]]
    arguments["descriptors"] = tuple(
        torch.where(wrong[:, None], n / n.norm(dim=-1, keepdim=True), d)
        for d, n in zip(arguments["descriptors"], noise, strict=True)
    )
    weighted = with_confidences(arguments)
    weighted["confidences"] = tuple(torch.where(wrong, 1e-4, c) for c in weighted["confidences"])
    result = refine_pose(**weighted)
    assert max(pose_errors(result.cam_from_world, truth)[0]) < 1e-3
    assert max(pose_errors(refine_pose(**arguments).cam_from_world, truth)[0]) > 1e-2
    for i in range(4):  # which stop at different steps
        alone = refine_pose(**element(weighted, i))
        torch.testing.assert_close(alone.cam_from_world[0].matrix(), result.cam_from_world[i].matrix())
        assert alone.iterations[0] == result.iterations[i]


def test_chunks_of_points_do_not_change_the_equations(monkeypatch):
    from gnnet.localization import normal_equations

    arguments, _ = problem(batch=3)
    whole = linearise(level_of(arguments), arguments["initial"])
    for values in (12 * 12 * 7, 12 * 12 * POINTS, 12 * 12 * 2 * POINTS):  # 7 points, one element, two elements
        monkeypatch.setitem(normal_equations._VALUES_AT_ONCE, "cpu", values)
        for a, b in zip(whole, linearise(level_of(arguments), arguments["initial"]), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gradient", ["central", "exact", "sobel", "bicubic"])
def test_converges_to_the_truth_in_a_batch_of_mixed_cameras(gradient):
    arguments, truth = problem(batch=4, strides=(8, 4), gradient=gradient, step_degrees=1e-5, step_stds=0.0)
    result = refine_pose(**arguments)
    position, rotation = pose_errors(result.cam_from_world, truth)
    assert result.converged.all(), [result.reason(i) for i in range(4)]
    limit = 0.02 if gradient == "bicubic" else 1e-5  # the descriptors are bilinear samples
    assert position.max() < limit and rotation.max() < 100 * limit
    assert (result.final_cost < result.initial_cost).all()
    assert result.cam_from_world.dtype == result.covariance.dtype == torch.float64


def test_float32_is_accurate_to_a_tenth_of_a_millimetre():
    arguments, truth = problem(batch=4, dtype=torch.float32)
    position, rotation = pose_errors(refine_pose(**arguments).cam_from_world, truth)
    assert position.max() < 2e-4 and rotation.max() < 2e-3


def test_a_batch_gives_the_same_as_its_elements_one_by_one():
    arguments, truth = problem(batch=5, strides=(8, 4), robust=Robust("cauchy", scale=0.3))
    generator = torch.Generator().manual_seed(3)
    distance = torch.tensor([0.0, 0.01, 0.8, 0.1, 0.4], dtype=torch.float64)
    arguments["initial"] = perturb(truth, distance, 4 * distance, generator)
    batch = refine_pose(**arguments)
    assert len(set(batch.iterations.tolist())) > 2  # so that finished ones are removed
    for i in range(5):
        one = refine_pose(**element(arguments, i))
        for name in ("status", "iterations", "valid_count", "initial_cost", "final_cost", "covariance"):
            torch.testing.assert_close(getattr(batch, name)[i], getattr(one, name)[0], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(batch.cam_from_world.matrix()[i], one.cam_from_world.matrix()[0])


def test_one_map_may_serve_many_initial_poses():
    arguments, truth = problem()
    generator = torch.Generator().manual_seed(1)
    starts = Pose.stack([perturb(truth[0], 0.02 * i, 0.1 * i, generator) for i in range(4)])
    four = {key: arguments[key][[0] * 4] for key in ("points", "valid", "camera")}
    for key in ("descriptors", "descriptor_valid"):
        four[key] = tuple(x.expand(4, *x.shape[1:]) for x in arguments[key])
    pyramid = arguments["pyramid"]
    expanded = pyramid._replace(maps=tuple(m.expand(4, -1, -1, -1) for m in pyramid.maps))
    copied = pyramid._replace(maps=tuple(m.repeat(4, 1, 1, 1) for m in pyramid.maps))
    shared, views, copies = (
        refine_pose(**arguments | four | {"initial": starts, "pyramid": p}) for p in (pyramid, expanded, copied)
    )
    assert len(set(shared.iterations.tolist())) > 1
    for other in (views, copies):
        torch.testing.assert_close(shared.cam_from_world.matrix(), other.cam_from_world.matrix())
        torch.testing.assert_close(shared.iterations, other.iterations)


def test_gauss_newton_converges_from_near():
    arguments, truth = problem(batch=3, initial_damping=0.0)
    result = refine_pose(**arguments)
    assert result.converged.all()
    assert pose_errors(result.cam_from_world, truth)[0].max() < 1e-4


def test_inference_mode_and_autograd_give_the_same_numbers():
    arguments, _ = problem(batch=4, strides=(8, 4))
    with torch.inference_mode():
        fast = refine_pose(**arguments)
    maps = tuple(m.clone().requires_grad_() for m in arguments["pyramid"].maps)
    unrolled = refine_pose(**arguments | {"pyramid": arguments["pyramid"]._replace(maps=maps)})
    assert unrolled.cam_from_world.translation.requires_grad and not unrolled.covariance.requires_grad
    for name in ("status", "iterations", "valid_count", "initial_cost", "final_cost", "covariance"):
        torch.testing.assert_close(getattr(fast, name), getattr(unrolled, name), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fast.cam_from_world.matrix(), unrolled.cam_from_world.matrix(), rtol=0, atol=1e-12)


def test_derivatives_of_the_unrolled_steps():
    arguments, truth = problem(channels=5, iterations=3, step_degrees=0.0, step_stds=0.0, gradient_tolerance=0.0)
    features, descriptors = arguments["pyramid"].maps[0], arguments["descriptors"][0]
    generator = torch.Generator().manual_seed(5)
    along_map = torch.randn(features.shape, generator=generator, dtype=torch.float64)
    along_descriptors = torch.randn(descriptors.shape, generator=generator, dtype=torch.float64)

    def error(by_map, by_descriptors, by_start):
        result = refine_pose(
            **arguments | {
                "pyramid": FeaturePyramid((features + by_map * along_map,), (4,)),
                "descriptors": (descriptors + by_descriptors * along_descriptors,),
                "initial": arguments["initial"].retract(by_start * torch.ones(1, 6, dtype=torch.float64)),
            }
        )  # fmt: skip
        moved = result.cam_from_world.matrix() - truth.matrix()
        return torch.stack([moved.square().sum(), result.final_cost.sum(), moved[0, 0, 3]])

    at = [torch.tensor(1e-3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(error, at, eps=1e-7, atol=1e-6, rtol=1e-4)


def test_gradients_stay_finite_beside_failed_elements():
    arguments, _ = problem(batch=4)
    features = arguments["pyramid"].maps[0].clone()
    features[1] = 0.5  # singular
    arguments["valid"][2] = False  # too few
    arguments["points"][3, :5] = torch.nan
    arguments["descriptors"][0][3, 5:8] = torch.inf
    features.requires_grad_()
    result = refine_pose(**arguments | {"pyramid": FeaturePyramid((features,), (4,))})
    status = [RefinementStatus(s) for s in result.status.tolist()]
    assert status[1:3] == [RefinementStatus.SINGULAR, RefinementStatus.TOO_FEW_POINTS]
    assert result.converged.tolist() == [True, False, False, True]
    (gradient,) = torch.autograd.grad(result.cam_from_world.matrix()[[0, 3]].sum(), features)
    assert gradient.isfinite().all() and gradient[0].any() and gradient[3].any() and not gradient[1:3].any()


def test_failures_are_named_and_leave_the_others_alone():
    arguments, _ = problem(batch=6, models=MODELS[:1])
    alone = refine_pose(**element(arguments, 0))
    arguments["valid"][1, 7:] = False
    turn = exp(torch.tensor([0, 0, 0, 0, math.pi, 0], dtype=torch.float64))
    initial = arguments["initial"].matrix()
    initial[2] = (turn @ arguments["initial"][2]).matrix()  # all behind the camera
    initial[5] = torch.nan
    arguments["initial"] = Pose.from_matrix(initial)
    arguments["pyramid"].maps[0][3] = 0.25  # a constant map
    arguments["pyramid"].maps[0][4] = torch.nan
    with torch.inference_mode():
        result = refine_pose(**arguments)
    few = RefinementStatus.TOO_FEW_POINTS
    assert result.status.tolist()[1:] == [few, few, RefinementStatus.SINGULAR, few, few]
    assert result.reason(1) == "7 valid points, 12 needed"
    assert result.reason(2) == "0 valid points, 12 needed"
    assert "six degrees of freedom" in result.reason(3)
    assert result.reason(0).startswith("converged")
    torch.testing.assert_close(result.cam_from_world.matrix()[1:5], initial[1:5], rtol=0, atol=0)
    torch.testing.assert_close(result.cam_from_world.matrix()[0], alone.cam_from_world.matrix()[0])
    assert result.initial_cost[2].isinf() and result.final_cost[2].isinf()
    assert result.covariance[1:].isinf().any((1, 2)).tolist() == [False, True, True, True, True]
    assert not result.covariance.isnan().any()


def test_features_that_vary_along_one_direction_only_are_singular():
    arguments, _ = problem()
    stripes = arguments["pyramid"].maps[0][:, :, :1].expand(-1, -1, HEIGHT // 4, -1).contiguous()
    arguments["pyramid"] = FeaturePyramid((stripes,), (4,))
    arguments["points"][..., 2] = 5.0
    arguments["initial"] = Pose.identity(1, dtype=torch.float64)
    arguments["points"][..., :2] = torch.rand(1, POINTS, 2, dtype=torch.float64) * 3 - 1.5
    result = refine_pose(**arguments)
    assert result.status.item() == RefinementStatus.SINGULAR and result.covariance.isinf().all()


def test_too_few_points_at_a_coarse_level_only_skips_that_level():
    arguments, truth = problem(strides=(8, 4))
    coarse, fine = arguments["descriptor_valid"]
    result = refine_pose(**arguments | {"descriptor_valid": (coarse & False, fine)})
    assert result.converged.all() and pose_errors(result.cam_from_world, truth)[0] < 1e-3


def test_only_points_seen_before_and_after_judge_a_step():
    rules = _Rules(False, min_points=12, step_degrees=0, step_stds=0, gradient_tolerance=0)
    arguments, _ = problem()
    current = linearise(level_of(arguments), arguments["initial"])
    current = current._replace(confidence=current.confidence[:, :30])

    def improves(cost_before, cost_after, seen_before, seen_after, current=current):
        before, after = (torch.tensor([x], dtype=torch.float64) for x in (cost_before, cost_after))
        seen = [torch.tensor([x]) for x in (seen_before, seen_after)]
        xy = torch.zeros(1, 30, 2, dtype=torch.float64)
        return _improves(
            current._replace(cost=before * seen[0], valid=seen[0], xy=xy),
            current._replace(cost=after * seen[1], valid=seen[1], xy=xy + 5),  # too far for the gradient to judge
            rules,
        ).item()

    every, some = [True] * 30, [True] * 20 + [False] * 10
    assert improves([1.0] * 30, [0.9] * 30, every, every)
    # Losing bad points lowers the sum and the mean, gaining good ones lowers the mean; the common points became worse.
    assert not improves([1.0] * 20 + [9.0] * 10, [1.1] * 30, every, some)
    assert not improves([1.0] * 30, [1.1] * 20 + [0.0] * 10, some, every)
    assert improves([1.0] * 30, [0.9] * 20 + [9.0] * 10, some, every)
    # By the confidences before the step: moving to where they are small is no improvement.
    doubted = torch.where(torch.arange(30) < 15, 1.0, 0.1)[None].double()
    weighted = current._replace(confidence=doubted)
    assert improves([1.0] * 30, [0.9] * 15 + [1.5] * 15, every, every, weighted)
    assert not improves([1.0] * 30, [0.9] * 15 + [1.5] * 15, every, every)
    # More than half the points are lost, or fewer are left than are needed.
    assert not improves([1.0] * 30, [0.1] * 30, every, [True] * 14 + [False] * 16)
    assert not improves([1.0] * 30, [0.1] * 30, some, [True] * 11 + [False] * 19)


def test_distortion_belongs_in_the_projection():
    arguments, truth = problem(models=MODELS[1:2])
    camera = arguments["camera"]
    ignored = replace(camera, parameters=camera.parameters * torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]))
    with_it = pose_errors(refine_pose(**arguments).cam_from_world, truth)[0].item()
    without = pose_errors(refine_pose(**arguments | {"camera": ignored}).cam_from_world, truth)[0].item()
    assert with_it < 1e-3 < 1e-2 < without


def test_robust_cost_withstands_wrong_descriptors():
    errors = []
    for robust in (Robust(), Robust("geman_mcclure", scale=0.1)):
        arguments, truth = problem(batch=2, robust=robust)
        descriptors = arguments["descriptors"][0]
        descriptors[:, ::4] = descriptors[:, ::4].roll(1, 1)
        errors.append(pose_errors(refine_pose(**arguments).cam_from_world, truth)[0].max().item())
    assert errors[1] < 1e-3 and errors[1] < errors[0] / 10


def test_bfloat16_features_under_autocast():
    arguments, truth = problem(batch=2, channels=32, dtype=torch.float32)
    half = {
        "pyramid": arguments["pyramid"]._replace(maps=tuple(m.bfloat16() for m in arguments["pyramid"].maps)),
        "descriptors": tuple(d.bfloat16() for d in arguments["descriptors"]),
    }
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole, rounded = refine_pose(**arguments), refine_pose(**arguments | half)
    torch.testing.assert_close(
        whole.cam_from_world.matrix(), refine_pose(**arguments).cam_from_world.matrix(), rtol=0, atol=0
    )
    assert rounded.cam_from_world.dtype == torch.float32
    assert pose_errors(rounded.cam_from_world, truth)[0].max() < 0.01


@pytest.mark.parametrize("confident", [False, True])
def test_covariance_agrees_with_the_scatter_of_noisy_estimates(confident):
    """With confidences where the noise's variance is σ²/c."""
    sigma, draws = 0.02, 200
    arguments, truth = problem(channels=16)
    generator = torch.Generator().manual_seed(11)
    noise = sigma * torch.randn(draws, POINTS, 16, generator=generator, dtype=torch.float64)
    many = {key: arguments[key][[0] * draws] for key in ("points", "valid", "camera", "initial")}
    if confident:
        confidence = 0.05 + 0.95 * torch.rand(POINTS, generator=generator, dtype=torch.float64)
        noise = noise / confidence[:, None].sqrt()
        many |= {"confidences": (0.3 * confidence.expand(draws, -1),)}  # of any scale
    many |= {
        "descriptors": (arguments["descriptors"][0] + noise,),
        "descriptor_valid": (arguments["descriptor_valid"][0].expand(draws, -1),),
    }
    result = refine_pose(**arguments | many)
    # Noise moves the minimum of the interpolated cost away from the zero of the gradient; that must not stall it.
    assert result.converged.all()
    # exp(δ) · estimate = truth: δ to first order, and its squared Mahalanobis length, whose mean is 6.
    error = truth[[0] * draws] @ result.cam_from_world.inverse()
    skew = (error.rotation - error.rotation.transpose(-1, -2)) / 2
    delta = torch.cat([error.translation, torch.stack([skew[:, 2, 1], skew[:, 0, 2], skew[:, 1, 0]], -1)], -1)
    chi2 = (delta[:, None] @ torch.linalg.solve(result.covariance, delta[..., None])).mean()
    assert 4.5 < chi2.item() < 7.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"descriptors": ()}, "1 maps and 1 strides, with 0 levels of descriptors"),
        (lambda a: {"valid": a["valid"][:, :-1]}, r"valid has shape \(2, 59\); expected \(2, 60\)"),
        (lambda a: {"descriptors": (a["descriptors"][0][..., 1:],)}, r"descriptors\[0\] has shape \(2, 60, 11\)"),
        (lambda a: {"camera": a["camera"][0]}, r"camera has shape \(\); expected \(2,\)"),
        (lambda a: {"confidences": ()}, "0 levels of confidences for a pyramid of 1 maps"),
        (lambda a: {"confidences": (a["valid"][:, 1:],)}, r"confidences\[0\] has shape \(2, 59\)"),
        (
            lambda a: {"pyramid": a["pyramid"]._replace(confidences=a["pyramid"].maps)},
            r"pyramid\.confidences\[0\] has shape \(2, 12, 32, 40\); expected \(2, 1, 32, 40\)",
        ),
        (lambda a: {"iterations": (5, 5)}, "one count for each of 1 levels"),
        (lambda a: {"min_points": 2}, "min_points >= 3"),
        (lambda a: {"initial_damping": -1.0}, "found 12 and -1.0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments, _ = problem(batch=2)
    with pytest.raises(ValueError, match=message):
        refine_pose(**arguments | change(arguments))


# --- matches beside the features


def match_term(arguments, truth, *, count=30, noise=0.0, weight=0.1, seed=7) -> MatchTerm:
    """Matches of new points, seen by the cameras at the true poses, with errors of `noise` pixels."""
    generator = torch.Generator().manual_seed(seed)
    camera, batch = arguments["camera"], len(arguments["points"])
    xy = 20 + torch.rand(batch, count, 2, generator=generator, dtype=torch.float64) * torch.tensor([120.0, 88.0])
    depth = 4 + 4 * torch.rand(batch, count, 1, generator=generator, dtype=torch.float64)
    points = truth.inverse().transform(camera.unproject(xy)[0] * depth)
    xy = xy + noise * torch.randn(xy.shape, generator=generator, dtype=torch.float64)
    return MatchTerm(points, xy, torch.full((batch, count), weight).double(), Robust("cauchy", 1.0))


def test_normal_equations_of_matches_against_autograd():
    arguments, truth = problem(batch=3)
    matches = match_term(arguments, truth, noise=1.0)
    matches.weight[1, 5:] = 0  # padding
    level, pose = level_of(arguments), arguments["initial"]
    without, found = linearise(level, pose), linearise(replace(level, matches=matches), pose)

    def errors(delta):  # [B, M, 2]
        moved = Pose(*(exp(delta) @ pose).__dict__.values())
        return arguments["camera"].project(moved.transform(matches.points))[0] - matches.keypoints

    zero = torch.zeros(3, 6, dtype=torch.float64)
    r, jacobian = errors(zero), torch.func.jacrev(errors)(zero)
    cost, weight = matches.robust.cost_and_weight(r.square().sum(-1))
    for b in range(3):
        j, w = jacobian[b][:, :, b], (weight * matches.weight)[b]
        torch.testing.assert_close(found.hessian[b] - without.hessian[b], torch.einsum("n,nci,ncj->ij", w, j, j))
        torch.testing.assert_close(found.gradient[b] - without.gradient[b], torch.einsum("n,nci,nc->i", w, j, r[b]))
        torch.testing.assert_close(found.cost[b, POINTS:], (cost * matches.weight)[b])
    assert found.valid[:, POINTS:].sum(-1).tolist() == [30, 5, 30]
    minimized = lambda d: (matches.robust.cost_and_weight(errors(d).square().sum(-1))[0] * matches.weight).sum() / 2  # noqa: E731
    torch.testing.assert_close(found.gradient - without.gradient, torch.func.jacrev(minimized)(zero))


def test_exact_matches_fix_a_pose_that_the_features_cannot_and_refine_in_a_batch_as_alone():
    arguments, truth = problem(batch=3, step_degrees=1e-6, step_stds=0.0)
    flat = tuple(torch.zeros_like(m) for m in arguments["pyramid"].maps)
    nothing = arguments | {
        "pyramid": FeaturePyramid(flat, arguments["pyramid"].strides),
        "descriptors": tuple(torch.zeros_like(d) for d in arguments["descriptors"]),
    }
    matches = match_term(arguments, truth)
    alone = refine_pose(**nothing)
    assert (alone.status == RefinementStatus.SINGULAR).all()
    found = refine_pose(**nothing, matches=matches)
    position, rotation = pose_errors(found.cam_from_world, truth)
    assert position.max() < 1e-6 and rotation.max() < 1e-5
    noisy = match_term(arguments, truth, noise=1.0)
    batch = refine_pose(**arguments, matches=noisy)
    for i in range(3):
        one = refine_pose(**element(arguments, i), matches=noisy[slice(i, i + 1)])
        torch.testing.assert_close(batch.cam_from_world.matrix()[i], one.cam_from_world.matrix()[0])
    between = pose_errors(batch.cam_from_world, truth)[0]  # exact features hold it against noisy matches
    assert (between < pose_errors(refine_pose(**nothing, matches=noisy).cam_from_world, truth)[0]).all()


@pytest.mark.parametrize("unit", [1e3, 1e-3])
def test_the_world_unit_changes_nothing_but_the_unit(unit):
    arguments, _ = problem(batch=4, strides=(8, 4), robust=Robust("cauchy", scale=0.3))
    scaled = arguments | {
        "points": arguments["points"] * unit,
        "initial": Pose(arguments["initial"].rotation, arguments["initial"].translation * unit),
    }
    found, other = refine_pose(**arguments), refine_pose(**scaled)
    assert torch.equal(found.iterations, other.iterations) and torch.equal(found.status, other.status)
    torch.testing.assert_close(found.cam_from_world.rotation, other.cam_from_world.rotation)
    torch.testing.assert_close(found.cam_from_world.translation, other.cam_from_world.translation / unit)


def test_costs_are_compared_over_the_points_that_count_at_both_poses():
    """A point that leaves the image on the way takes its cost out of both, not out of one."""
    arguments, truth = problem(seed=2)
    initial = arguments["initial"]
    # One more point, of the worst descriptor, that the camera sees at the initial pose alone.
    camera = arguments["camera"]
    for side in torch.cartesian_prod(torch.tensor([2.5, WIDTH - 2.5]), torch.linspace(2.5, HEIGHT - 2.5, 30)).double():
        point = initial.inverse().transform(camera.unproject(side[None, None])[0] * 4)
        xy, valid = camera.project(truth.transform(point))
        inside = (xy > 2).all() and (xy < torch.tensor([WIDTH - 2, HEIGHT - 2])).all()
        if not (inside and valid):
            break
    else:
        raise AssertionError("no such point")
    more = arguments | {
        "points": torch.cat([arguments["points"], point], 1),
        "descriptors": tuple(torch.cat([d, -10 * d[:, :1]], 1) for d in arguments["descriptors"]),
        "descriptor_valid": tuple(torch.cat([v, v[:, :1]], 1) for v in arguments["descriptor_valid"]),
        "valid": torch.ones(1, POINTS + 1, dtype=torch.bool),
    }
    without, found = refine_pose(**arguments), refine_pose(**more, robust=Robust("cauchy", scale=0.01))
    assert pose_errors(found.cam_from_world, without.cam_from_world)[0] < 1e-2
    assert found.initial_cost < without.initial_cost + 0.01 and (found.cost_noise > 0).all()


def test_the_host_copies_nothing_to_the_device_as_elements_stop(no_host_numbers):
    arguments, truth = problem(batch=4, strides=(8, 4), dtype=torch.float32)
    far = perturb(truth, 0.2, 2.0, torch.Generator().manual_seed(3))
    mixed = torch.tensor([True, False, True, False])  # those that start at the truth stop at once
    arguments["initial"] = Pose(
        torch.where(mixed[:, None, None], truth.rotation, far.rotation),
        torch.where(mixed[:, None], truth.translation, far.translation),
    )
    with no_host_numbers, torch.no_grad():
        found = refine_pose(**arguments)
    assert found.iterations.unique().numel() > 1
    alone = [refine_pose(**one_of(arguments, i)).cam_from_world.translation for i in range(4)]
    torch.testing.assert_close(found.cam_from_world.translation, torch.cat(alone), atol=1e-5, rtol=0)


def one_of(arguments: dict, i: int) -> dict:
    """The arguments of one element of a batch."""
    pyramid = arguments["pyramid"]
    return arguments | {
        "pyramid": pyramid._replace(maps=tuple(m[i : i + 1] for m in pyramid.maps)),
        **{key: tuple(x[i : i + 1] for x in arguments[key]) for key in ("descriptors", "descriptor_valid")},
        **{key: arguments[key][i : i + 1] for key in ("points", "valid")},
        "camera": arguments["camera"][i : i + 1],
        "initial": arguments["initial"][i : i + 1],
    }
