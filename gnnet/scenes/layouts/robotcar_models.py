"""RobotCar Seasons: names of images, and the reference images with their 3D points (a model a place, or one NVM).

`home` is the folder `robotcar`, here and in `robotcar_queries`.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from gnnet.files import below
from gnnet.geometry.camera import Camera
from gnnet.progress import track
from gnnet.scenes.formats.colmap import Model, ModelImage, read_model
from gnnet.scenes.formats.nvm import read_nvm
from gnnet.scenes.pairing import stretches_by_length
from gnnet.scenes.problems import BadInput
from gnnet.scenes.scene import SceneImage

REFERENCE = "overcast-reference"
CAMERAS = ("left", "rear", "right")


def image_name(name: str, source: str) -> str:
    """`<condition>/<camera>/<timestamp>.jpg` for a name in one of the data set's files.

    Models say .png, may begin with ./, and may leave out the reference's folder.

    Args:
        name: as it stands in the file.
        source: the file, for messages.

    Raises:
        ValueError: if the name leaves `images/`, or is of another form.
    """
    path = PurePosixPath(below(Path("images"), name.removeprefix("./"), source).as_posix()).relative_to("images")
    parts = path.parts if len(path.parts) > 2 else (REFERENCE, *path.parts)
    if len(parts) != 3 or parts[1] not in CAMERAS:
        raise ValueError(
            f"{source} names {name[:80]!r}; expected <condition>/{{{','.join(CAMERAS)}}}/<timestamp>.jpg below images/"
        )
    return str(PurePosixPath(*parts).with_suffix(".jpg"))


def _reference_name(name: str, source: str) -> str:
    found = image_name(name, source)
    if condition_of(found) != REFERENCE:
        raise ValueError(f"{source} names {name[:80]!r}; expected an image of {REFERENCE}")
    return found


def camera_of(name: str) -> str:
    """Which of the three cameras took an image."""
    return PurePosixPath(name).parent.name


def condition_of(name: str) -> str:
    """The condition, an image's first folder."""
    return PurePosixPath(name).parts[0]


def moment(name: str) -> tuple[str, str]:
    """Condition and timestamp, which the three cameras' images of one moment share."""
    return condition_of(name), PurePosixPath(name).stem


def by_time(name: str) -> tuple[str, str]:
    """Sorting key: images as they were taken, the three cameras' images of one moment together."""
    return PurePosixPath(name).stem, name


def read_colmap_models(
    home: Path, folders: list[Path], cameras: tuple[str, ...], bad: BadInput, progress: bool
) -> tuple[dict[str, SceneImage], Tensor]:
    """References by name, and points (P, 3) that they see, of the models `NNN_aligned`; NNN is the place.

    `bad` gets a model that cannot be read, whose place is then left out; and an image whose name or pose is damaged.
    """
    references: dict[str, SceneImage] = {}
    points, count = [np.zeros((0, 3))], 0
    for folder in track(folders, "Reading models", show=progress):
        with bad.skipping():
            model = read_model(folder, bad)
            if not model.images:
                raise ValueError(f"{folder} holds no image; expected a COLMAP model with poses in images.txt")
            if model.points_left_out:
                bad.report(ValueError(f"{folder}: {model.points_left_out} points are not finite, or not in metres"))
            images = _wanted_images(model, folder, cameras, bad)
            seen = np.zeros(len(model.points), bool)
            for image in images.values():
                seen[image.point_rows] = True
            place, row_of = folder.name.removesuffix("_aligned"), count + np.cumsum(seen) - 1
            for name, image in sorted(images.items()):
                image = image._replace(name=name, point_rows=row_of[image.point_rows])
                references[name] = image.as_reference(home / "images" / name, condition=REFERENCE, place=place)
            points.append(model.points[seen])
            count += len(points[-1])
    return references, torch.from_numpy(np.concatenate(points))


def _wanted_images(model: Model, folder: Path, cameras: tuple[str, ...], bad: BadInput) -> dict[str, ModelImage]:
    images: dict[str, ModelImage] = {}
    for image in model.images:
        with bad.skipping():
            name = _reference_name(image.name, str(folder))
            if name in images:
                raise ValueError(f"{folder} names {name} again; expected each image once")
            if camera_of(name) in cameras:
                images[name] = image
    return images


def read_merged_model(
    home: Path, path: Path, intrinsics: dict[str, Camera], place_size: float, bad: BadInput
) -> tuple[dict[str, SceneImage], Tensor]:
    """References by name and points (P, 3) of the merged NVM model; a place is a stretch of the drive.

    The data set's README says that (0, 0) is the image's top-left corner in its NVM models, as in COLMAP.
    `intrinsics` are of the wanted cameras, by name; `place_size` metres make a place; `bad` gets damaged lines.
    """

    def image_of(name: str, source: str) -> tuple[str, Camera] | None:
        name = _reference_name(name, source)
        camera = intrinsics.get(camera_of(name))
        return None if camera is None else (name, camera)

    model = read_nvm(path, image_of, bad)
    images = sorted(model.images, key=lambda image: by_time(image.name))
    centers = np.array([image.cam_from_world.center().numpy() for image in images]).reshape(-1, 3)
    numbers = stretches_by_length(centers, place_size)
    references = {
        image.name: image.as_reference(home / "images" / image.name, condition=REFERENCE, place=f"stretch{number:03d}")
        for image, number in zip(images, numbers, strict=True)
    }
    return references, torch.from_numpy(model.points)
