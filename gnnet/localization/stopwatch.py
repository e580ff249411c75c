"""Seconds by stage."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Time since the last lap, by the lap's name; waits for the device, so that its work counts where it was asked for.

    Args:
        device: that works.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def lap(self, name: str) -> None:
        """End a stage; a name that comes again adds up."""
        now = self._now()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
