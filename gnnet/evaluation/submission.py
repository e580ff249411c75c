"""Result files for the benchmark at visuallocalization.net: written, and checked before they are handed in.

`python -m gnnet.evaluation.submission FILE DATASET [ROOT]` checks one.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial import cKDTree

from gnnet.geometry.pose import Pose, rotation_angle
from gnnet.localization.result import Localization
from gnnet.scenes.formats.poses import PoseLine, read_pose_lines, write_pose_file
from gnnet.scenes.index import open_scene
from gnnet.scenes.layouts.cmu_slice import parse_name
from gnnet.scenes.layouts.registry import DATASETS, reader_of
from gnnet.scenes.layouts.robotcar_models import CAMERAS
from gnnet.scenes.problems import BadInput
from gnnet.scenes.scene import Scene, SceneImage

_LIKE_ROBOTCAR = ("robotcar", "toy")
_UNIT = 1e-3  # |q| may differ from 1 by so much
_CLEARLY = 0.45  # another reading must place such a part more of the queries near references
_FEWEST = 5  # queries; of fewer nothing is told
_PART = 0.3  # of the queries that another reading must place near references
_NEIGHBOURS = 8  # references that a query's rotation is compared with
_SHOWN = 20  # messages of a kind that are printed

_EPILOG = """\
examples:
  python -m gnnet.evaluation.submission results.txt robotcar
  python -m gnnet.evaluation.submission results.txt robotcar /data/RobotCar-Seasons
  python -m gnnet.evaluation.submission results.txt cmu /data/Extended-CMU-Seasons

