import io
import json
import math

import pytest
from rich.console import Console

from gnnet.evaluation.metrics import ErrorSummary
from gnnet.evaluation.runs import compare_runs, join_tables
from gnnet.evaluation.tables import (
    Column,
    Row,
    Table,
    localization_table,
    print_table,
    read_table,
    rich_table,
    write_table,
)
from gnnet.evaluation.units import Unit, format_length

THRESHOLDS = ((0.25, 2.0), (0.5, 5.0), (5.0, 10.0))
INITIAL = ("initial poses", "all", 40, ErrorSummary(0.52, 4.1, (0.1, 0.4, 1.0), 0.0))
TRAINED = ("trained", "all", 40, ErrorSummary(0.0042, 0.031, (0.925, 0.975, 1.0), 0.9))
FAILED = ("grey values", "night", 12, ErrorSummary(math.inf, math.inf, (0.0, 0.25, 0.25), 0.0))


def make_table(*rows: tuple, **settings) -> Table:
    settings = {"dataset": "toy", "loss": "nce", "seed": 0, **settings}
    rows = rows or (INITIAL, TRAINED, FAILED)
    return localization_table("toy validation", THRESHOLDS, rows, settings=settings, notes=("a note",))


def changed(row: tuple, **values) -> tuple:
    """A row of another method, condition or count, or with other errors."""
    method, condition, count, errors = row
    named = [values.pop(key, old) for key, old in (("method", method), ("condition", condition), ("count", count))]
    return (*named, errors._replace(**values))


def printed(table: Table, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO())
    print_table(table, console)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def bold_cells(table: Table) -> dict[str, list[str]]:
    """Bold numbers by the text of their row's first cell."""
    table = rich_table(table)
    names = [str(cell).strip() for cell in table.columns[0].cells]
    bold: dict[str, list[str]] = {name: [] for name in names}
    for column in table.columns[2:]:
        for name, cell in zip(names, column.cells, strict=True):
            if getattr(cell, "style", "") == "bold":
                bold[name].append(str(cell))
    return bold


def test_results_survive_writing_and_reading(tmp_path):
    report = make_table(seconds=271.5, checkpoint=None, full=True)
    path = tmp_path / "new" / "results.json"
    write_table(report, path)
    assert read_table(path) == report
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_unknown_numbers_survive_as_nan(tmp_path):
    write_table(make_table(changed(INITIAL, converged=math.nan)), tmp_path / "results.json")
    assert math.isnan(read_table(tmp_path / "results.json").rows[0]["converged"])


