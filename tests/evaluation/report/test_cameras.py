"""Charts and pictures of a localization run, against figures worked out by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gnnet.evaluation.report import style
from gnnet.evaluation.report.cameras import positions_from_above
from gnnet.evaluation.report.charts import error_curve, localization_errors, seconds_by_stage
from gnnet.evaluation.report.queries import draw_query
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose, perturb
from gnnet.localization.map import Observations
from gnnet.localization.result import Localization, Status
from gnnet.scenes.scene import Scene, SceneImage

CAMERA = Camera.from_colmap("PINHOLE", 320, 240, [200, 200, 160, 120], dtype=torch.float64)


@dataclass
class FewReferences:
    """A map by its interface: references in a row along x, which look along z at points on a plane."""

    count: int = 3
    places: tuple[str, ...] = ("p",) * 3
    largest_side: int | None = None

    def __post_init__(self) -> None:
        self.names = tuple(f"r{i}" for i in range(self.count))
        self.rows = {name: i for i, name in enumerate(self.names)}
        centers = torch.zeros(self.count, 3, dtype=torch.float64)
        centers[:, 0] = torch.arange(self.count)
        self.poses = Pose(torch.eye(3, dtype=torch.float64).expand(self.count, 3, 3), -centers)

    def observations(self, rows: torch.Tensor) -> Observations:
        grid = torch.cartesian_prod(torch.arange(-2.0, 3), torch.arange(-2.0, 3)).double() * 0.5
        points = torch.cat([grid, torch.full((25, 1), 4.0, dtype=torch.float64)], 1) + torch.eye(3).double()[0] * rows
        keypoints, _ = CAMERA.project(self.poses[int(rows)].transform(points))
        ids = torch.full((25,), -1)
        return Observations(points, ids, keypoints.float(), (), torch.ones(25, 1).bool(), rows.expand(25))


def pose_at(x: float, y: float = 0.0, z: float = 0.0) -> Pose:
    return Pose(torch.eye(3, dtype=torch.float64), -torch.tensor([x, y, z], dtype=torch.float64))


def localized(name: str, pose: Pose | None, start: Pose | None = None, **values) -> Localization:
    status = Status.NO_POSE if pose is None else Status.LOCALIZED
    return Localization(name, status, "", cam_from_world=pose, initial=start or pose, **values)


@pytest.fixture
def grey(tmp_path) -> Path:
    Image.fromarray(np.full((240, 320, 3), 128, np.uint8)).save(tmp_path / "grey.png")
    return tmp_path / "grey.png"


def marks(axes, label: str) -> np.ndarray:
    """Points (N, 2) of the marks of one label, in the axes' pixels."""
    (found,) = [line.get_xydata() for line in axes.lines if line.get_label() == label]
    return found


def test_errors_are_infinite_without_a_pose_and_unknown_without_a_truth():
    queries = {n: SceneImage(n, Path(n), cam_from_world=None if n == "c" else pose_at(0)) for n in "abcd"}
    broken = Pose(torch.full((3, 3), math.nan).double(), torch.zeros(3).double())
    results = [
        localized("a", pose_at(3, 4), start=pose_at(0, 0, 2)),
        localized("b", None),
        localized("c", pose_at(1)),
        localized("d", broken),
    ]
    errors = localization_errors(results, queries)
    np.testing.assert_allclose(errors[0], [[2, 0], [5, 0]], atol=1e-12)
    assert np.isinf(errors[1]).all() and np.isnan(errors[2]).all() and np.isinf(errors[3, 1, 1])
    assert localization_errors([], {}).shape == (0, 2, 2)
    turned = perturb(pose_at(0), 0.1, 7.0, torch.Generator().manual_seed(0))
    found = localization_errors([localized("a", turned)], queries)[0, 1]
    np.testing.assert_allclose(found, [0.1, 7.0], atol=1e-6)


def test_the_error_curve_ends_at_the_share_that_was_localized():
    after = np.array([0.02, 0.5, 0.03, np.inf, np.nan])
    errors = np.stack([np.stack([2 * after, after], 1)] * 2, -1)
    figure = error_curve(errors, ["x"] * 5, "position", limits=(0.25,))
    limit, before, refined = figure.axes[0].lines
    assert limit.get_xdata()[0] == 0.25
    for line, factor in ((before, 2), (refined, 1)):
        x, y = line.get_data()
        seen = x <= figure.axes[0].get_xlim()[1]
        np.testing.assert_allclose(x[seen][1:], np.array([0.02, 0.03, 0.5]) * factor)
        np.testing.assert_allclose(y[seen], [0, 0.25, 0.5, 0.75])
    low, high = figure.axes[0].get_xlim()
    assert low <= 0.02 and high >= 1.0
    figure = error_curve(errors, ["x"] * 5, "rotation", refined=False)
    assert len(figure.axes[0].lines) == 1


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.inf, 0.0, 1e-9, 1e12])
def test_the_error_axis_holds_for_any_errors(value, tmp_path):
    errors = np.full((3, 2, 2), value)
    for quantity in ("position", "rotation"):
        figure = error_curve(errors, ["a", "b", "$a_b$"], quantity)
        style.save(figure, tmp_path / f"{quantity}.png")
        low, high = figure.axes[0].get_xlim()
        assert 0 < 10 * low <= high * (1 + 1e-9) < np.inf


