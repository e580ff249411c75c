"""The command line, the jobs of a sweep, and the loss curves of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from pytorch_lightning.loggers import CSVLogger

import evaluate
import train
from gnnet.evaluation.metrics import ErrorSummary
from gnnet.evaluation.tables import localization_table, write_table
from gnnet.training.launch import Sweep, draw_loss_curves, job_folder, quote_paths, refuse_several_processes

CONF = Path(__file__).parents[2] / "conf"


def values_of(argument: str) -> list:
    """What Hydra makes of one argument: its value, or all of a sweep."""
    [override] = OverridesParser.create().parse_overrides([argument])
    values = override.sweep_iterator() if override.is_sweep_override() else [override.value()]
    return [getattr(value, "text", value) for value in values]


@pytest.mark.cases
@pytest.mark.parametrize(
    "path",
    ["runs/0_loss=gn/checkpoints/best.ckpt", "data/Halle (Süd), 2024", "data/it's here", "data/[x]{y}", "data/a,b=c"],
)
def test_a_path_of_any_letters_is_taken(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    for place in (path, str(tmp_path / path)):  # not there: then the program says so, not the parser of settings
        [argument] = quote_paths([f"checkpoint={place}"])
        assert values_of(argument) == [place]
    Path(path).mkdir(parents=True)
    for place in (path, str(tmp_path / path)):
        [flag, argument] = quote_paths(["-m", f"dataset.root={place}"])
        assert flag == "-m" and values_of(argument) == [place]
    monkeypatch.chdir(tmp_path / Path(path).parent)
    if not path.endswith("[x]{y}"):  # without a slash that is a list
        assert values_of(*quote_paths([f"dataset.root={Path(path).name}"])) == [Path(path).name]


@pytest.mark.cases
def test_each_path_of_a_sweep_is_quoted():
    [_, argument, plain] = quote_paths(["-m", "checkpoint=a/0_loss=gn/best.ckpt,b/x.ckpt", "loss=gn,nce"])
    assert values_of(argument) == ["a/0_loss=gn/best.ckpt", "b/x.ckpt"] and plain == "loss=gn,nce"


@pytest.mark.parametrize(
    "argument",
    ["loss=gn,nce", "dataset.conditions=[night,sun]", "checkpoint='a/b=c'", "a=choice(/x,/y)", "+s@d.s.a=colmap",
     "paths.output_dir=${paths.data_dir}/x=y", "--config-dir=a,b/c", "-m", "a/b=c", "m.widths=[8, 16]", "a={b: c/d}"],
)  # fmt: skip
def test_what_is_no_path_stays(argument):
    assert quote_paths([argument]) == [argument]


@pytest.mark.cases
def test_a_sweeps_folders_are_short_and_hydra_takes_them(monkeypatch):
    # What Hydra writes another way: lists, truth values, numbers, text in quotes.
    many = [f"a.b{i}={i}" for i in range(99)]
    fixed = ["a.flag=true", "dataset.root=/data/Halle (Süd) b", "dataset.conditions=[reference, x]", "a.u=1e-4", *many]
    monkeypatch.setattr(sys, "orig_argv", ["train.py", "-m", "loss=gn,nce", "o.lr=choice(1e-4,-.5)", *fixed])
    requoted = [
        "a.flag=True", "dataset.root='/data/Halle (Süd) b'", "dataset.conditions=[reference,x]", "a.u=0.0001", *many,
    ]  # fmt: skip
    assert job_folder(3, [*requoted, "loss=gn", "o.lr=1e-4"]) == "3_loss-gn_lr-1e-4"
    odd = [
        "checkpoint='/runs/0_loss=gn/checkpoints/best.ckpt'", "a.x='ä,(b) ='", "localizer/retrieval=netvlad",
        "+s@d.b=c", "a.levels=[0,1]", "a.very_long_name=" + 300 * "x", "a.w=-0.5", "a.z=..", "a.w=''", "~a.v",
    ]  # fmt: skip
    for overrides in ([one] for one in odd):
        name = job_folder(12, overrides)
        assert len(name) <= 80 and name.startswith("12_") and name.isascii() and not set(name) & set("=/,' ()[]")
        argument = f"checkpoint=outputs/multirun/2026-11-28/01-02-03/{name}/checkpoints/best.ckpt"
        assert values_of(argument) == [argument.partition("=")[2]] and quote_paths([argument]) == [argument]
    assert job_folder(0, odd[:1]) == "0_checkpoint-0-loss-gn-checkpoints-best.ckpt"
    assert len(job_folder(0, odd)) <= 80 and job_folder(0, []) == "0"


@pytest.mark.cases
@pytest.mark.parametrize(
    ("program", "overrides"), [(train, ["loss=gn"]), (evaluate, ["localizer=sparse", "checkpoint=x"])]
)
def test_both_programs_name_their_jobs_so(monkeypatch, program, overrides):
    monkeypatch.setattr(sys, "orig_argv", ["checkpoint=x"])  # given, so it does not vary
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(program.__name__, [*overrides, "hydra.job.num=7"], return_hydra_config=True)
    name = "7_" + overrides[0].replace("=", "-")
    assert OmegaConf.select(cfg, "hydra.sweep.subdir") == name


def finish(folder: Path, converged: float, **settings) -> None:
    summary = ErrorSummary(0.1, 1.0, (0.5,), converged)
    table = localization_table("t", ((0.05, 5.0),), [("trained", "all", 4, summary)], settings=settings)
    write_table(table, folder / "results.json")


@pytest.mark.cases
def test_a_job_that_fails_is_named_and_the_rest_of_the_sweep_is_told(tmp_path, capsys):
    sweep = Sweep()
    with pytest.raises(SystemExit) as stopped, sweep.summary():
        for number, (name, converged) in enumerate((("worse", 0.25), ("better", 0.75))):
            with sweep.job(tmp_path / str(number)):
                finish(tmp_path / str(number), converged, run=f"loss={name}", seed=0)
        for folder in (tmp_path / "2", tmp_path / "3"):
            folder.mkdir()
        with sweep.job(tmp_path / "2"):
            raise SystemExit("\nno such loss")
        with sweep.job(tmp_path / "3"):
            raise RuntimeError("out of memory\nat once")
    assert stopped.value.code == 1
    found = capsys.readouterr()
    assert found.out.index("loss=better") < found.out.index("loss=worse")
    assert f"failed: {tmp_path / '2'} (no such loss)\n" in found.out and "2 of 4 jobs done\n" in found.out
    assert f"failed: {tmp_path / '3'} (RuntimeError: out of memory)\n" in found.out and "Traceback" in found.err
    header, *lines = (tmp_path / "sweep.csv").read_text().splitlines()
    assert header == "method,condition,count,median_position_m,median_rotation_deg,converged,recall_0.05m_5deg"
    assert [line.split(",")[0] for line in lines] == ["loss=better", "loss=worse"]


def test_a_sweep_without_failure_ends_well_and_a_run_alone_has_no_summary(tmp_path, capsys):
    sweep = Sweep()
    with sweep.summary(), sweep.job(tmp_path):
        pass  # a training without validation
    assert "no table of the sweep" in capsys.readouterr().out
    alone = Sweep()
    with pytest.raises(ValueError, match="as it is"), alone.summary(), alone.job(None):
        raise ValueError("as it is")
    assert capsys.readouterr().out == ""
    interrupted = Sweep()
    with pytest.raises(KeyboardInterrupt), interrupted.summary(), interrupted.job(tmp_path):
        raise KeyboardInterrupt
    assert f"failed: {tmp_path} (it was stopped)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("log", "drawn"),
    [("step,train/loss\n10,1.5\n20,1.25\n", True), ("step,train/broken_pairs\n402,0\n", False), (None, False)],
)
def test_loss_curves_are_drawn_if_a_loss_was_logged(tmp_path, log, drawn):
    logger = CSVLogger(tmp_path, name="logs", version="")
    (tmp_path / "logs").mkdir()
    if log is not None:
        (tmp_path / "logs" / "metrics.csv").write_text(log)
    draw_loss_curves(SimpleNamespace(loggers=[logger]), tmp_path / "losses.png")
    assert (tmp_path / "losses.png").exists() == drawn


def test_a_script_of_one_process_is_not_run_by_several(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    refuse_several_processes("evaluate.py")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"evaluate\.py runs on one process, and torchrun .* started 2"):
        refuse_several_processes("evaluate.py")
