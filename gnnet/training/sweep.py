"""The jobs of a sweep: their folders, how each ended, and one table of all, whatever process or machine ran them."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pytorch_lightning.utilities import rank_zero_only

from gnnet.evaluation.runs import best_first, compare_runs, result_files
from gnnet.evaluation.tables import print_table, write_csv
from gnnet.training.launch import quote_paths

STATUS = "status.txt"  # in a job's folder
RUNNING, DONE = "running", "done"  # its content; anything else tells why the job failed
_WHOLE = re.compile(r"""'(\\.|[^'])*'|"(\\.|[^"])*"|\[.*\]|\{.*\}""")  # a quoted text, a list, a mapping: one value
_SEVERAL = re.compile(r"[,(]")  # in a value: a choice, or one of Hydra's functions
_DIGITS = re.compile(r"\d+\.\d{5,}(e[-+]?\d+)?")  # a number that is too long for a name
_LONGEST_VALUE, _LONGEST_NAME = 32, 80  # letters of a sweep's folders; file systems take 255


def varied(overrides: Sequence[str]) -> list[str]:
    """The settings of a sweep's job, `key=value` each, that have several values on the command line, or none there."""
    given = (argument.partition("=") for argument in quote_paths(sys.orig_argv))
    fixed = {key for key, _, value in given if not _SEVERAL.search(_WHOLE.sub("", value))}
    return [override for override in overrides if override.partition("=")[0] not in fixed]


def job_folder(number: int | str, overrides: Sequence[str]) -> str:
    """Name of the folder of a sweep's job: its number and what varies, as `3_loss-gn_lr-0.001`.

    It is short, and holds letters only that shells, file systems and Hydra take as they are. Of a long value the
    end is kept, which tells paths apart.
    """
    parts = [str(number)]
    for override in varied(overrides):
        key, _, value = override.partition("=")
        value = _short_numbers(value.strip("'\"").lstrip("/"))
        value = re.sub(r"[^A-Za-z0-9.+-]+", "-", value)[-_LONGEST_VALUE:].lstrip("-." if "/" in value else ".")
        parts.append(re.sub(r"\W+", "", re.split(r"[./@]", key)[-1], flags=re.ASCII) + "-" + value)
    return "_".join(parts)[:_LONGEST_NAME].rstrip("-._")


def _short_numbers(text: str) -> str:
    return _DIGITS.sub(lambda digits: f"{float(digits[0]):.4g}", text)


@dataclass(frozen=True)
class Job:
    """One run of a program, alone or in a sweep.

    Args:
        folder: what it writes into.
        overrides: its settings on the command line, `key=value` each.
        choices: by group, the option in use.
        in_sweep: whether it is one of several.
    """

    folder: Path
    overrides: Sequence[str]
    choices: Mapping[str, str]
    in_sweep: bool

    @classmethod
    def of(cls, record: Any) -> Job:
        """The job that Hydra's record (`HydraConfig.get()`) is of."""
        folder, in_sweep = Path(record.runtime.output_dir), record.mode.name == "MULTIRUN"
        return cls(folder, list(record.overrides.task), dict(record.runtime.choices), in_sweep)

    def arguments(self) -> Sequence[str]:
        """The command line of this job alone, without the program."""
        return self.overrides if self.in_sweep else sys.argv[1:]

    def stopped_at(self) -> str | None:
        """Its last checkpoint, if SLURM stopped the job there and starts it again in the same folder."""
        last = self.folder / "checkpoints" / "last.ckpt"
        return str(last) if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" and last.is_file() else None

    def options(self) -> dict[str, str]:
        """What stands in the tables of a training: in a sweep what varies, and which option of each group is in use."""
        groups = ("dataset", "model", "loss", "trainer", "experiment")
        run = _short_numbers(" ".join(varied(self.overrides))) if self.in_sweep else ""
        return ({"run": run} if run else {}) | {g: self.choices[g] for g in groups if self.choices.get(g)}

    def evaluation(self) -> str:
        """The command line without checkpoint and data, unless a sweep varies them: names a run in a comparison."""
        data = ("checkpoint=", "weights=", "dataset", "paths.")
        varying = varied(self.overrides) if self.in_sweep else []
        given = [o for o in self.overrides if o in varying or not o.startswith(data)]
        return " ".join(o.removeprefix("localizer=").removeprefix("localizer.") for o in given)


