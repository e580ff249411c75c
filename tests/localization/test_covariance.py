"""The covariance of errors that parts of the image share, on maps whose features shift as a whole."""

from __future__ import annotations

import pytest
import torch

from gnnet.geometry.camera import Camera
from gnnet.geometry.interpolation import sample
from gnnet.geometry.pose import Pose
from gnnet.localization import covariance as module
from gnnet.localization.covariance import shared_covariance as of_images
from gnnet.localization.covariance import shared_terms
from gnnet.localization.robust import Robust

SIZE, STRIDE, POINTS, CHANNELS = 128, 2, 600, 8


def problem(shifts: torch.Tensor, seed: int = 0) -> dict:
    """A smooth map, and points whose descriptors were taken `shifts` (16, 16, 2) px away, one a cell of 8 px."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, CHANNELS, SIZE // 8, SIZE // 8, generator=generator)
    features = torch.nn.functional.interpolate(coarse, size=SIZE // STRIDE, mode="bicubic", align_corners=False)
    camera = Camera.from_colmap("PINHOLE", SIZE, SIZE, (100.0, 100.0, 64.0, 64.0), dtype=torch.float64)
    xy = 8 + 112 * torch.rand(POINTS, 2, generator=generator, dtype=torch.float64)
    depth = 2 + 4 * torch.rand(POINTS, 1, generator=generator, dtype=torch.float64)
    cell = (xy / 8).long()
    at = (xy + shifts[cell[:, 1], cell[:, 0]]) / STRIDE
    descriptors, valid = sample(features, at[None].float())
    return {
        "features": features, "stride": STRIDE, "descriptors": descriptors[0], "valid": valid[0],
        "points": camera.unproject(xy)[0] * depth, "camera": camera, "pose": Pose.identity(dtype=torch.float64),
        "robust": Robust(kind="squared"),
    }  # fmt: skip


def shared_covariance(**given) -> torch.Tensor:
    """From one image."""
    return of_images([shared_terms(**given)])


def random_shifts(scale: float, cells: int = 8) -> torch.Tensor:
    """Shifts of root mean square `scale` in pixels, the same within each of `cells`² cells."""
    drawn = torch.randn(cells, cells, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = scale * drawn / drawn.square().mean().sqrt()
    return drawn.repeat_interleave(16 // cells, 0).repeat_interleave(16 // cells, 1)


def test_it_grows_with_the_square_of_the_shifts_and_vanishes_without():
    none = shared_covariance(**problem(random_shifts(0.0)))
    small, large = (shared_covariance(**problem(random_shifts(s))) for s in (0.02, 0.2))
    assert none.shape == (6, 6) and none.dtype == torch.float64 and none.abs().max() < 1e-10
    ratio = large.diagonal() / small.diagonal()
    assert ((ratio > 80) & (ratio < 120)).all()
    assert torch.equal(large, large.mT) and torch.linalg.eigvalsh(large).min() > 0


def test_more_points_do_not_average_a_shared_error_out():
    """Four times as many points, at the same places: independent noise would halve σ, a shared error stays."""
    once = problem(random_shifts(0.1))
    many = once | {name: torch.cat([once[name]] * 4) for name in ("points", "descriptors", "valid")}
    torch.testing.assert_close(shared_covariance(**many), shared_covariance(**once), rtol=1e-4, atol=1e-12)


@pytest.mark.slow
def test_shifts_of_quarters_move_the_pose_as_it_says(monkeypatch):
    """Quarters shifted at random by s pixels move the Gauss-Newton step as far as the covariance for s tells."""
    still, steps, scale = problem(random_shifts(0.0)), [], 0.05
    generator = torch.Generator().manual_seed(2)
    for _ in range(150):
        drawn = scale * torch.randn(2, 2, 2, generator=generator, dtype=torch.float64)
        moved = problem(drawn.repeat_interleave(8, 0).repeat_interleave(8, 1))
        steps.append(first_step(moved))
    steps = torch.stack(steps)
    monkeypatch.setattr(module, "SHARED", 1.0)
    unit = shared_covariance(**problem(random_shifts(scale)))
    lengths = (steps * torch.linalg.solve(unit, steps[..., None]).squeeze(-1)).sum(-1)
    # 6, if slopes by central differences were not a little too flat, so that the shifts seem larger.
    assert 4 < lengths.mean() < 7 and first_step(still).norm() < 1e-6


def first_step(given: dict) -> torch.Tensor:
    """δ of the first Gauss-Newton step on the features, by autograd."""

    def residuals(delta: torch.Tensor) -> torch.Tensor:
        xy, _ = given["camera"].project(given["pose"].retract(delta).transform(given["points"]))
        values, valid = sample(given["features"].double(), xy[None] / STRIDE)
        usable = given["valid"] & valid[0]
        return ((values[0] - given["descriptors"].double()) * usable[:, None]).flatten()

    zero = torch.zeros(6, dtype=torch.float64)
    jacobian = torch.func.jacfwd(residuals)(zero)
    return -torch.linalg.lstsq(jacobian, residuals(zero)[:, None]).solution.squeeze(1)


def test_what_features_do_not_fix_is_infinite():
    given = problem(random_shifts(0.1))
    none = torch.zeros_like(given["valid"])
    assert shared_covariance(**given | {"valid": none}).isinf().all()
    one = {name: given[name][:1].repeat_interleave(50, 0) for name in ("points", "descriptors", "valid")}
    assert shared_covariance(**given | one).isinf().all()  # one point fixes no pose
