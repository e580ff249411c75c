"""Localization of a dataset's queries on a map: records, table and files, also where queries fail."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from gnnet.evaluation.localize import (
    MapSettings,
    localize_dataset,
    localize_queries,
    prepare_localizer,
    queries_of_list,
    queries_of_scene,
)
from gnnet.evaluation.metrics import INDOOR
from gnnet.evaluation.submission import validate_submission
from gnnet.evaluation.tables import read_table
from gnnet.geometry.pose import perturb, pose_errors
from gnnet.localization.initial_pose import GivenPose, NearestPose, PoseFromMatches
from gnnet.localization.localizer import Localizer
from gnnet.localization.matching import Matcher
from gnnet.localization.result import Status
from gnnet.localization.retrieval import (
    DescriptorRetrieval,
    InitialPoseRetrieval,
    OracleRetrieval,
    PairsRetrieval,
)
from gnnet.models.grey import GreyValues
from gnnet.scenes.formats.poses import read_pose_file
from gnnet.scenes.layouts.robotcar import load_robotcar


@pytest.fixture(scope="module")
def scene(toy_root):
    return load_robotcar(toy_root)


def localizer_on(scene, folder, **settings) -> Localizer:
    settings = {"pose": PoseFromMatches(Matcher()), "references": 3, **settings}
    return prepare_localizer(
        Localizer(**settings), GreyValues(strides=[8, 2]), scene, MapSettings(folder, points=100), device="cpu"
    )


GIVEN = {"pose": GivenPose(), "retrieval": InitialPoseRetrieval()}


def perturbed(queries, position: float):
    generator = torch.Generator().manual_seed(0)
    known = [q for q in queries if q.cam_from_world is not None]
    return {q.name: perturb(q.cam_from_world, position, 0.2, generator) for q in known}


@pytest.mark.slow
def test_given_poses_are_refined_and_written_back_in_the_same_format(scene, tmp_path):
    queries = [q for q in queries_of_scene(scene) if q.condition == "sun" and q.cam_from_world is not None]
    initial = perturbed(queries, 0.02)
    localizer = localizer_on(scene, tmp_path / "maps", **GIVEN)
    done = localize_dataset(
        localizer, queries, tmp_path / "out", scene=scene, dataset="robotcar", title="toy", thresholds=INDOOR,
        initial=initial, colmap_model=True,
    )  # fmt: skip
    assert done.any_localized
    assert [r.name for r in done.localizations] == [q.name for q in queries]
    written = read_pose_file(tmp_path / "out" / "poses.txt")
    assert set(written) == {q.name for q in queries}
    for query, result in zip(queries, done.localizations, strict=True):
        assert pose_errors(written[query.name], result.cam_from_world)[0] < 1e-9
        # Where refinement lost, what was given stands, and says so.
        kept = result.cam_from_world if result.refined else initial[query.name]
        assert pose_errors(kept, result.cam_from_world)[0] < 1e-9
    assert any(r.refined for r in done.localizations)
    table = read_table(tmp_path / "out" / "localization.json")
    assert [row.method for row in table.rows] == ["nearest", "given", "refined"]
    assert table.rows[1]["median_position_m"] == pytest.approx(0.02, abs=1e-6)
    assert any(note.startswith("refined / given, paired: position errors × ") for note in table.notes)
    assert any(note.endswith("true poses lie inside its 95 % ellipsoid") for note in table.notes)
    records = [json.loads(line) for line in (tmp_path / "out" / "localizations.jsonl").read_text().splitlines()]
    assert [r["name"] for r in records] == [q.name for q in queries]
    assert all(r["initial_error"]["position_m"] == pytest.approx(0.02, abs=1e-6) for r in records)
    assert not validate_submission(tmp_path / "out" / "submission.txt", dataset="robotcar").errors
    assert (tmp_path / "out" / "report.html").stat().st_size > 1000
    assert (tmp_path / "out" / "colmap" / "images.bin").is_file()


def test_a_query_that_fails_is_a_row_with_its_reason_and_the_run_goes_on(scene, tmp_path):
    good, broken, blind, lost = [q for q in queries_of_scene(scene) if q.cam_from_world is not None][:4]
    (tmp_path / "broken.jpg").write_bytes(broken.path.read_bytes()[:200])
    small = tmp_path / "small.png"
    shutil.copy(next(iter(scene.images.values())).path, small)
    queries = [
        replace(broken, path=tmp_path / "broken.jpg"),
        replace(blind, camera=None),
        replace(lost, path=tmp_path / "missing.jpg"),
        good,
    ]
    localizer = localizer_on(scene, tmp_path / "maps", **GIVEN)
    found = list(localize_queries(localizer, queries, initial={good.name: good.cam_from_world}))
    assert [r.status for r in found[:2]] == [Status.NO_POSE, Status.NO_CAMERA]
    found = list(localize_queries(localizer, queries, initial={q.name: q.cam_from_world for q in queries}))
    assert [r.status for r in found] == [Status.UNREADABLE, Status.NO_CAMERA, Status.UNREADABLE, Status.LOCALIZED]
    assert "broken.jpg" in found[0].reason and "missing.jpg" in found[2].reason
    done = localize_dataset(
        localizer, queries[:3], tmp_path / "out", scene=scene, dataset="robotcar", title="toy", thresholds=INDOOR,
        initial={},
    )  # fmt: skip
    assert not done.any_localized
    assert all(
        row[column] == 0
        for row in done.report.rows if row.method != "nearest"
        for column in row.values if column.startswith("recall_")
    )  # fmt: skip
    assert any("0 of 3" in note for note in done.report.notes)


def test_initial_poses_that_nobody_uses_are_refused(scene, tmp_path):
    queries = queries_of_scene(scene)[:1]
    localizer = localizer_on(scene, tmp_path / "maps")
    with pytest.raises(ValueError, match=r"localizer=refine.*localizer/retrieval=initial"):
        next(localize_queries(localizer, queries, initial={}))


@pytest.mark.parametrize("retrieval", ["network", "oracle", "pairs"])
def test_references_come_from_the_descriptor_the_truth_or_a_file(scene, tmp_path, retrieval):
    query = next(q for q in queries_of_scene(scene) if q.cam_from_world is not None)
    references = sorted(i.name for i in scene.images.values() if i.is_reference)
    pairs = tmp_path / "pairs.txt"
    pairs.write_text(f"{query.name} {references[3]}\n{query.name} {references[1]}\n{query.name} unknown.jpg\n")
    ways = {"network": DescriptorRetrieval(), "oracle": OracleRetrieval(), "pairs": PairsRetrieval(pairs)}
    localizer = localizer_on(scene, tmp_path / "maps", pose=NearestPose(), refiner=None, retrieval=ways[retrieval])
    (found,) = localize_queries(localizer, [query])
    assert found.status == Status.LOCALIZED
    if retrieval == "pairs":
        assert found.references == (references[3], references[1])
        (other,) = localize_queries(localizer, [replace(query, name="other.jpg")])
        assert other.status == Status.NO_REFERENCE
    if retrieval == "oracle":
        errors = [pose_errors(scene.images[r].cam_from_world, query.cam_from_world)[0].item() for r in found.references]
        assert errors[0] < 3
        (other,) = localize_queries(localizer, [replace(query, cam_from_world=None)])
        assert other.status == Status.NO_REFERENCE


def test_queries_of_a_list_have_their_own_cameras(scene, tmp_path):
    known = next(q for q in queries_of_scene(scene) if q.cam_from_world is not None)
    queries = queries_of_list({known.name: known.camera, "phone.jpg": known.camera}, tmp_path, scene)
    assert [q.name for q in queries] == sorted([known.name, "phone.jpg"])
    by_name = {q.name: q for q in queries}
    assert by_name["phone.jpg"].cam_from_world is None and by_name["phone.jpg"].path == tmp_path / "phone.jpg"
    assert by_name[known.name].cam_from_world is not None


def test_where_all_images_are_references_each_is_a_query(scene):
    references = scene.with_conditions(["overcast-reference"])
    assert {q.name for q in queries_of_scene(references)} == set(references.images)
