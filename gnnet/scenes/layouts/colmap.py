"""Any COLMAP reconstruction: photographs, and a model of them (binary or text), as COLMAP or hloc write it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from gnnet.files import found_below
from gnnet.scenes.formats.colmap import Model, read_model
from gnnet.scenes.formats.images import subfolders
from gnnet.scenes.pairing import centers_of, covisible_pairs, stretches_of
from gnnet.scenes.problems import BadInput, OnBad
from gnnet.scenes.scene import Scene, SceneImage

READER_VERSION = 1  # raise it when the same files make another scene, so that their index is made anew


def load_colmap(
    root: str | Path,
    *,
    images: str | Path = "images",
    sparse: str | Path | None = None,
    places: int = 5,
    min_shared_points: int = 30,
    pairs_per_image: int = 8,
    on_bad: OnBad = "raise",
    progress: bool = True,
) -> Scene:
    """Read a reconstruction: every image is both a reference and a query, pairs are covisible images.

    Args:
        root: the folder.
        images: folder of the photographs, relative to `root` or absolute.
        sparse: folder of the model (`cameras`, `images`, `points3D`, `.bin` or `.txt`), or the one above its
            `0`, relative to `root` or absolute. None: `sparse`; else the only one of the root itself,
            `sparse/0`, `sparse/1`, …, `sfm` and `sfm_*`.
        places: into how many stretches of the camera's path the scene is cut for splitting; one
            model has no places of its own, so neighbouring stretches may still see common points.
        min_shared_points: fewer common points make no pair.
        pairs_per_image: number of others that each image is paired with, those that share most points.
        on_bad, progress: see `gnnet.scenes.layouts`.

    Raises:
        FileNotFoundError: no model, more than one, or images of the model that are not on disk.
        ValueError: a damaged model, or an unsupported camera model.
    """
    root, bad = Path(root), BadInput(on_bad)
    model_dir = _find_model(root, sparse)
    model = read_model(model_dir, bad)
    scene_images = _images_on_disk(model, model_dir, root / images, bad)
    if not scene_images:
        raise ValueError(f"{model_dir} holds no image that can be used (dataset.root){bad.first}")
    name = root.absolute().name
    scene_images = [
        replace(image, place=f"{name}/{stretch}")
        for image, stretch in zip(scene_images, stretches_of(centers_of(scene_images), places), strict=True)
    ]
    pairs = covisible_pairs(scene_images, min_shared_points, pairs_per_image, progress)
    if not pairs:  # it may still be a map
        bad.note(
            f"{model_dir} holds no two images that share {min_shared_points} points, to train on; "
            "lower min_shared_points, or reconstruct with more matches"
        )
    named, points = {image.name: image for image in scene_images}, torch.from_numpy(model.points)
    return Scene(f"colmap {name}", named, pairs, points, problems=tuple(bad.problems), dataset="colmap")


def _images_on_disk(model: Model, model_dir: Path, image_dir: Path, bad: BadInput) -> list[SceneImage]:
    """The model's images whose files are below `image_dir`, by name; their place is yet empty."""
    found: dict[str, SceneImage] = {}
    missing = []
    for image in sorted(model.images, key=lambda image: image.name):
        with bad.skipping():
            path = found_below(image_dir, image.name, f"{model_dir}, images")
            if image.name in found:
                raise ValueError(f"{model_dir} has image {image.name} twice; take one of them out of the model")
            if not path.is_file():
                missing.append(path)
                continue
            found[image.name] = image.as_reference(path)
    how = "put the images there, or name their folder (dataset.images)"
    if missing and bad.on_bad == "raise":
        raise FileNotFoundError(
            f"{len(missing)} of {len(model.images)} images of {model_dir} are not on disk, "
            f"the first: {missing[0]}; {how}"
        )
    for path in missing:
        bad.report(FileNotFoundError(f"image {path}, which {model_dir} has, is not on disk; {how}"))
    return list(found.values())


def _find_model(root: Path, sparse: str | Path | None) -> Path:
    if sparse is not None:
        asked = [root / sparse, root / sparse / "0"]
        found = [folder for folder in asked if _holds_model(folder)][:1]
    elif _holds_model(root / "sparse"):
        found = [root / "sparse"]
    else:
        sfm = [folder for folder in subfolders(root) if folder.name.split("_")[0] == "sfm"]
        below_root = sorted([*subfolders(root / "sparse"), *sfm])
        found = [folder for folder in (root, *below_root) if _holds_model(folder)]
    if len(found) == 1:
        return found[0]
    expected = (
        "  <dataset.root>/images/…           the photographs; another folder: dataset.images\n"
        "  <dataset.root>/sparse/            cameras, images, points3D as .bin or .txt; another: dataset.sparse\n"
        'as COLMAP\'s automatic_reconstructor or hloc write it, see docs/datasets.md "Your own data"'
    )
    if found:
        raise FileNotFoundError(
            f"{root.absolute()} holds {len(found)} COLMAP models (dataset.root): "
            f"{', '.join(os.path.relpath(folder, root) for folder in found)}; name one by dataset.sparse; expected\n"
            + expected
        )
    there = ", ".join(sorted(path.name for path in root.iterdir())[:20]) if root.is_dir() else "no such folder"
    raise FileNotFoundError(
        f"{(root / (sparse or 'sparse')).absolute()} holds no COLMAP model (dataset.root), and so do the places where "
        f"one could be; found there: {there or 'nothing'}; expected\n{expected}"
    )


def _holds_model(folder: Path) -> bool:
    return any((folder / f"images{ending}").is_file() for ending in (".bin", ".txt"))
