"""Clusters of covisible references, and which refined pose is taken."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from gnnet.data.batches import Matches
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose, perturb, pose_errors
from gnnet.localization.hypotheses import (
    COST_TOLERANCE,
    ERROR_TOLERANCE,
    ERROR_TOLERANCE_OF_FEW,
    Hypothesis,
    choose_hypothesis,
    covisibility_clusters,
    pose_hypotheses,
)
from gnnet.localization.map import Observations
from gnnet.localization.pnp import PoseSolver
from gnnet.localization.refinement import Refinement, RefinementStatus
from gnnet.localization.result import Localization, Status
from gnnet.localization.rig import Matched, Rig

CAMERA = Camera.from_colmap("PINHOLE", 640, 480, (500.0, 500.0, 320.0, 240.0), dtype=torch.float64)
TRUTH = Pose(torch.eye(3, dtype=torch.float64), torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64))


def observe(reference: list[int], seed: int = 0) -> tuple[Observations, torch.Tensor]:
    """Observations of references (M,), and where the camera at TRUTH sees their points (M, 2)."""
    generator = torch.Generator().manual_seed(seed)
    xy = torch.rand(len(reference), 2, generator=generator, dtype=torch.float64) * CAMERA.size
    depth = 3 + 5 * torch.rand(len(reference), 1, generator=generator, dtype=torch.float64)
    points = TRUTH.inverse().transform(CAMERA.unproject(xy)[0] * depth)
    nothing = torch.zeros(len(reference))
    return Observations(points, nothing, nothing, (), nothing, torch.tensor(reference)), xy


def matched(xy: torch.Tensor, kept: torch.Tensor | None = None) -> Matches:
    return Matches(xy, torch.zeros(len(xy)), torch.ones(len(xy), dtype=torch.bool) if kept is None else kept)


def in_one_image(matches: Matches, observations: Observations, camera: Camera = CAMERA) -> Matched:
    return Matched.of([matches], [observations], Rig.of(camera))


def references_of(hypothesis: Hypothesis, matched: Matched) -> list[int]:
    """Of what the pose was sought from."""
    return matched.observations.reference[hypothesis.used].unique().tolist()


def components(shared: np.ndarray, minimum: int) -> set[frozenset[int]]:
    """By joining sets until nothing changes."""
    sets = [{i} for i in range(len(shared))]
    for a, b in itertools.combinations(range(len(shared)), 2):
        if max(shared[a, b], shared[b, a]) >= minimum:
            first, second = (next(s for s in sets if x in s) for x in (a, b))
            if first is not second:
                sets.remove(second)
                first |= second
    return {frozenset(s) for s in sets}


@pytest.mark.parametrize("seed", range(20))
def test_clusters_are_the_connected_components(seed):
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, 12))
    shared = generator.integers(0, 30, (count, count)) * (generator.random((count, count)) < 0.15)
    shared = np.maximum(shared, shared.T)
    np.fill_diagonal(shared, 0)
    for minimum in (1, 10):
        found = covisibility_clusters(torch.from_numpy(np.where(shared >= minimum, shared, 0)))
        assert {frozenset(c.tolist()) for c in found} == components(shared, minimum)
        assert sum(map(len, found)) == count


def test_one_pose_a_cluster_those_with_most_inliers_first():
    """References 4 and 9 see what the query sees; 2 and 6 another place, where 30 chance matches agree on nothing."""
    reference = [4] * 20 + [9] * 25 + [2] * 30 + [6] * 60
    observations, xy = observe(reference)
    rows = torch.tensor([2, 4, 6, 9])
    shared = torch.zeros(4, 4, dtype=torch.int64)
    shared[1, 3] = shared[3, 1] = 5
    wrong = torch.isin(observations.reference, torch.tensor([2]))
    generator = torch.Generator().manual_seed(1)
    xy[wrong] = torch.rand(30, 2, generator=generator, dtype=torch.float64) * CAMERA.size
    other = observations.reference == 6  # as a second camera 3 m aside sees it
    moved = Pose(TRUTH.rotation, TRUTH.translation + torch.tensor([3.0, 0, 0]))
    xy[other] = CAMERA.project(moved.transform(observations.points[other]))[0]
    kept = torch.ones(len(reference), dtype=torch.bool)
    kept[:5] = False
    there = in_one_image(matched(xy, kept), observations)
    found = pose_hypotheses(there, shared, rows, PoseSolver())
    assert [references_of(h, there) for h in found] == [[6], [4, 9], [2]]
    assert [h.count for h in found] == [60, 40, 0]
    assert found[2].cam_from_world is None and not found[2].inliers.any() and found[2].reason
    for hypothesis, truth in zip(found, (moved, TRUTH), strict=False):
        position, rotation = pose_errors(hypothesis.cam_from_world, truth)
        assert position < 1e-6 and rotation < 1e-6
    assert torch.equal(found[1].inliers, kept & torch.isin(observations.reference, torch.tensor([4, 9])))


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_poses_far_from_the_origin_are_as_good(offset):
    observations, xy = observe([0] * 60)
    xy += 0.5 * torch.randn(60, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    shift = offset * torch.tensor([1.0, -0.7, 0.2], dtype=torch.float64)
    far = observations._replace(points=observations.points + shift)
    one = torch.zeros(1, 1, dtype=torch.int64)
    near, found = (
        pose_hypotheses(in_one_image(matched(xy), o), one, torch.tensor([0]), PoseSolver())[0]
        for o in (observations, far)
    )
    back = Pose(found.cam_from_world.rotation, found.cam_from_world.transform(shift[None])[0])
    position, rotation = pose_errors(back, near.cam_from_world)
    assert found.count == near.count == 60 and position < 1e-4 and rotation < 1e-3


# --- the choice among refined poses


def refinement(poses, initial, final, status=RefinementStatus.CONVERGED_STEP, noise=0.0) -> Refinement:
    count = len(poses)
    status = [status] * count if isinstance(status, RefinementStatus) else status
    whole = torch.ones(count, dtype=torch.int64)
    return Refinement(
        Pose.stack(poses), torch.tensor([int(s) for s in status]), torch.tensor(initial), torch.tensor(final),
        torch.full((count,), noise), whole, whole, torch.arange(count)[:, None, None] * torch.ones(6, 6), 12,
    )  # fmt: skip


class Case:
    """Two clusters of 40 and 30 matches; each has its own initial pose."""

    def __init__(self) -> None:
        self.observations, xy = observe([1] * 40 + [2] * 30)
        self.matches = matched(xy)
        generator = torch.Generator().manual_seed(0)
        self.starts = [perturb(TRUTH, 0.01, 0.1, generator) for _ in range(2)]
        self.hypotheses = []
        for row, count, start in zip((1, 2), (40, 30), self.starts, strict=True):
            mine, rows = self.observations.reference == row, torch.tensor([row])
            self.hypotheses.append(Hypothesis(start, mine, rows, mine, count, f"start {row}"))
        self.good = [perturb(TRUTH, 0.001, 0.01, generator) for _ in range(2)]
        self.bad = perturb(TRUTH, 3.0, 30, generator)
        self.result = Localization(
            "q", Status.LOCALIZED, "start 1", cam_from_world=self.starts[0], initial=self.starts[0], inliers=40
        )

    def choose(self, refined: Refinement, matches="own", hypotheses=None) -> Localization:
        matches = self.matches if matches == "own" else matches
        there = None if matches is None else in_one_image(matches, self.observations)
        hypotheses = hypotheses or self.hypotheses[: len(refined.status)]
        return choose_hypothesis(self.result, hypotheses, refined, there, 4.0)

    def stays(self, result: Localization) -> bool:
        assert result.initial is self.starts[0] and result.covariance is None and result.inliers == 40
        return not result.refined and result.cam_from_world is self.starts[0]


def test_most_inliers_win_whatever_the_costs_which_are_of_different_points():
    case = Case()
    for hypotheses, winner in ((case.hypotheses, 0), (case.hypotheses[::-1], 1)):
        for final in ([0.2, 0.1], [0.1, 0.2]):
            refined = refinement([case.good[0], case.good[1]][:: 1 - 2 * winner], [0.5, 0.6], final)
            found = case.choose(refined, hypotheses=hypotheses)
            assert found.refined and torch.equal(found.cam_from_world.matrix(), case.good[0].matrix())
            assert found.initial is case.starts[0] and found.inliers == 40
            assert found.initial_cost == pytest.approx((0.5, 0.6)[winner])
            assert found.final_cost == pytest.approx(final[winner])
            assert found.covariance.dtype == torch.float64 and found.covariance[0, 0] == winner
            assert "start 1" in found.reason and "converged" in found.reason
            assert found.ended == RefinementStatus.CONVERGED_STEP


def test_a_rise_of_the_cost_within_its_noise_does_not_refuse_a_pose():
    """Refinement follows the smoothed gradient, at whose zero the cost may be a little above its least."""
    case, noise = Case(), 0.001
    for rise, refined in ((0.0, True), (0.9, True), (1.1, False)):
        final = 0.5 + rise * COST_TOLERANCE * noise
        assert case.choose(refinement(case.good[:1], [0.5], [final], noise=noise)).refined == refined


def test_the_initial_pose_stays_where_the_cost_rose_or_is_no_number():
    case = Case()
    for final in (0.51, float("nan"), float("inf")):
        found = case.choose(refinement(case.good[:1], [0.5], [final], noise=0.001))
        assert case.stays(found) and "refinement lost" in found.reason and found.initial_cost == 0.5


def test_the_initial_pose_stays_where_the_matches_reprojection_error_rose():
    case = Case()
    found = case.choose(refinement([case.bad], [0.5], [0.1]))
    assert case.stays(found) and "reprojection error" in found.reason
    # Matches off by two pixels, all to one side, say more than a move of their inliers by a part of a pixel.
    noisy = case.matches._replace(keypoints=case.matches.keypoints + torch.tensor([2.0, 0.0]))
    for aside in (0.1, 0.6):  # pixels, away from the matches; the initial pose is taken as the true one
        mine = case.hypotheses[0].inliers
        start = Hypothesis(TRUTH, mine, torch.tensor([1]), mine, 40, "start")
        turned = TRUTH.retract(torch.tensor([0.0, 0, 0, 0, -aside / 500, 0], dtype=torch.float64))
        worse = (2 + aside) ** 2 / 4 > ERROR_TOLERANCE + ERROR_TOLERANCE_OF_FEW / 40
        assert case.choose(refinement([turned], [0.5], [0.1]), noisy, [start]).refined != worse


def test_a_lost_first_hypothesis_keeps_its_initial_pose_and_its_inliers():
    case = Case()
    found = case.choose(refinement([case.bad, case.good[1]], [0.5, 0.5], [0.01, 0.3]))
    assert case.stays(found)  # 40 inliers, and the second has 30
    kept = case.matches.kept.clone()
    kept[:20] = False  # then 20 of the first agree with its refined pose
    fewer = [replace(h, used=h.used & kept) for h in case.hypotheses]
    found = case.choose(refinement(case.good, [0.5] * 2, [0.01, 0.3]), hypotheses=fewer)
    assert found.refined and found.initial is case.starts[1] and found.inliers == 30


@pytest.mark.parametrize("status", [s for s in RefinementStatus if s > RefinementStatus.CONVERGED_GRADIENT])
def test_a_refinement_that_did_not_converge_is_none(status):
    case = Case()
    found = case.choose(refinement(case.good[:1], [0.5], [0.1], status))
    assert case.stays(found) and "refinement failed" in found.reason and found.ended == status


def test_without_matches_cost_alone_decides():
    case, nothing = Case(), torch.zeros(0, dtype=torch.bool)
    start = Hypothesis(case.starts[0], nothing, torch.tensor([1, 2]), nothing, 0, "the pose given")
    assert case.choose(refinement([case.bad], [0.5], [0.4]), None, [start]).refined
    assert not case.choose(refinement([case.bad], [0.5], [0.6]), None, [start]).refined


def test_of_a_cluster_the_references_with_most_matches_are_used():
    count = 40
    reference = torch.tensor([3, 5, 8]).repeat_interleave(count)
    points = torch.randn(3 * count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points[:, 2] += 8
    camera = Camera(torch.tensor([640.0, 480.0]).double(), torch.tensor([500.0, 500, 320, 240, 0, 0, 0, 0]).double())
    keypoints, _ = camera.project(points)
    observations = Observations(
        points=points, ids=torch.arange(3 * count), keypoints=keypoints.float(), descriptors=(), reference=reference,
        valid=torch.ones(3 * count, 0, dtype=torch.bool),
    )  # fmt: skip
    kept = torch.ones(3 * count, dtype=torch.bool)
    kept[:25] = False  # reference 3 has 15 matches, the others 40
    rows, shared = torch.tensor([3, 5, 8]), torch.full((3, 3), 10)
    there = in_one_image(matched(keypoints, kept), observations, camera)
    (found,) = pose_hypotheses(there, shared, rows, PoseSolver(), best=2)
    assert references_of(found, there) == [5, 8]
    assert found.count == 2 * count and not found.inliers[:count].any()
