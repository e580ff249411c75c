"""Result files of benchmarks: written, and checked before they are handed in.

`python -m gnnet.evaluation.submission FILE DATASET [ROOT]` checks one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial import cKDTree

from gnnet.evaluation.result_formats import FORMATS, ResultFormat, format_of
from gnnet.geometry.pose import Pose, rotation_angle
from gnnet.localization.result import Localization
from gnnet.scenes.formats.poses import PoseLine
from gnnet.scenes.problems import BadInput
from gnnet.scenes.scene import Scene, SceneImage

_UNIT = 1e-3  # |q| may differ from 1 by so much
_CLEARLY = 0.45  # share of the queries by which another reading must place more near references
_FEWEST = 5  # queries needed to compare readings
_PART = 0.3  # share of the queries that another reading must place near references
_NEIGHBOURS = 8  # references that a query's rotation is compared with
_SHOWN = 20  # messages of a kind that are printed

_EPILOG = """\
examples:
  python -m gnnet.evaluation.submission results.txt robotcar
  python -m gnnet.evaluation.submission results.txt robotcar /data/RobotCar-Seasons
  python -m gnnet.evaluation.submission results.txt cmu /data/Extended-CMU-Seasons
  python -m gnnet.evaluation.submission results.txt aachen night_time_queries_with_intrinsics.txt

