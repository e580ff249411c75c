"""Compiles a scene's references into a map, one by one; after an interruption it goes on from there."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gnnet.arrays import ArrayFile
from gnnet.data.images import read_view
from gnnet.data.observed_points import observed_points
from gnnet.data.tracks import Tracks
from gnnet.files import locked
from gnnet.localization.adjustment import adjusted
from gnnet.localization.covisibility import covisible_by_depth
from gnnet.localization.global_descriptors import fit_whitening, gem
from gnnet.localization.local_features import LocalFeatures, points_of_detections
from gnnet.localization.map import NEIGHBOURS, Map, Observations, check_layout, made_with, map_arrays
from gnnet.localization.refinement import sample_confidences, sample_descriptors
from gnnet.models.pyramid import FeatureNetwork
from gnnet.models.weights import unwrapped
from gnnet.processes import Devices, as_list, share_out
from gnnet.progress import track
from gnnet.sampling import evenly
from gnnet.scenes.formats.images import sample_digest
from gnnet.scenes.pairing import shared_points
from gnnet.scenes.problems import BadInput, OnBad, describe_problems
from gnnet.scenes.scene import Scene, SceneImage
from gnnet.scenes.table import ImageList

VERSION = 5  # of a map's meaning; a map of another version is refused
_THREADS = 16  # that look at files; they wait for the disk most of the time
_FILES = 1024  # that are looked at before more are queued
_log = logging.getLogger(__name__)
WHITENING_SAMPLE = 1024  # limit on the references that the whitening of global descriptors is fitted on


def compile_map(
    path: str | Path,
    scene: Scene,
    network: FeatureNetwork,
    *,
    points: int = 1024,
    largest_side: int | None = None,
    local_features: LocalFeatures | None = None,
    retrieval_network: nn.Module | None = None,
    dimensions: int = 256,
    adjust: float | None = None,
    seed: int = 0,
    device: Devices = "cpu",
    on_bad: OnBad = "raise",
    progress: bool = True,
) -> Map:
    """Compile the references of a scene into a map at `path`, or go on from where that was interrupted.

    Which points are described, and at which pixels, says `gnnet.data.observed_points`. Memory holds one image's
    features, the sample that the whitening is fitted on, and for each observation of a 3D point some 50 bytes at the
    start and 20 at the end, however many references there are. A finished map of the same network, scene,
    image files and settings is opened as it is.

    Any number of processes may compile one map at the same time, on any machines that share its disk: each describes
    references that no other is at, whichever is last finishes the map, and all return it. One that dies leaves its
    reference to the others.

    Args:
        path: file of the map; its folders are made.
        scene: with posed references that observe 3D points or have depth.
        network: in evaluation mode; its maps give the descriptors, and (by GeM) the global descriptor.
        points: limit on the observations of each reference.
        largest_side: images are shrunk to it, in pixels; None keeps them.
        local_features: their detections are described, instead of points in the network's maps.
        retrieval_network: images to global descriptors (B, D); None takes the network's own.
        dimensions: limit on the dimensions of the global descriptor after whitening.
        adjust: move keypoints by up to so many cells of the finest map on each axis to where a point's descriptors
            agree, and triangulate the points anew, see `gnnet.localization.adjustment`; None leaves them. Without
            effect on points from depth and with `local_features`.
        seed: seed of the points chosen.
        device: where the networks run; several share the references, a process each, and the file is the same.
        on_bad: `skip` leaves a reference whose image or depth map cannot be read without observations, and says so.
        progress: show a bar.

    Raises:
        ValueError: if the scene has no usable reference, `adjust` is not above 0, or the file at `path` is a map made
            of something else (the message says what).
    """
    if adjust is not None and not (isinstance(adjust, int | float) and adjust > 0):
        raise ValueError(f"adjust={adjust!r} (map_adjust=); expected a number of cells above 0, or None")
    references = references_of(scene)
    only_points = Scene(scene.name, {}, (), scene.points)  # all that is asked of it; other processes get a copy
    work = _Work(only_points, network, points, largest_side, local_features, retrieval_network, seed)
    if len(devices := as_list(device)) == 1:
        work = work.on(devices[0])
    made_of = what_it_is_made_of(
        scene, network, points=points, largest_side=largest_side, local_features=local_features,
        retrieval_network=retrieval_network, dimensions=dimensions, adjust=adjust, seed=seed,
    )  # fmt: skip
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            observing: Sequence[SceneImage] = references
            if "adjust" in made_of and all(i.point_ids is not None and i.keypoints is not None for i in references):
                observing = adjusted(
                    references, len(scene.points), network, cells=made_of["adjust"],
                    scratch=path.with_name(f".{path.name}.sums"), largest_side=largest_side, devices=devices,
                    on_bad=on_bad, progress=progress,
                )  # fmt: skip
            tracks = Tracks.of(observing, len(scene.points))
            confidence = local_features is None and getattr(unwrapped(network), "confidence", False)
            _create(path, made_of, references, tracks, work.global_dimensions(), scene, confidence=confidence)
    file = ArrayFile(path, writable=True)
    try:
        _check_made_of(file, made_of)
        if not file["finished"][0]:
            _complete(file, references, work, devices, on_bad, progress)
    finally:
        file.release()
        file.close()
    return Map.open(path)


def references_of(scene: Scene) -> ImageList:
    """The images of a scene that its map holds, by name.

    Raises:
        ValueError: if there is none.
    """
    references = scene.images.references()
    if not references:
        raise ValueError(
            f"{scene.name} has no reference with pose, camera, and 3D points or depth; a map needs a reconstruction"
        )
    return references


def what_it_is_made_of(
    scene: Scene,
    network: FeatureNetwork,
    *,
    points: int,
    largest_side: int | None,
    local_features: LocalFeatures | None,
    retrieval_network: nn.Module | None,
    dimensions: int = 256,
    adjust: float | None = None,
    seed: int = 0,
) -> dict:
    """What tells a map from another one, as plain values; the arguments are those of `compile_map`.

    Raises:
        ValueError: as `references_of`.
    """
    references = references_of(scene)
    return {
        "version": VERSION,
        **made_with(network, None if local_features is None else local_features.identity, retrieval_network),
        "scene": _scene_fingerprint(references, scene.points),
        "images": _files_fingerprint(references),
        "points": points, "largest_side": largest_side, "dimensions": dimensions, "seed": seed,
        **({} if adjust is None or local_features is not None else {"adjust": adjust}),
        "channels": list(network.channels) if local_features is None else [local_features.channels],
    }  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Work:
    """How references are described: arguments of `compile_map`."""

    scene: Scene
    network: FeatureNetwork
    points: int
    largest_side: int | None
    local_features: LocalFeatures | None
    retrieval_network: nn.Module | None
    seed: int
    device: torch.device | str = "cpu"

    def on(self, device: torch.device) -> _Work:
        """The same on a device; the networks themselves are moved there."""
        retrieval = None if self.retrieval_network is None else self.retrieval_network.to(device)
        return replace(self, network=self.network.to(device), retrieval_network=retrieval, device=device)

    @torch.no_grad()
    def global_dimensions(self) -> int:
        """Dimensions of a raw global descriptor."""
        if self.retrieval_network is None:
            return 2 * self.network.channels[0]  # see `gem`
        # Any module may retrieve, so only its output tells.
        return self.retrieval_network(torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=self.device)).shape[1]

    @torch.no_grad()
    def describe(self, reference: SceneImage, row: int) -> tuple[Observations, Tensor]:
        """The observations (M,) of the reference in the map's row `row`, and its raw global descriptor (D,)."""
        image, camera, factors = read_view(reference, self.largest_side)
        assert camera is not None, "a reference without a camera is left out"
        on_device = image[None].to(self.device)
        if self.local_features is None or self.retrieval_network is None:
            pyramid = self.network(on_device)
        if self.local_features is None:
            generator = np.random.default_rng((self.seed, row))
            observed = observed_points(self.scene, reference, camera, count=self.points, generator=generator)
            points, ids, keypoints = observed.points, observed.ids, observed.keypoints.float()
            sampled, inside = sample_descriptors(pyramid, keypoints[None].to(self.device))
            descriptors = tuple(d[0].cpu() for d in sampled)
            valid = torch.stack([v[0].cpu() for v in inside], -1) & observed.valid[:, None]
            confidences = sample_confidences(pyramid, keypoints[None].to(self.device))
        else:
            found = self.local_features.detect(on_device[0])
            on_disk = found.keypoints / torch.from_numpy(factors)
            points, ids, known = points_of_detections(self.scene, reference, on_disk)
            kept = known.nonzero().squeeze(1)[: self.points]  # the strongest come first
            points, ids, keypoints = points[kept], ids[kept], found.keypoints[kept]
            descriptors, valid = (found.descriptors[kept],), torch.ones(len(kept), 1, dtype=torch.bool)
            confidences = None
        described = gem(pyramid) if self.retrieval_network is None else self.retrieval_network(on_device)
        owner = torch.full((len(points),), row)
        confidence = None if confidences is None else torch.stack([c[0].cpu() for c in confidences], -1)
        return Observations(points, ids, keypoints, descriptors, valid, owner, confidence), described[0].cpu()


