"""Localization of a dataset's queries on a map: records, table and files, also where queries fail."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gnnet.colmap import pycolmap
from gnnet.data.queries import LocalizationDataset
from gnnet.evaluation.given import QueryList, queries_of_list, queries_of_scene, read_given
from gnnet.evaluation.localize import localize_dataset, localize_queries, localize_validations
from gnnet.evaluation.maps import MapSettings, prepare_localizer
from gnnet.evaluation.metrics import INDOOR
from gnnet.evaluation.submission import validate_submission
from gnnet.evaluation.tables import read_table
from gnnet.geometry.pose import perturb, pose_errors
from gnnet.localization.initial_pose import GivenPose, NearestPose, PoseFromMatches
from gnnet.localization.local_features import LocalFeatures
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
from gnnet.scenes.formats.poses import read_pose_file, read_query_names
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_queries_of_a_list_of_names_have_their_focal_length_estimated(scene, tmp_path):
    """A photograph that the map knows under another name, so that even small images match."""
    known = next(i for i in scene.images.values() if i.is_reference)
    (tmp_path / "phone.jpg").write_bytes(known.path.read_bytes())
    (tmp_path / "queries.txt").write_text("phone.jpg\n")
    ((query,), _) = queries_of_list(QueryList(read_query_names(tmp_path / "queries.txt"), tmp_path), scene)
    pose = PoseFromMatches(LocalFeatures("sift"))
    localizer = localizer_on(scene, tmp_path / "maps", pose=pose, refiner=None, references=1)
    (result,) = localize_queries(localizer, [query])
    assert result.status == Status.NO_CAMERA
    done = localize_dataset(
        replace(localizer, estimate_focal=True), [query], tmp_path / "out", scene=scene, dataset="colmap", title="toy",
        thresholds=INDOOR, colmap_model=True,
    )  # fmt: skip
    assert done.any_localized
    record = json.loads((tmp_path / "out/localizations.jsonl").read_text())
    assert record["focal_length"] == pytest.approx(known.camera.parameters[0].item(), rel=0.02)
    assert pose_errors(done.localizations[0].cam_from_world, known.cam_from_world)[0] < 0.2
    model = pycolmap.Reconstruction(tmp_path / "out/colmap")
    camera = next(i.camera for i in model.images.values() if i.name == "phone.jpg")
    assert camera.mean_focal_length() == pytest.approx(record["focal_length"])


# --- what users bring


class OneSet:
    """What `localize_validations` needs of a data module."""

    def __init__(self, scene):
        self.validations = [LocalizationDataset(scene, points=10, largest_side=None, max_queries=None, seed=0)]


NEAREST = {"pose": NearestPose(), "refiner": None, "references": 3}


def localize_given(scene, folder, given=None, *, device="cpu", settings=None, **more):
    network = GreyValues(strides=[8, 2])
    maps = MapSettings(folder / "maps", points=20)
    (done,) = localize_validations(
        OneSet(scene), network, settings or Localizer(**NEAREST), folder / "out", maps=maps, device=device,
        thresholds=INDOOR, given=given, **more,
    )  # fmt: skip
    return done


def posed_queries(scene, count):
    return [q for q in queries_of_scene(scene) if q.cam_from_world is not None][:count]


def written(path: Path, lines) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def pose_line(name, pose):
    return f"{name} {' '.join(map(repr, torch.cat([pose.quaternion(), pose.translation]).tolist()))}"


def list_line(name, camera):
    fx, fy, cx, cy = camera.parameters[:4].tolist()
    return f"{name} PINHOLE {camera.size[0]:.0f} {camera.size[1]:.0f} {fx} {fy} {cx} {cy}"


@pytest.mark.slow
@pytest.mark.cases
def test_a_query_named_as_a_reference_is_another_image(scene, tmp_path):
    """A phone counts from 0001.jpg again: the map's image of that name stays a reference, its pose is no truth."""
    reference = next(i for i in scene.images.values() if i.is_reference)
    other = posed_queries(scene, 1)[0]
    (tmp_path / "phone" / reference.name).parent.mkdir(parents=True)
    shutil.copy(other.path, tmp_path / "phone" / reference.name)
    queries = written(tmp_path / "q.txt", [list_line(reference.name, other.camera)])
    given = {"queries": str(queries), "images": str(tmp_path / "phone"), "poses": None, "truth": None}
    everything = Localizer(**{**NEAREST, "references": 99})
    done = localize_given(scene, tmp_path, read_given(**given), settings=everything)
    assert reference.name in done.localizations[0].references and not done.report.rows
    # The true pose comes from a file; there the name is the query's.
    truth = written(tmp_path / "truth.txt", [pose_line(Path(reference.name).name, other.cam_from_world)])
    done = localize_given(scene, tmp_path, read_given(**{**given, "truth": str(truth)}), settings=everything)
    expected = pose_errors(done.localizations[0].cam_from_world, other.cam_from_world)[0].item()
    assert done.report.rows[0]["median_position_m"] == pytest.approx(expected)
    # The same file under another name is the map's image.
    (tmp_path / "phone" / "copy.jpg").symlink_to(reference.path)
    written(queries, [list_line("copy.jpg", reference.camera)])
    done = localize_given(scene, tmp_path, read_given(**given), settings=everything)
    assert done.localizations[0].references and reference.name not in done.localizations[0].references
    assert len(done.report.rows) == 1


