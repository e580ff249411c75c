"""The HTML report of a localization run: what it says, that it stands alone, and that odd runs don't break it."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from gnnet.evaluation.metrics import ErrorSummary
from gnnet.evaluation.report import page as report_page
from gnnet.evaluation.report import style
from gnnet.evaluation.report.page import write_html_report
from gnnet.evaluation.tables import Table, localization_table
from gnnet.geometry.pose import perturb
from gnnet.localization.compile import compile_map
from gnnet.localization.refinement import RefinementStatus
from gnnet.localization.result import Localization, Status
from gnnet.models.grey import GreyValues
from gnnet.scenes.layouts.robotcar import load_robotcar

VOID = {"meta", "img", "br"}
ODD = "night/<b>a&\"'$x_2$.jpg"


class Page(HTMLParser):
    """Checks that tags close in order; gathers cells by row, addresses, anchors, tags and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.addresses += [values[key] for key in ("src", "srcset", "data", "action") if key in values]
        self.links += [values["href"]] if "href" in values else []
        self.ids += [values["id"]] if "id" in values else []
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def scene(toy_root):
    return load_robotcar(toy_root, progress=False)


@pytest.fixture(scope="module")
def toy_map(scene, tmp_path_factory):
    path = tmp_path_factory.mktemp("map") / "toy.gnmap"
    return compile_map(path, scene, GreyValues(strides=(8, 4)).eval(), points=60, progress=False)


@pytest.fixture(scope="module")
def run(scene, toy_map):
    """Queries and what became of them: one refined, one lost, one failed, the others refined."""
    images = [i for i in scene.images.values() if not i.is_reference and i.cam_from_world is not None][:6]
    generator = torch.Generator().manual_seed(0)
    queries, results = {}, []
    for k, image in enumerate(images):
        name = ODD if k == 2 else image.name
        queries[name] = replace(image, name=name)
        places = [n for n, place in zip(toy_map.names, toy_map.places, strict=True) if place == image.place]
        start = perturb(image.cam_from_world, 0.3, 2.0, generator)
        final = perturb(image.cam_from_world, 0.01 * (k + 1), 0.1, generator)
        covariance = torch.diag(torch.tensor([4e-6, 4e-6, 1e-6, 1e-6, 2e-6, 1e-6], dtype=torch.float64))
        result = Localization(
            name, Status.LOCALIZED, f"{30 + k} inliers of 50 matches; converged", image.condition,
            final, start, True, references=tuple(places), matches=50, inliers=30 + k, initial_cost=0.5, final_cost=0.25,
            covariance=covariance, seconds={"features": 0.5, "pose": 1.5},
        )  # fmt: skip
        if k == 3:
            result = replace(result, ended=RefinementStatus.ITERATION_LIMIT)
        if k == 1:
            result = replace(result, cam_from_world=start, refined=False, covariance=None)
        if k == 2:
            result = Localization(name, Status.NO_POSE, "3 inliers, <12> needed", "", references=places[:1])
        results.append(result)
    return queries, results


@pytest.fixture
def quick_pictures(monkeypatch):
    """Figures are laid out, but every picture is one pixel."""

    def save(figure, path):
        figure.draw_without_rendering()
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (1, 1)).save(path)

    monkeypatch.setattr(style, "save", save)


def table() -> Table:
    rows = (
        ("<PnP>", "all", 6, ErrorSummary(0.3, 2.0, (0.5, 0.5), 0.0)),
        ("refined", "all", 6, ErrorSummary(0.02, 0.1, (0.8333, 0.5), 0.5)),
    )
    thresholds = ((0.25, 2.0), (5.0, 10.0))
    return localization_table("A <run>", thresholds, rows, settings={"seed": 1, "map": "<m>"}, notes=("a note & more",))


def write(folder, run, toy_map, scene, **others) -> Path:
    queries, results = run
    values = {"report": table(), "worst": 3, "command": "python x.py 'a&b'", **others}
    return write_html_report(folder, localizations=results, queries=queries, map=toy_map, scene=scene, **values)


@pytest.mark.slow
def test_the_page_stands_alone_and_says_what_happened(run, toy_map, scene, tmp_path):
    path = write(tmp_path, run, toy_map, scene)
    page = Page(path)
    assert path == tmp_path / "report.html"
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert len(page.addresses) >= 4 and all(a.startswith("data:image/png;base64,") for a in page.addresses)
    assert not re.search(r"url\(|@import|https?:", path.read_text())
    assert "A <run>" in page.text and "python x.py 'a&b'" in page.text and "a note & more" in page.text
    assert ODD in page.text and "3 inliers, <12> needed" in page.text
    assert "5 of 6" in page.text and "4 kept, 1 lost, 1 at a limit" in page.text
    assert ["all", "6", "5", "4", "1", "1", "1"] in page.rows
    assert ["seed", "1"] in page.rows and ["map", "<m>"] in page.rows
    assert ["<PnP>", "6", "30.0", "2.00", "0.0", "50.0", "50.0"] in page.rows
    html = path.read_text()
    assert "<td><b>2.00</b></td><td><b>0.10</b></td>" in html and "<b>30.0</b>" not in html
    assert ["1", "no pose", "… inliers, <…> needed"] in page.rows
    assert "3.00 mm, 0.11°" in page.text.replace("3 mm", "3.00 mm")  # √(4 + 4 + 1) mm, √4 mrad
    folder = tmp_path / "figures"
    assert {"errors_position.png", "errors_rotation.png", "seconds.png", "positions.png"} < {
        p.name for p in folder.iterdir()
    }
    assert len(list(folder.glob("query_*_poses.png"))) == 3 and not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
