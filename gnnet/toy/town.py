"""The toy town on disk: a small rendered city in the layout of RobotCar Seasons, with exact ground truth."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gnnet.files import locked, new_folder
from gnnet.geometry.camera import Camera
from gnnet.geometry.pose import Pose
from gnnet.progress import track
from gnnet.scenes.layouts import robotcar
from gnnet.scenes.layouts.robotcar import load_robotcar
from gnnet.scenes.problems import OnBad
from gnnet.scenes.scene import Scene
from gnnet.toy import layout
from gnnet.toy.camera import toy_camera
from gnnet.toy.light import WEATHERS, light_street, paint_street
from gnnet.toy.render import render_frame
from gnnet.toy.streets import Street, build_street, drive
from gnnet.toy.truth import Spread, match_image, observe_points, render_depth, spread_points

VERSION = 2  # of the rendering; raise it whenever the same settings give other files
READER_VERSION = f"{VERSION}.{robotcar.READER_VERSION}"  # of the index: both the rendering and the reader count
REFERENCE = "overcast-reference"
CONDITIONS = tuple(WEATHERS)
PAIR_RANKS = (0, 1, 3)  # an image is paired with its nearest, second-nearest and fourth-nearest reference


@dataclass(frozen=True, kw_only=True)
class TownSettings:
    """Settings of a toy town; the same settings give the same files.

    Args:
        places: number of streets, 200 m apart.
        frames: reference images of each place, 1.25 m apart.
        query_frames: images of each place in each other condition.
        image_size: width and height in pixels.
        seed: another seed gives another town.
        conditions: some of `CONDITIONS`, the reference condition among them.
        write_depth: whether to write `robotcar/depth/<condition>/rear/<timestamp>.npy` too: depth along the
            optical axis, float32 metres, 0 for sky.

    Raises:
        ValueError: if a condition is unknown, the reference condition is missing, or a number is too small.
    """

    places: int = 12
    frames: int = 6
    query_frames: int = 4
    image_size: int = 256
    seed: int = 0
    conditions: Sequence[str] = CONDITIONS
    write_depth: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(set(self.conditions) - set(CONDITIONS))
        if unknown or REFERENCE not in self.conditions:
            raise ValueError(
                f"conditions of the toy town are {', '.join(CONDITIONS)}, {REFERENCE} always among them; "
                f"found {', '.join(self.conditions)}"
            )
        for name, least in (("places", 1), ("frames", 1), ("query_frames", 1), ("image_size", 32)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} of the toy town is {getattr(self, name)}; expected at least {least}")
        # In one order, so that the order in which they are given changes nothing.
        ordered = tuple(condition for condition in CONDITIONS if condition in self.conditions)
        object.__setattr__(self, "conditions", ordered)

    def text(self) -> str:
        """Content of `toy.json`, which tells whether a folder holds this very town."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=2) + "\n"


def load_toy(
    root: Path,
    *,
    places: int = TownSettings.places,
    frames: int = TownSettings.frames,
    query_frames: int = TownSettings.query_frames,
    image_size: int = TownSettings.image_size,
    seed: int = TownSettings.seed,
    conditions: Sequence[str] = TownSettings.conditions,
    on_bad: OnBad = "raise",
    progress: bool = True,
) -> Scene:
    """Read the toy town in `root` with the reader of RobotCar Seasons, after rendering it if necessary.

    Args:
        root: folder of the town.
        places, frames, query_frames, image_size, seed, conditions: see `TownSettings`.
        on_bad: see `load_robotcar`.
        progress: whether to show progress bars.

    Raises:
        ValueError: for bad settings, see `TownSettings`, and for bad files, see `load_robotcar`.
        FileExistsError: if `root` holds something that is not a toy town.
    """
    settings = TownSettings(
        places=places, frames=frames, query_frames=query_frames, image_size=image_size, seed=seed, conditions=conditions
    )
    ensure_toy_town(root, settings, progress=progress)
    return read_toy(root, on_bad=on_bad, progress=progress, **asdict(settings))


def read_toy(root: Path, *, on_bad: OnBad = "raise", progress: bool = True, **settings: Any) -> Scene:
    """Read the toy town as `load_toy` does, and never render it: what the settings in a checkpoint may ask for.

    Args:
        root, on_bad, progress: see `load_toy`.
        settings: see `TownSettings`.

    Raises:
        FileNotFoundError: if `root` holds no town of these settings.
    """
    if not _holds(Path(root), TownSettings(**settings)):
        raise FileNotFoundError(
            f"{Path(root).absolute()} holds no toy town of the checkpoint's settings (dataset.root), and a checkpoint "
            "does not have one rendered; dataset=toy on the command line does"
        )
    return replace(load_robotcar(root, on_bad=on_bad, progress=progress), dataset="toy")


