"""The compiled maps that a localizer stands on: made of a scene, or opened where they are there already."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gnnet.localization.compile import compile_map, what_it_is_made_of
from gnnet.localization.local_features import LocalFeatures
from gnnet.localization.localizer import Localizer
from gnnet.localization.map import Map
from gnnet.models.pyramid import FeatureNetwork
from gnnet.processes import Devices
from gnnet.scenes.problems import OnBad
from gnnet.scenes.scene import Scene


@dataclass(frozen=True)
class MapSettings:
    """Settings of the map's compilation, see `compile_map`.

    Args:
        folder: folder of maps, which are named by what they are made of.
        file: a map's file to use instead; if it was made of something else, it is refused.
        points: limit on the observations of each reference.
        largest_side: images are shrunk to it, in pixels; None keeps them.
        adjust: cells that keypoints may be moved, see `compile_map`; None leaves them.
        on_bad: `skip` leaves references out that cannot be read.
    """

    folder: Path
    file: Path | None = None
    points: int = 1024
    largest_side: int | None = None
    adjust: float | None = None
    on_bad: OnBad = "raise"


def prepare_localizer(
    settings: Localizer, network: FeatureNetwork, scene: Scene, map: MapSettings, *, device: Devices
) -> Localizer:
    """The localizer with its network and the scene's map (or two), compiled first or, if it is there, opened.

    Several devices share the compilation, see `compile_map`.

    Raises:
        FileNotFoundError, ValueError: from scene or map, see `compile_map`.
        ConnectionError: if weights of local features cannot be fetched.
    """
    network = network.eval()
    companion = settings.pose.companion
    own = _compiled(settings, network, scene, map, settings.pose.local_features, device)
    second = None
    if companion is not None:  # beside the first: its file has a name of its own
        file = map.file and map.file.with_suffix(f".{companion.name}{map.file.suffix}")
        beside = replace(map, file=file)
        second = _compiled(settings, network, scene, beside, companion, device)
    return settings.on(network, own, second)


def _compiled(
    settings: Localizer, network: FeatureNetwork, scene: Scene, map: MapSettings, local: LocalFeatures | None,
    device: Devices,
) -> Map:  # fmt: skip
    """The map of a scene whose points are described by local features, or by the network where `local` is None."""
    if local is not None:
        local.load()
    choices, file = _choices(settings, map, local), map.file
    if file is None:  # scenes of one name have different contents
        made_of = json.dumps(what_it_is_made_of(scene, network, **choices), sort_keys=True)
        digest = hashlib.sha256(made_of.encode()).hexdigest()[:12]
        readable = re.sub(r"[^\w.-]+", "-", f"{scene.name}-{'maps' if local is None else local.identity}")[:80]
        file = map.folder / f"{readable}-{digest}.gnmap"
    return compile_map(file, scene, network, device=device, on_bad=map.on_bad, **choices)


def maps_are_made_of(settings: Localizer, network: FeatureNetwork, scene: Scene, map: MapSettings) -> list[dict]:
    """What tells the maps of `prepare_localizer` from others, before they are compiled; see `what_it_is_made_of`."""
    described_by = [settings.pose.local_features, *filter(None, [settings.pose.companion])]
    return [what_it_is_made_of(scene, network.eval(), **_choices(settings, map, local)) for local in described_by]


def _choices(settings: Localizer, map: MapSettings, local: LocalFeatures | None) -> dict[str, Any]:
    """Arguments of `compile_map`."""
    retrieval = settings.retrieval.network
    return {
        "points": map.points if local is None else local.count, "largest_side": map.largest_side,
        "adjust": map.adjust, "local_features": local,
        "retrieval_network": None if retrieval is None else retrieval.eval(),
    }  # fmt: skip
