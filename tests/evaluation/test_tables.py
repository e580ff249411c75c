import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from gnnet.evaluation.tables import (
    Line,
    Report,
    compare_runs,
    format_length,
    join_reports,
    print_report,
    read_results,
    report_table,
    write_results,
)

THRESHOLDS = ((0.25, 2.0), (0.5, 5.0), (5.0, 10.0))
START = Line("start", "all", 40, 0.52, 4.1, (0.1, 0.4, 1.0), 0.0)
TRAINED = Line("trained", "all", 40, 0.0042, 0.031, (0.925, 0.975, 1.0), 0.9)
FAILED = Line("grey values", "night", 12, math.inf, math.inf, (0.0, 0.25, 0.25), 0.0)


def make_report(*lines: Line, **settings) -> Report:
    settings = {"dataset": "toy", "loss": "nce", "seed": 0, **settings}
    return Report("toy validation", THRESHOLDS, lines or (START, TRAINED, FAILED), settings, ("a note",))


def printed(report: Report, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO())
    print_report(report, console)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def bold_cells(report: Report) -> dict[str, list[str]]:
    """Bold numbers by the text of their row's first cell."""
    table = report_table(report)
    names = [str(cell).strip() for cell in table.columns[0].cells]
    bold: dict[str, list[str]] = {name: [] for name in names}
    for column in table.columns[2:]:
        for name, cell in zip(names, column.cells, strict=True):
            if getattr(cell, "style", "") == "bold":
                bold[name].append(str(cell))
    return bold


def test_results_survive_writing_and_reading(tmp_path):
    report = make_report(seconds=271.5, checkpoint=None, full=True)
    path = tmp_path / "new" / "results.json"
    write_results(report, path)
    assert read_results(path) == report
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_unknown_numbers_survive_as_nan(tmp_path):
    write_results(make_report(replace(START, converged=math.nan)), tmp_path / "results.json")
    assert math.isnan(read_results(tmp_path / "results.json").lines[0].converged)