@contextmanager
def job_status(folder: Path | None) -> Iterator[None]:
    """Run one job of a sweep: one that fails does not end the others. How it ended stands in its `status.txt`.

    A launcher's own exit, which has a number, is passed on: SLURM starts the job again.

    Args:
        folder: of the job; without one it is no job of a sweep, and its errors are passed on.
    """
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    _write_status(folder, RUNNING)
    status = DONE
    try:
        yield
    except SystemExit as error:
        if error.code and not isinstance(error.code, str):
            raise
        status = (error.code or DONE).strip()  # what the user can mend
    except Exception as error:
        traceback.print_exc()
        status = f"{type(error).__name__}: {error}"
    _write_status(folder, status)
    if status != DONE:
        print(f"{folder} failed: {status}", file=sys.stderr, flush=True)


@rank_zero_only  # SLURM runs all processes of a job in its folder
def _write_status(folder: Path, status: str) -> None:
    (folder / STATUS).write_text(f"{status}\n", encoding="utf-8")


class Sweep:
    """Prints and keeps one table of a sweep's jobs when they have ended, and names those that failed.

    A callback of Hydra's, whose methods have Hydra's names. It is pickled into processes in which launchers run
    jobs: they know then how to name a job's folder, and how Lightning starts further processes of the job.
    """

    def __init__(self) -> None:
        self._folder = Path()
        self._earlier: dict[Path, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        argv = [os.path.abspath(sys.argv[0]), *sys.argv[1:]]
        return {"argv": argv, "orig_argv": sys.orig_argv, "start": multiprocessing.get_start_method(allow_none=True)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make this process one of the program that started it."""
        self.__init__()  # type: ignore[misc]
        sys.argv, sys.orig_argv = state["argv"], state["orig_argv"]
        multiprocessing.set_start_method(state["start"], force=True)  # joblib's own starts no worker of a loader
        sys.modules["__main__"].__spec__ = None  # else Lightning would start the launcher's worker again
        OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        """Before the first job. What earlier sweeps left in the same folder is not of this one."""
        self._folder = Path(config.hydra.sweep.dir).absolute()
        self._earlier = {path: path.stat().st_mtime_ns for path in self._folder.rglob(STATUS)}
        paths = [os.path.dirname(os.path.abspath(sys.argv[0])), os.environ.get("PYTHONPATH")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # jobs find gnnet where this program does
        atexit.register(self.summarize)  # also where the sweep is interrupted or the launcher fails

    def on_multirun_end(self, config: Any, **_: Any) -> None:
        """After the last job.

        Raises:
            SystemExit: with status 1, if a job failed.
        """
        atexit.unregister(self.summarize)
        if self.summarize():
            raise SystemExit(1)

    def _nothing(self, config: Any, **_: Any) -> None: ...

    on_run_start = on_run_end = on_job_start = on_job_end = _nothing

    def summarize(self) -> dict[Path, str]:
        """Print the table of all jobs, write it as sweep.csv, and name the jobs that failed.

        Returns:
            Why each of those failed, by its folder.
        """
        ended = [path for path in self._folder.rglob(STATUS) if path.stat().st_mtime_ns != self._earlier.get(path)]
        ended.sort(key=lambda path: [int(n) for n in re.findall(r"\d+", path.parent.name)])
        statuses = {path.parent: path.read_text(encoding="utf-8").strip() for path in ended}
        if not statuses:
            return {}
        try:
            table = best_first(compare_runs(result_files(statuses)))
            print_table(table)
            print(f"The table of the sweep is {write_csv(table, self._folder / 'sweep.csv')}")
        except ValueError as error:
            print(f"no table of the sweep: {error}")
        failed = {folder: status for folder, status in statuses.items() if status != DONE}
        for folder, status in failed.items():
            print(f"failed: {folder} ({'it was stopped' if status == RUNNING else status.splitlines()[0]})")
        print(f"{len(statuses) - len(failed)} of {len(statuses)} jobs done", flush=True)
        return failed
