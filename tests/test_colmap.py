"""pycolmap leaves the handlers of signals as they were."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

SET = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))"


@pytest.mark.parametrize(("before", "status"), [("", -signal.SIGTERM), (SET, 3)])
def test_sigterm_does_what_it_did_before_the_import(before, status):
    code = f"import os, signal, sys\n{before}\nfrom gnnet.colmap import pycolmap\nos.kill(os.getpid(), signal.SIGTERM)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == status and done.stderr == ""