def test_results_are_strict_json(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    write_results(make_report(FAILED, replace(START, converged=math.nan)), tmp_path / "results.json")
    content = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert content["lines"][0]["median_position_m"] == "inf"
    assert content["lines"][1]["converged"] is None


def test_failed_write_keeps_the_old_results(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_results(make_report(), path)
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_results(make_report(seed=1), path)
    assert read_results(path).settings["seed"] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_reading_says_what_is_wrong(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(FileNotFoundError, match=r"results\.json does not exist"):
        read_results(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"results\.json is not JSON"):
        read_results(path)
    path.write_text('{"recall": 1}')
    with pytest.raises(ValueError, match="format is None, expected 'gnnet results 1'"):
        read_results(path)
    write_results(make_report(), path)
    content = json.loads(path.read_text())
    del content["lines"][0]["converged"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no key 'converged'"):
        read_results(path)


def test_report_refuses_what_it_cannot_print_or_write():
    with pytest.raises(ValueError, match=r"'start' on 'all' has 1 recall values, expected 3"):
        make_report(replace(START, recall=(0.5,)))
    with pytest.raises(ValueError, match=r"settings\['path'\]"):
        make_report(path=["a", "b"])
    with pytest.raises(ValueError, match=r"settings\['loss_value'\] is inf"):
        make_report(loss_value=math.inf)


def test_table_shows_every_number_in_80_columns():
    text = printed(make_report(), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "toy validation" in text and "dataset toy · loss nce · seed 0" in text and "• a note" in text
    rows = {line.split("  ")[1].strip(): line.split() for line in text.splitlines() if line.startswith("  ")}
    assert rows["start"] == ["start", "40", "520", "4.10", "0.0", "10.0", "40.0", "100.0"]
    assert rows["trained"] == ["trained", "40", "4.20", "0.031", "90.0", "92.5", "97.5", "100.0"]
    assert rows["grey values"][2:] == ["12", "∞", "∞", "0.0", "0.0", "25.0", "25.0"]
    assert text.index("all\n") < text.index("trained") < text.index("night\n") < text.index("grey values")


def test_best_of_a_condition_is_bold():
    worse = replace(START, method="untrained", median_position_m=0.0043)
    bold = bold_cells(make_report(START, worse, TRAINED, FAILED))
    assert bold["trained"] == ["4.20", "0.031", "90.0", "92.5", "97.5"]  # all reach 100 % within 5 m
    assert bold["start"] == bold["untrained"] == []
    assert bold["grey values"] == []  # nothing to compare with


def test_names_are_not_read_as_markup():
    text = printed(make_report(replace(START, method="[red]x[/red]", condition="[bold]")))
    assert "[red]x[/red]" in text and "[bold]" in text


@pytest.mark.parametrize(
    ("metres", "text"),
    [(0.00042, "0.42 mm"), (0.0042, "4.20 mm"), (0.513, "51.3 cm"), (3.1, "3.10 m"), (1234.0, "1234 m"),
     (math.inf, "∞"), (math.nan, "–")],
)  # fmt: skip
def test_lengths_are_written_in_the_unit_that_suits(metres, text):
    assert format_length(metres) == text


def test_runs_stand_beside_each_other(tmp_path):
    better = replace(TRAINED, median_position_m=0.002)
    paths = [tmp_path / name / "results.json" for name in "abc"]
    write_results(make_report(START, TRAINED, FAILED, loss="dmc", steps=900), paths[0])
    write_results(make_report(START, better, replace(FAILED, count=11), loss="nce", steps=900), paths[1])
    write_results(make_report(START, TRAINED, FAILED, loss="nce", seed=1, steps=900), paths[2])
    report = compare_runs(paths)
    assert [(line.method, line.median_position_m) for line in report.lines if line.condition == "all"] == [
        ("start", 0.52), ("dmc", 0.0042), ("nce #1", 0.002), ("nce #2", 0.0042),
    ]  # fmt: skip
    unequal = [line.method for line in report.lines if line.condition == "night"]
    assert unequal == ["grey values (dmc)", "grey values (nce #1)", "grey values (nce #2)"]
    assert report.settings == {"dataset": "toy", "steps": 900}
    assert report.notes[2] == f"nce #2: seed 1, {paths[2]}"
    assert "nce #1" in printed(report)


def test_runs_that_cannot_be_compared_say_why(tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    write_results(make_report(), first)
    with pytest.raises(ValueError, match=r"no results\.json to compare"):
        compare_runs([])
    with pytest.raises(ValueError, match=r"has no setting 'model'.*dataset, loss, seed"):
        compare_runs([first], setting="model")
    write_results(Report("indoor", ((0.05, 5.0),), (replace(START, recall=(1.0,)),), {"loss": "gn"}), second)
    with pytest.raises(ValueError, match=r"second\.json has the thresholds"):
        compare_runs([first, second])


def test_reports_of_several_data_sets_are_joined():
    report = make_report(TRAINED, replace(TRAINED, condition="night"))
    joined = join_reports({"town": report, "room": report})
    assert [line.condition for line in joined.lines] == ["town/all", "town/night", "room/all", "room/night"]
    assert joined.notes == ("town: a note", "room: a note") and joined.settings == report.settings
    assert join_reports({"town": report}) is report and join_reports({}) is None


def test_runs_are_named_by_what_differs(tmp_path):
    paths = []
    for gradient in ("central", "bicubic"):
        line = Line("refined", "all", 4, 0.01, 0.1, (1.0,), 1.0)
        report = Report("a", ((0.05, 5.0),), (line,), {"run": f"sparse_to_dense gradient={gradient}"})
        paths.append(tmp_path / f"{gradient}.json")
        write_results(report, paths[-1])
    compared = compare_runs(paths, setting="run", method="refined")
    assert [line.method for line in compared.lines] == ["gradient=central", "gradient=bicubic"]