def _create(
    path: Path, made_of: dict, references: ImageList, tracks: Tracks, global_dimensions: int, scene: Scene,
    *, confidence: bool,
) -> None:  # fmt: skip
    """Make a map's file with room for what the references observe, their poses and cameras."""
    most, sparse = made_of["points"], made_of["local features"] is not None
    # Several detections may lie near one point, and depth gives any number of points.
    capacity = [most if sparse or i.point_ids is None else min(len(i.point_ids), most) for i in references]
    count, poses, cameras = len(references), references.poses, references.cameras
    small = min(made_of["dimensions"], global_dimensions)
    if count > 2:  # else there is no whitening, see `fit_whitening`
        small = min(small, count - 1, WHITENING_SAMPLE - 1)
    sizes = len(tracks.offsets) - 1, len(tracks.images)
    camera = torch.cat([cameras.size, cameras.parameters], -1).numpy()
    arrays = map_arrays(
        count, sum(capacity), made_of["channels"], global_dimensions, small, sizes, camera=camera.shape[1],
        confidence=confidence,
    )  # fmt: skip
    about = {
        "made of": made_of, "names": references.names, "places": references.places,
        "retrieve within": scene.retrieve_within,
    }  # fmt: skip
    file = ArrayFile.create(path, arrays, about)
    file.write("offsets", 0, np.cumsum([0, *capacity[:-1]]))
    file.write("rotation", 0, poses.rotation.numpy())
    file.write("translation", 0, poses.translation.numpy())
    file.write("camera", 0, camera)
    for part, values in zip(Tracks._fields, tracks, strict=True):
        file.write(f"tracks/{part}", 0, values)
    file.close()


