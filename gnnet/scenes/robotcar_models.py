"""Reference images and 3D points of RobotCar Seasons' models: COLMAP text a location, or one merged NVM."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pycolmap
import torch
from rich.progress import track
from torch import Tensor

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose


@dataclass(frozen=True)
class Reference:
    """A reference image: its pose, and rows (K,) of the scene's points with the pixels (K, 2) that see them."""

    place: str
    cam_from_world: Pose
    point_ids: np.ndarray
    keypoints: np.ndarray
    camera: Camera | None = None


def read_colmap_models(
    folders: list[Path], cameras: tuple[str, ...], progress: bool
) -> tuple[dict[str, Reference], Tensor]:
    """References by name and points (P, 3) of the models `NNN_aligned`; NNN is the place.

    Raises:
        ValueError: if a model cannot be read.
    """
    references: dict[str, Reference] = {}
    points, count = [], 0
    for folder in track(folders, "Reading models", disable=not progress, transient=True):
        try:
            model = pycolmap.Reconstruction(str(folder))
        except Exception as error:  # pycolmap raises several types
            raise ValueError(
                f"{folder} cannot be read as a COLMAP model ({error}); expected cameras, images and points3D "
                "as .txt or .bin (dataset.root)"
            ) from error
        place = folder.name.removesuffix("_aligned")
        found, xyz = _references_of(model, place, cameras, first_row=count)
        references |= found
        points.append(xyz)
        count += len(xyz)
    return references, torch.from_numpy(np.concatenate(points))


def _references_of(
    model: pycolmap.Reconstruction, place: str, cameras: tuple[str, ...], first_row: int
) -> tuple[dict[str, Reference], np.ndarray]:
    """The model as arrays; only points that the wanted cameras see."""
    found, seen = {}, []
    for image in model.images.values():
        name = _image_name(image.name)
        if PurePosixPath(name).parent.name not in cameras or not image.has_pose:
            continue
        observed = image.get_observation_points2D()
        ids = np.array([point.point3D_id for point in observed], np.int64)
        keypoints = np.array([point.xy for point in observed], np.float64).reshape(-1, 2)
        pose = Pose.from_matrix(torch.from_numpy(np.array(image.cam_from_world().matrix(), np.float64)))
        camera = model.cameras[image.camera_id]
        intrinsics = Camera.from_colmap(
            camera.model.name, camera.width, camera.height, camera.params, dtype=torch.float64
        )  # fmt: skip
        found[name] = Reference(place, pose, ids, keypoints, intrinsics)
        seen.append(ids)
    kept = np.unique(np.concatenate(seen)) if seen else np.zeros(0, np.int64)
    xyz = np.array([model.points3D[int(i)].xyz for i in kept], np.float64).reshape(-1, 3)
    rows = {
        name: Reference(
            r.place, r.cam_from_world, first_row + np.searchsorted(kept, r.point_ids), r.keypoints, r.camera
        )
        for name, r in sorted(found.items())
    }  # fmt: skip
    return rows, xyz


def _image_name(name: str) -> str:
    """As below `images/`: models say .png, may begin with ./, and may leave out the reference's folder."""
    path = PurePosixPath(name.removeprefix("./")).with_suffix(".jpg")
    return str(path if len(path.parts) > 2 else PurePosixPath("overcast-reference") / path)


def read_nvm(path: Path, cameras: tuple[str, ...], place_size: float) -> tuple[dict[str, Reference], Tensor]:
    """References by name and points (P, 3) of a VisualSFM model; a place is a stretch of `place_size` metres.

    NVM has the camera's centre C, so t = -R·C; its keypoints are taken as pixels of the image.

    Raises:
        ValueError: if the file is not NVM_V3 or ends early.
    """
    with open(path) as file:
        lines = (line for line in file if line.strip())
        if not next(lines, "").startswith("NVM_V3"):
            raise ValueError(f"{path} does not begin with NVM_V3; expected a VisualSFM model (dataset.root)")
        try:
            images = [next(lines).split() for _ in range(int(next(lines)))]
            wanted = [PurePosixPath(_image_name(image[0])).parent.name in cameras for image in images]
            ids, keypoints, points = _nvm_points(lines, int(next(lines)), wanted)
            names = [_image_name(image[0]) for image in images]
            numbers = np.array([[float(v) for v in image[2:9]] for image in images]).reshape(-1, 7)
        except (StopIteration, ValueError, IndexError) as error:
            raise ValueError(
                f"{path} is damaged ({type(error).__name__}: {error}); expected NVM_V3 with its images and points "
                "(dataset.root)"
            ) from error
    rotation = Pose.from_quaternion(torch.from_numpy(numbers[:, :4]), torch.zeros(len(names), 3, dtype=torch.float64))
    centers = torch.from_numpy(numbers[:, 4:])
    poses = Pose(rotation.rotation, -(rotation.rotation @ centers[..., None]).squeeze(-1))
    order = [i for i in sorted(range(len(names)), key=names.__getitem__) if wanted[i]]
    places = dict(zip(order, _stretches(centers[order].numpy(), place_size), strict=True))
    return {names[i]: Reference(places[i], poses[i], ids[i], keypoints[i]) for i in order}, points


def _nvm_points(lines, count: int, wanted: list[bool]) -> tuple[list[np.ndarray], list[np.ndarray], Tensor]:
    """For each image the rows of its points and their keypoints; points that no wanted image sees are left out."""
    ids: list[list[int]] = [[] for _ in wanted]
    keypoints: list[list[tuple[float, float]]] = [[] for _ in wanted]
    points: list[list[float]] = []
    for _ in range(count):
        values = next(lines).split()
        seen = zip(values[7::4], values[9::4], values[10::4], strict=True)
        measured = [(int(image), float(x), float(y)) for image, x, y in seen if wanted[int(image)]]
        if not measured:
            continue
        for image, x, y in measured:
            ids[image].append(len(points))
            keypoints[image].append((x, y))
        points.append([float(v) for v in values[:3]])
    return (
        [np.array(rows, np.int64) for rows in ids],
        [np.array(xy, np.float64).reshape(-1, 2) for xy in keypoints],
        torch.tensor(points, dtype=torch.float64).reshape(-1, 3),
    )


def _stretches(centers: np.ndarray, place_size: float) -> list[str]:
    """Names of the stretches of a drive with centres (N, 3): a new one after `place_size` metres or a jump as far."""
    names, number, start = [], 0, 0
    for i in range(len(centers)):
        jumped = i > 0 and np.linalg.norm(centers[i] - centers[i - 1]) > place_size
        if jumped or np.linalg.norm(centers[i] - centers[start]) > place_size:
            number, start = number + 1, i
        names.append(f"stretch{number:03d}")
    return names
