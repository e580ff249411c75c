"""The jobs of a sweep: names of their folders, how each ended, and the table of all."""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import submitit
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import OmegaConf

import evaluate
import train
from gnnet.evaluation.metrics import ErrorSummary
from gnnet.evaluation.tables import localization_table, write_table
from gnnet.training.launch import quote_paths
from gnnet.training.sweep import Job, Sweep, job_folder, job_status
from tests.training.test_launch import values_of

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"


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
    drawn = ["o.lr=0.0012520653814999472", "l.gn.weight=6.148035553662853e-05"]  # as Optuna draws them
    assert job_folder(0, drawn) == "0_lr-0.001252_weight-6.148e-05"
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


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A sweep in `tmp_path`, in whose folder an earlier one left a job."""
    monkeypatch.setenv("PYTHONPATH", "x")
    with job_status(tmp_path / "9_earlier"):
        raise SystemExit("an earlier sweep's")
    sweep = Sweep()
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    sweep.on_multirun_start(config, config_name="train")
    yield sweep
    with pytest.raises(SystemExit) if sweep.summarize() else nullcontext():
        sweep.on_multirun_end(config)


@pytest.mark.cases
def test_a_job_that_fails_is_named_and_the_rest_of_the_sweep_is_told(sweep, tmp_path, capsys):
    for number, (name, converged) in enumerate((("worse", 0.25), ("better", 0.75))):
        with job_status(tmp_path / str(number)):
            finish(tmp_path / str(number), converged, run=f"loss={name}", seed=0)
    with job_status(tmp_path / "2"):
        raise SystemExit("\nno such loss")
    with job_status(tmp_path / "10"):
        raise RuntimeError("out of memory\nat once")
    with pytest.raises(KeyboardInterrupt), job_status(tmp_path / "3"):
        raise KeyboardInterrupt
    assert [folder.name for folder in sweep.summarize()] == ["2", "3", "10"]
    found = capsys.readouterr()
    assert found.out.index("loss=better") < found.out.index("loss=worse")
    assert f"failed: {tmp_path / '2'} (no such loss)\n" in found.out and "2 of 5 jobs done\n" in found.out
    assert f"failed: {tmp_path / '10'} (RuntimeError: out of memory)\n" in found.out and "Traceback" in found.err
    assert f"failed: {tmp_path / '3'} (it was stopped)\n" in found.out
    header, *lines = (tmp_path / "sweep.csv").read_text().splitlines()
    assert header == "method,condition,count,median_position_m,median_rotation_deg,converged,recall_0.05m_5deg"
    assert [line.split(",")[0] for line in lines] == ["loss=better", "loss=worse"]


def test_a_sweep_without_failure_ends_well_and_a_run_alone_has_no_summary(sweep, tmp_path, capsys):
    assert sweep.summarize() == {} and capsys.readouterr().out == ""  # the earlier job is not of this sweep
    with job_status(tmp_path / "0"):
        pass  # a training without validation
    assert sweep.summarize() == {}
    assert "no table of the sweep" in capsys.readouterr().out
    assert (tmp_path / "0" / "status.txt").read_text() == "done\n"
    with pytest.raises(ValueError, match="as it is"), job_status(None):
        raise ValueError("as it is")


def test_a_job_that_slurm_starts_again_goes_on_where_it_stopped(tmp_path, monkeypatch):
    with pytest.raises(SystemExit), job_status(tmp_path):
        raise SystemExit(-1)  # as submitit ends a job that it has submitted again
    assert (tmp_path / "status.txt").read_text() == "running\n"
    started, last = Job(tmp_path, [], {}, in_sweep=True), tmp_path / "checkpoints" / "last.ckpt"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert started.stopped_at() is None  # before the first checkpoint
    last.parent.mkdir()
    last.touch()
    assert started.stopped_at() == str(last)
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert started.stopped_at() is None  # a folder that is used again


IN_A_WORKER = """
import multiprocessing, pickle, sys
from omegaconf import OmegaConf
multiprocessing.set_start_method("forkserver")  # as a launcher's worker has another than the program
pickle.load(sys.stdin.buffer)
name = OmegaConf.create({"name": "${job_folder:3,${given}}", "given": ["loss=gn", "steps=5"]}).name
print(name, sys.argv, sys.modules["__main__"].__spec__, multiprocessing.get_start_method())
"""


@pytest.mark.slow
def test_a_process_of_a_launcher_names_folders_and_starts_further_processes_as_the_program_does(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "loss=dmc,gn", "steps=5"])
    monkeypatch.setattr(sys, "orig_argv", ["python", *sys.argv])
    (tmp_path / "worker.py").write_text(IN_A_WORKER)
    worker = subprocess.run(
        [sys.executable, "-m", "worker"], input=pickle.dumps(Sweep()), capture_output=True, check=True,
        env={"PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )  # fmt: skip
    expected = f"3_loss-gn {[str(ROOT / 'train.py'), *sys.argv[1:]]} None {multiprocessing.get_start_method()}"
    assert worker.stdout.decode().strip() == expected


def test_a_job_of_slurm_has_a_task_a_gpu_is_warned_before_its_end_and_submitted_again(tmp_path, monkeypatch):
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    executors = []
    monkeypatch.setattr(submitit.AutoExecutor, "map_array", lambda self, *_: executors.append(self) or [])
    asked = ["hydra/launcher=slurm", "hydra.launcher.partition=big", "trainer=ddp", "trainer.devices=4"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for name in ("train", "evaluate"):
            given = asked if name == "train" else [*asked[:2], "checkpoint=x"]
            given = [*given, "hydra.job.name=gnnet", f"hydra.sweep.dir={tmp_path}"]
            cfg = compose(name, given, return_hydra_config=True)
            HydraConfig.instance().set_config(cfg)
            launcher = instantiate(cfg.hydra.launcher)
            launcher.setup(hydra_context=None, task_function=None, config=cfg)
            launcher.launch([["loss=gn"]], 0)
    lines = [executor._executor._make_submission_file_text("python", "7").splitlines() for executor in executors]
    for text, tasks in zip(lines, (4, 1), strict=True):
        options = (f"ntasks-per-node={tasks}", f"gpus-per-node={tasks}", "nodes=1", "partition=big", "requeue")
        assert {f"#SBATCH --{option}" for option in (*options, "signal=USR2@300", "time=1440")} <= set(text)


def test_optuna_seeks_what_the_loss_has(tmp_path):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["sweep=optuna"], return_hydra_config=True)
    assert cfg.hydra.sweeper._target_.endswith("OptunaSweeper") and cfg.hydra.sweeper.direction == "maximize"
    for key, value in cfg.hydra.sweeper.params.items():
        low, high = map(float, value.rstrip(")").rpartition("(")[2].split(","))
        assert low < OmegaConf.select(cfg, key) < high
