"""Localization of a query from several references, by matching, PnP and refinement."""

from __future__ import annotations

import pytest
import torch

from gnnet.data.batches import LocalizationBatch, View
from gnnet.data.transforms import read_image
from gnnet.evaluation.by_matching import compare_by_matching, localize_by_matching, localize_by_sift
from gnnet.evaluation.matching import GreyPatches
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.localization.localizer import Localizer
from gnnet.localization.matching import Matcher
from gnnet.localization.pnp import PoseSolver
from gnnet.localization.robust import Robust
from gnnet.scenes.robotcar import load_robotcar

LOCALIZER = Localizer(robust=Robust("huber"), iterations=20)
SOLVER = PoseSolver(max_error=3.0, min_inliers=8)


def group_of(scene, query, references) -> LocalizationBatch:
    """Rows of one query, in the world of the first reference's camera."""
    origin = references[0].cam_from_world.center()

    def view(image) -> View:
        pose = image.cam_from_world
        moved = Pose(pose.rotation, pose.translation + pose.rotation @ origin).to(torch.float32)
        return View(read_image(image.path)[None], Camera.stack([image.camera.to(torch.float32)]), Pose.stack([moved]))

    def stack(images) -> View:
        views = [view(image) for image in images]
        return View(
            torch.cat([v.image for v in views]),
            Camera.stack([v.camera[0] for v in views]),
            Pose.stack([v.cam_from_world[0] for v in views]),
        )

    rows, count = len(references), max(len(r.point_ids) for r in references)
    points, valid = torch.zeros(rows, count, 3), torch.zeros(rows, count, dtype=torch.bool)
    for row, reference in enumerate(references):
        seen = (scene.points[reference.point_ids] - origin).float()
        points[row, : len(seen)], valid[row, : len(seen)] = seen, True
    return LocalizationBatch(
        query=stack([query] * rows),
        reference=stack(references),
        points=points,
        valid=valid,
        origin=origin.expand(rows, 3),
        index=torch.arange(rows),
        condition=[query.condition] * rows,
        name=[query.name] * rows,
    )


@pytest.fixture(scope="module")
def group(toy_root):
    """A reference as the query, localized against the two others of its place."""
    scene = load_robotcar(toy_root, progress=False)
    place = scene.places[0]
    query, *others = (i for i in scene.images.values() if i.is_reference and i.place == place)
    return group_of(scene, query, others)


@pytest.fixture(scope="module")
def same(group):
    """The query is one of the references itself, so its pose is to be found exactly."""
    first = View(group.reference.image[:1], group.reference.camera[:1], group.reference.cam_from_world[:1])
    query = View(first.image.expand(2, -1, -1, -1), first.camera[[0, 0]], first.cam_from_world[[0, 0]])
    return group._replace(query=query)


def test_a_reference_is_localized_against_itself_exactly(same):
    found = localize_by_matching(GreyPatches(strides=(8, 2)), LOCALIZER, same, solver=SOLVER)
    assert found.inliers >= 50
    assert found.pnp_errors[0] < 0.02 and found.pnp_errors[1] < 0.1
    # The other reference sees some of its points elsewhere, which grey patches do not notice.
    assert found.refined_errors[0] < 0.05 and found.refined_errors[1] < 0.5
    assert "inliers" in found.reason and "iterations" in found.reason
    sift = localize_by_sift(same, solver=SOLVER)
    assert sift.pnp_errors[0] < 0.05 and sift.refined_errors is None


class Counting(GreyPatches):
    """Notes the batch sizes that it is run on."""

    def forward(self, images):
        self.batches = [*getattr(self, "batches", []), len(images)]
        return super().forward(images)


def test_the_network_runs_once_on_the_query_and_once_on_the_references(group):
    network = Counting(strides=(8, 2))
    localize_by_matching(network, LOCALIZER, group, solver=SOLVER)
    assert network.batches == [1, 2]


def test_failure_is_a_value_with_infinite_errors(group):
    black = group._replace(query=group.query._replace(image=torch.zeros_like(group.query.image)))
    nothing = group._replace(valid=torch.zeros_like(group.valid))
    for broken in (black, nothing):
        found = localize_by_matching(GreyPatches(strides=(8, 2)), LOCALIZER, broken, solver=SOLVER)
        assert found.pnp_errors == found.refined_errors == (torch.inf, torch.inf)
        assert found.inliers == 0 and "needed" in found.reason
        assert localize_by_sift(broken, solver=SOLVER).pnp_errors == (torch.inf, torch.inf)


def test_rows_of_two_queries_are_refused(group):
    with pytest.raises(ValueError, match="2 rows of the queries a, b; expected rows of one query"):
        localize_by_sift(group._replace(name=["a", "b"]))
    with pytest.raises(ValueError, match="one origin"):
        localize_by_sift(group._replace(origin=group.origin + torch.arange(2.0)[:, None]))


def test_one_table_of_all_methods(same, group):
    black = same._replace(query=same.query._replace(image=torch.zeros_like(same.query.image)), condition=["night"] * 2)
    report = compare_by_matching(
        {"patches": GreyPatches(strides=(8, 2))},
        [same, black],
        localizer=LOCALIZER,
        title="two queries",
        device="cpu",
        matcher=Matcher(candidates=4),
        solver=SOLVER,
    )
    methods = ["SIFT + PnP", "patches + PnP", "patches + PnP + refinement"]
    assert [(line.condition, line.method) for line in report.lines[:3]] == [("all", m) for m in methods]
    by_key = {(line.condition, line.method): line for line in report.lines}
    assert len(by_key) == 9
    night = by_key["night", "patches + PnP + refinement"]
    assert night.count == 1 and night.median_position_m == torch.inf and night.recall == (0, 0, 0)
    assert by_key["all", "patches + PnP"].recall[0] == 0.5
    assert "SIFT + PnP: 1 of 2 queries failed" in report.notes
    with pytest.raises(ValueError, match="no query"):
        compare_by_matching({}, [], localizer=LOCALIZER, title="", device="cpu")