@pytest.mark.slow
@pytest.mark.cases
def test_true_poses_of_a_file_take_the_place_of_those_that_the_dataset_knows(scene, tmp_path):
    first, second = posed_queries(scene, 2)
    listed = written(tmp_path / "truth.txt", [pose_line(first.name, second.cam_from_world)])
    done = localize_given(scene, tmp_path, read_given(queries=None, images=None, poses=None, truth=str(listed)))
    assert done.report.rows[0]["count"] == 1
    records = [json.loads(line) for line in (tmp_path / "out" / "localizations.jsonl").read_text().splitlines()]
    assert [r["name"] for r in records if "error" in r] == [first.name] and len(records) > 2


@pytest.mark.cases
@pytest.mark.parametrize("key", ["poses", "truth", "pairs", "references", "images", "submit_as", "unused"])
def test_what_can_be_known_is_said_before_the_map_is_compiled(scene, tmp_path, key):
    query = posed_queries(scene, 1)[0]
    given = {"queries": None, "images": None, "poses": None, "truth": None}
    settings, more = {}, {}
    foreign = written(tmp_path / "foreign.txt", [pose_line("foreign/1.jpg", query.cam_from_world)])
    message = rf"has names as foreign/1\.jpg, and the .* are called {query.name.partition('/')[0]}|foreign"
    if key == "poses":
        given["poses"], settings = str(foreign), {"settings": Localizer(**GIVEN, refiner=None)}
    elif key == "truth":
        given["truth"] = str(foreign)
    elif key in ("pairs", "references"):
        pair = f"foreign/1.jpg {next(iter(scene.images))}" if key == "pairs" else f"{query.name} foreign/1.jpg"
        retrieval = PairsRetrieval(written(tmp_path / "pairs.txt", [pair]))
        settings = {"settings": Localizer(**NEAREST, retrieval=retrieval)}
    elif key == "images":
        listed = written(tmp_path / "q.txt", [list_line("gone.jpg", query.camera)])
        given |= {"queries": str(listed), "images": str(tmp_path)}
        message = r"none of the 1 queries is in .*\(images=\), the first: gone\.jpg"
    elif key == "submit_as":
        more, message = {"submit_as": "aachen-by-night"}, "aachen-by-night"
    else:
        given["poses"] = str(written(tmp_path / "own.txt", [pose_line(query.name, query.cam_from_world)]))
        message = "poses are given .* but the localizer uses none"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        localize_given(scene, tmp_path, read_given(**given), **settings, **more)
    assert not (tmp_path / "maps").exists()


