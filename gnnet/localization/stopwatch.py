"""Measures the seconds that each stage takes."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Seconds of each stage by its name; waits for the device, so that its work counts in the stage that asked for it.

    Args:
        device: the device that computes.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def lap(self, name: str) -> None:
        """End a stage; the seconds of stages of one name add up."""
        now = self._now()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()