With ROOT the names are compared with the dataset's queries, and the camera centres with its references. For aachen and
inloc it may be a query list, for eth3d it is the folder that holds rgb.txt.
Exit status: 0 if no error was found, 1 if one was, 2 for wrong usage."""


@dataclass
class Validation:
    """What a check of a result file found.

    Args:
        lines: number of lines that are neither empty nor a comment.
        errors: messages about what the benchmark would refuse or score wrongly.
        warnings: messages about what may be intended.
        facts: messages about what is in order.
    """

    lines: int
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)


def write_submission(path: str | Path, localizations: Iterable[Localization], *, dataset: str) -> list[str]:
    """Write the poses of the localized queries as the dataset's benchmark wants them; a failed query has no line.

    A query that the benchmark does not score has none either.

    Args:
        path: of the file; its folder is made, and the file appears when it is complete.
        localizations: of the queries, with the scene's names.
        dataset: gives the names their form, see `format_of`.

    Returns:
        Names of queries that the benchmark's format cannot express.

    Raises:
        ValueError: an unknown dataset, a pose that is not finite, or two queries that become one name.
    """
    localizations = list(localizations)
    form = format_of(dataset, [localization.name for localization in localizations])
    poses: dict[str, Pose] = {}
    origin: dict[str, str] = {}
    unknown: list[str] = []
    for localization in localizations:
        try:
            name = form.submitted_name(localization.name)
        except ValueError:
            unknown.append(localization.name)
            continue
        if name is None:
            continue
        if name.split() != [name] or form.name_error(name, "") is not None:
            unknown.append(localization.name)
            continue
        if name in origin:
            raise ValueError(
                f"queries {origin[name]} and {localization.name} are both {name} in a {dataset} submission; expected "
                "one localization a name, so leave out one of the two"
            )
        origin[name] = localization.name
        if localization.cam_from_world is not None:
            poses[name] = localization.cam_from_world
    form.write(path, poses)
    return unknown


def validate_submission(
    path: str | Path, *, dataset: str, root: str | Path | None = None, progress: bool = False
) -> Validation:
    """Check a result file line by line, and with `root` against the dataset.

    Lines are checked for their form, names that stand twice, and quaternions of unit length. With the
    dataset, every name must be a query; and if its camera centres −Rᵀt lie off the references where
    another reading of the numbers would place them near, that reading is named as the error.

    Args:
        dataset: one of `FORMATS`.
        root: the dataset's folder, `dataset.root`; None leaves out what needs it. Nothing is written there.
        progress: show progress bars.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no text, or an unknown dataset.
    """
    form = format_of(dataset)
    bad = BadInput("skip")
    lines = form.read(path, bad)
    found = Validation(len(lines) + len(bad.problems), errors=[*bad.problems])
    found.facts.append(f"{found.lines} lines")
    for line in lines:
        source = f"{path} line {line.number}"
        if wrong := form.name_error(line.name, source):
            found.errors.append(wrong)
        elif len(line.name.split()) > 1:
            found.errors.append(
                f"{source} names {line.name!r}, and a line is split at its spaces; leave it out, or rename the image"
            )
        length = float(np.linalg.norm(line.quaternion))
        if not abs(length - 1) <= _UNIT:
            found.errors.append(
                f"{source} has a quaternion of length {length:.6g}; expected 1 to within {_UNIT:g}, so divide it by "
                f"its length, and see that the order is {form.line}"
            )
    if found.lines == 0:
        found.errors.append(f"{path} holds no pose; expected a line a localized query")
    if root is not None:
        try:
            scene = form.open(Path(root), progress)
        except (OSError, ValueError) as error:
            found.errors.append(f"{path} was not compared with the dataset, as it cannot be read: {error}")
        else:
            queries = _check_names(found, lines, scene, form, path)
            _check_positions(found, lines, queries, scene, form, path)
    return found


def _check_names(
    found: Validation, lines: list[PoseLine], scene: Scene, form: ResultFormat, path: str | Path
) -> dict[str, SceneImage]:
    """Check that the lines name queries of the dataset; these queries, by their name in the file."""
    images = list(scene.images.values())
    # Where every image is of the map, as in a COLMAP folder, every image may be a query too.
    only_references = all(image.is_reference for image in images)
    queries: dict[str, SceneImage] = {}
    others: set[str] = set()
    for image in images:
        name = form.submitted_name(image.name)
        if (image.is_reference and not only_references) or not form.is_query(image):
            others.add(name or image.name)
        elif name is not None:
            queries[name] = image
    for line in lines:
        if line.name not in queries:
            what = "a reference of" if line.name in others else "no query of"
            found.errors.append(
                f"{path} line {line.number} names {line.name}, which is {what} {scene.name}; expected queries alone"
            )
    missing = len(queries) - sum(line.name in queries for line in lines)
    found.facts.append(f"{len(queries) - missing} of {len(queries)} queries of {scene.name} have a line")
    if missing:
        found.warnings.append(f"{missing} of {len(queries)} queries have no line; each counts as failed")
    if scene.problems:
        found.warnings.append(f"{len(scene.problems)} problems of the dataset, the first: {scene.problems[0]}")
    return queries


def _check_positions(
    found: Validation, lines: list[PoseLine], queries: dict[str, SceneImage], scene: Scene, form: ResultFormat,
    path: str | Path,
) -> None:  # fmt: skip
    """Check that the camera centres lie near the references of their map."""
    references: dict[str, list[Pose]] = {}
    for image in scene.images.values():
        if image.is_reference and image.cam_from_world is not None:
            references.setdefault(form.map_of(image.name), []).append(image.cam_from_world)
    of_map: dict[str, list[PoseLine]] = {}
    for line in lines:
        if line.name in queries:
            of_map.setdefault(form.map_of(queries[line.name].name), []).append(line)
    placed = _place(of_map, references)
    if placed is None:
        found.facts.append(
            f"camera centres were not compared with references: that needs {_FEWEST} queries and references with poses"
        )
        return
    metres = placed.distances[0]
    found.facts.append(
        f"the camera centres lie {np.median(metres):.3g} m from the nearest reference (median); the references "
        f"lie {np.median(placed.spacing):.3g} m apart, within {np.median(placed.extent):.3g} m"
    )
    far = np.mean(metres > np.maximum(0.25 * placed.extent, placed.unit))
    misread = _misread(placed, path)
    if misread is not None:
        found.errors.append(misread)
    elif far > 0.5:
        found.warnings.append(
            f"{far:.0%} of the camera centres lie far from all references; see that the poses are "
            "cam_from_world, with the translation, in the dataset's world and metres"
        )


class _Placed(NamedTuple):
    """Where Q queries are among the references of their map, by how the numbers of the file are read.

    The readings are: the translation, as it should be; a camera centre; a translation with a quaternion x y z w.

    Args:
        distances: (reading, Q) metres to the nearest reference.
        turned: (2, Q) angle of R, and of Rᵀ, to the most similar rotation of the references around t.
        spacing, extent: (Q,) metres between neighbouring references, and across the map.
    """

    distances: np.ndarray
    turned: np.ndarray
    spacing: np.ndarray
    extent: np.ndarray

    @property
    def unit(self) -> np.ndarray:
        """(Q,) metres from a reference within which a camera is near it."""
        return np.maximum(2 * self.spacing, 0.02 * self.extent)


def _place(queries: dict[str, list[PoseLine]], references: dict[str, list[Pose]]) -> _Placed | None:
    """Queries and references by map; None where there are too few queries, or no map with two positions."""
    parts: list[_Placed] = []
    for name, lines in sorted(queries.items()):
        poses = references.get(name, [])
        if len(poses) > 1:
            parts += _place_in_map(lines, Pose.stack(poses))
    if sum(len(part.spacing) for part in parts) < _FEWEST:
        return None
    return _Placed(*(np.concatenate(arrays, -1) for arrays in zip(*parts, strict=True)))


def _place_in_map(lines: list[PoseLine], references: Pose) -> list[_Placed]:
    """The queries of one map, as a list of one, or of none where all references stand at one position."""
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
    around = references.rotation[near].mT
    turned = [rotation_angle(r[:, None] @ around).min(1).values for r in (pose.rotation, pose.rotation.mT)]
    return [_Placed(distances, torch.stack(turned).numpy(), np.full(len(t), spacing), np.full(len(t), extent))]


def _misread(placed: _Placed, path: str | Path) -> str | None:
    """The reading that places clearly more of the queries near references than the right one, in words.

    Queries that are far by both readings do not count, as they may have been localized wrongly. Several radii
    are tried, as queries may leave the references' path: from one unit of the map, since any camera is near a
    sparse map, to 25.
    """
    radii = np.geomspace(1, 25, 64)
    is_near = (placed.distances / placed.unit)[..., None] <= radii  # (reading, Q, radius)
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
        description="Check a result file (name qw qx qy qz tx ty tz a line, or as the benchmark wants it) before it is "
        "handed in.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the result file")
    parser.add_argument("dataset", choices=FORMATS, metavar="DATASET", help=f"one of {', '.join(FORMATS)}")
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