@pytest.mark.slow
@pytest.mark.cases
def test_names_of_a_pairs_file_match_by_their_ending_and_a_query_that_it_lacks_says_so(scene, tmp_path):
    listed, empty, lacking = posed_queries(scene, 3)
    references = [i for i in scene.images.values() if i.is_reference]
    lines = [f"query/{listed.name}, db/{r.name}, 0.5" for r in references[3:5]]
    lines += [f"query/{empty.name} db/none.jpg", "malformed"]
    retrieval = PairsRetrieval(written(tmp_path / "pairs.txt", lines))
    done = localize_given(scene, tmp_path, settings=Localizer(**NEAREST, retrieval=retrieval))
    found = {r.name: r for r in done.localizations}
    assert found[listed.name].references == (references[3].name, references[4].name)
    assert "pairs.txt has no reference of the map for this query" in found[empty.name].reason
    assert "pairs.txt has no line for this query" in found[lacking.name].reason


@pytest.mark.slow
@pytest.mark.cases
def test_a_photograph_of_ones_own_has_table_and_report_though_the_benchmark_does_not_know_it(scene, tmp_path):
    query, camera = posed_queries(scene, 1)[0], "PINHOLE 96 96 60 60 48 48"
    for name in ("my photo.jpg", "day 1"):
        shutil.copy(query.path, tmp_path / name)
    (tmp_path / "empty.jpg").touch()
    lines = [f"{name} {camera}" for name in ("my photo.jpg", "day 1", "empty.jpg", "../up.jpg")]
    lines.append("odd.jpg LENS 9 9 1")
    listed = written(tmp_path / "q.txt", lines)
    given = read_given(queries=str(listed), images=str(tmp_path), poses=None, truth=None)
    done = localize_given(scene, tmp_path, given, submit_as="robotcar", colmap_model=True)
    status = {r.name: (r.status, r.reason) for r in done.localizations}
    assert [s for s, _ in status.values()].count(Status.LOCALIZED) == 2 and len(status) == 5
    assert status["empty.jpg"][0] == Status.UNREADABLE
    assert status["odd.jpg"][0] == status["../up.jpg"][0] == Status.NO_CAMERA
    assert "q.txt line 5" in status["odd.jpg"][1] and "expected a path inside" in status["../up.jpg"][1]
    assert list(read_pose_file(tmp_path / "out/poses.txt")) == ["my photo.jpg"]
    assert (tmp_path / "out/submission.txt").read_text() == "" and (tmp_path / "out/report.html").is_file()
    notes = read_table(tmp_path / "out/localization.json").notes
    assert any("poses.txt leaves out names that cannot stand there: 1, the first 'day 1'" in note for note in notes)
    assert any("submission.txt leaves out names that cannot stand there: 5" in note for note in notes)


@pytest.mark.slow
@pytest.mark.cases
def test_a_submission_that_cannot_be_made_does_not_cost_the_results(scene, tmp_path):
    one, two = posed_queries(scene, 2)
    queries = [replace(q, name=f"{condition}/rear/1.jpg") for q, condition in ((one, "night"), (two, "dawn"))]
    localizer = localizer_on(scene, tmp_path / "maps", **NEAREST)
    done = localize_dataset(
        localizer, queries, tmp_path / "out", scene=scene, dataset="robotcar", title="toy", thresholds=INDOOR
    )
    assert any("submission.txt is not written: queries night/rear/1.jpg and" in note for note in done.report.notes)
    assert {"poses.txt", "localization.json", "report.html"} <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.cases
def test_scenes_of_one_name_get_two_maps(scene, tmp_path):
    half = scene.with_places(["001", "002"])
    assert half.name == scene.name
    paths = {localizer_on(s, tmp_path / "maps", **NEAREST).map.path for s in (scene, half, scene)}
    assert len(paths) == 2
