"""A localization run that was interrupted goes on, and ends as if it had not been."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from gnnet.evaluation.journal import JOURNAL, Journal, from_line, plain, to_line
from gnnet.evaluation.localize import localize_validations
from gnnet.evaluation.maps import MapSettings
from gnnet.evaluation.metrics import INDOOR
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.localization.initial_pose import NearestPose, PoseFromMatches
from gnnet.localization.localizer import Localizer
from gnnet.localization.map import Map
from gnnet.localization.matching import Matcher
from gnnet.localization.pnp import PoseSolver
from gnnet.localization.refinement import RefinementStatus
from gnnet.localization.refiner import Refiner
from gnnet.localization.result import Localization, Status
from gnnet.localization.retrieval import PairsRetrieval
from gnnet.models.grey import GreyValues
from gnnet.processes import devices_of
from gnnet.scenes.layouts.robotcar import load_robotcar
from tests.evaluation.test_localize import OneSet

NEAREST = Localizer(pose=NearestPose(), refiner=None, references=3)
LENIENT = PoseSolver(max_error=20, min_inliers=5)  # grey values match badly
REFINED = Localizer(pose=PoseFromMatches(Matcher(), LENIENT), refiner=Refiner(iterations=5), references=3)


@pytest.fixture(scope="module")
def scene(toy_root):
    return load_robotcar(toy_root, progress=False)


def localize(scene, folder: Path, settings: Localizer = NEAREST, *, network=None, devices: int = 1, **more):
    (done,) = localize_validations(
        OneSet(scene), network or GreyValues(strides=[8, 2]), settings, folder / "out", thresholds=INDOOR,
        maps=MapSettings(folder.parent / "maps", points=50), device=devices_of("cpu", devices), **more,
    )  # fmt: skip
    return done


def results(folder: Path) -> dict[str, str]:
    """The files of results, without what tells seconds."""
    texts = {name: (folder / "out" / name).read_text() for name in ("poses.txt", "submission.txt")}
    for name in ("localizations.jsonl", "localization.json"):
        lines = (folder / "out" / name).read_text().splitlines()
        lines = [re.sub(r'"seconds": \{[^}]*\}', "", line) for line in lines if "seconds a query" not in line]
        texts[name] = "\n".join(lines)
    return texts


class Interrupted(GreyValues):
    """Ends the run at an image."""

    at, count = 0, 0

    def forward(self, images):
        Interrupted.count += 1
        if Interrupted.count == Interrupted.at:
            raise KeyboardInterrupt
        return super().forward(images)


@pytest.fixture
def interrupted(monkeypatch):
    def make(at: int) -> Interrupted:
        monkeypatch.setattr(Interrupted, "at", at)
        monkeypatch.setattr(Interrupted, "count", 0)
        return Interrupted(strides=[8, 2])

    return make


def test_every_number_of_a_localization_is_kept():
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    pose = Pose(rotation, torch.randn(3, generator=generator, dtype=torch.float64))
    camera = Camera.from_colmap("OPENCV", 640, 480, [500.1, 1 / 3, 320, 240, 0.1, 0, 0, 0], dtype=torch.float64)
    whole = Localization(
        "a/\udcff ä.jpg", Status.LOCALIZED, "7 inliers", "night", pose, pose.inverse(), True,
        RefinementStatus.ITERATION_LIMIT, ("r1", "r2"), 9, 7, float("inf"), 1 / 3,
        torch.randn(6, 6, generator=generator, dtype=torch.float64), camera, {"features": 0.1},
    )  # fmt: skip
    for result in (whole, Localization("b", Status.NO_POSE, "")):
        kept = from_line(to_line(result))
        assert to_line(kept) == to_line(result) and "\n" not in to_line(result)
        for field in fields(Localization):
            before, after = getattr(result, field.name), getattr(kept, field.name)
            assert type(before) is type(after)
            assert plain(before) == plain(after)
    assert kept.status is Status.NO_POSE and torch.equal(from_line(to_line(whole)).covariance, whole.covariance)


def test_a_half_written_line_is_dropped(tmp_path):
    path, first = tmp_path / "run" / "x.jsonl", to_line(Localization("a", Status.NO_POSE, ""))
    Journal(path, {"points": 3}).add([first])
    whole = path.read_bytes()
    for cut in range(len(whole) - len(first) - 1, len(whole) + 1):
        path.write_bytes(whole[:cut])
        journal = Journal(path, {"points": 3}, resume=True)
        assert list(journal.done) == ["a"] * (cut == len(whole))
        journal.add([first])
        assert path.read_bytes() == whole + b"".join([first.encode(), b"\n"] * (cut == len(whole)))
    for cut in (0, 5):  # killed while the first line was written
        path.write_bytes(whole[:cut])
        assert not Journal(path, {"points": 3}, resume=True).done
        assert json.loads(path.read_text())["points"] == 3
    with pytest.raises(ValueError, match=r"x\.jsonl, whose settings were others:\n  points: 3 there, 4 now"):
        Journal(path, {"points": 4}, resume=True)
    assert Journal(path, {"points": 4}).done == {}


def test_settings_are_told_apart(tmp_path):
    pairs = []
    for number, reference in enumerate(("r1", "r2", "r1")):
        (tmp_path / f"{number}.txt").write_text(f"q {reference}\n")
        pairs.append(plain(PairsRetrieval(tmp_path / f"{number}.txt"))[".pairs"])
    assert pairs[0] == pairs[2] != pairs[1]
    found = plain(REFINED, "localizer")
    assert found["localizer.refiner.iterations"] == 5 and found["localizer.pose"] == "PoseFromMatches"
    assert json.loads(json.dumps(found)) == found
    changed = plain(replace(REFINED, pose=PoseFromMatches(Matcher(ratio=0.7), LENIENT)), "localizer")
    assert [key for key in found if found[key] != changed[key]] == ["localizer.pose.matcher.ratio"]


@pytest.mark.slow
def test_it_goes_on_where_it_was_interrupted_and_ends_the_same(scene, tmp_path, interrupted):
    whole = localize(scene, tmp_path / "whole", network=interrupted(0), max_queries=6)
    for at, done in ((3, 2), (1, 2), (2, 3)):
        with pytest.raises(KeyboardInterrupt):
            localize(scene, tmp_path / "parts", network=interrupted(at), max_queries=6, resume=at < 3)
        assert len((tmp_path / "parts/out" / JOURNAL).read_text().splitlines()) == 1 + done
    done = localize(scene, tmp_path / "parts", network=interrupted(0), max_queries=6, resume=True)
    assert Interrupted.count == 6 - 3
    assert [r.name for r in done.localizations] == [r.name for r in whole.localizations]
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
    localize(scene, tmp_path / "parts", network=interrupted(1), max_queries=6, resume=True)  # nothing is left to do


@pytest.mark.slow
def test_a_run_of_other_settings_is_not_gone_on_with(scene, tmp_path):
    localize(scene, tmp_path / "run", max_queries=2)
    with pytest.raises(ValueError, match=r"localizer\.references: 3 there, 2 now\ngive the same as that run"):
        localize(scene, tmp_path / "run", replace(NEAREST, references=2), max_queries=2, resume=True)
    with pytest.raises(ValueError, match=r"others:\n  queries and what is given of them: \w+ there, \w+ now\ngive"):
        localize(scene, tmp_path / "run", max_queries=3, resume=True)
    with pytest.raises(ValueError, match=r"others:\n  map's network: \w+ there, \w+ now\ngive"):
        localize(scene, tmp_path / "run", network=Interrupted(strides=[8, 2]), max_queries=2, resume=True)
    with pytest.raises(FileNotFoundError, match=r"elsewhere.out holds no journal\.jsonl .*of an interrupted run"):
        localize(scene, tmp_path / "elsewhere", resume=True)


def test_without_queries_the_map_is_all_that_is_made(scene, tmp_path, capsys):
    found = localize_validations(
        OneSet(scene), GreyValues(strides=[8, 2]), NEAREST, tmp_path / "out", thresholds=INDOOR,
        maps=MapSettings(tmp_path / "maps", points=50), device="cpu", max_queries=0,
    )  # fmt: skip
    (path,) = (tmp_path / "maps").glob("*.gnmap")
    assert found == [] and f"is {path}" in capsys.readouterr().out and Map.open(path).names
    assert [file.name for file in (tmp_path / "out").rglob("*") if file.is_file()] == [JOURNAL]


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "queries"), [(2, 7), (4, 3)])
def test_several_processes_find_what_one_finds(scene, tmp_path, devices, queries):
    done = localize(scene, tmp_path / "one", REFINED, max_queries=queries)
    assert sum(result.status == Status.LOCALIZED for result in done.localizations) >= 2
    localize(scene, tmp_path / "several", REFINED, max_queries=queries, devices=devices)
    assert len((tmp_path / "several/out/localizations.jsonl").read_text().splitlines()) == queries
    assert results(tmp_path / "several") == results(tmp_path / "one")


@pytest.mark.slow
def test_a_killed_run_goes_on(scene, toy_root, tmp_path):
    localize(scene, tmp_path / "whole", REFINED)
    command = [sys.executable, "-m", "tests.evaluation.test_journal", toy_root, tmp_path / "killed"]
    journal = tmp_path / "killed" / "out" / JOURNAL
    run = subprocess.Popen([*map(str, command)], cwd=Path(__file__).parents[2])
    while run.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 1):
        time.sleep(0.01)
    time.sleep(random.random())
    run.kill()
    assert run.wait() == -signal.SIGKILL
    localize(scene, tmp_path / "killed", REFINED, resume=True)
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


if __name__ == "__main__":
    town, folder = map(Path, sys.argv[1:])
    started = (folder / "out" / JOURNAL).exists()
    localize(load_robotcar(town, progress=False), folder, REFINED, devices=2, resume=started)