def test_results_are_strict_json(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    write_table(make_table(FAILED, changed(INITIAL, converged=math.nan)), tmp_path / "results.json")
    content = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert content["rows"][0]["median_position_m"] == "inf"
    assert content["rows"][1]["converged"] is None


def test_failed_write_keeps_the_old_results(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_table(make_table(), path)
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_table(make_table(seed=1), path)
    assert read_table(path).settings["seed"] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_reading_says_what_is_wrong(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(FileNotFoundError, match=r"results\.json does not exist"):
        read_table(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"results\.json is not JSON"):
        read_table(path)
    path.write_text('{"recall": 1}')
    with pytest.raises(ValueError, match="format is None, expected 'gnnet table 1'"):
        read_table(path)
    write_table(make_table(), path)
    content = json.loads(path.read_text())
    del content["rows"][0]["converged"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no key 'converged'"):
        read_table(path)


def test_table_refuses_what_it_cannot_print_or_write():
    with pytest.raises(ValueError, match=r"'initial poses' on 'all' has 1 recall values, expected 3"):
        make_table(changed(INITIAL, recall=(0.5,)))
    with pytest.raises(ValueError, match=r"settings\['path'\]"):
        make_table(path=["a", "b"])
    with pytest.raises(ValueError, match=r"settings\['loss_value'\] is inf"):
        make_table(loss_value=math.inf)


def test_table_shows_every_number_in_80_columns():
    text = printed(make_table(), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "toy validation" in text and "dataset toy · loss nce · seed 0" in text and "• a note" in text
    rows = {line.split("  ")[1].strip(): line.split() for line in text.splitlines() if line.startswith("  ")}
    assert rows["initial poses"] == ["initial", "poses", "40", "520", "4.10", "0.0", "10.0", "40.0", "100.0"]
    assert rows["trained"] == ["trained", "40", "4.20", "0.031", "90.0", "92.5", "97.5", "100.0"]
    assert rows["grey values"][2:] == ["12", "∞", "∞", "0.0", "0.0", "25.0", "25.0"]
    assert text.index("all\n") < text.index("trained") < text.index("night\n") < text.index("grey values")


def test_best_of_a_condition_is_bold():
    worse = changed(INITIAL, method="untrained", median_position=0.0043)
    bold = bold_cells(make_table(INITIAL, worse, TRAINED, FAILED))
    assert bold["trained"] == ["4.20", "0.031", "90.0", "92.5", "97.5"]  # all reach 100 % within 5 m
    assert bold["initial poses"] == bold["untrained"] == []
    assert bold["grey values"] == []  # nothing to compare with


def test_names_are_not_read_as_markup():
    text = printed(make_table(changed(INITIAL, method="[red]x[/red]", condition="[bold]")))
    assert "[red]x[/red]" in text and "[bold]" in text


@pytest.mark.parametrize(
    ("metres", "text"),
    [(0.00042, "0.42 mm"), (0.0042, "4.20 mm"), (0.513, "51.3 cm"), (3.1, "3.10 m"), (1234.0, "1234 m"),
     (math.inf, "∞"), (math.nan, "–")],
)  # fmt: skip
def test_lengths_are_written_in_the_unit_that_suits(metres, text):
    assert format_length(metres) == text


def test_tables_of_several_data_sets_are_joined():
    report = make_table(TRAINED, changed(TRAINED, condition="night"))
    joined = join_tables({"town": report, "room": report})
    assert [row.condition for row in joined.rows] == ["town/all", "town/night", "room/all", "room/night"]
    assert joined.notes == ("town: a note", "room: a note") and joined.settings == report.settings
    assert join_tables({"town": report}) is report and join_tables({}) is None


RESULTS_1 = """{"format": "gnnet results 1", "title": "old", "settings": {"loss": "gn", "seed": 1},
"thresholds": [{"metres": 0.25, "degrees": 2.0}, {"metres": 0.5, "degrees": 5.0}, {"metres": 5.0, "degrees": 10.0}],
"lines": [
{"method": "start", "condition": "all", "count": 40, "median_position_m": 0.52, "median_rotation_deg": 4.1,
 "recall": [0.1, 0.4, 1.0], "converged": 0.0},
{"method": "trained", "condition": "all", "count": 40, "median_position_m": "inf", "median_rotation_deg": null,
 "recall": [0.925, 0.975, 1.0], "converged": 0.9}], "notes": ["a note"]}"""
MATCHING_1 = """{"format": "gnnet matching 1", "title": "old", "settings": {"loss": "gn"}, "thresholds_px": [1.0, 3.0],
"methods": {
"trained": [{"condition": "all", "pairs": 4, "keypoints": 90.5, "within": [0.5, 0.75], "kept": 40.0,
 "kept_within": [0.8, null]}],
"SIFT": [{"condition": "all", "pairs": 4, "keypoints": 90.5, "within": [0.25, 0.5], "kept": 20.0,
 "kept_within": [0.9, 1.0]}]}, "notes": []}"""


def test_files_of_the_version_before_are_read_and_compared_with_new_ones(tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(RESULTS_1)
    table = read_table(old)
    assert table.rows[0] == make_table().rows[0] and table.columns == make_table().columns
    assert table.rows[1]["median_position_m"] == math.inf and math.isnan(table.rows[1]["median_rotation_deg"])
    assert table.notes == ("a note",) and table.settings == {"loss": "gn", "seed": 1}
    write_table(make_table(INITIAL, TRAINED), new)
    compared = compare_runs([old, new])
    assert [row.method for row in compared.rows] == ["initial poses", "gn", "nce"]

    old.write_text(MATCHING_1)
    table = read_table(old)
    assert [(row.method, row["pairs"], row["matched_3px"], row["kept"]) for row in table.rows] == [
        ("trained", 4, 0.75, 40.0), ("SIFT", 4, 0.5, 20.0),
    ]  # fmt: skip
    assert math.isnan(table.rows[0]["kept_3px"])
    with pytest.raises(ValueError, match=r"new\.json has the columns .* but .*old\.json has pairs"):
        compare_runs([old, new])


def test_rows_have_the_columns_of_their_table():
    with pytest.raises(ValueError, match=r"'a' on 'all' has the values y; expected one for each of the columns x"):
        Table("t", (Column("x", "x", Unit.COUNT),), (Row("a", "all", {"y": 1}),))


def test_columns_of_words_and_tables_without_conditions(tmp_path):
    columns = (Column("size", "pixels", Unit.TEXT), Column("pairs", "pairs", Unit.COUNT))
    table = Table("t", columns, (Row("day", "", {"size": "80×60", "pairs": 1200}),), row_header="images")
    write_table(table, tmp_path / "t.json")
    assert read_table(tmp_path / "t.json") == table
    assert any(line.split() == ["day", "80×60", "1,200"] for line in printed(table).splitlines())


def test_wide_tables_move_closer_together():
    columns = tuple(Column(f"column{i}", f"column{i}", Unit.COUNT) for i in range(8))
    table = Table("", columns, (Row("method", "", {c.name: 1 for c in columns}),), row_header="")
    assert max(map(len, printed(table, width=80).splitlines())) == 6 + 8 * 8
    assert max(map(len, printed(table, width=100).splitlines())) == 6 + 8 * 10


def test_without_a_known_pose_no_empty_table_is_printed():
    text = printed(localization_table("on a map", ((0.05, 5.0),), (), notes=("9 of 12 queries localized",)))
    assert text.splitlines() == [
        "on a map", "No query has a known pose, so there are no errors to tell.", "• 9 of 12 queries localized",
    ]  # fmt: skip
