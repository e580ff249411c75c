"""What an offline run of wandb holds, read with wandb's own messages; its reader is no longer part of the package."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _HEADER = 32 * 1024, struct.Struct("<IHB")  # of LevelDB's log format: checksum, length, kind of the part


class WandbRun(NamedTuple):
    """An offline run: who it is, its settings, all values logged by name, and those of its end."""

    id: str
    name: str
    group: str
    config: dict[str, Any]
    history: dict[str, list[Any]]
    summary: dict[str, Any]


def read_wandb_run(folder: Path) -> WandbRun:
    """The only run below a folder."""
    [file] = folder.rglob("*.wandb")
    run, config, history, summary = None, {}, {}, {}
    for record in _records(file.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            for item in record.history.item:
                history.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
        elif kind == "summary":
            items = record.summary.update
            summary |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
    assert run is not None
    return WandbRun(run.run_id, run.display_name, run.run_group, config, history, summary)


def _records(content: bytes):
    position, whole = 7, b""  # after wandb's own header
    while position + _HEADER.size <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER.size:
            position += left
            continue
        _, length, kind = _HEADER.unpack_from(content, position)
        position += _HEADER.size
        whole += content[position : position + length]
        position += length
        if kind in (1, 4):  # a record in one part, or its last part
            yield Record.FromString(whole)
            whole = b""
