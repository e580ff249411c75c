"""Which images are queries, and what files give of them: lists of queries, initial poses, true poses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from gnnet.data.observed_points import observes
from gnnet.files import found_below
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.scenes.formats.poses import read_pose_file, read_query_list, read_query_names
from gnnet.scenes.formats.rigs import OnRig, images_on_rigs, read_rig_config
from gnnet.scenes.layouts.robotcar_queries import robotcar_rig
from gnnet.scenes.scene import Scene, SceneImage

KNOWN_RIG = "dataset"  # rig=dataset takes the rig that the dataset knows


def queries_of_scene(scene: Scene) -> list[SceneImage]:
    """The images that are no references; if all are, each of them, to be localized without its own observations."""
    images = list(scene.images.values())
    chosen = [i for i in images if not i.is_reference]
    if not chosen:
        chosen = [i for i in images if i.cam_from_world is not None and observes(i)]
    return sorted(chosen, key=lambda image: image.name)


class QueryList(NamedTuple):
    """Queries that a file lists: by name their cameras, or what is wrong, and the folder that the names are below.

    A camera is None where its focal length is to be estimated.
    """

    cameras: Mapping[str, Camera | ValueError | None]
    images: Path


class PoseFile(NamedTuple):
    """`cam_from_world` by the names of a file, and the file and its setting for messages."""

    poses: Mapping[str, Pose]
    source: str


class Given(NamedTuple):
    """What is given beside a dataset; None where it is not.

    Args:
        listed: queries to localize in place of the dataset's own.
        initial: initial poses of the queries.
        truth: true poses of the queries, in place of those that the dataset knows.
        rig: COLMAP's rig_config.json, whose images of one instant are localized together; `dataset` takes the rig that
            the dataset knows.
    """

    listed: QueryList | None = None
    initial: PoseFile | None = None
    truth: PoseFile | None = None
    rig: str | None = None


def read_given(
    *, queries: str | None, images: str | None, poses: str | None, truth: str | None, camera: str | None = None,
    rig: str | None = None,
) -> Given:  # fmt: skip
    """Read the files that settings of these names give; with `camera` unknown, of a list the names alone.

    Raises:
        FileNotFoundError, ValueError: if one is missing or broken, or `queries` and `images` are not given together, or
            `camera` is not known, or needs to be, for a rig.
    """
    if (queries is None) != (images is None):
        raise ValueError("queries=FILE needs images=DIR, the folder that its names are below; and images needs queries")
    if camera not in (None, "unknown"):
        raise ValueError(f"camera={camera}; expected unknown, which estimates each query's focal length, or null")
    if rig is not None and camera is not None:
        raise ValueError("rig= needs the cameras' intrinsics, and camera=unknown estimates them; give one of the two")
    if rig not in (None, KNOWN_RIG):
        read_rig_config(rig)
    listed = None
    if queries is not None and images is not None:
        listed = QueryList(read_query_list(queries) if camera is None else read_query_names(queries), Path(images))
    initial, true = (
        None if file is None else PoseFile(read_pose_file(file, on_bad="skip"), f"{file} ({key}=)")
        for key, file in (("poses", poses), ("truth", truth))
    )
    return Given(listed, initial, true, rig)


def on_rigs(queries: Sequence[SceneImage], rig: str | None, scene: Scene) -> dict[str, OnRig]:
    """Which queries are localized together, by name: see `Given.rig`; empty without a rig.

    Raises:
        FileNotFoundError, ValueError: if the file, or the dataset, tells no rig of the queries.
    """
    names = [query.name for query in queries]
    if rig is None:
        return {}
    if rig != KNOWN_RIG:
        return images_on_rigs(names, rig)
    ours = [name for name in names if name in scene.images]
    if scene.dataset not in ("robotcar", "toy") or not ours:
        raise ValueError(
            f"rig={KNOWN_RIG}: {scene.name} knows no rig of the {len(names)} queries; expected queries of RobotCar "
            "Seasons, or rig=FILE, COLMAP's rig_config.json"
        )
    return robotcar_rig(scene.images[ours[0]].path.parents[3], ours)


def queries_of_list(listed: QueryList, scene: Scene) -> tuple[list[SceneImage], dict[str, str]]:
    """Queries of a list, and, by name, why some of them cannot be used; these have no camera.

    Condition, place and pose are known of a query whose file is a file of the scene.

    Raises:
        FileNotFoundError: if none of the images exists.
    """
    queries, unusable = [], {}
    for name, camera in sorted(listed.cameras.items()):
        try:
            if isinstance(camera, ValueError):
                raise camera
            path = found_below(listed.images, name, "the list of queries")
            queries.append(SceneImage(name, path, camera=camera))
        except ValueError as error:
            queries.append(SceneImage(name, listed.images))
            unusable[name] = str(error)
    usable = [query for query in queries if query.name not in unusable]
    if not any(query.path.exists() for query in usable):
        raise FileNotFoundError(
            f"none of the {len(queries)} queries is in {listed.images.absolute()} (images=), the first: "
            f"{(usable or queries)[0].name}; expected the folder that the names in the list are below"
        )
    same = same_images((query.path for query in usable), scene)
    for i, query in enumerate(queries):
        if query.path in same:
            ours = scene.images[same[query.path]]
            queries[i] = replace(
                query, condition=ours.condition, place=ours.place, cam_from_world=ours.cam_from_world
            )
    return queries, unusable


def same_images(paths: Iterable[Path], scene: Scene) -> dict[Path, str]:
    """Names of the scene's images whose file is one of `paths`: the same file on disk, whatever it is called."""

    def file(path: Path) -> tuple[int, int] | None:
        try:
            status = path.stat()
        except (OSError, ValueError):
            return None
        return status.st_dev, status.st_ino

    ours = {file(image.path): image.name for image in scene.images.values()}
    ours.pop(None, None)
    return {path: ours[key] for path in paths if (key := file(path)) in ours}


