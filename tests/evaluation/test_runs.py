"""Runs side by side, and how they differ on the same queries."""

import json

import pytest

from gnnet.evaluation.metrics import ErrorSummary
from gnnet.evaluation.runs import compare_runs, main, result_files
from gnnet.evaluation.tables import localization_table, write_table
from tests.evaluation.test_tables import FAILED, INITIAL, RESULTS_1, TRAINED, changed, make_table, printed


def test_runs_stand_beside_each_other(tmp_path):
    better = changed(TRAINED, median_position=0.002)
    paths = [tmp_path / name / "results.json" for name in "abc"]
    write_table(make_table(INITIAL, TRAINED, FAILED, loss="dmc", steps=900), paths[0])
    write_table(make_table(INITIAL, better, changed(FAILED, count=11), loss="nce", steps=900), paths[1])
    write_table(make_table(INITIAL, TRAINED, FAILED, loss="nce", seed=1, steps=900), paths[2])
    report = compare_runs(paths)
    assert [(row.method, row["median_position_m"]) for row in report.rows if row.condition == "all"] == [
        ("initial poses", 0.52), ("dmc", 0.0042), ("nce #1", 0.002), ("nce #2", 0.0042),
    ]  # fmt: skip
    unequal = [row.method for row in report.rows if row.condition == "night"]
    assert unequal == ["grey values (dmc)", "grey values (nce #1)", "grey values (nce #2)"]
    assert report.settings == {"dataset": "toy", "steps": 900}
    assert report.notes[2] == f"nce #2: seed 1, {paths[2]}"
    assert "nce #1" in printed(report)


def test_runs_that_cannot_be_compared_say_why(tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    write_table(make_table(), first)
    with pytest.raises(ValueError, match=r"no results\.json to compare"):
        compare_runs([])
    with pytest.raises(ValueError, match=r"has no setting 'model'.*dataset, loss, seed"):
        compare_runs([first], setting="model")
    indoor = localization_table("", ((0.05, 5.0),), [changed(INITIAL, recall=(1.0,))], settings={"loss": "gn"})
    write_table(indoor, second)
    with pytest.raises(ValueError, match=r"second\.json has the columns .*recall_0\.05m_5deg, but .*same thresholds"):
        compare_runs([first, second])


def test_runs_are_named_by_what_differs(tmp_path):
    paths = []
    for gradient in ("central", "bicubic"):
        row = ("refined", "all", 4, ErrorSummary(0.01, 0.1, (1.0,), 1.0))
        settings = {"run": f"sparse_to_dense gradient={gradient}"}
        report = localization_table("a", ((0.05, 5.0),), [row], settings=settings)
        paths.append(tmp_path / f"{gradient}.json")
        write_table(report, paths[-1])
    assert compare_runs(paths) == compare_runs(paths, setting="run", method="refined")  # what it takes by itself
    assert [row.method for row in compare_runs(paths).rows] == ["gradient=central", "gradient=bicubic"]


def written_run(folder, run: str, errors: dict[str, float | None], unknown: tuple[str, ...] = ()):
    """A run's table and records, with each query's position error in metres; None is a failure."""
    folder.mkdir()
    row = ("refined", "all", len(errors), ErrorSummary(0.01, 0.1, (1.0,), 1.0))
    write_table(localization_table("", ((0.05, 5.0),), [row], settings={"run": run}), folder / "localization.json")
    records = [{"name": name, "error": {"position_m": error}} for name, error in errors.items()]
    records += [{"name": name} for name in unknown]
    (folder / "localizations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "localization.json"


def test_two_runs_are_compared_query_by_query(tmp_path):
    names = [f"{i}.jpg" for i in range(10)]
    first = written_run(tmp_path / "a", "sparse", {n: 0.01 * (i + 1) for i, n in enumerate(names)}, ("unknown.jpg",))
    errors = {n: 0.005 * (i + 1) for i, n in enumerate(names)}
    # In another order, one failed, one that the other run does not have.
    other = written_run(tmp_path / "b", "dense", dict(reversed((errors | {"3.jpg": None, "new.jpg": 1.0}).items())))
    assert compare_runs([first, other]).notes[-1] == (
        "dense / sparse, paired: position errors × 0.50 (95 %: 0.50 to 0.50), dense better in 100 % of 9; "
        "1 localized by sparse only; queries of dense only: 1"
    )
    assert len(compare_runs([first]).notes) == 1
    lone = written_run(tmp_path / "c", "none", {}, ("0.jpg",))
    assert len(compare_runs([first, lone]).notes) == 2  # without a known pose there is nothing to compare
    (tmp_path / "b" / "localizations.jsonl").write_text("{}\n{broken\n")
    with pytest.raises(ValueError, match=r"localizations\.jsonl, line 2: "):
        compare_runs([first, other])


def test_the_command_takes_folders_of_runs(tmp_path, monkeypatch, capsys):
    for name, error in (("a", 0.02), ("b", 0.03)):
        written_run(tmp_path / name, name, {"1.jpg": error, "2.jpg": 2 * error})
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "a"), str(tmp_path / "b")])
    main()
    assert "b / a, paired: position errors × 1.50" in capsys.readouterr().out


def test_the_command_compares_files(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    path.write_text(RESULTS_1)
    monkeypatch.setattr("sys.argv", ["report", str(path)])
    main()
    assert "1 runs by loss" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "none.json")])
    with pytest.raises(SystemExit, match=r"none\.json does not exist"):
        main()


@pytest.mark.cases
def test_folders_of_runs_are_compared_by_all_tables_below_them(tmp_path, monkeypatch, capsys):
    for number in (0, 2, 10):
        table = make_table(run=f"lr={number}")
        write_table(table, tmp_path / f"{number}_lr-{number}" / "results.json")
        write_table(table, tmp_path / f"{number}_lr-{number}" / "matching.json")  # one table of each run
    files = [tmp_path / f"{number}_lr-{number}" / "results.json" for number in (0, 2, 10)]
    assert result_files([tmp_path]) == files
    assert result_files([tmp_path / "10_lr-10", files[0]]) == [files[2], files[0]]
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path)])
    main()
    assert "3 runs by run" in capsys.readouterr().out
