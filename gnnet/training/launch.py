"""What surrounds a run: its command line, the processes of one job, loggers, messages."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
import torch

from gnnet.evaluation.report.charts import loss_curves

# What the user can mend; its message is enough.
MENDABLE = (FileNotFoundError, ConnectionError, ValueError)

_NEEDS_NO_QUOTES = re.compile(r"[A-Za-z0-9_/\-+.$%*@?|: ]*")  # what Hydra reads in a value as it stands
_NO_PATH = re.compile(r"""['"\[{]|\w+\(|.*\$\{""")  # quoted, a list, a mapping, a function of Hydra's, an interpolation


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
            f"{script} runs on one process, and torchrun or SLURM (WORLD_SIZE) started {count}, which would write the "
            f"same files; start it with: python {script} … devices={count}, and it starts the other processes itself"
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
