"""Kills at random moments: what is killed goes on, and ends as if nothing had happened.

`python -m tests.kills --kills 30 --seed 0` kills training, compiling a map (by one job, and by two at once) and
evaluation, by SIGKILL and SIGTERM in turn, and prints a table. Weights, maps and records must be those of a run that
was never killed, to the last bit; the exit status is 1 if any are not. A kill counts where something was done that can
be gone on with, and the run had not ended.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

import evaluate
from gnnet.arrays import ArrayFile
from gnnet.evaluation.journal import JOURNAL
from gnnet.localization.localizer import Localizer
from gnnet.scenes.layouts.robotcar import load_robotcar
from gnnet.toy.town import TownSettings, ensure_toy_town
from tests.conftest import TOY_SETTINGS
from tests.evaluation.test_journal import results
from tests.localization.test_map import compiled, contents, small_unet
from tests.training.test_entry_points import configure
from tests.training.test_resume import Watch, fit, make_data

_FORK = multiprocessing.get_context("fork")  # so that the imports are made once
_PAUSE = 0.03  # seconds after each step, reference or query, so that kills fall between them too
_MOST_IN_A_RUN = 3
_PATIENCE = 600  # seconds, after which a process hangs

Begins = Callable[[], object]


class Kind(NamedTuple):
    """Something that is killed.

    `work` does it in a folder, or goes on there, and calls its last argument when it begins in earnest; `shared` is a
    folder with what all runs take. `done` counts what there is to go on with, `result` is what must be equal. So many
    `jobs` work in the folder at once, of which the first is killed.
    """

    name: str
    work: Callable[[Path, Path, Begins], object]
    done: Callable[[Path], int]
    result: Callable[[Path], dict[str, bytes]]
    jobs: int = 1


def _prepare(folder: Path, shared: Path, begins: Begins) -> None:
    (shared / "photographs").mkdir()
    generator = np.random.default_rng(0)
    for i in range(7):
        image = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((40, 40))
        image.save(shared / "photographs" / f"{i}.png")
    ensure_toy_town(shared / "toy", TownSettings(**TOY_SETTINGS, write_depth=True), progress=False)


def _train(folder: Path, shared: Path, begins: Begins) -> None:
    saved, watch = folder / "checkpoints" / "last.ckpt", Watch()
    watch.on_train_start = lambda *_: begins()  # type: ignore[method-assign]
    watch.on_train_batch_end = lambda *_: time.sleep(_PAUSE)  # type: ignore[method-assign]
    fit(make_data(shared / "photographs"), folder, watch, resume=saved if saved.exists() else None)


def _checkpoint(folder: Path) -> dict:
    saved = folder / "checkpoints" / "last.ckpt"
    return torch.load(saved, weights_only=True) if saved.exists() else {"global_step": 0, "state_dict": {}}


def _weights(folder: Path) -> dict[str, bytes]:
    found = _checkpoint(folder)
    steps = {"global_step": bytes([found["global_step"]])}
    return steps | {name: value.numpy().tobytes() for name, value in found["state_dict"].items()}


def _compile(folder: Path, shared: Path, begins: Begins) -> None:
    network = small_unet()
    network.forward = _before(network.forward, begins)  # type: ignore[method-assign]
    compiled(folder / "x.gnmap", load_robotcar(shared / "toy", progress=False), network, points=200)


def _references(folder: Path) -> int:
    path = folder / "x.gnmap"
    return int(ArrayFile(path)["done"].sum()) if path.exists() else 0


def _evaluate(folder: Path, shared: Path, begins: Begins) -> None:
    Localizer.localize = _before(Localizer.localize, begins)  # type: ignore[method-assign]
    settings = [
        "weights=gnnet-small", "localizer=sparse_to_dense", "map_points=200", "device=cpu", "dataset=robotcar",
        f"dataset.root={shared / 'toy'}", "dataset.largest_side=null", "dataset.validation_fraction=0.34",
        f"paths.map_dir={shared / 'maps'}", f"paths.index_dir={shared / 'index'}",
    ]  # fmt: skip
    going_on = [f"resume={folder / 'out'}"] if (folder / "out" / JOURNAL).exists() else []
    evaluate.run(configure(folder / "out", *settings, *going_on, name="evaluate"))


def _queries(folder: Path) -> int:
    path = folder / "out" / JOURNAL
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def _records(folder: Path) -> dict[str, bytes]:
    return {name: text.encode() for name, text in results(folder).items()}


def _before(function: Callable, begins: Begins) -> Callable:
    """The function, but it says that it begins, and takes longer."""

    def longer(*arguments, **named):
        begins()
        time.sleep(_PAUSE)
        return function(*arguments, **named)

    return longer


KINDS = (
    Kind("training", _train, lambda folder: _checkpoint(folder)["global_step"], _weights),
    Kind("compiling a map", _compile, _references, lambda folder: contents(folder / "x.gnmap")),
    Kind("evaluation", _evaluate, _queries, _records),
    Kind("a map by two jobs", _compile, _references, lambda folder: contents(folder / "x.gnmap"), jobs=2),
)


@dataclass
class Outcome:
    """What became of the kills of a kind: those that count, by signal, and those that came too early or too late."""

    by: dict[int, int] = field(default_factory=lambda: {signal.SIGKILL: 0, signal.SIGTERM: 0})
    early: int = 0
    late: int = 0
    runs: int = 0
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


def _start(kind: Kind, folder: Path, shared: Path) -> tuple[ForkProcess, float]:
    """A process that works, and when it began; what it prints goes into a file of the folder."""
    begun = _FORK.Event()

    def work() -> None:
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        kind.work(folder, shared, begun.set)

    folder.mkdir(parents=True, exist_ok=True)
    process = _FORK.Process(target=work)
    process.start()
    while not begun.wait(0.02) and process.is_alive():
        pass
    return process, time.monotonic()


def _join(process: ForkProcess, folder: Path, *expected: int) -> None:
    """Wait until a process has ended.

    Raises:
        RuntimeError: with what it printed, if it hangs or has another exit status than is expected.
    """
    process.join(_PATIENCE)
    hangs = process.exitcode is None
    if hangs:
        process.kill()
        process.join()
    if hangs or process.exitcode not in expected:
        what = "it hangs" if hangs else f"exit status {process.exitcode}"
        raise RuntimeError(f"{what}\n{(folder / 'log.txt').read_text()[-2000:]}")


def _to_its_end(kind: Kind, folder: Path, shared: Path) -> float:
    """Work until all is done; returns the seconds since it began; raises as `_join`."""
    process, began = _start(kind, folder, shared)
    _join(process, folder, 0)
    return time.monotonic() - began


def kill(kind: Kind, kills: int, shared: Path, draw: random.Random) -> Outcome:
    """Kill runs of a kind until so many kills count, let each end, and compare what it leaves."""
    outcome, started, signals = Outcome(), time.monotonic(), itertools.cycle([signal.SIGKILL, signal.SIGTERM])
    seconds = _to_its_end(kind, shared / "whole" / kind.name, shared)
    whole, total = kind.result(shared / "whole" / kind.name), kind.done(shared / "whole" / kind.name)

    def kill_once(folder: Path, which: int) -> bool:
        """Whether the run is still to be gone on with."""
        left = (1 - 0.9 * kind.done(folder) / total) / kind.jobs
        process, began = _start(kind, folder, shared)
        others = [_start(kind, folder, shared)[0] for _ in range(kind.jobs - 1)]
        process.join(max(0.0, began + draw.uniform(0, seconds * left) - time.monotonic()))
        ended = process.exitcode is not None
        if not ended and process.pid is not None:
            os.kill(process.pid, which)
        _join(process, folder, 0, -which, 128 + which)
        for other in others:
            _join(other, folder, 0)
        ended = process.exitcode == 0
        early = not ended and kind.done(folder) == 0  # nothing half-written is read here either
        outcome.late += ended
        outcome.early += early
        if not ended and not early:
            outcome.by[which] += 1
        return not ended and not others

    which = next(signals)
    while (missing := kills - sum(outcome.by.values())) > 0 and outcome.runs < 10 * kills + 10 and not outcome.faults:
        outcome.runs += 1
        folder, before = shared / "runs" / f"{kind.name} {outcome.runs}", sum(outcome.by.values())
        wanted = before + min(missing, draw.randint(1, _MOST_IN_A_RUN))
        try:
            going_on = True
            while going_on and (counted := sum(outcome.by.values())) < wanted:
                going_on = kill_once(folder, which)
                which = next(signals) if sum(outcome.by.values()) > counted else which
            _to_its_end(kind, folder, shared)
            found = kind.result(folder)
            differ = [name for name in whole if whole[name] != found.get(name)]
            if differ:
                outcome.faults.append(f"{kind.name}, run {outcome.runs}: {', '.join(differ)} differ")
        except Exception as error:
            outcome.faults.append(f"{kind.name}, run {outcome.runs}: {error!r}")
        shutil.rmtree(folder, ignore_errors=True)
    if sum(outcome.by.values()) < kills and not outcome.faults:
        outcome.faults.append(f"{kind.name}: only {sum(outcome.by.values())} of {kills} kills count")
    outcome.seconds = time.monotonic() - started
    return outcome


def run(kills: int, seed: int) -> Iterator[tuple[str, Outcome]]:
    """Kill each kind in its share; the name of each kind, and what became of it."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        shared = Path(temporary)
        _to_its_end(Kind("what all take", _prepare, lambda _: 0, lambda _: {}), shared, shared)
        for number, kind in enumerate(KINDS):
            share = (kills + len(KINDS) - 1 - number) // len(KINDS)
            if share:
                yield kind.name, kill(kind, share, shared, draw)


def main() -> int:
    """Run the command; the exit status is 1 if anything differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    columns = "SIGKILL", "SIGTERM", "too early", "too late", "runs", "differ", "seconds"
    table, faults = Table("killed", *columns), list[str]()
    for name, found in run(arguments.kills, arguments.seed):
        numbers = (*found.by.values(), found.early, found.late, found.runs, len(found.faults))
        table.add_row(name, *map(str, numbers), f"{found.seconds:.0f}")
        faults += found.faults
    Console(width=100).print(table)
    print("Too early: before anything was done; too late: after the end. Neither counts, and both are drawn again.")
    print("\n".join(faults) or "nothing differs")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