def test_few_conditions_have_curves_of_their_own_and_many_have_one():
    errors = np.random.default_rng(0).uniform(0.01, 1, (40, 2, 2))
    few = error_curve(errors, [f"c{i % 3}" for i in range(40)], "position")
    many = error_curve(errors, [f"c{i}" for i in range(40)], "position")
    assert [sum(len(line.get_xdata()) > 0 for line in figure.axes[0].lines) for figure in (few, many)] == [6, 2]
    kinds = ["before refinement", "after refinement"]
    for figure, names in ((few, ["c0", "c1", "c2", *kinds]), (many, kinds)):
        assert [text.get_text() for text in figure.legends[0].get_texts()] == names


def test_seconds_are_medians_of_each_stage_and_of_the_sums(tmp_path):
    seconds = [{"features": 1.0, "pose": 0.01}, {"features": 3.0, "pose": 0.02}, {"features": 2.0, "pose": 0.03}, {}]
    figure = seconds_by_stage(seconds)
    style.save(figure, tmp_path / "s.png")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["2.00 s", "20 ms", "2.03 s"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["features", "pose", "in all"]
    assert seconds_by_stage([{}]) is None and seconds_by_stage([]) is None
    assert style.format_seconds(0.0995) == "0.10 s" and style.format_seconds(120) == "120 s"


def test_an_estimate_far_off_does_not_shrink_the_top_view(tmp_path):
    names = ["near", "far", "off", "failed", "unknown", "failed, unknown"]
    poses = [pose_at(0.5), pose_at(1e6), pose_at(1.8), None, pose_at(0.2), None]
    results = [localized(name, pose) for name, pose in zip(names, poses, strict=True)]
    truth = pose_at(0.6, 0, 0.3)
    queries = {n: SceneImage(n, Path(n), cam_from_world=None if "unknown" in n else truth) for n in names}
    figure = positions_from_above(FewReferences(), results, queries, far=1.0)
    style.save(figure, tmp_path / "top.png")
    (axes,) = figure.axes
    drawn = {line.get_label(): line.get_xydata() for line in axes.lines}
    sizes = {label: int(np.isfinite(xy).all(-1).sum()) for label, xy in drawn.items()}
    assert sizes == {"reference": 3, "true pose": 4, "query": 2, "query, over 1 m off": 2, "not localized": 1}
    assert np.ptp(axes.get_xlim()) < 5 and axes.get_title() == "1 estimates outside"
    # The truth lies 0.3 m before the references, which look there.
    np.testing.assert_allclose(np.abs(drawn["not localized"] - drawn["reference"].mean(0)), [[0.4, 0.3]], atol=1e-9)


def test_queries_outside_the_references_are_drawn_where_no_truth_is_known(tmp_path):
    """References lie along 2 m; of the estimates one is 4 m ahead of them, and one lost far away."""
    results = [localized("ahead", pose_at(1.0, 0, 4.0)), localized("lost", pose_at(0, 0, 1e4)), localized("none", None)]
    figure = positions_from_above(FewReferences(), results, {r.name: SceneImage(r.name, Path("q")) for r in results})
    style.save(figure, tmp_path / "top.png")
    (axes,) = figure.axes
    ahead, lost = marks(axes, "query")
    low, high = axes.viewLim.get_points()
    assert ((ahead > low) & (ahead < high)).all() and not ((lost > low) & (lost < high)).all()
    assert axes.get_title() == "1 estimates outside" and (high - low).max() < 10


def test_places_far_apart_have_panels_with_their_own_queries():
    references = FewReferences(6, ("a", "a", "a", "b", "b", "b"))
    shift = torch.zeros(6, 3, dtype=torch.float64)
    shift[3:, 0] = -5000.0
    references.poses = Pose(references.poses.rotation, references.poses.translation + shift)
    results = [localized("x", pose_at(0.5)), localized("y", pose_at(5004.5)), localized("z", None)]
    queries = {n: SceneImage(n, Path(n)) for n in "xyz"}
    figure = positions_from_above(references, results, queries)
    assert [axes.get_title() for axes in figure.axes] == ["place a", "place b"]
    assert [len(axes.lines[-1].get_xdata()) for axes in figure.axes] == [1, 1]
    empty = positions_from_above(references, [], {})
    assert len(empty.axes) == 2


def test_points_are_marked_where_they_project(grey, tmp_path):
    query = SceneImage("q", grey, camera=CAMERA)
    start, final = pose_at(0.2), pose_at(0.0)
    result = localized("q", final, start, refined=True, references=("unknown", "r0"))
    scene = Scene("s", {"r0": SceneImage("r0", grey, "c", "p")}, ())
    pictures = draw_query(result, query, map=FewReferences(), scene=scene)
    assert pictures.problems == ()
    x, y = np.meshgrid(160 + 200 * np.arange(-1, 1.1, 0.5) / 4, 120 + 200 * np.arange(-1, 1.1, 0.5) / 4)
    seen = np.stack([x.T.ravel(), y.T.ravel()], 1)
    initial, refined = pictures.poses.axes
    np.testing.assert_allclose(marks(initial, "at the initial pose"), seen - [200 * 0.2 / 4, 0])
    np.testing.assert_allclose(marks(refined, "at the refined pose"), seen)
    # The true pose is not known: lines lead from the initial to the refined pose.
    (lines,) = initial.collections
    np.testing.assert_allclose(lines.get_segments(), np.stack([seen - [10, 0], seen], 1))
    assert [axes.get_title() for axes in (initial, refined)] == [
        "initial pose\nmedian 10.0 px from the refined one", "refined pose",
    ]  # fmt: skip
    assert pictures.places is not None
    lines = pictures.places.axes[0].collections[0].get_segments()
    assert len(lines) == 25
    # The query stands below the reference, and one pose has the points straight below.
    np.testing.assert_allclose(np.diff(lines, axis=1)[:, 0], [[0, 1.05 * 240]] * 25, atol=1e-3)


def test_the_first_reference_that_sees_what_the_query_sees_is_shown(grey):
    scene = Scene("s", {f"r{i}": SceneImage(f"r{i}", grey, "c", "p") for i in range(3)}, ())
    far = replace(localized("q", pose_at(4.5)), references=("r0", "r2"))  # at 4.5 m, r0's points are out of view
    for result, expected in ((far, "r2"), (localized("q", pose_at(50), references=("r0", "r2")), "r0")):
        pictures = draw_query(result, SceneImage("q", grey, camera=CAMERA), map=FewReferences(), scene=scene)
        assert pictures.places.axes[0].get_title(loc="left") == f"reference {expected}"


@pytest.mark.parametrize("size", [(320, 240), (240, 320)])
@pytest.mark.parametrize("truth", [None, pose_at(0.05)])
@pytest.mark.parametrize("kind", ["refined", "lost", "failed"])
@pytest.mark.slow
def test_pictures_for_every_outcome(size, truth, kind, tmp_path):
    path = tmp_path / "q.png"
    Image.new("RGB", size).save(path)
    camera = Camera.from_colmap("PINHOLE", *size, [200, 200, size[0] / 2, size[1] / 2], dtype=torch.float64)
    poses = {"refined": (pose_at(0), pose_at(0.1), True), "lost": (pose_at(0), None, False), "failed": (None,) * 3}
    pose, start, refined = poses[kind]
    result = localized("q", pose, start, refined=bool(refined), references=("r0",))
    scene = Scene("s", {"r0": SceneImage("r0", path, "c", "p")}, ())
    query = SceneImage("q", path, camera=camera, cam_from_world=truth)
    pictures = draw_query(result, query, map=FewReferences(), scene=scene)
    assert pictures.problems == () and pictures.places is not None
    panels = pictures.poses.axes
    assert len(panels) == (2 if kind == "refined" else 1)
    assert ("off" in panels[-1].get_title()) == (truth is not None and kind != "failed")
    for figure in (pictures.poses, pictures.places):
        style.save(figure, tmp_path / "out.png")
        assert Image.open(tmp_path / "out.png").width <= 660


def test_what_cannot_be_drawn_is_said(grey, tmp_path):
    result, nothing = localized("q", pose_at(0), references=("r0",)), Scene("s", {}, ())
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    for path, words in ((tmp_path / "none.png", "does not exist"), (tmp_path / "broken.png", "cannot be read")):
        pictures = draw_query(result, SceneImage("q", path, camera=CAMERA), map=FewReferences(), scene=nothing)
        assert pictures.poses is None and pictures.places is None and words in pictures.problems[0]
    pictures = draw_query(result, SceneImage("q", grey, camera=CAMERA), map=FewReferences(), scene=nothing)
    assert pictures.poses is not None and pictures.places is None and "r0 is not known" in pictures.problems[0]
    scene = Scene("s", {"r0": SceneImage("r0", tmp_path / "broken.png", "c", "p")}, ())
    pictures = draw_query(result, SceneImage("q", grey, camera=CAMERA), map=FewReferences(), scene=scene)
    assert "broken.png" in pictures.problems[0]
    other = CAMERA.scale(2.0)
    pictures = draw_query(result, SceneImage("q", grey, camera=other), map=FewReferences(), scene=nothing)
    assert "320×240" in pictures.problems[0] and "no camera" in pictures.poses.axes[0].get_title()
    for query in (SceneImage("q", grey, camera=None), SceneImage("q", grey, camera=CAMERA)):
        pictures = draw_query(replace(result, references=()), query, map=FewReferences(), scene=nothing)
        assert pictures.poses is not None and pictures.problems == ("no reference was used",)


def test_names_stand_in_figures_as_they_are():
    assert style.plain_text("a$b_c$") == r"a\$b_c\$"
    assert style.plain_text("x" * 100, 10) == "…" + "x" * 9
    assert style.plain_text("night\udc80") == r"night\udc80"
    assert not style.plain_text("_hidden").startswith("_")