def _check_made_of(file: ArrayFile, made_of: dict) -> None:
    """Raise a `ValueError` if the file is no map, or one that was made of something else."""
    check_layout(file)
    found = file.about["made of"]
    differ = [key for key in made_of | found if found.get(key) != made_of.get(key)]
    if differ:
        other = "; ".join(f"{key} {found.get(key)} instead of {made_of.get(key)}" for key in differ)
        raise ValueError(
            f"map {file.path} was made of something else: {other}. "
            "Take the network and the settings that it was made with, name another file, or delete it"
        )


def _complete(
    file: ArrayFile, references: ImageList, work: _Work, devices: list[torch.device], on_bad: OnBad, progress: bool
) -> None:
    """Describe the references that the map still lacks; where this process ends last, finish the map."""
    described: Sequence[SceneImage] = references
    tracks = Tracks(*(file[f"tracks/{part}"] for part in Tracks._fields))
    if "adjust" in file.about["made of"] and len(tracks.offsets) > 1:
        described = tracks.onto(references)
        anew = tracks.triangulated(work.scene.points, references.poses, references.cameras)
        work = replace(work, scene=replace(work.scene, points=anew))
    waiting = int((file["done"] == 0).sum())
    shared = _describe(file, described, partial(_writing, work, file.path, on_bad), devices)
    shared = track(shared, f"Compiling {waiting} references", total=waiting, show=progress)
    problems = [problem for _, problem in sorted((row, problem) for row, bad in shared for problem in bad)]
    if len(problems) == len(references):
        raise ValueError(f"{work.scene.name} has no reference that can be read; {describe_problems(problems)}")
    if problems:
        _log.warning("left out of the map: %s", describe_problems(problems))
    file.claim("finished", 0, wait=True)
    if not file["finished"][0]:
        _finish(file, references)


_Writing = Callable[[tuple[int, SceneImage]], tuple[int, list[str]]]


def _describe(
    file: ArrayFile, references: Sequence[SceneImage], start: Callable[[torch.device], _Writing], devices: Devices
) -> Iterator[tuple[int, list[str]]]:
    """Describe what is left of the references and what no other process takes; ends when all are done.

    Yields the row of each that was done here, and what was wrong with it. One that cannot be read is tried by each
    process.
    """
    done, tried = file["done"], np.zeros(len(references), bool)

    def claimed(rows: np.ndarray) -> Iterator[tuple[int, SceneImage]]:
        for row in rows.tolist():
            if not done[row] and file.claim("done", row):
                if not done[row]:
                    yield row, references[row]
                else:  # meanwhile
                    file.release("done", row)

    while len(left := np.flatnonzero((done == 0) & ~tried)):
        for _, (row, bad) in share_out(start, claimed(left), devices):
            file.release("done", row)
            tried[row] = True
            yield row, bad
        if not tried[left].any():  # others are at all of them
            file.claim("done", int(left[0]), wait=True)
            file.release("done", int(left[0]))


