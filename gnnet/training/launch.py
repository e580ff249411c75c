"""What surrounds a run: its command line and name, the jobs of a sweep, the processes of one job, loggers, messages."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from gnnet.evaluation.report.charts import loss_curves
from gnnet.evaluation.runs import best_first, compare_runs, result_files
from gnnet.evaluation.tables import print_table, write_csv
from gnnet.training.sigterm import Terminated

# What the user can mend; its message is enough.
MENDABLE = (FileNotFoundError, ConnectionError, ValueError)

_NEEDS_NO_QUOTES = re.compile(r"[A-Za-z0-9_/\-+.$%*@?|: ]*")  # what Hydra reads in a value as it stands
_NO_PATH = re.compile(r"""['"\[{]|\w+\(|.*\$\{""")  # quoted, a list, a mapping, a function of Hydra's, an interpolation
_WHOLE = re.compile(r"""'(\\.|[^'])*'|"(\\.|[^"])*"|\[.*\]|\{.*\}""")  # a quoted text, a list, a mapping: one value
_SEVERAL = re.compile(r"[,(]")  # in a value: a choice, or one of Hydra's functions
_LONGEST_VALUE, _LONGEST_NAME = 32, 80  # letters of a sweep's folders; file systems take 255


def quote_paths(arguments: Sequence[str]) -> list[str]:
    """A command line for Hydra, with quotes around paths that hold `=`, `(`, `,`, `ä` or others that it does not read.

    A value is a path if it holds a slash, or if there is such a file or folder. In a sweep, several paths with
    commas between them are quoted one by one.
    """
    in_sweep = not {"-m", "--multirun"}.isdisjoint(arguments)
    return [_quote_path(argument, in_sweep) for argument in arguments]


def _quote_path(argument: str, in_sweep: bool) -> str:
    key, equals, value = argument.partition("=")
    several = value.split(",")
    if not equals or key.startswith("-") or _NO_PATH.match(value):
        return argument
    paths = several if not os.path.exists(value) and (in_sweep or all(map(os.path.exists, several))) else [value]
    escaped = [
        path
        if _NEEDS_NO_QUOTES.fullmatch(path) or not ("/" in path or os.path.exists(path))
        else "'" + path.replace("'", r"\'") + "'"
        for path in paths
    ]
    return f"{key}={','.join(escaped)}"


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
        value = value.strip("'\"").lstrip("/")
        value = re.sub(r"[^A-Za-z0-9.+-]+", "-", value)[-_LONGEST_VALUE:].lstrip("-." if "/" in value else ".")
        parts.append(re.sub(r"\W+", "", re.split(r"[./@]", key)[-1], flags=re.ASCII) + "-" + value)
    return "_".join(parts)[:_LONGEST_NAME].rstrip("-._")


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

    def options(self) -> dict[str, str]:
        """What stands in the tables of a training: in a sweep what varies, and which option of each group is in use."""
        groups = ("dataset", "model", "loss", "trainer", "experiment")
        run = " ".join(varied(self.overrides)) if self.in_sweep else ""
        return ({"run": run} if run else {}) | {g: self.choices[g] for g in groups if self.choices.get(g)}

    def evaluation(self) -> str:
        """The command line without checkpoint and data, unless a sweep varies them: names a run in a comparison."""
        data, varying = ("checkpoint=", "dataset", "paths."), varied(self.overrides) if self.in_sweep else []
        given = [o for o in self.overrides if o in varying or not o.startswith(data)]
        return " ".join(o.removeprefix("localizer=").removeprefix("localizer.") for o in given)


@dataclass
class Sweep:
    """The jobs of a sweep: one that fails does not end the others, and at the end one table shows them all.

    Args:
        jobs: why each failed, by its folder; empty for one that did not.
    """

    jobs: dict[Path, str] = field(default_factory=dict)

    @contextmanager
    def job(self, folder: Path | None) -> Iterator[None]:
        """Run one job; without a `folder` it is no job of a sweep, and its errors are passed on."""
        if folder is None:
            yield
            return
        self.jobs[folder] = "it was stopped"
        try:
            yield
            self.jobs[folder] = ""
        except Terminated:  # the sweep ends too
            raise
        except SystemExit as error:  # what the user can mend
            self.jobs[folder] = str(error.code).strip() if error.code else ""
        except Exception as error:
            traceback.print_exc()
            self.jobs[folder] = f"{type(error).__name__}: {error}"
        if self.jobs[folder]:
            print(f"{folder} failed: {self.jobs[folder]}", file=sys.stderr, flush=True)

    @contextmanager
    def summary(self) -> Iterator[None]:
        """Print the table of all jobs after the block, write it as sweep.csv, and name the jobs that failed.

        Raises:
            SystemExit: with status 1, if a job failed.
        """
        try:
            yield
        finally:
            if self.jobs:
                self._summarize()
        if any(self.jobs.values()):
            raise SystemExit(1)

    def _summarize(self) -> None:
        try:
            table = best_first(compare_runs(result_files(self.jobs)))
            print_table(table)
            path = write_csv(table, os.path.join(os.path.commonpath([job.parent for job in self.jobs]), "sweep.csv"))
            print(f"The table of the sweep is {path}")
        except ValueError as error:
            print(f"no table of the sweep: {error}")
        failed = {folder: reason for folder, reason in self.jobs.items() if reason}
        for folder, reason in failed.items():
            print(f"failed: {folder} ({reason.splitlines()[0]})")
        print(f"{len(self.jobs) - len(failed)} of {len(self.jobs)} jobs done", flush=True)


@contextmanager
def one_job(arguments: Sequence[str]) -> Iterator[None]:
    """Let several processes train one job of a sweep.

    Lightning starts its other processes by running this program's command line again. In a sweep that
    would be the whole sweep, so the command line becomes that of this job. Afterwards the traces that
    would make Lightning take the next job for such a child process are removed.

    Args:
        arguments: the command line of this job alone, without the program.
    """
    argv, environment = sys.argv, dict(os.environ)
    sys.argv = [argv[0], *arguments]
    try:
        yield
    finally:
        sys.argv = argv
        for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
            if name in environment:
                os.environ[name] = environment[name]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@contextmanager
def message_only(*errors: type[Exception]) -> Iterator[None]:
    """End the program with the message of an error of these kinds, without its traceback."""
    try:
        yield
    except errors as error:
        raise SystemExit(f"\n{error}") from error


def silence_lightning() -> None:
    """Leave out what Lightning says that the user can do nothing about."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)  # tips and hardware
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own, about torch
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")  # gnnet's samplers are
    warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified.*")  # some losses need it
    warnings.filterwarnings("ignore", message=".*It is recommended to use `self.log.*")  # values are gathered before


def refuse_several_processes(script: str) -> None:
    """End a script that works on one process if torchrun started several, which would write the same files.

    Raises:
        ValueError: if this is one of several processes.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count != "1":
        raise ValueError(
            f"{script} runs on one process, and torchrun (WORLD_SIZE) started {count}, which would write the same "
            f"files; start it with: python {script} …"
        )


def fit(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    *,
    checkpoint: str | None,
    curves: Path,
) -> int:
    """Train, close the loggers, and draw the losses; returns the seconds it took.

    Args:
        trainer: with its loggers.
        module: what is trained.
        data: set up.
        checkpoint: file to go on from; None starts anew.
        curves: file that the first process draws the losses into.
    """
    started = time.monotonic()
    with close_loggers(trainer):
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    if trainer.is_global_zero:
        draw_loss_curves(trainer, curves)
    return round(time.monotonic() - started)


@contextmanager
def close_loggers(trainer: pl.Trainer) -> Iterator[None]:
    """Finish every logger's run, also when training fails: wandb would go on with it in the next job of a sweep."""
    status = "failed"
    try:
        yield
        status = "success"
    finally:
        for logger in trainer.loggers:
            logger.finalize(status)
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish(exit_code=0 if status == "success" else 1)


def draw_loss_curves(trainer: pl.Trainer, path: Path) -> None:
    """Draw the losses of the CSV log into a file, if such a log was kept and the run was long enough to log a step.

    A run that goes on from a checkpoint counts its own steps only, so the log itself tells.
    """
    for logger in trainer.loggers:
        log = Path(logger.log_dir or "") / "metrics.csv"
        if isinstance(logger, pl.loggers.CSVLogger) and log.is_file() and "loss" in log.read_text().partition("\n")[0]:
            loss_curves(log, path=path)
