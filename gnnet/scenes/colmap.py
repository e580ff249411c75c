"""Any COLMAP reconstruction: `images/` beside `sparse/` (binary or text)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch

from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.scenes.scene import Pair, Scene, SceneImage


def load_colmap(
    root: str | Path,
    *,
    images: str = "images",
    sparse: str = "sparse",
    places: int = 5,
    min_shared_points: int = 30,
    pairs_per_image: int = 8,
) -> Scene:
    """Read a COLMAP folder: every image is both a reference and a query, pairs are covisible images.

    Args:
        root: the folder.
        images: image folder inside it.
        sparse: folder of the model inside it (`cameras`, `images`, `points3D`, `.bin` or `.txt`);
            `sparse/0` is taken where `sparse` itself holds no model.
        places: into how many stretches of the camera's path the scene is cut for splitting; one
            model has no places of its own, so neighbouring stretches may still see common points.
        min_shared_points: fewer common points make no pair.
        pairs_per_image: each image is paired with so many others, those that share most points.

    Raises:
        FileNotFoundError: no model, or images of the model that are not on disk.
        ValueError: an unsupported camera model, or no pair with enough common points.
    """
    root = Path(root)
    model_dir = _find_model(root, sparse)
    scene_images, points = read_colmap_model(model_dir, image_dir=root / images)
    centers = torch.stack([image.cam_from_world.center() for image in scene_images]).numpy()
    stretches = _stretches(centers, places)
    named = {
        image.name: SceneImage(**{**vars(image), "place": f"{root.name}/{stretch}"})
        for image, stretch in zip(scene_images, stretches, strict=True)
    }
    pairs = _covisible_pairs(list(named.values()), min_shared_points, pairs_per_image)
    if not pairs:
        raise ValueError(
            f"{model_dir} holds no two images that share {min_shared_points} points; "
            "lower min_shared_points, or reconstruct with more matches"
        )
    return Scene(name=f"colmap {root.name}", images=named, pairs=pairs, points=points)


def read_colmap_model(
    model_dir: Path, *, image_dir: Path, condition: str = "reference", suffix: str | None = None
) -> tuple[list[SceneImage], torch.Tensor]:
    """Images (with observations as rows of the points) and points (P, 3) of one COLMAP model.

    Args:
        model_dir: holds `cameras`, `images` and `points3D`, `.bin` or `.txt`.
        image_dir: where the image files are.
        condition: given to all images.
        suffix: replaces the ending of the names in the model (RobotCar says `.png`, the files are `.jpg`).

    Raises:
        FileNotFoundError: images of the model that are not on disk: how many, and the first.
        ValueError: a camera model that is not supported; it names the camera.
    """
    import pycolmap  # slow to import, and only the readers need it

    reconstruction = pycolmap.Reconstruction(str(model_dir))
    point_ids = np.array(sorted(reconstruction.point3D_ids()), dtype=np.int64)
    points = np.array([reconstruction.point3D(i).xyz for i in point_ids], dtype=np.float64).reshape(-1, 3)
    cameras = {}
    for camera_id, camera in reconstruction.cameras.items():
        try:
            cameras[camera_id] = Camera.from_colmap(
                camera.model.name, camera.width, camera.height, camera.params, dtype=torch.float64
            )
        except ValueError as error:
            raise ValueError(f"{model_dir}, camera {camera_id}: {error}") from error
    images, missing = [], []
    for image_id in sorted(reconstruction.reg_image_ids()):
        image = reconstruction.image(image_id)
        name = image.name if suffix is None else str(Path(image.name).with_suffix(suffix))
        path = image_dir / name
        if not path.is_file():
            missing.append(path)
            continue
        observed = [p for p in image.points2D if p.has_point3D()]
        matrix = torch.from_numpy(np.array(image.cam_from_world().matrix(), dtype=np.float64))
        images.append(
            SceneImage(
                name=name,
                path=path,
                condition=condition,
                place=model_dir.name,
                camera=cameras[image.camera_id],
                cam_from_world=Pose.from_matrix(matrix),
                is_reference=True,
                point_ids=np.searchsorted(point_ids, [p.point3D_id for p in observed]),
                keypoints=np.array([p.xy for p in observed], dtype=np.float64).reshape(-1, 2),
            )
        )
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(missing) + len(images)} images of {model_dir} are not on disk, "
            f"the first: {missing[0]}; put the images there, or name their folder"
        )
    return images, torch.from_numpy(points)


def _find_model(root: Path, sparse: str) -> Path:
    for folder in (root / sparse, root / sparse / "0"):
        if any((folder / f"images{ending}").is_file() for ending in (".bin", ".txt")):
            return folder
    raise FileNotFoundError(
        f"{root.absolute() / sparse} holds no COLMAP model (dataset.root); expected\n"
        "  <dataset.root>/images/…           the photographs\n"
        "  <dataset.root>/sparse/            cameras, images, points3D as .bin or .txt\n"
        "as COLMAP's automatic_reconstructor or hloc write it, see README \"Your own data\""
    )


def _stretches(centers: np.ndarray, count: int) -> np.ndarray:
    """Index of the stretch (N,) of each camera centre (N, 3): equal counts along the main axis of the path."""
    offsets = centers - centers.mean(0)
    axis = np.linalg.svd(offsets, full_matrices=False)[2][0]
    axis = axis * np.sign(axis[np.abs(axis).argmax()])  # the sign of a singular vector is arbitrary
    rank = np.argsort(np.argsort(offsets @ axis, kind="stable"), kind="stable")
    return rank * min(count, len(centers)) // len(centers)


def _covisible_pairs(images: list[SceneImage], min_shared: int, per_image: int) -> tuple[Pair, ...]:
    observers: dict[int, list[int]] = {}
    for i, image in enumerate(images):
        for point in set(image.point_ids.tolist()):
            observers.setdefault(point, []).append(i)
    shared = Counter()
    for seen_by in observers.values():
        shared.update((i, j) for n, i in enumerate(seen_by) for j in seen_by[n + 1 :])
    partners: dict[int, list[tuple[int, int]]] = {}
    for (i, j), count in shared.items():
        if count >= min_shared:
            partners.setdefault(i, []).append((count, j))
            partners.setdefault(j, []).append((count, i))
    chosen = {
        (min(i, j), max(i, j))
        for i, candidates in partners.items()
        for _, j in sorted(candidates, reverse=True)[:per_image]
    }
    return tuple(
        Pair(image_a=images[i].name, image_b=images[j].name, place=images[i].place)
        for i, j in sorted(chosen)
    )
