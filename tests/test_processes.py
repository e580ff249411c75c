"""Work shared out to several processes: the same results, and no process is left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from gnnet.processes import devices_of, share_out


def squaring(log: Path, device: torch.device):
    """Gives a function that squares; fails at 4 and is killed at 5. Each process leaves a file of its name."""
    (log / str(os.getpid())).write_text(f"{device} {torch.get_num_threads()}")

    def square(value: torch.Tensor) -> torch.Tensor:
        if value == 4:
            raise ValueError("four is not squared")
        if value == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if value == 6:
            time.sleep(600)
        return value**2

    return square


def test_devices_of_processes(monkeypatch):
    assert devices_of("cpu", 3) == [torch.device("cpu")] * 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_of("auto", 1) == [torch.device("cuda")]
    assert devices_of("auto", 2) == [torch.device("cuda", 0), torch.device("cuda", 1)]
    with pytest.raises(ValueError, match="devices=3, and there are 2 GPUs"):
        devices_of("cuda", 3)
    with pytest.raises(ValueError, match="devices=0; expected 1 or more"):
        devices_of("cpu", 0)


def test_one_device_works_in_this_process_in_order(tmp_path):
    results = list(share_out(partial(squaring, tmp_path), [torch.tensor(i) for i in range(3)], "cpu"))
    assert [(number, int(result)) for number, result in results] == [(0, 0), (1, 1), (2, 4)]
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]
    assert list(share_out(partial(squaring, tmp_path), [], devices_of("cpu", 2))) == []


def test_items_are_asked_for_when_they_are_needed():
    asked, items = [], iter(range(9))
    results = share_out(lambda device: str, (asked.append(i) or i for i in items), "cpu")
    assert next(results) == (0, "0") and asked == [0]
    assert next(results) == (1, "1") and asked == [0, 1]


@pytest.mark.slow
def test_several_devices_are_as_many_processes_but_not_more_than_there_is_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    items = [torch.tensor(i) for i in (0, 1, 2)]
    results = dict(share_out(partial(squaring, tmp_path), items, devices_of("cpu", 4)))
    assert {number: int(result) for number, result in results.items()} == {0: 0, 1: 1, 2: 4}
    started = {path.name for path in tmp_path.iterdir()}
    assert 1 <= len(started) <= 3 and str(os.getpid()) not in started


@pytest.mark.slow
def test_an_error_is_raised_with_its_traceback_and_a_kill_is_said(tmp_path):
    with pytest.raises(ValueError, match="four is not squared") as raised:
        list(share_out(partial(squaring, tmp_path), [torch.tensor(i) for i in (1, 4)], devices_of("cpu", 2)))
    assert "in square" in str(raised.value.__cause__)
    with pytest.raises(RuntimeError, match="one of the 2 processes that share the work was killed"):
        list(share_out(partial(squaring, tmp_path), [torch.tensor(i) for i in (5, 1)], devices_of("cpu", 2)))


SLEEPING = """
import sys
from functools import partial
from pathlib import Path
import torch
from gnnet.processes import devices_of, share_out
from tests.test_processes import squaring
if __name__ == "__main__":
    items = [torch.tensor(6), torch.tensor(6)]
    list(share_out(partial(squaring, Path(sys.argv[1])), items, devices_of("cpu", 2)))
"""


@pytest.mark.slow
def test_a_folder_for_temporary_files_may_have_a_long_name(tmp_path):
    folder, log = tmp_path / ("x" * 100), tmp_path / "log"
    folder.mkdir()
    log.mkdir()
    script = SLEEPING.replace("torch.tensor(6)", "torch.tensor(1)")
    environment = {**os.environ, "TMPDIR": str(folder)}
    subprocess.run([sys.executable, "-c", script, log], cwd=Path(__file__).parents[1], env=environment, check=True)
    assert list(log.iterdir())


@pytest.mark.slow
def test_processes_end_with_one_that_is_killed(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", SLEEPING, tmp_path], cwd=Path(__file__).parents[1])
    while len(list(tmp_path.iterdir())) < 2:
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    for path in tmp_path.iterdir():
        while running(int(path.name)):
            time.sleep(0.05)


def running(process: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