def _writing(work: _Work, path: Path, on_bad: OnBad, device: torch.device) -> _Writing:
    """What writes a reference, with its row, into the map; it gives the row, and what was wrong with it."""
    file, work = ArrayFile(path, writable=True), work.on(device)

    def describe(waiting: tuple[int, SceneImage]) -> tuple[int, list[str]]:
        (row, reference), bad = waiting, BadInput(on_bad)
        with bad.skipping():
            _write(file, row, *work.describe(reference, row))
        return row, bad.problems

    return describe


def _write(file: ArrayFile, row: int, observed: Observations, global_descriptor: Tensor) -> None:
    """Write what was found of a reference, and only then that it is done."""
    offsets = file["offsets"]
    start, end = int(offsets[row]), int(offsets[row + 1]) if row + 1 < len(offsets) else file.shape("points")[0]
    count = min(len(observed.points), end - start)  # the next reference's rows begin there
    for name in ("points", "ids", "keypoints", "valid", *(("confidence",) if "confidence" in file else ())):
        file.write(name, start, getattr(observed, name)[:count].numpy())
    for level, values in enumerate(observed.descriptors):
        file.write(f"descriptors/{level}", start, values[:count].numpy())
    file.write("global/raw", row, global_descriptor[None].numpy())
    file.write("count", row, np.array([count]))
    file.flush()
    file.write("done", row, np.ones(1))
    file.flush()


def _finish(file: ArrayFile, references: ImageList) -> None:
    """Write what follows from all references together: whitening, global descriptors, covisibility."""
    count, small = file.shape("global")
    raw = file["global/raw"]
    described = np.flatnonzero(file["done"])  # all but those that were left out
    sample = raw[described[evenly(len(described), WHITENING_SAMPLE)]]
    whitening = fit_whitening(torch.from_numpy(sample.astype(np.float32)), small)
    file.write("whitening/mean", 0, whitening.mean.numpy())
    file.write("whitening/projection", 0, whitening.projection.numpy())
    for start in range(0, count, 256):
        rows = torch.from_numpy(raw[start : start + 256].astype(np.float32))
        left_out = torch.from_numpy(np.array(file["done"][start : start + 256]) == 0)
        found = whitening.apply(rows).masked_fill(left_out[:, None], torch.nan)  # which is never retrieved
        file.write("global", start, found.numpy())
    if all(i.point_ids is not None for i in references):
        parts = shared_points(i.point_ids for i in references if i.point_ids is not None)
    else:
        parts = covisible_by_depth(
            references.poses, references.cameras, references.places, lambda row: _points_of(file, row),
            candidates=4 * NEIGHBOURS,
        )  # fmt: skip
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


def _files_fingerprint(references: ImageList) -> str:
    """Hash of the references' images and depth maps, by `sample_digest`; a file that is not there counts as missing."""

    def look(path: Path) -> str:
        try:
            return sample_digest(path)
        except OSError:  # told when it is read
            return "missing"

    digest, scales = hashlib.sha256(), list[float]()
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(references), _FILES):
            part = references[start : start + _FILES]
            paths = [path for i in part for path in (i.path, *(() if i.depth is None else (i.depth.path,)))]
            scales += [0.0 if i.depth is None else i.depth.scale for i in part]
            digest.update("".join(f"{found}\n" for found in pool.map(look, paths)).encode())
    digest.update(repr(scales).encode())
    return digest.hexdigest()[:16]


def _scene_fingerprint(references: ImageList, points: Tensor) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(points.numpy()).data)
    poses, cameras = references.poses, references.cameras
    columns = [v.numpy() for v in (cameras.size, cameras.parameters, poses.rotation, poses.translation)]
    for row, i in enumerate(references):
        digest.update(i.name.encode(errors="surrogateescape"))
        for values in columns:
            digest.update(values[row].tobytes())
        if i.point_ids is not None:
            digest.update(np.asarray(i.point_ids, np.int64).tobytes())
    return digest.hexdigest()[:16]
