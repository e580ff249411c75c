"""Compiles a scene's references into a map, one by one; after an interruption it goes on from there."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from gnnet.arrays import ArrayFile
from gnnet.data.images import read_view
from gnnet.data.observed_points import observed_points, observes
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.localization.covisibility import covisible_by_depth
from gnnet.localization.global_descriptors import fit_whitening, gem
from gnnet.localization.local_features import LocalFeatures, points_of_detections
from gnnet.localization.map import NEIGHBOURS, Map, check_layout, map_arrays
from gnnet.localization.refinement import sample_descriptors
from gnnet.models.weights import fingerprint
from gnnet.sampling import evenly
from gnnet.scenes.pairing import shared_points
from gnnet.scenes.scene import Scene, SceneImage

VERSION = 2  # of a map's meaning; a map of another version is refused
WHITENING_SAMPLE = 1024  # limit on the references that the whitening of global descriptors is fitted on


def compile_map(
    path: str | Path,
    scene: Scene,
    network: nn.Module,
    *,
    points: int = 1024,
    largest_side: int | None = None,
    local_features: LocalFeatures | None = None,
    retrieval_network: nn.Module | None = None,
    dimensions: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Map:
    """Compile the references of a scene into a map at `path`, or go on from where that was interrupted.

    Which points are described, and at which pixels, says `gnnet.data.observed_points`. Memory holds one image's
    features, the sample that the whitening is fitted on, and for covisibility some 20 bytes for each observation
    of a 3D point, however many references there are. A finished map of the same network, scene and settings is
    opened as it is.

    Args:
        path: file of the map; its folders are made.
        scene: with posed references that observe 3D points or have depth.
        network: in evaluation mode; its maps give the descriptors, and (by GeM) the global descriptor.
        points: limit on the observations of each reference.
        largest_side: images are shrunk to it, in pixels; None keeps them.
        local_features: their detections are described, instead of points in the network's maps.
        retrieval_network: images to global descriptors (B, D); None takes the network's own.
        dimensions: limit on the dimensions of the global descriptor after whitening.
        seed: seed of the points chosen.
        device: where the networks run.
        progress: show a bar.

    Raises:
        ValueError: if the scene has no usable reference, or the file at `path` is a map made of something
            else (the message says what).
    """
    references = [i for i in scene.images.values() if i.is_reference and i.cam_from_world is not None]
    references = sorted((i for i in references if i.camera is not None and observes(i)), key=lambda i: i.name)
    if not references:
        raise ValueError(
            f"{scene.name} has no reference with pose, camera, and 3D points or depth; a map needs a reconstruction"
        )
    channels, global_dimensions = _sizes(network, local_features, retrieval_network, device)
    made_of = {
        "version": VERSION,
        "network": fingerprint(network),
        "local features": None if local_features is None else local_features.name,
        "retrieval": "gem" if retrieval_network is None else fingerprint(retrieval_network),
        "scene": _scene_fingerprint(references, scene.points),
        "points": points, "largest_side": largest_side, "dimensions": dimensions, "seed": seed,
        "channels": list(channels),
    }  # fmt: skip
    file = _open_or_create(Path(path), made_of, references, global_dimensions, scene.retrieve_within)
    if file["finished"][0]:
        file.close()
        return Map.open(path)
    waiting = np.flatnonzero(file["done"] == 0)
    bar = track(waiting, description=f"Compiling {len(waiting)} references", disable=not progress, transient=True)
    for row in bar:
        reference = references[row]
        described = _describe(
            scene, reference, network, points, largest_side, local_features, retrieval_network,
            np.random.default_rng((seed, int(row))), device,
        )  # fmt: skip
        _write(file, int(row), described)
    _finish(file, scene, references)
    file.close()
    return Map.open(path)


class _Described(NamedTuple):
    """What the map holds of one reference, see `Observations`, and its raw global descriptor (D,)."""

    points: Tensor
    ids: Tensor
    keypoints: Tensor
    descriptors: tuple[Tensor, ...]
    valid: Tensor
    global_descriptor: Tensor


@torch.no_grad()
def _sizes(network, local_features, retrieval_network, device) -> tuple[tuple[int, ...], int]:
    """Channels of each level, and dimensions of a raw global descriptor, found with an empty image."""
    network.to(device)
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=device)
    pyramid = network(image)
    channels = tuple(m.shape[1] for m in pyramid.maps) if local_features is None else (local_features.channels,)
    if retrieval_network is None:
        return channels, gem(pyramid).shape[1]
    return channels, retrieval_network.to(device)(image).shape[1]


def _open_or_create(
    path: Path, made_of: dict, references: list[SceneImage], global_dimensions: int, within: tuple[str, ...]
) -> ArrayFile:
    if path.exists():
        file = ArrayFile(path, writable=True)
        check_layout(file)
        found = file.about["made of"]
        other = [f"{k} {found.get(k)} instead of {v}" for k, v in made_of.items() if found.get(k) != v]
        if other:
            file.close()
            raise ValueError(
                f"map {path} was made of something else: {'; '.join(other)}. "
                "Take the network and the settings that it was made with, name another file, or delete it"
            )
        return file
    # Several detections may lie near one point, and depth gives any number of points.
    most = made_of["points"]
    unbounded = [made_of["local features"] is not None or i.point_ids is None for i in references]
    capacity = [most if u else min(len(i.point_ids), most) for u, i in zip(unbounded, references, strict=True)]
    count, total = len(references), sum(capacity)
    small = min(made_of["dimensions"], global_dimensions)
    if count > 2:  # else there is no whitening, see `fit_whitening`
        small = min(small, count - 1, WHITENING_SAMPLE - 1)
    arrays = map_arrays(count, total, made_of["channels"], global_dimensions, small)
    names, places = [i.name for i in references], [i.place for i in references]
    file = ArrayFile.create(
        path, arrays, {"made of": made_of, "names": names, "places": places, "retrieve within": within}
    )
    file.write("offsets", 0, np.cumsum([0, *capacity[:-1]]))
    poses = Pose.stack([i.cam_from_world for i in references])
    file.write("rotation", 0, poses.rotation.numpy())
    file.write("translation", 0, poses.translation.numpy())
    cameras = Camera.stack([i.camera for i in references])
    file.write("camera", 0, torch.cat([cameras.size, cameras.parameters], -1).numpy())
    file.flush()
    return file


@torch.no_grad()
def _describe(
    scene: Scene, reference: SceneImage, network: nn.Module, count: int, largest_side: int | None,
    local_features: LocalFeatures | None, retrieval_network: nn.Module | None, generator: np.random.Generator,
    device: torch.device | str,
) -> _Described:  # fmt: skip
    image, camera, factors = read_view(reference, largest_side)
    on_device = image[None].to(device)
    pyramid = network(on_device) if local_features is None or retrieval_network is None else None
    if local_features is None:
        observed = observed_points(scene, reference, camera, count=count, generator=generator)
        points, ids, keypoints = observed.points, observed.ids, observed.keypoints.float()
        sampled, inside = sample_descriptors(pyramid, keypoints[None].to(device))
        descriptors = tuple(d[0].cpu() for d in sampled)
        valid = torch.stack([v[0].cpu() for v in inside], -1) & observed.valid[:, None]
    else:
        detected = local_features.detect(image)
        points, ids, known = points_of_detections(scene, reference, detected.keypoints / torch.from_numpy(factors))
        kept = known.nonzero().squeeze(1)[:count]  # the strongest come first
        points, ids, keypoints = points[kept], ids[kept], detected.keypoints[kept]
        descriptors, valid = (detected.descriptors[kept],), torch.ones(len(kept), 1, dtype=torch.bool)
    described = gem(pyramid) if retrieval_network is None else retrieval_network(on_device)
    return _Described(points, ids, keypoints, descriptors, valid, described[0].cpu())


def _write(file: ArrayFile, row: int, described: _Described) -> None:
    """Write what was found of a reference, and only then that it is done."""
    offsets = file["offsets"]
    start, end = int(offsets[row]), int(offsets[row + 1]) if row + 1 < len(offsets) else file.shape("points")[0]
    count = min(len(described.points), end - start)  # the next reference's rows begin there
    file.write("points", start, described.points[:count].numpy())
    file.write("ids", start, described.ids[:count].numpy())
    file.write("keypoints", start, described.keypoints[:count].numpy())
    file.write("valid", start, described.valid[:count].numpy())
    for level, values in enumerate(described.descriptors):
        file.write(f"descriptors/{level}", start, values[:count].numpy())
    file.write("global/raw", row, described.global_descriptor[None].numpy())
    file.write("count", row, np.array([count]))
    file.flush()
    file.write("done", row, np.ones(1))
    file.flush()


def _finish(file: ArrayFile, scene: Scene, references: list[SceneImage]) -> None:
    """Write what follows from all references together: whitening, global descriptors, covisibility."""
    count, small = file.shape("global")
    raw = file["global/raw"]
    sample = raw[evenly(count, WHITENING_SAMPLE)]
    whitening = fit_whitening(torch.from_numpy(sample.astype(np.float32)), small)
    file.write("whitening/mean", 0, whitening.mean.numpy())
    file.write("whitening/projection", 0, whitening.projection.numpy())
    for start in range(0, count, 256):
        rows = torch.from_numpy(raw[start : start + 256].astype(np.float32))
        file.write("global", start, whitening.apply(rows).numpy())
    if all(i.point_ids is not None for i in references):
        parts = shared_points(i.point_ids for i in references if i.point_ids is not None)
    else:
        parts = covisible_by_depth(references, lambda row: _points_of(file, row), candidates=4 * NEIGHBOURS)
    for row, (neighbours, shared) in enumerate(parts):
        order = np.argsort(-shared, kind="stable")[:NEIGHBOURS]
        kept = order[shared[order] > 0]
        line = np.full((2, 1, NEIGHBOURS), -1, np.int32)
        line[:, 0, : len(kept)] = neighbours[kept], shared[kept]
        file.write("neighbours", row, line[0])
        file.write("shared", row, np.maximum(line[1], 0))
    file.flush()
    file.write("finished", 0, np.ones(1))
    file.flush()


def _points_of(file: ArrayFile, row: int) -> Tensor:
    start, count = int(file["offsets"][row]), int(file["count"][row])
    return torch.from_numpy(np.array(file["points"][start : start + count]))


def _scene_fingerprint(references: list[SceneImage], points: Tensor) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(points.numpy()))
    for i in references:
        digest.update(i.name.encode(errors="surrogateescape"))
        for value in (i.camera.size, i.camera.parameters, i.cam_from_world.rotation, i.cam_from_world.translation):
            digest.update(value.double().numpy().tobytes())
        if i.point_ids is not None:
            digest.update(np.asarray(i.point_ids, np.int64).tobytes())
    return digest.hexdigest()[:16]