With ROOT the names are compared with the dataset's queries, and the camera centres with its references.
Exit status: 0 if no error was found, 1 if one was, 2 for wrong usage."""


class Submitted(NamedTuple):
    """What became of the queries: lines written, queries that failed, and queries that the benchmark does not score."""

    lines: int
    failed: int
    not_scored: int


@dataclass(frozen=True)
class Validation:
    """What a check of a result file found.

    Args:
        lines: of the file that are neither empty nor a comment.
        errors: what the benchmark would refuse or score wrongly.
        warnings: what may be meant so.
        facts: what was found in order.
    """

    lines: int
    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    facts: tuple[str, ...]


def write_submission(path: str | Path, localizations: Iterable[Localization], *, dataset: str) -> Submitted:
    """Write the poses of the localized queries as the dataset's benchmark wants them; a failed query has no line.

    Names are `rear/<timestamp>.jpg` for RobotCar Seasons and the toy town (left and right images are
    not scored and left out), the file's name alone for Extended CMU Seasons, the scene's for others.

    Args:
        path: of the file; its folder is made, and the file appears when it is complete.
        localizations: of the queries, with the scene's names.
        dataset: one of those that `python -m gnnet.scenes` knows.

    Raises:
        ValueError: an unknown dataset, a name of another form, a pose that is not finite, or two
            queries that become one name.
    """
    _require_known(dataset)
    poses: dict[str, Pose] = {}
    origin: dict[str, str] = {}
    failed = not_scored = 0
    for localization in localizations:
        name = submitted_name(localization.name, dataset=dataset)
        if name is None:
            not_scored += 1
            continue
        if name in origin:
            raise ValueError(
                f"queries {origin[name]} and {localization.name} are both {name} in a {dataset} submission; expected "
                "one localization a name, so leave out one of the two"
            )
        origin[name] = localization.name
        if localization.cam_from_world is None:
            failed += 1
        else:
            poses[name] = localization.cam_from_world
    write_pose_file(path, poses)
    return Submitted(len(poses), failed, not_scored)


def submitted_name(name: str, *, dataset: str) -> str | None:
    """The name of a scene's image in the dataset's result file; None if the benchmark does not score it.

    Raises:
        ValueError: if it is no image's name of the dataset.
    """
    if dataset in _LIKE_ROBOTCAR:
        parts = PurePosixPath(name).parts
        if len(parts) != 3 or parts[1] not in CAMERAS:
            raise ValueError(f"query {name!r} is no image of {dataset}; expected <condition>/rear/<timestamp>.jpg")
        return f"rear/{parts[2]}" if parts[1] == "rear" else None
    return PurePosixPath(name).name if dataset == "cmu" else name


def validate_submission(
    path: str | Path, *, dataset: str, root: str | Path | None = None, progress: bool = False
) -> Validation:
    """Check a result file line by line, and with `root` against the dataset.

    Lines are checked for their form, names that stand twice, and quaternions of unit length. With the
    dataset, every name must be a query; and if its camera centres −Rᵀt lie off the references where
    another reading of the numbers would place them near, that reading is named as the error.

    Args:
        path: of the file.
        dataset: one of those that `python -m gnnet.scenes` knows.
        root: the dataset's folder, `dataset.root`; None leaves out what needs it. Nothing is written there.
        progress: show progress bars.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no text, or an unknown dataset.
    """
    _require_known(dataset)
    bad = BadInput("skip")
    lines = read_pose_lines(path, bad)
    count = len(lines) + len(bad.problems)
    errors, warnings, facts = [*bad.problems], [], [f"{count} lines"]
    for line in lines:
        errors += _line_errors(line, dataset, f"{path} line {line.number}")
    if count == 0:
        errors.append(f"{path} holds no pose; expected a line a localized query")
    if root is not None:
        try:
            scene = _open(dataset, Path(root), progress)
        except (OSError, ValueError) as error:
            errors.append(f"{path} was not compared with the dataset, as it cannot be read: {error}")
        else:
            found = _against_dataset(lines, scene, dataset, path)
            errors += found.errors
            warnings += found.warnings
            facts += found.facts
    return Validation(count, tuple(errors), tuple(warnings), tuple(facts))


def _require_known(dataset: str) -> None:
    if dataset not in DATASETS:
        raise ValueError(f"dataset {dataset!r} is not known; expected one of {', '.join(DATASETS)}")


def _open(dataset: str, root: Path, progress: bool) -> Scene:
    # The toy town is read as what it is on disk: its own reader may render another town over it.
    name = "robotcar" if dataset in _LIKE_ROBOTCAR else dataset
    settings = {"test_queries": True} if name == "robotcar" else {}
    reader = reader_of(name)
    return open_scene(partial(reader, **settings), root, on_bad="skip", progress=progress)


def _line_errors(line: PoseLine, dataset: str, source: str) -> list[str]:
    errors = []
    if dataset in _LIKE_ROBOTCAR and re.fullmatch(r"rear/\d+\.jpg", line.name, re.ASCII) is None:
        errors.append(
            f"{source} names {line.name!r}; expected rear/<timestamp>.jpg, without the condition, and no left or right"
        )
    if dataset == "cmu":
        try:
            parse_name(line.name, source)
        except ValueError as error:
            errors.append(f"{error}, without folders")
    length = float(np.linalg.norm(line.quaternion))
    if not abs(length - 1) <= _UNIT:
        errors.append(
            f"{source} has a quaternion of length {length:.6g}; expected 1 to within {_UNIT:g}, so divide it by its "
            "length, and see that the order is qw qx qy qz tx ty tz"
        )
    return errors


def _against_dataset(lines: list[PoseLine], scene: Scene, dataset: str, path: str | Path) -> _Found:
    """Names against the dataset's queries, and camera centres against its references."""
    images = list(scene.images.values())
    # Where every image is of the map, as in a COLMAP folder, every image may be a query too.
    only_references = all(image.is_reference for image in images)
    queries: dict[str, SceneImage] = {}
    others: set[str] = set()
    for image in images:
        name = submitted_name(image.name, dataset=dataset)
        # A database image of CMU whose pose no file tells is no query either.
        if (image.is_reference and not only_references) or (dataset == "cmu" and "/database/" in image.name):
            others.add(name or image.name)
        elif name is not None:
            queries[name] = image
    errors, warnings = [], []
    for line in lines:
        if line.name not in queries:
            what = "a reference of" if line.name in others else "no query of"
            errors.append(
                f"{path} line {line.number} names {line.name}, which is {what} {scene.name}; expected queries alone"
            )
    known = [line for line in lines if line.name in queries]
    missing = len(queries) - len(known)
    facts = [f"{len(known)} of {len(queries)} queries of {scene.name} have a line"]
    if missing:
        warnings.append(f"{missing} of {len(queries)} queries have no line; each counts as failed")
    if scene.problems:
        warnings.append(f"{len(scene.problems)} problems of the dataset, the first: {scene.problems[0]}")
    references = [image for image in images if image.is_reference and image.cam_from_world is not None]
    placed = _place(known, [_map_of(queries[line.name], dataset) for line in known], references, dataset)
    if placed is None:
        facts.append(
            f"camera centres were not compared with references: that needs {_FEWEST} queries and references with poses"
        )
        return _Found(errors, warnings, facts)
    facts.append(
        f"the camera centres lie {np.median(placed.metres):.3g} m from the nearest reference (median); the references "
        f"lie {placed.spacing:.3g} m apart, within {placed.extent:.3g} m"
    )
    misread = _misread(placed, path)
    if misread is not None:
        errors.append(misread)
    elif np.mean(placed.far) > 0.5:
        warnings.append(
            f"{np.mean(placed.far):.0%} of the camera centres lie far from all references; see that the poses are "
            "cam_from_world, with the translation, in the dataset's world and metres"
        )
    return _Found(errors, warnings, facts)


