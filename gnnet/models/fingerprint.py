"""What a network is, in sixteen letters: to tell whether something was made with it."""

from __future__ import annotations

import hashlib

from torch import nn


def fingerprint(network: nn.Module) -> str:
    """Of a network's class, settings and weights: the same for the same network, on every machine."""
    digest = hashlib.sha256(type(network).__name__.encode())
    # What weights don't tell, as whether maps are normalised, stands in the modules' own attributes.
    for name, module in network.named_modules():
        if not type(module).__module__.startswith("torch."):
            plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str | tuple)}
            settings = {k: v for k, v in plain.items() if not k.startswith("_") and k != "training"}
            digest.update(f"{name} {sorted(settings.items())}".encode())
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:16]
