"""A few of the kills of `tests.kills`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_what_is_killed_goes_on_and_ends_as_if_it_was_not():
    # One each of training, map and evaluation; it forks, so not in this process.
    command = [sys.executable, "-m", "tests.kills", "--kills", "3", "--seed", "1"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "nothing differs" in done.stdout, done.stdout + done.stderr