def _map_of(image: SceneImage, dataset: str) -> str:
    """Images of one map share a world; the slices of CMU may not."""
    return PurePosixPath(image.name).parts[0] if dataset == "cmu" else ""


class _Found(NamedTuple):
    errors: list[str]
    warnings: list[str]
    facts: list[str]


class _Placed(NamedTuple):
    """Queries (Q,) among the references of their map, by how the numbers are read.

    `metres` to the nearest reference, read as they should be; `distances` (reading, Q) in the map's unit,
    below which a camera is near: readings are translation, centre, and translation with quaternion
    x y z w. `far` are more than a quarter of the map away. `turned` (2, Q) is the angle to the most alike of the
    references about t, for R and for Rᵀ. `spacing` and `extent` of the references in metres (medians over queries).
    """

    metres: np.ndarray
    distances: np.ndarray
    far: np.ndarray
    turned: np.ndarray
    spacing: float
    extent: float


def _place(lines: list[PoseLine], maps: list[str], references: list[SceneImage], dataset: str) -> _Placed | None:
    """None where there are too few queries, or no map with two references at different positions."""
    parts = []
    for name in sorted(set(maps)):
        members = [line for line, own in zip(lines, maps, strict=True) if own == name]
        poses = [image.cam_from_world for image in references if _map_of(image, dataset) == name]
        if len(poses) > 1:
            parts += _place_in_map(members, Pose.stack(poses))
    if sum(part[0].shape[1] for part in parts) < _FEWEST:
        return None
    distances, turned, spacing, extent = (np.concatenate(columns, -1) for columns in zip(*parts, strict=True))
    unit = np.maximum(2 * spacing, 0.02 * extent)
    far = distances[0] > np.maximum(0.25 * extent, unit)
    return _Placed(distances[0], distances / unit, far, turned, float(np.median(spacing)), float(np.median(extent)))


