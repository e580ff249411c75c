"""The journal of a localization run: every query that is done, in full, so that an interrupted run goes on there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.localization.refinement import RefinementStatus
from gnnet.localization.result import Localization, Status
from gnnet.models.weights import fingerprint

JOURNAL = "journal.jsonl"  # in the folder of a run, or of one of its validation sets
_VERSION = 1  # of what a line holds


class Journal:
    """A file that grows by a line with each query that is done: a killed process leaves all lines whole but the last.

    Args:
        path: the file; its folder is made.
        settings: what the localizations follow from, as plain values.
        resume: keep what a run with the same settings has done, as `done` (by name). Else the file begins anew.

    Raises:
        ValueError: if the file's settings are others; the message has both.
    """

    def __init__(self, path: Path, settings: Mapping[str, object], *, resume: bool = False) -> None:
        self.path, self.done = path, dict[str, Localization]()
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps({"journal": _VERSION, **settings}))
        whole = self._read(settings) if resume and path.is_file() else 0
        self._file = path.open("ab")
        os.truncate(path, whole)
        if not whole:
            self.add([json.dumps(settings)])

    def add(self, lines: Iterable[str]) -> None:
        """Write lines of `to_line`."""
        self._file.write("".join(f"{line}\n" for line in lines).encode())
        self._file.flush()

    def _read(self, settings: Mapping[str, object]) -> int:
        """Read what is done; returns the number of bytes before the first line that is not whole."""
        whole = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    if whole == 0:
                        self._check(json.loads(line), settings)
                    else:
                        result = from_line(line)
                        self.done[result.name] = result
                except (json.JSONDecodeError, UnicodeDecodeError):
                    break
                whole += len(line)
        return whole

    def _check(self, found: Mapping[str, object], settings: Mapping[str, object]) -> None:
        other = [
            f"  {key}: {str(found.get(key))[:80]} there, {str(settings.get(key))[:80]} now"
            for key in sorted({*found, *settings}) if found.get(key) != settings.get(key)
        ]  # fmt: skip
        if other:
            raise ValueError(
                f"the run cannot go on from {self.path}, whose settings were others:\n" + "\n".join(other) + "\n"
                "give the same as that run (its .hydra/overrides.yaml), or leave resume out"
            )


def to_line(result: Localization) -> str:
    """A localization as a line of the journal; every number is kept exactly."""

    def pose(value: Pose | None) -> list | None:
        return None if value is None else [value.rotation.tolist(), value.translation.tolist()]

    camera, covariance = result.camera, result.covariance
    return json.dumps({
        **vars(result), "cam_from_world": pose(result.cam_from_world), "initial": pose(result.initial),
        "camera": None if camera is None else [camera.size.tolist(), camera.parameters.tolist()],
        "covariance": None if covariance is None else covariance.tolist(),
    })  # fmt: skip


def from_line(line: str | bytes) -> Localization:
    """What `to_line` wrote."""
    record = json.loads(line)

    def tensors(key: str) -> list[Tensor] | None:
        return None if record[key] is None else [torch.tensor(part, dtype=torch.float64) for part in record[key]]

    initial, pose, camera, covariance = map(tensors, ("initial", "cam_from_world", "camera", "covariance"))
    known = {
        "status": Status(record["status"]), "references": tuple(record["references"]),
        "ended": None if record["ended"] is None else RefinementStatus(record["ended"]),
        "cam_from_world": pose and Pose(*pose), "initial": initial and Pose(*initial),
        "camera": camera and Camera(*camera), "covariance": covariance and torch.stack(covariance),
    }  # fmt: skip
    return Localization(**{**record, **known})


def plain(value: object, name: str = "") -> dict[str, object]:
    """A setting as JSON can hold it, by dotted names: the parts of what has parts, a hash of weights and of tables."""
    if value is None or isinstance(value, bool | int | float | str):
        return {name: value}
    if isinstance(value, Path):
        return {name: str(value)}
    if isinstance(value, nn.Module):
        return {name: fingerprint(value)}
    if isinstance(value, Tensor):
        return {name: value.tolist()}
    if isinstance(value, Mapping):
        whole = json.dumps({str(key): plain(part) for key, part in value.items()}, sort_keys=True)
        return {name: hashlib.sha256(whole.encode()).hexdigest()[:16]}
    parts = dict(enumerate(value)) if isinstance(value, list | tuple) else vars(value)
    found: dict[str, object] = {} if isinstance(value, list | tuple) else {name: type(value).__name__}
    for key, part in parts.items():
        found |= plain(part, f"{name}.{key}")
    return found