def test_failed_queries_come_first_then_the_largest_errors(run, toy_map, scene, tmp_path, quick_pictures):
    queries, results = run
    page = Page(write(tmp_path, run, toy_map, scene))
    shown = re.findall(r"<h3>\d+\. (.*?)</h3>", (tmp_path / "report.html").read_text())
    assert "<b>" not in shown[0]
    assert [unescape(name) for name in shown] == [ODD, results[1].name, results[5].name]
    assert sorted(page.ids) == ["q1", "q2", "q3"] == sorted(link.removeprefix("#") for link in page.links)
    # Without truths: the fewest inliers.
    unknown = {name: replace(query, cam_from_world=None) for name, query in queries.items()}
    write(tmp_path, (unknown, results), toy_map, scene, report=localization_table("t", (), ()))
    shown = re.findall(r"<h3>\d+\. (.*?)</h3>", (tmp_path / "report.html").read_text())
    assert shown[1:] == [results[0].name, results[1].name]


@pytest.mark.slow
def test_every_query_is_in_the_list(run, toy_map, scene, tmp_path, quick_pictures):
    queries, results = run
    page = Page(write(tmp_path, run, toy_map, scene, worst=0))
    assert not page.ids
    rows = {row[0]: row for row in page.rows if row and row[0] in queries}
    assert set(rows) == set(queries)
    assert rows[results[0].name][2:7] == ["30.0 cm, 2°", "1.00 cm, 0.1°", "kept", "30 of 50", "0.5 → 0.25"]
    assert rows[results[0].name][7:] == ["2.00 s", "localized"] and rows[results[1].name][4] == "lost"
    assert rows[ODD][2:] == ["no pose", "no pose", "–", "–", "–", "–", "no pose: 3 inliers, <12> needed"]


@pytest.mark.slow
def test_odd_runs_have_a_report_too(run, toy_map, scene, tmp_path, quick_pictures):
    queries, results = run
    no_table = localization_table("t", ((5.0, 10.0),), ())
    failed = [Localization(r.name, Status.UNREADABLE, "cut off") for r in results]
    unknown = {name: replace(query, cam_from_world=None) for name, query in queries.items()}
    missing = {name: replace(query, path=tmp_path / "none.jpg", camera=None) for name, query in queries.items()}
    no_covariance = [replace(r, covariance=torch.full((6, 6), math.inf), seconds={}) for r in results]
    for k, (some, found, report) in enumerate([
        (unknown, results, no_table), (queries, failed, table()), (unknown, failed, no_table),
        (missing, results, table()), (queries, results[:1], table()), (queries, no_covariance, table()),
        (queries, [], no_table),
    ]):  # fmt: skip
        used = None if k == 3 else scene
        path = write(tmp_path / str(k), (some, found), toy_map, used, report=report, worst=2)
        page = Page(path)
        assert f"{sum(r.cam_from_world is not None for r in found)} of {len(found)}" in page.text
        assert ("so there are no errors" in page.text) == (not report.rows)
        assert ("nan" not in page.text) and ("inf" not in page.text.replace("infinite", ""))
        assert ("No picture of it" in page.text) == (k in (1, 2, 3))
        assert ("std, by the covariance" in page.text) == (k in (0, 4))


@pytest.mark.slow
def test_names_that_are_no_text_and_many_queries(run, toy_map, scene, tmp_path, quick_pictures):
    queries, results = run
    name = "broken\udcff.jpg"
    queries = {**queries, name: replace(queries[results[0].name], name=name)}
    many = [replace(results[0], name=name, condition="$night\udcff")] * 2 + [results[3]] * 1500
    path = write(tmp_path, (queries, many), toy_map, scene, worst=1)
    page = Page(path)
    assert r"broken\udcff.jpg" in page.text and "1,502 of 1,502" in page.text
    assert path.stat().st_size < 3e6
    assert "<details>" in path.read_text()


@pytest.mark.slow
def test_a_report_is_whole_or_the_old_one(run, toy_map, scene, tmp_path, monkeypatch, quick_pictures):
    path = write(tmp_path, run, toy_map, scene, worst=0)
    before = path.read_text()

    def fail(*_, **__):
        raise RuntimeError("no space left")

    monkeypatch.setattr(report_page, "draw_query", fail)
    with pytest.raises(RuntimeError):
        write(tmp_path, run, toy_map, scene, worst=1)
    assert path.read_text() == before
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(RuntimeError):
        write(tmp_path, run, toy_map, scene, worst=0)
    assert path.read_text() == before and not list(tmp_path.rglob("*.part"))
