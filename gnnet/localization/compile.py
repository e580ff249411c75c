"""Compiles a scene's references into a map, one by one, and goes on where it was interrupted."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from gnnet.arrays import ArrayFile
from gnnet.data.images import limit_size, read_image
from gnnet.data.queries import observed_points, observes
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.localization.covisibility import covisible_by_depth, covisible_by_points
from gnnet.localization.local_features import LocalFeatures, points_of_detections
from gnnet.localization.map import NEIGHBOURS, Map, check_layout, map_arrays
from gnnet.localization.refinement import sample_descriptors
from gnnet.localization.retrieval import fit_whitening, gem
from gnnet.models.weights import fingerprint
from gnnet.scenes.scene import Scene, SceneImage

VERSION = 2  # of what a map holds; a map of another version is refused
FARTHEST = 8.0  # pixels from a point's projection to where a reference observes it; beyond, one of them is wrong
WHITENING_SAMPLE = 1024  # references that the whitening of global descriptors is fitted on


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
    """Compile the references of a scene into a map at `path`, or go on where that was interrupted.

    Memory is bounded by one image's features and the sample that the whitening is fitted on, however
    many references there are; but for some 20 bytes an observation of a 3D point, for covisibility. A
    finished map of the same network, scene and settings is opened as it is.

    Args:
        path: of the map; folders are made.
        scene: with posed references that observe 3D points or have depth.
        network: in evaluation mode; its maps give the descriptors, and (by GeM) the global descriptor.
        points: at most so many observations a reference.
        largest_side: images are shrunk to it, in pixels; None keeps them.
        local_features: instead of the network's maps, detections of these are described.
        retrieval_network: images to global descriptors (B, D), instead of the network's own.
        dimensions: of the global descriptor after whitening, at most.
        seed: of the points chosen.
        device: where the networks run.
        progress: show a bar.

    Raises:
        ValueError: if the scene has no usable reference, or the file at `path` is a map made of something
            else (it says what).
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
    points: Tensor
    ids: np.ndarray
    keypoints: Tensor
    descriptors: tuple[Tensor, ...]
    valid: Tensor
    global_descriptor: Tensor


@torch.no_grad()
def _sizes(network, local_features, retrieval_network, device) -> tuple[tuple[int, ...], int]:
    """Channels of each level, and dimensions of a raw global descriptor, as an image shows them."""
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
    # Several detections may lie near one point; of depth there is no end.
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
    image, factors = limit_size(read_image(reference.path), largest_side)
    camera = reference.camera.scale(torch.from_numpy(factors))
    on_device = image[None].to(device)
    pyramid = network(on_device) if local_features is None or retrieval_network is None else None
    if local_features is None:
        points, ids, observed = observed_points(scene, reference, count, generator)
        projected, visible = camera.project(reference.cam_from_world.transform(points))
        # What is described is what the reference shows of a point, whatever its pose is off by; where the two lie
        # apart, one of them is of something else.
        if observed is not None:
            observed = torch.from_numpy(observed * factors)
            visible = visible & ((observed - projected).norm(dim=-1) <= FARTHEST)
        at = (projected if observed is None else observed).float()
        descriptors, valid = sample_descriptors(pyramid, at[None].to(device))
        descriptors, valid = tuple(d[0].cpu() for d in descriptors), torch.stack([v[0].cpu() for v in valid], -1)
        valid &= visible[:, None]
    else:
        detected = local_features.detect(image)
        points, ids, known = points_of_detections(scene, reference, detected.keypoints / torch.from_numpy(factors))
        kept = known.nonzero().squeeze(1)[:count]  # the strongest come first
        points, ids, at = points[kept], ids[kept.numpy()], detected.keypoints[kept]
        descriptors, valid = (detected.descriptors[kept],), torch.ones(len(kept), 1, dtype=torch.bool)
    described = gem(pyramid) if retrieval_network is None else retrieval_network(on_device)
    return _Described(points, ids, at, descriptors, valid, described[0].cpu())


def _write(file: ArrayFile, row: int, described: _Described) -> None:
    """What was found of a reference, and only then that it is done."""
    offsets = file["offsets"]
    start, end = int(offsets[row]), int(offsets[row + 1]) if row + 1 < len(offsets) else file.shape("points")[0]
    count = min(len(described.points), end - start)  # the next reference's rows begin there
    file.write("points", start, described.points[:count].numpy())
    file.write("ids", start, described.ids[:count])
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
    """What follows from all references together: whitening, global descriptors, covisibility."""
    count, small = file.shape("global")
    raw = file["global/raw"]
    sample = np.unique(np.linspace(0, count - 1, min(count, WHITENING_SAMPLE)).round().astype(int))
    whitening = fit_whitening(torch.from_numpy(raw[sample].astype(np.float32)), small)
    file.write("whitening/mean", 0, whitening.mean.numpy())
    file.write("whitening/projection", 0, whitening.projection.numpy())
    for start in range(0, count, 256):
        rows = torch.from_numpy(raw[start : start + 256].astype(np.float32))
        file.write("global", start, whitening.apply(rows).numpy())
    if all(i.point_ids is not None for i in references):
        parts = covisible_by_points(references, len(scene.points))
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
