"""The toy town on disk: a small rendered city in the layout of RobotCar Seasons, with exact ground truth."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress

from gnnet.files import locked
from gnnet.geometry.pose import Pose
from gnnet.scenes.layouts.robotcar import load_robotcar
from gnnet.scenes.problems import OnBad
from gnnet.scenes.scene import Scene
from gnnet.toy import layout
from gnnet.toy.camera import toy_camera
from gnnet.toy.light import WEATHERS, LitStreet, light_street, paint_street
from gnnet.toy.render import render_frame
from gnnet.toy.streets import Street, build_street, drive
from gnnet.toy.truth import Spread, match_image, observe_points, render_depth, spread_points

VERSION = 2  # of the rendering; raise it whenever the same settings give other files
REFERENCE = "overcast-reference"
CONDITIONS = tuple(WEATHERS)
PAIR_RANKS = (0, 1, 3)  # each image is paired with its nearest, second and fourth nearest reference


def load_toy(
    root: Path,
    *,
    places: int = 12,
    frames: int = 6,
    query_frames: int = 4,
    image_size: int = 256,
    seed: int = 0,
    conditions: tuple[str, ...] = CONDITIONS,
    on_bad: OnBad = "raise",
    progress: bool = True,
) -> Scene:
    """Render the toy town to `root` unless it is there already, and read it as RobotCar Seasons is read."""
    ensure_toy_town(
        root, places=places, frames=frames, query_frames=query_frames, image_size=image_size, seed=seed,
        conditions=conditions, progress=progress,
    )  # fmt: skip
    return load_robotcar(root, on_bad=on_bad, progress=progress)


def ensure_toy_town(
    root: Path,
    *,
    places: int = 12,
    frames: int = 6,
    query_frames: int = 4,
    image_size: int = 256,
    seed: int = 0,
    conditions: tuple[str, ...] = CONDITIONS,
    write_depth: bool = False,
    progress: bool = True,
) -> Path:
    """`render_toy_town`, unless `root` holds a complete town of the same settings; returns `root`.

    The town appears under its name when it is complete; of several processes at once, one renders
    and the others wait.

    Raises:
        FileExistsError: if `root` holds something that is not a toy town.
    """
    root = Path(root)
    settings = _settings(places, frames, query_frames, image_size, seed, conditions, write_depth)
    if _found_settings(root) == settings:
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with locked(root.with_name(f".{root.name}.lock")):
        if _found_settings(root) == settings:  # another process rendered it meanwhile
            return root
        if root.exists() and any(root.iterdir()) and not (root / "toy.json").is_file():
            raise FileExistsError(
                f"{root.absolute()} holds files but no toy.json, so it is no toy town and is left as it is; "
                "give an empty or new folder (dataset.root)"
            )
        partial = root.with_name(f".{root.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        render_toy_town(
            partial, places=places, frames=frames, query_frames=query_frames, image_size=image_size, seed=seed,
            conditions=conditions, write_depth=write_depth, progress=progress,
        )  # fmt: skip
        shutil.rmtree(root, ignore_errors=True)
        os.replace(partial, root)
    return root


def render_toy_town(
    root: Path,
    *,
    places: int = 12,
    frames: int = 6,
    query_frames: int = 4,
    image_size: int = 256,
    seed: int = 0,
    conditions: tuple[str, ...] = CONDITIONS,
    write_depth: bool = False,
    progress: bool = True,
) -> Path:
    """Render streets that a camera drives through in several conditions; the same files for the same settings.

    Args:
        root: folder to write `robotcar/…` and `toy.json` to.
        places: streets, 200 m apart.
        frames: reference images a place, 1.25 m apart.
        query_frames: images a place of each other condition.
        image_size: width and height in pixels.
        seed: another seed is another town.
        conditions: of `CONDITIONS`, with `overcast-reference`.
        write_depth: also write `robotcar/depth/<condition>/rear/<timestamp>.npy`, float32 metres, 0 for sky.
        progress: show a progress bar.

    Raises:
        ValueError: if a condition is not known, the reference is missing, or a number is too small.
    """
    settings = _settings(places, frames, query_frames, image_size, seed, conditions, write_depth)
    home = Path(root) / "robotcar"
    workers = min(places, max(1, torch.get_num_threads()))
    # Forked, as DataLoader's workers are: no import, and no demand on the caller's main module.
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("fork"), initializer=partial(torch.set_num_threads, 1)
    )
    with pool:
        futures = [pool.submit(_render_place, home, place, settings) for place in range(places)]
        with Progress(disable=not progress) as bar:
            for _ in bar.track(as_completed(futures), total=places, description="Rendering the toy town"):
                pass
        layout.write_town(home, [future.result() for future in futures], toy_camera(image_size))
    (Path(root) / "toy.json").write_text(json.dumps(settings, indent=2) + "\n")
    return Path(root)


def _settings(places, frames, query_frames, image_size, seed, conditions, write_depth) -> dict:
    """The settings as toy.json keeps them, checked."""
    unknown = sorted(set(conditions) - set(CONDITIONS))
    if unknown or REFERENCE not in conditions:
        raise ValueError(
            f"conditions of the toy town are {', '.join(CONDITIONS)}, {REFERENCE} always among them; "
            f"found {', '.join(conditions)}"
        )
    numbers = {"places": places, "frames": frames, "query_frames": query_frames, "image_size": image_size}
    for name, value in numbers.items():
        least = 32 if name == "image_size" else 1
        if value < least:
            raise ValueError(f"{name} of the toy town is {value}; expected at least {least}")
    ordered = [condition for condition in CONDITIONS if condition in conditions]
    return {"version": VERSION, **numbers, "seed": seed, "conditions": ordered, "write_depth": write_depth}


def _found_settings(root: Path) -> dict | None:
    try:
        return json.loads((root / "toy.json").read_text())
    except (OSError, ValueError):
        return None


def _render_place(home: Path, place: int, settings: dict) -> layout.PlaceFiles:
    """Render and write one place: its references with 3D points, then every other condition with its pairs."""
    seed, camera = settings["seed"], toy_camera(settings["image_size"])
    street = build_street(place, seed)
    painted = paint_street(street, np.random.default_rng([seed, place, 1]), coarseness=256 / settings["image_size"])
    files = layout.PlaceFiles(place)
    references, spreads = Pose.identity(0), []
    for condition in settings["conditions"]:
        number = CONDITIONS.index(condition)
        rng = np.random.default_rng([seed, place, 2, number])
        count = settings["frames"] if condition == REFERENCE else settings["query_frames"]
        poses = drive(frames=count, reference_frames=settings["frames"], rng=rng)
        names = [layout.image_name(condition, number, place, frame) for frame in range(count)]
        lit = light_street(painted, WEATHERS[condition], rng)
        images = _render_drive(home, lit, poses, names, settings, rng)
        if condition == REFERENCE:
            references = poses
            spreads = [spread_points(street, camera, poses[frame], rng) for frame in range(count)]
            files.add_references(street, names, poses, observe_points(street, camera, poses, images))
        else:
            files.add_queries(street, names, poses)
            _write_pairs(home, street, files, references, spreads, names, poses, settings, rng)
    return files


def _render_drive(home: Path, lit: LitStreet, poses: Pose, names: list[str], settings: dict, rng) -> list[np.ndarray]:
    camera = toy_camera(settings["image_size"])
    images = []
    for frame, name in enumerate(names):
        image = render_frame(lit, camera, poses[frame], rng)
        path = home / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, quality=95, subsampling=0)
        if settings["write_depth"]:
            path = (home / "depth" / name).with_suffix(".npy")
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, render_depth(lit.painted.street, camera, poses[frame]).astype(np.float32))
        images.append(image)
    return images


def _write_pairs(
    home: Path, street: Street, files: layout.PlaceFiles, references: Pose, spreads: list[Spread],
    names: list[str], poses: Pose, settings: dict, rng: np.random.Generator,
) -> None:  # fmt: skip
    """Correspondences of one drive's images with references near and less near."""
    camera, condition = toy_camera(settings["image_size"]), names[0].split("/")[0]
    number = 1000 * files.place
    for frame, name in enumerate(names):
        distance = (references.center() - poses[frame].center()).norm(dim=-1)
        nearest = distance.argsort(stable=True).tolist()
        chosen = [nearest[rank] for rank in PAIR_RANKS if rank < len(nearest)]
        matches = match_image(street, camera, [spreads[i] for i in chosen], poses[frame], rng)
        for reference, (xy_a, xy_b, weight) in zip(chosen, matches, strict=True):
            number += 1
            if len(xy_a) > 0:
                path = layout.correspondence_path(home, condition, number)
                layout.write_correspondences(path, files.reference_names[reference], name, xy_a, xy_b, weight)