def ensure_toy_town(root: Path, settings: TownSettings, *, progress: bool = True) -> Path:
    """`render_toy_town`, unless `root` holds a complete town of the same settings; returns `root`.

    The folder appears under its name only when it is complete. If several processes call this at once, one
    renders and the others wait.

    Raises:
        FileExistsError: if `root` holds something that is not a toy town.
    """
    root = Path(root)
    if _holds(root, settings):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with locked(root.with_name(f".{root.name}.lock")):
        if _holds(root, settings):  # another process has rendered it meanwhile
            return root
        if root.exists() and any(root.iterdir()) and not (root / "toy.json").is_file():
            raise FileExistsError(
                f"{root.absolute()} holds files but no toy.json, so it is no toy town and is left as it is; "
                "give an empty or new folder (dataset.root)"
            )
        with new_folder(root) as unfinished:
            render_toy_town(unfinished, settings, progress=progress)
    return root


def _holds(root: Path, settings: TownSettings) -> bool:
    try:
        return (root / "toy.json").read_text() == settings.text()
    except (OSError, ValueError):
        return False


def render_toy_town(root: Path, settings: TownSettings, *, progress: bool = True) -> Path:
    """Render streets that a camera drives through in several conditions; returns `root`.

    Args:
        root: folder to write `robotcar/…` and `toy.json` to.
        settings: what to render.
        progress: whether to show a progress bar.
    """
    home = Path(root) / "robotcar"
    workers = min(settings.places, max(1, torch.get_num_threads()))
    # Forked like the workers of a DataLoader: nothing is imported again, and the caller's main module needs no guard.
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("fork"), initializer=partial(torch.set_num_threads, 1)
    )
    with pool:
        futures = [pool.submit(_render_place, home, place, settings) for place in range(settings.places)]
        for _ in track(as_completed(futures), "Rendering the toy town", total=settings.places, show=progress):
            pass
        layout.write_town(home, [future.result() for future in futures], toy_camera(settings.image_size))
    (Path(root) / "toy.json").write_text(settings.text())
    return Path(root)


def _render_place(home: Path, place: int, settings: TownSettings) -> layout.PlaceFiles:
    """Render and write one place: its references with 3D points, then each other condition with its pairs."""
    camera, seed = toy_camera(settings.image_size), settings.seed
    street = build_street(place, seed)
    painted = paint_street(street, np.random.default_rng([seed, place, 1]), coarseness=256 / settings.image_size)
    files = layout.PlaceFiles(place)
    references, spreads = Pose.identity(0), []
    for condition in settings.conditions:
        number = CONDITIONS.index(condition)
        rng = np.random.default_rng([seed, place, 2, number])
        count = settings.frames if condition == REFERENCE else settings.query_frames
        poses = drive(frames=count, reference_frames=settings.frames, rng=rng)
        names = [layout.image_name(condition, number, place, frame) for frame in range(count)]
        lit = light_street(painted, WEATHERS[condition], rng)
        images = [render_frame(lit, camera, poses[frame], rng) for frame in range(count)]
        for frame, (name, image) in enumerate(zip(names, images, strict=True)):
            layout.write_image(home / "images" / name, image)
            if settings.write_depth:
                layout.write_depth(home / "depth" / name, render_depth(street, camera, poses[frame]))
        if condition == REFERENCE:
            references = poses
            spreads = [spread_points(street, camera, poses[frame], rng) for frame in range(count)]
            files.add_references(street, names, poses, observe_points(street, camera, poses, images))
        else:
            files.add_queries(street, names, poses)
            _write_pairs(home, street, camera, files, condition, references, spreads, names, poses, rng)
    return files


def _write_pairs(
    home: Path, street: Street, camera: Camera, files: layout.PlaceFiles, condition: str,
    references: Pose, spreads: list[Spread], names: list[str], poses: Pose, rng: np.random.Generator,
) -> None:  # fmt: skip
    """Write the correspondences of each image of one drive with some of the references."""
    number = 1000 * files.place
    for frame, name in enumerate(names):
        distance = (references.center() - poses[frame].center()).norm(dim=-1)
        nearest = distance.argsort(stable=True).tolist()
        chosen = [nearest[rank] for rank in PAIR_RANKS if rank < len(nearest)]
        matches = match_image(street, camera, [spreads[i] for i in chosen], poses[frame], rng)
        for reference, match in zip(chosen, matches, strict=True):
            number += 1
            if len(match.weight) > 0:
                path = layout.correspondence_path(home, condition, number)
                layout.write_correspondences(path, files.reference_names[reference], name, *match)