def _place_in_map(lines: list[PoseLine], references: Pose) -> list[tuple[np.ndarray, ...]]:
    """Distances in metres (reading, Q), angles (2, Q), and the references' spacing and extent (Q,); or nothing."""
    centers = references.center().numpy()
    tree = cKDTree(centers)
    count = min(_NEIGHBOURS, len(centers))
    apart = tree.query(centers, k=count)[0]
    # Several cameras may share one position: the nearest reference that is not there.
    apart = np.where(apart > 0, apart, np.inf).min(1)
    extent = float(np.linalg.norm(np.quantile(centers, 0.95, axis=0) - np.quantile(centers, 0.05, axis=0)))
    apart = apart[np.isfinite(apart)]
    if not (len(apart) and extent > 0):
        return []
    spacing = float(np.quantile(apart, 0.9))
    t = np.stack([line.translation for line in lines])
    q = torch.from_numpy(np.stack([line.quaternion / np.abs(line.quaternion).max() for line in lines]))
    pose, shuffled = (Pose.from_quaternion(order, torch.from_numpy(t)) for order in (q, q[:, [3, 0, 1, 2]]))
    readings = (pose.center().numpy(), t, shuffled.center().numpy())
    distances = np.stack([tree.query(positions)[0] for positions in readings])
    near = torch.from_numpy(tree.query(t, k=count)[1].reshape(len(t), -1))
    alike = references.rotation[near].transpose(-1, -2)
    turned = [rotation_angle(r[:, None] @ alike).min(1).values for r in (pose.rotation, pose.rotation.mT)]
    return [(distances, torch.stack(turned).numpy(), np.full(len(t), spacing), np.full(len(t), extent))]


def _misread(placed: _Placed, path: str | Path) -> str | None:
    """The reading that places clearly more of the queries near references than the right one, in words.

    Queries that are far by both tell nothing: these may have been localized wrongly. How near is near is
    not fixed, as queries may leave the references' path; but it is at least the map's unit, as any camera
    is near a sparse map, and at most half of a dense one.
    """
    radii = np.geomspace(1, 25, 64)
    is_near = placed.distances[..., None] <= radii  # (reading, Q, radius)
    near, either = is_near.sum(1), (is_near | is_near[0]).sum(1)
    count, more = is_near.shape[1], near - near[0]
    clear = (near >= max(_FEWEST, _PART * count)) & (more > 0) & (more >= _CLEARLY * either)
    if not clear.any():
        return None
    best, radius = np.unravel_index(np.where(clear, more, 0).argmax(), more.shape)
    proof = (
        f"so read, {near[best, radius]} of {count} cameras are near references, and {near[0, radius]} as they should "
        "be read, with the centre −Rᵀt"
    )
    if best == 2:
        return f"{path}: these look like quaternions x y z w ({proof}); expected w x y z, so put w first"
    as_they_are, inverted = np.median(placed.turned, axis=1)
    if inverted < as_they_are:
        return (
            f"{path}: these look like inverted poses, world_from_cam ({proof}, and the rotations agree when "
            "transposed); expected cam_from_world, so invert them"
        )
    return f"{path}: these look like camera centres, not translations ({proof}); expected t = −R·centre"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on arguments (those of the process by default); returns the exit status.

    Raises:
        SystemExit: with status 2 for wrong usage, 0 for --help.
    """
    parser = argparse.ArgumentParser(
        prog="python -m gnnet.evaluation.submission",
        description="Check a result file (name qw qx qy qz tx ty tz a line) before it is handed in.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the result file")
    parser.add_argument("dataset", choices=DATASETS, metavar="DATASET", help=f"one of {', '.join(DATASETS)}")
    parser.add_argument("root", type=Path, nargs="?", metavar="ROOT", help="the dataset's folder, as dataset.root")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = parser.parse_args(argv)
    try:
        validation = validate_submission(
            arguments.file, dataset=arguments.dataset, root=arguments.root, progress=not arguments.quiet
        )
    except (OSError, ValueError) as error:
        print(error)
        return 1
    for kind, messages in (("", validation.facts), ("warning: ", validation.warnings), ("error: ", validation.errors)):
        for message in messages[:_SHOWN]:
            print(f"{kind}{message}")
        if len(messages) > _SHOWN:
            print(f"{kind}and {len(messages) - _SHOWN} more")
    if arguments.root is None:
        print("not compared with the dataset: give its folder as ROOT")
    errors, warnings = len(validation.errors) or "none", len(validation.warnings) or "none"
    print(f"{arguments.file}: errors: {errors}, warnings: {warnings}")
    return 1 if validation.errors else 0


if __name__ == "__main__":
    sys.exit(main())
