"""`python -m gnnet.models.export CKPT FILE`: a checkpoint's network as a small file that anyone may read safely."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save

from gnnet.files import write_at_once
from gnnet.models.checkpoint import read_checkpoint, with_current_names


def export_weights(checkpoint: str | Path, file: str | Path, *, allow: str | Sequence[str] = ()) -> str:
    """Write the network of a checkpoint in float16 with its settings, and say in a few words what was written.

    Args:
        checkpoint: a file that `train.py` wrote.
        file: the file to write, `.safetensors`; a file of that name is replaced.
        allow: packages of your own whose classes the checkpoint may name.

    Raises:
        FileNotFoundError, ValueError: if the checkpoint is missing or does not fit, the file has another ending, or a
            weight is too large for float16.
    """
    read, file = read_checkpoint(checkpoint), Path(file)
    if file.suffix != ".safetensors":
        raise ValueError(f"{file}: expected a file that ends in .safetensors")
    state = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in read.network(allow=allow).state_dict().items()
    }
    beyond = [name for name, value in state.items() if not value.isfinite().all()]
    if beyond:
        raise ValueError(f"{checkpoint} has weights that float16 cannot hold: {', '.join(beyond[:3])}")
    config = {"model": with_current_names(read.config["model"]), "seed": read.config.get("seed", 0)}
    about = json.dumps({"config": config, "global_step": read.step})
    write_at_once(file, save(state, metadata={"gnnet": about}))
    read_checkpoint(file).network(allow=allow)  # what was written can be read
    count, content = sum(value.numel() for value in state.values()), file.read_bytes()
    return f"{file}: {count} weights, {len(content) / 1e6:.2f} MB, SHA-256 {hashlib.sha256(content).hexdigest()}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on arguments (those of the process by default); returns the exit status."""
    about = (__doc__ or "").partition(": ")[2]
    parser = argparse.ArgumentParser(prog="python -m gnnet.models.export", description=about)
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint that train.py wrote")
    parser.add_argument("file", metavar="FILE", help="the file to write, .safetensors")
    parser.add_argument("--allow", nargs="*", default=[], metavar="PACKAGE", help="packages of your own that it names")
    given = parser.parse_args(argv)
    try:
        print(export_weights(given.checkpoint, given.file, allow=given.allow))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
